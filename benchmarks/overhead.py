"""What a call costs beyond arithmetic: at the smallest size, where that is nearly all, and at an ordinary one."""

import time
from dataclasses import replace
from typing import Any

import torch

from .models import Pair, build_pair
from .results import Result, Target, in_turn
from .sizes import FULL, QUICK, Sizes
from .speed import decoded, generated
from .timing import elapsed, one_thread, quiet

# size -> what runs -> ours / native by CPU time
TARGETS: dict[str, dict[str, float]] = {
    "smallest": {"forward": 1.2, "decode": 1.06, "generate": 1.12},
    "ordinary": {"forward": 1.02, "decode": 1.02, "generate": 1.02},
}
SMALLEST = replace(QUICK, batch=1, judged=FULL.judged, pairs=FULL.pairs, new_tokens=FULL.new_tokens)


def overhead(sizes: Sizes) -> list[Result]:
    """A forward pass, a decoded token and `generate` at both sizes: CPU time on one thread, the two models in turn."""
    smallest = SMALLEST if sizes.judged else replace(sizes, batch=1)
    results: list[Result] = []
    with one_thread():
        for label, own in (("smallest", smallest), ("ordinary", replace(sizes, batch=1))):
            results += _at_size(label, build_pair(own, own.vocabularies[0]), own)
    return results


def _at_size(label: str, pair: Pair, sizes: Sizes) -> list[Result]:
    taken = {
        "forward": _forward(pair, sizes.pairs[f"forward, {label}"]),
        "decode": _decode(pair, sizes.pairs[f"decode, {label}"], sizes),
        "generate": _generate(pair, sizes.pairs[f"generate, {label}"], sizes),
    }
    names = {"decode": "decode one token", "generate": f"generate {_answer(sizes)} tokens"}
    results = []
    for key, samples in taken.items():
        target = Target(at_most=TARGETS[label][key]) if sizes.judged else None
        notes: dict[str, Any] = {"pairs": len(samples[0])}
        name = f"{names.get(key, key)}, {label} size"
        results.append(Result("overhead", name, "CPU ms", *samples, target, notes))
    return results


def _answer(sizes: Sizes) -> int:
    """Tokens that `generate` is asked for."""
    return max(2, sizes.new_tokens // 4)


@torch.no_grad()
def _forward(pair: Pair, pairs: int) -> tuple[list[float], list[float]]:
    def once(model: Any) -> float:
        return 1e3 * elapsed(lambda: model(**pair.inputs), time.process_time)

    with quiet():
        return in_turn(lambda: once(pair.native), lambda: once(pair.ours), pairs, warm_up=1 + pairs // 20)


def _decode(pair: Pair, rounds: int, sizes: Sizes) -> tuple[list[float], list[float]]:
    """Each round starts anew behind the prompt, so that the text stays short."""
    taken = [decoded(pair, sizes.new_tokens, sizes, time.process_time) for _ in range(rounds)]
    return [x for native, _ in taken for x in native], [x for _, ours in taken for x in ours]


def _generate(pair: Pair, pairs: int, sizes: Sizes) -> tuple[list[float], list[float]]:
    native, ours = generated(pair, _answer(sizes), pairs, sizes, time.process_time)
    return [1e3 * x for x in native], [1e3 * x for x in ours]
