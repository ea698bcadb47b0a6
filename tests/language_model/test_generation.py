"""Generation: caches, padding, beams, assistants, chunks; every encoder runs once."""

import copy

import catalog_llms
import pytest
import tiny
import torch
from helpers import compose_tiny, needs_5_23, uneven_inputs
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    QuantizedCache,
    StaticCache,
    TextIteratorStreamer,
)

from cornstarch_hf.language_model.calling import cache_keyword

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def pair():
    model, processor = compose_tiny(["clip", "whisper"])
    model.generation_config.eos_token_id = None
    return model, processor


def one(inputs, processor, sample):
    """The inputs of one sample, unpadded."""
    keep = inputs["attention_mask"][sample].bool()
    single = {"input_ids": inputs["input_ids"][sample][keep][None], "attention_mask": keep[keep].long()[None]}
    slices = {0: ([0], [0]), 1: ([1, 2], [1]), 2: ([], [])}[sample]
    for key, items in zip(("pixel_values", "input_features"), slices, strict=True):
        if items:
            single[key] = inputs[key][items]
    return single


@pytest.mark.parametrize("language_model", ["llama", "gpt2", "gemma3", "falcon_h1"])
def test_cached_equals_uncached(language_model):
    model, processor = compose_tiny(["clip", "whisper"], tiny.LANGUAGE_MODELS[language_model]())
    inputs = uneven_inputs(processor)
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, use_cache=False))


@pytest.mark.parametrize(("model_type", "cached"), [("mamba", True), ("minimax", True), ("openai-gpt", False)])
def test_a_language_model_keeps_the_cache_that_it_has(model_type, cached):
    model, processor = compose_tiny(["clip", "whisper"], catalog_llms.build(model_type))
    model.generation_config.eos_token_id = None
    cache = cache_keyword(model.language_model)
    assert (cache is not None) == cached
    inputs, seen = uneven_inputs(processor), []
    model.language_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(
            (given.get("input_ids", given.get("inputs_embeds")).shape[1], given.get(cache) is not None)
        ),
        with_kwargs=True,
    )
    found = model.generate(**inputs, **GREEDY)
    length = inputs["input_ids"].shape[1]
    steps = [(1, True)] * 4 if cache else [(length + i, False) for i in range(1, 5)]
    assert seen[0][0] == length and seen[1:] == steps
    assert torch.equal(found, model.generate(**inputs, **GREEDY, use_cache=False))


def lengths_of(model, run):
    """How many tokens the language model's first layer sees at each of its steps."""
    inner = model.language_model.base_model
    layer, seen = (inner.h if hasattr(inner, "h") else inner.layers)[0], []
    hook = layer.register_forward_pre_hook(
        lambda _, args, given: seen.append((args[0] if args else given["hidden_states"]).shape[1]), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


def quantized(config):
    pytest.importorskip("optimum.quanto")
    return QuantizedCache(backend="quanto", config=config)


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "quantized": quantized,
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("language_model", tiny.LANGUAGE_MODELS)
def test_each_step_sees_one_token_with_a_cache_that_is_handed_in_and_without(language_model, cache):
    model, processor = compose_tiny(["clip", "whisper"], tiny.LANGUAGE_MODELS[language_model]())
    inputs, encoded = uneven_inputs(processor), []
    model.generation_config.eos_token_id = None
    for encoder in model.encoders.values():
        encoder.module.register_forward_hook(lambda *_: encoded.append(1))
    expected = model.generate(**inputs, **GREEDY, use_cache=False)
    handed = CACHES[cache](model.language_model.config)
    given = {} if handed is None else {"past_key_values": handed}
    encoded.clear()
    found = []
    lengths = lengths_of(model, lambda: found.append(model.generate(**inputs, **GREEDY, **given, disable_compile=True)))
    assert lengths == [inputs["input_ids"].shape[1], 1, 1, 1, 1]
    assert len(encoded) == 2, "each encoder runs once"
    if cache == "quantized":  # which rounds
        assert found[0].shape == expected.shape
    else:
        assert torch.equal(found[0], expected)


def test_a_cache_of_former_frequencies_is_made_anew():
    config = catalog_llms.configuration("phi3")
    limit = 30
    config.original_max_position_embeddings = limit
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                              "long_factor": [4.0] * 4, "original_max_position_embeddings": limit}  # fmt: skip
    phi3 = catalog_llms.built(catalog_llms.model_class("phi3"), config)
    model, processor = compose_tiny(["clip", "whisper"], phi3)
    model.generation_config.eos_token_id = phi3.generation_config.eos_token_id = None
    inputs, seen = uneven_inputs(processor), []
    length = inputs["input_ids"].shape[1]
    assert length < limit
    options = {"max_new_tokens": 8 + limit - length, "do_sample": False}
    hook = model.language_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given.get("input_ids", given.get("inputs_embeds")).shape[1]),
        with_kwargs=True,
    )
    cached = model.generate(**inputs, **options)
    hook.remove()
    assert [n for n in seen if n > 1] == [length, limit + 1]  # the prompt, and all of it again at the limit
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))
    text = {"input_ids": torch.arange(3, 29)[None], "attention_mask": torch.ones(1, 26, dtype=torch.long)}
    words = {"suppress_tokens": list(model.placeholder_ids().values()), **options}
    assert torch.equal(model.generate(**text, **options), phi3.generate(**text, **words))


def test_without_a_cache_embeddings_would_be_forgotten():
    model, processor = compose_tiny(["clip"], catalog_llms.build("openai-gpt"))
    inputs = uneven_inputs(processor)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel has no cache.*generate from input_ids"):
        model.generate(**inputs, inputs_embeds=embeds, **GREEDY)


def test_generation_counts_positions_from_the_language_models_first():
    model, processor = compose_tiny(["clip", "whisper"], catalog_llms.build("roberta"))
    model.generation_config.eos_token_id = None
    inputs, seen = uneven_inputs(processor), []
    model.language_model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    together = model.generate(**inputs, **GREEDY)
    lengths = inputs["attention_mask"].sum(-1)
    assert seen[0].min() == 2 and seen[0].amax(-1).tolist() == (lengths + 1).tolist()
    assert [x.flatten().tolist() for x in seen[1:]] == [(lengths + i).tolist() for i in range(2, 6)]
    for sample in range(3):
        alone = model.generate(**one(inputs, processor, sample), **GREEDY)
        assert torch.equal(together[sample, -5:], alone[0, -5:])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_left_padded_batch_equals_its_singles(pair, options):
    model, processor = pair
    inputs = uneven_inputs(processor)
    together = model.generate(**inputs, **GREEDY, **options)
    each = options.get("num_return_sequences", 1)
    for sample in range(3):
        alone = model.generate(**one(inputs, processor, sample), **GREEDY, **options)
        rows = together[sample * each : (sample + 1) * each]
        assert torch.equal(rows[:, -5:], alone[:, -5:])


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static", "disable_compile": True},
        pytest.param({"prefill_chunk_size": 4}, marks=needs_5_23),
        pytest.param(
            {"prefill_chunk_size": 7, "cache_implementation": "static", "disable_compile": True}, marks=needs_5_23
        ),
    ],
)
def test_static_cache_and_chunked_prefill_equal_the_plain_run(pair, options):
    model, processor = pair
    inputs = uneven_inputs(processor)
    assert torch.equal(model.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY, **options))


def test_chunks_of_a_prefill_without_their_features_are_refused(pair, monkeypatch):
    model, processor = pair
    monkeypatch.setattr("cornstarch_hf.language_model.generation.SLICES_FEATURES", False)
    with pytest.raises(ValueError, match=r"cannot split features .*leave out prefill_chunk_size, or upgrade"):
        model.generate(**uneven_inputs(processor), **GREEDY, prefill_chunk_size=4)


def test_assisted_and_prompt_lookup_equal_the_plain_run(pair):
    model, processor = pair
    inputs = one(uneven_inputs(processor), processor, 0)
    plain = model.generate(**inputs, **GREEDY)
    calls = []
    assistant = copy.deepcopy(model)
    for which in (model, assistant):
        which.vision_encoder.register_forward_hook(lambda *_, w=which: calls.append(w))
    assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant), plain)
    assert calls == [model, assistant], "each encodes once"
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2), plain)
    model.vision_encoder._forward_hooks.clear()


def test_streaming(pair):
    model, processor = pair
    inputs = one(uneven_inputs(processor), processor, 0)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    tokens = model.generate(**inputs, **GREEDY, streamer=streamer)
    assert "".join(streamer) == processor.decode(tokens[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        pytest.param({"prefill_chunk_size": 4}, marks=needs_5_23),
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_each_encoder_runs_once(pair, options):
    model, processor = pair
    calls = []
    hooks = [e.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, e in model.encoders.items()]
    model.generate(**uneven_inputs(processor), **(GREEDY | options))
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["audio", "vision"]


def test_placeholders_are_never_generated(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    ids = [model.config.modality(n)["token_id"] for n in model.config.encoders]
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert torch.isinf(out.scores[0][:, ids]).all()


def test_generation_from_embeddings():
    model, processor = compose_tiny(["clip"])
    model.set_modality_token_ids({"vision": 9})
    ids = torch.tensor([[1, *[9] * 5, 30, 31]])
    pixels = uneven_inputs(processor)["pixel_values"][:1]
    embeds = model.get_input_embeddings()(ids)
    by_ids = model.generate(input_ids=ids, pixel_values=pixels, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=pixels, **GREEDY), by_ids[:, 8:])


def test_wrong_counts_and_typing_errors_are_refused_before_the_prefill(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    with pytest.raises(ValueError, match="pixel_value"):
        model.generate(**inputs, pixel_value=1, **GREEDY)
    with pytest.raises(ValueError, match="vision.*15 placeholder.*10 features"):
        model.generate(**(inputs | {"pixel_values": inputs["pixel_values"][:2]}), **GREEDY)


def test_eos_may_be_a_list(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    tokens = model.generate(**inputs, **GREEDY)
    stop = tokens[:, -5].tolist()
    assert model.generate(**inputs, **GREEDY, eos_token_id=stop).shape[1] == tokens.shape[1] - 4


def test_generation_config_of_the_language_model_is_kept(tmp_path):
    language_model = tiny.llama()
    language_model.generation_config.temperature, language_model.generation_config.do_sample = 0.3, True
    model, _ = compose_tiny(["clip"], language_model)
    assert model.generation_config.temperature == 0.3
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.temperature == 0.3


def second_turn(inputs, processor, sequences):
    """Whole rows with a second image each, and the inputs of that turn alone."""
    turn = processor(
        text=["the sum <image> is"] * 3, images=[[tiny.image(i + 30)] for i in range(3)], return_tensors="pt"
    )
    ids = torch.cat([sequences, turn["input_ids"]], 1)
    added = torch.ones(3, ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], added], 1)
    images, new = inputs["pixel_values"], turn["pixel_values"]
    whole = {
        "input_ids": ids, "attention_mask": mask, "input_features": inputs["input_features"],
        "pixel_values": torch.cat([images[:1], new[:1], images[1:], new[1:]]),
    }  # fmt: skip
    return whole, turn


@pytest.mark.parametrize("language_model", ["llama", "gpt2", "falcon_h1"])
@pytest.mark.parametrize("options", [{}, pytest.param({"prefill_chunk_size": 4}, marks=needs_5_23)])
def test_a_second_turn_goes_on_from_the_cache(language_model, options):
    model, processor = compose_tiny(["clip", "whisper"], tiny.LANGUAGE_MODELS[language_model]())
    model.generation_config.eos_token_id = None
    inputs = uneven_inputs(processor)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    whole, turn = second_turn(inputs, processor, first.sequences)
    expected = model.generate(**whole, **GREEDY)
    ids, mask, images = whole["input_ids"], whole["attention_mask"], turn["pixel_values"]
    new = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    for form in (whole, new, new | {"input_ids": ids[:, first.past_key_values.get_seq_length() :]}):
        cache = copy.deepcopy(first.past_key_values)
        found = model.generate(**form, **GREEDY, **options, past_key_values=cache)
        assert torch.equal(found[:, -5:], expected[:, -5:])


def test_a_second_turn_with_too_few_or_half_an_image(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    whole, _ = second_turn(inputs, processor, first.sequences)

    def goes_on(crop=None, **changes):
        cache = copy.deepcopy(first.past_key_values)
        if crop:
            cache.crop(crop - cache.get_seq_length())
        model.generate(**whole | changes, **GREEDY, past_key_values=cache)

    with pytest.raises(ValueError, match=r"vision: the text has 15 placeholder tokens .* no input"):
        goes_on(pixel_values=None)
    with pytest.raises(ValueError, match=r"vision: the text has 15 placeholder tokens .* gave 20 features"):
        goes_on(pixel_values=whole["pixel_values"][:4])
    row = (whole["input_ids"][0] == processor.image_token_id).nonzero()[2].item()
    with pytest.raises(ValueError, match=r"vision, sample 0: 2 of its placeholders are in the cache.* have 5 features"):
        goes_on(crop=row)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1}])
def test_stop_strings_and_tokenizers_stay_out_of_the_model(pair, options):
    model, processor = pair
    inputs = one(uneven_inputs(processor), processor, 0)
    options = GREEDY | {"max_new_tokens": 8} | options
    free = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    words = [processor.tokenizer.decode(token) for token in free[0, length:]]
    stop = next(word for word in words if word.isascii() and word.isalnum())
    stopped = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=processor.tokenizer)
    if "num_beams" not in options:  # of which some go on
        assert torch.equal(stopped, free[:, : length + words.index(stop) + 1])
    by_processor = model.generate(**inputs, **options, stop_strings=[stop], tokenizer=processor)  # as `serve` calls it
    assert torch.equal(by_processor, stopped)
    unused = model.generate(**inputs, **options, tokenizer=processor.tokenizer, assistant_tokenizer=processor.tokenizer)
    assert torch.equal(unused, free)


def test_token_healing_equals_the_language_models_and_refuses_media(pair):
    model, processor = pair
    tokenizer = processor.tokenizer
    text = {"input_ids": processor(text=["what is the su"], return_tensors="pt")["input_ids"]}
    words = {"suppress_tokens": list(model.placeholder_ids().values()), **GREEDY}
    healing = {"token_healing": True, "tokenizer": tokenizer}
    plain = copy.deepcopy(model.language_model)
    plain.generation_config = copy.deepcopy(model.generation_config)
    assert torch.equal(model.generate(**text, **GREEDY, **healing), plain.generate(**text, **words, **healing))
    inputs = one(uneven_inputs(processor), processor, 0)
    with pytest.raises(ValueError, match="vision: token_healing takes text alone, but the prompt has 5 placeholder"):
        model.generate(**inputs, **GREEDY, **healing)


def small_batches():
    return ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, auto_switch_to_flash=False)


def text_prompts(processor):
    return [list(ids) for ids in processor(text=["what is", "none at all a b"])["input_ids"]]


@pytest.mark.parametrize(
    ("language_model", "options"),
    [
        ("llama", {"attention": "eager"}),
        pytest.param("gemma3", {}, marks=pytest.mark.slow),
        ("qwen3", {"do_sample": True, "top_k": 1, "temperature": 0.5}),
    ],
)
def test_continuous_batching_of_text_equals_generate(language_model, options):
    model, processor = compose_tiny(["clip"], tiny.LANGUAGE_MODELS[language_model]())
    options, prompts = GREEDY | options, text_prompts(processor)
    model.set_attn_implementation(options.pop("attention", "sdpa"))
    expected = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    before = copy.deepcopy(model.generation_config)
    found = model.generate_batch(prompts, continuous_batching_config=small_batches(), **options)
    assert [x.error for x in found.values()] == [None, None]
    assert [x.generated_tokens for x in found.values()] == expected
    config = GenerationConfig(**options)
    again = model.generate_batch(prompts, config, continuous_batching_config=small_batches())
    assert [x.generated_tokens for x in again.values()] == expected
    assert model.generation_config == before


def test_continuous_batching_refuses_media_by_name(pair):
    model, processor = pair
    prompts, inputs = text_prompts(processor), one(uneven_inputs(processor), processor, 0)
    media = inputs["input_ids"].tolist()
    told = "takes the ids of text alone, but the prompt has 5 placeholder tokens: call generate"
    with pytest.raises(ValueError, match=rf"vision, sample 1: .* {told}"):
        model.generate_batch(prompts[:1] + media)
    with pytest.raises(ValueError, match=rf"vision, sample 0: .* {told}"):
        model.generate(inputs["input_ids"], cache_implementation="paged", **GREEDY)
    for key, name in (("pixel_values", "vision"), ("input_features", "audio"), ("tokenizer", "generate_batch")):
        with pytest.raises(ValueError, match=rf"{name}.*: .* takes the ids of text alone, got \['{key}'\]"):
            model.generate_batch(prompts, **{key: torch.ones(1)})
    with pytest.raises(ValueError, match="attention_mask: .* leave the padding out"):
        model.generate_batch(prompts, attention_mask=torch.tensor([[0, 1]]))
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small_batches())
    with pytest.raises(ValueError, match=rf"vision, sample 0: .* {told}"):
        manager.add_request(media[0])
    with pytest.raises(ValueError, match=rf"vision, sample 0: .* {told}"):
        manager.add_requests(media)


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2}, {"stop_strings": ["a"]}, {"token_healing": True}, {"repetition_penalty": 5.0}, {"min_p": 0.1},
        {"no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 1.2}, {"min_new_tokens": 2}, {"bad_words_ids": [[5]]},
    ],
)  # fmt: skip
def test_continuous_batching_refuses_what_it_would_pass_over(pair, option):
    model, processor = pair
    with pytest.raises(ValueError, match=rf"generate_batch\(\) cannot do {next(iter(option))}="):
        model.generate_batch(text_prompts(processor), **option)


def test_forward_takes_the_inputs_of_continuous_batching_with_its_cache_alone(pair):
    with pytest.raises(TypeError, match="unexpected keyword arguments .*block_table"):
        pair[0](torch.tensor([[5, 6]]), block_table=None)


WARPERS = [
    {"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.9}, {"typical_p": 0.5}, {"epsilon_cutoff": 3e-3},
    {"eta_cutoff": 3e-3}, {"top_h": 0.5}, {"temperature": 2.0, "top_k": 5, "top_p": 0.5, "renormalize_logits": True},
]  # fmt: skip


class Shift(LogitsProcessor):
    def __repr__(self):  # part of names of tests, which must be the same in every process
        return "Shift()"

    def __call__(self, input_ids, scores):
        return scores + torch.arange(scores.shape[-1]) / 100


def likely_placeholder():
    """A model whose likeliest word is the image's placeholder, and inputs with one."""
    model, processor = compose_tiny(["clip"])
    head, token_id = model.language_model.lm_head, model.config.modality("vision")["token_id"]
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features).index_fill(0, torch.tensor([token_id]), 5.0))
    return model, processor(text="what <image>", images=tiny.image(), return_tensors="pt"), token_id


@pytest.mark.parametrize("options", WARPERS, ids=str)
@pytest.mark.parametrize(
    "others", [{}, {"num_beams": 2}, {"repetition_penalty": 1.3, "remove_invalid_values": True}], ids=str
)
def test_placeholders_are_suppressed_before_the_warpers(options, others):
    model, inputs, token_id = likely_placeholder()
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "output_scores": True} | options | others
    options |= {"return_dict_in_generate": True, "logits_processor": LogitsProcessorList([Shift()])}
    native = copy.deepcopy(model.language_model)  # of the merged embeddings, with the ids for penalties
    embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    embeds[inputs["input_ids"] == token_id] = torch.cat(list(features)).detach()
    torch.manual_seed(0)
    found = model.generate(**inputs, **options)
    torch.manual_seed(0)
    ids = inputs["input_ids"]
    expected = native.generate(ids, inputs_embeds=embeds, **options, suppress_tokens=[token_id])
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))
    # The user's own come on top of it.
    torch.manual_seed(0)
    both = model.generate(**inputs, **options, suppress_tokens=found.sequences[0, ids.shape[1] :].tolist())
    assert not set(both.sequences[0, ids.shape[1] :].tolist()) & {
        token_id,
        *found.sequences[0, ids.shape[1] :].tolist(),
    }


@pytest.fixture(scope="module")
def behind():
    """A model whose placeholders' ids have no row in the table, inputs, and an equal one that has rows for them."""
    model, processor = compose_tiny(["clip", "whisper"], tiny.llama(vocab_size=300))
    model.generation_config.eos_token_id = None
    assert min(model.placeholder_ids().values()) >= 300
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(310, mean_resizing=False)
    processor(text="a", return_tensors="pt")
    text = "what is <image> what is <audio> what is the <image> what is"
    inputs = processor(
        text=text, images=[tiny.image(1), tiny.image(2)], audio=processor.items["audio"](0), sampling_rate=16_000, return_tensors="pt"
    )  # fmt: skip
    return model, dict(inputs), wide


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5}, {"encoder_repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}, {"guidance_scale": 1.5},
        {"no_repeat_ngram_size": 2, "num_beams": 2}, {"encoder_no_repeat_ngram_size": 1}, {"bad_words_ids": [[5], [7, 8]]},
        {"sequence_bias": {(9,): 2.0}}, {"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
        {"prompt_lookup_num_tokens": 3, "repetition_penalty": 1.5}, {"min_new_tokens": 3}, {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 2}, {"begin_suppress_tokens": [3]}, {"remove_invalid_values": True},
        {"renormalize_logits": True}, {"logits_processor": LogitsProcessorList([Shift()])},
    ],
    ids=str,
)  # fmt: skip
def test_what_looks_ids_up_knows_those_behind_the_table(behind, options):
    model, inputs, wide = behind
    options = GREEDY | {"max_new_tokens": 12} | options
    others = options | {"suppress_tokens": list(range(300, 310))}
    assert torch.equal(model.generate(**inputs, **options), wide.generate(**inputs, **others))
    if "prompt_lookup_num_tokens" in options:
        del options["prompt_lookup_num_tokens"]
        assert torch.equal(model.generate(**inputs, **options), wide.generate(**inputs, **others))


def narrow(**changes):
    return tiny.llama(seed=7, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, **changes)


@pytest.mark.parametrize(
    "options", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}, {"encoder_repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("draft", ["text", "same", "narrow", "other ids", "fewer modalities", "shared"])
def test_drafts_of_all_kinds_change_nothing(behind, draft, options):
    model, inputs, _ = behind
    llama = narrow(vocab_size=300)
    if draft == "text":
        assistant = tiny.llama(seed=5, vocab_size=300)
    elif draft == "same":
        assistant = copy.deepcopy(model)
    elif draft == "shared":
        assistant = copy.copy(model)
    else:
        assistant, _ = compose_tiny({"audio": "whisper"} if draft == "fewer modalities" else ["clip", "whisper"], llama)
        if draft == "other ids":  # each stands for the other's, or for a word
            assistant.set_modality_token_ids({"vision": 5, "audio": 300})
    options = GREEDY | {"max_new_tokens": 10} | options
    plain, runs = model.generate(**inputs, **options), []
    encoders = [m for m in (model, assistant) if hasattr(m, "encoders")]
    hooks = [
        e.module.register_forward_hook(lambda *_, e=e: runs.append(e)) for m in encoders for e in m.encoders.values()
    ]
    try:
        assert torch.equal(model.generate(**inputs, **options, assistant_model=assistant), plain)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(runs) == {"text": 2, "shared": 4, "fewer modalities": 3}.get(draft, 4)


def test_a_good_draft_sees_the_media(behind):
    """A copy drafts what the model would say: fewer steps of the model than tokens."""
    model, inputs, _ = behind
    assistant, steps = copy.deepcopy(model), []
    hook = model.language_model.register_forward_hook(lambda *_: steps.append(1))
    model.generate(**inputs, do_sample=False, max_new_tokens=20, assistant_model=assistant)
    hook.remove()
    assert len(steps) == 10, "every draft, of one token each, is taken"


def test_sampling_with_a_draft(behind):
    model, inputs, _ = behind
    options = {"do_sample": True, "max_new_tokens": 8, "repetition_penalty": 1.2, "top_p": 0.8}
    for assistant in (tiny.llama(seed=5, vocab_size=300), copy.deepcopy(model)):
        assert model.generate(**inputs, **options, assistant_model=assistant).max() < 302


def test_a_draft_of_another_tokenizer_drafts_from_text(behind):
    model, inputs, _ = behind
    tokenizer = tiny.tokenizer()
    other = tiny.tokenizer()
    plain = model.generate(**inputs, **GREEDY)
    words = {"tokenizer": tokenizer, "assistant_tokenizer": other}
    composed, _ = compose_tiny(["clip"], narrow(vocab_size=310))
    for assistant in (tiny.llama(seed=5, vocab_size=310), composed):
        assert torch.equal(model.generate(**inputs, **GREEDY, assistant_model=assistant, **words), plain)


def test_drafts_that_cannot_see_the_items_are_refused(behind):
    model, inputs, _ = behind
    more, _ = compose_tiny({"vision": "siglip"}, narrow(vocab_size=300))
    with pytest.raises(ValueError, match=r"assistant_model: vision: .* gives \[4, 4\] features where .* \[5, 5\]"):
        model.generate(**inputs, **GREEDY, assistant_model=more)
    other, _ = compose_tiny({"audio": "wav2vec2"}, narrow(vocab_size=300))
    with pytest.raises(ValueError, match=r"assistant_model: audio: .* takes .*input_values.* got .*input_features"):
        model.generate(**inputs, **GREEDY, assistant_model=other)
    with torch.no_grad():
        given = {"mm_encoder_outputs": {"vision": model.get_image_features(pixel_values=inputs["pixel_values"])}}
    rest = {key: value for key, value in inputs.items() if key != "pixel_values"} | given
    with pytest.raises(ValueError, match="assistant_model: vision: .* got mm_encoder_outputs of this model"):
        model.generate(**rest, **GREEDY, assistant_model=copy.deepcopy(model))
    with pytest.raises(ValueError, match="assistant_model cannot draft tokens for beams"):
        model.generate(**inputs, **GREEDY, num_beams=2, assistant_model=copy.deepcopy(model))
    with pytest.raises(ValueError, match="assistant_early_exit: a composed model cannot stop at a layer"):
        model.generate(**inputs, **GREEDY, assistant_early_exit=1)


def test_embeddings_cannot_hold_a_placeholder_behind_the_table(behind):
    model, inputs, wide = behind
    embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(max=299))
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    told = r"vision: inputs_embeds cannot hold .* id 300 has no row .* pass input_ids, or call resize_token_embeddings\(301\)"
    for call in (model, lambda **given: model.generate(**given, **GREEDY)):
        with pytest.raises(ValueError, match=told):
            call(inputs_embeds=embeds, **rest)
    found = wide.generate(inputs_embeds=wide.get_input_embeddings()(inputs["input_ids"]), **rest, **GREEDY)
    assert torch.equal(found, wide.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 1, "top_p": 0.5}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}]
)
def test_a_first_part_on_disk(tmp_path, options):
    model, processor = compose_tiny(["clip"])
    inputs = processor(text="what is <image> what is", images=tiny.image(), return_tensors="pt")
    options = GREEDY | options
    expected = model.generate(**inputs, **options)
    model.save_pretrained(tmp_path / "model")
    places = {"vision_encoder": "disk", "language_model": "cpu"}
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert next(loaded.parameters()).device.type == "meta" and loaded.device.type == "cpu"
    assert torch.equal(loaded.generate(**inputs, **options), expected)
