"""compose(): the same model from live objects and from paths, its options, and what it refuses."""

import inspect
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import uneven_inputs
from own_memory import check_comes_back
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    WhisperFeatureExtractor,
    WhisperModel,
    modeling_utils,
)  # fmt: skip
from transformers.models.auto import auto_factory

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalCollator,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    assembly,
    compose,
)  # fmt: skip
from cornstarch_hf import MultimodalProjectorConfig as ProjectorConfig
from cornstarch_hf.assembly import HUB_KEYS, MODEL_KEYS

LIVE = {"vision": (tiny.clip, tiny.clip_processor), "audio": (tiny.whisper, tiny.whisper_processor)}


def live(*names, **options):
    """Encoders as dicts of live objects, with further options by name."""
    return {n: {"model": LIVE[n][0](), "processor": LIVE[n][1]()} | options.get(n, {}) for n in names or LIVE}


def build(encoders=None, *args, language_model=None, **options):
    options = {"tokenizer": tiny.tokenizer()} | options
    return compose(language_model or tiny.llama(), live("vision") if encoders is None else encoders, *args, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parts on disk, the audio encoder inside of its whole encoder-decoder."""
    path = tmp_path_factory.mktemp("parts")
    whisper = WhisperModel(tiny.whisper().config)
    whisper.encoder.load_state_dict(tiny.whisper().state_dict())
    for name, parts in {
        "text": (tiny.llama(), tiny.tokenizer()),
        "vision": (tiny.clip(), tiny.clip_processor()),
        "audio": (whisper, tiny.whisper_processor()),
    }.items():
        for part in parts:
            part.save_pretrained(path / name)
    return path


def test_what_is_composed_takes_its_loss_at_labels():
    model, processor = build()
    assert model.config.loss_at_labels is True
    batch = processor(text=[f"{processor.tokens['vision']} what"], vision=[[tiny.image()]], return_tensors="pt")
    ids = batch["input_ids"]
    labels = ids.masked_fill(ids == processor.placeholder_ids["vision"], -100)
    assert "logits" in model(**batch, labels=labels) and "logits" not in model.train()(**batch, labels=labels)


def test_paths_and_live_objects_give_one_model(folder):
    projectors = {n: MultimodalProjector(ProjectorConfig(in_features=16, out_features=32)) for n in LIVE}
    given = {n: {"projector": p} for n, p in projectors.items()}
    paths = {n: {"model": str(folder / n), "processor": folder / n} | given[n] for n in LIVE}
    model, processor = build(live(**given))
    loaded, again = compose(folder / "text", paths)
    processor.items = again.items = {"vision": tiny.image, "audio": tiny.sound}
    inputs, same = uneven_inputs(processor), uneven_inputs(again)
    assert inputs.keys() == same.keys() and all(torch.equal(inputs[k], same[k]) for k in inputs)
    check_comes_back(model, loaded, inputs)
    assert isinstance(loaded, MultimodalModel) and isinstance(again, MultimodalProcessor) and not loaded.training


def test_projectors_that_reduce_by_name_and_by_dict():
    model, processor = build(live("audio"), "frame_stack")
    assert model.audio_encoder.projector.config.projection_type == "frame_stack"
    own = {"vision": {"drop_prefix": 1, "projector": {"projection_type": "pixel_shuffle", "norm": "none"}}}
    model, processor = build(live(**own), {"projection_type": "frame_stack", "stack_factor": 3})
    found = {name: encoder.projector.projection for name, encoder in model.encoders.items()}
    assert found["audio"].stack_factor == 3 and found["vision"].norm == "none"
    inputs = processor(text="<image> <audio>", images=tiny.image(), audio=tiny.sound(), sampling_rate=16_000)
    ids = inputs["input_ids"][0]
    assert [ids.count(model.config.modality(name)["token_id"]) for name in LIVE] == [1, 2]
    with pytest.raises(TypeError, match=r"'frame_stack' projector takes no \['stack_size'\].*'stack_factor'"):
        build(None, {"projection_type": "frame_stack", "stack_size": 3})


def test_bare_paths_find_their_tokenizer_and_processors(folder):
    model, processor = compose(str(folder / "text"), {n: str(folder / n) for n in LIVE}, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(processor.processors["audio"]).__name__ == "WhisperFeatureExtractor"
    assert processor.tokens == {"vision": "<image>", "audio": "<audio>"} and len(processor.tokenizer) == 302


def test_each_part_may_be_loaded_in_its_own_way(folder):
    encoders = {"vision": {"model": folder, "subfolder": "vision", "dtype": torch.float16}, "audio": folder / "audio"}
    model, _ = compose(folder / "text", encoders, dtype=torch.bfloat16, attn_implementation="eager")
    assert [model.encoders[n].module.dtype for n in encoders] == [torch.float16, torch.bfloat16]
    assert model.vision_encoder.projector.dtype is torch.float16 and model.dtype is torch.bfloat16
    assert model.language_model.config._attn_implementation == "eager"


def test_options_of_one_encoder():
    options = {"layer": [-2, 0], "drop_prefix": 1, "kind": "video", "additional_args": ["note"]}
    callback = {"preprocess_callback": lambda inputs: inputs}
    model, processor = build(live("vision", vision=options | callback))
    encoder = model.vision_encoder
    assert (encoder.selection.layer, encoder.selection.drop_prefix, encoder.kind) == ((-2, 0), 1, "video")
    assert encoder.additional_args == ["note"] and encoder.preprocess_callback is callback["preprocess_callback"]
    assert encoder.projector.config.in_features == 32 and processor.tokens == {"vision": "<video>"}


@pytest.mark.parametrize(
    ("general", "own", "expected"),
    [
        ("linear", None, ("linear", "gelu")),
        ("mlp", None, ("mlp", "gelu")),
        ("mlp", "linear", ("linear", "gelu")),
        ({"projection_type": "mlp", "activation": "relu"}, None, ("mlp", "relu")),
        ("linear", {"projection_type": "mlp", "activation": "silu"}, ("mlp", "silu")),
        (ProjectorConfig(projection_type="mlp", activation="relu"), None, ("mlp", "relu")),
        ("mlp", ProjectorConfig(projection_type="mlp", activation="silu"), ("mlp", "silu")),
    ],
)
def test_projectors_in_general_and_of_one_encoder(general, own, expected):
    model, _ = build(live(vision={"projector": own} if own else {}), general)
    found = model.vision_encoder.projector.config
    assert (found.projection_type, found.activation) == expected
    assert model.audio_encoder.projector.config.projection_type == (general if isinstance(general, str) else "mlp")
    if isinstance(general, ProjectorConfig):  # each encoder has its own, and what was given lacks its sizes still
        assert model.audio_encoder.projector.config is not found and general.in_features is None


def test_ready_modules_and_wrapped_models_are_taken_as_they_are():
    ready = ModalEncoderModule(tiny.clip(), layer=0)
    lora = get_peft_model(tiny.whisper(), LoraConfig(r=2, target_modules=["q_proj"]))
    processors = {"vision": tiny.clip_processor(), "audio": tiny.whisper_processor()}
    model, processor = build({"vision": ready, "audio": lora}, processors=processors)
    assert model.vision_encoder is ready and model.audio_encoder.module is lora
    assert processor.processors == processors


def test_freezing_tokens_templates_and_shared_inputs():
    encoders = {name: live("vision")["vision"] for name in ("left", "right")}
    tokens = {"left": "[L]", "right": "[R]"}
    model, processor = build(
        encoders, tokens=tokens, freeze=["*.module"], chat_template="T", share_inputs=[("left", "right")]
    )
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if "_encoder.module." in n
    }
    assert processor.tokens == tokens and processor.chat_template == "T"
    assert model.config.share_inputs == processor.config.share_inputs == [["left", "right"]]
    assert not any(p.requires_grad for p in build(freeze="language_model")[0].language_model.parameters())


def test_nothing_that_was_given_is_changed():
    tokenizer, encoders = tiny.tokenizer(), live("vision")
    size, side, keys = len(tokenizer), tokenizer.padding_side, set(encoders["vision"])
    _, processor = build(encoders, tokenizer=tokenizer)
    assert processor.tokenizer.padding_side == "left" and side == tokenizer.padding_side == "right"
    assert len(tokenizer) == size and set(encoders["vision"]) == keys


@pytest.mark.parametrize(
    ("encoders", "options", "error", "message"),
    [
        ({"vision": {"model": "x", "colour": 1}}, {}, TypeError, r"vision: unknown keys \['colour'\].*'drop_prefix'"),
        ({"vision": {"processor": None}}, {}, TypeError, "vision: an encoder needs a model"),
        ({"vision": 3}, {}, TypeError, "vision: expected a Hub id, a path or a model, got int"),
        ({"vision": type(tiny.clip())}, {}, TypeError, "vision: expected .* a model, got the class CLIPVisionModel"),
        ({"vision": {"model": ModalEncoderModule(tiny.clip()), "layer": 1}}, {}, TypeError, r"vision: \['layer'\] belong into"),
        ({"vision": tiny.clip()}, {}, ValueError, r"vision: .*pass its processor, encoders=\{'vision'"),
        (live("vision"), {"tokenizer": None}, ValueError, "not loaded from anywhere: pass tokenizer="),
        (live("vision"), {"share_inputs": [["vision"]]}, ValueError, r"two or more of the modalities \['vision'\]"),
        (live("vision"), {"share_inputs": "vision"}, ValueError, r"groups of two or more .* got 'vision'"),
        (live(), {"share_inputs": ["vision", "audio"]}, ValueError, r"groups of two or more .* got 'vision'"),
        (live("vision"), {"freeze": ["visoin"]}, ValueError, "'visoin' names no part"),
        (live("vision"), {"freeze": {"vision_encoder": True}}, TypeError, r"freeze must be a list of names of parts"),
        (live("vision"), {"tokens": {"audio": "<a>"}}, ValueError, r"tokens names \['audio'\]"),
        (live("vision"), {"tokens": "<image>"}, TypeError, r"tokens must be a dict by encoder, \{'vision': ...\}, got '<image>'"),
        (live("vision"), {"processors": tiny.clip_processor()}, TypeError, r"processors must be a dict by encoder"),
        (live("vision"), {"processors": {"visoin": 1}}, ValueError, r"processors names \['visoin'\].*\['vision'\]"),
        (live("vision"), {"processors": {"vision": tiny.clip_processor()}}, ValueError, "vision: its processor was given twice"),
        (live("vision"), {"tokenizer": tiny.clip_processor()}, TypeError, "tokenizer must be a tokenizer of .*, got CLIPImage"),
        (live("vision"), {"tokenizer": type(tiny.tokenizer())}, TypeError, "tokenizer must be a tokenizer of transformers"),
        (live("vision"), {"chat_template": Path("t.jinja")}, TypeError, "chat_template must be the text of a template"),
        (live("vision"), {"language_model": tiny.clip()}, ValueError, "CLIPVisionModel has no language-model head"),
        (live("vision"), {"language_model": type(tiny.llama())}, TypeError, "language_model must be a .*PreTrainedModel instance"),
        (live("vision", vision={"kind": None, "model": tiny.llama()}), {}, ValueError, "vision: LlamaModel encodes items of the kind 'text'"),
        (live("audio", audio={"model": tiny.clip()}), {}, ValueError, r"audio: .* kind 'image'.*of the kind 'audio', .* \{'kind': 'image'\}"),
        ([tiny.clip()], {}, TypeError, r"encoders must be a dict by names that you choose, \{'vision': ...\}, got \[CLIP"),
        ("openai/clip", {}, TypeError, "encoders must be a dict by names that you choose, .* got 'openai/clip'"),
        (tiny.clip(), {}, TypeError, "encoders must be a dict by names that you choose, .* got CLIPVisionModel"),
        ({"Vision": tiny.clip()}, {}, ValueError, "The encoder name 'Vision' is invalid"),
        (live("vision"), {"dtype": "bf16"}, ValueError, "dtype must be 'bfloat16', 'float16', 'float32', .* got 'bf16'"),
        (live("vision"), {"dtype": torch.int8}, ValueError, "dtype must be .* got torch.int8"),
        (live("vision", vision={"dtype": "fp16"}), {}, ValueError, "vision: dtype must be 'bfloat16', .* got 'fp16'"),
        (live("vision"), {"projector": {"activation": "relu"}}, TypeError, "the 'linear' projector has no activation: choose 'mlp'"),
        (live("vision"), {"projector": {"projection_type": "mlp", "activation": "geluu"}}, ValueError, "Unknown activation 'geluu', expected one of .*'gelu'"),
        (live("vision", vision={"projector": {"projection_type": "mlp", "width": 3}}), {}, TypeError, r"vision: .* no \['width'\], expected some of \['activation', .*'hidden_size'"),
        (live("vision"), {"projector": nn.Linear(16, 32)}, TypeError, "must be a name, .* got Linear. A module: wrap it by MultimodalProjector"),
        (live("vision"), {"projector": nn.Linear}, TypeError, r"must be a name, .* A class: register_projector\(name, cls\), and give the name"),
        (live("vision"), {"projector": MultimodalProjector(ProjectorConfig())}, TypeError, "must be a name, .* as the projector of one encoder"),
        (live("vision", vision={"projector": nn.Linear(16, 32)}), {}, TypeError, "vision: .* must be a name, .* wrap it by MultimodalProjector"),
    ],
)  # fmt: skip
def test_what_is_refused(encoders, options, error, message):
    with pytest.raises(error, match=message):
        build(encoders, **options)


@pytest.mark.parametrize(
    ("keyword", "remedy"),
    [
        ("llm", "use language_model="), ("model", "use language_model="), ("languge_model", "use language_model="),
        ("vision_encoder", r"use encoders=\{'vision': ...\}"), ("audio_encoder", r"use encoders=\{'vision': ...\}"),
        ("vision_tower", r"use encoders=\{'vision': ...\}"), ("vision", r"use encoders=\{'vision': ...\}"),
        ("projectors", "use projector=, or encoders="), ("mm_projector", "use projector=, or encoders="),
        ("init_projector_type", "use projector=, or encoders="), ("activation", r"use projector=\{'projection_type': 'mlp'"),
        ("processor", r"use processors=\{name: ...\}"), ("image_processor", r"use processors=\{name: ...\}"),
        ("image_token", r"use tokens=\{name: ...\}"), ("token_names", r"use tokens=\{name: ...\}"),
        ("device", r"use device_map=, or model.to\(device\)"), ("torch_dtype", "use dtype="),
        ("load_in_8bit", r"from_pretrained\(folder, quantization_config=...\)"),
        ("load_in_4bit", r"from_pretrained\(folder, quantization_config=...\)"),
        ("layer", r"use encoders=\{name: \{'layer': ...\}\}, for one encoder"), ("kind", "for one encoder"),
        ("freezes", "use freeze="), ("chat_templates", "use chat_template="), ("num_hidden_layers", "use one of the names below"),
    ],
)  # fmt: skip
def test_a_keyword_that_compose_does_not_take_says_what_to_use(keyword, remedy):
    with pytest.raises(
        TypeError, match=rf"compose\(\) takes no {keyword}= \(.*{remedy}.*It takes \['language_model', 'encod"
    ):
        build(**{keyword: "cuda"})


def test_every_unknown_keyword_is_named_and_missing_ones_too():
    with pytest.raises(TypeError, match=r"takes no llm= \(use language_model=\); device= \(use device_map="):
        compose(llm=tiny.llama(), device="cuda")
    for given, missing in (({}, "language_model= and encoders="), ({"language_model": tiny.llama()}, "encoders=")):
        with pytest.raises(TypeError, match=rf"compose\(\) needs {missing}: .*\{{'vision': ...\}}"):
            compose(**given)


def test_keywords_for_loading_are_those_of_transformers(monkeypatch, folder):
    """Each is one of `from_pretrained`'s, and what is of models alone reaches no tokenizer and no processor."""
    text = inspect.getsource(modeling_utils) + inspect.getsource(auto_factory)
    assert not [key for key in (*HUB_KEYS, *MODEL_KEYS) if f'"{key}"' not in text and f" {key}:" not in text]
    seen = []
    for cls in ("AutoTokenizer", "AutoImageProcessor", "AutoModel", "AutoModelForCausalLM"):
        whole = getattr(assembly, cls)

        class Watched:
            @staticmethod
            def from_pretrained(*args, cls=cls, whole=whole, **options):
                seen.append((cls, set(options)))
                return whole.from_pretrained(*args, **options)

        monkeypatch.setattr(assembly, cls, Watched)
    compose(folder / "text", {"vision": folder / "vision"}, local_files_only=True, use_safetensors=True)
    for cls, options in seen:
        assert "local_files_only" in options and ("use_safetensors" in options) == cls.startswith("AutoModel")
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"\['dtype'\] are for loading, but all models are live objects"),
        ({"device_map": "cpu", "use_safetensors": True}, r"\['device_map', 'use_safetensors'\] are for loading"),
        ({"revision": "main"}, "revision= is for loading the language model and its tokenizer, but both are live"),
        ({"encoders": {"dtype": "bfloat16"}}, r"vision: \['dtype'\] are for loading, but its model is a live object"),
        ({"encoders": {"revision": "main"}}, r"vision: \['revision'\] are for loading"),
    ],
)
def test_what_is_for_loading_raises_where_nothing_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        build(live("vision", vision=options.pop("encoders", {})), **options)


@pytest.fixture(scope="module")
def wrong(folder):
    """What people name by mistake: no such folder, weights that are cut off, models that are no causal language model."""
    text = LlavaConfig(vision_config=tiny.clip().config, text_config=tiny.llama().config, image_token_index=9)
    LlavaForConditionalGeneration(text).save_pretrained(folder / "llava")
    tiny.tokenizer().save_pretrained(folder / "llava")
    build()[0].save_pretrained(folder / "composed")
    for name in ("text", "vision"):
        shutil.copytree(folder / name, folder / f"{name} cut")
        weights = folder / f"{name} cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("part", "name", "error", "message"),
    [
        ("text", "nowhere", OSError, "The language model could not be loaded from '.*nowhere'"),
        ("text", "empty", ValueError, "The tokenizer .* could not be loaded from '.*empty'"),
        ("text", "text cut", ValueError, "The language model could not be loaded from '.*text cut'.*Safetensor"),
        ("text", "vision", ValueError, "'clip_vision_model' .* no causal language model: pass a decoder-only one. An encoder belongs"),
        ("text", "audio", ValueError, "WhisperForCausalLM is the decoder of an encoder-decoder model"),
        ("text", "llava", ValueError, "'llava' .* no causal language model: it is multimodal already: take it apart by from_native"),
        ("text", "composed", ValueError, "'cornstarch_multimodal' .* it is multimodal already"),
        ("vision", "nowhere", OSError, "vision: its model could not be loaded from '.*nowhere'"),
        ("vision", "vision cut", ValueError, "vision: its model could not be loaded from '.*vision cut'"),
        ("vision", "text", ValueError, "vision: LlamaModel encodes items of the kind 'text', which its name does not say"),
        ("audio", "nowhere", OSError, "audio: its model could not be loaded from"),
        ("audio processor", "empty", OSError, "audio: its processor could not be loaded from '.*empty'"),
        ("tokenizer", "nowhere", OSError, "The tokenizer .* could not be loaded from '.*nowhere'"),
    ],
)  # fmt: skip
def test_the_part_whose_loading_failed_is_named(wrong, part, name, error, message):
    """With the others there: the message says which one of them it is, and the cause stays at hand."""
    parts = {key: {"model": wrong / key, "processor": wrong / key} for key in LIVE}
    text, options = wrong / "text", {}
    if part in parts:
        parts[part]["model"] = wrong / name
    elif part == "audio processor":
        parts["audio"]["processor"] = wrong / name
    elif part == "tokenizer":
        options = {"tokenizer": str(wrong / name)}
    else:
        text = wrong / name
    with pytest.raises(error, match=message):
        compose(text, parts, **options)


def test_a_stated_kind_may_be_another_than_the_name_says():
    texts = {"model": tiny.llama(), "processor": tiny.tokenizer(), "kind": "text"}
    assert build({"vision": texts})[0].config.modality("vision")["kind"] == "text"


# ---- valid frames only


def heard(**entry):
    """A model with tiny Whisper, whose window of 16,000 samples is 12 frames and 6 features."""
    torch.manual_seed(0)
    return build(live("audio", audio=entry))


SOUNDS = {1: 1, 1_333: 1, 2_667: 2, 8_000: 4, 15_999: 6}  # samples and their features, two frames of 1,333 samples each


def test_a_short_sound_gives_what_the_encoder_gives_for_its_valid_frames():
    model, processor = heard()
    assert [c.audio_modality["trim"] for c in (model.config, processor.config)] == [True, True]
    sounds = [tiny.sound(i, n) for i, n in enumerate(SOUNDS)]
    inputs = processor(
        text=["<audio>"] * len(sounds), audio=sounds, sampling_rate=16_000, padding=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.audio_token_id).sum(-1).tolist() == list(SOUNDS.values())
    with torch.no_grad():
        encoded = model.audio_encoder.select(
            input_features=inputs["input_features"], attention_mask=inputs["audio_attention_mask"]
        )
        window = model.audio_encoder.module(inputs["input_features"]).last_hidden_state  # (items, 6, 16)
        assert encoded.lengths == list(SOUNDS.values()) and torch.equal(encoded.last_hidden_state, window)
        features = model.get_audio_features(
            input_features=inputs["input_features"], audio_attention_mask=inputs["audio_attention_mask"]
        ).pooler_output
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
        for i, (sound, count) in enumerate(zip(sounds, SOUNDS.values(), strict=True)):
            assert torch.equal(features[i], model.audio_encoder.projector(window).last_hidden_state[i, :count])
            alone = processor(text="<audio>", audio=sound, sampling_rate=16_000, return_tensors="pt")
            assert alone["input_ids"].shape == (1, count) and torch.equal(
                alone["input_features"][0], inputs["input_features"][i]
            )
            torch.testing.assert_close(model(**alone).logits[0], logits[i, -count:], atol=1e-5, rtol=1e-4)
            assert torch.equal(model.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:], tokens[i, -3:])


def test_a_second_of_whispers_thirty_is_fifty_features():
    whole = {"model": tiny.whisper(max_source_positions=1_500, num_mel_bins=80), "processor": WhisperFeatureExtractor()}
    _, processor = build({"audio": whole})
    for seconds, count in ((1, 50), (0.99, 50), (29.99, 1_500), (30, 1_500)):
        wave = tiny.sound(0, int(16_000 * seconds))
        assert len(processor(text="<audio>", audio=wave, sampling_rate=16_000)["input_ids"][0]) == count
    with pytest.raises(
        ValueError, match="audio, item 0: the waveform has 496000 samples, but WhisperFeatureExtractor keeps 480000"
    ):
        processor(text="<audio>", audio=tiny.sound(0, 31 * 16_000), sampling_rate=16_000)


def test_calls_chats_and_the_collator_leave_out_the_same():
    _, processor = heard()
    sound, counted = tiny.sound(0, 8_000), []
    talk = [{"role": "user", "content": [{"type": "audio", "audio": sound}]}, {"role": "assistant", "content": "seven"}]
    chat = processor.apply_chat_template(
        talk[:1], tokenize=True, return_dict=True, return_tensors="pt", sampling_rate=16_000
    )
    call = processor(text="<audio>", audio=sound, sampling_rate=16_000, return_tensors="pt")
    for batch in (call, chat, MultimodalCollator(processor)([{"messages": talk}])):
        assert torch.equal(batch["audio_attention_mask"], call["audio_attention_mask"])
        assert torch.equal(batch["input_features"], call["input_features"])
        counted.append(int((batch["input_ids"] == processor.placeholder_ids["audio"]).sum()))
    assert counted == [4, 4, 4]


@pytest.mark.parametrize(("trim", "count"), [(None, 4), (True, 4), (False, 6)])
def test_what_is_said_of_the_window_is_kept_and_stored(trim, count, tmp_path):
    model, processor = heard(**({} if trim is None else {"trim": trim}))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, loaded = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (
        again.config.audio_modality["trim"]
        == loaded.config.audio_modality["trim"]
        == (count == 4)
        == again.audio_encoder.trim
    )
    for made in (processor, loaded):
        inputs = made(text="<audio>", audio=tiny.sound(0, 8_000), sampling_rate=16_000, return_tensors="pt")
        assert inputs["input_ids"].shape == (1, count) and ("audio_attention_mask" in inputs) == (count == 4)
        again(**inputs)


def by_hand(**options):
    return {"model": ModalEncoderModule(tiny.whisper(), **options), "processor": tiny.whisper_processor()}


def told(processor, **options):
    return len(processor(text="<audio>", audio=tiny.sound(0, 8_000), sampling_rate=16_000, **options)["input_ids"][0])


def same(inputs, output):
    return output


@pytest.mark.parametrize(
    ("entry", "count"),
    [
        (by_hand(), 6),  # its author said nothing of it
        (by_hand(trim=True), 4),
        ({"projector": {"projection_type": "frame_stack", "stack_factor": 2}}, 2),
        ({"projector": {"projection_type": "avg_pool", "num_tokens": 16}, "trim": False}, None),
        ({"projector": {"projection_type": "frame_stack", "stack_factor": 2, "remainder": "error"}}, 3),  # of all 6
        ({"projector": {"projection_type": "frame_stack", "stack_factor": 2, "remainder": "error"}, "trim": True}, 2),
        ({"postprocess_module_callback": same}, 6),  # which may be made for the window
        ({"postprocess_module_callback": same, "trim": True}, 4),
        ({"layer": 1}, 4),
        ({"layer": [0, -1]}, 4),
    ],
)
def test_the_window_stays_where_something_may_need_it(entry, count):
    whole = {"audio": entry} if isinstance(entry.get("model"), ModalEncoderModule) else live("audio", audio=entry)
    if count is None:
        with pytest.raises(ValueError, match="audio, item 0: num_tokens asks for 16 features, but the item has 6"):
            told(build(whole)[1])
        return
    model, processor = build(whole)
    assert told(processor) == count
    model(**processor(text="<audio>", audio=tiny.sound(0, 8_000), sampling_rate=16_000, return_tensors="pt"))


def test_a_mask_that_the_extractor_or_the_call_asks_for_is_obeyed():
    _, processor = build({"audio": by_hand()})
    assert told(processor) == 6 and told(processor, audio_kwargs={"return_attention_mask": True}) == 4
    processor.processors["audio"].return_attention_mask = True
    assert told(processor) == 4 and told(processor, audio_kwargs={"return_attention_mask": False}) == 6


def test_trimming_what_cannot_be_trimmed_is_refused():
    with pytest.raises(ValueError, match="image: trim=True needs an encoder that takes a mask"):
        build(live("vision", vision={"trim": True, "kind": "image"}) | {})
    with pytest.raises(
        ValueError, match="trim=True needs an encoder that takes a mask, CLIPVisionModel takes .*pixel_values"
    ):
        ModalEncoderModule(tiny.clip(), trim=True)
    with pytest.raises(ValueError, match="audio: trim=True, but a mask leaves out nothing"):
        build({"audio": {"model": tiny.wav2vec2(), "processor": tiny.wav2vec2_processor(), "trim": True}})
