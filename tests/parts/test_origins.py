"""Where parts came from: recorded at composition, kept in the checkpoint, never a path of this machine."""

import json

import pytest
import tiny
from hub_cache import commit_of, put_into_cache
from transformers import AutoModel, CLIPConfig, CLIPModel

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel, compose
from cornstarch_hf.parts.classes import check_origins, is_repo_id, origin_of


def clip_model():
    vision = tiny.clip().config
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    return CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8))


@pytest.fixture
def cache(tmp_path):
    for name, model, processor in (
        ("u/clip", clip_model(), tiny.clip_processor()),
        ("u/llama", tiny.llama(), tiny.tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        put_into_cache(tmp_path / "cache", name, tmp_path / name, commit_of(name))
        put_into_cache(tmp_path / "cache", name, tmp_path / name, commit_of(name + "v1"), "v1")
    return tmp_path / "cache"


def test_the_tower_of_a_model_from_the_hub(cache):
    model = AutoModel.from_pretrained("u/clip", cache_dir=cache)
    found = {"repo_id": "u/clip", "revision": None, "requested_revision": None, "subfolder": "",
             "class": "transformers.models.clip.modeling_clip.CLIPModel", "select": "vision_model"}  # fmt: skip
    assert ModalEncoderModule(model).origin == origin_of(model, model.vision_model) == found
    assert origin_of(model, model)["select"] == ""
    assert origin_of(model, tiny.clip()) is None  # no part of it


def test_nothing_is_recorded_of_what_did_not_come_from_the_hub(tmp_path, cache):
    assert ModalEncoderModule(tiny.clip()).origin is None
    local = AutoModel.from_pretrained(tmp_path / "u/clip")
    assert ModalEncoderModule(local).origin is None
    model = MultimodalModel({"vision": ModalEncoderModule(local)}, tiny.llama())
    assert model.config.origins is None and "origins" not in model.config.to_dict()


def test_compose_knows_revisions_and_commits(tmp_path, cache):
    encoders = {"vision": {"model": "u/clip", "revision": "v1"}}
    model, processor = compose("u/llama", encoders, cache_dir=cache)
    origins = model.config.origins
    assert origins["vision_encoder"] | {"class": "", "select": ""} == {
        "repo_id": "u/clip", "revision": commit_of("u/clipv1"), "requested_revision": "v1", "subfolder": "", "class": "",
        "select": ""}  # fmt: skip
    assert origins["language_model"]["revision"] == commit_of("u/llama")
    assert origins["language_model"]["requested_revision"] is None
    live = AutoModel.from_pretrained("u/clip", revision="v1", cache_dir=cache)
    again, _ = compose("u/llama", {"vision": {"model": live, "processor": tiny.clip_processor()}}, cache_dir=cache)
    assert again.config.origins["vision_encoder"]["revision"] is None  # a live model does not tell
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert AutoModel.from_pretrained(tmp_path / "m").config.origins == origins
    assert "origins" not in json.loads((tmp_path / "m" / "processor_config.json").read_text())["model_config"]


def test_ids_of_repositories():
    assert all(map(is_repo_id, ["gpt2", "user/name", "user/name-1.5_x"]))
    assert not any(map(is_repo_id, ["/tmp/x", "a/b/c", "../x", "a..b/c", "", None, 7, "~/x", "./x", "a b"]))


@pytest.mark.parametrize("value", [["x"], {"language_model": "u/x"}, {"language_model": {"repo_id": "/tmp/x"}},
                                   {"language_model": {"repo_id": "u/x", "code": "y"}}, {"a": {"repo_id": "u/x", "select": 3}}])  # fmt: skip
def test_what_a_configuration_must_not_say(value):
    with pytest.raises(ValueError, match="must be texts under some of"):
        check_origins(value)
    with pytest.raises(ValueError, match="must be texts under some of"):
        MultimodalConfig(origins=value)
