"""Runs on shapes: the same shapes as a real run, without any arithmetic on features."""

import pytest
import tiny
import torch
from torch import nn

from cornstarch_hf.parts.weightless import RealConstants, ShapesOnly, dry_run, to_shapes, weights_to_meta

INPUTS = {
    "clip": {"pixel_values": torch.randn(2, 3, 8, 8)},
    "siglip": {"pixel_values": torch.randn(2, 3, 12, 8), "interpolate_pos_encoding": True},
    "dinov2": {"pixel_values": torch.randn(1, 3, 12, 16)},
    "convnext": {"pixel_values": torch.randn(2, 3, 64, 96)},
    "qwen2_vl": {"hidden_states": torch.randn(24, 96), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])},
    "whisper": {"input_features": torch.randn(2, 8, 12)},
    "wav2vec2": {"input_values": torch.randn(2, 400), "attention_mask": torch.ones(2, 400).long()},
    "esm": {"input_ids": torch.randint(4, 24, (2, 9)), "attention_mask": torch.ones(2, 9).long()},
}


def shapes(output):
    return {key: tuple(value.shape) for key, value in output.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_every_encoder_gives_the_shapes_of_a_real_run(key):
    build = tiny.ENCODERS[key][1]
    with torch.no_grad():
        expected = build()(**INPUTS[key])
    found = dry_run(weights_to_meta(build()), INPUTS[key])
    assert shapes(found) == shapes(expected) and found.last_hidden_state.is_meta


class Cut(nn.Module):
    """Takes as many rows as its mask has ones, positions from `arange` and constants from `tensor`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("table", torch.arange(10), persistent=False)

    def forward(self, features, mask):
        device = features.device
        start = torch.tensor([1], device=device)
        count = int(torch.arange(len(mask), device=device).sum() + start.sum() + self.table[2])
        return (features + self.weight)[mask], count


def test_integers_stay_real_so_code_may_branch_on_them():
    made, mask = weights_to_meta(Cut()), torch.tensor([True, False, True])
    cut, count = dry_run(made, {"features": torch.randn(3, 4), "mask": mask})
    assert cut.shape == (2, 4) and cut.is_meta and count == 6


def test_only_weights_and_floats_go_to_meta():
    made = weights_to_meta(Cut())
    assert made.weight.is_meta and made.kept.is_meta and not made.table.is_meta
    found = to_shapes({"x": [torch.randn(2)], "ids": torch.ones(2).long(), "n": 3, "mask": torch.tensor([True])})
    assert found["x"][0].is_meta and not found["ids"].is_meta and not found["mask"].is_meta and found["n"] == 3


def test_the_modes_end_with_the_run():
    dry_run(nn.Identity(), {"input": torch.randn(2)})
    assert torch.arange(3, device="meta").is_meta and torch.tensor(3, device="meta").is_meta
    with RealConstants(), ShapesOnly():
        assert not torch.tensor(3, device="meta").is_meta and not torch.arange(3, device="meta").is_meta


def test_arrays_of_the_device_are_made_before_the_modes_begin():
    found = dry_run(nn.Identity(), {"input": {"x": torch.randn(2), "n": torch.tensor(3)}})
    assert found["x"].is_meta and not found["n"].is_meta


def test_reading_a_features_value_raises():
    class Reads(nn.Linear):
        def forward(self, x):
            return x[: int(super().forward(x).sum())]

    with pytest.raises(RuntimeError, match="meta"):
        dry_run(weights_to_meta(Reads(3, 3)), {"x": torch.ones(2, 3)})
