"""What processors make of small items: everything below the caps to the bit, everything above refused before it is made."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import compose_tiny
from PIL import Image

from cornstarch_hf import limits
from cornstarch_hf.processing.image_bounds import Pixels, _BoundedTensors, bounded_processor
from cornstarch_hf.processing.subprocessors import run_subprocessor, tensors_of_size

PAN_AND_SCAN = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 1, "pan_and_scan_max_num_crops": 1_000}
PAN_AND_SCAN |= {"pan_and_scan_min_ratio_to_activate": 1.0}
# Class -> further settings.  Each resizes or pads in its own way.
KINDS = {
    "CLIPImageProcessorPil": {}, "DetrImageProcessorPil": {}, "ViTImageProcessorPil": {}, "ViltImageProcessorPil": {},
    "Qwen2VLImageProcessorPil": {}, "LlavaImageProcessorPil": {"do_pad": True}, "LlavaNextImageProcessorPil": {}, "Owlv2ImageProcessorPil": {},
    "Idefics2ImageProcessorPil": {}, "Idefics3ImageProcessorPil": {}, "PixtralImageProcessorPil": {}, "Siglip2ImageProcessorPil": {},
    "DeepseekVLImageProcessorPil": {}, "JanusImageProcessorPil": {}, "TextNetImageProcessorPil": {}, "LevitImageProcessorPil": {},
    "ConvNextImageProcessorPil": {}, "PoolFormerImageProcessorPil": {}, "Gemma3ImageProcessorPil": PAN_AND_SCAN,
    "MllamaImageProcessorPil": {}, "GotOcr2ImageProcessorPil": {"crop_to_patches": True}, "Pix2StructImageProcessorPil": {},
}  # fmt: skip


def processed(processor, images, **options):
    bounded, within = bounded_processor(processor, options, len(images))
    with within:
        return bounded(images, return_tensors="pt", **options)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(40, 30), (9, 70)])
def test_below_the_caps_nothing_changes(name, size):
    if (cls := getattr(transformers, name, None)) is None:
        pytest.skip(f"this version of transformers has no {name}")
    processor, image = cls(**KINDS[name]), tiny.image(size=size)
    before = dict(vars(processor))
    expected, got = processor([image], return_tensors="pt"), processed(processor, [image])
    assert set(expected) == set(got) and vars(processor) == before
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(got[key])), key


@pytest.mark.parametrize(
    ("name", "size", "made"),
    [
        ("CLIPImageProcessorPil", (10_000, 1), "resized to 2240000 x 224"),
        ("CLIPImageProcessorPil", (1, 10_000), "resized to 224 x 2240000"),
        ("LevitImageProcessorPil", (9_000, 1), "resized to 2016000 x 224"),
        ("TextNetImageProcessorPil", (9_000, 1), "resized to 5760000 x 640"),
        ("LlavaImageProcessorPil", (9_000, 1), "padded to 9000 x 9000"),
        ("Owlv2ImageProcessorPil", (9_000, 1), "padded to 9000 x 9000"),
    ],
)
def test_thin_images_are_refused_before_they_become_large(name, size, made):
    if (cls := getattr(transformers, name, None)) is None:
        pytest.skip(f"this version of transformers has no {name}")
    with pytest.raises(
        ValueError, match=rf"{size[0]} x {size[1]} pixels, {made}, has pixels: .*limits.MAX_IMAGE_PIXELS = 64,000,000"
    ):
        processed(cls(**KINDS.get(name, {})), [Image.new("RGB", size)])


@pytest.mark.parametrize(
    "option",
    [
        {"size": {"height": 9_000, "width": 9_000}},
        {"size": {"shortest_edge": 9_000}},
        {"size": {"shortest_edge": 9_000, "longest_edge": 90_000}},
        {"size": {"max_height": 9_000, "max_width": 9_000}},
        {"crop_size": {"height": 9_000, "width": 9_000}},
        {"do_pad": True, "pad_size": {"height": 9_000, "width": 9_000}},
    ],
    ids=str,
)
def test_sizes_of_a_call_are_bounded_as_those_of_a_processor(pair, option):
    _, processor = pair
    with pytest.raises(ValueError, match=r"vision, item 0: .*its size is 8 x 8 .*MAX_IMAGE_PIXELS"):
        processor(text="<image>", images=tiny.image(size=(8, 8)), images_kwargs=option)


def test_who_what_and_the_cap_are_named_and_can_be_raised(pair, monkeypatch):
    _, processor = pair
    images = [tiny.image(), Image.new("RGB", (500, 1))]
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 60_000)
    options = {"size": {"shortest_edge": 28}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
    made = r"its size is 500 x 1 .*the image of 500 x 1 pixels, resized to 14000 x 28, has pixels: 392,000, more than"
    with pytest.raises(
        ValueError,
        match=rf"vision, item 1: CLIPImageProcessor\w* cannot process it, {made} .*MAX_IMAGE_PIXELS = 60,000",
    ):
        processor(text="<image><image>", images=images, images_kwargs=options)
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 392_000)
    processor(text="<image><image>", images=images, images_kwargs=options)


def test_sizes_are_bounded_where_only_they_are_counted():
    processor = transformers.CLIPImageProcessorPil()
    with pytest.raises(ValueError, match="vision, item 0: .*MAX_IMAGE_PIXELS"):
        tensors_of_size(processor, "vision", (1, 10_000), {}, 3, False)


def test_all_that_is_made_of_an_image_is_bounded(monkeypatch):
    processor = transformers.Gemma3ImageProcessorPil(size={"height": 100, "width": 100})
    monkeypatch.setattr(limits, "MAX_MADE_PIXELS", 200_000)
    with pytest.raises(ValueError, match="all else that is made of it, has pixels: .*MAX_MADE_PIXELS = 200,000"):
        processed(processor, [Image.new("RGB", (900, 3))], **PAN_AND_SCAN)


@pytest.mark.parametrize(
    ("name", "option", "key"),
    [
        ("Pix2StructImageProcessorPil", {"max_patches": 10**8}, "max_patches"),
        ("Siglip2ImageProcessorPil", {"max_num_patches": 10**8}, "max_num_patches"),
        ("MllamaImageProcessorPil", {"max_image_tiles": 10**5}, "max_image_tiles"),
        ("GotOcr2ImageProcessorPil", {"max_patches": 10**5}, "max_patches"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_pieces_without_end(name, option, key, stored):
    if (cls := getattr(transformers, name, None)) is None:
        pytest.skip(f"this version of transformers has no {name}")
    with pytest.raises(ValueError, match=rf"ask for fewer: {key}=.* pieces of .*MAX_MADE_PIXELS"):
        processed(cls(**(option if stored else {})), [tiny.image()], **({} if stored else option))


def test_tensors_are_measured_before_an_operation_makes_them(monkeypatch):
    """As torchvision's backend runs: a batch in one operation, and padding; what is below goes through unchanged."""
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 10_000)
    images = torch.rand(2, 3, 20, 20)
    with _BoundedTensors(Pixels(2)):
        resized = torch.nn.functional.interpolate(images, size=(50, 50), mode="bilinear", antialias=True)
        for make in (
            lambda: torch.nn.functional.interpolate(images, size=(2_000, 2_000)),
            lambda: torch.nn.functional.pad(images, (0, 5_000, 0, 5_000)),
            lambda: images.new_zeros(2, 3, 5_000, 5_000),
            lambda: images.expand(2, 3, 20, 20).repeat(1, 1, 100, 100),
        ):
            with pytest.raises(ValueError, match="resized or padded, it has pixels: .*MAX_IMAGE_PIXELS = 10,000"):
                make()
    assert torch.equal(resized, torch.nn.functional.interpolate(images, size=(50, 50), mode="bilinear", antialias=True))


def test_tensors_of_a_video_are_measured_together(monkeypatch):
    monkeypatch.setattr(limits, "MAX_VIDEO_PIXELS", 10_000)
    frames = torch.rand(5, 3, 20, 20)
    with _BoundedTensors(Pixels(5, 5)):
        torch.nn.functional.interpolate(frames, size=(44, 44))
        with pytest.raises(
            ValueError, match="sample fewer frames .*it has pixels: 10,125, more than .*MAX_VIDEO_PIXELS = 10,000"
        ):
            torch.nn.functional.interpolate(frames, size=(45, 45))


def test_frames_of_a_video_are_bounded_together(monkeypatch):
    processor, frames = transformers.CLIPImageProcessorPil(), np.zeros((8, 2, 80, 3), np.uint8)
    config = tiny.clip().config

    def run(**options):
        return run_subprocessor(processor, "film", "video", [frames], options, config)

    run()
    monkeypatch.setattr(limits, "MAX_VIDEO_PIXELS", 8 * 224 * 224 * 40 - 1)
    with pytest.raises(
        ValueError,
        match=r"film, item 0: .*the video of 8 frames, resized to 8960 x 224, has pixels: .*MAX_VIDEO_PIXELS",
    ):
        run()
    run(num_frames=7)
    monkeypatch.setattr(limits, "MAX_VIDEO_PIXELS", 1_279)
    with pytest.raises(
        ValueError, match="film, item 0: sample fewer by num_frames=; 8 frames of 80 x 2 have pixels: 1,280, more than"
    ):
        run()


# ---- padding of sounds and texts


@pytest.mark.parametrize(
    "option", [{"padding": "max_length", "max_length": 10**9}, {"pad_to_multiple_of": 10**9}], ids=str
)
def test_sounds_are_filled_up_to_no_more_than_the_cap(option):
    _, processor = compose_tiny(["wav2vec2"])
    name = next(iter(processor.config.encoders))
    with pytest.raises(ValueError, match=rf"{name}: ask for less: .*1,000,000,000 rows of 1 values.*MAX_AUDIO_SAMPLES"):
        processor(text="<audio>", audio=np.zeros(4_000, np.float32), sampling_rate=16_000, audio_kwargs=option)


@pytest.mark.parametrize(
    "option",
    [
        {"padding": "max_length", "max_length": 10**9, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 10**9},
        {"padding": "max_length", "max_length": 6_000_000},
    ],
    ids=str,
)
def test_texts_are_filled_up_to_no_more_than_the_cap(pair, option):
    _, processor = pair
    with pytest.raises(ValueError, match="text: ask for less: .*2 texts have tokens: .*MAX_PADDED_TOKENS = 10,000,000"):
        processor(text=["a", "b c"], **option)


def test_a_tokenizer_that_says_to_how_much_it_fills_up(pair, monkeypatch):
    _, processor = pair
    monkeypatch.setattr(processor.tokenizer, "model_max_length", 10**9)
    with pytest.raises(ValueError, match="text: ask for less: filled up by max_length=1,000,000,000, 1 texts"):
        processor(text=["a"], padding="max_length")
