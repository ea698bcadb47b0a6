"""Checkpoints that attack who loads them: each is refused by a ValueError that names the place, in bounded time and memory."""

import copy
import json
import os
import pickle
import shutil

import pytest
from bounded import refusals
from helpers import compose_tiny
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import cornstarch_hf
from cornstarch_hf import MultimodalConfig, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig, limits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "model"
    model, processor = compose_tiny(["clip"])
    model.save_pretrained(folder, max_shard_size="40KB")
    processor.save_pretrained(folder)
    model.vision_encoder.projector.save_pretrained(folder / "projector")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture
def hostile(saved, tmp_path):
    """A copy of the honest checkpoint, and a function that changes one of its JSON files."""
    folder = tmp_path / "hostile"
    shutil.copytree(saved, folder)
    (folder / "composition.json").unlink()  # which would tell of every change by itself

    def change(file, edit):
        path = folder / file
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))
        return folder

    change.folder = folder
    return change


MODEL_LOADERS = [
    AutoModel.from_pretrained,
    AutoModelForImageTextToText.from_pretrained,
    MultimodalModel.from_pretrained,
]
CONFIG_LOADERS = [AutoConfig.from_pretrained, MultimodalConfig.from_pretrained, *MODEL_LOADERS]


def refused(loaders, folder, match):
    for load in loaders:
        with pytest.raises(ValueError, match=match):
            load(folder)


def test_the_honest_checkpoint_loads(saved):
    for load in (*CONFIG_LOADERS, AutoProcessor.from_pretrained):
        load(saved)


# ---- files


class Touch:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_and_never_opened(hostile, name, tmp_path):
    folder, evidence = hostile.folder, tmp_path / "ran"
    for file in folder.glob("model*"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(evidence)))
    refused(MODEL_LOADERS, folder, "holds weights as .* only: pickled files can run code")
    assert not evidence.exists()


def test_a_pickled_shard_in_an_index_of_safetensors_is_refused(hostile, tmp_path):
    evidence = tmp_path / "ran"
    (hostile.folder / "model-1.bin").write_bytes(pickle.dumps(Touch(evidence)))
    folder = hostile("model.safetensors.index.json", lambda v: v["weight_map"].update(x="model-1.bin"))
    refused(MODEL_LOADERS, folder, "'x' lies in 'model-1.bin', expected a safetensors file beside it")
    assert not evidence.exists()


@pytest.mark.parametrize(
    "place",
    [
        "../other/model.safetensors",
        "/etc/passwd",
        "sub/../../x.safetensors",
        "..\\x.safetensors",
        5,
        None,
        "a/b.safetensors",
    ],
)
def test_shards_outside_of_the_folder(hostile, place):
    folder = hostile("model.safetensors.index.json", lambda v: v["weight_map"].update(x=place))
    refused(MODEL_LOADERS, folder, "expected a safetensors file beside it")


@pytest.mark.parametrize("values", [[], {"weight_map": []}, {"weight_map": {}, "metadata": 3}, {}])
def test_an_index_of_another_form(hostile, values):
    (hostile.folder / "model.safetensors.index.json").write_text(json.dumps(values))
    refused(MODEL_LOADERS[2:], hostile.folder, "the index of shards must hold a weight_map")


@pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "adapter_model.bin", "x.bin", 3, ["a"]])
def test_weights_named_in_the_configuration(hostile, place):
    folder = hostile("config.json", lambda v: v.update(transformers_weights=place))
    refused(MODEL_LOADERS, folder, "transformers_weights is .* expected a safetensors file")


def test_an_index_named_in_the_configuration(hostile):
    folder = hostile("config.json", lambda v: v.update(transformers_weights="other.safetensors.index.json"))
    (folder / "other.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"x": "../y.safetensors"}})
    )
    refused(MODEL_LOADERS, folder, "expected a safetensors file beside it")


def test_shards_that_are_links_as_in_the_cache_of_the_hub_load(hostile, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in sorted(hostile.folder.glob("*.safetensors")):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    MultimodalModel.from_pretrained(hostile.folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{}", (10**15).to_bytes(8, "little") + b"{}"]
)
def test_files_that_are_no_safetensors(hostile, content):
    shard = sorted(hostile.folder.glob("*.safetensors"))[0]
    shard.write_bytes(content)
    refused(MODEL_LOADERS, hostile.folder, "is no whole safetensors file")


def test_a_missing_shard_and_a_missing_tensor(hostile):
    first, *_ = sorted(hostile.folder.glob("*.safetensors"))
    first.unlink()
    refused(MODEL_LOADERS, hostile.folder, f"the shard {first.name} is missing")


def test_a_tensor_that_is_not_stored_is_no_random_tensor(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    model = MultimodalModel.from_pretrained(saved)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vision_encoder.projector.projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "composition.json").unlink()
    refused(MODEL_LOADERS, tmp_path, "does not hold 1 tensors .*vision_encoder.projector.projection.weight")


@pytest.mark.parametrize(
    "entry", ["../evil.Evil", "evil/x.Evil", "/tmp/evil.Evil", "other/repo--evil.Evil", "evil", "a.b.c", 5]
)
def test_code_outside_of_the_folder(hostile, entry):
    folder = hostile("config.json", lambda v: v.update(auto_map={"AutoModel": entry}))
    refused(MODEL_LOADERS[2:], folder, "auto_map\\['AutoModel'\\]")


@pytest.mark.parametrize("trust", [None, False])
def test_code_of_a_checkpoint_never_runs_without_trust(hostile, tmp_path, trust):
    evidence = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(evidence)!r})\nclass Evil: pass\n"
    (hostile.folder / "evil.py").write_text(code)
    entries = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer"), "evil.Evil"
    )
    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        hostile(file, lambda v: v.update(auto_map=entries | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}))
    for load in (*CONFIG_LOADERS, AutoProcessor.from_pretrained):
        load(hostile.folder, **({} if trust is None else {"trust_remote_code": trust}))
    assert not evidence.exists()


def test_a_tokenizer_of_unknown_class_with_code_is_refused_without_asking(hostile, tmp_path):
    evidence = tmp_path / "ran"
    (hostile.folder / "evil.py").write_text(f"import os\nos.mkdir({str(evidence)!r})\nclass Evil: pass\n")
    hostile(
        "tokenizer_config.json",
        lambda v: v.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoProcessor.from_pretrained(hostile.folder, trust_remote_code=False)
    assert not evidence.exists()


# ---- the configuration


def text(key, value):
    return lambda v: v["text_config"].update({key: value})


def vision(key, value):
    return lambda v: v["vision_modality"].update({key: value})


CONFIGS = {
    "class": (lambda v: v.update(__class__="x"), "key '__class__', which is no setting"),
    "class inside": (text("__class__", "x"), "key '__class__', which is no setting"),
    "to_dict": (lambda v: v.update(to_dict=1), "keys \\['to_dict'\\], which would replace methods"),
    "from_dict inside": (text("from_dict", 1), "keys \\['from_dict'\\], which would replace methods"),
    "attribute_map": (text("attribute_map", {"vocab_size": "x"}), "attribute_map"),
    "dtype": (lambda v: v.update(dtype="os"), "'os', expected the name of a torch data type"),
    "dtype inside": (text("dtype", "nn.functional"), "expected the name of a torch data type"),
    "part_dtypes": (lambda v: v.update(part_dtypes={"": "float32", "serialization": ["a"]}), "part_dtypes\\['serialization'\\]"),
    "part_dtypes of buffers": (lambda v: v.update(part_dtypes={"buffers": {"load": ["a"]}}), "part_dtypes\\['load'\\]"),
    "part_dtypes as list": (lambda v: v.update(part_dtypes=["a"]), "part_dtypes must be a dict"),
    "nan": (text("rms_norm_eps", float("nan")), "is nan, expected a finite number"),
    "infinity": (text("rms_norm_eps", float("inf")), "is inf, expected a finite number"),
    "huge integer": (text("vocab_size", 10**40), "is an integer of 133 bits"),
    "layers": (text("num_hidden_layers", 200_000), "MAX_LAYERS = 2,000"),
    "labels": (lambda v: v.update(num_labels=10**9), "MAX_LABELS = 100,000"),
    "wrong type inside": (text("hidden_size", "wide"), "text_config does not take its stored values|hidden_size"),
    "text_config as list": (lambda v: v.update(text_config=[1]), "text_config must be a configuration or a dict"),
    "model_type inside": (text("model_type", ["llama"]), "model_type"),
    "encoders as text": (lambda v: v.update(encoders="vision"), "encoders must be a list of names"),
    "encoder called forward": (lambda v: v.update(encoders=["forward"]), "reserved"),
    "encoder with dots": (lambda v: v.update(encoders=["../x"]), "is invalid: it must match"),
    "modality as text": (lambda v: v.update(vision_modality="x"), "vision: modality must be a dict"),
    "unknown in modality": (vision("evil", 1), "unknown keys \\['evil'\\]"),
    "callbacks as list": (vision("callbacks", ["os.system"]), "callbacks must be a dict"),
    "encoder_kwargs": (vision("encoder_kwargs", {"device": "cpu"}), "the argument 'device' must be True or False"),
    "language_model_kwargs": (lambda v: v.update(language_model_kwargs={"x": "y"}), "must be True or False"),
    "kernel": (lambda v: v.update(attn_implementation="someone/repo"), "'someone/repo': kernels from a repository are code"),
    "kernel inside": (text("_attn_implementation", "someone/repo"), "kernels from a repository are code"),
    "kernel inside by another key": (text("attn_implementation", "someone/repo"), "kernels from a repository are code"),
    "kernel internal": (text("_attn_implementation_internal", "a/b"), "kernels from a repository are code"),
    "kernel of a part": (lambda v: v.update(part_implementations={"text_config": {"attn": "a/b"}}), "kernels from a repository"),
    "projector type": (lambda v: v["vision_projector_config"].update(projection_type="os.system"), "Unknown projection type .* expected one of"),
    "activation": (lambda v: v["vision_projector_config"].update(activation="system"), "Unknown activation 'system', expected one of"),
    "newer format": (lambda v: v.update(cornstarch_format=99), "cornstarch_format 99"),
    "share_inputs": (lambda v: v.update(share_inputs=[["vision", "other"]]), "share_inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(hostile, name):
    edit, match = CONFIGS[name]
    folder = hostile("config.json", edit)
    refused([AutoConfig.from_pretrained, MultimodalModel.from_pretrained], folder, match)


@pytest.mark.parametrize("name", ["class", "to_dict", "dtype inside", "kernel", "layers", "nan"])
def test_configurations_of_a_processor(hostile, name):
    edit, match = CONFIGS[name]
    folder = hostile("processor_config.json", lambda v: edit(v["model_config"]))
    refused([AutoProcessor.from_pretrained], folder, match)


BUILDS = {
    "callback": (vision("callbacks", {"preprocess_callback": {"name": "os.system", "arguments": {}}}), "Unknown callback 'os.system'"),
    "callback place": (vision("callbacks", {"evil": {"name": "x"}}), "unknown callback places"),
    "encoder class": (vision("encoder_class", "os.system"), "the model class 'os.system' is not in transformers"),
    "encoder class that is no model": (vision("encoder_class", "transformers.models.clip.modeling_clip.torch"), "is not in transformers"),
    "encoder module": (vision("encoder_class", "transformers.models.clip.modeling_evil.CLIPVisionModel"), "is not in transformers"),
    "language model class": (lambda v: v.update(language_model_class="subprocess.Popen"), "is not in transformers"),
    "projection": (lambda v: v["vision_projector_config"].update(projection_type="torch", projection_kwargs={"module": {"class": "functional"}}), "description of a torch.nn module"),
    "projection on a device": (lambda v: v["vision_projector_config"].update(projection_type="torch", projection_kwargs={"module": {"class": "Linear", "arguments": {"in_features": 1, "out_features": 1, "device": "cpu"}}}), "expected JSON values of its own"),
    "projection of text": (lambda v: v["vision_projector_config"].update(projection_type="torch", projection_kwargs={"module": "import os"}), "description of a torch.nn module"),
    "adapter type": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "EVIL"}}}}), "unknown adapter type 'EVIL'"),
    "adapter as list": (lambda v: v.update(adapters={"language_model": [1]}), "expected adapters as"),
    "adapter options": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "LORA", "evil": 1}}}}), "does not take its options"),
    "adapter module": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "LORA", "megatron_config": {}, "megatron_core": "antigravity"}}}}), "asks for the module 'antigravity'"),
    "adapter pattern": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "LORA", "target_modules": "(\\w+)+!"}}}}), "could take time without end"),
    "adapter ranks": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"(a|a)*": 3}}}}}), "could take time without end"),
    "adapter class": (lambda v: v.update(adapters={"language_model": {"configs": {"a": {"peft_type": "LORA", "auto_mapping": {"base_model_class": "os"}}}}}), "names a class by auto_mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDS)
def test_names_of_what_is_built(hostile, name):
    edit, match = BUILDS[name]
    refused(MODEL_LOADERS[2:], hostile("config.json", edit), match)


def test_keys_that_stand_twice_and_deep_nesting(hostile):
    path = hostile.folder / "config.json"
    honest = path.read_text()
    path.write_text(honest.rstrip().removesuffix("}") + ', "model_type": "cornstarch_multimodal"}')
    refused([MultimodalModel.from_pretrained], hostile.folder, "the key 'model_type' twice in one object")
    path.write_text(honest.rstrip().removesuffix("}") + ', "x": ' + "[" * 300 + "]" * 300 + "}")
    refused(CONFIG_LOADERS, hostile.folder, "nested to a depth of 33, more than cornstarch_hf.limits.MAX_CONFIG_DEPTH")
    path.write_text(honest.rstrip().removesuffix("}") + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refused([MultimodalModel.from_pretrained], hostile.folder, "is nested too deeply to be read")
    path.write_text("[1, 2]")
    refused([MultimodalModel.from_pretrained], hostile.folder, "must hold one JSON object, got list")
    path.write_text("{")
    refused([MultimodalModel.from_pretrained], hostile.folder, "is no JSON file")


def test_a_kernel_that_the_caller_asks_for_is_not_refused_by_the_checks():
    config = MultimodalConfig.from_dict({"encoders": []}, attn_implementation="someone/repo")
    assert config._attn_implementation_internal == "someone/repo"


def test_subfolder_that_leaves_the_folder(saved):
    with pytest.raises(ValueError, match="leaves"):
        MultimodalModel.from_pretrained(saved / "projector", subfolder="../")


def test_projectors_alone(saved, tmp_path):
    folder = tmp_path / "projector"
    shutil.copytree(saved / "projector", folder)
    path = folder / "config.json"
    honest = json.loads(path.read_text())
    MultimodalProjector.from_pretrained(folder)
    for change, match in [
        ({"__class__": 1}, "which is no setting"), ({"to_dict": 1}, "replace methods"), ({"dtype": "os"}, "torch data type"),
        ({"projection_type": "os.system"}, "Unknown projection type"), ({"attn_implementation": "a/b"}, "kernels"),
    ]:  # fmt: skip
        path.write_text(json.dumps(honest | change))
        refused(
            [
                AutoConfig.from_pretrained,
                MultimodalProjectorConfig.from_pretrained,
                AutoModel.from_pretrained,
                MultimodalProjector.from_pretrained,
            ],
            folder,
            match,
        )


def test_settings_of_processors(hostile):
    path = hostile.folder / "processor_config.json"
    honest = json.loads(path.read_text())
    for change, match in [
        ({"size": {"shortest_edge": 1_000_000}}, "MAX_IMAGE_PIXELS"),
        ({"crop_size": {"height": 100_000, "width": 100_000}}, "MAX_IMAGE_PIXELS"),
        ({"image_processor_type": "AutoConfig"}, "is no image processor|AutoConfig"),
        ({"image_processor_type": "os.system"}, "os.system"),
        ({"image_mean": float("nan")}, "expected a finite number"),
    ]:
        values = copy.deepcopy(honest)
        values["image_processor"].update(change)
        path.write_text(json.dumps(values))
        refused([AutoProcessor.from_pretrained], hostile.folder, match)


def test_a_token_is_in_no_message_and_no_log(hostile, caplog):
    caplog.set_level("DEBUG")
    for file, edit in [
        ("config.json", lambda v: v.update(dtype="os")),
        ("model.safetensors.index.json", lambda v: v["weight_map"].update(x="../y")),
    ]:
        with pytest.raises(ValueError) as caught:
            MultimodalModel.from_pretrained(hostile(file, edit), token="hf_secret")
        assert "hf_secret" not in str(caught.value)
    with pytest.raises(OSError) as missing:
        MultimodalModel.from_pretrained("nobody/nothing", token="hf_secret")
    assert "hf_secret" not in str(missing.value) and "hf_secret" not in caplog.text


# ---- bombs, in a process with limits


def test_configurations_that_ask_for_too_much(saved, tmp_path):
    edits = {
        "vocabulary": {"vocab_size": 2_000_000_000},
        "width": {"hidden_size": 2**40, "head_dim": 8},
        "layers below the cap": {"num_hidden_layers": 1_999},
        "layers": {"num_hidden_layers": 200_000},
        "positions": {"model_type": "gpt2", "n_positions": 10**9},
        "square mask": {"model_type": "gpt_neo", "max_position_embeddings": 10**6, "num_layers": 2, "attention_types": [[["global"], 2]]},
    }  # fmt: skip
    for name, edit in edits.items():
        shutil.copytree(saved, tmp_path / name)
        values = json.loads((saved / "config.json").read_text())
        values["text_config"] = {**({} if "model_type" in edit else values["text_config"]), **edit}
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    found = refusals(f"""
import functools
from cornstarch_hf import MultimodalModel
attempts = {{name: functools.partial(MultimodalModel.from_pretrained, {str(tmp_path)!r} + "/" + name) for name in {list(edits)!r}}}
""")
    kinds = {name: kind for name, (kind, _) in found.items()}
    assert kinds == dict.fromkeys(edits, "ValueError"), found
    assert "model.embed_tokens.weight: (2000000000, 32) here" in found["vocabulary"][1]
    assert "MAX_LAYERS" in found["layers"][1] and "do not belong together" in found["layers below the cap"][1]


# Who reads each of the JSON files of a checkpoint.
READERS = {
    "config.json": ["AutoModel", "MultimodalModel", "MultimodalConfig"], "generation_config.json": ["MultimodalModel"],
    "composition.json": ["AutoModel", "MultimodalModel"], "model.safetensors.index.json": ["MultimodalModel"],
    "adapter_config.json": ["MultimodalModel"], "projector/config.json": ["MultimodalProjector", "MultimodalProjectorConfig"],
    "processor_config.json": ["MultimodalProcessor"], "tokenizer_config.json": ["AutoProcessor", "MultimodalProcessor"],
    "chat_template.jinja": ["MultimodalProcessor"], "special_tokens_map.json": ["MultimodalProcessor"],
    "vision_tokenizer/tokenizer_config.json": ["MultimodalProcessor"],
}  # fmt: skip


@pytest.mark.parametrize("file", READERS)
def test_every_file_is_measured_before_it_is_parsed(saved, tmp_path, file, monkeypatch):
    shutil.copytree(saved, tmp_path / "x")
    path = tmp_path / "x" / file
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else "{}"
    path.write_text(text + " " * (200_001 - len(text.encode())))
    if file != "composition.json":
        (tmp_path / "x" / "composition.json").unlink()
    monkeypatch.setattr(limits, "MAX_CONFIG_BYTES", 200_000)
    folder = path.parent if "projector" in file else tmp_path / "x"
    find = {"AutoModel": AutoModel, "AutoProcessor": AutoProcessor}
    for reader in READERS[file]:
        with pytest.raises(
            ValueError, match=f"{path.name}: its size in bytes is 200,001, more than .*MAX_CONFIG_BYTES = 200,000"
        ):
            (find.get(reader) or getattr(cornstarch_hf, reader)).from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "values"])
def test_files_that_are_larger_than_their_text(saved, tmp_path, kind):
    """Of either kind: beyond the bytes, and within them with values that would take forty times as much."""
    calls = []
    for file, readers in READERS.items():
        if file.endswith(".jinja") and kind == "values":
            continue  # no values in it
        folder = tmp_path / f"{file.replace('/', '_')}-{kind}"
        shutil.copytree(saved, folder, copy_function=os.link)
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        text = path.read_text().rstrip() if path.exists() else "{"
        text = text.removesuffix("}") + ("," if path.exists() else "") + '"x": ['
        path.unlink(missing_ok=True)
        with path.open("w") as out:
            out.write(text)
            if kind == "values":
                out.write("{}," * 1_100_000 + "1]}")
        if kind == "bytes":
            os.truncate(path, 100_000_001)  # a hole, which takes no place on the disk
        if file != "composition.json":
            (folder / "composition.json").unlink()
        calls += [
            (f"{path.relative_to(tmp_path)} {reader}", reader, str(path.parent if "projector" in file else folder))
            for reader in readers
        ]
    found = refusals(f"""
import cornstarch_hf, transformers, functools
def load(reader, folder):
    return (getattr(cornstarch_hf, reader, None) or getattr(transformers, reader)).from_pretrained(folder)
attempts = {{name: functools.partial(load, reader, folder) for name, reader, folder in {calls!r}}}
""")
    assert len(found) == len(calls) > 12
    for name, (kind, message) in found.items():
        expected = "MAX_CONFIG_BYTES = 100,000,000" if "-bytes" in name else "MAX_CONFIG_VALUES = 1,000,000"
        if name.startswith("config.json-bytes/config.json Auto"):
            continue  # AutoConfig reads that by itself, before any class of this package is asked
        assert kind == "ValueError" and expected in message, (name, kind, message)


@pytest.mark.slow
def test_processors_that_ask_for_too_much(saved, tmp_path):
    edits = {
        "layers": {"num_hidden_layers": 200_000},
        "position table": {"image_size": 2_000_000, "patch_size": 1},
        "position ids": {"image_size": 14_000, "patch_size": 1},
    }
    for name, edit in edits.items():
        shutil.copytree(saved, tmp_path / name)
        values = json.loads((saved / "processor_config.json").read_text())
        values["model_config"]["vision_config"].update(edit)
        values["model_config"]["vision_modality"]["layer"] = -2  # no rule: the encoder is built to count
        (tmp_path / name / "processor_config.json").write_text(json.dumps(values))
    found = refusals(f"""
import cornstarch_hf, tiny
from transformers import AutoProcessor
def attempt(name):
    processor = AutoProcessor.from_pretrained({str(tmp_path)!r} + "/" + name)
    processor(text="<image>", images=tiny.image())
import functools
attempts = {{name: functools.partial(attempt, name) for name in {list(edits)!r}}}
""")
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(edits, "ValueError"), found
    assert "cannot be built to count features" in found["position table"][1]
    assert "MAX_BUILD_BYTES" in found["position ids"][1]
