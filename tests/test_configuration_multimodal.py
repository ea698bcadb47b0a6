"""Configuration: identity, order, collisions, what a reload keeps."""

import copy
import json

import pytest
import tiny
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2CLS

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel, MultimodalProjectorConfig


def composed(**encoders):
    encoders = encoders or {"vision": tiny.clip(), "audio": tiny.whisper()}
    modules = {name: ModalEncoderModule(model) for name, model in encoders.items()}
    return MultimodalModel(encoders=modules, language_model=tiny.llama())


def test_empty_config_works_and_refuses_to_build():
    config = MultimodalConfig()
    assert config.encoders == [] and config.text_config is None
    with pytest.raises(ValueError, match="no text_config"):
        MultimodalModel(config)


def test_sub_configs_are_the_parts_own_objects():
    model = composed()
    assert model.config.vision_config is model.vision_encoder.module.config
    assert model.config.audio_projector_config is model.audio_encoder.projector.config
    assert model.config.text_config is model.language_model.config


def test_sub_configs_differ_between_class_and_instance():
    model = composed()
    assert list(MultimodalConfig.sub_configs) == ["text_config"]
    keys = ["text_config", "vision_config", "vision_projector_config", "audio_config", "audio_projector_config"]
    assert list(model.config.sub_configs) == keys


def test_order_of_encoders_survives_sorted_json(tmp_path):
    model = composed(vision=tiny.clip(), audio=tiny.whisper())
    other = composed(audio=tiny.whisper(), vision=tiny.clip())
    for made, order in ((model, ["vision", "audio"]), (other, ["audio", "vision"])):
        made.config.save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert again.encoders == order
        assert [n for n, _ in MultimodalModel(again).named_children() if n != "language_model"] == [
            f"{n}_encoder" for n in order
        ]


def test_config_round_trip_is_equal(tmp_path):
    config = composed().config
    config.save_pretrained(tmp_path)
    again = MultimodalConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() | {"_name_or_path": again.to_dict().get("_name_or_path")}
    for key in config.sub_configs:
        assert type(getattr(again, key)) is type(getattr(config, key))


def test_composing_changes_no_setting_of_the_parts():
    encoder, language_model = tiny.clip(attn_implementation="eager"), tiny.qwen3_moe(experts_implementation="eager")
    before = [copy.deepcopy(m.config.__dict__) for m in (encoder, language_model)]
    MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=language_model)
    assert [m.config.__dict__ for m in (encoder, language_model)] == before
    assert encoder.config._attn_implementation == "eager"


def test_attention_and_experts_implementations_survive_a_reload(tmp_path):
    encoder, language_model = tiny.clip(attn_implementation="eager"), tiny.qwen3_moe(experts_implementation="eager")
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=language_model)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert again.vision_encoder.module.config._attn_implementation == "eager"
    assert again.language_model.config._attn_implementation == "sdpa"
    assert again.language_model.config._experts_implementation == "eager"
    asked = MultimodalModel.from_pretrained(
        tmp_path, attn_implementation={"vision_config": "sdpa", "text_config": "eager"}
    )
    assert asked.vision_encoder.module.config._attn_implementation == "sdpa"
    assert asked.language_model.config._attn_implementation == "eager"


def test_kernels_from_a_repository_are_neither_stored_nor_taken(tmp_path):
    config = composed().config
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["part_implementations"] = {"vision_config": {"attn": "someone/kernel"}}
    with pytest.raises(ValueError, match="someone/kernel"):
        MultimodalConfig(**values)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Vision",
        "1st",
        "a-b",
        "x" * 65,
        "config",
        "forward",
        "language_model",
        "quantization",
        "pad",
        "text",
        "train",
    ],
)
def test_bad_and_reserved_names_are_refused(name):
    with pytest.raises(ValueError, match="name"):
        composed(**{name: tiny.clip()})


def test_names_whose_keys_collide_are_refused():
    with pytest.raises(ValueError, match=r"'a_projector' collides with .*'a'.*a_projector_config"):
        composed(a=tiny.clip(), a_projector=tiny.siglip())


def test_newer_format_and_unknown_modality_keys_are_refused():
    config = composed().config.to_dict()
    with pytest.raises(ValueError, match=r"cornstarch_format 2.*up to 1"):
        MultimodalConfig(**(config | {"cornstarch_format": 2}))
    wrong = copy.deepcopy(config)
    wrong["vision_modality"]["resampler"] = {}
    with pytest.raises(ValueError, match=r"unknown keys \['resampler'\]"):
        MultimodalConfig(**wrong)
    assert MultimodalConfig(**config, extra_note="kept").extra_note == "kept"


def test_missing_sub_config_and_bad_values_are_refused():
    config = composed().config.to_dict()
    missing = {key: value for key, value in config.items() if key != "vision_config"}
    with pytest.raises(ValueError, match="no vision_config"):
        MultimodalConfig(**missing)
    for key, value, message in (("drop_prefix", -1, "drop_prefix"), ("layer", [], "layer"), ("layer", "last", "layer")):
        wrong = copy.deepcopy(config)
        wrong["vision_modality"][key] = value
        with pytest.raises(ValueError, match=message):
            MultimodalConfig(**wrong)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_names", {"pixel_values": ["x"]}, "vision_modality: the values of input_names must be a list of names"),
        ("additional_args", [1], "vision_modality: additional_args must be a list of names"),
    ],
)
def test_names_of_inputs_are_texts(key, value, message):
    values = composed().config.to_dict()
    values["vision_modality"][key] = value
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        MultimodalConfig.from_dict(values)


def test_an_encoder_decoder_is_no_composed_model():
    with pytest.raises(ValueError, match="is_encoder_decoder is true"):
        MultimodalConfig.from_dict(composed().config.to_dict() | {"is_encoder_decoder": True})


@pytest.mark.parametrize("key", ["output_hidden_states", "return_dict", "use_cache"])
def test_switches_are_true_or_false(key):
    values = composed().config.to_dict()
    values["vision_config"][key] = -0.5
    with pytest.raises(ValueError, match=f"config.json: .*vision_config: {key} is -0.5, expected true or false"):
        MultimodalConfig.from_dict(values)


def test_token_ids_are_read_by_name_and_by_kind():
    model = composed()
    model.set_modality_token_ids({"vision": 7, "audio": 8})
    assert (model.config.image_token_id, model.config.vision_token_id, model.config.audio_token_id) == (7, 7, 8)
    assert model.config.image_token_index == 7
    assert not hasattr(model.config, "video_token_id")


def test_no_fsdp_rules_of_a_plain_decoder():
    assert MultimodalConfig.base_model_fsdp_plan == {}
    assert PreTrainedConfig.base_model_fsdp_plan != {}


def test_projector_config_reads_sizes_as_the_original_did():
    config = MultimodalProjectorConfig(tiny.clip().config, tiny.llama().config, "mlp", "silu")
    assert (config.in_features, config.out_features, config.projection_type, config.activation) == (
        16,
        32,
        "mlp",
        "silu",
    )
    assert (config.encoder_model_type, config.language_model_type) == ("clip_vision_model", "llama")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projection_type": "perceiver"}, "Unknown projection type 'perceiver'.*'linear', .*'mlp'"),
        ({"activation": "gelo"}, "Unknown activation 'gelo'.*'gelu'"),
        ({"in_features": 0}, "in_features"),
        ({"out_features": "8"}, "out_features"),
    ],
)
def test_projector_config_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        MultimodalProjectorConfig(**values)


@pytest.mark.parametrize("activation", sorted(ACT2CLS))
def test_every_activation_builds(activation):
    from cornstarch_hf import MultimodalProjector

    config = MultimodalProjectorConfig(in_features=4, out_features=6, projection_type="mlp", activation=activation)
    assert MultimodalProjector(config)(torch.randn(2, 4)).last_hidden_state.shape == (2, 6)


def test_two_encoders_with_one_config_object_get_one_each():
    first = tiny.clip()
    second = type(first)(first.config)
    model = MultimodalModel(
        encoders={"left": ModalEncoderModule(first), "right": ModalEncoderModule(second)}, language_model=tiny.llama()
    )
    model.set_attn_implementation({"left_config": "eager"})
    assert model.left_encoder.module.config._attn_implementation == "eager"
    assert model.right_encoder.module.config._attn_implementation == "sdpa"


def test_frozen_must_be_names():
    with pytest.raises(ValueError, match=r"frozen must be a list of names, got \[3\]"):
        MultimodalConfig(frozen=[3])
