"""Modules as names and JSON arguments, and built again from them."""

import json

import pytest
import torch
from torch import nn

from cornstarch_hf.parts.stored_modules import (
    NotStorable,
    as_json,
    build_by_name,
    build_torch,
    constructor_arguments,
    same_structure,
    torch_spec,
)


class Scale(nn.Module):
    def __init__(self, size, factor=2.0, *, names=("a",), device=None):
        super().__init__()
        self.size, self.factor, self.names = size, factor, names


class Forgetful(nn.Module):
    def __init__(self, size):
        super().__init__()


class Named(nn.Sequential):
    pass


TORCH = {
    "linear": lambda: nn.Linear(3, 4),
    "no_bias": lambda: nn.Linear(3, 4, bias=False),
    "norm": lambda: nn.LayerNorm((2, 3), eps=1e-3, elementwise_affine=False),
    "conv": lambda: nn.Conv1d(3, 6, 3, stride=2, groups=3, bias=False),
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "nested": lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.SiLU(), nn.Dropout(0.25)), nn.LayerNorm(4)),
    "empty": lambda: nn.Sequential(),
    "list": lambda: nn.ModuleList([nn.Linear(1, 2), nn.Identity()]),
}


@pytest.mark.parametrize("key", TORCH)
def test_torchs_own_modules_come_back(key):
    module = TORCH[key]()
    again = build_torch(json.loads(json.dumps(torch_spec(module))))
    assert same_structure(again, module) and torch_spec(again) == torch_spec(module)
    assert repr(again) == repr(module)
    again.load_state_dict(module.state_dict())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Scale(1), "Scale is not registered"),
        (Named(nn.Linear(1, 1)), "Named is not registered"),
        (nn.Sequential(nn.Linear(1, 1), Scale(1)), "Scale is not registered"),
        (nn.TransformerEncoderLayer(4, 1, 4), "torch.nn.TransformerEncoderLayer holds other modules"),
    ],
)
def test_what_has_no_description(module, message):
    with pytest.raises(NotStorable, match=message):
        torch_spec(module)


def test_named_children_are_refused():
    made = nn.Sequential(nn.Linear(1, 1))
    made.add_module("head", nn.Linear(1, 1))
    with pytest.raises(NotStorable, match="Sequential has named children"):
        torch_spec(made)


def test_arguments_are_read_from_attributes():
    assert constructor_arguments(Scale(3)) == {"size": 3}
    assert constructor_arguments(Scale(3, 0.5, names=("b", "c"))) == {"size": 3, "factor": 0.5, "names": ["b", "c"]}
    with pytest.raises(NotStorable, match=r"Forgetful takes 'size' .*set self\.size"):
        constructor_arguments(Forgetful(3))
    with pytest.raises(NotStorable, match=r"Scale\.factor = .* is not a JSON value"):
        constructor_arguments(Scale(3, torch.float16))
    assert as_json({"a": (1, None)}, "x") == {"a": [1, None]}


@pytest.mark.parametrize(
    "spec",
    [
        {"class": "Module_"},
        {"class": "init"},
        {"class": "functional.relu"},
        {"class": "Parameter"},
        {"class": "Linear", "arguments": {}, "code": "x"},
        {"class": ["Linear"]},
        {},
        "Linear",
        None,
    ],
)
def test_only_modules_of_torch_are_built(spec):
    with pytest.raises(ValueError, match="description of a torch.nn module"):
        build_torch(spec)


def test_constructors_get_what_they_name():
    found = build_by_name(Scale, {"size": 3, "factor": None, "other": 1})
    assert (found.size, found.factor) == (3, 2.0)
    with pytest.raises(
        ValueError, match=r"Scale takes 'size', expected it among \['factor', 'size'\].*projection_kwargs"
    ):
        build_by_name(Scale, {"size": None, "factor": 1.0})
    anything = build_by_name(lambda size, **rest: (size, rest), {"size": 1, "projection_kwargs": {"a": 2, "size": 9}})
    assert anything == (1, {"a": 2})


def test_structure_is_classes_settings_and_shapes():
    assert same_structure(nn.Linear(2, 3), nn.Linear(2, 3))
    for other in (nn.Linear(2, 4), nn.Linear(2, 3, bias=False), nn.Sequential(nn.Linear(2, 3))):
        assert not same_structure(nn.Linear(2, 3), other)
    assert not same_structure(nn.Dropout(0.1), nn.Dropout(0.2))
