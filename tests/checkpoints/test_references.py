"""Reference checkpoints: what they hold, that they load equal, and every way in which bases and changes may not fit."""

import json
import logging
import os
import shutil

import pytest
import tiny
import torch
from hub_cache import commit_of, put_into_cache
from own_memory import check_comes_back
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import whisper_model
from transformers import AutoModel, AutoModelForCausalLM, WhisperForConditionalGeneration

from cornstarch_hf import ModalEncoderModule, MultimodalModel, compose
from cornstarch_hf.checkpoints.manifest import chosen_components, components_of

OVERHEAD = 64_000


PARTS = {
    "u/llama": (tiny.llama, tiny.tokenizer),
    "u/tied": (lambda: tiny.llama(tie_word_embeddings=True), tiny.tokenizer),
    "u/moe": (tiny.qwen3_moe, tiny.tokenizer),
    "u/gpt2": (tiny.gpt2, tiny.tokenizer),
    "u/clip": (tiny.clip, tiny.clip_processor),
    "u/dino": (lambda: tiny.dinov2(hidden_size=12), tiny.clip_processor),
    "u/whisper": (whisper_model, tiny.whisper_processor),
}


@pytest.fixture(scope="module")
def saved_parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    for name, (build, processor) in PARTS.items():
        shards = "40KB" if name == "u/moe" else "5GB"
        build().save_pretrained(root / name, max_shard_size=shards)
        processor().save_pretrained(root / name)
    return root


@pytest.fixture
def cache(tmp_path, saved_parts):
    for name in PARTS:
        put_into_cache(tmp_path / "cache", name, saved_parts / name, commit_of(name))
    return tmp_path / "cache"


def composed(cache, language_model="u/llama", encoders=None, **options):
    return compose(language_model, encoders or {"vision": "u/clip"}, cache_dir=cache, **options)[0]


def described(folder):
    return json.loads((folder / "composition.json").read_text())


def rewrite(folder, change):
    values = described(folder)
    change(values["components"])
    (folder / "composition.json").write_text(json.dumps(values))


def stored(folder):
    with safe_open(folder / "composition.safetensors", "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    different = [n for n in left if left[n].dtype != right[n].dtype or not torch.equal(left[n], right[n])]
    assert not different, different[:4]
    return True


def loads_equal(model, folder, cache, **options):
    again, info = AutoModel.from_pretrained(folder, cache_dir=cache, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert type(again) is MultimodalModel and same(model, again)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    check_comes_back(model.eval(), again, {"input_ids": torch.tensor([[5, 6, 7]])})
    return again


def size_of(folder):
    return sum(p.stat().st_size for p in folder.iterdir())


@pytest.mark.parametrize("language_model", ["u/llama", "u/tied", "u/moe", "u/gpt2"])
def test_only_projectors_of_an_untrained_composition(tmp_path, cache, language_model):
    model = composed(cache, language_model, {"vision": "u/clip", "audio": "u/whisper"}, projector="mlp")
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert torch.equal(state, torch.get_rng_state())
    held = stored(tmp_path / "r")
    assert all(".projector." in name for name in held)
    assert size_of(tmp_path / "r") <= sum(held.values()) + OVERHEAD
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {
        "config.json",
        "composition.json",
        "composition.safetensors",
    }
    assert not list((tmp_path / "r").glob("model*"))
    entry = described(tmp_path / "r")["components"]["audio_encoder"]
    assert (
        entry["select"] == "encoder"
        and entry["class"].endswith("WhisperModel")
        and entry["revision"] == commit_of("u/whisper")
    )
    again = loads_equal(model, tmp_path / "r", cache)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert again.name_or_path == str(tmp_path / "r")


@pytest.mark.parametrize("tuned", [[], ["dino"]])
def test_joined_encoders_are_each_from_their_base(tmp_path, cache, tuned):
    towers = {"vision": {"model": "u/clip", "drop_prefix": 1}, "dino": {"model": "u/dino", "drop_prefix": 1}}
    group = {"encoders": list(towers), "join": "channels"}
    model, processor = compose("u/llama", towers, "mlp", share_inputs=[group], cache_dir=cache)
    for name in tuned:
        model.encoders[name].module = get_peft_model(
            model.encoders[name].module, LoraConfig(r=2, target_modules="all-linear")
        )
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert set(described(tmp_path / "r")["components"]) >= {"vision_encoder", "dino_encoder", "language_model"}
    assert all(".projector." in name or "lora_" in name for name in stored(tmp_path / "r"))
    again = loads_equal(model, tmp_path / "r", cache)
    assert again.config.joined == {"dino": "vision"} and again.vision_encoder.join.others == {
        "dino": again.dino_encoder
    }
    inputs = processor(text="<image> a", images=tiny.image(0), return_tensors="pt")
    check_comes_back(model.eval(), again, dict(inputs), max_new_tokens=2, do_sample=False)


def test_through_every_auto_class_and_as_a_whole_again(tmp_path, cache):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "r", cache_dir=cache, verify=True)
    again.save_pretrained(tmp_path / "whole")
    shutil.rmtree(cache)
    assert same(model, AutoModel.from_pretrained(tmp_path / "whole", verify=True))
    # A whole one in the place of a reference, and the other way round: no file of the other kind stays.
    again.save_pretrained(tmp_path / "r")
    assert not (tmp_path / "r" / "composition.safetensors").exists()


def test_a_reference_in_the_place_of_a_whole_one(tmp_path, cache):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", max_shard_size="60KB")
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert not list((tmp_path / "r").glob("model*"))
    loads_equal(model, tmp_path / "r", cache)


def test_changed_tensors_are_stored(tmp_path, cache):
    model = composed(cache)
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        model.vision_encoder.module.post_layernorm.bias.add_(1)
    model.freeze("language_model")
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert {n for n in stored(tmp_path / "r") if ".projector." not in n} == {
        "language_model.model.layers.1.mlp.up_proj.weight",
        "vision_encoder.module.post_layernorm.bias",
    }
    loads_equal(model, tmp_path / "r", cache)


@pytest.mark.parametrize("language_model", ["u/llama", "u/tied"])
def test_a_resized_vocabulary(tmp_path, cache, language_model):
    model = composed(cache, language_model)
    model.resize_token_embeddings(330)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    wide = {n for n in stored(tmp_path / "r") if ".projector." not in n}
    assert len(wide) == (1 if language_model == "u/tied" else 2)
    again = loads_equal(model, tmp_path / "r", cache)
    assert again.get_input_embeddings().weight.shape[0] == 330


def test_tied_weights_across_changes_and_base(tmp_path, cache):
    tied = composed(cache, "u/tied")
    with torch.no_grad():
        tied.get_input_embeddings().weight[3] += 1
    tied.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    again = loads_equal(tied, tmp_path / "r", cache)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    untied = composed(cache, "u/llama")
    with torch.no_grad():
        untied.get_output_embeddings().weight[3] += 1
    untied.save_pretrained(tmp_path / "u", embed=False, cache_dir=cache)
    assert "language_model.lm_head.weight" in stored(tmp_path / "u")
    assert "language_model.model.embed_tokens.weight" not in stored(tmp_path / "u")
    loads_equal(untied, tmp_path / "u", cache)


@pytest.mark.parametrize("state", ["plain", "merged", "modules_to_save"])
def test_adapters_inside_parts(tmp_path, cache, state):
    options = {"modules_to_save": ["lm_head"]} if state == "modules_to_save" else {}
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    language_model = AutoModelForCausalLM.from_pretrained("u/tied" if state == "plain" else "u/llama", cache_dir=cache)
    encoder = AutoModel.from_pretrained("u/clip", cache_dir=cache)
    model = MultimodalModel(
        {
            "vision": ModalEncoderModule(
                get_peft_model(encoder, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
            )
        },
        get_peft_model(language_model, config),
    )
    if state == "merged":
        model.language_model.merge_adapter()
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    held = stored(tmp_path / "r")
    other = {n for n in held if not any(word in n for word in ("lora_", ".projector.", "modules_to_save"))}
    assert len(other) == (4 if state == "merged" else 0)
    loads_equal(model, tmp_path / "r", cache)


def test_in_another_dtype(tmp_path, cache):
    model = composed(cache, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert all(".projector." in name for name in stored(tmp_path / "r"))
    again = loads_equal(model, tmp_path / "r", cache)
    assert again.dtype == torch.bfloat16
    wide = AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(
        wide.get_input_embeddings().weight, model.get_input_embeddings().weight.float()
    )


def test_some_components_with_their_weights(tmp_path, cache):
    model = composed(cache)
    assert components_of(model.config) == ["vision_encoder", "language_model"]
    model.save_pretrained(tmp_path / "r", embed=["vision_encoder"], cache_dir=cache)
    components = described(tmp_path / "r")["components"]
    assert {n: c["source"] for n, c in components.items()} == {
        "vision_encoder": "embedded",
        "language_model": "reference",
    }
    shutil.rmtree(cache / "models--u--clip")
    loads_equal(model, tmp_path / "r", cache)
    for wrong in (["vision"], "language_model"):
        with pytest.raises(
            ValueError, match=r"embed must be True, False or a list with some of \['vision_encoder', 'language_model'\]"
        ):
            chosen_components(model.config, wrong)


def test_a_part_that_came_from_nowhere(tmp_path, cache):
    model = MultimodalModel(
        {"vision": ModalEncoderModule(AutoModel.from_pretrained("u/clip", cache_dir=cache))}, tiny.llama()
    )
    message = (
        r"language_model did not come from the Hub.*bases=\{'language_model': 'user/name'\}.*embed=\['language_model'\]"
    )
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert not (tmp_path / "r").exists()
    model.language_model.load_state_dict(AutoModelForCausalLM.from_pretrained("u/llama", cache_dir=cache).state_dict())
    model.save_pretrained(tmp_path / "r", embed=False, bases={"language_model": "u/llama"}, cache_dir=cache)
    assert all(".projector." in name for name in stored(tmp_path / "r"))
    loads_equal(model, tmp_path / "r", cache)


def test_a_local_base_only_where_the_caller_names_it(tmp_path, cache, saved_parts):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    shutil.rmtree(cache)
    with pytest.raises(OSError, match=r"_encoder|language_model"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)
    bases = {"vision_encoder": str(saved_parts / "u/clip"), "language_model": str(saved_parts / "u/llama")}
    loads_equal(model, tmp_path / "r", cache, bases=bases)
    with pytest.raises(ValueError, match=r"bases names \['audio_encoder'\], this checkpoint refers to"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, bases={"audio_encoder": "x"})
    rewrite(tmp_path / "r", lambda c: c["language_model"].update(repo_id=str(saved_parts / "u/llama")))
    with pytest.raises(
        ValueError, match=r"language_model.*expected the id of a repository: a folder is read only if you name it"
    ):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, bases={"vision_encoder": bases["vision_encoder"]})


def test_another_base_than_the_saved_one_is_refused(tmp_path, cache, saved_parts):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    other = tmp_path / "other"
    shutil.copytree(saved_parts / "u/llama", other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})  # the same size and shapes
    with pytest.raises(ValueError, match=r"language_model \(.*other\): model.safetensors has the SHA-256"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, bases={"language_model": str(other)})
    put_into_cache(cache, "u/llama", other, commit_of("u/llama"))  # at the very commit
    with pytest.raises(ValueError, match=r"language_model \(u/llama\): model.safetensors has the SHA-256"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, expected \d+"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, bases={"language_model": str(other)})
    shutil.copy(saved_parts / "u/llama/model.safetensors", other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("10000", "20000"))
    with pytest.raises(ValueError, match=r"language_model \(.*other\): its config.json is not the one"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, bases={"language_model": str(other)})


def test_a_flipped_bit_in_the_cache_is_found_on_request(tmp_path, cache):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    blob = (cache / "models--u--clip" / "snapshots" / commit_of("u/clip") / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ValueError, match=r"vision_encoder \(u/clip\): model.safetensors has the SHA-256"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache, verify=True)


def test_a_repository_that_is_a_composition_itself(tmp_path, cache):
    model = composed(cache)
    model.save_pretrained(tmp_path / "whole")
    put_into_cache(cache, "u/cycle", tmp_path / "whole", commit_of("u/cycle"))
    with pytest.raises(ValueError, match=r"language_model refers to 'u/cycle', which is a composition itself"):
        model.save_pretrained(tmp_path / "r", embed=False, bases={"language_model": "u/cycle"}, cache_dir=cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    put_into_cache(cache, "u/cycle", tmp_path / "r", commit_of("u/cycle"))
    rewrite(
        tmp_path / "r",
        lambda c: c["language_model"].update(repo_id="u/cycle", revision=commit_of("u/cycle"), weights={}),
    )
    with pytest.raises(ValueError, match=r"language_model.*(composition itself|config.json is not the one)"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)


def test_tensors_with_two_sources_none_or_another_shape(tmp_path, cache):
    model = composed(cache)
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    rewrite(tmp_path / "r", lambda c: c["language_model"]["tensors"].append("lm_head"))
    with pytest.raises(
        ValueError, match=r"language_model.lm_head.weight comes from composition.safetensors and from 'u/llama'"
    ):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)
    rewrite(tmp_path / "r", lambda c: c["language_model"].update(tensors=["model.layers"]))
    with pytest.raises(
        ValueError, match=r"without a source \['language_model.model.embed_tokens.weight', 'language_model.model.norm"
    ):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of another shape \[\('language_model.model.layers.0.mlp"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "main"},
        {"repo_id": 7},
        {"dtype": "os"},
        {"weights": {"../x.safetensors": {"sha256": "0" * 64, "size": 1}}},
        {"weights": {"model.safetensors": {"sha256": "x", "size": 1}}},
        {"tensors": "everything"},
        {"subfolder": "../up"},
        {"select": ["a"]},
    ],
    ids=str,
)
def test_entries_that_no_save_wrote(tmp_path, cache, change):
    composed(cache).save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    rewrite(tmp_path / "r", lambda c: c["vision_encoder"].update(change))
    with pytest.raises(
        ValueError, match=r"vision_encoder: composition.json must name a repository, a commit of 40 hex digits"
    ):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)


def test_no_weights_under_the_usual_names(tmp_path, cache, saved_parts):
    composed(cache).save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    os.remove(tmp_path / "r" / "composition.json")  # as a program would see it that does not know of it
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)


def test_further_training_of_a_loaded_one(tmp_path, cache):
    composed(cache).save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    again = AutoModel.from_pretrained(tmp_path / "r", cache_dir=cache)
    with torch.no_grad():
        again.vision_encoder.projector.projection.bias.add_(1)
    again.save_pretrained(tmp_path / "r2", embed=False, cache_dir=cache)
    assert len(stored(tmp_path / "r2")) == 2
    loads_equal(again, tmp_path / "r2", cache)


def test_a_moved_branch_is_of_no_weight_offline(tmp_path, cache, saved_parts, caplog):
    model = composed(cache)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    tiny.llama(intermediate_size=80).save_pretrained(tmp_path / "moved")
    put_into_cache(cache, "u/llama", tmp_path / "moved", commit_of("later"))
    with caplog.at_level(logging.WARNING):
        loads_equal(model, tmp_path / "r", cache)


def test_a_model_from_a_headed_class(tmp_path, cache):
    """The tower of a headed model lies deeper; it is found again by its place."""
    whisper = WhisperForConditionalGeneration.from_pretrained("u/whisper", cache_dir=cache)
    language_model = AutoModelForCausalLM.from_pretrained("u/llama", cache_dir=cache)
    model = MultimodalModel({"audio": ModalEncoderModule(whisper)}, language_model)
    model.save_pretrained(tmp_path / "r", embed=False, cache_dir=cache)
    assert described(tmp_path / "r")["components"]["audio_encoder"]["select"] == "model.encoder"
    loads_equal(model, tmp_path / "r", cache)
