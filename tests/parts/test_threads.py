"""Modes that hold in one thread, random numbers of one's own, and locks that travel."""

import copy
import os
import pickle
import threading

import pytest
import torch
from process_state import process_state
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from user_parts import Halving

from cornstarch_hf import MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.parts.threads import DRAWS_IN_PLACE, PrivateRandom, ThreadDispatchMode, TravellingLock, run_privately
from cornstarch_hf.parts.weightless import KeepsInitialized

DRAWS = {
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(3, dtype=torch.float64),
    "like": lambda: torch.randn_like(torch.ones(3)),
    "uniform like": lambda: torch.rand_like(torch.ones(3), dtype=torch.float64),
    "integers like": lambda: torch.randint_like(torch.ones(3), 7),
    "integers between like": lambda: torch.randint_like(torch.ones(3).long(), low=2, high=7),
    "randint": lambda: torch.randint(5, (2,)),
    "between": lambda: torch.randint(2, 5, (2,)),
    "permutation": lambda: torch.randperm(4),
    "normal": lambda: torch.normal(torch.zeros(2), torch.ones(2)),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(4), 2),
    "method": lambda: torch.empty(3).uniform_(),
    "init": lambda: nn.Linear(2, 2).weight.detach(),
}


class Private(ThreadDispatchMode):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_privately(func, args, dict(kwargs or {}), self.generator)


@pytest.mark.parametrize("mode", [PrivateRandom, Private])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_privately_is_not_drawn_from_others(name, mode):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with mode():
        first, second = DRAWS[name](), DRAWS[name]()
    assert torch.equal(state, torch.get_rng_state()) and first.shape == second.shape
    with mode():
        assert torch.equal(DRAWS[name](), first), "always the same"
    assert DRAWS[name]().dtype == first.dtype and not torch.equal(state, torch.get_rng_state())


def test_in_place_draws_and_a_generator_that_is_given():
    state = torch.get_rng_state()
    with PrivateRandom():
        for method in DRAWS_IN_PLACE:
            method(torch.zeros(3), *((0.5,) if method is torch.Tensor.geometric_ else ()))
        mine = torch.rand(2, generator=torch.Generator().manual_seed(7))
        assert torch.rand(2, device="meta").is_meta
    assert torch.equal(mine, torch.rand(2, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(state, torch.get_rng_state())


def test_what_takes_no_generator_gives_shapes_alone():
    state = torch.get_rng_state()
    with Private():
        dropped, _ = torch.native_dropout(torch.ones(3), 0.5, True)
        assert dropped.is_meta and dropped.shape == (3,)
        assert not nn.functional.dropout(torch.ones(3), training=False).is_meta
    assert torch.equal(state, torch.get_rng_state())


def test_a_dispatch_mode_is_known_to_its_thread_alone():
    before, seen = process_state(), []

    class Doubled(ThreadDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {})) * 2

    with Doubled():
        assert process_state() == before
        mine = torch.ones(1).neg()
        worker = threading.Thread(target=lambda: seen.append(torch.ones(1).item()))
        worker.start()
        worker.join()
    assert seen == [1] and mine.item() < -1 and torch.ones(1).item() == 1


def test_marked_tensors_keep_their_values_and_others_do_not():
    before = process_state()
    marked, other = nn.Linear(2, 2), nn.Linear(2, 2)
    marked.weight._is_hf_initialized = True
    kept = marked.weight.clone()
    with torch.no_grad(), KeepsInitialized():
        assert process_state() == before
        for module in (marked, other):
            for fill in (
                init.zeros_,
                nn.init.zeros_,
                nn.init.constant_,
                nn.init.xavier_normal_,
                nn.init.kaiming_uniform_,
            ):
                fill(module.weight, *((3.0,) if fill is nn.init.constant_ else ()))
            nn.init.zeros_(module.weight)
    assert torch.equal(marked.weight, kept) and not other.weight.any()


def test_projectors_are_initialised_as_transformers_would():
    for config in (
        MultimodalProjectorConfig(in_features=4, out_features=6, projection_type="mlp"),
        MultimodalProjectorConfig(in_features=4, out_features=6, projection_type="resampler", projection_kwargs={"num_queries": 2}),
    ):  # fmt: skip
        torch.manual_seed(1)
        ours = MultimodalProjector(config)

        class Theirs(MultimodalProjector):
            initialize_weights = PreTrainedModel.initialize_weights

        torch.manual_seed(1)
        theirs = Theirs(config)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    given = Halving(4, 6)
    kept = {key: value.clone() for key, value in given.state_dict().items()}
    wrapped = MultimodalProjector(MultimodalProjectorConfig(), given).projection.state_dict()
    assert all(torch.equal(wrapped[key], value) for key, value in kept.items())


def test_a_lock_lets_one_thread_in_and_is_free_wherever_it_travels():
    lock, order = TravellingLock(), []

    def enter():
        with lock:
            order.append("other")

    with lock, lock:
        worker = threading.Thread(target=enter)
        worker.start()
        for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            with other:
                order.append("copy")
        order.append("mine")
    worker.join()
    assert order == ["copy", "copy", "mine", "other"]


def test_a_lock_that_another_thread_held_when_the_process_forked_is_free_in_the_child():
    lock, held, done = TravellingLock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            done.wait()

    worker = threading.Thread(target=hold)
    worker.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with lock:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    done.set()
    worker.join()
    assert os.waitstatus_to_exitcode(status) == 7
