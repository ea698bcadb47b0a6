"""The helper for equality across a reload, and the processor that finds comparisons which depend on the real one."""

import pytest
import tiny
import torch
from helpers import run_python
from own_memory import check_comes_back, own_memory, weights
from torch import nn


def elsewhere(tensor):
    """A copy that lies at no multiple of 64."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    assert place.data_ptr() % 64
    return place.view(tensor.shape).copy_(tensor)


def test_everything_is_moved_and_ties_are_kept():
    model = tiny.llama(tie_word_embeddings=True)
    before = weights(model)
    for parameter in model.parameters():
        parameter.data = elsewhere(parameter.data)
    assert own_memory(model) is model and weights(model) == before
    assert not any(p.data_ptr() % 64 for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    x = elsewhere(torch.ones(3, 4))
    inputs = own_memory({"x": x, "pair": (x.T, 3)})
    assert inputs["x"].data_ptr() % 64 == 0 and inputs["pair"][0].is_contiguous() and inputs["pair"][1] == 3
    assert torch.equal(inputs["x"], x) and torch.equal(inputs["pair"][0], x.T)


def test_weights_are_told_apart_by_bits_dtype_and_name():
    layer = nn.Linear(2, 2)
    layer.register_buffer("steps", torch.tensor(0.0), persistent=False)
    kept = weights(layer)
    assert set(kept) == {"weight", "bias", "steps"}
    layer.steps.neg_()
    assert weights(layer)["steps"] != kept["steps"], "minus zero is another bit"
    layer.steps.neg_()
    assert weights(layer) == kept and weights(layer.double())["weight"][0] == "torch.float64"


def test_another_model_does_not_come_back():
    model, other = tiny.llama(seed=0), tiny.llama(seed=0)
    ids = {"input_ids": torch.tensor([[1, 5, 9]])}
    check_comes_back(model, other, ids, max_new_tokens=2, do_sample=False)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    with pytest.raises(AssertionError):
        check_comes_back(model, other, ids)


def test_the_processor_that_rounds_by_shapes_layouts_and_addresses():
    run_python("""
import os
os.environ["ANY_PROCESSOR"] = "1"
import torch
from own_memory import own_memory
torch.manual_seed(0)
x, weight = torch.randn(16, 8), torch.randn(8, 8)
moved = torch.empty(129)[1:].view(16, 8).copy_(x)
own_memory(x)
whole = x @ weight
assert torch.equal(whole, x.clone() @ weight) and torch.equal(whole, own_memory(moved) @ weight)
rows = [torch.equal(whole[:n], x[:n].clone() @ weight) for n in range(1, 16)]
assert not all(rows), "a row alone is another product than in a batch"
layers = [torch.nn.Linear(8, width) for width in range(8, 16)]
assert not all(torch.equal(layer(x), layer(moved)) for layer in layers), "as is the same at another address"
for layer in layers:
    torch.testing.assert_close(layer(x), layer(moved))
    layer(x).square().sum().backward()
    assert layer.weight.grad.isfinite().all()
""")
