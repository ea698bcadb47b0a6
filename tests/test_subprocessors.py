"""Processors of single modalities: taken out of larger ones, run, described and built again."""

import json

import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPProcessor, WhisperProcessor

from cornstarch_hf.subprocessors import (
    build_subprocessor,
    describe_subprocessor,
    resolve_subprocessor,
    run_subprocessor,
    sampling_rate_of,
)

KINDS = {"vision": "image", "audio": "audio", "protein": "text"}


def whole():
    tokenizer = tiny.tokenizer()
    return CLIPProcessor(tiny.clip_processor(), tokenizer), WhisperProcessor(tiny.whisper_processor(), tokenizer)


def test_parts_are_taken_out_of_processors_of_several():
    clip, whisper = whole()
    assert (
        resolve_subprocessor(clip, "image", "vision")
        is resolve_subprocessor(clip, "video", "v")
        is clip.image_processor
    )
    assert resolve_subprocessor(whisper, "audio", "audio") is whisper.feature_extractor
    assert resolve_subprocessor(clip, "text", "words") is clip.tokenizer
    with pytest.raises(TypeError, match="audio: CLIPProcessor has no part for the kind 'audio'"):
        resolve_subprocessor(clip, "audio", "audio")
    for wrong in (tiny.CLIPImageProcessorPil, None, "a/b", 3):
        with pytest.raises(TypeError, match="vision: expected an image processor, feature extractor or tokenizer"):
            resolve_subprocessor(wrong, "image", "vision")


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_a_run_is_the_processors_own(key):
    name, build, make, item = tiny.ENCODERS[key]
    processor, items = make(), [item(0), item(1)]
    options = {"sampling_rate": 16_000} if name == "audio" else {}
    found = run_subprocessor(processor, name, KINDS[name], items, options, build().config)
    more = {"padding": True, "return_attention_mask": True} if key == "wav2vec2" else {}
    expected = processor(items, return_tensors="pt", **options, **more)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)


def test_sequences_are_padded_with_a_mask():
    proteins = run_subprocessor(tiny.protein_tokenizer(), "protein", "text", ["LAG", "L"], {}, tiny.esm().config)
    assert proteins["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    items = [tiny.sound(0, 400), tiny.sound(1, 100)]
    waves = run_subprocessor(
        tiny.wav2vec2_processor(), "audio", "audio", items, {"sampling_rate": 16_000}, tiny.wav2vec2().config
    )
    assert waves["attention_mask"].sum(-1).tolist() == [400, 100]


def test_grey_encoders_get_grey_images():
    processor = tiny.clip_processor(do_normalize=False, do_convert_rgb=False)
    config = tiny.clip(num_channels=1).config
    found = run_subprocessor(processor, "vision", "image", [tiny.image()], {}, config)
    assert found["pixel_values"].shape == (1, 1, 8, 8)


def test_items_are_checked_by_name_and_position():
    with pytest.raises(ValueError, match="vision, item 1: .*empty"):
        items = [tiny.image(), np.zeros((0, 4, 3), np.uint8)]
        run_subprocessor(tiny.clip_processor(), "vision", "image", items, {}, tiny.clip().config)
    with pytest.raises(ValueError, match="audio, item 0: .*8000 Hz.*16000 Hz"):
        run_subprocessor(tiny.whisper_processor(), "audio", "audio", [tiny.sound()], {"sampling_rate": 8000}, None)
    with pytest.raises(ValueError, match=r"smell: its processor gave no tensors, but \['notes'\]"):
        run_subprocessor(lambda items, return_tensors: {"notes": items}, "smell", "smell", ["x"], {}, None)


def test_other_callables_get_their_items_by_keyword_or_position():
    class Videos:
        def __call__(self, videos, return_tensors=None, scale=1):
            return {"pixel_values_videos": scale * torch.tensor(videos)}

    assert run_subprocessor(Videos(), "clip", "video", [1, 2], {"scale": 3}, None)["pixel_values_videos"].tolist() == [
        3,
        6,
    ]
    series = run_subprocessor(
        lambda x, return_tensors: {"past_values": torch.tensor(x)}, "t", "time", [[1.0]], {}, None
    )
    assert series["past_values"].tolist() == [[1.0]]


@pytest.mark.parametrize("key", [key for key in tiny.ENCODERS if key != "esm"])
def test_descriptions_are_json_and_build_the_same_processor(key):
    processor = tiny.ENCODERS[key][2]()
    described = json.loads(json.dumps(describe_subprocessor(processor, "x")))
    again = build_subprocessor(described, "x")
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    assert sampling_rate_of(again) == (16_000 if tiny.ENCODERS[key][0] == "audio" else None)


def test_what_has_no_description():
    assert describe_subprocessor(tiny.protein_tokenizer(), "protein") is None
    with pytest.raises(ValueError, match="smell: function cannot be saved"):
        describe_subprocessor(lambda items: {}, "smell")
    for described, message in (
        ({}, r"x: expected one of \('image_processor_type'.*got \[\]"),
        ({"image_processor_type": "A", "feature_extractor_type": "B"}, "expected one of"),
        ({"image_processor_type": "LlamaModel"}, "x: 'LlamaModel' is no image processor"),
    ):
        with pytest.raises(ValueError, match=message):
            build_subprocessor(described, "x")


def test_sounds_are_cut_only_where_the_caller_asks_for_it():
    extractor = tiny.whisper_processor()
    sounds = [np.zeros(extractor.n_samples + extra, np.float32) for extra in (0, 1)]
    call = {"sampling_rate": 16_000}
    assert run_subprocessor(extractor, "audio", "audio", sounds[:1], call, None)
    message = (
        rf"audio, item 1: the waveform has {len(sounds[1])} samples, but WhisperFeatureExtractor keeps {len(sounds[0])}"
    )
    with pytest.raises(ValueError, match=message):
        run_subprocessor(extractor, "audio", "audio", sounds, call, None)
    assert run_subprocessor(extractor, "audio", "audio", sounds, call | {"truncation": True}, None)
