"""Signatures of single instances: what is shown, what is called, what copies and pickles."""

import copy
import inspect
import pickle

import pytest
import torch

from cornstarch_hf.parts.signatures import PerInstanceSignature, with_signature


def plain(self, a, b=2, *, c=3, **kwargs):
    """What it does."""
    return a, b, c, kwargs


class Part(torch.nn.Module):
    def __init__(self, removed=(), added=(), has_extra=True):
        super().__init__()
        self.changes, self.has_extra = (removed, added), has_extra

    def signature_changes(self, method):
        return None if method == "extra" and not self.has_extra else self.changes

    @PerInstanceSignature
    def forward(self, a, b=2, **kwargs):
        """Add."""
        return a + b, kwargs

    def extra(self, **kwargs):
        return kwargs

    extra = PerInstanceSignature(extra, on_class=False)


def names(function):
    return list(inspect.signature(function).parameters)


def test_a_copy_with_another_signature_is_called_as_the_original():
    made = with_signature(plain, ("b",), ("pixels", "a", "sound"))
    parameters = inspect.signature(made).parameters
    assert list(parameters) == ["self", "a", "c", "pixels", "sound", "kwargs"]
    assert parameters["pixels"].default is None and parameters["pixels"].kind is inspect.Parameter.KEYWORD_ONLY
    assert made(0, 1, pixels=5) == plain(0, 1, pixels=5) == (1, 2, 3, {"pixels": 5})
    assert made.__doc__ == "What it does." and names(plain) == ["self", "a", "b", "c", "kwargs"]
    assert with_signature(plain, ("b",), ("pixels", "a", "sound")) is made


def test_instances_differ_and_the_class_stays():
    one, other = Part(added=["pixels", "pixels"]), Part(removed=["b"], added=["sound"])
    assert names(one.forward) == ["a", "b", "pixels", "kwargs"] and names(other.forward) == ["a", "sound", "kwargs"]
    assert names(Part.forward) == ["self", "a", "b", "kwargs"] and Part.forward.__doc__ == "Add."
    assert one(1, pixels=7) == (3, {"pixels": 7}) == other.forward(1, pixels=7)


def test_what_an_instance_does_not_have():
    assert Part(has_extra=True).extra(x=1) == {"x": 1}
    assert not hasattr(Part, "extra") and not hasattr(Part(has_extra=False), "extra")
    with pytest.raises(AttributeError, match="'Part' object has no attribute 'extra'"):
        _ = Part(has_extra=False).extra
    with pytest.raises(AttributeError, match="instances that have such an encoder only"):
        _ = Part.extra


def test_copies_and_pickles_keep_their_signature():
    part = Part(added=["pixels"])
    for again in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert names(again.forward) == ["a", "b", "pixels", "kwargs"] and again(1) == (3, {})
    assert "forward" not in vars(part)


def test_an_instance_may_hold_a_forward_of_its_own():
    part = Part()
    part.forward = lambda a: -a
    assert part(4) == -4
