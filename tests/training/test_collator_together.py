"""Rows that the processor takes in one call: the batch is, to the bit, that of rows which are encoded one by one."""

import io

import numpy as np
import pytest
import tiny
import torch
from helpers import compose_tiny
from templates import STRINGS

from cornstarch_hf import MultimodalCollator, MultimodalProcessor
from cornstarch_hf.training import collator as module

MARKED = STRINGS.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")


def picture(seed, kind="pil"):
    found = tiny.image(seed, (20 + seed, 30))
    if kind == "bytes":
        file = io.BytesIO()
        found.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}
    return {"pil": found, "array": np.asarray(found), "tensor": torch.tensor(np.asarray(found))}[kind]


def talk(seed, items=1, kind="pil"):
    media = [{"type": "image", "image": picture(seed + i, kind)} for i in range(items)]
    said = [{"type": "text", "text": f"what is it {seed}"}, *media]
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": f"a fox {seed}"}]}


ROWS = {
    "pictures": [talk(i) for i in range(4)],
    "some of them": [talk(0, 0), talk(1, 2), talk(2), talk(3, 0), talk(4, 3)],
    "none": [talk(i, 0) for i in range(3)],
    "arrays": [talk(0, kind="array"), talk(1, kind="tensor"), talk(2, kind="bytes")],
    "texts": [{"text": "see <image> it", "images": [picture(0)]}, {"text": "none"}, {"text": "a <image>", "images": [picture(1)]}],
    "prompts": [{"prompt": "<image> a", "completion": " b c", "image": picture(i)} for i in range(3)],
    "columns": [{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, {"role": "assistant", "content": "w"}], "images": [picture(i)]} for i in range(3)],
}  # fmt: skip
OPTIONS = {
    "plain": {},
    "left": {"padding_side": "left", "pad_to_multiple_of": 8},
    "cut": {"max_length": 34, "truncation": "right"},
    "long": {"max_length": 500, "processor_kwargs": {"images_kwargs": {"do_normalize": False}}},
}


def called(monkeypatch, processor):
    """How many texts each call of the processor got."""
    calls, original = [], MultimodalProcessor.__call__

    def counted(self, *args, **kwargs):
        calls.append(len(kwargs["llm_inputs"]["text"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MultimodalProcessor, "__call__", counted)
    return calls


def equal(found, expected):
    return {*found} == {*expected} and all(
        torch.equal(found[k], x) and found[k].dtype == x.dtype for k, x in expected.items()
    )


def both(monkeypatch, collator, rows):
    found = collator(rows)
    with monkeypatch.context() as patch:
        patch.setattr(module, "are_alike", lambda *given: False)
        expected = collator(rows)
    assert equal(found, expected)
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("template", [STRINGS, MARKED])
@pytest.mark.filterwarnings("ignore:.*were longer than max_length")
def test_one_call_gives_what_single_rows_give(monkeypatch, rows, options, template):
    _, processor = compose_tiny(["clip"])
    processor.chat_template = template
    calls, collator = called(monkeypatch, processor), MultimodalCollator(processor, **OPTIONS[options])
    both(monkeypatch, collator, ROWS[rows])
    assert calls == [len(ROWS[rows]), *[1] * len(ROWS[rows])]


@pytest.mark.parametrize("key", ["siglip", "dinov2", "convnext", "qwen2_vl"])
def test_other_encoders(monkeypatch, key):
    _, processor = compose_tiny({"vision": key})
    processor.chat_template = STRINGS
    calls = called(monkeypatch, processor)
    both(monkeypatch, MultimodalCollator(processor), ROWS["some of them"])
    assert calls == ([5] if key != "qwen2_vl" else [1] * 5) + [1] * 5  # packed patches are joined row by row


def test_what_may_differ_in_a_batch_is_encoded_row_by_row(monkeypatch):
    _, processor = compose_tiny(["clip", "whisper"])
    processor.chat_template = STRINGS
    calls, collator = called(monkeypatch, processor), MultimodalCollator(processor)
    sound = {"type": "audio", "audio": tiny.sound(0)}
    heard = {"messages": [{"role": "user", "content": [sound]}, {"role": "assistant", "content": "w"}]}
    file = io.BytesIO(picture(0, "bytes")["bytes"])  # which can be read once
    streamed = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": file}]},
            {"role": "assistant", "content": "w"},
        ]
    }
    for rows in ([talk(0), heard], [talk(0), streamed], [talk(0), {"text": "all of it"}]):
        calls.clear()
        collator(rows)
        assert calls == [1, 1]
    calls.clear()
    assert equal(collator([talk(0), talk(1)]), collator([talk(0), talk(1)])) and calls == [2, 2]


def test_a_row_that_is_refused_is_named(monkeypatch):
    _, processor = compose_tiny(["clip"])
    processor.chat_template = STRINGS
    collator = MultimodalCollator(processor, max_length=40)
    bad = talk(1)
    bad["messages"][0]["content"][1]["image"] = np.zeros((0, 3, 3), np.uint8)
    with pytest.raises(ValueError, match="row 2: vision, item 0: the image is empty"):
        collator([talk(0), talk(3), bad])
    with pytest.raises(ValueError, match="row 1: there is no token to learn"):
        collator([talk(0), {"messages": talk(1)["messages"][:1]}])
    with pytest.raises(ValueError, match="row 1: the row has .* tokens, max_length is 40"):
        collator([talk(0), talk(1, 9)])
    with pytest.raises(TypeError, match="row 0: expected a dict of columns, got str"):
        collator(["text"])


def test_a_batch_shares_nothing_with_a_row_that_a_caller_has():
    _, processor = compose_tiny(["clip"])
    processor.chat_template = STRINGS
    collator = MultimodalCollator(processor)
    first, second = collator([talk(0), talk(1)]), collator([talk(0), talk(1)])
    first["pixel_values"].zero_()
    assert second["pixel_values"].abs().sum() > 0 and first["pixel_values"].is_contiguous()
