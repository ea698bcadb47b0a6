"""Which files a save owns."""

import pytest

from cornstarch_hf.checkpoints.manifest import read_composition, staged_save, weights_pattern


@pytest.mark.parametrize(
    ("variant", "name", "is_one"),
    [
        (None, "model.safetensors", True),
        (None, "model-00001-of-00002.safetensors", True),
        (None, "model.safetensors.index.json", True),
        (None, "model.fp16.safetensors", False),
        (None, "adapter_model.safetensors", False),
        (None, "my_model.safetensors", False),
        ("fp16", "model.fp16.safetensors", True),
        ("fp16", "model.fp16-00001-of-00002.safetensors", True),
        ("fp16", "model.safetensors.index.fp16.json", True),
        ("fp16", "model.safetensors", False),
        ("a.b", "model.aXb.safetensors", False),
    ],
)
def test_names_of_weight_files(variant, name, is_one):
    assert bool(weights_pattern(variant).fullmatch(name)) is is_one


def write(folder, names, variant=None, surplus=()):
    with staged_save(folder, variant) as staged:
        staged.components["language_model"] = {"source": "embedded"}
        staged.surplus |= set(surplus)
        for name in ("config.json", *names):
            with open(f"{staged.folder}/{name}", "w") as file:
                file.write("{}")


def test_what_an_earlier_save_wrote_goes_and_nothing_else(tmp_path):
    write(tmp_path, ["model.safetensors", "modeling_own.py", "generation_config.json"])
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.py").write_text("mine")
    write(tmp_path, ["model-00001-of-00001.safetensors", "model.safetensors.index.json"], surplus=["modeling_own.py"])
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model-00001-of-00001.safetensors", "composition.json",
                                                     "model.safetensors.index.json", "README.md", "other.py"}  # fmt: skip
    write(tmp_path, ["model.fp16.safetensors"], "fp16")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "composition.json").write_text("not ours")
    write(tmp_path, ["composition.safetensors"])
    assert {p.name for p in tmp_path.iterdir() if "safetensors" in p.name} == {
        "composition.safetensors",
        "model.fp16.safetensors",
    }


def test_a_variant_keeps_what_is_known_of_the_others(tmp_path):
    write(tmp_path, ["model.safetensors"])
    write(tmp_path, ["model.a.safetensors"], "a")
    write(tmp_path, ["model.b-00001-of-00001.safetensors", "model.safetensors.index.b.json"], "b")
    write(tmp_path, ["model.b.safetensors"], "b")
    assert set(read_composition(tmp_path / "composition.json").manifest) == {
        "config.json", "model.safetensors", "model.a.safetensors", "model.b.safetensors"}  # fmt: skip


def test_not_below_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds adapters \(adapter_config.json\).*another folder, or remove"):
        write(tmp_path, ["model.safetensors"])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]
