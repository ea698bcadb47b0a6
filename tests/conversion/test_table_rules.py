"""Native types with rules: equal there and back, their configurations too, with images and videos in one row."""

import copy
import json

import native_models
import pytest
import torch
from native_models import IMAGE, PACKED, PICTURES, VIDEO
from own_memory import own_memory
from transformers import AutoModel

from cornstarch_hf import from_native, to_native
from cornstarch_hf.conversion.table_rules import RULED

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
WITH_VIDEOS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"]
MRULES = {"rule": "mrope", "axes": 3}


def inputs_of(native, videos=False):
    model_type = native.config.model_type
    if model_type in PICTURES:
        return native_models.picture_inputs(native)
    apart = RULED[model_type].positions.get("frames_apart", False)
    inputs = native_models.video_inputs(native, apart) if videos else native_models.image_inputs(native)
    return inputs | ({"second_per_grid_ts": torch.tensor([0.5, 1.5])} if videos and model_type == "qwen2_5_vl" else {})


def saved(model, folder):
    """The configuration and the generation's that a model writes."""
    model.save_pretrained(folder)
    paths = [folder / name for name in ("config.json", "generation_config.json")]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def same_tensors(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize(
    "model_type, videos", [(t, False) for t in PACKED + PICTURES] + [(t, True) for t in WITH_VIDEOS]
)
def test_a_native_model_and_its_composition_are_equal_there_and_back(model_type, videos, tmp_path):
    native = native_models.native(model_type)
    inputs, before = inputs_of(native, videos), copy.deepcopy(native.state_dict())
    model, _ = from_native(native)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, found = native(**inputs).logits, model(**inputs).logits
    assert torch.equal(found[real], expected[real])
    assert torch.equal(model.generate(**inputs, **GREEDY), native.generate(**inputs, **GREEDY))
    assert all(torch.equal(value, before[name]) for name, value in native.state_dict().items())
    back = to_native(model)
    assert same_tensors(back, native) and saved(back, tmp_path / "back") == saved(native, tmp_path / "native")
    if videos:
        model.save_pretrained(tmp_path / "model")
        size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
        assert size < 1.02 * sum(p.numel() * 4 for p in native.parameters()) + 100_000  # the tower is there once
        again = own_memory(AutoModel.from_pretrained(tmp_path / "model").eval())
        with torch.no_grad():
            assert torch.equal(
                again(**own_memory(inputs)).logits[real], own_memory(model)(**own_memory(inputs)).logits[real]
            )


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "paligemma", "ovis2", "molmo2"])
def test_gradients_are_those_of_the_native_model(model_type):
    native = native_models.native(model_type).train()
    inputs = inputs_of(native)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    model, _ = from_native(native)
    native.train()(**inputs, labels=labels).loss.backward()
    model.train()(**inputs, labels=labels).loss.backward()
    grads = [p.grad for p in native.parameters() if p.grad is not None]
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(ours)
    sums = [sorted(float(g.double().abs().sum()) for g in each) for each in (grads, ours)]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("model_type", PACKED + PICTURES)
def test_logits_are_equal_in_bfloat16(model_type):
    native = native_models.native(model_type).to(torch.bfloat16)
    inputs = inputs_of(native)
    real = inputs["attention_mask"].bool()
    model, _ = from_native(native)
    with torch.no_grad():
        expected, found = native(**inputs).logits, model(**inputs).logits
    assert found.dtype == torch.bfloat16 and torch.equal(found[real], expected[real])


def test_rules_are_written_into_the_configuration():
    model, _ = from_native(native_models.native("qwen2_5_vl"))
    assert model.config.positions == MRULES | {"time_step": {"video": 4}} and model.config.mask is None
    assert model.config.video_modality["additional_args"] == ["second_per_grid_ts"]
    model, _ = from_native(native_models.native("gemma4"))
    assert model.config.mask == {"rule": "item_blocks", "windowed": True, "layers": ["sliding_attention"]}
    model, _ = from_native(native_models.native("ovis2"))
    assert model.config.vision_modality["marks"] == {243 + i: 43 + i for i in range(5)}


def test_a_setting_that_cannot_be_converted_is_named():
    native = native_models.native("gemma4", text={"use_bidirectional_attention": None})
    with pytest.raises(ValueError, match="use_bidirectional_attention=None cannot be converted"):
        from_native(native)
