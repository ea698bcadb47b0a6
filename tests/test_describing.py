"""The table of parts: sizes, what trains, adapters, tokens."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model

from cornstarch_hf.composition import describe_model, summary


@pytest.fixture
def model():
    return compose_tiny(["clip", "whisper"], projector="mlp")[0]


def rows(model):
    lines = describe_model(model).splitlines()
    table = [re.split(r"  +", line) for line in lines if not line.startswith("-")]
    return {row[0]: row[1:] for row in table if len(row) > 1}, lines


def size(module, trains=False):
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trains):,}"


def test_every_part_has_a_line_with_its_sizes(model):
    found, lines = rows(model)
    assert list(found) == ["part", *model._parts(), "total"] and set(lines[1]) == {"-"}
    for name, part in [*model._parts().items(), ("total", model)]:
        assert found[name][1:] == [size(part), size(part, trains=True), "float32"], name
    assert found["language_model"][0] == "LlamaForCausalLM" and found["vision_encoder.module"][0] == "CLIPVisionModel"
    assert found["vision_encoder.projector"][0] == "MultimodalProjector (mlp, 16 -> 32)"
    whole = sum(int(found[name][1].replace(",", "")) for name in model._parts())
    assert found["total"][1] == f"{whole:,}"


def test_frozen_parts_train_nothing_and_dtypes_are_listed(model):
    model.freeze("vision_encoder.module")
    model.vision_encoder.projector.bfloat16()
    found, _ = rows(model)
    assert found["vision_encoder.module"][2] == "0" and found["vision_encoder.projector"][3] == "bfloat16"
    assert found["total"][2] == size(model, trains=True) and found["total"][3] == "bfloat16/float32"


def test_adapters_are_named_beside_the_class_that_they_wrap():
    lora = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    found, _ = rows(compose_tiny(["clip"], lora)[0])
    assert found["language_model"] == ["LlamaForCausalLM + default", size(lora), size(lora, trains=True), "float32"]


def test_every_modality_has_a_line_with_its_token_and_selection():
    model, processor = compose_tiny(["clip", "whisper"], vision={"output": "pooler_output"}, audio={"layer": -2})
    vision, audio = rows(model)[1][-2:]
    assert vision.startswith(
        f"vision: image, token <image> (id {processor.image_token_id}), layer -1, output pooler_output"
    )
    assert audio.startswith(f"audio: audio, token <audio> (id {processor.audio_token_id}), layer -2, drop_prefix 0")
    assert audio.endswith(f"inputs {list(model.config.modality('audio')['input_names'])}")


@pytest.mark.parametrize(
    ("key", "options"), [("clip", {}), ("clip", {"drop_prefix": 1}), ("siglip", {"layer": 0}), ("whisper", {})]
)
def test_features_per_item_are_the_encoders(key, options):
    name = tiny.ENCODERS[key][0]
    model, processor = compose_tiny([key], **{name: options})
    inputs = {"sampling_rate": 16_000} if name == "audio" else {}
    ids = processor(text=processor.tokens[name], **{name: processor.items[name]()}, **inputs)["input_ids"][0]
    assert f"features per item {ids.count(model.config.modality(name)['token_id'])}," in rows(model)[1][-1]


def test_features_per_item_are_what_the_projector_leaves():
    model, _ = compose_tiny(["siglip"], projector="pixel_shuffle")
    found, lines = rows(model)
    assert "features per item 1," in lines[-1]
    assert found["vision_encoder.projector"][0] == "MultimodalProjector (pixel_shuffle, 16 -> 32)"


def test_features_that_differ_from_item_to_item():
    model, _ = compose_tiny(["esm", "wav2vec2"])
    assert all("features per item depends on the item," in line for line in rows(model)[1][-2:])


def test_weights_are_counted_where_they_are_packed_or_elsewhere():
    layer = torch.nn.Linear(4, 6)
    assert summary("x", layer).total == 30
    layer.weight.quant_state, layer.bias.ds_numel = SimpleNamespace(shape=torch.Size([40, 60])), 60
    assert summary("x", layer)[4:6] == (2460, 2460)


def test_describe_prints_what_it_returns(model, capsys):
    assert model.describe() == describe_model(model) == capsys.readouterr().out.rstrip("\n")
