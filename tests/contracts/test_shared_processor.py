"""One processor that several threads use: each gets what it would get alone."""

import sys
import threading

import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import AutoProcessor

from cornstarch_hf import MultimodalCollator
from cornstarch_hf.encoders import counting as feature_counts


@pytest.fixture
def often():
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*works, times=40):
    """What each work gives in each of its turns, by a thread of its own."""
    found, failed = [[] for _ in works], []

    def repeat(i):
        try:
            for _ in range(times):
                found[i].append(works[i]())
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    return found


def test_typed_text_and_special_tokens_do_not_mix(often):
    _, processor = compose_tiny(["clip"])
    token, image = processor.tokens["vision"], tiny.image(0)
    said = [{"type": "image", "image": image}, {"type": "text", "text": f"typed {token} </s> here"}]
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": "yes </s>"}]
    collator = MultimodalCollator(processor)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    works = [
        lambda: dict(processor.apply_chat_template(chat, **options)),
        lambda: dict(processor(text=f"<s> a {token} b </s>", images=image)),
        lambda: dict(processor(text=f"a {token} b c d", images=image, max_length=9, truncation=True)),
        lambda: collator([{"messages": chat}, {"text": f"{token} a", "images": [image]}]),
    ]
    expected = [work() for work in works]
    for wanted, results in zip(expected, together(*works), strict=True):
        for got in results:
            assert got.keys() == wanted.keys()
            assert all(torch.equal(torch.as_tensor(got[key]), torch.as_tensor(wanted[key])) for key in got)


@pytest.mark.parametrize("key", ["clip", "convnext", "wav2vec2", "qwen2_vl"])
def test_first_counts_build_an_encoder_once_and_are_right(key, often, tmp_path, monkeypatch):
    name, *_, item = tiny.ENCODERS[key]
    _, processor = compose_tiny([key])
    options = {"sampling_rate": 16_000} if name == "audio" else {}

    def count(one, i):
        return one(text=f"a {one.tokens[name]}", **{name: item(i)}, **options)["input_ids"]

    expected = [count(processor, i) for i in range(8)]
    processor.save_pretrained(tmp_path)
    built, build = [], feature_counts.build_encoder
    monkeypatch.setattr(feature_counts, "build_encoder", lambda *a: built.append(a[1]) or build(*a))
    shared = AutoProcessor.from_pretrained(tmp_path)
    found = together(*[lambda i=i: count(shared, i) for i in range(8)], times=3)
    assert found == [[ids] * 3 for ids in expected]
    assert len(built) == len(shared.counter._probes) <= 2
