"""Signatures of single instances: what is shown, what is called, what copies and pickles."""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch

from cornstarch_hf.parts import signatures
from cornstarch_hf.parts.signatures import (
    PerInstanceSignature,
    accepts,
    forward_parameters,
    takes_any_keyword,
    with_signature,
)


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


class Unhashable:
    """A function's stand-in that can be no key of a dict."""

    __hash__ = None

    def __call__(self, module, own):
        return own


class Layer(torch.nn.Module):
    def forward(self, a, **kwargs):
        return a


def test_a_forward_is_looked_up_once_per_function_and_never_for_another(monkeypatch):
    seen = []
    counted = types.SimpleNamespace(signature=lambda it: seen.append(it) or inspect.signature(it))
    monkeypatch.setattr(signatures, "inspect", counted)
    layers = [Layer() for _ in range(3)]
    assert [list(forward_parameters(layer)) for layer in layers] == [["a"]] * 3 and len(seen) == 1
    assert takes_any_keyword(layers[0]) and accepts(layers[0], "whatever") and len(seen) == 1
    layers[0].forward = lambda own: own
    layers[1].forward = functools.partial(Layer.forward, layers[1], a=1)
    layers[2].forward = types.MethodType(Unhashable(), layers[2])
    assert [list(forward_parameters(layer)) for layer in layers] == [["own"], ["a"], ["own"]]
    assert list(forward_parameters(Layer())) == ["a"]
    plain = types.FunctionType(Layer.forward.__code__, globals())
    monkeypatch.setattr(Layer, "forward", plain)
    assert list(forward_parameters(Layer())) == ["a"]
    plain.__code__ = (lambda self, c: c).__code__
    assert list(forward_parameters(Layer())) == ["c"]
    plain.__signature__ = inspect.signature(lambda self, d: d)
    assert list(forward_parameters(Layer())) == ["d"]
    monkeypatch.setattr(Layer, "forward", lambda self, b: b)
    assert list(forward_parameters(Layer())) == ["b"] and not takes_any_keyword(Layer())
