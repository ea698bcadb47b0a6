"""What is put into a random call so that it must be refused, and who must be named.  A plain module, no tests."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fuzz_calls import Call, Wrong
from fuzz_forms import UNUSABLE


def spoil(call: Call) -> None:
    """Make a call wrong in one way (in place)."""
    ways = [_item, _item, _placeholder, _option] if call.turns is None else [_item, _option]
    call.chance.choice(ways)(call)


def _item(call: Call) -> None:
    filled = [(slot, i) for slot, rows in call.forms.items() for i, row in enumerate(rows) if row]
    if not filled:
        return _option(call)
    slot, sample = call.chance.choice(filled)
    position, kind = call.chance.randrange(len(call.forms[slot][sample])), call.kind(slot)
    what = call.chance.choice(list(UNUSABLE[kind]))
    call.forms[slot][sample][position] = UNUSABLE[kind][what]()
    number = sum(map(len, call.forms[slot][:sample])) + position
    call.wrong = Wrong(f"{kind}: {what}", call.slots[slot][0], sample, number)


def _placeholder(call: Call) -> None:
    """One placeholder more, or one less, than there are items."""
    slot, sample = call.chance.choice(list(call.slots)), call.chance.randrange(len(call.samples))
    written = [s for s in call.samples[sample] if not isinstance(s, str) and s[0] == slot]
    if written and call.chance.random() < 0.5:
        call.samples[sample].remove(written[-1])
    else:
        call.samples[sample].append((slot, 0))
    call.wrong = Wrong("placeholders", call.slots[slot][0], sample)


def _put(key: str, value: Any) -> Callable[[dict], dict]:
    return lambda keywords: {**keywords, key: value}


# Keywords that must be refused: a word of the message, and the value.
OPTIONS: list[tuple[str, str, Any]] = [
    ("unknown", "unknown_keyword", 5),
    ("unknown_option", "text_kwargs", {"unknown_option": 5}),
    ("unknown_option", "llm_inputs", {"unknown_option": 5}),
    ("unknown_option", "common_kwargs", {"unknown_option": 5}),
    ("missing", "encoder_inputs", {"missing": {"images": []}}),
    *((key, key, value) for key in ("text_kwargs", "common_kwargs") for value in (5, "x", [1], ())),
    *((key, key, value) for key in ("encoder_inputs", "llm_inputs") for value in (5, "x", [1])),
    *(("padding", "padding", value) for value in ("sideways", 5, [])),
    *(("padding_side", "padding_side", value) for value in ("middle", 5, "")),
    *(("truncation", "truncation", value) for value in ("sometimes", 5, [])),
    *(("return_tensors", "return_tensors", value) for value in ("xx", 5, "tf")),
    *((key, key, value) for key in ("max_length", "pad_to_multiple_of") for value in (0, -8, 5.5, "long", True)),
    *((key, key, "x") for key in ("add_special_tokens", "split_special_tokens", "return_offsets_mapping")),
    *((key, key, 5) for key in ("return_attention_mask", "return_token_type_ids", "return_mm_token_type_ids")),
]  # fmt: skip
TEXTS: list[Any] = [
    5,
    [5],
    [None],
    b"text",
    {"a": "b"},
    [["text"]],
    [],
    np.array(["text"]),
    torch.tensor([1]),
    object(),
]
# Of the kind's processors, and named with the modality.
OF_KINDS: dict[str, list[tuple[str, Any]]] = {
    "image": [("do_rescale", 5), ("do_normalize", "x"), ("size", -1), ("image_mean", float("nan")), ("input_data_format", "none")],
    "audio": [("max_length", 0), ("pad_to_multiple_of", 0), ("return_attention_mask", "x"), ("unknown_option", 5)],
    "text": [("max_length", -1), ("padding", "sideways"), ("truncation", 5), ("padding_side", "middle")],
    "features": [("sampling_rate", 16_000)],
    "time": [("sampling_rate", 16_000)],
}  # fmt: skip
OF_KINDS["video"] = [*OF_KINDS["image"], ("num_frames", 0), ("fps", "x")]
# Of these the value alone is judged: done or refused, by ValueError or TypeError.
EITHER: list[tuple[str, Any]] = [
    ("stride", 3), ("padding", None), ("truncation", None),
    ("return_attention_mask", False), ("return_offsets_mapping", True), ("split_special_tokens", True),
    ("return_tensors", None), ("text_kwargs", None), ("encoder_inputs", {}), ("llm_inputs", {}), ("images", []), ("audio", [[]]),
    ("videos", ()), ("sampling_rate", "16000"), ("sampling_rate", 16000.0), ("sampling_rate", None), ("sampling_rate", -1),
    ("images_kwargs", {"unknown_option": 1}), ("videos_kwargs", {"do_rescale": False}), ("audio_kwargs", None), ("padding", "do_not_pad"),
]  # fmt: skip


def _option(call: Call) -> None:
    draw = call.chance.random()
    if draw < 0.2:
        name, part = call.chance.choice(list(call.world.parts.items()))
        key, value = call.chance.choice(OF_KINDS[part.kind])
        # Without an item of it nobody looks at values, but at names.
        used = any(call.forms[slot] and any(call.forms[slot]) for slot, names in call.slots.items() if name in names)
        found = Wrong(f"{name}: {key}={value!r}", words=name) if used else Wrong(f"maybe {name}: {key}={value!r}")
        call.wrong, change = (
            found,
            lambda given: given | {f"{name}_kwargs": given.get(f"{name}_kwargs", {}) | {key: value}},
        )
    elif draw < 0.45:
        word, key, value = call.chance.choice(OPTIONS)
        call.wrong, change = Wrong(f"{key}={value!r}", words=word), _put(key, value)
    elif draw < 0.6 and call.turns is None:
        value = call.chance.choice(TEXTS)
        call.wrong, change = Wrong(f"text={value!r}", words="text"), _put("text", value)
    else:
        key, value = call.chance.choice(EITHER)
        call.wrong, change = Wrong(f"maybe {key}={value!r}"), _put(key, value)
    call.change = change
