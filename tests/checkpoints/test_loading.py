"""What `from_pretrained` takes reaches the model, for whole and for reference checkpoints alike."""

import copy
import json
import logging
from functools import partial

import pytest
import tiny
import torch
from helpers import compose_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedModel

from cornstarch_hf import MultimodalConfig, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.checkpoints import folder_swap
from cornstarch_hf.checkpoints.manifest import read_composition, write_composition
from cornstarch_hf.parts.stored_values import POINTER


@pytest.fixture
def folder(tmp_path):
    model = compose_tiny(["clip"])[0]
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, MultimodalModel.from_pretrained])
def test_options_of_configuration_and_of_loading(folder, load):
    model, info = load(
        folder, loss_at_labels=True, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert model.config.loss_at_labels is True and model.dtype == torch.bfloat16 and not any(info.values())
    assert model.language_model.config._attn_implementation == "eager" and model.generation_config.max_new_tokens == 3
    with pytest.raises(TypeError, match="no_such_option"):
        load(folder, no_such_option=1)


def test_a_given_configuration_is_used_and_left_alone(folder):
    config = AutoConfig.from_pretrained(folder)
    config.loss_at_labels = True
    before = config.to_dict()
    assert MultimodalModel.from_pretrained(folder, config=config).config.loss_at_labels is True
    assert config.to_dict() == before and not hasattr(config, "transformers_weights")
    assert AutoModel.from_pretrained(folder, config=config).config.loss_at_labels is True
    again = MultimodalModel.from_pretrained(folder, generation_config=GenerationConfig(max_new_tokens=9))
    assert again.generation_config.max_new_tokens == 9


def test_a_state_instead_of_a_folder(folder):
    model = AutoModel.from_pretrained(folder)
    again = MultimodalModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_after_an_interrupted_save_the_new_checkpoint_is_read(folder):
    """As after a kill between the moment at which it became valid and the last file's coming to its place."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    model.config.loss_at_labels = True
    inside = folder / ".saved-abcdefgh"
    model.save_pretrained(inside)
    values = json.loads((inside / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {POINTER: inside.name}))
    for load in (AutoModel.from_pretrained, MultimodalModel.from_pretrained):
        again = load(folder)
        assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)
        assert again.config.loss_at_labels is True and POINTER not in again.config.to_dict()
    assert POINTER not in MultimodalConfig.from_pretrained(folder).to_dict()
    model.save_pretrained(folder)
    assert not inside.exists() and POINTER not in (folder / "config.json").read_text()


def test_who_asks_what_is_missing_is_told_instead_of_refused(folder, caplog):
    save_file({"other": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (AutoModel.from_pretrained, MultimodalModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, expected \d+ as it was saved"):
            load(folder)
        with caplog.at_level(logging.WARNING):
            _, info = load(folder, output_loading_info=True)
        assert "vision_encoder.projector.projection.weight" in info["missing_keys"] and info["unexpected_keys"] == {
            "other"
        }
        assert "model.safetensors has" in caplog.text
        with pytest.raises(ValueError, match="model.safetensors has"):
            load(folder, output_loading_info=True, verify=True)
    (folder / "composition.json").unlink()
    with pytest.raises(ValueError, match=r"does not hold \d+ tensors of the model.*they would be random"):
        AutoModel.from_pretrained(folder)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_every_variant_is_verified(folder):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder, variant="x")
    for variant in (None, "x"):
        MultimodalModel.from_pretrained(folder, variant=variant, verify=True)
    for variant, name in ((None, "model.safetensors"), ("x", "model.x.safetensors")):
        flip_a_bit(folder / name)
        if variant is None:
            MultimodalModel.from_pretrained(folder, variant="x", verify=True)
        with pytest.raises(ValueError, match=f"{name} has the SHA-256"):
            MultimodalModel.from_pretrained(folder, variant=variant, verify=True)
    (folder / "model.y.safetensors").write_bytes((folder / "model.x.safetensors").read_bytes())
    model.save_pretrained(folder, variant="x")
    with pytest.raises(ValueError, match="lists no weights of the variant 'y' to verify"):
        MultimodalModel.from_pretrained(folder, variant="y", verify=True)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("language_model", "composition.safetensors with all else is missing"),
        ("foo_encoder", r"refers to \['foo_encoder'\]"),
    ],
)
def test_a_whole_checkpoint_that_says_it_is_a_reference(folder, component, message):
    values = json.loads((folder / "composition.json").read_text())
    values["components"][component] = {"source": "reference"}
    (folder / "composition.json").write_text(json.dumps(values))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MultimodalModel.from_pretrained(folder)


def test_replaced_while_it_is_read(folder, monkeypatch):
    other = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        other.language_model.lm_head.weight.add_(1)
    load = PreTrainedModel._load_pretrained_model
    saves = []

    def meanwhile(*args, **kwargs):
        if not saves:
            saves.append(other.save_pretrained(folder))
        return load(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(meanwhile))
    loaded = MultimodalModel.from_pretrained(folder)
    assert torch.equal(loaded.language_model.lm_head.weight, other.language_model.lm_head.weight) and len(saves) == 1


def wider(folder):
    """A model that has another configuration than the one in the folder."""
    layers = json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"]
    return compose_tiny(["clip"], tiny.llama(num_hidden_layers=layers + 1))[0]


def test_saved_with_another_configuration_since_that_was_read(folder):
    """The Auto classes read the configuration before anything of this package runs."""
    config = AutoConfig.from_pretrained(folder, dtype=torch.bfloat16)
    other = wider(folder)
    other.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder, config=config)
    assert loaded.config.text_config.num_hidden_layers == other.config.text_config.num_hidden_layers
    assert loaded.dtype == torch.bfloat16  # what was asked for when it was read
    assert torch.equal(loaded.language_model.lm_head.weight, other.language_model.lm_head.weight.to(torch.bfloat16))


def test_a_changed_configuration_of_a_model_that_is_gone(folder):
    config = AutoConfig.from_pretrained(folder)
    config.text_config.rope_parameters["rope_theta"] = 7.0
    AutoModel.from_pretrained(folder, config=config)  # the caller's own
    wider(folder).save_pretrained(folder)
    with pytest.raises(
        ValueError, match="was saved again since its configuration was read, which was changed meanwhile"
    ):
        AutoModel.from_pretrained(folder, config=config)


def test_saved_by_the_model_that_it_belongs_to(folder):
    model = MultimodalModel.from_pretrained(folder)
    model.config.loss_at_labels = True
    model.save_pretrained(folder)
    assert MultimodalModel.from_pretrained(folder, config=model.config).config.loss_at_labels is True


def test_read_before_a_save_that_was_interrupted(folder, monkeypatch):
    """The new checkpoint lies in a folder inside then, and its configuration with it."""
    config, other = AutoConfig.from_pretrained(folder), wider(folder)

    def stop(*_):
        raise OSError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(folder_swap, "_put_in_place", stop)
        with pytest.raises(OSError, match="stopped"):
            other.save_pretrained(folder)
    loaded = AutoModel.from_pretrained(folder, config=config)
    assert loaded.config.text_config.num_hidden_layers == other.config.text_config.num_hidden_layers
    assert torch.equal(loaded.language_model.lm_head.weight, other.language_model.lm_head.weight)


def test_a_configuration_of_a_folder_around_it_is_the_callers(folder):
    outer, inner = AutoConfig.from_pretrained(folder), wider(folder)
    inner.save_pretrained(folder / "inner")
    with pytest.raises(ValueError, match="does not take"):  # it has a layer less, and no other one is read in its place
        MultimodalModel.from_pretrained(folder / "inner", config=outer)


def test_when_a_configuration_was_read_is_not_part_of_it(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    assert config == AutoConfig.from_pretrained(folder) and config == copy.deepcopy(config)
    config.save_pretrained(tmp_path / "c")
    assert "_read" not in (tmp_path / "c" / "config.json").read_text() and "_read" not in str(config)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        OSError, match="is no folder of this machine, and cannot be the id of a repository: check the path"
    ):
        MultimodalModel.from_pretrained(tmp_path / "typo")


def edited(folder, **changes):
    """The checkpoint with some values of a part's configuration changed: ``text_config={...}``."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for part, change in changes.items():
        values[part] |= change
    path.write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"text_config": {"num_hidden_layers": 1}}, "language_model.model.layers.1"),
        ({"text_config": {"num_hidden_layers": 0}}, "language_model.model.layers.0"),
        ({"text_config": {"attention_bias": False}}, "language_model.model.layers.0.self_attn.k_proj.bias"),
        ({"vision_config": {"num_hidden_layers": 1}}, "vision_encoder.module.encoder.layers.1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_tensors_that_the_model_does_not_take_are_refused_or_told(tmp_path, change, tensor, shards):
    language = tiny.llama(attention_bias=True)
    model, _ = compose_tiny(["clip"], language_model=language)
    model.save_pretrained(tmp_path, **shards)
    whole = AutoConfig.from_pretrained(tmp_path)
    edited(tmp_path, **change)
    loads = [AutoModel.from_pretrained, MultimodalModel.from_pretrained]
    # A configuration that the caller changed is no other case.
    loads += [partial(load, config=AutoConfig.from_pretrained(tmp_path)) for load in loads]
    for load in loads:
        with pytest.raises(
            ValueError, match=rf"holds \d+ tensors that the model does not take \(\['{tensor}.*output_loading_info"
        ):
            load(tmp_path)
        _, info = load(tmp_path, output_loading_info=True)
        assert any(key.startswith(tensor) for key in info["unexpected_keys"]) and not info["missing_keys"]
    again = MultimodalModel.from_pretrained(tmp_path, config=whole)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "extra",
    [
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
        "language_model.model.rotary_emb.inv_freq",
        "vision_encoder.module.embeddings.position_ids",
        "language_model.model.layers.0.self_attn.masked_bias",
    ],
)
def test_tensors_that_older_versions_stored_are_no_surplus(tmp_path, extra):
    model, _ = compose_tiny(["clip"])
    state = model.state_dict()
    model.save_pretrained(tmp_path / "old", state_dict=state | {extra: torch.ones(3)})
    assert extra in load_file(tmp_path / "old" / "model.safetensors")
    again = AutoModel.from_pretrained(tmp_path / "old")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in state.items())
    model.save_pretrained(tmp_path / "other", state_dict=state | {"language_model.model.other": torch.ones(3)})
    with pytest.raises(
        ValueError, match=r"holds 1 tensors that the model does not take \(\['language_model.model.other'\]"
    ):
        AutoModel.from_pretrained(tmp_path / "other")


def test_a_head_that_is_stored_beside_the_table_it_is_tied_to_is_no_surplus(tmp_path):
    model, _ = compose_tiny(["clip"], language_model=tiny.llama(tie_word_embeddings=True))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert "language_model.lm_head.weight" in state
    model.save_pretrained(tmp_path)
    with_head = dict(load_file(tmp_path / "model.safetensors")) | {
        "language_model.lm_head.weight": state["language_model.lm_head.weight"]
    }
    save_file(with_head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    write_composition(str(tmp_path), read_composition(tmp_path / "composition.json").components)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.language_model.lm_head.weight is again.language_model.get_input_embeddings().weight
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in state.items())


def test_a_projector_of_fewer_layers_than_stored(tmp_path):
    config = MultimodalProjectorConfig(projection_type="mlp", in_features=4, out_features=4, num_layers=3)
    MultimodalProjector(config).save_pretrained(tmp_path)
    edited(tmp_path, projection_kwargs={"num_layers": 2})
    for load in (AutoModel.from_pretrained, MultimodalProjector.from_pretrained):
        with pytest.raises(ValueError, match="tensors that the model does not take"):
            load(tmp_path)
