"""Video processors of transformers: as many placeholders as features, no frame taken or left out unasked, the same after a reload.

They need torchvision, and are tested by `make test-torchvision`.
"""

import numpy as np
import pytest
import tiny
import torch
import transformers
from films import SIZES, WHOLE, film
from PIL import Image
from transformers import AutoProcessor, VideoMAEConfig, VideoMAEModel
from transformers.utils import is_torchvision_available
from transformers.video_utils import VideoMetadata

from cornstarch_hf import ModalEncoderModule, MultimodalCollator, MultimodalModel, MultimodalProcessor, compose, limits
from cornstarch_hf.processing.stored_processors import build_subprocessor, describe_subprocessor
from cornstarch_hf.processing.video import is_video_processor, run_video_processor

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="video processors need torchvision")
SQUARE = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
PACKED = {
    "patch_size": 4,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 512},
    "cap_pixels_per_frame": False,
}
# encoder, name of the video processor and its settings, whether videos of one call may have different numbers of frames
PAIRS = {
    "videomae": (WHOLE["videomae"], "VideoMAEVideoProcessor", SQUARE, False),
    "timesformer": (WHOLE["timesformer"], "VideoMAEVideoProcessor", SQUARE, False),
    "vjepa2": (WHOLE["vjepa2"], "VJEPA2VideoProcessor", {"crop_size": 8}, False),
    "qwen2_vl": (tiny.qwen2_vl, "Qwen2VLVideoProcessor", PACKED, True),
    "llava_onevision": (tiny.siglip, "LlavaOnevisionVideoProcessor", {"size": {"height": 8, "width": 8}}, True),
    "clip": (tiny.clip, "LlavaOnevisionVideoProcessor", {"size": {"height": 8, "width": 8}}, True),
}  # fmt: skip


def video_processor(name="LlavaOnevisionVideoProcessor", **settings):
    return getattr(transformers, name)(**settings)


def composed(key, images=False):
    """A model with an encoder of videos, and with `images` one of images beside it; with their processor."""
    encoder, name, settings, _ = PAIRS[key]
    torch.manual_seed(0)
    modules = {"film": ModalEncoderModule(encoder().eval(), kind="video")}
    singles = {"film": video_processor(name, **settings)}
    if images:
        modules["vision"], singles["vision"] = ModalEncoderModule(tiny.clip()), tiny.clip_processor()
    model = MultimodalModel(modules, tiny.llama()).eval()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    return model, MultimodalProcessor(tokenizer, singles, model=model)


def check(model, inputs):
    """Runs of placeholders are the features of each item, and the model takes them."""
    entry = model.config.modality("film")
    given = {parameter: inputs[key] for key, parameter in entry["input_names"].items() if key in inputs}
    with torch.no_grad():
        found = [len(x) for x in model.film_encoder(**given).pooler_output]
        logits = model(**inputs).logits
    assert int((torch.as_tensor(inputs["input_ids"]) == entry["token_id"]).sum()) == sum(found)
    assert torch.isfinite(logits).all()
    return found


@needs_torchvision
@pytest.mark.parametrize("images", [False, True], ids=["alone", "beside images"])
@pytest.mark.parametrize("key", PAIRS)
def test_as_many_placeholders_as_features(key, images, tmp_path):
    model, processor = composed(key, images)
    uneven = PAIRS[key][3]
    films = [film(4), film(2 if uneven else 4, 1, (20, 14) if uneven else (12, 10)), film(6 if uneven else 4, 2)]
    alone = [check(model, processor(text="<video>", videos=x, return_tensors="pt"))[0] for x in films]
    texts = ["<video> a <video>", "nothing", "b <video>"]
    media = {"videos": [films[:2], [], films[2:]]}
    if images:
        texts, media["images"] = (
            ["<image>" + texts[0], texts[1], texts[2] + "<image>"],
            [[tiny.image()], [], [tiny.image(1)]],
        )
    inputs = processor(text=texts, padding=True, return_tensors="pt", **media)
    assert check(model, inputs) == alone
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.processors["film"]) is type(processor.processors["film"])
    same = again(text=texts, padding=True, return_tensors="pt", **media)
    assert inputs.keys() == same.keys() and all(torch.equal(inputs[k], same[k]) for k in inputs)
    part = {"type": "video", "video": films[0]}
    messages = [
        [{"role": "user", "content": [{"type": "text", "text": "what"}, part]}],
        [{"role": "user", "content": [part] * 2}],
    ]
    chat = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", padding=True, add_generation_prompt=True
    )
    assert check(model, chat) == [alone[0]] * 3
    rows = [{"messages": [*one, {"role": "assistant", "content": "it is"}]} for one in messages]
    batch = MultimodalCollator(processor)(rows)
    assert check(model, {k: v for k, v in batch.items() if k != "labels"}) == [alone[0]] * 3
    assert model(**batch).loss.isfinite()
    assert model.generate(**chat, max_new_tokens=2, do_sample=False).shape[0] == 2


@needs_torchvision
@pytest.mark.parametrize("key", PAIRS)
def test_the_tensors_are_the_processors_own_in_any_wrapping(key):
    encoder, name, settings, _ = PAIRS[key]
    processor, config, frames = video_processor(name, **settings), encoder().config, film(4)
    expected = processor(videos=[frames], return_tensors="pt")
    images = [Image.fromarray(x) for x in frames]
    forms = [
        frames,
        images,
        list(frames),
        torch.tensor(frames),
        frames.transpose(0, 3, 1, 2),
        {"video": images},
        frames.tolist(),
    ]
    for form in forms:
        found = run_video_processor(processor, "film", [form], {}, config, 3)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    floats = frames.astype(np.float32) / 255
    expected = processor(videos=[floats], return_tensors="pt", do_rescale=False)
    for form in (floats, torch.tensor(floats), list(floats)):
        found = run_video_processor(processor, "film", [form], {"do_rescale": False}, config, 3)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@needs_torchvision
@pytest.mark.parametrize("name", ["LlavaOnevisionVideoProcessor", "Qwen2VLVideoProcessor"])
@pytest.mark.parametrize(
    ("settings", "options", "kept"),
    [
        ({}, {}, list(range(12))),
        ({"num_frames": 4}, {}, list(range(12))),  # as in transformers: nothing is sampled unless do_sample_frames
        ({"num_frames": 4, "do_sample_frames": True}, {}, [0, 3, 6, 9]),
        ({"num_frames": 4, "do_sample_frames": True}, {"do_sample_frames": False}, list(range(12))),
        ({"num_frames": 4}, {"do_sample_frames": True}, [0, 3, 6, 9]),
        ({"num_frames": 4, "do_sample_frames": True}, {"num_frames": 6}, [0, 2, 4, 6, 8, 10]),
        ({"num_frames": 4, "do_sample_frames": True}, {"fps": 4, "source_fps": 8}, [0, 2, 4, 6, 8, 10]),
        ({"fps": 4, "do_sample_frames": True}, {"source_fps": 8}, [0, 2, 4, 6, 8, 10]),
        ({"fps": 4, "do_sample_frames": True}, {"num_frames": 4}, [0, 3, 6, 9]),
        ({}, {"num_frames": 4}, [0, 3, 6, 9]),
        ({}, {"fps": 4, "video_metadata": [{"total_num_frames": 12, "fps": 8}]}, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_which_frames_are_kept(name, settings, options, kept):
    processor = video_processor(
        name, **settings, **(PACKED if name.startswith("Qwen") else {"size": {"height": 8, "width": 8}})
    )
    before = processor.to_dict()
    frames, config = film(12), tiny.siglip().config
    found = run_video_processor(processor, "film", [frames], options, config, 3)
    expected = processor(videos=[frames[kept]], return_tensors="pt", do_sample_frames=False)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert processor.to_dict() == before


@needs_torchvision
@pytest.mark.parametrize(
    ("name", "settings", "options", "message"),
    [
        (None, {}, {"num_frames": 13}, "film, item 0: 13 frames were asked for, but the video has 12"),
        (None, {}, {"num_frames": 0}, "positive integer, got 0"),
        (None, {}, {"num_frames": 2, "fps": 1}, "two ways of sampling"),
        (None, {}, {"fps": 1}, "fps=1 needs the video's own rate"),
        (None, {}, {"num_frames": 2, "do_sample_frames": False}, "film, item 0: num_frames=2, .* do_sample_frames=False for none"),
        (None, {"fps": 2}, {"do_sample_frames": True}, "film, item 0: Llava.* samples 2 frames per second: .*source_fps=.*do_sample_frames=False"),
        (None, {"num_frames": 20}, {"do_sample_frames": True}, "film, item 0: Llava.* cannot sample its 12 frames"),
        (None, {}, {"video_metadata": {"total_num_frames": 99}}, "film, item 0: its video_metadata tells of 99 frames, but 12"),
        (None, {}, {"video_metadata": {"total_num_frames": 99, "frames_indices": [1]}}, "tells of 1 frames, but 12"),
        (None, {}, {"video_metadata": [{}, {}]}, "film: expected video_metadata of 1 videos"),
        (None, {}, {"video_metadata": {"fps": 3}, "source_fps": 4}, "says 3 frames per second, the call says 4"),
        (None, {}, {"video_metadata": {"colour": 3}}, "unknown entries .*colour"),
        (None, {}, {"video_metadata": {"frames_indices": range(12), "total_num_frames": 99}, "num_frames": 4}, "samples already"),
        ("Qwen2VLVideoProcessor", {}, {"num_frames": 3}, "num_frames=3 was asked for, but Qwen2VLVideoProcessor samples 4"),
        ("Qwen2VLVideoProcessor", {}, {"do_sample_frames": True}, "Qwen2VLVideoProcessor cannot sample its 12 frames"),
        ("Qwen3VLVideoProcessor", {}, {}, "Qwen3VLVideoProcessor samples 2 frames per second: "),
    ],
)  # fmt: skip
def test_frames_that_cannot_be_kept_as_was_asked(name, settings, options, message):
    processor = video_processor(name or "LlavaOnevisionVideoProcessor", **settings)
    with pytest.raises(ValueError, match=message):
        run_video_processor(processor, "film", [film(12)], options, tiny.siglip().config, 3)


@needs_torchvision
def test_a_processor_that_samples_by_time_needs_no_rate_where_a_number_is_asked_for():
    processor, frames = (
        video_processor("Qwen3VLVideoProcessor", size={"shortest_edge": 1024, "longest_edge": 4096}),
        film(12),
    )
    found = run_video_processor(processor, "film", [frames], {"num_frames": 4}, tiny.siglip().config, 3)
    assert found["video_grid_thw"][0, 0] == 4 // processor.temporal_patch_size


@needs_torchvision
def test_metadata_of_frames_that_were_sampled_already_is_taken():
    processor, frames = video_processor(size={"height": 8, "width": 8}), film(4)
    metadata = VideoMetadata(total_num_frames=90, fps=30, frames_indices=[0, 30, 60, 89])
    for given in (metadata, [metadata], [[metadata]]):
        found = run_video_processor(processor, "film", [frames], {"video_metadata": given}, tiny.siglip().config, 3)
        assert len(found["pixel_values_videos"][0]) == 4
    assert metadata == VideoMetadata(total_num_frames=90, fps=30, frames_indices=[0, 30, 60, 89])


@needs_torchvision
@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (film(0), ValueError, "film, item 1: the video has 0 frames"),
        ("film.mp4", TypeError, "film, item 1: expected the frames of a video, got a file"),
        (film(1)[0], ValueError, "film, item 1: .* got one image"),
        ([film(1)[0], film(1, size=(9, 10))[0]], ValueError, "film, item 1: frame 1 has the size"),
        (film() / 255, ValueError, "film, item 1, frame 0: .*do_rescale"),
    ],
)
def test_what_is_no_video_is_refused_as_for_image_processors(item, error, message):
    with pytest.raises(error, match=message):
        run_video_processor(video_processor(), "film", [film(), item], {}, tiny.siglip().config, 3)


@needs_torchvision
def test_arguments_numbers_of_frames_and_sizes_that_do_not_fit(monkeypatch):
    processor, config = video_processor(size={"height": 8, "width": 8}), tiny.siglip().config
    for options in ({"colour": 1}, {"return_metadata": True}):
        with pytest.raises(TypeError, match=f"film: Llava.* takes no argument .*{next(iter(options))}"):
            run_video_processor(processor, "film", [film()], options, config, 3)
    with pytest.raises(ValueError, match="film, item 1: 3 frames are left, but the encoder takes 4"):
        run_video_processor(processor, "film", [film(), film(3)], {}, VideoMAEConfig(num_frames=4), 3)
    with pytest.raises(ValueError, match=r"film, item 0: Llava.* cannot process its 4 frames of \(12, 10, 3\)"):
        run_video_processor(processor, "film", [film()], {"size": {"height": -1, "width": 2}}, config, 3)
    with pytest.raises(ValueError, match="the frames of item 1 become"):
        run_video_processor(processor, "film", [film(), film(4, size=(9, 9))], {"do_resize": False}, config, 3)
    monkeypatch.setattr(limits, "MAX_VIDEO_FRAMES", 3)
    with pytest.raises(ValueError, match="sample fewer.* 4, more than .*MAX_VIDEO_FRAMES = 3"):
        run_video_processor(processor, "film", [film()], {}, config, 3)


@needs_torchvision
@pytest.mark.parametrize("key", ["videomae", "vjepa2", "qwen2_vl"])
def test_video_processors_are_found_beside_an_encoder(key, tmp_path):
    encoder, name, settings, _ = PAIRS[key]
    encoder().save_pretrained(tmp_path)
    video_processor(name, **settings).save_pretrained(tmp_path)
    spec = {"film": {"model": str(tmp_path), "kind": "video"}}
    if key == "qwen2_vl":  # the tower of a model has no Auto class of its own
        spec = {"film": {"model": tiny.qwen2_vl(), "kind": "video", "processor": video_processor(name, **settings)}}
    model, processor = compose(tiny.llama(), spec, tokenizer=tiny.tokenizer())
    assert is_video_processor(processor.video_processor)
    check(model, processor(text="<video>", videos=film(4), return_tensors="pt"))


@pytest.mark.skipif(is_torchvision_available(), reason="tells what is said without torchvision")
def test_without_torchvision_a_stored_video_processor_says_what_it_needs():
    with pytest.raises(
        ValueError, match="film: VideoMAEVideoProcessor needs torchvision, which is not installed: pip install"
    ):
        build_subprocessor({"video_processor_type": "VideoMAEVideoProcessor"}, "film")


@needs_torchvision
@pytest.mark.parametrize("name", ["CLIP", "Siglip", "ConvNext"])
def test_an_image_processor_of_pillow_loads_as_torchvisions(name):
    pillow = getattr(transformers, f"{name}ImageProcessorPil")(size={"shortest_edge": 40})
    loaded = build_subprocessor(describe_subprocessor(pillow, "vision"), "vision")
    assert type(loaded) is tiny.IMAGES[name] and loaded.to_dict() == pillow.to_dict()
    assert not is_video_processor(loaded)


def test_encoders_of_whole_videos_are_no_video_processors():
    assert not is_video_processor(
        VideoMAEModel(VideoMAEConfig(**SIZES, image_size=8, num_frames=4, intermediate_size=16))
    )
