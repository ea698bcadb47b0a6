"""One walk over a model finds the names that torch finds."""

import torch
from torch import nn

from cornstarch_hf.parts.names import modules_by_name, parameters_by_name


def shared_model():
    """Blocks in lists and dicts, a shared module, a shared parameter, empty places."""
    shared = nn.Linear(2, 2)
    model = nn.Module()
    model.first = shared
    model.blocks = nn.ModuleList(
        [nn.Sequential(shared, nn.ReLU()), nn.ModuleDict({"a": nn.LayerNorm(2)}), nn.Linear(2, 3, bias=False)]
    )
    model.nothing = None
    model.add_module("empty", None)
    model.own = nn.Parameter(torch.zeros(1))
    model.again = model.own
    model.register_parameter("missing", None)
    return model


def test_modules_are_those_of_torch_in_its_order():
    model = shared_model()
    expected = list(model.named_modules(remove_duplicate=False))
    assert len(expected) == 9
    assert [(name, id(module)) for name, module in modules_by_name(model)] == [(n, id(m)) for n, m in expected]


def test_parameters_are_those_of_torch_in_its_order_with_every_name_of_a_shared_one():
    model = shared_model()
    expected = list(model.named_parameters(remove_duplicate=False))
    assert len(expected) == 9 > len(list(model.parameters()))
    assert [(name, id(parameter)) for name, parameter in parameters_by_name(model)] == [(n, id(p)) for n, p in expected]
