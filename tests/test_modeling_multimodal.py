"""The composed model: merging, labels, errors, features, headless run, signatures, dtypes."""

import copy
import inspect
import pickle

import catalog
import catalog_llms
import pytest
import tiny
import torch
from helpers import compose_tiny, run_python, uneven_inputs
from own_memory import check_comes_back
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    DynamicCache,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)
from transformers.models.auto import modeling_auto

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig


def by_hand(model, inputs):
    """Embed, encode and scatter in the plainest way, then run the language model."""
    embeds = model.language_model.get_input_embeddings()(inputs["input_ids"].clamp(max=tiny.VOCABULARY - 1)).clone()
    for name, key in (("vision", "pixel_values"), ("audio", "input_features")):
        encoder = model.encoders[name]
        features = encoder.projector(encoder.module(inputs[key]).last_hidden_state).last_hidden_state.flatten(0, 1)
        embeds[inputs["input_ids"] == model.config.modality(name)["token_id"]] = features
    return model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_forward_equals_embedding_and_merging_by_hand(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, by_hand(model, inputs).logits)


def test_text_only_is_the_language_model_itself(pair):
    model, _ = pair
    ids = torch.randint(3, 250, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


def test_two_image_encoders_both_run():
    model, processor = compose_tiny({"left": "clip", "right": "siglip"})
    assert set(model.config.modality("left")["input_names"]) == {"left_pixel_values", "left_interpolate_pos_encoding"}
    inputs = uneven_inputs(processor)
    seen = []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, n=name: seen.append(n))
    model(**inputs)
    assert sorted(seen) == ["left", "right"]
    changed = inputs | {"right_pixel_values": inputs["right_pixel_values"] + 1}
    assert not torch.equal(model(**inputs).logits, model(**changed).logits)


def test_colours_land_at_their_positions():
    """Every feature is found at its own placeholder: encoders whose features tell which item and token they are."""

    def paint(inputs, output):
        items = torch.arange(len(output[0]), dtype=torch.float)[:, None, None]
        tokens = torch.arange(output[0].shape[1], dtype=torch.float)[None, :, None]
        output.last_hidden_state = (100 * items + tokens).expand(-1, -1, 32)
        return output

    model, processor = compose_tiny(["clip"], vision={"postprocess_projector_callback": paint})
    inputs = uneven_inputs(processor)
    caught = []
    model.language_model.register_forward_pre_hook(lambda m, a, k: caught.append(k["inputs_embeds"]), with_kwargs=True)
    model(**inputs)
    where = inputs["input_ids"] == model.config.modality("vision")["token_id"]
    assert caught[0][where][:, 0].tolist() == [100.0 * item + token for item in range(3) for token in range(5)]


# ---- wrong input


@pytest.mark.parametrize(("change", "numbers"), [(-1, "19.*20"), (1, "21.*20")])
def test_fewer_and_more_placeholders_than_features(pair, change, numbers):
    model, processor = pair
    inputs = uneven_inputs(processor)
    ids, token = inputs["input_ids"], model.config.modality("vision")["token_id"]
    if change < 0:
        ids[0, (ids[0] == token).nonzero()[0]] = 9
    else:
        ids[2, -1] = token
    numbers = numbers.replace("20", "15").replace("19", "14").replace("21", "16")
    with pytest.raises(ValueError, match=f"vision.*{numbers}"):
        model(**inputs)


def test_items_that_cross_samples(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    ids, token = inputs["input_ids"], model.config.modality("vision")["token_id"]
    ids[0, (ids[0] == token).nonzero()[0]] = 9
    ids[2, -1] = token
    with pytest.raises(ValueError, match="vision, sample 0: 4 placeholder.*give 5"):
        model(**inputs)


def test_missing_input_and_unknown_keyword(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    without = {key: value for key, value in inputs.items() if key != "input_features"}
    with pytest.raises(ValueError, match="audio: the text has 12 placeholder.*0 features.*input_features"):
        model(**without)
    with pytest.raises(TypeError, match=r"\['pixel_value'\].*pixel_values"):
        model(**inputs, pixel_value=1)
    with pytest.raises(ValueError, match="vision: got .*interpolate.* without 'pixel_values'"):
        model(input_ids=torch.tensor([[5]]), interpolate_pos_encoding=torch.ones(1))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])


def test_features_without_a_placeholder_id():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    with pytest.raises(ValueError, match="set_modality_token_ids"):
        model(input_ids=torch.tensor([[5]]), pixel_values=torch.randn(1, 3, 8, 8))
    for ids, message in (
        ({"vision": -1}, "integer >= 0"),
        ({"video": 4}, "Unknown modality 'video'"),
        ({"vision": True}, "integer"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_modality_token_ids(ids)


def test_one_token_id_for_two_modalities():
    model, _ = compose_tiny(["clip", "whisper"])
    with pytest.raises(ValueError, match="already stands for"):
        model.set_modality_token_ids({"audio": model.config.modality("vision")["token_id"]})


def test_an_undeclared_callback_that_changes_the_count_raises_with_both_numbers():
    def halve(inputs, output):
        output.last_hidden_state = output[0][:, ::2]
        return output

    encoder = ModalEncoderModule(tiny.clip(), postprocess_projector_callback=halve)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    model.set_modality_token_ids({"vision": 4})
    with pytest.raises(ValueError, match=r"5 placeholder.*gave 3 features.*register_callback"):
        model(input_ids=torch.tensor([[1, 4, 4, 4, 4, 4]]), pixel_values=torch.randn(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"vision\.postprocess_projector_callback cannot be saved.*register_callback"):
        model.save_pretrained("never-written")


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LlamaModel(tiny.llama().config), ValueError, "no language-model head"),
        (lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)), ValueError, "encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), TypeError, "PreTrainedModel"),
        (lambda: type(tiny.llama()), TypeError, "instance"),
    ],
)  # fmt: skip
def test_what_cannot_be_the_language_model(build, error, message):
    with pytest.raises(error, match=message):
        MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=build())


def test_a_language_model_that_takes_no_embeddings():
    class Deaf(type(tiny.llama())):
        def forward(self, input_ids=None, attention_mask=None):
            return super().forward(input_ids, attention_mask)

    with pytest.raises(ValueError, match="Deaf cannot take embeddings"):
        MultimodalModel(encoders={}, language_model=Deaf(tiny.llama().config))


def test_widths_that_do_not_fit():
    def made(**sizes):
        projector = MultimodalProjector(MultimodalProjectorConfig(**sizes))
        return MultimodalModel(
            encoders={"vision": ModalEncoderModule(tiny.clip(), projector)}, language_model=tiny.llama()
        )

    with pytest.raises(ValueError, match="in_features is 17.*width 16"):
        made(in_features=17, out_features=32)
    with pytest.raises(ValueError, match="out_features is 31.*width 32"):
        made(in_features=16, out_features=31)
    with pytest.raises(ValueError, match="Unknown projection type 'perceiver'.*'mlp'"):
        MultimodalModel(
            encoders={"vision": ModalEncoderModule(tiny.clip())},
            language_model=tiny.llama(),
            init_projector_type="perceiver",
        )
    with pytest.raises(ValueError, match="Unknown activation"):
        MultimodalModel(
            encoders={"vision": ModalEncoderModule(tiny.clip())},
            language_model=tiny.llama(),
            init_projector_type="mlp",
            init_activation="x",
        )


def test_wrong_containers_and_shared_modules():
    clip = tiny.clip()
    with pytest.raises(TypeError, match="must be a dict"):
        MultimodalModel(encoders=[ModalEncoderModule(clip)], language_model=tiny.llama())
    with pytest.raises(TypeError, match="wrap it by"):
        MultimodalModel(encoders={"vision": clip}, language_model=tiny.llama())
    with pytest.raises(ValueError, match="'right' shares weights with the encoder 'left'"):
        MultimodalModel(
            encoders={"left": ModalEncoderModule(clip), "right": ModalEncoderModule(clip)}, language_model=tiny.llama()
        )
    with pytest.raises(TypeError, match="either a config"):
        MultimodalModel()


# ---- what must be kept


def test_composing_keeps_weights_modes_and_requires_grad():
    clip, llama = tiny.clip(), tiny.llama()
    clip.embeddings.requires_grad_(False)
    before = {k: v.clone() for m in (clip, llama) for k, v in m.state_dict().items()}
    grads = [p.requires_grad for m in (clip, llama) for p in m.parameters()]
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(clip)}, language_model=llama)
    assert model.vision_encoder.module is clip and model.language_model is llama
    assert all(torch.equal(v, before[k]) for m in (clip, llama) for k, v in m.state_dict().items())
    assert [p.requires_grad for m in (clip, llama) for p in m.parameters()] == grads


def test_parts_keep_their_dtypes_through_a_reload(tmp_path):
    model = MultimodalModel(
        encoders={
            "vision": ModalEncoderModule(
                tiny.clip().bfloat16(), MultimodalProjector(MultimodalProjectorConfig(in_features=16, out_features=32))
            ),
            "audio": ModalEncoderModule(tiny.whisper().half()),
        },
        language_model=tiny.llama().bfloat16(),
    )
    model.set_modality_token_ids({"vision": 4, "audio": 5})
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["vision_encoder.projector.projection.weight"] is torch.float32
    assert dtypes["audio_encoder.projector.projection.weight"] is torch.float16
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert {name: p.dtype for name, p in again.named_parameters()} == dtypes
    inputs = {"input_ids": torch.tensor([[1, *[4] * 5, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    check_comes_back(model.eval(), again, inputs)
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_lazy_projector_is_made_where_the_encoder_is():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip().half())}, language_model=tiny.llama())
    assert model.vision_encoder.projector.projection.weight.dtype is torch.float16
    with torch.device("meta"):
        clip = tiny.clip.__wrapped__() if hasattr(tiny.clip, "__wrapped__") else type(tiny.clip())(tiny.clip().config)
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(clip)}, language_model=tiny.llama())
    assert model.vision_encoder.projector.projection.weight.is_meta


def test_the_callers_masks_and_positions_arrive_unchanged(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    positions = torch.arange(inputs["input_ids"].shape[1])[None].expand(3, -1) + 5
    caught = []
    hook = model.language_model.register_forward_pre_hook(lambda m, a, k: caught.append(k), with_kwargs=True)
    model(**inputs, position_ids=positions)
    hook.remove()
    assert caught[0]["attention_mask"] is inputs["attention_mask"] and caught[0]["position_ids"] is positions


def test_use_cache_of_the_composed_config_reaches_the_language_model(pair):
    model, _ = pair
    ids = torch.tensor([[5, 6, 7]])
    assert isinstance(model(input_ids=ids).past_key_values, DynamicCache)
    model.config.use_cache = False
    assert model(input_ids=ids).past_key_values is None
    del model.config.use_cache


def test_return_dict(pair):
    model, _ = pair
    ids = torch.tensor([[5, 6, 7]])
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], model(input_ids=ids).logits)


def test_words_are_embedded_by_a_copy_of_the_ids_without_placeholders(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    before, seen = inputs["input_ids"].clone(), []
    mask = torch.isin(before, torch.tensor(list(model.placeholder_ids().values())))
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    model(**inputs)
    hook.remove()
    assert mask.any() and torch.equal(inputs["input_ids"], before)
    assert len(seen) == 1 and seen[0][mask].eq(0).all() and torch.equal(seen[0][~mask], before[~mask])


# ---- labels


def test_placeholders_are_never_labelled(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    ids = [model.config.modality(n)["token_id"] for n in model.config.encoders]
    copied = inputs["input_ids"].clone()
    masked = copied.masked_fill(torch.isin(copied, torch.tensor(ids)), -100)
    assert torch.equal(model(**inputs, labels=copied).loss, model(**inputs, labels=masked).loss)
    assert int((copied == -100).sum()) == 0, "the caller's labels must not be written to"
    with pytest.raises(ValueError, match=r"27 of 27 placeholder tokens are labelled in labels"):
        model(**inputs, labels=copied, num_items_in_batch=torch.tensor(30))
    shifted = torch.nn.functional.pad(copied[:, 1:], (0, 1), value=-100)
    with pytest.raises(ValueError, match="labelled in shift_labels"):
        model(**inputs, shift_labels=shifted, labels=copied)
    count = int((masked[:, 1:] != -100).sum())
    mean = model(**inputs, labels=masked).loss
    torch.testing.assert_close(model(**inputs, labels=masked, num_items_in_batch=2 * count).loss * 2, mean)


def test_loss_where_the_language_model_cannot_take_its_number_of_items():
    class Old(type(tiny.llama())):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, return_dict=None):
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, labels=labels)

    torch.manual_seed(0)
    language_model = Old(tiny.llama().config)
    model = MultimodalModel(encoders={}, language_model=language_model)
    ids = torch.randint(3, 250, (2, 7))
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=24).loss
    torch.testing.assert_close(loss * 2, language_model(input_ids=ids, labels=ids).loss)
    assert model.loss_type == "ForCausalLM"


# ---- what clients look for


def test_registered_in_the_static_tables_too():
    for table in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        assert names["cornstarch_multimodal"] == "MultimodalModel"
    assert type(AutoConfig.for_model("multimodal-projector")) is MultimodalProjectorConfig


def test_signature_names_the_inputs_of_this_instance(pair):
    model, _ = pair
    names = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels", "pixel_values", "input_features", "audio_attention_mask", "kwargs"} <= set(names)
    text_only = MultimodalModel(encoders={}, language_model=tiny.llama())
    assert "pixel_values" not in inspect.signature(text_only.forward).parameters
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert inspect.signature(twin.forward) == inspect.signature(model.forward)


def test_features_are_advertised_for_the_encoders_that_exist(pair):
    model, processor = pair
    assert hasattr(model, "get_image_features") and hasattr(model, "get_audio_features")
    assert not hasattr(model, "get_video_features")
    only = MultimodalModel(encoders={"audio": ModalEncoderModule(tiny.whisper())}, language_model=tiny.llama())
    assert not hasattr(only, "get_image_features")
    pixels = uneven_inputs(processor)["pixel_values"]
    output = model.get_image_features(pixel_values=pixels)
    assert [tuple(x.shape) for x in output.pooler_output] == [(5, 32)] * 3
    assert output.last_hidden_state.shape == (3, 5, 16)
    assert isinstance(model.get_image_features(pixel_values=pixels, return_dict=False), tuple)
    with pytest.raises(TypeError, match="pixel_value"):
        model.get_image_features(pixel_value=pixels)
    for found in (model.get_image_features(pixels), model.get_image_features(pixels, False)):
        assert all(torch.equal(a, b) for a, b in zip(found.pooler_output, output.pooler_output, strict=True))
    sounds = uneven_inputs(processor)["input_features"]
    assert torch.equal(
        torch.stack(list(model.get_audio_features(sounds).pooler_output)),
        torch.stack(list(model.get_audio_features(input_features=sounds).pooler_output)),
    )
    for given, named in (((pixels,), {"pixel_values": pixels}), ((pixels, False, None), {})):
        with pytest.raises(
            TypeError, match=r"got \d inputs by position .* \['pixel_values', 'interpolate_pos_encoding'\]"
        ):
            model.get_image_features(*given, **named)


def test_get_encoder_answers_as_transformers_models_do(pair):
    model, _ = pair
    only, _ = compose_tiny(["clip"])
    for word in ("image", "video", "vision"):
        assert only.get_encoder(word) is only.vision_encoder.module
    assert only.get_encoder("audio") is only and only.get_encoder() is only
    assert model.get_encoder("audio") is model.audio_encoder.module
    two, _ = compose_tiny({"left": "clip", "right": "siglip"})
    for word in ("image", "video"):
        with pytest.raises(ValueError, match=r"'image' is the kind of several .* \['left', 'right'\]"):
            two.get_encoder(word)
    with pytest.raises(ValueError, match="'touch' is no modality"):
        only.get_encoder("touch")


def test_features_of_two_encoders_of_one_kind_need_a_name():
    model, processor = compose_tiny({"left": "clip", "right": "siglip"})
    inputs = uneven_inputs(processor)
    with pytest.raises(ValueError, match=r"\['left', 'right'\]"):
        model.get_image_features(left_pixel_values=inputs["left_pixel_values"])
    assert (
        len(
            model.get_image_features(modality="right", right_pixel_values=inputs["right_pixel_values"]).pooler_output[0]
        )
        == 4
    )


def test_headless_base_model(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        assert torch.equal(model.language_model.lm_head(hidden), model(**inputs).logits)
    assert model.base_model == model.base_model and model.base_model is not model
    assert model.get_decoder() is model.language_model.model
    assert model.get_encoder("image") is model.vision_encoder.module and model.get_encoder() is model
    assert not any("base_model" in key for key in model.state_dict())


def test_split_modules_and_ties_are_gathered():
    model, _ = compose_tiny(["clip", "whisper"], tiny.llama(tie_word_embeddings=True))
    assert {"CLIPEncoderLayer", "WhisperEncoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    assert model.all_tied_weights_keys == {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    assert "vision_encoder.module.encoder.layers.*" in model.fsdp_plan
    assert any(key.startswith("language_model.model.layers.*") for key in model.tp_plan)


def test_tower_of_a_composite_model_composes():
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    whole = CLIPModel(type(CLIPModel.config_class())(text_config=text, vision_config=tiny.clip().config.to_dict()))
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(whole)}, language_model=tiny.llama())
    assert model.vision_encoder.module is whole.vision_model


def test_import_and_describe_in_a_fresh_process(capsys, pair):
    model, _ = pair
    text = model.describe()
    assert capsys.readouterr().out.strip() == text.strip()
    for word in ("CLIPVisionModel", "WhisperEncoder", "LlamaForCausalLM", "<image>", "39,072"):
        assert word in text
    run_python("import sys\nimport cornstarch_hf\nassert not {'bitsandbytes', 'peft', 'trl'} & set(sys.modules)\n")


def test_compiles_without_graph_breaks(pair):
    model, processor = pair
    inputs = uneven_inputs(processor)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, model(**inputs).logits)


def test_pipelines(tmp_path, pair):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ask = pipeline("image-text-to-text", model=str(tmp_path), max_new_tokens=2, do_sample=False)
    part = [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "hi"}]
    answer = ask(text=[{"role": "user", "content": part}])[0]["generated_text"][-1]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": part}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == {"role": "assistant", "content": processor.decode(tokens, skip_special_tokens=True)}
    write = pipeline("text-generation", model=str(tmp_path), max_new_tokens=2)
    assert write("hello")[0]["generated_text"].startswith("hello")
    with pytest.raises(
        ValueError, match=r"vision: the text has 1 placeholder tokens \(<image>\) but there is no input"
    ):
        write("hello <image>")
    extract = pipeline("feature-extraction", model=model.base_model, tokenizer=processor.tokenizer)
    text = processor.tokenizer("hello", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(extract("hello", return_tensors=True), model.base_model(**text).last_hidden_state)


@pytest.mark.parametrize(("argument", "message"), [("attention_mask", "attention_mask has"), ("labels", "labels have")])
def test_arguments_of_another_length_than_the_tokens(pair, argument, message):
    model, processor = pair
    batch = uneven_inputs(processor)
    length = batch["input_ids"].shape[1]
    short = torch.ones_like(batch["input_ids"])[:, :-2]
    with pytest.raises(ValueError, match=f"{message} the length {length - 2}, but there are {length} tokens"):
        model(**{**batch, argument: short})


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3n_text"])
def test_resized_embeddings_train_generate_and_reload(model_type, tmp_path):
    model, processor = compose_tiny(["clip"], catalog_llms.build(model_type))
    inputs, size = uneven_inputs(processor), model.get_input_embeddings().weight.shape[0]
    before, hidden = model(**inputs).logits, model.base_model(**inputs).last_hidden_state
    head = model.get_output_embeddings().weight.clone()
    model.resize_token_embeddings(size + 7)
    assert (
        model.vocab_size
        == model.config.text_config.vocab_size
        == model.get_output_embeddings().weight.shape[0]
        == size + 7
    )
    output = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100))
    # The head's product has another shape now: what goes into it is equal to the bit.
    assert torch.equal(model.base_model(**inputs).last_hidden_state, hidden)
    assert torch.equal(model.get_output_embeddings().weight[:size], head)
    torch.testing.assert_close(output.logits[..., :size], before)
    assert output.loss.isfinite()
    last = {"input_ids": torch.tensor([[5, size + 6]])}  # a new token, in every table
    model.save_pretrained(tmp_path)
    check_comes_back(model, AutoModel.from_pretrained(tmp_path), last)


def test_an_encoder_whose_first_parameter_is_a_mask_runs_without_one():
    encoder = ModalEncoderModule(catalog.build("TimeSeriesTransformerModel"), kind="time")
    model = MultimodalModel(encoders={"series": encoder}, language_model=tiny.llama()).eval()
    model.set_modality_token_ids({"series": 310})
    inputs = catalog.item("TimeSeriesTransformerModel", 0)
    with torch.no_grad():
        features = model.series_encoder(**inputs).pooler_output[0]
        ids = torch.tensor([[5, *[310] * len(features), 6]])
        given = {f"series_{key}": value for key, value in inputs.items()}
        found = model(input_ids=ids, **given).logits
        words = model.get_input_embeddings()(torch.tensor([[5, 6]]))
        embeds = torch.cat([words[:, :1], features[None], words[:, 1:]], 1)
        assert torch.equal(found, model.language_model(inputs_embeds=embeds).logits)


def test_outputs_say_what_each_encoder_gave():
    model, processor = compose_tiny(["clip", "whisper"])
    inputs = uneven_inputs(processor)
    with torch.no_grad():
        for call in (model, model.base_model):
            output = call(**inputs)
            for kind, key in (("image", "pixel_values"), ("audio", "input_features")):
                given = getattr(output, f"{kind}_outputs")
                expected = getattr(model, f"get_{kind}_features")(**{key: inputs[key]})
                assert all(map(torch.equal, given.pooler_output, expected.pooler_output))
                assert len(given.pooler_output) == len(inputs[key])
            assert not {"image_outputs", "audio_outputs"} & set(output), "Trainer would gather them as predictions"
            text = call(input_ids=torch.tensor([[5, 6, 7]]))
            assert text.image_outputs is None and text.audio_outputs is None
    model, processor = compose_tiny({"vision": "clip", "dino": "dinov2"})
    with torch.no_grad():
        output = model(**uneven_inputs(processor))
    assert (len(output.vision_outputs.pooler_output), len(output.dino_outputs.pooler_output)) == (3, 2)
    assert not hasattr(output, "image_outputs"), "two encoders take images"


def test_an_encoder_that_bears_the_name_of_another_kind_has_its_outputs_to_itself():
    parts = {"vision": tiny.clip(), "image": tiny.whisper()}
    model = MultimodalModel(
        encoders={n: ModalEncoderModule(p) for n, p in parts.items()}, language_model=tiny.llama()
    ).eval()
    model.set_modality_token_ids({"vision": 310, "image": 311})
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[5, *[310] * 5, 6]]), pixel_values=torch.zeros(1, 3, 8, 8))
    assert len(output.vision_outputs.pooler_output) == 1 and output.audio_outputs is None
    assert not hasattr(output, "image_outputs")
