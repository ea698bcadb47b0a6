"""How often calls wait for the device, counted by their operations; `tests/support/waits.py` says what waits."""

import runpy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from .children import ROOT
from .models import Pair, build_inputs, build_pair, image_token, set_trainable
from .results import Result, Target
from .sizes import QUICK, Sizes
from .speed import MODE_NAMES

# One definition for tests and figures; tests see no benchmarks, so it lies with them.
waits_of: Callable[[Callable[[], Any]], list[str]] = runpy.run_path(str(ROOT / "tests/support/waits.py"))["waits_of"]


def waits(sizes: Sizes) -> list[Result]:
    """Waits of a forward pass, of steps as Trainer makes them, and of each generated token; they are the same at every size."""
    pair = build_pair(QUICK, QUICK.vocabularies[0])
    found = [_result("forward", _forward(pair.native, pair), _forward(pair.ours, pair), 0, sizes)]
    found.append(_result("generate, each token", _per_token(pair.native, pair), _per_token(pair.ours, pair), 0, sizes))
    for mode, name in MODE_NAMES.items():
        for model in (pair.native, pair.ours):
            set_trainable(model, mode)
        pair.ours.config.loss_at_labels = True
        steps = _step(pair.native, pair), _step(pair.ours, pair)
        found.append(_result(f"training step of Trainer, {name}", *steps, 2, sizes))
    return found


def _result(name: str, native: list[str], ours: list[str], more: int, sizes: Sizes) -> Result:
    target = Target(more=more) if sizes.judged else None
    counts = [float(len(native))], [float(len(ours))]
    return Result("waits", f"waits for the device, {name}", "waits", *counts, target, {"native": native, "ours": ours})


@torch.no_grad()
def _forward(model: Any, pair: Pair) -> list[str]:
    model.eval()
    model(**pair.inputs)  # the first call looks things up
    return waits_of(lambda: model(**pair.inputs))


def _step(model: Any, pair: Pair) -> list[str]:
    # Trainer has counted the labels of the batch before, on the device.
    number = (pair.labels != -100).sum()
    given = pair.inputs | {"labels": pair.labels, "num_items_in_batch": number}
    model(**given)  # as a first step does, which looks for layers that are not needed
    return waits_of(lambda: model(**given).loss.backward())


def _per_token(model: Any, pair: Pair) -> list[str]:
    """What one more token adds to `generate`."""
    inputs, _ = build_inputs(QUICK, pair.vocabulary, batch=1)
    options = {"do_sample": False, "suppress_tokens": [image_token(pair.vocabulary)]}
    short, long = (
        waits_of(lambda n=n: model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, **options)) for n in (4, 5)
    )
    return list((Counter(long) - Counter(short)).elements())
