"""Peak memory of training steps, each model in a fresh process: this module is also the program of that process."""

import argparse
import itertools
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .children import run_module
from .results import Result, Target
from .sizes import FULL, QUICK, Sizes

SIDES = ("native", "ours")
TARGETS = {32_000: 0.8, 128_256: 0.65}  # vocabulary -> ours / native
TOLERANCE = 1e-5  # relative difference of the two processes' losses
STEPS = 2
# The C library keeps most of what is freed, and more or less of it by chance; with this setting of glibc the memory of
# every larger tensor goes back to the system, and what is left is what the step needs.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
ALLOCATORS = {"": {}, ", freed memory returned": RETURNED}


def peak_mib() -> float:
    """Most memory that this process has held so far, in MiB.

    `ru_maxrss` starts at what the parent held when it started this process, so the kernel's own counter of this
    program is read where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 1024


def measure(side: str, mode: str, vocabulary: int, sizes: Sizes) -> dict[str, float]:
    """Build one model in this process and run training steps; the peaks on the way and the loss."""
    from .models import build_inputs, build_one
    from .speed import training_step

    peaks = {"imported": peak_mib()}
    model: Any = build_one(side, mode, vocabulary, sizes)
    peaks["built"] = peak_mib()
    inputs, labels = build_inputs(sizes, vocabulary)
    for _ in range(STEPS):
        model.zero_grad()
        loss = training_step(model, inputs, labels).loss.item()
    return peaks | {"peak": peak_mib(), "loss": loss}


def memory(sizes: Sizes) -> list[Result]:
    """Peak memory of both models at each vocabulary, in each mode and under each way of freeing memory."""
    cases = itertools.product(sizes.memory_vocabularies, sizes.memory_modes, sizes.allocators)
    return [_compare(mode, vocabulary, allocator, sizes) for vocabulary, mode, allocator in cases]


def _compare(mode: str, vocabulary: int, allocator: str, sizes: Sizes) -> Result:
    size = [] if sizes is FULL else ["--quick"]
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(sizes.pairs["memory"]):
        for side in SIDES:
            answer = run_module(
                "benchmarks.memory", side, mode, str(vocabulary), *size, environment=ALLOCATORS[allocator]
            )
            taken[side].append(json.loads(answer.splitlines()[-1]))
    check_losses(*(taken[side][-1]["loss"] for side in SIDES))
    name = f"peak memory, training step, {'projector only' if mode == 'projector' else 'all parameters'}"
    target = Target(at_most=TARGETS[vocabulary]) if sizes.judged else None
    peaks = {side: [run["peak"] for run in taken[side]] for side in SIDES}
    return Result(
        "memory",
        f"{name}, vocabulary {vocabulary:,}{allocator}",
        "MiB",
        peaks["native"],
        peaks["ours"],
        target,
        dict(taken),
    )


def check_losses(native: float, ours: float) -> None:
    """ValueError, with both, unless the losses of two processes agree."""
    if not abs(native - ours) <= TOLERANCE * abs(native):
        raise ValueError(f"The losses of the two processes differ: native {native}, ours {ours}.")


def child(measure: Callable[[str, str, int, Sizes], dict[str, float]], quick: Sizes, full: Sizes) -> None:
    """The program of a fresh process: one model, one mode; prints what was measured as a line of JSON."""
    parser = argparse.ArgumentParser(description=child.__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("mode")
    parser.add_argument("vocabulary", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes = quick if options.quick else full
    print(json.dumps(measure(options.side, options.mode, options.vocabulary, sizes)))


if __name__ == "__main__":
    child(measure, QUICK, FULL)
