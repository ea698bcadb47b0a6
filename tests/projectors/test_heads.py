"""Projection heads: every form against its formula, and options that make no sense."""

import pytest
import torch
from torch import nn

from cornstarch_hf.limits import is_count
from cornstarch_hf.projectors.heads import HEAD_DEFAULTS, NORMS, activation_module
from cornstarch_hf.projectors.reductions import ProjectionHead

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def test_two_layers_are_the_default():
    head = ProjectionHead(8, 6, "relu")
    assert torch.equal(head(X), head.linear_2(torch.relu(head.linear_1(X)))) and head(X).shape == (2, 3, 6)
    assert head.linear_1.out_features == 6 and head.linear_1.bias is not None


def test_one_layer_without_bias():
    head = ProjectionHead(8, 6, num_layers=1, bias=False)
    assert torch.equal(head(X), X @ head.linear_1.weight.T) and list(head.state_dict()) == ["linear_1.weight"]


def test_norms_before_between_and_after():
    head = ProjectionHead(
        8, 6, hidden_size=5, norm="layer_norm", norm_mid="rms_norm", norm_post="rms_norm", norm_eps=0.1
    )
    for norm, width in ((head.norm, 8), (head.norm_mid, 5), (head.norm_post, 6)):
        assert norm.normalized_shape == (width,) and norm.eps == 0.1
    hidden = nn.functional.gelu(head.linear_1(head.norm(X)))
    assert torch.equal(head(X), head.norm_post(head.linear_2(head.norm_mid(hidden))))
    assert ProjectionHead(8, 6, norm="layer_norm").norm.eps == 1e-5
    assert ProjectionHead(8, 6, num_layers=1, norm_post="rms_norm").norm_post.eps == 1e-6


def test_rms_norm_is_precise_and_keeps_the_dtype():
    norm = NORMS["rms_norm"](8, None)
    torch.nn.init.normal_(norm.weight)
    expected = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight
    assert torch.equal(norm(X), expected) and norm(X.double()).dtype is torch.float64
    low = X.bfloat16()
    assert torch.equal(norm(low), norm(low.float()).bfloat16())


def test_gates():
    head = ProjectionHead(8, 6, "silu", gated=True, hidden_size=5)
    values, gates = head.linear_1(X).split(5, dim=-1)
    assert torch.equal(head(X), head.linear_2(values * nn.functional.silu(gates)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, r"norm='batch' is unknown, expected one of \['layer_norm', 'none', 'rms_norm'\]"),
        ({"norm_post": None}, "norm_post=None is unknown"),
        ({"num_layers": 3}, r"num_layers=3 is unknown, expected one of \[1, 2\]"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"norm_eps": -1.0}, "norm_eps must be a positive number, got -1.0"),
        ({"gated": 1}, "gated must be True or False, got 1"),
        ({"biass": True}, r"no options \['biass'\], expected some of \['bias', 'gated'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ProjectionHead(8, 6, **options)


def test_activations_are_fresh_modules():
    assert activation_module("gelu") is not activation_module("gelu")
    with pytest.raises(ValueError, match="activation='geluu' is unknown, expected one of .*'gelu'"):
        activation_module("geluu")


def test_defaults_are_never_written_to():
    before = dict(HEAD_DEFAULTS)
    ProjectionHead(8, 6, bias=False, norm="rms_norm")
    assert before == HEAD_DEFAULTS
    assert [is_count(v) for v in (1, 0, True, 1.0)] == [True, False, False, False] and is_count(0, least=0)
