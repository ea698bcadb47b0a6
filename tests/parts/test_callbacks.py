"""Callbacks: descriptions that a checkpoint can hold, and callbacks built from them."""

import functools
import json

import pytest
import torch
from torch import nn

from cornstarch_hf import register_callback
from cornstarch_hf.parts.registries import CALLBACKS
from cornstarch_hf.parts.stored_modules import (
    SLOTS,
    NotStorable,
    build_callback,
    check_callbacks_storable,
    declared_count,
    describe_callback,
)


def keep(inputs, output, count=1, *, side="left"):
    return inputs, output, count, side


def unregistered(inputs, output):
    return output


class Gain(nn.Module):
    def __init__(self, size, start=1.0):
        super().__init__()
        self.size, self.start = size, start
        self.weight = nn.Parameter(torch.full((size,), start))

    def forward(self, inputs, output):
        return output


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(CALLBACKS, "_entries", dict(CALLBACKS._entries))
    register_callback("keep", keep, feature_count=lambda inputs, n, count=1, side="left": n - count)
    register_callback("gain", Gain)


def again(callback):
    return build_callback(json.loads(json.dumps(describe_callback(callback))), "vision.slot")


def test_functions_partials_and_modules_come_back():
    assert again(keep) is keep
    bound = again(functools.partial(keep, count=3, side="right"))
    assert bound.func is keep and bound(1, 2) == (1, 2, 3, "right")
    gain = again(Gain(4, start=0.5))
    assert type(gain) is Gain and gain.weight.tolist() == [0.5] * 4
    assert describe_callback(Gain(4)) == {"name": "gain", "arguments": {"size": 4}}


def test_a_registered_instance_is_found_by_itself():
    shared = Gain(2)
    register_callback("shared", shared)
    assert describe_callback(shared) == {"name": "shared", "arguments": {}} and again(shared) is shared


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (unregistered, "unregistered is not registered"),
        (lambda i, o: o, "<lambda> is not registered"),
        (functools.partial(unregistered, a=1), "unregistered is not registered"),
        (nn.Linear(1, 1), "Linear is not registered"),
        (functools.partial(keep, None), "positional arguments, bind them by keyword"),
        (functools.partial(keep, count={1}), r"the argument 'count' = \{1\} is not a JSON value"),
    ],
)
def test_what_cannot_be_stored(callback, message):
    with pytest.raises(NotStorable, match=message):
        describe_callback(callback)
    with pytest.raises(ValueError, match=f"vision.{SLOTS[0]} cannot be saved: .*{message}.*register_callback"):
        check_callbacks_storable({SLOTS[0]: callback, SLOTS[1]: keep}, "vision")


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("keep", r"vision.slot must be \{'name': \.\.\., 'arguments': \.\.\.\}, got 'keep'"),
        ({"arguments": {}}, "got {'arguments': {}}"),
        ({"name": "keep", "module": "os"}, "'module'"),
        ({"name": "nothing"}, r"vision.slot: Unknown callback 'nothing', expected one of \[.*'gain', .*'keep'"),
    ],
)
def test_descriptions_that_are_malformed(described, message):
    with pytest.raises(ValueError, match=message):
        build_callback(described, "vision.slot")


def test_counts_are_declared_with_the_callbacks_arguments():
    assert declared_count(keep)({}, 9) == 8
    assert declared_count(functools.partial(keep, count=4))({}, 9) == 5
    assert declared_count(Gain(2)) is None and declared_count(unregistered) is None


def test_empty_places_are_left_out():
    found = check_callbacks_storable({SLOTS[0]: None, SLOTS[1]: keep, SLOTS[2]: Gain(1)}, "vision")
    assert found == {SLOTS[1]: {"name": "keep", "arguments": {}}, SLOTS[2]: {"name": "gain", "arguments": {"size": 1}}}
