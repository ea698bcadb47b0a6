"""composition.json: written, read, compared; and what it must not say."""

import hashlib
import json

import pytest

from cornstarch_hf.checkpoints.manifest import (
    COMPOSITION,
    Entry,
    check_hashes,
    check_sizes,
    describe_files,
    read_composition,
    write_composition,
)

GOOD = {"format": "cornstarch-composition", "format_version": 1, "components": {"language_model": {"source": "embedded"}},
        "manifest": {"config.json": {"sha256": "0" * 64, "size": 2}}}  # fmt: skip


def test_written_and_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "words.txt").write_bytes(b"")
    components = {"vision_encoder": {"source": "reference", "repo_id": "u/x"}, "language_model": {"source": "embedded"}}
    written = write_composition(tmp_path, components)
    again = write_composition(tmp_path, components)  # it does not list itself
    assert written == again == read_composition(tmp_path / COMPOSITION)
    assert written.manifest == {
        "model.safetensors": Entry(hashlib.sha256(b"abc").hexdigest(), 3),
        "sub/words.txt": Entry(hashlib.sha256(b"").hexdigest(), 0),
    }
    assert list(written.references) == ["vision_encoder"] and list(written.weights()) == ["model.safetensors"]


def test_weight_files_by_their_names():
    names = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "composition.safetensors",
             "model.fp16.safetensors", "model.safetensors.index.fp16.json", "config.json", "tokenizer.json", "x.py"]  # fmt: skip
    from cornstarch_hf.checkpoints.manifest import Composition

    found = Composition({}, dict.fromkeys(names, Entry("0" * 64, 1))).weights()
    assert list(found) == names[:6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must say format 'cornstarch-composition'"),
        ({"format_version": 2}, "format_version 2, this version of cornstarch_hf reads up to 1: upgrade"),
        ({"format_version": 0}, "format_version 0"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"components": []}, "must have the objects"),
        ({"components": {"../x": {"source": "embedded"}}}, "describes among its components '../x'"),
        ({"components": {"language_model": {"source": "url"}}}, "language_model has the source 'url'"),
        ({"manifest": {"../config.json": {"sha256": "0" * 64, "size": 2}}}, "lists the file '../config.json'"),
        ({"manifest": {"/etc/passwd": {"sha256": "0" * 64, "size": 2}}}, "lists the file '/etc/passwd'"),
        ({"manifest": {"a": {"sha256": "0" * 63, "size": 2}}}, "lists the file 'a'"),
        ({"manifest": {"a": {"sha256": "0" * 64, "size": -2}}}, "lists the file 'a'"),
        ({"manifest": {"a": {"sha256": "0" * 64, "size": True}}}, "lists the file 'a'"),
        ({"manifest": {"a": 7}}, "lists the file 'a'"),
    ],
)
def test_what_it_must_not_say(tmp_path, change, message):
    (tmp_path / COMPOSITION).write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message):
        read_composition(tmp_path / COMPOSITION)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_what_is_no_such_file(tmp_path, text):
    (tmp_path / COMPOSITION).write_text(text)
    with pytest.raises(ValueError, match="composition.json"):
        read_composition(tmp_path / COMPOSITION)


def test_sizes_and_hashes(tmp_path):
    for name, data in {"a": b"12345", "b": b"1"}.items():
        (tmp_path / name).write_bytes(data)
    paths = {name: str(tmp_path / name) for name in ("a", "b")}
    entries = describe_files(paths)
    check_hashes(entries, paths.get, "x")
    (tmp_path / "a").write_bytes(b"12346")
    check_sizes(entries, paths.get, "x")
    with pytest.raises(
        ValueError, match=f"folder x: a has the SHA-256 {hashlib.sha256(b'12346').hexdigest()}, expected"
    ):
        check_hashes(entries, paths.get, "folder x")
    (tmp_path / "a").write_bytes(b"123456")
    with pytest.raises(ValueError, match="folder x: a has 6 bytes, expected 5"):
        check_sizes(entries, paths.get, "folder x")
    with pytest.raises(FileNotFoundError, match=r"the file b \(1 bytes\) is missing"):
        check_sizes({"b": entries["b"]}, {}.get, "x")
