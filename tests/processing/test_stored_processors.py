"""Processors of single modalities in a checkpoint: described, built again, found by transformers, set otherwise on loading."""

import json
import tempfile

import numpy as np
import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, Gemma3nAudioFeatureExtractor

from cornstarch_hf import MultimodalProcessor
from cornstarch_hf.processing.stored_processors import build_subprocessor, describe_subprocessor
from cornstarch_hf.processing.subprocessors import sampling_rate_of


@pytest.mark.parametrize("key", [key for key in tiny.ENCODERS if key != "esm"])
def test_descriptions_are_json_and_build_the_same_processor(key):
    processor = tiny.ENCODERS[key][2]()
    described = json.loads(json.dumps(describe_subprocessor(processor, "x")))
    again = build_subprocessor(described, "x")
    assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    assert sampling_rate_of(again) == (16_000 if tiny.ENCODERS[key][0] == "audio" else None)


def test_spectrograms_of_one_band_are_refused_before_they_fill_the_memory():
    described = describe_subprocessor(tiny.whisper_processor(), "audio") | {"feature_size": 1}
    with pytest.raises(
        ValueError, match=r"audio: its WhisperFeatureExtractor makes spectrograms of one band \(feature_size=1"
    ):
        build_subprocessor(described, "audio")


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


def test_settings_that_are_arrays_are_described_as_lists():
    means = [0.5 * i for i in range(4)]
    extractor = Gemma3nAudioFeatureExtractor(feature_size=4, per_bin_mean=means, per_bin_stddev=[2.0] * 4)
    described = json.loads(json.dumps(describe_subprocessor(extractor, "audio")))
    again = build_subprocessor(described, "audio")
    for made, expected in zip(again([tiny.sound(1)]).values(), extractor([tiny.sound(1)]).values(), strict=True):
        np.testing.assert_array_equal(made, expected)


# ---- whole checkpoints


@pytest.fixture(scope="module")
def stored():
    """Folders of processors, by the encoders' names, each with the processor that was saved."""
    made = {}
    for key in (("clip",), ("whisper",), ("clip", "whisper", "esm"), ("qwen2_vl",)):
        folder = tempfile.mkdtemp()
        processor = compose_tiny(list(key))[1]
        processor.save_pretrained(folder)
        made[key] = folder, processor
    two = compose_tiny({"left": "clip", "right": "siglip"})[1]
    folder = tempfile.mkdtemp()
    two.save_pretrained(folder)
    return made | {("left", "right"): (folder, two)}


@pytest.mark.parametrize("with_code", [False, True])
def test_the_auto_classes_of_transformers_give_the_only_part_of_a_kind(stored, tmp_path, with_code):
    model, processor = compose_tiny(["clip", "whisper", "esm"])
    model.save_pretrained(tmp_path, include_code=with_code)
    processor.save_pretrained(tmp_path, include_code=with_code)
    for auto, name in ((AutoImageProcessor, "vision"), (AutoFeatureExtractor, "audio")):
        found = auto.from_pretrained(tmp_path)
        assert type(found) is type(processor.processors[name])
        assert found.to_dict() == processor.processors[name].to_dict()
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values["processors"] == {} and {"image_processor", "feature_extractor"} <= set(values)
    for key, auto in ((("whisper",), AutoImageProcessor), (("clip",), AutoFeatureExtractor)):
        with pytest.raises(OSError, match="Can't load"):
            auto.from_pretrained(stored[key][0])


def test_two_of_a_kind_are_stored_by_name_and_none_is_taken_for_the_part(stored):
    folder, processor = stored["left", "right"]
    again = AutoProcessor.from_pretrained(folder)
    for name, part in processor.processors.items():
        assert again.processors[name].to_dict() == part.to_dict()
    with pytest.raises(OSError, match="Can't load image processor"):
        AutoImageProcessor.from_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"image_processor stands for the only .* 'image', of which there are \['left'"
    ):
        AutoProcessor.from_pretrained(folder, image_processor=tiny.clip_processor())
    replaced = AutoProcessor.from_pretrained(folder, processors={"left": tiny.siglip_processor()}, do_rescale=False)
    assert type(replaced.processors["left"]) is type(tiny.siglip_processor())
    assert replaced.processors["left"].do_rescale and not replaced.processors["right"].do_rescale


def test_a_checkpoint_of_before_names_all_its_parts_by_modality(stored, tmp_path):
    stored["clip", "whisper", "esm"][1].save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    values["processors"] = {"vision": values.pop("image_processor"), "audio": values.pop("feature_extractor")}
    path.write_text(json.dumps(values))
    again = AutoProcessor.from_pretrained(tmp_path)
    assert {name: type(part) for name, part in again.processors.items()} == {
        name: type(part) for name, part in stored["clip", "whisper", "esm"][1].processors.items()
    }


@pytest.mark.parametrize(
    ("key", "settings", "read", "expected"),
    [
        (("clip",), {"do_normalize": False}, lambda p: p.image_processor.do_normalize, False),
        (("clip",), {"size": {"shortest_edge": 16}}, lambda p: p.image_processor.size["shortest_edge"], 16),
        (("clip",), {"backend": "pil"}, lambda p: p.image_processor.backend, "pil"),
        (("clip",), {"use_fast": False}, lambda p: p.image_processor.backend, "pil"),
        (("whisper",), {"feature_size": 16}, lambda p: p.feature_extractor.mel_filters.shape[1], 16),
        (("whisper",), {"padding_value": 1.0}, lambda p: p.feature_extractor.padding_value, 1.0),
        (("clip",), {"cls_token": "(C)"}, lambda p: p.tokenizer.cls_token, "(C)"),
        (("clip",), {"padding_side": "right"}, lambda p: p.tokenizer.padding_side, "right"),
        (("clip",), {"model_max_length": 7}, lambda p: p.tokenizer.model_max_length, 7),
        (("clip",), {"chat_template": "{{ 1 }}"}, lambda p: p.chat_template, "{{ 1 }}"),
        (("clip",), {"max_length": 9, "padding": "max_length"}, lambda p: len(p(text="a")["input_ids"][0]), 9),
        (("clip", "whisper", "esm"), {"do_normalize": False}, lambda p: p.image_processor.do_normalize, False),
        (("clip", "whisper", "esm"), {"cls_token": "(C)"}, lambda p: p.processors["protein"].cls_token, "<cls>"),
        (("qwen2_vl",), {"max_pixels": 256}, lambda p: p.image_processor.size["longest_edge"], 256),
    ],
)
def test_settings_of_parts_are_set_otherwise_on_loading(stored, key, settings, read, expected):
    folder, processor = stored[key]
    for load in (AutoProcessor.from_pretrained, MultimodalProcessor.from_pretrained):
        assert read(load(folder, **settings)) == expected
        assert read(load(folder, **settings, return_unused_kwargs=True, colour=1)[0]) == expected
    name = next(iter(settings))
    assert name == "backend" or name == "use_fast" or read(processor) != expected or expected == "<cls>"


def test_parts_may_be_handed_over_on_loading(stored):
    folder, processor = stored["clip", "whisper", "esm"]
    image, sound = tiny.clip_processor(do_normalize=False), tiny.whisper_processor()
    tokenizer = processor.tokenizer
    again = MultimodalProcessor.from_pretrained(
        folder, image_processor=image, feature_extractor=sound, tokenizer=tokenizer
    )
    assert again.image_processor is image and again.feature_extractor is sound
    assert again.placeholder_ids == processor.placeholder_ids
    other = tiny.tokenizer()
    other.add_tokens(["something"])
    with pytest.raises(
        ValueError, match="vision: the placeholder <image> has the id 301 in this tokenizer, 300 in the model"
    ):
        MultimodalProcessor.from_pretrained(folder, tokenizer=other)


@pytest.mark.parametrize("unknown", [{"colour": 1}, {"tokens": {}}, {"image_size": 3, "do_resize": False}])
def test_what_no_part_takes_is_refused_or_handed_back(stored, unknown):
    folder, _ = stored["clip",]
    name = next(iter(unknown))
    with pytest.raises(TypeError, match=rf"unexpected arguments \['{name}'\]: no part takes them"):
        MultimodalProcessor.from_pretrained(folder, **unknown)
    processor, unused = MultimodalProcessor.from_pretrained(folder, **unknown, return_unused_kwargs=True)
    assert list(unused) == [name] and processor.image_processor.do_resize is unknown.get("do_resize", True)


def test_a_backend_that_is_not_there_is_refused(stored):
    if tiny.BACKEND == "Pil":
        with pytest.raises(ValueError, match="vision: .* runs on the backend 'pil', 'torchvision' was asked for"):
            MultimodalProcessor.from_pretrained(stored["clip",][0], backend="torchvision")


def test_a_call_that_cuts_leaves_no_trace_in_what_is_saved(tmp_path):
    processor = compose_tiny(["clip"])[1]
    text = "the quick brown fox jumps over the lazy dog"
    whole = processor(text=text)["input_ids"]
    processor(text=text, truncation=True, max_length=4, padding="max_length")
    processor.save_pretrained(tmp_path)
    assert MultimodalProcessor.from_pretrained(tmp_path)(text=text)["input_ids"] == whole


def test_what_comes_back_does_what_was_saved(stored):
    folder, processor = stored["clip", "whisper", "esm"]
    again = AutoProcessor.from_pretrained(folder)
    call = {"text": "<image><audio><protein>", "images": tiny.image(0), "audio": tiny.sound(0), "protein": "MKV"}
    first, second = (p(**call, sampling_rate=16_000, return_tensors="pt") for p in (processor, again))
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
