"""Files of checkpoints in folders and in the Hub's cache; what a load compares."""

import json
import os

import pytest
import torch
from helpers import compose_tiny
from hub_cache import commit_of, put_into_cache
from transformers import AutoModel

from cornstarch_hf import MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.checkpoints.finding import CheckpointFiles


@pytest.fixture
def folder(tmp_path):
    compose_tiny(["clip"])[0].save_pretrained(tmp_path / "m", max_shard_size="60KB")
    return tmp_path / "m"


def test_in_a_folder_and_in_the_cache(tmp_path, folder):
    local = CheckpointFiles(folder, {"subfolder": None, "dtype": "x"})
    assert local.is_local and local.find("config.json") == str(folder / "config.json") and local.find("none") is None
    put_into_cache(tmp_path / "cache", "u/m", folder, commit_of("m"))
    cached = CheckpointFiles("u/m", {"cache_dir": str(tmp_path / "cache")})
    found = cached.find_all(["config.json", "composition.json", "none"])
    assert found["none"] is None and os.path.samefile(
        os.path.dirname(found["config.json"]), os.path.dirname(found["composition.json"])
    )
    inside = CheckpointFiles(tmp_path, {"subfolder": "m"})
    assert inside.find("config.json") == str(folder / "config.json")


def test_a_shard_that_was_cut_or_is_gone(folder):
    shard = sorted(folder.glob("model-*"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(
        ValueError, match=f"{shard.name} has {len(data) - 1} bytes, expected {len(data)} as it was saved"
    ):
        AutoModel.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"the file {shard.name} \({len(data)} bytes\) is missing"):
        AutoModel.from_pretrained(folder)


def test_a_flipped_bit_is_found_on_request(folder):
    for name in ("config.json", sorted(p.name for p in folder.glob("model-*"))[0]):
        path = folder / name
        data = path.read_bytes()
        place = data.index(b'"hidden_size": 16') + 16 if name == "config.json" else len(data) - 3
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match=f"{name} has the SHA-256"):
            MultimodalModel.from_pretrained(folder, verify=True)
        path.write_bytes(data)
    assert isinstance(AutoModel.from_pretrained(folder, verify=True), MultimodalModel)


def test_a_configuration_edited_by_hand_is_no_fault(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"note": "mine"}))
    assert AutoModel.from_pretrained(folder).config.note == "mine"


def test_weights_of_another_save_beside_the_valid_ones_are_not_read(folder, tmp_path):
    """An upload that only adds files leaves an old `model.safetensors`, which transformers would prefer."""
    other = compose_tiny(["clip"])[0]
    with torch.no_grad():
        other.language_model.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "o")
    expected = AutoModel.from_pretrained(folder).language_model.lm_head.weight
    os.link(tmp_path / "o" / "model.safetensors", folder / "model.safetensors")
    loaded = AutoModel.from_pretrained(folder)
    assert torch.equal(loaded.language_model.lm_head.weight, expected)
    loaded.save_pretrained(tmp_path / "again")
    assert "transformers_weights" not in (tmp_path / "again" / "config.json").read_text()


def test_variants_lie_side_by_side(tmp_path):
    model = compose_tiny(["clip"])[0]
    model.save_pretrained(tmp_path)
    half = MultimodalModel.from_pretrained(tmp_path, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model.safetensors.index.fp16.json").exists()
    loaded = MultimodalModel.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(loaded.language_model.lm_head.weight, half.language_model.lm_head.weight)
    plain = MultimodalModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(plain.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_nothing_to_verify_by(folder):
    (folder / "composition.json").unlink()
    assert isinstance(AutoModel.from_pretrained(folder), MultimodalModel)
    with pytest.raises(ValueError, match="has no composition.json to verify it by"):
        AutoModel.from_pretrained(folder, verify=True)
    with pytest.raises(ValueError, match="has no composition.json that names a base"):
        AutoModel.from_pretrained(folder, bases={"language_model": "x"})


def test_a_whole_checkpoint_has_no_bases(folder):
    with pytest.raises(ValueError, match=r"bases names \['language_model'\], but .* holds all of its weights itself"):
        AutoModel.from_pretrained(folder, bases={"language_model": "x"})


def test_projectors_are_checked_too(tmp_path):
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=4, out_features=6))
    projector.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path, verify=True).projection.weight, projector.projection.weight)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"has {len(data) - 1} bytes, expected {len(data)}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_source_that_is_no_folder_and_no_id(tmp_path):
    with pytest.raises(OSError, match=r"typo is no folder of this machine.*check the path"):
        CheckpointFiles(tmp_path / "typo")
