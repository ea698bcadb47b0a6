"""Graphs that torch.compile makes over several lengths and numbers of images, counted; nothing is timed."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch._dynamo.testing import CompileCounter

from .models import Pair, build_inputs, build_pair, image_token, set_trainable
from .results import Result
from .sizes import QUICK, Sizes

LENGTHS, IMAGES, TOKENS, LABELLED = (8, 9, 17, 33), (1, 2, 3, 5), 12, 4


def graphs(sizes: Sizes) -> list[Result]:
    """Graphs of forward passes, of training steps and of decoded tokens with a static cache, of both models."""
    pair = build_pair(QUICK, QUICK.vocabularies[0])
    # one of each shows that all runs
    few = len(LENGTHS) if sizes.judged else 1
    shapes = list(itertools.product(LENGTHS[:few], IMAGES[:few]))
    found = [_result("forward", [_graphs(model, shapes, pair) for model in (pair.native, pair.ours)], shapes)]
    for model in (pair.native, pair.ours):
        set_trainable(model, "projector")
    native = _graphs(pair.native, shapes, pair)
    for pair.ours.config.loss_at_labels in (False, True):
        name = "training at labels" if pair.ours.config.loss_at_labels else "training, all logits"
        found.append(_result(name, [native, _graphs(pair.ours, shapes, pair)], shapes))
    for model in (pair.native, pair.ours):
        model.eval()
    decoded = [_decoding(model, pair) for model in (pair.native, pair.ours)]
    found.append(_result("decode with a static cache", decoded, [TOKENS]))
    torch._dynamo.reset()
    return found


def _result(name: str, counts: list[tuple[int, str]], over: Any) -> Result:
    (native, one), (ours, other) = counts
    notes = {"over": list(over), "native_whole_graph": one or True, "ours_whole_graph": other or True}
    whole = "" if not one + other else ", not as one graph each"
    return Result(
        "graphs", f"graphs of torch.compile, {name}{whole}", "graphs", [float(native)], [float(ours)], notes=notes
    )


def counted(run: Callable[[Any], Any], forward: Any) -> tuple[int, str]:
    """Graphs that are made while a compiled `forward` is used by `run`.

    Returns:
        the number, and why the whole of a call is not one graph, empty where it is: graphs are counted with breaks then.
    """
    reason = ""
    for whole in (True, False):
        torch._dynamo.reset()
        counter = CompileCounter()
        try:
            run(torch.compile(forward, backend=counter, fullgraph=whole))
            break
        except UserError as error:
            if not whole:
                raise
            reason = str(error).splitlines()[0]
    return counter.frame_count, reason


def _inputs(length: int, images: int, pair: Pair) -> tuple[dict[str, Tensor], Tensor]:
    """One row with so many tokens of text and images."""
    row, _ = build_inputs(QUICK, pair.vocabulary, batch=1)
    token = image_token(pair.vocabulary)
    text = torch.arange(3, 3 + length)[None]
    ids = torch.cat([torch.full((1, QUICK.image_tokens * images), token), text], 1)  # (1, features and text)
    labels = ids.clone()
    labels[:, :-LABELLED] = -100
    pixels = row["pixel_values"].repeat(images, 1, 1, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}, labels


def _graphs(model: Any, shapes: list[tuple[int, int]], pair: Pair) -> tuple[int, str]:
    def run(compiled: Any) -> None:
        for length, images in shapes:
            inputs, labels = _inputs(length, images, pair)
            if model.training:
                compiled(**inputs, labels=labels).loss.backward()
            else:
                with torch.no_grad():
                    compiled(**inputs, use_cache=False)

    return counted(run, model)


def _decoding(model: Any, pair: Pair) -> tuple[int, str]:
    """`generate` with a static cache; steps of one token are compiled, as `generate` does it on a GPU."""
    inputs, _ = build_inputs(QUICK, pair.vocabulary, batch=1)
    options = {"do_sample": False, "cache_implementation": "static", "disable_compile": True}
    plain = model.forward

    def run(compiled: Any) -> None:
        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            one = kwargs["input_ids"] is not None and kwargs["input_ids"].shape[1] == 1
            return (compiled if one else plain)(*args, **kwargs)

        model.forward = forward
        try:
            model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)
        finally:
            del model.forward

    return counted(run, plain)
