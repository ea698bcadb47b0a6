"""The files of a checkpoint: found, named, and their shapes read from the headers alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cornstarch_hf import MultimodalModel
from cornstarch_hf.checkpoints.files import check_files, header_shapes, stored_shapes
from cornstarch_hf.checkpoints.finding import CheckpointFiles
from cornstarch_hf.checkpoints.loading import plan_load
from cornstarch_hf.checkpoints.storage import check_loaded


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(5)}, tmp_path / "model-2.safetensors")
    index = {
        "metadata": {},
        "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_shapes_of_one_file_of_shards_and_of_a_variant(folder):
    assert header_shapes(str(folder / "model-1.safetensors")) == {"a": (2, 3), "b": ()}
    files = CheckpointFiles(folder)
    check_files(files)
    assert stored_shapes(files) == {"a": (2, 3), "b": (), "c": (5,)}
    assert stored_shapes(files, variant="fp16") is None
    assert stored_shapes(files, explicit="model-2.safetensors") == {"c": (5,)}
    save_file({"d": torch.zeros(1)}, folder / "model.safetensors")
    assert stored_shapes(files) == {"d": (1,)}, "transformers prefers the whole file"
    save_file({"e": torch.zeros(1)}, folder / "model.fp16.safetensors")
    assert stored_shapes(files, variant="fp16") == {"e": (1,)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype": "F64"}, r"'a' of shape \(2, 3\) and F64 lies in the bytes 0 to 24, expected 0 to 48"),
        ({"dtype": "X"}, "KeyError: 'X'"),
        ({"dtype": None}, "KeyError: None"),
        ({"shape": [3, 3]}, r"'a' of shape \(3, 3\) and F32 lies in the bytes 0 to 24, expected 0 to 36"),
        ({"shape": [-2, -3]}, r"'a' of shape \(-2, -3\)"),
        ({"shape": [1.5]}, "TypeError: 'float'"),
        ({"shape": None}, "TypeError"),
        ({"data_offsets": [0, 28]}, "lies in the bytes 0 to 28"),
        ({"data_offsets": [24, 0]}, "lies in the bytes"),
        ({"data_offsets": []}, "ValueError: not enough values"),
        ({"data_offsets": ["0", "24"]}, "TypeError: 'str'"),
    ],
    ids=str,
)
def test_a_header_that_describes_other_data(folder, change, match):
    path = folder / "model-1.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=f"model-1.safetensors is no whole safetensors file.*{match}"):
        header_shapes(str(path))


@pytest.mark.parametrize("metadata", [3, None, {"format": 3}], ids=str)
def test_metadata_of_a_header_are_texts(folder, metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    (folder / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="x.safetensors is no whole safetensors file"):
        header_shapes(str(folder / "x.safetensors"))


def test_every_data_type_of_safetensors_is_known(tmp_path):
    names = ("bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
    names += ("float8_e4m3fn", "float8_e5m2", "complex64", "uint32", "uint64")
    save_file({name: torch.zeros(3, 2).to(getattr(torch, name)) for name in names}, tmp_path / "x.safetensors")
    assert header_shapes(str(tmp_path / "x.safetensors")) == dict.fromkeys(names, (3, 2))


def test_a_variant_is_a_word(folder):
    with pytest.raises(ValueError, match="variant must be a plain word"):
        check_files(CheckpointFiles(folder), variant="../x")


def test_the_base_that_adapters_name_is_checked_too(folder, tmp_path_factory):
    adapters = tmp_path_factory.mktemp("adapters")
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert plan_load(MultimodalModel, adapters, {}, None, False).source == str(adapters)
    (folder / "config.json").write_text('{"transformers_weights": "../x.safetensors"}')
    with pytest.raises(ValueError, match="transformers_weights"):
        plan_load(MultimodalModel, adapters, {}, None, False)


def test_missing_tensors_are_named():
    check_loaded({"missing_keys": set()}, "x")
    with pytest.raises(ValueError, match=r"x does not hold 2 tensors .*\['a', 'b'\]"):
        check_loaded({"missing_keys": {"b", "a"}}, "x")
