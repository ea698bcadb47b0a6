"""Steps with a label on every token of text: the memory that one adds, each model in a fresh process, and its time.

This module is also the program of that process.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .children import run_module
from .memory import RETURNED, SIDES, check_losses, child, peak_mib
from .results import Result, Target, in_turn
from .sizes import FULL, QUICK, Sizes

MEMORY_TARGET, TIME_TARGET = 0.3, 1.05  # ours / native where the head is frozen
# A large head on a small model: an image of 4 features, and 636 tokens of text that all have a label.
LARGE_HEAD: dict[str, Any] = {
    "vision": FULL.vision | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "image_size": 28},
    "text": FULL.text
    | {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "batch": 1,
    "text_tokens": 636,
    "labelled": 636,
}


def all_labelled(sizes: Sizes) -> Sizes:
    """The sizes of these steps."""
    return replace(sizes, **LARGE_HEAD) if sizes.judged else replace(sizes, batch=1, labelled=sizes.text_tokens)


def labels(sizes: Sizes) -> list[Result]:
    """Memory and CPU time of steps in which the projector trains and the head is frozen, and in which all trains."""
    from .models import build_pair
    from .speed import MODE_NAMES

    own = all_labelled(sizes)
    vocabulary = own.vocabularies[-1]
    results = []
    for mode in sizes.memory_modes:
        judged = sizes.judged and mode == "projector"
        name = f"all labelled, {MODE_NAMES[mode]}, vocabulary {vocabulary:,}"
        memory = _added(mode, vocabulary, own)
        native, ours = ([run["added"] for run in memory[side]] for side in SIDES)
        target = Target(at_most=MEMORY_TARGET) if judged else None
        results.append(Result("labels", f"memory added by a step, {name}", "MiB", native, ours, target, dict(memory)))
    pair = build_pair(own, vocabulary)
    for mode in sizes.memory_modes:
        target = Target(at_most=TIME_TARGET) if sizes.judged and mode == "projector" else None
        name = f"all labelled, {MODE_NAMES[mode]}, vocabulary {vocabulary:,}"
        results.append(Result("labels", f"training step, {name}", "CPU s", *_timed(pair, mode, own), target))
    return results


def _added(mode: str, vocabulary: int, sizes: Sizes) -> dict[str, list[dict[str, float]]]:
    """What the processes of both models measured, by side."""
    size = [] if sizes.judged else ["--quick"]
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(sizes.pairs["labels, memory"]):
        for side in SIDES:
            answer = run_module("benchmarks.labels", side, mode, str(vocabulary), *size, environment=RETURNED)
            taken[side].append(json.loads(answer.splitlines()[-1]))
    check_losses(*(taken[side][-1]["loss"] for side in SIDES))
    return taken


def _timed(pair: Any, mode: str, sizes: Sizes) -> tuple[list[float], list[float]]:
    from .models import set_trainable
    from .speed import training_step
    from .timing import cpu_seconds

    pair.ours.config.loss_at_labels = True
    for model in (pair.native, pair.ours):
        set_trainable(model, mode)

    def sample(model: Any) -> float:
        model.zero_grad()
        return cpu_seconds(lambda: training_step(model, pair.inputs, pair.labels))

    return in_turn(lambda: sample(pair.native), lambda: sample(pair.ours), sizes.pairs["labels"])


def forget_peak() -> float:
    """Let the kernel count this process's peak of memory anew, where it can; returns what is held now, in MiB."""
    place = Path("/proc/self/clear_refs")
    if place.exists():
        place.write_text("5")
    return peak_mib()


def measure(side: str, mode: str, vocabulary: int, sizes: Sizes) -> dict[str, float]:
    """Build one model in this process; one step warms up, and of the next one what it adds at most is taken."""
    from .models import build_inputs, build_one
    from .speed import training_step

    model = build_one(side, mode, vocabulary, sizes)
    inputs, targets = build_inputs(sizes, vocabulary)
    training_step(model, inputs, targets)
    model.zero_grad()
    before = forget_peak()
    loss = training_step(model, inputs, targets).loss.item()
    return {"before": before, "peak": peak_mib(), "added": peak_mib() - before, "loss": loss}


if __name__ == "__main__":
    child(measure, all_labelled(QUICK), all_labelled(FULL))
