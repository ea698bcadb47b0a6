"""Videos: which frames are kept, what is refused, and the tensors that image processors make of them."""

import numpy as np
import pytest
import tiny
import torch
from films import WHOLE, film
from helpers import compose_tiny
from PIL import Image
from transformers import ProcessorMixin, VideoMAEImageProcessorPil, VivitImageProcessor

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor, compose, limits
from cornstarch_hf.processing.media import ImageForm, flatten
from cornstarch_hf.processing.video import ready_video, run_on_frames, sampled_frames

SQUARE = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}


@pytest.mark.parametrize(
    ("total", "options", "expected"),
    [
        (5, {}, [0, 1, 2, 3, 4]),
        (10, {"num_frames": 4}, [0, 2, 5, 7]),
        (7, {"num_frames": 7}, list(range(7))),
        (3, {"num_frames": 1}, [0]),
        (60, {"fps": 2, "source_fps": 30}, [0, 15, 30, 45]),
        (10, {"fps": 1, "source_fps": 30.0}, [0]),
        (9, {"fps": 24, "source_fps": 24}, list(range(9))),
    ],
)
def test_frames_are_sampled_evenly(total, options, expected):
    assert sampled_frames(total, "film", **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 5}, "film, item 0: 5 frames were asked for, but the video has 4"),
        ({"num_frames": 0}, "positive integer, got 0"),
        ({"num_frames": True}, "positive integer, got True"),
        ({"num_frames": 2.5}, "positive integer, got 2.5"),
        ({"num_frames": 2, "fps": 1}, "two ways of sampling"),
        ({"fps": 1}, "fps=1 needs the video's own rate"),
        ({"fps": -1, "source_fps": 3}, "must be positive, got fps=-1, source_fps=3"),
        ({"fps": 1, "source_fps": float("nan")}, "must be positive"),
        ({"fps": 60, "source_fps": 30}, "8 frames were asked for, but the video has 4"),
    ],
)
def test_what_cannot_be_sampled(options, message):
    with pytest.raises(ValueError, match=message):
        sampled_frames(4, "film, item 0", **options)


def test_a_video_in_any_wrapping_is_the_same():
    frames = film(6)
    images = [Image.fromarray(x) for x in frames]
    forms = [frames, list(frames), images, tuple(images), torch.tensor(frames), frames.transpose(0, 3, 1, 2)]
    forms += [torch.tensor(frames).permute(0, 3, 1, 2), list(torch.tensor(frames)), {"frames": frames}]
    forms += [{"video": images, "fps": 24}, {"array": frames}, frames.tolist()]
    for form in forms:
        assert flatten(form, "video") == ([form], None) or isinstance(form, np.ndarray)
        found = ready_video(form, "film", ImageForm(3))
        assert [x.tobytes() for x in found] == [x.tobytes() for x in images]
    found = ready_video({"video": frames, "fps": 30}, "film", ImageForm(3), {"fps": 10})
    assert [x.tobytes() for x in found] == [images[0].tobytes(), images[3].tobytes()]
    assert [len(x) for x in (flatten([images, images], "video")[0], flatten([[images], []], "video")[1])] == [2, 2]
    assert flatten([[images, images], [images]], "video")[1] == [2, 1]


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (film(0), ValueError, "the video has 0 frames"),
        ({"video": []}, ValueError, "the video has 0 frames"),
        (film(1)[0], ValueError, r"got one image of shape \(12, 10, 3\): pass \[image\]"),
        (Image.new("RGB", (3, 4)), ValueError, "got one image"),
        (film()[None], ValueError, r"got the shape \(1, 4, 12, 10, 3\): pass several videos as a list"),
        ([film(1)[0], film(1, size=(9, 10))[0]], ValueError, r"frame 1 has the size \(9, 10\), frame 0 has \(12, 10\)"),
        ([film(1)[0], None], TypeError, "film, item 3, frame 1: expected an image"),
        (film().astype(np.int64), ValueError, "film, item 3, frame 0: the image has int64 values"),
        (film() / 255, ValueError, "frame 0: .*do_rescale"),
        ("film.mp4", TypeError, "got a file: decode it first"),
        (b"mp4", TypeError, "got a file"),
        (3, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        ({"caption": "x"}, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_video(item, error, message):
    with pytest.raises(error, match=message) as caught:
        ready_video(item, "film, item 3", ImageForm(3))
    assert str(caught.value).startswith("film, item 3")


def test_too_many_frames_are_refused_after_sampling(monkeypatch):
    monkeypatch.setattr(limits, "MAX_VIDEO_FRAMES", 3)
    assert len(ready_video(film(9), "film, item 0", ImageForm(3), {"num_frames": 3})) == 3
    with pytest.raises(ValueError, match=r"film, item 0: sample fewer.* 4, more than .*MAX_VIDEO_FRAMES = 3"):
        ready_video(film(4), "film, item 0", ImageForm(3))


def test_image_processors_run_on_each_frame():
    processor, config = tiny.clip_processor(), tiny.clip().config
    found = run_on_frames(processor, "film", [film(2), film(5, 1)], {"do_normalize": False}, config, 3)
    assert found["pixel_values"].shape == (2, 5, 3, 8, 8) and found["frame_mask"].sum(-1).tolist() == [2, 5]
    expected = processor(images=list(film(5, 1)), return_tensors="pt", do_normalize=False)["pixel_values"]
    assert torch.equal(found["pixel_values"][1], expected) and not found["pixel_values"][0, 2:].any()
    with pytest.raises(ValueError, match=r"the frames of item 1 become \(3, 9, 10\) and those of item 0 \(3, 12, 10\)"):
        sizes = {"do_resize": False, "do_center_crop": False}
        run_on_frames(processor, "film", [film(2), film(2, size=(9, 10))], sizes, config, 3)
    with pytest.raises(ValueError, match="film, item 0: Qwen2VLImageProcessor.* packs .*video processor .*torchvision"):
        run_on_frames(tiny.qwen2_vl_processor(), "film", [film(2)], {}, tiny.qwen2_vl().config, 3)


@pytest.mark.parametrize("key", WHOLE)
def test_encoders_of_whole_videos(key):
    torch.manual_seed(0)
    model = MultimodalModel({"film": ModalEncoderModule(WHOLE[key]().eval())}, tiny.llama()).eval()
    text, name = ["a <video> b", "<video>"], "pixel_values_videos" if key == "vjepa2" else "pixel_values"
    for make in (tiny.clip_processor, VideoMAEImageProcessorPil, VivitImageProcessor):
        processor = MultimodalProcessor(tiny.tokenizer(), {"film": make(**SQUARE)}, model=model)
        items = [film(4), film(9, 1)]
        options = {"padding": True, "return_tensors": "pt", "videos_kwargs": {"num_frames": 4}}
        inputs = processor(text=text, videos=items, **options)
        assert inputs[name].shape == (2, 4, 3, 8, 8) and "frame_mask" not in inputs
        model(**inputs)  # as many features as placeholders, or it raises
        kept = items[1][[0, 2, 4, 6]]
        assert torch.equal(inputs[name][1:], processor(text="<video>", videos=kept, return_tensors="pt")[name])
    uneven = [film(2), film(4)] if key != "videomae" else [film(3)]
    wrong = r"film: the videos have \[2, 4\] frames" if len(uneven) > 1 else "film, item 0: 3 frames are left.* takes 4"
    with pytest.raises(ValueError, match=wrong):
        processor(text="<video>" * len(uneven), videos=uneven, return_tensors="pt")


def test_frames_kept_by_default_are_a_setting_of_the_processor_and_saved(tmp_path):
    model, processor = compose_tiny(["clip"], vision={"kind": "video"})
    processor.processors["vision"].num_frames = 3
    processor.save_pretrained(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path)
    for made in (processor, again):
        assert made(text="<video>", videos=film(9), return_tensors="pt")["pixel_values"].shape[1] == 3
        two = made(text="<video>", videos=film(9), videos_kwargs={"num_frames": 2}, return_tensors="pt")
        assert torch.equal(two["pixel_values"][0, 0], made(text="<video>", videos=film(9))["pixel_values"][0, 0])
    message = [{"type": "video", "video": film(60), "fps": 30}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=True, return_dict=True, return_tensors="pt", videos_kwargs={"fps": 2})  # fmt: skip
    assert inputs["pixel_values"].shape[1] == 4
    model(**inputs)


def test_processors_are_found_beside_an_encoder(tmp_path):
    model = tiny.clip()
    model.save_pretrained(tmp_path)
    spec = {"film": {"model": str(tmp_path), "kind": "video"}}
    with pytest.raises(ValueError, match="The video processor of .* cannot be loaded .*torchvision"):
        compose(tiny.llama(), spec, tokenizer=tiny.tokenizer())
    tiny.clip_processor().save_pretrained(tmp_path)
    _, processor = compose(tiny.llama(), spec, tokenizer=tiny.tokenizer())
    assert not isinstance(processor.video_processor, ProcessorMixin)
    assert processor(text="<video>", videos=film(2))["pixel_values"].shape == (1, 2, 3, 8, 8)
