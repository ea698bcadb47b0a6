"""Errors about stored values: the file or the part, the key, its value, what was expected, and the first error as the cause."""

import json

import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from cornstarch_hf import MultimodalConfig, MultimodalModel
from cornstarch_hf.parts.stored_errors import build_part, explained, make_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    compose_tiny(["clip"])[0].save_pretrained(folder)
    return folder


@pytest.fixture
def load(saved, tmp_path):
    """Loads a copy of the checkpoint with some values of one of its files set otherwise."""

    def changed(place, values, file="config.json"):
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        told = json.loads((folder / file).read_text())
        (told[place] if place else told).update(values)
        (folder / file).write_text(json.dumps(told))
        return AutoModel.from_pretrained(folder)

    return changed


VISION, TEXT = (
    "vision_encoder: CLIPVisionModel cannot be built of vision_config",
    "language_model: LlamaForCausalLM cannot",
)
WRONG = [
    (
        "vision_config",
        {"hidden_act": "x"},
        rf"{VISION} .*KeyError: 'x'.* vision_config.hidden_act='x' \(one of \['gelu'",
    ),
    ("vision_config", {"intermediate_size": -1}, rf"{VISION} .*vision_config.intermediate_size=-1: with the default"),
    ("vision_config", {"patch_size": 2**62}, rf"{VISION} .*vision_config.patch_size=4611686018427387904"),
    ("vision_config", {"hidden_size": 0}, rf"{VISION} .*ZeroDivisionError.* vision_config.hidden_size=0"),
    (
        "vision_config",
        {"num_attention_heads": 3},
        r"vision_config does not take .*multiple of the number of attention heads",
    ),
    ("vision_config", {"dtype": []}, r"vision_config.dtype is \[\], expected the name of a torch data type"),
    ("text_config", {"pad_token_id": 10**12}, rf"{TEXT} .*AssertionError.* text_config.pad_token_id=1000000000000"),
    (
        "text_config",
        {"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}},
        rf"{TEXT} .*'rope_type': 'x'.*\}} \(one of \['default'",
    ),
    ("text_config", {"num_attention_heads": 0}, r"text_config does not take .* Without num_attention_heads=0 it does"),
    (
        "text_config",
        {"num_hidden_layers": -1},
        r"text_config.num_hidden_layers is -1, expected a number that is not neg",
    ),
    ("text_config", {"rms_norm_eps": "x"}, r"text_config does not take .*'rms_norm_eps' expected float, got str"),
    ("text_config", {"hidden_size": 48}, r"21 tensors of other shapes than the checkpoint holds \(language_model\."),
    ("vision_modality", {"encoder_class": "LlamaModel"}, r"vision_encoder: LlamaModel .*Its class takes a LlamaConfig"),
    ("vision_modality", {"encoder_kwargs": {"foo": True}}, rf"{VISION} .*\{{'foo': True\}}.*unexpected keyword"),
    ("vision_projector_config", {"activation": 3}, r"vision_projector_config: Unknown activation 3, expected one of"),
    (
        "vision_projector_config",
        {"projection_kwargs": {"x": 1}},
        r"vision_projector_config: The 'linear' projector takes no",
    ),
    ("", {"dtype": "forward"}, "dtype is 'forward', expected the name of a torch data type"),
]


@pytest.mark.parametrize(("place", "values", "match"), WRONG, ids=[f"{p} {v}" for p, v, _ in WRONG])
def test_wrong_values_of_a_configuration(load, place, values, match):
    with pytest.raises(ValueError, match=match) as caught:
        load(place, values)
    assert "config.json: " in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"max_new_tokens": "x"}, {"max_new_tokens": -1}, {"eos_token_id": [2, "x"]}, {"do_sample": 1}]
)
def test_wrong_values_of_generation(load, values):
    with pytest.raises(ValueError, match=rf"generation_config.json: .*{next(iter(values))}"):
        load("", values, "generation_config.json")


def test_the_first_error_is_the_cause():
    config = CLIPVisionConfig(**tiny.clip().config.to_dict() | {"hidden_act": "x"})
    with pytest.raises(ValueError, match=r"eye: CLIPVisionModel cannot be built of eye_config") as caught:
        build_part(CLIPVisionModel, config, {}, "eye", "eye_config")
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_can_be_built_is_what_the_class_makes():
    config = tiny.llama().config
    built = build_part(LlamaForCausalLM, config, {}, "language_model", "text_config")
    assert type(built) is LlamaForCausalLM and built.config is config


@pytest.mark.parametrize(
    "error", [FileNotFoundError("a"), ImportError("a"), MemoryError("a"), torch.OutOfMemoryError("a")]
)
def test_what_is_missing_is_no_wrong_value(error):
    def fails(*args, **kwargs):
        raise error

    for call in (
        lambda: make_config(fails, {"a": 1}, "file"),
        lambda: build_part(fails, tiny.llama().config, {}, "part", "key"),
    ):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error
    with pytest.raises(type(error)), explained("file"):
        raise error


def test_where_is_said_once():
    told = pytest.raises(ValueError, match=r"^file: it is wrong\. Restore the file that was saved with the weights\.$")
    with told as caught, explained("file"), explained("file"):
        raise TypeError("it is wrong.")
    assert isinstance(caught.value.__cause__, TypeError)
    with (
        pytest.raises(ValueError, match=r"^file does not take its stored values \(KeyError: 'a'\)\."),
        explained("file"),
    ):
        raise KeyError("a")


def test_a_model_of_a_wrong_configuration_says_so_without_a_file(saved):
    config = MultimodalConfig.from_pretrained(saved)
    config.vision_config.hidden_act = "x"
    with pytest.raises(ValueError, match=rf"^{VISION}"):
        MultimodalModel(config)
