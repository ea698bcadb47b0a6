"""Every keyword of everything that the processor wraps: it changes what a call gives, or raises, or the table says why neither."""

import copy
import functools
import inspect
import re

import numpy as np
import pytest
import tiny
import torch
from helpers import compose_tiny
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import AudioKwargs, ImagesKwargs, ProcessingKwargs, TextKwargs, VideosKwargs

from cornstarch_hf import compose
from cornstarch_hf.processing.call import TEXT_OPTIONS, call_arguments, options_of

SIZES = [(20, 30), (14, 9)]
TEXT = "the quick brown fox {} jumps over the lazy dog </s>"
ENCODERS = ["clip", "siglip", "convnext", "qwen2_vl", "whisper", "wav2vec2", "esm"]
# Another value than the default's, with the switch that it needs; those of a table of one encoder come first.
VALUES = {
    "do_convert_rgb": {"do_convert_rgb": False}, "do_resize": {"do_resize": False}, "size": {"size": {"shortest_edge": 12}},
    "default_to_square": {"size": 12, "default_to_square": False}, "crop_size": {"do_center_crop": True, "crop_size": 6},
    "resample": {"resample": 0}, "do_rescale": {"do_rescale": False}, "rescale_factor": {"rescale_factor": 0.5},
    "do_normalize": {"do_normalize": False}, "image_mean": {"image_mean": [0.1, 0.2, 0.3]}, "image_std": {"image_std": [1.0, 2.0, 3.0]},
    "do_pad": {"do_pad": True, "pad_size": {"height": 80, "width": 80}}, "pad_size": {"do_pad": True, "pad_size": {"height": 96, "width": 96}},
    "do_center_crop": {"do_center_crop": True, "crop_size": {"height": 5, "width": 5}},
    "data_format": {"data_format": "channels_last"}, "input_data_format": {"input_data_format": "channels_first"},
    "device": {"device": "meta"}, "return_tensors": {"return_tensors": "np"}, "disable_grouping": {"disable_grouping": True},
    "image_seq_length": {"image_seq_length": 3}, "crop_pct": {"crop_pct": 0.5}, "max_pixels": {"max_pixels": 256}, "min_pixels": {"min_pixels": 4096},
    "merge_size": {"merge_size": 1}, "patch_size": {"patch_size": 2}, "temporal_patch_size": {"temporal_patch_size": 1},
    "do_sample_frames": {"do_sample_frames": True}, "video_metadata": {"video_metadata": [{}]}, "fps": {"fps": 2}, "num_frames": {"num_frames": 2},
    "return_metadata": {"return_metadata": True}, "sampling_rate": {"sampling_rate": 8_000}, "raw_speech": {"raw_speech": [0.5]},
    "padding": {"padding": "max_length", "max_length": 900}, "max_length": {"max_length": 900, "padding": "max_length"},
    "truncation": {"truncation": True, "max_length": 12, "padding": True}, "pad_to_multiple_of": {"padding": True, "pad_to_multiple_of": 64},
    "return_attention_mask": {"return_attention_mask": False}, "load_audio_backend": {"load_audio_backend": "soundfile"},
    "add_special_tokens": {"add_special_tokens": False}, "stride": {"stride": 2}, "is_split_into_words": {"is_split_into_words": True},
    "return_token_type_ids": {"return_token_type_ids": True}, "padding_side": {"padding": True, "padding_side": "right"},
    "return_overflowing_tokens": {"return_overflowing_tokens": True}, "return_special_tokens_mask": {"return_special_tokens_mask": True},
    "return_offsets_mapping": {"return_offsets_mapping": True}, "return_length": {"return_length": True}, "verbose": {"verbose": False},
    "return_mm_token_type_ids": {"return_mm_token_type_ids": True}, "return_text_replacement_offsets": {"return_text_replacement_offsets": True},
    "sanitize_control_tokens": {"sanitize_control_tokens": True}, "split_special_tokens": {"split_special_tokens": True},
    "text_pair": {"text_pair": "b"}, "text_target": {"text_target": "b"}, "text_pair_target": {"text_pair_target": "b"},
    "tokenizer_kwargs": {"tokenizer_kwargs": {"padding": True}}, "source_fps": {"source_fps": 3, "fps": 1},
}  # fmt: skip
OF_ONE = {
    ("clip", "do_center_crop"): {"do_center_crop": False},
    ("siglip", "size"): {"size": {"height": 12, "width": 12}},
    ("qwen2_vl", "size"): {"size": {"shortest_edge": 64, "longest_edge": 256}},
    ("qwen2_vl", "do_resize"): {"do_resize": False, "patch_size": 1, "merge_size": 1, "temporal_patch_size": 1, "max_pixels": 256},
    ("whisper", "truncation"): {"truncation": True, "max_length": 1_333},
    ("whisper", "padding"): {"padding": "longest"},
    ("whisper", "max_length"): {"max_length": 4_000},
    ("whisper", "pad_to_multiple_of"): {"padding": "longest", "pad_to_multiple_of": 13_330},
    ("whisper", "do_normalize"): {"do_normalize": True},
    ("whisper", "return_attention_mask"): {"return_attention_mask": True},
    ("wav2vec2", "padding"): {"padding": "max_length", "max_length": 4_000},
    ("wav2vec2", "max_length"): {"padding": "max_length", "max_length": 4_000},
    ("wav2vec2", "pad_to_multiple_of"): {"pad_to_multiple_of": 4_096},
    ("wav2vec2", "truncation"): {"truncation": True, "max_length": 1_000},
    ("esm", "padding"): {"padding": "max_length", "max_length": 30},
    ("esm", "max_length"): {"truncation": True, "max_length": 4},
    ("esm", "truncation"): {"truncation": True, "max_length": 4},
    ("esm", "pad_to_multiple_of"): {"pad_to_multiple_of": 32},
    ("esm", "padding_side"): {"padding_side": "left"},
}  # fmt: skip
# (encoder or None for every one, keyword) -> why it may change nothing.
SAME = {
    (None, "do_convert_rgb"): "images go in with the channels that the encoder takes, of which the conversion leaves RGB alone",
    (None, "input_data_format"): "tells how an array lies, and PIL images have one layout",
    (None, "default_to_square"): "reads a size that is one number, which these processors take in one way only",
    ("convnext", "do_pad"): "transformers' own names it and pads nothing: all come out in one size",
    ("convnext", "pad_size"): "transformers' own names it and pads nothing: all come out in one size",
    (None, "add_special_tokens"): "the tiny tokenizers add none: see the test of one that does",
    ("esm", "split_special_tokens"): "there is no special token in the item",
    ("esm", "return_token_type_ids"): "the encoder takes none",
}  # fmt: skip


@pytest.fixture(scope="module")
def processors():
    return {key: compose_tiny([key])[1] for key in ENCODERS}


def items_of(key):
    if key == "whisper" or key == "wav2vec2":
        return [tiny.sound(0, 1_600), tiny.sound(1, 3_000)]
    return ["MKVL", "MKVLAGSW"] if key == "esm" else [tiny.image(i, size) for i, size in enumerate(SIZES)]


def called(processor, key, **options):
    name = tiny.ENCODERS[key][0]
    texts = [TEXT.format(processor.tokens[name]), processor.tokens[name]]
    rate = {"sampling_rate": 16_000} if name == "audio" and "sampling_rate" not in options else {}
    return processor(text=texts, **{name: items_of(key)}, **rate, **options)


def same(first, second):
    if list(first) != list(second):
        return False
    for a, b in zip(first.values(), second.values(), strict=True):
        if type(a) is not type(b):
            return False
        if isinstance(a, torch.Tensor) and (a.shape != b.shape or not torch.equal(a, b)):
            return False
        if not isinstance(a, torch.Tensor) and not (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b):
            return False
    return True


def changes(processor, key, keyword, how):
    """Whether a keyword changes the outcome beside what its value needs; True where the call raises for it."""
    of_the_text = how == "text" or (how == "flat" and keyword in TEXT_OPTIONS)  # flat ones are the tokenizer's first
    given = VALUES[keyword] if of_the_text else OF_ONE.get((key, keyword), VALUES[keyword])
    needs = {k: v for k, v in given.items() if k != keyword}
    nested = f"{tiny.ENCODERS[key][0]}_kwargs" if how == "part" else "text_kwargs" if how == "text" else None
    wrapped = (lambda options: {nested: options} if options else {}) if nested else dict
    try:
        found = called(processor, key, **wrapped(given))
    except (TypeError, ValueError) as error:
        assert str(error) and "unexpected keyword" not in str(error)
        return True
    try:
        before = called(processor, key, **wrapped(needs))
    except (TypeError, ValueError):  # which needs the keyword
        before = called(processor, key)
    return not same(found, before)


def of_the_part(processor, key):
    """Keywords that the part states itself, and transformers' for its kind."""
    part = processor.processors[tiny.ENCODERS[key][0]]
    typed = (
        TextKwargs
        if isinstance(part, PreTrainedTokenizerBase)
        else ImagesKwargs
        if hasattr(part, "backend")
        else AudioKwargs
    )
    parameters = inspect.signature(part.__call__).parameters.values()
    own = {p.name for p in list(parameters)[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    valid = getattr(getattr(part, "valid_kwargs", None), "__annotations__", ())
    taken = options_of(part, processor.config.modality(tiny.ENCODERS[key][0])["kind"])
    return sorted(own | set(valid) | set(typed.__annotations__) | taken)


@pytest.mark.parametrize("key", ENCODERS)
def test_every_keyword_of_a_part_is_done_or_raises(processors, key):
    idle = []
    for keyword in of_the_part(processors[key], key):
        if not changes(processors[key], key, keyword, "part") and not {(None, keyword), (key, keyword)} & set(SAME):
            idle.append(keyword)
    assert idle == []


@pytest.mark.parametrize("key", ENCODERS)
def test_every_flat_keyword_is_done_or_raises(processors, key):
    typed = [TextKwargs, ImagesKwargs, VideosKwargs, AudioKwargs]
    names = {name for kwargs in typed for name in kwargs.__annotations__} | set(ProcessingKwargs.__annotations__)
    own = {name for name in call_arguments(processors[key].config, processors[key].processors) if name in VALUES}
    names = sorted((names | own) - {"text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs"})
    idle = [name for name in names if not changes(processors[key], key, name, "flat")]
    excused = {keyword for encoder, keyword in SAME if encoder in (None, key)}
    assert [name for name in idle if name not in excused] == []


def test_every_keyword_of_the_tokenizer_is_done_or_raises(processors):
    parameters = inspect.signature(PreTrainedTokenizerBase.__call__).parameters.values()
    names = (
        {p.name for p in list(parameters)[2:] if p.kind is not p.VAR_KEYWORD}
        | set(TextKwargs.__annotations__)
        | TEXT_OPTIONS
    )
    processor = processors["clip"]
    added = {"add_special_tokens"}  # the tiny tokenizer adds none: another test
    assert [name for name in sorted(names - added) if not changes(processor, "clip", name, "text")] == []


def test_special_tokens_of_a_tokenizer_that_adds_some(processors):
    processor = copy.deepcopy(processors["clip"])
    frame = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = frame
    with_bos, without = (
        processor(text="a fox", **given)["input_ids"][0] for given in ({}, {"add_special_tokens": False})
    )
    assert with_bos == [processor.tokenizer.bos_token_id, *without]


def test_every_reason_is_of_a_keyword_that_changes_nothing_somewhere(processors):
    for (encoder, keyword), _ in SAME.items():
        keys = [encoder] if encoder else ENCODERS
        taking = [key for key in keys if keyword in of_the_part(processors[key], key)]
        assert any(not changes(processors[key], key, keyword, "part") for key in taking), keyword


def kinds_of(part, key):
    """``{keyword: "switch" or "number"}`` of a part's options, by what transformers and its signature annotate."""
    typed = ImagesKwargs if hasattr(part, "backend") else TextKwargs if key == "esm" else AudioKwargs
    own = {p.name: p.annotation for p in inspect.signature(part.__call__).parameters.values()}
    valid = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    found = {}
    for keyword in options_of(part, {"whisper": "audio", "wav2vec2": "audio", "esm": "text"}.get(key, "image")):
        told = {str(where[keyword]) for where in (typed.__annotations__, own, valid) if keyword in where}
        if any(re.search(r"\bstr\b|Strategy|Tensor", one) for one in told):
            continue  # has words
        if told and all("bool" in one for one in told):
            found[keyword] = "switch"
        elif told and all(re.search(r"\bint\b|float", one) for one in told):
            found[keyword] = "number"
    return found


WRONG = {"switch": ["x", "False", 7, 0.5, [True]], "number": ["x", ["x"]]}


@pytest.mark.parametrize("how", ["part", "flat"])
@pytest.mark.parametrize("key", ENCODERS)
def test_values_of_another_kind_are_refused_with_the_name_of_their_option(processors, key, how):
    processor, name = processors[key], tiny.ENCODERS[key][0]
    kinds = kinds_of(processor.processors[name], key)
    assert set(kinds.values()) == {"switch", "number"}
    taken = []
    for keyword, kind in kinds.items():
        if how == "flat" and keyword not in call_arguments(processor.config, processor.processors):
            continue
        for value in WRONG[kind]:
            given = {keyword: value} if how == "flat" else {f"{name}_kwargs": {keyword: value}}
            try:
                called(processor, key, **given)
            except (TypeError, ValueError) as error:
                assert keyword in str(error), f"{keyword}={value!r} is not named: {error}"
            else:
                taken.append((keyword, value))
    assert taken == []


@pytest.mark.parametrize(
    ("key", "options", "match"),
    [
        ("whisper", {"do_normalize": "x"}, "audio: do_normalize must be True or False, got 'x'"),
        ("clip", {"resample": "x"}, r"vision: resample must be one of PIL.Image.Resampling, .*'BICUBIC': 3.*, got 'x'"),
        ("clip", {"resample": 99}, "got 99"),
        ("clip", {"resample": True}, "got True"),
        ("wav2vec2", {"max_length": 900}, "audio: max_length= does nothing here: pass truncation=True to cut"),
        ("wav2vec2", {"max_length": 900, "truncation": False}, "audio: max_length= does nothing here"),
        ("wav2vec2", {"padding": "x"}, "its options are .*'padding': 'x'"),
        ("qwen2_vl", {"patch_size": -1}, "its options are .*'patch_size': -1"),
        ("film", {"source_fps": 3}, "source_fps= does nothing without fps="),
        ("film", {"source_fps": 3, "num_frames": 2}, "source_fps= does nothing without fps="),
        ("film", {"source_fps": "x", "fps": 1}, "source_fps='x'"),
    ],
)  # fmt: skip
def test_options_that_would_do_nothing_or_another_thing(processors, key, options, match):
    if key == "film":
        parts = {"film": {"model": tiny.clip(), "processor": tiny.clip_processor(), "kind": "video"}}
        _, processor = compose(tiny.llama(), parts, "linear", tokenizer=tiny.tokenizer())
        call = functools.partial(processor, text="<video>", videos=[[tiny.image(i) for i in range(3)]])
        assert call(videos_kwargs={"source_fps": 3, "fps": 1})
    else:
        call = functools.partial(called, processors[key], key)
    with pytest.raises((TypeError, ValueError), match=match):
        call(**{f"{'film' if key == 'film' else tiny.ENCODERS[key][0]}_kwargs": options})


@pytest.mark.parametrize("filter", [0, 3, Image.Resampling.BICUBIC])
def test_filters_of_resampling_are_taken(processors, filter):
    assert called(processors["clip"], "clip", vision_kwargs={"resample": filter})


@pytest.mark.parametrize(
    "options", [{"max_length": 900, "truncation": True}, {"max_length": 4_000, "padding": "max_length"}]
)
def test_lengths_that_cut_or_fill_up_are_taken(processors, options):
    assert called(processors["wav2vec2"], "wav2vec2", audio_kwargs=options)
