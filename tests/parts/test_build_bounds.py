"""What is built from a configuration stays within what is stored, and within the bytes that may be computed."""

import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from cornstarch_hf import limits
from cornstarch_hf.parts.build_bounds import BoundedTensors, bounded_tensors, build_guard, check_built

BOMBS = {
    "arange": lambda: torch.arange(10**9),
    "mask": lambda: torch.ones(10**5, 10**5, dtype=torch.bool),
    "outer": lambda: torch.outer(torch.arange(10**5).float(), torch.arange(10**5).float()),
    "full": lambda: torch.full((10**10,), 1.0),
    "linspace": lambda: torch.linspace(0, 1, 10**10),
    "repeat": lambda: torch.arange(8).repeat(10**9),
    "copy of a view": lambda: torch.ones(1).expand(10**10).contiguous(),
    "fill": lambda: torch.empty(10**9).fill_(1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_tensors_are_measured_before_they_are_made(name):
    with pytest.raises(ValueError, match="MAX_BUILD_BYTES = 1,000,000,000"), BoundedTensors():
        BOMBS[name]()


def test_the_sum_counts_and_views_and_reserved_memory_do_not(monkeypatch):
    monkeypatch.setattr(limits, "MAX_BUILD_BYTES", 1000)
    with BoundedTensors() as mode:
        torch.empty(10**6)
        ones = torch.ones(100)
        ones.expand(10**6, 100).transpose(0, 1).view(100, -1)
        torch.ones(10**6, device="meta")
        assert mode.made == 400
        torch.ones(100)
        with pytest.raises(ValueError, match="are 1,200, more than"):
            torch.ones(100)


def test_results_are_those_without_the_mode():
    def table():
        positions = torch.arange(7).float()
        mask = torch.tril(torch.ones(5, 5, dtype=torch.bool)).view(1, 1, 5, 5)
        return torch.outer(positions, 1.0 / 10 ** (torch.arange(0, 4, 2) / 4)).cos(), mask, positions[positions > 3]

    with BoundedTensors():
        bounded = table()
    assert all(torch.equal(a, b) for a, b in zip(bounded, table(), strict=True))


def test_tensors_are_counted_in_this_thread_alone(monkeypatch):
    monkeypatch.setattr(limits, "MIN_MODULES", 10)
    shapes = {"0.weight": (1, 1), "0.bias": (1,)}

    def build(count):
        return nn.Sequential(*[nn.Linear(1, 1) for _ in range(count)])

    with build_guard(shapes):
        build(13)
        worker = threading.Thread(target=build, args=(100,))
        worker.start()
        worker.join()
        with pytest.raises(ValueError, match="builds over 26 tensors, but the checkpoint holds 2"):
            build(1)
    build(100)


def test_a_model_is_compared_by_names_and_shapes():
    with torch.device("meta"):
        model = nn.Linear(4, 3)
        wide = nn.Linear(10**5, 10**5, bias=False)
    check_built(model)  # outside of the guard nothing is known
    with build_guard(None):
        check_built(wide)
    with build_guard({"weight": (3, 4), "bias": (3,)}):
        check_built(model)
    with (
        build_guard({"weight": (3, 5), "bias": (3,)}),
        pytest.raises(ValueError, match=r"1 tensors of other shapes .*weight: \(3, 4\) here, \(3, 5\) stored"),
    ):
        check_built(model)
    with build_guard({"weight": (3, 5)}, sized=False):
        check_built(model)
    with (
        build_guard({"other": (3,)}),
        pytest.raises(ValueError, match=r"1 tensors of 10,000,000,000 elements .* \(it holds 3 elements\)"),
    ):
        check_built(wide)


def test_the_context_does_nothing_outside_of_the_guard():
    with bounded_tensors() as mode:
        assert mode is None
    large = LlamaConfig(max_position_embeddings=10**6)
    with bounded_tensors(large) as mode:
        assert mode is None
    for configs in ((large,), ()):
        with build_guard(), bounded_tensors(*configs) as mode:
            assert isinstance(mode, BoundedTensors)


@pytest.mark.parametrize(
    ("values", "bounded"),
    [
        ({}, False),
        ({"vocab_size": 32_000, "bos_token_id": 151_643}, False),
        ({"vocab_size": 32_001}, True),
        ({"max_position_embeddings": 2_048, "rope_theta": 500_000}, False),
        ({"max_position_embeddings": 2_049}, True),
        ({"nested": {"sizes": [1, [2, 10**9]]}}, True),
        ({"part": LlamaConfig(hidden_size=4_096)}, True),
    ],
)
def test_computed_tables_are_bounded_where_a_size_could_make_them_large(values, bounded):
    with build_guard({"embedding": (32_000, 64)}), bounded_tensors(values) as mode:
        assert isinstance(mode, BoundedTensors) is bounded


def test_keys_that_are_numbers_name_no_size():
    """A table of labels has numbers as keys; what stands there may be anything."""
    with build_guard({"a": (2,)}):
        assert isinstance(bounded_tensors({"id2label": {1: 2**40}}), BoundedTensors)
        assert not isinstance(bounded_tensors({"id2label": {1: 2}}), BoundedTensors)
