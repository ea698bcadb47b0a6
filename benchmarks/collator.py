"""The collator: rows of many turns against few, and batches against the processor alone on the same rows."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from cornstarch_hf import MultimodalCollator, MultimodalProcessor

from .models import build_pair
from .processors import BATCH, build_processors
from .results import Result, Target, in_turn
from .sizes import QUICK, Sizes
from .timing import elapsed, one_thread, quiet

FEW, MANY = 64, 256  # turns of a row
GROWTH, BESIDE_PROCESSOR = 5, 1.2  # the row of many by that of few turns; collator / processor
ASKED, ANSWERED = "what is in this picture, and where?", "a quick brown fox jumps over the lazy dog"
# As ChatML, and without generation marks: what the assistant wrote has to be found.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(turns: int, *first: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of so many turns, users' and assistant's in turn; the first one has further parts in front."""
    made: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": (ASKED, ANSWERED)[i % 2]} for i in range(turns)
    ]
    if first:
        made[0]["content"] = [*first, {"type": "text", "text": ASKED}]
    return made


def build(sizes: Sizes) -> MultimodalProcessor:
    """A processor of a model of one layer: of a model nothing but the number of an image's features is asked here."""
    own = replace(sizes, vision=sizes.vision | {"num_hidden_layers": 1}, text=QUICK.text)
    processor = build_processors(build_pair(own, QUICK.vocabularies[0]), own)[1]
    processor.chat_template = TEMPLATE
    return processor


def collator(sizes: Sizes) -> list[Result]:
    """CPU time, each in turn with what it is compared to; the columns of both stand for native and ours."""
    processor = build(sizes)
    collate = MultimodalCollator(processor)
    goals = (Target(at_most=GROWTH), Target(at_most=BESIDE_PROCESSOR)) if sizes.judged else (None, None)
    few, many = ([{"messages": talk(turns)}] for turns in (FEW, MANY))
    pairs = sizes.pairs["collator"]
    with quiet(), one_thread():
        grown = in_turn(lambda: _seconds(lambda: collate(few)), lambda: _seconds(lambda: collate(many)), pairs)
        found = [Result("collator", f"collator, a row of {MANY} turns against one of {FEW}", "CPU s", *grown, goals[0])]
        for name, rows, goal, options in (
            ("images", rows_of_images(sizes), goals[1], {}),
            ("8 turns of text", rows_of_text(), goals[1], {"return_assistant_tokens_mask": True}),
            ("8 turns of text, which the processor does not mark", rows_of_text(), None, {}),
        ):
            samples = _beside_processor(processor, collate, rows, pairs, options)
            name = f"collator against processor, {BATCH} rows of {name}"
            found.append(Result("collator", name, "CPU s", *samples, goal))
    return found


def rows_of_images(sizes: Sizes) -> list[dict[str, Any]]:
    """A photograph and two turns in each."""
    width, height = sizes.image
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, height, width, 3), dtype=np.uint8)
    return [{"messages": talk(2, {"type": "image", "image": Image.fromarray(x)})} for x in pixels]


def rows_of_text() -> list[dict[str, Any]]:
    """Eight turns in each."""
    return [{"messages": talk(8)} for _ in range(BATCH)]


def _seconds(run: Callable[[], Any]) -> float:
    return elapsed(run, time.process_time)


def _beside_processor(
    processor: MultimodalProcessor,
    collate: MultimodalCollator,
    rows: list[dict[str, Any]],
    pairs: int,
    more: dict[str, Any],
) -> tuple[list[float], list[float]]:
    messages = [row["messages"] for row in rows]
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True} | more
    return in_turn(
        lambda: _seconds(lambda: processor.apply_chat_template(messages, **options)),
        lambda: _seconds(lambda: collate(rows)),
        pairs,
    )
