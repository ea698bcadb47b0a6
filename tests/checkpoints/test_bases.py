"""Reading a part's own repository: what is pinned, and what cannot be."""

import json
import shutil

import pytest
import tiny
import torch
from hub_cache import commit_of, put_into_cache

from cornstarch_hf.checkpoints.bases import base_errors_explained, read_base
from cornstarch_hf.parts.classes import KEYS

LLAMA = "transformers.models.llama.modeling_llama.LlamaForCausalLM"


def origin(**changes):
    return dict.fromkeys(KEYS) | {"repo_id": "u/llama", "class": LLAMA, "select": "", "subfolder": ""} | changes


@pytest.fixture
def cache(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "llama", max_shard_size="60KB")
    put_into_cache(tmp_path / "cache", "u/llama", tmp_path / "llama", commit_of("1"))
    return {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}


def test_sharded_weights_are_pinned_with_their_index(cache):
    base = read_base("language_model", origin(), torch.float32, cache)
    assert base.entry["revision"] == commit_of("1") and base.entry["dtype"] == "float32"
    assert "model.safetensors.index.json" in base.entry["weights"] and len(base.entry["weights"]) > 2
    assert base.tensors["model.embed_tokens.weight"].dtype == torch.float32
    inner = read_base("language_model", origin(select="model.layers"), torch.bfloat16, cache)
    assert inner.tensors["0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_what_is_not_in_the_repository_is_not_taken_from_it(tmp_path, cache):
    """A headless checkpoint loaded into a class with a head: the head is random, and no base provides it."""
    tiny.llama().model.save_pretrained(tmp_path / "headless")
    put_into_cache(tmp_path / "cache", "u/headless", tmp_path / "headless", commit_of("2"))
    base = read_base("language_model", origin(repo_id="u/headless"), torch.float32, cache)
    assert "lm_head.weight" not in base.tensors and "model.embed_tokens.weight" in base.tensors


def test_no_safetensors_cannot_be_pinned(tmp_path, cache):
    model = tiny.llama()
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    put_into_cache(tmp_path / "cache", "u/bin", tmp_path / "bin", commit_of("3"))
    with pytest.raises(
        ValueError, match=r"language_model: 'u/bin' has no model.safetensors.*embed=\['language_model'\]"
    ):
        read_base("language_model", origin(repo_id="u/bin"), torch.float32, cache)


def test_classes_and_parts_that_do_not_exist(cache):
    with pytest.raises(ValueError, match="language_model: the model class 'NoSuch' is not in transformers"):
        read_base("language_model", origin(**{"class": "NoSuch"}), torch.float32, cache)
    with pytest.raises(ValueError, match="has no part 'vision_tower'"):
        read_base("language_model", origin(select="vision_tower"), torch.float32, cache)


def test_a_repository_that_is_not_there(cache):
    with pytest.raises(
        OSError, match=r"vision_encoder: its base 'u/none' at main cannot be read.*bases=\{'vision_encoder'"
    ):
        read_base("vision_encoder", origin(repo_id="u/none"), torch.float32, cache)


def test_errors_name_the_component_and_keep_their_cause():
    with (
        pytest.raises(
            OSError, match=r"vision_encoder: its base 'u/x' at v1 cannot be read \(TimeoutError: slow\)"
        ) as caught,
        base_errors_explained("vision_encoder", {"repo_id": "u/x", "requested_revision": "v1"}),
    ):
        raise TimeoutError("slow")
    assert isinstance(caught.value.__cause__, TimeoutError)
    with pytest.raises(ValueError, match="mine"), base_errors_explained("vision_encoder", {"repo_id": "u/x"}):
        raise ValueError("mine")


def test_a_base_with_code_of_its_own(tmp_path, cache):
    values = {
        "model_type": "of_their_own",
        "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModel": "theirs.TheirModel"},
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(values))
    (tmp_path / "own" / "theirs.py").write_text("raise SystemExit('it ran')")
    tiny.llama().save_pretrained(tmp_path / "weights")
    shutil.copy(tmp_path / "weights" / "model.safetensors", tmp_path / "own")
    put_into_cache(tmp_path / "cache", "u/own", tmp_path / "own", commit_of("4"))
    message = r"(?s)language_model: the configuration of its base 'u/own' cannot be used .*trust_remote_code=True.*embed=\['language_model'\]"
    with pytest.raises(ValueError, match=message):
        read_base("language_model", origin(repo_id="u/own"), torch.float32, cache)
