"""Four turns about one image, continued behind its cache, against each turn from the start, which encodes it four times."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cornstarch_hf.parts.versions import CACHE

from .models import Pair, build_inputs, image_token
from .results import Result, Target, in_turn
from .sizes import Sizes
from .timing import one_thread, quiet

TURNS, WORDS, ANSWER = 4, 12, 6  # turns, tokens that each adds, tokens that are answered


class Watched:
    """Calls of an encoder and the CPU seconds that they take, from when it is entered."""

    def __init__(self, encoder: Any):
        self.encoder = encoder
        self.taken: list[float] = []
        self.started = 0.0

    def __enter__(self) -> "Watched":
        self.hooks = [self.encoder.register_forward_pre_hook(self.start), self.encoder.register_forward_hook(self.end)]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def start(self, *_: Any) -> None:
        self.started = time.process_time()

    def end(self, *_: Any) -> None:
        self.taken.append(time.process_time() - self.started)


@torch.no_grad()
def talk(model: Any, vocabulary: int, sizes: Sizes, continued: bool) -> tuple[Tensor, list[int], float, float]:
    """One conversation.

    Returns:
        all its ids ``(1, length)``, calls of the encoder in each turn, CPU seconds of the encoder and of the whole.
    """
    inputs, _ = build_inputs(sizes, vocabulary, batch=1)
    ids, cache, calls, encoding = inputs["input_ids"], None, [], 0.0
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
    options |= {"return_dict_in_generate": True, "suppress_tokens": [image_token(vocabulary)]}
    generator = torch.Generator().manual_seed(2)
    start = time.process_time()
    for _ in range(TURNS):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
        with Watched(model.vision_encoder.module) as watched:
            answer = model.generate(**given, **options, **({CACHE: cache} if cache is not None else {}))
        calls.append(len(watched.taken))
        encoding += sum(watched.taken)
        cache = answer[CACHE] if continued else None
        ids = torch.cat(
            [answer.sequences, torch.randint(3, image_token(vocabulary), (1, WORDS), generator=generator)], 1
        )
    return ids, calls, encoding, time.process_time() - start


def chat(pair: Pair, sizes: Sizes) -> list[Result]:
    """Calls of the encoder, its CPU time, and that of the whole conversation.

    Raises:
        ValueError: the two ways answer other tokens.
    """
    own = replace(sizes, batch=1)
    said: dict[bool, Tensor] = {}
    taken: dict[bool, list[tuple[list[int], float, float]]] = {False: [], True: []}

    def once(continued: bool) -> float:
        said[continued], calls, encoding, whole = talk(pair.ours, pair.vocabulary, own, continued)
        taken[continued].append((calls, encoding, whole))
        return whole

    with one_thread(), quiet():
        whole = in_turn(lambda: once(False), lambda: once(True), sizes.pairs["chat"])
    if not torch.equal(said[False], said[True]):
        raise ValueError(f"Continued and from the start the model answers other tokens: {said}.")
    calls = {key: runs[-1][0] for key, runs in taken.items()}
    anew, kept = ([run[1] for run in runs[1:]] for runs in taken.values())  # the first of each warms up
    goal = Target(at_most=1 / TURNS) if sizes.judged else None
    name = f"a chat of {TURNS} turns about one image, continued against anew"
    counts = [float(sum(calls[False]))], [float(sum(calls[True]))]
    notes = {"anew": calls[False], "continued": calls[True]}  # turn by turn
    return [
        Result("chat", f"calls of the encoder, {name}", "calls", *counts, goal, notes),
        Result("chat", f"its encoding, {name}", "CPU s", anew, kept),
        Result("chat", name, "CPU s", *whole),
    ]
