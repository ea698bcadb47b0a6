"""Which files of a repository a push replaces; the pushes themselves are in test_hub."""

import pytest
from helpers import compose_tiny

from cornstarch_hf.hub.push import push_to_hub, stale_files

REPOSITORY = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "composition.safetensors",
              "composition.json", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.fp16.safetensors", "README.md",
              "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "notes/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize(
    ("with_model", "variant", "stale"),
    [
        (True, None, [*REPOSITORY[:7], "adapter_config.json", "adapter_model.safetensors"]),
        (True, "fp16", ["model.fp16.safetensors"]),
        (False, None, []),
    ],
)
def test_stale_files(with_model, variant, stale):
    assert [name for name in REPOSITORY if stale_files(with_model, variant)(name)] == stale


def test_an_unknown_argument_is_refused_before_anything_is_saved(tmp_path):
    model, processor = compose_tiny(["clip"])
    with pytest.raises(TypeError, match=r"unknown arguments \['colour'\], expected some of \['bases', 'embed'"):
        push_to_hub(model, processor, "user/x", colour="red")
