"""Composition: live parts to a configuration, and the same parts built from it."""

import copy

import catalog
import pytest
import tiny
import torch
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalConfig,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
)
from cornstarch_hf.composition import check_encoders, compose_config, separate_configs
from cornstarch_hf.encoders.building import found_width, modality_entry
from cornstarch_hf.encoders.rebuilding import build_encoder, build_parts
from cornstarch_hf.language_model.refusals import check_language_model
from cornstarch_hf.language_model.supported import embedding_width


class DoubledLlama(LlamaForCausalLM):
    """A class that only its name tells from the usual one."""


def wrap(key, **options):
    return ModalEncoderModule(tiny.ENCODERS[key][1](), **options)


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_parts_are_built_as_they_were(key):
    encoders, text = {"it": wrap(key, drop_prefix=1, additional_args=["note"])}, tiny.llama()
    config = MultimodalConfig.from_dict(compose_config(encoders, text).to_dict())
    built, language_model = build_parts(config)
    assert shapes(built["it"]) == shapes(encoders["it"]) and shapes(language_model) == shapes(text)
    assert type(built["it"].module) is type(encoders["it"].module) and built["it"].name == "it"
    assert modality_entry(built["it"]) == modality_entry(encoders["it"])
    assert built["it"].parameter_names == encoders["it"].parameter_names


def test_selections_projectors_and_adapters_come_back():
    lora = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    encoders = {"vision": wrap("clip", layer=[-2, 0], kind="video")}
    config = compose_config(encoders, lora, "mlp", "relu")
    built, language_model = build_parts(MultimodalConfig.from_dict(config.to_dict()))
    assert built["vision"].selection == encoders["vision"].selection and built["vision"].kind == "video"
    assert built["vision"].projector.config.projection_type == "mlp" and shapes(built["vision"]) == shapes(
        encoders["vision"]
    )
    assert set(config.adapters) == {"language_model"} and shapes(language_model) == shapes(lora)


def test_missing_projectors_are_made_and_given_ones_completed():
    given = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp"))
    encoders = {"vision": wrap("clip", projector=given, layer=(0, 1)), "audio": wrap("whisper").bfloat16()}
    config = compose_config(encoders, tiny.llama())
    assert encoders["vision"].projector is given and encoders["audio"].projector.dtype is torch.bfloat16
    found = {n: getattr(config, f"{n}_projector_config") for n in encoders}
    assert [(c.projection_type, c.in_features, c.out_features) for c in found.values()] == [
        ("mlp", 32, 32),
        ("linear", 16, 32),
    ]
    assert found["vision"].encoder_model_type == "clip_vision_model" and found["vision"].language_model_type == "llama"


def test_only_an_unusual_language_model_class_is_named():
    for model in (tiny.llama(), tiny.gpt2()):
        config = compose_config({}, model)
        assert config.language_model_class is None and type(build_parts(config)[1]) is type(model)
        assert embedding_width(model) == 32
    config = compose_config({}, DoubledLlama(tiny.llama().config))
    assert config.language_model_class == "DoubledLlama" and type(build_parts(config)[1]) is DoubledLlama


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (GPT2LMHeadModel, TypeError, "PreTrainedModel instance, got <class"),
        ("gpt2", TypeError, "got 'gpt2'"),
        (LlamaModel(tiny.llama().config), ValueError, "LlamaModel has no language-model head"),
        (
            T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=9)),
            ValueError,
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
    ],
)
def test_what_is_no_language_model(model, error, message):
    with pytest.raises(error, match=message):
        check_language_model(model)


def test_what_are_no_encoders():
    text = tiny.llama()
    with pytest.raises(TypeError, match="must be a dict of ModalEncoderModule by name, got list"):
        check_encoders([wrap("clip")], text)
    with pytest.raises(TypeError, match=r"'vision' must be a ModalEncoderModule, got CLIPVisionModel: wrap it by"):
        check_encoders({"vision": tiny.clip()}, text)
    one = wrap("clip")
    with pytest.raises(ValueError, match="The encoder 'right' shares weights with the encoder 'left'.*deepcopy"):
        check_encoders({"left": one, "right": ModalEncoderModule(one.module)}, text)


def test_parts_that_had_one_configuration_get_their_own():
    first = tiny.clip()
    second = type(first)(first.config)
    encoders = {"left": ModalEncoderModule(first), "right": ModalEncoderModule(second)}
    separate_configs(encoders, tiny.llama())
    assert first.config is not second.config and first.config.to_dict() == second.config.to_dict()
    assert {id(m.config) for m in second.modules() if hasattr(m, "config")} == {id(second.config)}


def test_configurations_that_describe_nothing_that_can_be_built():
    with pytest.raises(ValueError, match="empty: it has no text_config"):
        build_parts(MultimodalConfig())
    config = compose_tiny(["clip"])[0].config
    config.modality("vision")["callbacks"] = {"sometime": {"name": "x"}}
    with pytest.raises(ValueError, match=r"vision: unknown callback places \['sometime'\], .*'preprocess_callback'"):
        build_encoder(config, "vision")
    config.modality("vision")["encoder_class"] = "NoSuchModel"
    with pytest.raises(ValueError, match="vision: the model class 'NoSuchModel'"):
        build_encoder(config, "vision")
    with pytest.raises(ValueError, match="no causal language model for CLIPVisionConfig"):
        build_parts(MultimodalConfig(text_config=tiny.clip().config))


def test_widths_that_no_attribute_names_are_found_by_a_run_on_shapes():
    for name, width in (
        ("AlignVisionModel", 40),
        ("Glm4vVisionModel", 40),
        ("Sam2VisionModel", 64),
        ("Kimi_K25VisionModel", 128),
    ):
        made = ModalEncoderModule(catalog.build(name))
        assert found_width(made) == (width, True), name
    layers = ModalEncoderModule(tiny.convnext(), layer=-2)
    assert found_width(layers) == (16, True) and layers.selection.data_format == "channels_first"
    assert found_width(ModalEncoderModule(tiny.clip())) == (16, True)


def test_models_that_give_no_features_are_refused_with_what_to_take_instead():
    with pytest.raises(ValueError, match="MimiModel gives no features but codes and sounds.*take MimiEncoderModel"):
        ModalEncoderModule(catalog.build("MimiModel"))


def test_widths_of_layers_and_adapters_that_are_not_the_configurations():
    merged = tiny.qwen2_vl()
    assert merged.config.hidden_size == 24 and merged.config.embed_dim == 16
    for layer, width in ((-1, 24), (-2, 16)):
        encoder = ModalEncoderModule(copy.deepcopy(merged), layer=layer)
        assert compose_config({"vision": encoder}, tiny.llama()).vision_projector_config.in_features == width
    adapted = tiny.wav2vec2(add_adapter=True, num_adapter_layers=1, output_hidden_size=12)
    config = compose_config({"audio": ModalEncoderModule(adapted)}, tiny.llama())
    assert adapted.config.hidden_size == 16 and config.audio_projector_config.in_features == 12


@pytest.mark.parametrize("key", ["clip", "whisper", "esm", "convnext", "dinov2"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_that_does_not_exist_is_refused_when_it_is_composed(key, wrapped):
    def made(layer):
        encoder = tiny.ENCODERS[key][1]() if key in tiny.ENCODERS else getattr(tiny, key)()
        if wrapped and key != "convnext":
            encoder = get_peft_model(encoder, LoraConfig(r=2, target_modules=r".*(query|q_proj)"))
        return compose_config({"it": ModalEncoderModule(encoder, layer=layer)}, tiny.llama())

    count = {"clip": 4, "whisper": 3, "esm": 3, "convnext": 5, "dinov2": 3}[key]
    for layer in (-count, count - 1):
        assert made(layer).it_modality["layer"] == layer
    for layer in (-count - 1, count, [-1, 99]):
        wrong = layer[1] if isinstance(layer, list) else layer
        with pytest.raises(
            ValueError, match=f"it: layer {wrong} does not exist, .* {count} hidden states: .* -{count} to {count - 1}"
        ):
            made(layer)


@pytest.mark.parametrize("layer", ["last", 1.5, True, None, [], [-1, "x"], {"a": 1}])
def test_a_layer_is_a_number_or_several(layer):
    with pytest.raises(ValueError, match="layer must be an integer or a list of integers, got"):
        wrap("clip", layer=layer)


def test_two_encoders_do_not_share_a_projector_that_has_no_weights_yet():
    projector = MultimodalProjector(MultimodalProjectorConfig())
    with pytest.raises(ValueError, match="'right' shares weights with the encoder 'left'"):
        compose_config(
            {"left": wrap("clip", projector=projector), "right": wrap("siglip", projector=projector)}, tiny.llama()
        )


def test_one_tower_for_two_kinds_is_one_module_that_is_stored_once(tmp_path):
    vision = wrap("clip")
    video = ModalEncoderModule(vision.module, kind="video", shares="vision")
    model = MultimodalModel(encoders={"vision": vision, "video": video}, language_model=tiny.llama()).eval()
    assert model.video_encoder.module is model.vision_encoder.module
    assert model.video_encoder.projector is not model.vision_encoder.projector
    assert model.config.modality("video")["shares"] == {"module": "vision"}
    assert model.config.video_config is model.config.vision_config and "video_config" not in model.config.to_dict()
    assert not [name for name in model.state_dict() if name.startswith("video_encoder.module")]
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert again.video_encoder.module is again.vision_encoder.module
    assert again.video_encoder.projector is not again.vision_encoder.projector
    copied = copy.deepcopy(again)
    assert copied.video_encoder.module is copied.vision_encoder.module is not again.vision_encoder.module
    again.vision_encoder = copied.vision_encoder  # what is put in its place serves both
    assert again.video_encoder.module is copied.vision_encoder.module


@pytest.mark.parametrize("shares", ["vision", "nothing"])
def test_an_encoder_that_shares_nothing_with_the_one_it_names_is_refused(shares):
    video = ModalEncoderModule(tiny.clip(), kind="video", shares=shares)
    with pytest.raises(ValueError, match=f"video: shares='{shares}', but it has neither the module nor the projector"):
        compose_config({"vision": wrap("clip"), "video": video}, tiny.llama())


def test_shared_parts_of_a_configuration_are_of_an_encoder_before_it():
    vision = wrap("clip")
    video = ModalEncoderModule(vision.module, kind="video", shares="vision")
    values = compose_config({"vision": vision, "video": video}, tiny.llama()).to_dict()
    values["video_modality"]["shares"] = {"module": "video"}
    with pytest.raises(
        ValueError, match=r"video_modality: shares has 'module': 'video', expected some of .*\['vision'\]"
    ):
        MultimodalConfig.from_dict(values)


def test_an_encoder_has_the_input_names_that_it_is_given():
    encoder = ModalEncoderModule(tiny.clip(), input_names={"pictures": "pixel_values"})
    config = compose_config({"vision": encoder}, tiny.llama())
    assert config.modality("vision")["input_names"]["pictures"] == "pixel_values"
    with pytest.raises(ValueError, match=r"image: input_names names \['sounds'\], expected some of"):
        ModalEncoderModule(tiny.clip(), input_names={"pictures": "sounds"})
