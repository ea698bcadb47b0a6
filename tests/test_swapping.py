"""replace(): language models and encoders exchanged, added and removed; what is kept to the bit, what is refused, assignments."""

import copy

import convertible_models
import native_processors
import native_types
import pytest
import tiles
import tiny
import torch
from own_memory import check_comes_back, own_memory, weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoProcessor, LlamaForSequenceClassification, Trainer, TrainingArguments

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalCollator,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    from_native,
    register_callback,
    replace,
    to_native,
)
from cornstarch_hf.checkpoints.described import same_settings

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
AUDIO = {"sampling_rate": 16_000}


def qwen3(**changes):
    """What is said of a language model: a tiny one, and a tokenizer with other ids."""
    tokenizer = tiny.tokenizer(TEMPLATE)
    tokenizer.add_tokens(["<other>"])
    return {"model": tiny.qwen3(**changes), "tokenizer": tokenizer}


def whisper(**more):
    return {"model": tiny.whisper(), "processor": tiny.whisper_processor()} | more


def siglip(**more):
    return {"model": tiny.siglip(), "processor": tiny.siglip_processor()} | more


def llava_of(native):
    model, _ = from_native(native)
    # The native model knows 96 tokens, the tokenizer 300.
    return model, MultimodalProcessor(tiny.tokenizer(), {"vision": IMAGES()}, model=model)


def IMAGES():
    return tiny.clip_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def native():
    return convertible_models.build("llava", text_config={"vocab_size": 320})


@pytest.fixture
def llava(native):
    return llava_of(copy.deepcopy(native))


@pytest.fixture
def plain():
    """A CLIP and a Llama, of widths 16 and 32."""
    return composed(
        {"vision": ModalEncoderModule(tiny.clip(), layer=-2, drop_prefix=1)}, {"vision": tiny.clip_processor()}
    )


def composed(encoders, processors, language_model=None, **options):
    torch.manual_seed(0)
    model = MultimodalModel(encoders=encoders, language_model=language_model or tiny.llama(), **options).eval()
    return model, MultimodalProcessor(tiny.tokenizer(), processors, model=model)


def memory(part):
    return {name: p.data_ptr() for name, p in part.named_parameters(remove_duplicate=False)}


def of(model, part):
    """Weights of a part, by their digests."""
    return weights(model.get_submodule(part))


def step(model, inputs):
    """One step of training; the names of parameters that changed."""
    before = weights(model)
    model.train()
    labels = inputs["input_ids"].clone()
    for token_id in [model.config.modality(name)["token_id"] for name in model.config.encoders]:
        labels[labels == token_id] = -100
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    return {name for name, value in weights(model).items() if value != before[name]}


def trained(model, processor, row, folder):
    """The loss of one step by Trainer."""
    arguments = TrainingArguments(folder, max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no",
                                  remove_unused_columns=False)  # fmt: skip
    return Trainer(model, arguments, MultimodalCollator(processor), [row]).train().training_loss


def check_works(model, processor, inputs, row, tmp_path):
    """Save, reload through the Auto classes, train by hand and by Trainer, generate."""
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, reader = (
        AutoModel.from_pretrained(tmp_path / "saved").eval(),
        AutoProcessor.from_pretrained(tmp_path / "saved"),
    )
    assert same_settings(again.config, model.config)
    assert reader.placeholder_ids == processor.placeholder_ids and reader.tokens == processor.tokens
    check_comes_back(model, again, inputs, max_new_tokens=3, do_sample=False)
    changed = step(again, inputs)
    projected = {
        f"{n}_encoder.projector.projection.{k}"
        for n, e in again.encoders.items()
        for k in e.projector.projection.state_dict()
    }
    assert changed >= projected | {"language_model.lm_head.weight"}
    assert trained(AutoModel.from_pretrained(tmp_path / "saved"), reader, row, str(tmp_path / "run")) > 0


def test_a_language_model_exchanged_in_a_llava(llava, tmp_path, caplog):
    model, processor = llava
    before, template = weights(model), processor.chat_template
    new, made = replace(model, processor, language_model=qwen3())
    assert type(new.language_model).__name__ == "Qwen3ForCausalLM" and not new.training
    # The parts that were kept are what they were, in the same memory; the model given is as it was.
    for part in ("vision_encoder.module", "vision_encoder.projector"):
        assert of(new, part) == of(model, part) and memory(new.get_submodule(part)) == memory(model.get_submodule(part))
        assert new.get_submodule(part) is not model.get_submodule(part)
    assert (
        weights(model) == before
        and model.config.vision_modality["token_id"] == processor.placeholder_ids["vision"] == 300
    )
    # Tokenizer, ids and template are those of the new language model, the rest is kept.
    entry = new.config.vision_modality
    assert (entry["token"], entry["token_id"], entry["layer"], entry["drop_prefix"]) == ("<image>", 301, -2, 1)
    assert made.placeholder_ids == {"vision": 301} and made.chat_template == TEMPLATE != template
    assert made.tokenizer.convert_tokens_to_ids("<other>") == 300 and new.generation_config is not None
    assert caplog.messages == [
        "replace(): to be trained before the model is of use: vision_encoder.projector (kept, but trained beside another part)."
    ]
    inputs = dict(made(text="see <image> now", images=tiny.image(), return_tensors="pt"))
    assert (inputs["input_ids"] == 301).sum() == 16
    with pytest.raises(ValueError, match="never was a native model"):
        to_native(new)
    check_works(new, made, inputs, {"text": "see <image> now", "images": [tiny.image()]}, tmp_path)


def test_a_whisper_added_to_a_llava(llava, tmp_path, caplog):
    model, processor = llava
    new, made = replace(model, processor, audio=whisper())
    for part in ("language_model", "vision_encoder.module", "vision_encoder.projector"):
        assert of(new, part) == of(model, part) and memory(new.get_submodule(part)) == memory(model.get_submodule(part))
    assert list(new.encoders) == ["vision", "audio"] and list(model.encoders) == ["vision"]
    assert made.placeholder_ids == {"vision": 300, "audio": 301} and "<audio>" not in processor.tokenizer.get_vocab()
    assert made.chat_template == processor.chat_template
    assert new.generation_config.to_dict() == model.generation_config.to_dict()
    assert caplog.messages == [
        "replace(): to be trained before the model is of use: audio_encoder.projector (new and untrained)."
    ]
    text = "<image> and <audio> is the sum"
    inputs = dict(made(text=text, images=tiny.image(), audio=tiny.sound(), **AUDIO, return_tensors="pt"))
    counts = {name: int((inputs["input_ids"] == i).sum()) for name, i in made.placeholder_ids.items()}
    assert counts == {"vision": 16, "audio": len(new.get_audio_features(
        **{k: v for k, v in inputs.items() if k in new.config.audio_modality["input_names"]}).pooler_output[0])}  # fmt: skip
    # Text and images alone give what they gave.
    seen = dict(processor(text="see <image>", images=tiny.image(), return_tensors="pt"))
    with torch.no_grad():
        assert torch.equal(own_memory(new)(**seen).logits, own_memory(model)(**seen).logits)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.image()}, {"type": "audio", "audio": tiny.sound()}],
        }
    ]
    chat = made.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **AUDIO)
    assert {int(i) for i in chat["input_ids"].unique()} >= {300, 301}
    row = {"text": text, "images": [tiny.image()], "audio": [{"array": tiny.sound(), **AUDIO}]}
    check_works(new, made, inputs, row, tmp_path)


# ---- what is kept, and what is made anew


def projector_of(model, name="vision"):
    return model.encoders[name].projector


def test_a_projector_of_other_widths_is_made_anew_of_its_type(plain, caplog):
    model, processor = plain
    wide, _ = replace(model, processor, language_model=qwen3(hidden_size=48))
    config = projector_of(wide).config
    assert (config.projection_type, config.in_features, config.out_features) == ("linear", 16, 48)
    assert config.language_model_type == "qwen3" and projector_of(model).config.language_model_type == "llama"
    assert caplog.messages[-1].endswith("vision_encoder.projector (new and untrained).")
    chosen, _ = replace(model, processor, language_model=qwen3(hidden_size=48), projector="mlp")
    assert projector_of(chosen).config.projection_type == "mlp"
    narrow, _ = replace(model, processor, vision=siglip(model=tiny.siglip(hidden_size=24), drop_prefix=0))
    assert projector_of(narrow).config.in_features == 24 and narrow.vision_encoder.selection.layer == -2
    same, _ = replace(model, processor, vision=siglip(drop_prefix=0))
    assert memory(projector_of(same)) == memory(projector_of(model))
    assert caplog.messages[-1].endswith("vision_encoder.projector (kept, but trained beside another part).")


@pytest.mark.parametrize("options", [{"projection_type": "mlp", "num_layers": 3, "activation": "relu", "norm": "layer_norm", "hidden_size": 32},
                                     {"projection_type": "pixel_shuffle", "scale_factor": 2}, {"projection_type": "resampler", "num_queries": 2}])  # fmt: skip
def test_projectors_keep_their_options_where_only_widths_change(options):
    projector = MultimodalProjector(MultimodalProjectorConfig(**options))
    encoder = ModalEncoderModule(tiny.clip(), projector, drop_prefix=1)
    model, processor = composed({"vision": encoder}, {"vision": tiny.clip_processor()})
    new, made = replace(model, processor, language_model=qwen3(hidden_size=48))
    mine, others = (projector_of(m).config for m in (new, model))
    assert (mine.projection_type, mine.activation, mine.out_features) == (others.projection_type, others.activation, 48)
    differ = {"hidden_size"} if options["projection_type"] == "mlp" else set()
    assert {k for k, v in others.projection_kwargs.items() if mine.projection_kwargs.get(k) != v} == differ
    inputs = made(text="<image> what", images=tiny.image(), return_tensors="pt")
    assert new(**inputs).logits.shape[-1] == 320


def test_a_projector_that_a_callers_module_is_cannot_be_made_in_another_width(plain):
    model, processor = plain
    projection = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 32))
    encoder = ModalEncoderModule(tiny.clip(), MultimodalProjector(MultimodalProjectorConfig(), projection=projection))
    model, processor = composed({"vision": encoder}, {"vision": tiny.clip_processor()})
    with pytest.raises(
        ValueError, match=r"vision: its projector \(in_features=16, out_features=32\) does not fit.*projector='mlp'"
    ):
        replace(model, processor, language_model=qwen3(hidden_size=48))
    for options in ({"projector": "mlp"}, {"vision": {"projector": "mlp"}}):  # the remedies
        new, _ = replace(model, processor, language_model=qwen3(hidden_size=48), **options)
        assert projector_of(new).config.projection_type == "mlp"
    kept, _ = replace(model, processor, language_model=qwen3())
    assert memory(projector_of(kept)) == memory(projector_of(model))


def test_an_encoder_may_be_kept_and_said_anew(plain, caplog):
    model, processor = plain
    caplog.clear()
    new, made = replace(model, processor, vision={"layer": -1})
    assert new.vision_encoder.selection.layer == -1 and new.vision_encoder.selection.drop_prefix == 1
    assert new.config.vision_modality["layer"] == -1 and model.vision_encoder.selection.layer == -2
    assert memory(new) == memory(model) and not caplog.messages  # nothing has to be trained
    assert made.processors == processor.processors and made.placeholder_ids == processor.placeholder_ids
    given = ModalEncoderModule(
        model.vision_encoder.module, drop_prefix=0
    )  # as its author says, with the parts that the model has
    again, _ = replace(model, processor, vision=given)
    assert again.vision_encoder.selection.drop_prefix == 0 and memory(again) == memory(model)


def test_an_encoder_that_is_removed(plain, tmp_path, caplog):
    model, processor = replace(*plain, audio=whisper(), dino={"model": tiny.dinov2(), "processor": tiny.clip_processor()},
                               share_inputs=[["vision", "dino"]])  # fmt: skip
    assert model.config.share_inputs == [["vision", "dino"]]
    caplog.clear()
    new, made = replace(model, processor, dino=None)
    assert list(new.encoders) == ["vision", "audio"] and new.config.share_inputs == [] and not caplog.messages
    assert not hasattr(new, "dino_encoder") and set(made.tokens) == {"vision", "audio"}
    assert made.placeholder_ids == {name: processor.placeholder_ids[name] for name in made.tokens}
    # Its keywords are free again.
    assert "pixel_values" in new.config.vision_modality["input_names"]
    assert "vision_pixel_values" in model.config.vision_modality["input_names"]
    new.save_pretrained(tmp_path)
    inputs = dict(made(text="<image> of", images=tiny.image(), return_tensors="pt"))
    check_comes_back(new, MultimodalModel.from_pretrained(tmp_path).eval(), inputs)


def test_settings_of_the_whole_and_of_encoders_are_kept(plain):
    model, processor = plain
    model.config.loss_at_labels, model.config.note = True, {"by": "me"}
    model.freeze("vision_encoder.module", "language_model.lm_head")
    model.gradient_checkpointing_enable()
    model.train()
    new, _ = replace(model, processor, audio=whisper())
    assert (
        new.config.loss_at_labels and new.config.note == {"by": "me"} and new.training and new.is_gradient_checkpointing
    )
    frozen = {name for name, p in new.named_parameters() if not p.requires_grad} - {
        "audio_encoder.module.embed_positions.weight"
    }
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"vision_encoder.module", "language_model.lm_head"} <= {
        pattern.removesuffix(".weight") for pattern in new.config.frozen
    }
    new.unfreeze()
    new.config.note["by"] = new.vision_encoder.module.config.hidden_act = "other"
    assert model.config.note == {"by": "me"} and model.vision_encoder.module.config.hidden_act != "other"
    assert not model.vision_encoder.module.training and not any(
        p.requires_grad for p in model.vision_encoder.module.parameters()
    )


def test_what_takes_the_place_of_a_frozen_part_is_frozen(plain, tmp_path):
    model, processor = plain
    model.train(encoders_mode={"vision": (False, True)}, llm_mode=False)
    new, _ = replace(model, processor, language_model=qwen3(), vision=siglip(drop_prefix=0))
    trains = {name for name, p in new.named_parameters() if p.requires_grad}
    assert trains == {f"vision_encoder.projector.projection.{key}" for key in ("weight", "bias")}
    new.train(llm_mode=True)
    assert all(p.requires_grad for p in new.language_model.parameters())
    wide, _ = replace(model.freeze("vision_encoder.projector"), processor, language_model=qwen3(hidden_size=48))
    assert all(p.requires_grad for p in projector_of(wide).parameters())  # one that is new has to train


@pytest.mark.parametrize("loaded", [False, True])
def test_keywords_that_were_chosen_and_origins_stay_across_a_load(plain, tmp_path, loaded):
    encoder = ModalEncoderModule(tiny.clip(), input_names={"pictures": "pixel_values"})
    model, processor = composed({"vision": encoder}, {"vision": tiny.clip_processor()})
    model.config.origins = {"vision_encoder": {"repo_id": "me/tower"}, "language_model": {"repo_id": "me/text"}}
    if loaded:
        model.save_pretrained(tmp_path)
        model = MultimodalModel.from_pretrained(tmp_path)
    new, _ = replace(model, processor, audio=whisper())
    assert new.config.vision_modality["input_names"]["pictures"] == "pixel_values"
    assert new.config.origins == model.config.origins
    other, _ = replace(model, processor, language_model=qwen3())
    assert other.config.origins == {"vision_encoder": {"repo_id": "me/tower"}}


def test_adapters_of_parts_that_are_kept_are_kept(plain, tmp_path):
    model, processor = plain
    model.vision_encoder.module = get_peft_model(
        model.vision_encoder.module, LoraConfig(r=2, target_modules=["q_proj"])
    )
    new, made = replace(model, processor, language_model=qwen3())
    assert of(new, "vision_encoder.module") == of(model, "vision_encoder.module")
    new.save_pretrained(tmp_path)
    check_comes_back(new, MultimodalModel.from_pretrained(tmp_path).eval(), dict(made(text="<image> a", images=tiny.image(), return_tensors="pt")))  # fmt: skip
    new.vision_encoder.module = new.vision_encoder.module.merge_and_unload()
    assert "base_layer" in str(model.vision_encoder.module)  # the other one's adapters stay


def test_a_compiled_part_is_kept_as_what_was_compiled(plain):
    model, processor = plain
    model.language_model = torch.compile(model.language_model)
    new, _ = replace(model, processor, audio=whisper())
    assert type(new.language_model) is type(tiny.llama()) and memory(new.language_model)["lm_head.weight"] == \
        model.language_model._orig_mod.lm_head.weight.data_ptr()  # fmt: skip


def test_one_tower_for_images_and_videos(plain, tmp_path):
    model, processor = plain
    video = ModalEncoderModule(model.vision_encoder.module, model.vision_encoder.projector, kind="video", drop_prefix=1, layer=-2, shares="vision")  # fmt: skip
    new, made = replace(model, processor, video={"model": video, "processor": tiny.clip_processor()})
    assert new.video_encoder.module is new.vision_encoder.module and new.config.video_modality["shares"] == {"module": "vision", "projector": "vision"}  # fmt: skip
    assert memory(new.vision_encoder) == memory(model.vision_encoder)
    with pytest.raises(
        ValueError, match=r"video shares \['module', 'projector'\] with vision: exchange or remove both"
    ):
        replace(new, made, vision=siglip(drop_prefix=0))
    fewer, _ = replace(new, made, video=None)
    assert list(fewer.encoders) == ["vision"]
    other, _ = replace(new, made, language_model=qwen3(hidden_size=48))
    assert other.video_encoder.projector is other.vision_encoder.projector
    assert projector_of(other).config.out_features == 48


def test_without_a_processor_none_comes_back(plain):
    model, processor = plain
    new, none = replace(model, audio={"model": tiny.whisper()})
    assert (
        none is None and new.config.vision_modality["token_id"] == 300 and new.config.audio_modality["token_id"] is None
    )
    new, none = replace(model, language_model=tiny.qwen3())
    assert (
        none is None
        and new.config.vision_modality["token_id"] is None
        and new.config.vision_modality["token"] == "<image>"
    )
    made = MultimodalProcessor(tiny.tokenizer(), processor.processors, model=new)
    assert new.config.vision_modality["token_id"] == made.placeholder_ids["vision"]


def test_parts_by_path_come_with_their_tokenizer_and_processor(plain, tmp_path):
    text = qwen3()
    for part in (text["model"], text["tokenizer"]):
        part.save_pretrained(tmp_path / "text")
    for part in (tiny.whisper_model(), tiny.whisper_processor()):
        part.save_pretrained(tmp_path / "audio")
    new, made = replace(*plain, language_model=tmp_path / "text", audio=tmp_path / "audio", dtype="bfloat16")
    assert made.chat_template == TEMPLATE and made.placeholder_ids == {"vision": 301, "audio": 302}
    assert new.language_model.dtype is new.audio_encoder.module.dtype is torch.bfloat16 and new.vision_encoder.module.dtype is torch.float32  # fmt: skip
    assert not isinstance(made.tokenizer, type(None)) and made.tokenizer.padding_side == "left"
    other, made = replace(
        *plain, language_model={"model": str(tmp_path / "text"), "dtype": "float16", "chat_template": "{{ 1 }}"}
    )
    assert other.language_model.dtype is torch.float16 and made.chat_template == "{{ 1 }}"


def test_the_same_language_model_with_another_tokenizer(plain, caplog):
    model, processor = plain
    caplog.clear()
    spec = qwen3() | {"model": model.language_model}
    new, made = replace(model, processor, language_model=spec)
    assert memory(new) == memory(model) and new.language_model is not model.language_model and not caplog.messages
    assert made.placeholder_ids == {"vision": 301} and made.chat_template == TEMPLATE


def test_a_rule_of_masks_lets_a_language_model_attend_both_ways():
    both = {"language_model": qwen3() | {"model": tiny.gemma3(use_bidirectional_attention=True)}}
    encoders, processors = {"vision": ModalEncoderModule(tiny.clip())}, {"vision": tiny.clip_processor()}
    model, processor = composed(encoders, processors, tiny.gemma3(), mask={"rule": "item_blocks"})
    new, _ = replace(model, processor, **both)
    assert new.config.mask == {"rule": "item_blocks"} and new.config.mask is not model.config.mask
    with pytest.raises(ValueError, match="is not causal: its configuration lets tokens attend to those behind them"):
        replace(model, processor, rules={"mask": None}, **both)
    layered, processor = composed({"vision": ModalEncoderModule(tiny.clip())}, processors, tiny.gemma3(),
                                  mask={"rule": "item_blocks", "layers": ["sliding_attention"]})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"layers names \['sliding_attention'\], .*rules={'positions': None} or {'mask': None}"
    ):
        replace(layered, processor, language_model=qwen3())


# ---- what is refused, with the reason


def wav2vec2():
    return {"model": tiny.wav2vec2(), "processor": tiny.wav2vec2_processor()}


def halved(inputs, output):
    output.last_hidden_state = output[0][:, ::2]
    return output


register_callback("swap_halved", halved, feature_count=lambda inputs, n: -(-n // 2))


class Turned(nn.Module):
    """A callback behind the projector, with weights of the language model's width."""

    def __init__(self, width):
        super().__init__()
        self.width, self.end = width, nn.Parameter(torch.zeros(width))

    def forward(self, inputs, output):
        output.last_hidden_state = output[0] + self.end
        return output


register_callback("swap_turned", Turned)


def with_callback(slot, callback):
    encoder = ModalEncoderModule(tiny.clip(), drop_prefix=1, **{slot: callback})
    return composed({"vision": encoder}, {"vision": tiny.clip_processor()})


REFUSED = {
    "nothing": ({}, TypeError, "needs a part to change"),
    "tokenizer": ({"tokenizer": 1}, TypeError, r"no tokenizer= \(use language_model={'model': ..., 'tokenizer': ...}\)"),
    "misspelt": ({"langage_model": 1}, TypeError, r"no langage_model= \(use language_model=\); an encoder of that name: encoders="),
    "unknown": ({"audio": None}, ValueError, r"\['audio'\] are to be removed, but the model has the encoders \['vision'\]"),
    "twice": ({"encoders": {"vision": None}, "vision": None}, TypeError, "vision was given twice"),
    "no dict": ({"encoders": [1]}, TypeError, "encoders must be a dict by name"),
    "no model": ({"audio": {"projector": "mlp"}}, TypeError, "audio: an encoder needs a model"),
    "key": ({"language_model": {"model": 1, "layers": 2}}, TypeError, r"language_model: unknown keys \['layers'\]"),
    "no language model": ({"language_model": {"tokenizer": 1}}, TypeError, "language_model: a dict needs a model"),
    "idle": (lambda: {"language_model": {"model": tiny.qwen3(), "dtype": "float16"}}, ValueError, r"\['dtype'\] are for loading"),
    "idle of all": ({"vision": None, "dtype": "float16"}, ValueError, r"\['dtype'\] are for loading, but all models are live"),
    "idle projector": ({"vision": {"layer": -1}, "projector": "mlp"}, ValueError, "made anew, and all are kept"),
    "an encoder": (lambda: {"language_model": {**qwen3(), "model": tiny.clip()}}, ValueError, "no language-model head"),
    "no tokenizer": (lambda: {"language_model": tiny.qwen3()}, ValueError, "live object that was not loaded from anywhere: pass token"),
    "rules": ({"rules": {"places": None}}, TypeError, r"rules must be a dict with some of \['positions', 'mask'\]"),
    "tokens": ({"tokens": {"audio": "<a>"}}, ValueError, r"tokens names \['audio'\]"),
    "prefix": (lambda: {"vision": siglip()}, ValueError,
               r"vision: drop_prefix=1 of the encoder that was there \('clip_vision_model'\) may not fit the new one "
               r"\('siglip_vision_model', of other settings\): say what is to hold, vision={'model': ..., 'drop_prefix': ...}"),
    "kind": (lambda: {"vision": wav2vec2()}, ValueError, "encodes items of the kind 'audio', which its name does not say"),
    "shared": (lambda: {"dino": "its own"}, ValueError, "shares weights with the encoder 'vision'"),
    "share_inputs": ({"share_inputs": [["vision", "dino"]]}, ValueError, "share_inputs lists groups"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(plain, case):
    options, error, message = REFUSED[case]
    model, processor = plain
    options = options() if callable(options) else options
    if case == "shared":
        options = {"dino": {"model": model.vision_encoder.module, "processor": tiny.clip_processor()}}
    before, config = weights(model), model.config.to_dict()
    with pytest.raises(error, match=message):
        replace(model, processor, **options)
    assert weights(model) == before and model.config.to_dict() == config


def test_a_layer_counted_from_the_first_one_is_said_anew_for_another_depth():
    model, processor = composed({"vision": ModalEncoderModule(tiny.clip(), layer=2)}, {"vision": tiny.clip_processor()})
    other = {"model": tiny.clip(num_hidden_layers=4), "processor": tiny.clip_processor()}
    with pytest.raises(ValueError, match="vision: layer=2 of the encoder that was there"):
        replace(model, processor, vision=other)
    new, _ = replace(model, processor, vision=other | {"layer": 3})
    assert new.vision_encoder.selection.layer == 3
    new, _ = replace(model, processor, vision=other | {"model": tiny.clip(seed=1)})
    assert new.vision_encoder.selection.layer == 2


@pytest.mark.parametrize("other", [{"model": "siglip"}, {"model": "clip", "layer_norm_eps": 1e-3}])
def test_callbacks_stay_with_encoders_of_their_settings(other):
    model, processor = with_callback("postprocess_module_callback", halved)
    alike, made = replace(model, processor, vision={"model": tiny.clip(seed=1), "processor": tiny.clip_processor()})
    assert alike.vision_encoder.postprocess_module_callback is halved
    assert made(text="<image>", images=tiny.image())["input_ids"][0].count(300) == 2
    build = getattr(tiny, other.pop("model"))
    spec = {"model": build(**other), "processor": tiny.siglip_processor(), "drop_prefix": 0}
    with pytest.raises(
        ValueError, match=r"postprocess_module_callback=halved of the encoder.*: \.\.\.} \(None for no callback\)"
    ):
        replace(model, processor, vision=spec)
    new, _ = replace(model, processor, vision=spec | {"postprocess_module_callback": None})
    assert new.vision_encoder.postprocess_module_callback is None
    new, _ = replace(model, processor, vision=spec | {"postprocess_module_callback": halved})
    assert new.vision_encoder.postprocess_module_callback is halved


def test_a_callback_with_weights_of_the_old_width_is_refused():
    model, processor = with_callback("postprocess_projector_callback", Turned(32))
    kept, _ = replace(model, processor, language_model=qwen3())
    assert memory(kept.vision_encoder)["postprocess_projector_callback.end"] == memory(model.vision_encoder)["postprocess_projector_callback.end"]  # fmt: skip
    with pytest.raises(
        ValueError,
        match="vision: its postprocess_projector_callback gives features of the old .* width 32, the new one's is 48",
    ):
        replace(model, processor, language_model=qwen3(hidden_size=48))
    turned = {"vision": {"postprocess_projector_callback": Turned(48)}}
    new, made = replace(model, processor, language_model=qwen3(hidden_size=48), **turned)
    assert new(**made(text="<image> of", images=tiny.image(), return_tensors="pt")).logits.isfinite().all()


def test_a_kind_that_only_its_author_knows_is_said_anew():
    model, processor = composed({"scan": ModalEncoderModule(tiny.clip(), kind="scan")}, {"scan": tiny.clip_processor()})
    with pytest.raises(ValueError, match="scan: kind=scan of the encoder that was there"):
        replace(model, processor, scan=siglip())
    new, _ = replace(model, processor, scan=siglip(kind="scan"))
    assert new.scan_encoder.kind == "scan"
    model, processor = composed(
        {"film": ModalEncoderModule(tiny.clip(), kind="video")}, {"film": tiny.clip_processor()}
    )
    new, _ = replace(model, processor, film=siglip())
    assert new.film_encoder.by_frame  # frame by frame, as before


@pytest.mark.parametrize("frozen", ["language_model.lm_head", "vision_encoder.module.encoder"])
def test_a_part_that_is_frozen_in_parts_is_not_exchanged(plain, frozen):
    model, processor = plain
    model.freeze(frozen)
    part = frozen.rpartition(".")[0]
    options = {"language_model": qwen3()} if part == "language_model" else {"vision": siglip(drop_prefix=0)}
    with pytest.raises(ValueError, match=rf"{part} is frozen in parts, .*unfreeze\('{part}'\)"):
        replace(model, processor, **options)
    model.unfreeze(part)
    replace(model, processor, **options)


def test_what_a_class_holds_back_itself_is_not_frozen_in_parts(plain):
    model, processor = replace(*plain, audio=whisper())
    assert not model.audio_encoder.module.embed_positions.weight.requires_grad
    new, _ = replace(model, processor, audio=wav2vec2())
    assert all(p.requires_grad for p in new.audio_encoder.module.parameters())


def test_adapters_that_would_be_lost_are_refused(plain):
    model, processor = plain
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model.language_model = get_peft_model(model.language_model, lora)
    with pytest.raises(
        ValueError, match=r"language_model has adapters, which would go with it: merge them \(merge_and_unload\(\)\)"
    ):
        replace(model, processor, language_model=qwen3())
    model.language_model = model.language_model.merge_and_unload()
    replace(model.unfreeze(), processor, language_model=qwen3())
    whole = get_peft_model(model, lora)
    with pytest.raises(TypeError, match=r"replace\(\) takes a MultimodalModel, got PeftModel"):
        replace(whole, processor, vision=None)
    with pytest.raises(ValueError, match="adapters around the whole"):
        replace(whole.get_base_model(), processor, vision=None)


def test_quantized_and_spread_models_are_refused(plain):
    model, processor = plain
    model.hf_device_map = {"vision_encoder": 0, "language_model": "cpu"}
    with pytest.raises(ValueError, match="lies on several devices"):
        replace(model, processor, vision=None)
    model.hf_device_map, model.hf_quantizer = {"": "cpu"}, object()
    with pytest.raises(ValueError, match="is quantized: replace parts of the plain one"):
        replace(model, processor, vision=None)


def test_the_processor_must_be_the_models(plain):
    model, processor = plain
    with pytest.raises(TypeError, match="processor must be a MultimodalProcessor, or None, got CLIP"):
        replace(model, processor.processors["vision"], audio=whisper())
    model.set_modality_token_ids({"vision": 7})
    with pytest.raises(
        ValueError, match=r"not this model's: its placeholders have the ids {'vision': 300}, the model's {'vision': 7}"
    ):
        replace(model, processor, audio=whisper())
    for options, idle in (({"tokens": {"vision": "<x>"}}, "tokens"), ({"audio": whisper()}, "audio: processor"),
                          ({"language_model": qwen3()}, "language_model: tokenizer")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"\['{idle}'\] are for the processor, and none was given"):
            replace(model, None, **options)


# ---- rules of positions and masks, features for inner layers, marks


def test_positions_along_several_axes_need_a_language_model_that_has_them():
    native = native_types.build("qwen2_vl")
    model, _ = from_native(native)
    with pytest.raises(
        ValueError, match="Qwen3ForCausalLM turns tokens by one axis.*rules={'positions': None} or {'mask': None}"
    ):
        replace(model, language_model=tiny.qwen3(hidden_size=64))
    new, _ = replace(model, language_model=tiny.qwen3(hidden_size=64), rules={"positions": None})
    assert new.config.positions is None and model.config.positions["rule"] == "mrope"
    # A video that is gone is gone from the rule too; the tower is the image's.
    fewer, _ = replace(from_native(native_types.build("qwen2_5_vl"))[0], video=None)
    assert list(fewer.encoders) == ["vision"] and fewer.config.positions["rule"] == "mrope"
    assert "video" not in (fewer.config.positions.get("time_step") or {})


def test_features_for_inner_layers_need_a_language_model_that_takes_them():
    model, _ = from_native(native_types.build("qwen3_vl"))
    with pytest.raises(ValueError, match="layer_features needs a language model whose forward takes visual_pos_masks"):
        replace(model, language_model=tiny.qwen3(hidden_size=64), rules={"positions": None})
    name = next(iter(model.encoders))
    with pytest.raises(ValueError, match=f"{name}: its features reach the language model by layer_features="):
        replace(model, video=None, **{name: {"model": tiny.clip(), "kind": "image"}})


def test_marks_are_of_one_tokenizer():
    encoder = ModalEncoderModule(tiny.clip(), marks={5: 0})
    model, processor = composed({"vision": encoder}, {"vision": tiny.clip_processor()})
    with pytest.raises(ValueError, match="vision: its marks are ids of the old tokenizer's tokens"):
        replace(model, processor, language_model=qwen3())
    with pytest.raises(ValueError, match="vision: its marks are ids of the old tokenizer's tokens"):
        replace(model, processor, language_model=qwen3(), vision={"layer": -2})
    own = ModalEncoderModule(model.vision_encoder.module, marks={7: 0})
    assert replace(model, processor, language_model=qwen3(), vision=own)[0].config.vision_modality["marks"] == {7: 0}
    new, _ = replace(model, processor, vision={"layer": -2})
    assert memory(new)["vision_encoder.mark_table.weight"] == memory(model)["vision_encoder.mark_table.weight"]


# ---- parts that are put in the place of others by hand


class Packed(nn.Linear):
    """Stands for a layer of a quantized model, whose weights are integers."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 100)


def quantized(model):
    """As libraries leave a model: layers of another class, and settings that say so; loaded from somewhere else."""
    made = copy.deepcopy(model)
    for layer in made.model.layers:
        layer.mlp.gate_proj = Packed(layer.mlp.gate_proj)
    made.config.quantization_config, made.config.dtype, made.config._name_or_path = (
        {"quant_method": "some"},
        torch.int8,
        "else",
    )
    return made


class Wrapper(nn.Module):
    """As FSDP and DDP hold a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module


LORA = LoraConfig(r=2, target_modules=["q_proj"])
SAME = {
    "itself": lambda part: part,
    "a copy": copy.deepcopy,
    "wrapped": lambda part: get_peft_model(part, LORA),
    "merged": lambda part: get_peft_model(part, LORA).merge_and_unload(),
    "quantized": quantized,
    "compiled": torch.compile,
    "wrapped and compiled": lambda part: torch.compile(get_peft_model(part, LORA)),
    "sharded": Wrapper,
    "other weights": lambda part: tiny.llama(seed=5),
}
OTHER = {
    "class": lambda part: tiny.qwen3(),
    "settings": lambda part: tiny.llama(rms_norm_eps=1e-2),
    "width": lambda part: tiny.llama(hidden_size=48),
    "without its head": lambda part: part.model,
    "another head": lambda part: LlamaForSequenceClassification(part.config),
    "another one, wrapped": lambda part: get_peft_model(tiny.qwen3(), LORA),
    "another one, compiled": lambda part: torch.compile(tiny.qwen3()),
    "another one, sharded": lambda part: Wrapper(tiny.qwen3()),
    "no model": lambda part: nn.Linear(2, 2),
    "nothing": lambda part: None,
}


def pairs(cases, fast):
    """What was there before, and what is assigned: each on a plain model, and `fast` on wrapped ones; the rest is slow."""
    found = [("itself", case) for case in cases] + [(before, fast) for before in ("wrapped", "compiled")]
    others = [(before, case) for before in ("wrapped", "compiled") for case in cases if case != fast]
    return [*found, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in others)]


@pytest.mark.parametrize("before, case", pairs(SAME, "itself"))
def test_the_same_language_model_may_be_assigned(plain, case, before):
    model, processor = plain
    inner = model.language_model
    model.language_model = SAME[before](inner)
    assigned = SAME[case](inner)
    model.language_model = assigned
    assert model.language_model is assigned
    found = next(x for x in assigned.modules() if isinstance(x, type(tiny.llama())))
    assert model.config.text_config is found.config  # what is set in the one is set in the other
    if case in ("itself", "wrapped", "merged", "a copy", "quantized", "other weights"):
        assert model(**processor(text="<image> of", images=tiny.image(), return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize("before, case", pairs(OTHER, "class"))
def test_another_language_model_may_not_be_assigned(plain, case, before):
    model, _ = plain
    model.language_model = there = SAME[before](model.language_model)
    inner = next(x for x in there.modules() if isinstance(x, type(tiny.llama())))
    with pytest.raises(
        ValueError,
        match=r"^language_model: .* is another model than .*replace\(model, processor, language_model=\.\.\.\)",
    ):
        model.language_model = OTHER[case](inner)
    assert model.language_model is there


ENCODERS = {
    "class": lambda part: tiny.siglip(),
    "settings": lambda part: tiny.clip(layer_norm_eps=1e-2),
    "no model": lambda part: nn.Linear(2, 2),
    "wrapped": lambda part: get_peft_model(tiny.siglip(), LORA),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_another_encoder_may_be_neither_assigned_nor_saved(plain, tmp_path, case):
    model, _ = plain
    told = r"^vision_encoder: .* is another model than .*replace\(model, processor, vision=\.\.\.\)"
    other = ENCODERS[case](model.vision_encoder.module)
    if case != "no model":
        with pytest.raises(ValueError, match=told):
            model.vision_encoder = ModalEncoderModule(other)
    model.vision_encoder.module = (
        other  # a module of its own does not know what was composed; what is saved is looked at
    )
    with pytest.raises(ValueError, match=told):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["itself", "a copy", "wrapped", "merged", "other weights"])
def test_the_same_encoder_may_be_assigned_and_comes_back(plain, tmp_path, case):
    model, processor = plain
    model.vision_encoder.module = (
        tiny.clip(seed=7) if case == "other weights" else SAME[case](model.vision_encoder.module)
    )
    model.save_pretrained(tmp_path)
    inputs = dict(processor(text="<image> of", images=tiny.image(), return_tensors="pt"))
    check_comes_back(model, MultimodalModel.from_pretrained(tmp_path).eval(), inputs)


SETTINGS = {
    "selection": lambda m: ModalEncoderModule(m.module, m.projector, layer=-1, drop_prefix=1),
    "kind": lambda m: ModalEncoderModule(m.module, m.projector, layer=-2, drop_prefix=1, kind="video"),
    "additional_args": lambda m: ModalEncoderModule(
        m.module, m.projector, layer=-2, drop_prefix=1, additional_args=["x"]
    ),
    "merging": lambda m: ModalEncoderModule(m.module, m.projector, layer=-2, drop_prefix=1, merge="add"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_encoder_of_other_settings_would_come_back_as_the_old_one(plain, tmp_path, case):
    model, _ = plain
    model.vision_encoder = SETTINGS[case](model.vision_encoder)
    with pytest.raises(
        ValueError,
        match=rf"vision_encoder: its {case} is .*was composed: change it by replace\(model, processor, vision=",
    ):
        model.save_pretrained(tmp_path)


def test_a_projector_of_other_sizes_or_none_is_not_saved(plain, tmp_path):
    model, _ = plain
    for size, config in (
        ("in_features", {"in_features": 8, "out_features": 32}),
        ("out_features", {"in_features": 16, "out_features": 48}),
    ):
        model.vision_encoder.projector = MultimodalProjector(MultimodalProjectorConfig(**config))
        with pytest.raises(
            ValueError, match=rf"vision_encoder.projector has {size}={config[size]}, and the one that was composed"
        ):
            model.save_pretrained(tmp_path)
    model.vision_encoder.projector = nn.Linear(16, 32)
    with pytest.raises(TypeError, match="vision_encoder.projector must be a MultimodalProjector, got Linear: wrap it"):
        model.save_pretrained(tmp_path)


# ---- native processors, joined encoders


def test_a_native_processor_of_plain_placeholders_goes_along(tmp_path):
    model, processor = from_native(native_processors.pair("llava"))
    whisper = tiny.whisper()
    heard, ours = replace(model, processor, audio={"model": whisper, "processor": tiny.whisper_processor()})
    given = {"text": ["see <image>"], "images": [tiny.image(0, (40, 30))], "return_tensors": "pt"}
    before, after = processor(**given), ours(**given)
    assert ours.native is None and torch.equal(before["pixel_values"], after["pixel_values"])
    assert torch.equal(before["input_ids"], after["input_ids"])
    both = ours(
        text=["<image> and <audio>"],
        images=given["images"],
        audio=tiny.sound(),
        sampling_rate=16_000,
        return_tensors="pt",
    )
    heard.generate(**both, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("model_type", ["idefics3", "gemma3", "janus"])
def test_a_native_processor_that_writes_more_is_not_dropped_without_a_word(model_type):
    model, processor = from_native(native_processors.pair(model_type))
    whisper = {"model": tiny.whisper(), "processor": tiny.whisper_processor()}
    with pytest.raises(ValueError, match="Processor writes more than placeholders for an item.*or None"):
        replace(model, processor, audio=whisper)


JOINED = {"encoders": ["vision", "dino"], "join": "channels"}


def joined(**more):
    torch.manual_seed(0)
    parts = {
        "vision": {"model": tiny.siglip(), "processor": tiny.ENCODERS["siglip"][2]()},
        "dino": {"model": tiny.dinov2(hidden_size=12), "processor": tiny.clip_processor(), "drop_prefix": 1},
    }
    return compose(tiny.llama(), parts | more, "mlp", tokenizer=tiny.tokenizer(), share_inputs=[JOINED])


PICTURE = {"text": ["<image> a"], "images": [tiny.image(0)], "return_tensors": "pt"}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("width", [32, 48])
def test_another_language_model_keeps_joined_encoders(tmp_path, loaded, width, caplog):
    model, processor = joined()
    model.freeze("dino_encoder")
    if loaded:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        model, processor = MultimodalModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    old, text = model.vision_encoder.projector, {"model": tiny.qwen3(hidden_size=width), "tokenizer": tiny.tokenizer()}
    made, ours = replace(model, processor, language_model=text)
    assert made.config.share_inputs == [JOINED] and made.config.joined == {"dino": "vision"}
    assert made.config.vision_modality["input_names"] == model.config.vision_modality["input_names"]
    assert (
        made.vision_encoder.join.others == {"dino": made.dino_encoder} and made.dino_encoder is not model.dino_encoder
    )
    assert model.vision_encoder.join.others == {"dino": model.dino_encoder} and model.vision_encoder.projector is old
    new = made.vision_encoder.projector
    assert (new.config.in_features, new.config.out_features) == (28, width) and new is made.dino_encoder.projector
    assert not any(p.requires_grad for p in made.dino_encoder.module.parameters())
    inputs = ours(**PICTURE)
    assert all(torch.equal(value, inputs[key]) for key, value in processor(**PICTURE).items())
    with torch.no_grad():
        features, before = (m(**inputs).image_outputs.pooler_output[0] for m in (made, model))
    if width == 32:
        assert torch.equal(features, before) and "(kept, but trained beside another part)" in caplog.text
    else:
        assert features.shape == (4, 48) and "vision_encoder.projector (new and untrained)" in caplog.text
    folder = tmp_path / "again"
    made.save_pretrained(folder)
    check_comes_back(made, MultimodalModel.from_pretrained(folder), inputs, max_new_tokens=2, do_sample=False)


def test_encoders_beside_joined_ones_are_added_exchanged_and_removed():
    model, processor = joined()
    inputs = processor(**PICTURE)
    audio = {"model": tiny.whisper(), "processor": tiny.whisper_processor()}
    heard, ours = replace(model, processor, audio=audio)
    assert heard.config.encoders == ["vision", "dino", "audio"] and heard.config.share_inputs == [JOINED]
    for made, its in ((heard, ours), replace(heard, ours, audio=audio), replace(heard, ours, audio=None)):
        found = its(**PICTURE)
        assert all(torch.equal(found[key], inputs[key]) for key in inputs)
        with torch.no_grad():
            assert torch.equal(made(**found).logits, model(**inputs).logits)
    clip = {"model": tiny.clip(), "processor": tiny.clip_processor()}
    both, its = replace(model, processor, clip=clip, share_inputs=[JOINED, ["vision", "clip"]])
    found = its(**PICTURE | {"text": [f"{its.tokens['vision']}{its.tokens['clip']}"]})
    assert both(**found).logits.isfinite().all() and both.config.share_inputs == [JOINED, ["vision", "clip"]]
    gone, its = replace(both, its, vision=None, dino=None)
    assert gone.config.encoders == ["clip"] and gone.config.share_inputs == []


def test_joined_encoders_are_not_exchanged_themselves():
    model, processor = joined()
    told = "Encoders that are joined cannot be exchanged.*compose the parts anew"
    changes = [
        {"vision": tiny.clip()},
        {"dino": tiny.dinov2()},
        {"dino": None},
        {"vision": None},
        {"vision": {"layer": -2}},
    ]
    for change in (
        *changes,
        {"share_inputs": []},
        {"share_inputs": [["vision", "dino"]]},
        {"share_inputs": [JOINED | {"resample": "bilinear"}]},
    ):
        with pytest.raises(ValueError, match=told):
            replace(model, processor, **change)
    plain = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.siglip())}, language_model=tiny.llama())
    for group in ([JOINED], JOINED):
        with pytest.raises(ValueError, match=told):
            replace(plain, dino=tiny.dinov2(image_size=8), share_inputs=group)


def test_the_packing_of_tiles_is_exchanged_and_its_learnt_vector_told(caplog):
    model, processor = tiles.composed("LlavaNext", "unpad")
    image = tiny.image(0, (12, 30))
    for packing in ("concat", "newline"):
        made, ours = replace(model, processor, vision={"tiles": packing})
        assert made.vision_encoder.postprocess_projector_callback.packing == packing
        inputs = ours(text=["<image>"], images=[image], return_tensors="pt")
        made.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "vision_encoder.postprocess_projector_callback (new and untrained)" in caplog.text
    kept, _ = replace(model, processor, vision={"drop_prefix": 1})
    assert kept.vision_encoder.postprocess_projector_callback.packing == "unpad"
