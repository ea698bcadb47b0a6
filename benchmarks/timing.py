"""Clocks: wall time, which users wait for, and CPU time on one thread, which other programs on the machine hardly disturb."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Clock = Callable[[], float]


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection while something is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: several wait for one another, and what they wait counts as CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def elapsed(run: Callable[[], Any], clock: Clock) -> float:
    """Seconds of one run by a clock; what it gives is kept until the clock has stopped."""
    start = clock()
    kept = run()
    taken = clock() - start
    del kept
    return taken


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one run, without garbage collection."""
    with quiet():
        return elapsed(run, time.perf_counter)


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of one run on one thread, without garbage collection."""
    with quiet(), one_thread():
        return elapsed(run, time.process_time)
