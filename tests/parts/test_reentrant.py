"""Reentrant checkpointing keeps gradients wherever layers take and give their tensors."""

import copy
import functools
import pickle
from collections import UserDict

import catalog
import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.parts.frozen_modes import whole_gradients

REENTRANT = functools.partial(checkpoint, use_reentrant=True)


class Layer(nn.Module):
    """Takes a tensor by position, by keyword and in a tuple; gives a tuple of tuples."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, pair=None, scale=None, flag=True):
        assert flag and isinstance(pair, tuple)
        return ((self.weight * x * scale + pair[0] * pair[1],), 4)


def gradients(run, **tracked):
    """Gradients of the layer's weight and of its inputs, by a way to run it."""
    layer = Layer()
    x, a, b, s = (torch.tensor(float(i), requires_grad=tracked.get(n, True)) for i, n in enumerate("xabs", start=2))
    (found,), number = run(functools.partial(Layer.forward, layer, pair=(a, b), scale=s), x)
    assert number == 4
    found.backward()
    return [t.grad for t in (layer.weight, x, a, b, s)]


@pytest.mark.parametrize("without", ["", "x", "xs", "xabs"])
def test_gradients_are_those_without_checkpointing(without):
    tracked = dict.fromkeys(without, False)
    expected = gradients(lambda function, *args: function(*args), **tracked)
    assert gradients(whole_gradients(REENTRANT), **tracked)[0] == expected[0] == 2 * 5
    assert gradients(whole_gradients(REENTRANT), **tracked)[1:] == (expected[1:] if without != "xabs" else [None] * 4)


def test_a_bound_method_and_a_plain_function_are_checkpointed_too():
    layer = nn.Linear(2, 2)
    whole_gradients(REENTRANT)(functools.partial(layer.forward), torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.any()
    x = torch.ones(2, requires_grad=True)
    whole_gradients(REENTRANT)(torch.sin, x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2).cos())


def test_frozen_layers_without_gradients_before_them_get_none():
    layer = nn.Linear(2, 2).requires_grad_(False)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        found = whole_gradients(REENTRANT)(functools.partial(nn.Linear.forward, layer), torch.ones(1, 2))
    assert not found.requires_grad


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {}])
def test_any_other_way_to_checkpoint_is_left_as_it_is(options):
    function = functools.partial(checkpoint, **options)
    assert whole_gradients(function) is function and whole_gradients(checkpoint) is checkpoint


class Sharing(nn.Module):
    """Leaves a tensor for later layers in a dictionary or list."""

    def forward(self, x, shared):
        if isinstance(shared, list):
            shared.append(x * 2)
        else:
            shared["key"] = x * 2
        return x


@pytest.mark.parametrize("shared", [dict, UserDict, list, lambda: [torch.ones(1, requires_grad=True)]])
def test_a_layer_that_hands_tensors_on_beside_its_output_is_refused(shared):
    layer, given, x = Sharing(), shared(), torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r'Sharing hands tensors .* beside its output.*\{"use_reentrant": False\}'):
        whole_gradients(REENTRANT)(functools.partial(Sharing.forward, layer, shared=given), x)


def test_where_no_gradient_flows_tensors_may_be_handed_on():
    shared = {}
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        whole_gradients(REENTRANT)(functools.partial(Sharing.forward, Sharing(), shared=shared), torch.ones(1))
    assert shared["key"] == 2


def test_gradients_flow_through_lists():
    class Turning(nn.Module):
        def forward(self, x, position_embeddings):
            cos, sin = position_embeddings
            return x * cos + sin

    tensors = [torch.tensor(float(i), requires_grad=True) for i in (2, 3, 4)]
    function = functools.partial(Turning.forward, Turning(), position_embeddings=tensors[1:])
    whole_gradients(REENTRANT)(function, tensors[0]).backward()
    assert [t.grad.item() for t in tensors] == [3, 2, 1]


@pytest.mark.parametrize("name", ["PvtV2Model", "FunAsrNanoEncoder", "MLCDVisionModel"])
def test_encoders_learn(name):
    case = catalog.cases()[name]
    torch.manual_seed(0)
    encoder = ModalEncoderModule(catalog.build(name), kind=case.kind, **case.module_kwargs)
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama()).train()
    found = []
    for options in (None, {"use_reentrant": True}):
        if options:
            model.gradient_checkpointing_enable(options)
            model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        model.zero_grad()
        torch.manual_seed(1)
        torch.cat(list(model.media_encoder(**catalog.item(name, 0)).pooler_output)).square().sum().backward()
        found.append({n: p.grad for n, p in model.media_encoder.module.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, atol=1e-5, rtol=1e-4)
