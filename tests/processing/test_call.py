"""Arguments of a processor's call, sorted by whom they are for; placeholders, items and features counted against each other."""

import pytest
import tiny
from helpers import compose_tiny

from cornstarch_hf.processing.call import (
    PLURALS,
    TEXT_OPTIONS,
    call_arguments,
    check_items,
    encode_texts,
    media_arguments,
    text_arguments,
)

TOKENS = {"vision": "<image>", "audio": "<audio>"}


@pytest.fixture(scope="module")
def processor():
    return compose_tiny(["clip", "whisper"])[1]


def sorted_media(processor, encoder_inputs=None, images=None, audio=None, **kwargs):
    by_kind = {"images": images, "videos": None, "audio": audio}
    found = media_arguments(processor.config, processor.processors, by_kind, encoder_inputs, kwargs)
    return found, kwargs


def test_the_arguments_are_those_of_the_call(processor):
    names = call_arguments(processor.config, processor.processors)
    assert names == sorted(names) and {*PLURALS.values(), *TEXT_OPTIONS, "vision", "vision_kwargs"} <= set(names)
    assert {"do_rescale", "size", "images_kwargs", "common_kwargs"} <= set(names) and "num_frames" not in names


def test_text_and_options_are_told_apart():
    kwargs = {"padding": True, "vision": 1, "text_kwargs": {"split_special_tokens": True}}
    given = {"text": "a", "max_length": 5, "item_lengths": True, "truncation": True}
    text, options, internal = text_arguments(None, given, kwargs, tiny.tokenizer())
    assert text == "a" and kwargs == {"vision": 1}
    assert options == {"padding": True, "split_special_tokens": True, "max_length": 5, "truncation": True}
    assert internal == {"assistant_spans": None, "item_lengths": True}
    with pytest.raises(ValueError, match="text was given twice"):
        text_arguments("a", {"text": "b"}, {}, tiny.tokenizer())
    with pytest.raises(TypeError, match="Unknown arguments for the tokenizer: \\['evil'\\]"):
        text_arguments("a", {"evil": 1}, {}, tiny.tokenizer())


def test_items_and_options_of_each_modality(processor):
    encoder_inputs = {"audio": {"raw_speech": [2], "truncation": True}}
    found, rest = sorted_media(processor, images=[1], encoder_inputs=encoder_inputs, sampling_rate=8)
    expected = {"vision": {"items": [1]}, "audio": {"items": [2], "truncation": True, "sampling_rate": 8}}
    assert found == expected and rest == {}
    with pytest.raises(TypeError, match=r"Unknown arguments \['other'\], this processor takes \[.*'vision_kwargs'\]"):
        sorted_media(processor, images=[1], other=4)
    both = {"images_kwargs": {"do_resize": False}, "do_rescale": False, "audio_kwargs": {"padding": "longest"}}
    only = {"vision": {"items": [1], "do_resize": False, "do_rescale": False}}
    assert sorted_media(processor, vision=[1], **both)[0] == only


def test_items_that_were_given_twice_or_for_nobody(processor):
    for given in ({"vision": [1]}, {"encoder_inputs": {"vision": {"images": [1]}}}):
        with pytest.raises(ValueError, match="vision: its items were given twice"):
            sorted_media(processor, images=[1], **given)
    with pytest.raises(ValueError, match="'smell' is no modality of this model"):
        sorted_media(processor, encoder_inputs={"smell": {}})


@pytest.mark.parametrize(
    ("texts", "counts", "samples", "match"),
    [
        (["<image>"], {"vision": 2}, {}, r"vision: the texts have 1 placeholders <image> \[1\], but 2 items"),
        (
            ["<image>", ""],
            {"vision": 1},
            {"vision": [0, 1]},
            "vision, sample 0: the text has 1 placeholders <image>, but 0",
        ),
        (["", ""], {}, {"audio": [0]}, "audio: items were given for 1 samples, but there are 2 texts"),
    ],
)
def test_placeholders_and_items_that_do_not_fit(texts, counts, samples, match):
    with pytest.raises(ValueError, match=match):
        check_items(texts, TOKENS, {"vision": 0, "audio": 0} | counts, samples)


def test_texts_get_a_placeholder_for_each_feature(processor):
    tokens, ids = processor.tokens, processor.placeholder_ids
    lengths = {"vision": [3], "audio": []}
    data = encode_texts(processor.tokenizer, ["a" + tokens["vision"]], tokens, ids, lengths, {"return_tensors": "pt"})
    assert (data["input_ids"] == ids["vision"]).sum() == 3 and data["attention_mask"].shape == data["input_ids"].shape
    with pytest.raises(
        ValueError, match="vision, sample 0: 3 features need as many placeholder tokens .* but 1 are left"
    ):
        short = {"truncation": True, "max_length": len(tiny.tokenizer()("a")["input_ids"]) + 1}
        encode_texts(processor.tokenizer, ["a" + tokens["vision"]], tokens, ids, lengths, short)
