"""Times of forward passes, decoding, generation and training steps, the two models in turn."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cornstarch_hf.parts.versions import CACHE

from .models import MODES, Pair, build_inputs, image_token, set_trainable
from .results import Result, Target, in_turn
from .sizes import Sizes
from .timing import Clock, cpu_seconds, elapsed, quiet, seconds

# (mode, vocabulary) -> native / ours of a training step by operations; by CPU time so much of that
TRAIN_TARGETS = {
    ("projector", 32_000): 1.37,
    ("all", 32_000): 1.32,
    ("projector", 128_256): 2.32,
    ("all", 128_256): 2.16,
}
OF_OPERATIONS = 0.92
MODE_NAMES = {"projector": "projector only", "all": "all parameters"}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3  # relative; sums over other shapes round differently


def _added(native: list[float], ours: list[float]) -> dict[str, float]:
    return {"added_ms_median": 1e3 * median(b - a for a, b in zip(native, ours, strict=True))}


@torch.no_grad()
def forward(pair: Pair, sizes: Sizes) -> list[Result]:
    """A forward pass over a batch of images and text, all logits."""
    native, ours = in_turn(
        lambda: seconds(lambda: pair.native(**pair.inputs)),
        lambda: seconds(lambda: pair.ours(**pair.inputs)),
        sizes.pairs["forward"],
    )
    name = f"forward, vocabulary {pair.vocabulary:,}"
    return [Result("forward", name, "s", native, ours, notes=_added(native, ours))]


class Decoding:
    """One model that decodes token by token with its cache; the caller says which token comes next."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]):
        self.model = model
        output = model(**inputs, use_cache=True)
        self.cache, self.mask = output[CACHE], inputs["attention_mask"]
        self.logits = output.logits[:, -1:]

    def step(self, token: Tensor, clock: Clock) -> float:
        """Seconds of one step; `token` is ``(batch, 1)``, the next `logits` are ``(batch, 1, vocabulary)``."""
        self.mask = torch.cat([self.mask, torch.ones_like(token)], dim=1)
        start = clock()
        given = {"attention_mask": self.mask, CACHE: self.cache}
        output = self.model(input_ids=token, **given, use_cache=True, logits_to_keep=1)
        taken = clock() - start
        self.logits = output.logits
        return taken


@torch.no_grad()
def decoded(pair: Pair, tokens: int, sizes: Sizes, clock: Clock) -> tuple[list[float], list[float]]:
    """Milliseconds of tokens with a cache, after an image and text; the two models in turn at each token.

    Raises:
        ValueError: the logits of the two models differ at a token.
    """
    inputs, _ = build_inputs(sizes, pair.vocabulary, batch=1)
    models = Decoding(pair.native, inputs), Decoding(pair.ours, inputs)
    samples: tuple[list[float], list[float]] = ([], [])
    with quiet():
        for _ in range(1 + tokens):
            if not torch.equal(models[0].logits, models[1].logits):
                raise ValueError(f"The logits differ after {len(samples[0])} decoded tokens.")
            token = models[0].logits[..., : image_token(pair.vocabulary)].argmax(-1)  # (batch, 1), no placeholder
            for taken, model in zip(samples, models, strict=True):
                taken.append(1e3 * model.step(token, clock))
    return samples[0][1:], samples[1][1:]  # the first token warms up


def decode(pair: Pair, sizes: Sizes) -> list[Result]:
    """One token with a cache, after an image and text; the two models in turn at each token."""
    native, ours = decoded(pair, sizes.new_tokens, sizes, time.perf_counter)
    notes = {"added_ms_median": median(b - a for a, b in zip(native, ours, strict=True))}
    name = f"decode one token, vocabulary {pair.vocabulary:,}"
    return [Result("decode", name, "ms", native, ours, notes=notes)]


@torch.no_grad()
def generated(pair: Pair, tokens: int, pairs: int, sizes: Sizes, clock: Clock) -> tuple[list[float], list[float]]:
    """Seconds of `generate` from image and text to the last token, prefill and the loop of transformers included.

    Raises:
        ValueError: the two models generate other tokens.
    """
    inputs, _ = build_inputs(sizes, pair.vocabulary, batch=1)
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "suppress_tokens": [image_token(pair.vocabulary)],
    }
    found = {}

    def run(key: str, model: Any) -> Callable[[], float]:
        def once():
            found[key] = model.generate(**inputs, **options)

        return lambda: elapsed(once, clock)

    with quiet():
        samples = in_turn(run("native", pair.native), run("ours", pair.ours), pairs)
    if not torch.equal(found["native"], found["ours"]):
        raise ValueError(f"The two models generate other tokens: {found}.")
    return samples


def generate(pair: Pair, sizes: Sizes) -> list[Result]:
    """`generate` by wall time."""
    length = sizes.new_tokens // 2
    native, ours = generated(pair, length, sizes.pairs["generate"], sizes, time.perf_counter)
    name = f"generate {length} tokens, vocabulary {pair.vocabulary:,}"
    return [Result("decode", name, "s", native, ours, notes=_added(native, ours))]


def training_step(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Any:
    """Forward and backward pass; no optimizer."""
    output = model(**inputs, labels=labels)
    output.loss.backward()
    return output


def train(pair: Pair, sizes: Sizes) -> list[Result]:
    """Training steps with the projector alone and with everything trainable, the loss of ours at labels only."""
    results = []
    for mode in MODES:
        for model in (pair.native, pair.ours):
            set_trainable(model, mode)
        check_full_loss(pair)
        if mode == "projector" and pair.vocabulary == sizes.vocabularies[0]:
            results += _trained(pair, sizes, mode, at_labels=False)
        results += _trained(pair, sizes, mode, at_labels=True)
    for model in (pair.native, pair.ours):
        model.zero_grad()
        model.eval()
    pair.ours.config.loss_at_labels = False
    return results


def _trained(pair: Pair, sizes: Sizes, mode: str, at_labels: bool) -> list[Result]:
    """Operations of a step, and its CPU time on one thread."""
    pair.ours.config.loss_at_labels = at_labels
    found = check_gradients(pair, at_labels)
    operations = [found.pop("native_gflop")], [found.pop("ours_gflop")]

    def sample(model: Any) -> float:
        model.zero_grad()
        return cpu_seconds(lambda: training_step(model, pair.inputs, pair.labels))

    native, ours = in_turn(
        lambda: sample(pair.native), lambda: sample(pair.ours), sizes.pairs["train"], warm_up=0
    )  # warm: the gradients were compared
    goal = TRAIN_TARGETS.get((mode, pair.vocabulary)) if at_labels and sizes.judged else None
    targets = (Target(at_least=goal), Target(at_least=round(OF_OPERATIONS * goal, 2))) if goal else (None, None)
    name = f"{MODE_NAMES[mode]}, vocabulary {pair.vocabulary:,}{'' if at_labels else ', all logits'}"
    return [
        Result("train", f"operations of a training step, {name}", "GFLOP", *operations, targets[0], found),
        Result("train", f"training step, {name}", "CPU s", native, ours, targets[1], _added(native, ours) | found),
    ]


@torch.no_grad()
def check_full_loss(pair: Pair) -> None:
    """ValueError unless, with all logits, the losses in training mode are equal to the bit."""
    pair.ours.config.loss_at_labels = False
    losses = [model(**pair.inputs, labels=pair.labels).loss for model in (pair.native, pair.ours)]
    if not torch.equal(*losses):
        raise ValueError(f"With all logits the losses differ: {[loss.item() for loss in losses]}.")


class _NoModules(nullcontext):
    """In place of what torch's counter hooks to all modules: under such hooks a tower runs whole, and no training does."""

    parents = frozenset({"Global"})


def check_gradients(pair: Pair, at_labels: bool) -> dict[str, float]:
    """Compare the loss and the projector's gradients of one step.

    Args:
        at_labels: whether ours computes its loss at labels only: then it has no logits and may round differently;
            else all is equal to the bit.

    Returns:
        the relative differences, and the operations of each step in GFLOP, which no other load on the machine disturbs.

    Raises:
        ValueError: logits where there should be none or the reverse, differences above the tolerances.
    """
    losses, gradients, operations = [], [], []
    for model, layer in (
        (pair.native, pair.native.model.multi_modal_projector.linear_1),
        (pair.ours, pair.ours.vision_encoder.projector.projection[0]),
    ):
        model.zero_grad()
        counter: Any = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with counter:
            output = training_step(model, pair.inputs, pair.labels)
        operations.append(counter.get_total_flops() / 1e9)
        losses.append(output.loss.item())
        gradients.append(layer.weight.grad.clone())
    if ("logits" not in output) != at_labels:
        raise ValueError(f"loss_at_labels is {at_labels}, but logits are {'absent' if not at_labels else 'there'}.")
    gaps = {
        "loss_relative_difference": abs(losses[1] - losses[0]) / abs(losses[0]),
        "gradient_relative_difference": ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item(),
    }
    allowed = (LOSS_TOLERANCE, GRADIENT_TOLERANCE) if at_labels else (0.0, 0.0)
    if any(not gap <= most for gap, most in zip(gaps.values(), allowed, strict=True)):
        raise ValueError(f"The training steps of the two models differ: {gaps}, at most {allowed} is allowed.")
    return gaps | {"native_gflop": operations[0], "ours_gflop": operations[1]}
