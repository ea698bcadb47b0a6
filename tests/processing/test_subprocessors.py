"""Processors of single modalities: taken out of larger ones, and run."""

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    CLIPProcessor,
    DetrImageProcessorPil,
    GLPNImageProcessorPil,
    Idefics3ImageProcessorPil,
    IdeficsImageProcessorPil,
    Pix2StructImageProcessorPil,
    WhisperProcessor,
)

from cornstarch_hf.processing.subprocessors import check_padding, resolve_subprocessor, run_subprocessor

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
    for wrong in (DetrImageProcessorPil, None, "a/b", 3):
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


def test_processors_that_put_all_images_of_a_call_into_one_row_give_one_row_each():
    whole = {"longest_edge": 32}
    processor = Idefics3ImageProcessorPil(size=whole, max_image_size=whole, do_image_splitting=False)
    images = [tiny.image(i, (20 + i, 30)) for i in range(3)]
    found = run_subprocessor(processor, "vision", "image", images, {}, tiny.clip().config)
    alone = [processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
    assert found["pixel_values"].shape == (3, 3, 32, 32) and found["pixel_attention_mask"].shape == (3, 32, 32)
    assert all(torch.equal(row, one[0, 0]) for row, one in zip(found["pixel_values"], alone, strict=True))
    split = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size=whole)
    with pytest.raises(
        ValueError, match="vision, item 0: Idefics3ImageProcessorPil splits the image into 5 crops, .*1"
    ):
        run_subprocessor(split, "vision", "image", [tiny.image(0, (64, 64))] * 2, {}, tiny.clip().config)


def test_a_processor_that_gives_a_bare_tensor_and_one_that_gives_a_mask_of_floats():
    config = tiny.clip().config
    plain = IdeficsImageProcessorPil(size={"height": 8, "width": 8})
    assert run_subprocessor(plain, "vision", "image", [tiny.image()], {}, config)["pixel_values"].shape == (1, 3, 8, 8)
    patches = Pix2StructImageProcessorPil(patch_size={"height": 4, "width": 4}, max_patches=9)
    found = run_subprocessor(patches, "vision", "image", [tiny.image(), tiny.image(1, (1, 90))], {}, config)
    assert found["attention_mask"].dtype is torch.long and found["flattened_patches"].dtype is torch.float32


def test_a_processors_own_error_says_which_item():
    config, processor = tiny.clip().config, GLPNImageProcessorPil(size_divisor=8)
    with pytest.raises(
        ValueError, match=r"vision, item 1: GLPNImageProcessorPil cannot process it, .* 9 x 5 \(ValueError"
    ):
        run_subprocessor(processor, "vision", "image", [tiny.image(0, (9, 9)), tiny.image(1, (5, 9))], {}, config)
    with pytest.raises(ValueError, match=r"vision: GLPN.*\(3, 8, 8\) for item 0 and \(3, 16, 8\) for item 1"):
        run_subprocessor(processor, "vision", "image", [tiny.image(0, (9, 9)), tiny.image(1, (16, 9))], {}, config)
    with pytest.raises(
        ValueError, match="(?s)vision, item 0: CLIPImageProcessor.* cannot process it.*expected int, got float"
    ):
        run_subprocessor(
            tiny.clip_processor(), "vision", "image", [tiny.image()], {"do_resize": True, "size": 3.5}, config
        )


def test_padding_that_the_encoder_would_not_hear_of():
    processor = DetrImageProcessorPil(size={"shortest_edge": 8, "longest_edge": 32})
    images = [tiny.image(0, (8, 16)), tiny.image(1, (8, 12))]
    output = run_subprocessor(processor, "vision", "image", images, {}, tiny.clip().config)
    with pytest.raises(
        ValueError, match="vision, item 1: DetrImageProcessorPil padded it from 8 x 12 to 8 x 16, .*no pixel_mask"
    ):
        check_padding(output, {"pixel_values": 0}, processor, "vision")
    check_padding(output, {"pixel_values": 0, "vision_pixel_mask": 0}, processor, "vision")
    alone = run_subprocessor(processor, "vision", "image", images[:1], {}, tiny.clip().config)
    check_padding(alone, {"pixel_values": 0}, processor, "vision")
