"""Processors of single modalities: taken out of larger ones, and run."""

import numpy as np
import pytest
import tiny
import torch
from catalog_processors import SOUNDS, build_processor
from helpers import compose_tiny
from PIL import Image
from transformers import (
    CLIPProcessor,
    DacFeatureExtractor,
    DetrImageProcessorPil,
    GLPNImageProcessorPil,
    Idefics3ImageProcessorPil,
    IdeficsImageProcessorPil,
    Pix2StructImageProcessorPil,
    WhisperProcessor,
)

from cornstarch_hf import MultimodalCollator
from cornstarch_hf.processing.media import FIRST, LAST
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


# ---- where the channels are, and what a processor makes of numbers


def asked(way, image, options):
    """The pixels of an image by a call, a chat or the collator."""
    _, processor = compose_tiny(["clip"])
    if way == "call":
        return processor(text="<image>", images=image, images_kwargs=options, return_tensors="pt")["pixel_values"]
    if way == "setting":
        for key, value in options.items():
            setattr(processor.processors["vision"], key, value)
        return processor(text="<image>", images=image, return_tensors="pt")["pixel_values"]
    talk = [{"role": "user", "content": [{"type": "image", "image": image}]}, {"role": "assistant", "content": "seven"}]
    if way == "chat":
        told = {"images_kwargs": options, "return_dict": True, "return_tensors": "pt"}
        return processor.apply_chat_template(talk, tokenize=True, **told)["pixel_values"]
    return MultimodalCollator(processor, processor_kwargs={"images_kwargs": options})([{"messages": talk}])[
        "pixel_values"
    ]


@pytest.mark.parametrize("way", ["call", "chat", "collator", "setting"])
@pytest.mark.parametrize("stated", [FIRST, LAST])
@pytest.mark.parametrize("shape", [(3, 50, 3), (1, 3, 3), (3, 9, 1)])
@pytest.mark.parametrize("floats", [False, True])
def test_a_stated_layout_is_obeyed_as_by_the_image_processor_alone(way, stated, shape, floats):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    channels = shape[0] if stated == FIRST else shape[-1]
    image = np.repeat(image, 3, 0 if stated == FIRST else 2) if channels == 1 else image  # grey becomes RGB
    image = (image / 255).astype(np.float32) if floats else image
    last = image.transpose(1, 2, 0) if stated == FIRST else image
    if not floats:
        expected = tiny.clip_processor()(Image.fromarray(np.ascontiguousarray(last)), return_tensors="pt")[
            "pixel_values"
        ]
    else:
        expected = tiny.clip_processor()(last, do_rescale=False, input_data_format=LAST, return_tensors="pt")[
            "pixel_values"
        ]
    found = asked(way, image, {"input_data_format": stated} | ({"do_rescale": False} if floats else {}))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["call", "chat", "collator"])
def test_an_array_that_may_be_read_two_ways_is_refused(way):
    with pytest.raises(ValueError, match=r"vision, item 0: either end of the shape \(3, 50, 3\) .*input_data_format"):
        asked(way, np.zeros((3, 50, 3), np.uint8), {})
    with pytest.raises(ValueError, match="input_data_format must be 'channels_first' or 'channels_last', got 'HWC'"):
        asked(way, np.zeros((5, 6, 3), np.uint8), {"input_data_format": "HWC"})


def test_pictures_and_arrays_of_one_call_are_each_read_as_they_lie():
    _, processor = compose_tiny(["clip"])
    picture, array = (
        tiny.image(0, (3, 9)),
        np.random.default_rng(0).integers(0, 256, (3, 40, 4)).astype(np.uint8)[..., :3],
    )
    options = {"input_data_format": FIRST}
    found = processor(text="<image><image>", images=[picture, array], images_kwargs=options, return_tensors="pt")
    turned = Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))
    expected = tiny.clip_processor()([picture, turned], return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("stated", [FIRST, LAST])
def test_frames_of_a_video_follow_the_stated_layout(stated):
    _, processor = compose_tiny({"film": "clip"}, film={"kind": "video"})
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 50, 3)).astype(np.uint8)
    call = {"text": "<video>", "videos": frames, "return_tensors": "pt"}
    found = processor(videos_kwargs={"input_data_format": stated}, **call)["pixel_values"]
    images = [Image.fromarray(np.ascontiguousarray(x.transpose(1, 2, 0)) if stated == FIRST else x) for x in frames]
    assert torch.equal(found[0], tiny.clip_processor()(images, return_tensors="pt")["pixel_values"])
    with pytest.raises(ValueError, match="film, item 0, frame 0: either end of the shape"):
        processor(**call)


@pytest.mark.parametrize("way", ["call", "chat", "collator"])
@pytest.mark.parametrize(
    ("key", "fewest"), [("wav2vec2", 20), ("speech_to_text", 560)], ids=["waveform", "features normalised by frames"]
)
def test_a_sound_that_is_too_short_is_refused_with_the_fewest_that_do(way, key, fewest, monkeypatch):
    if key == "speech_to_text":
        monkeypatch.setitem(
            tiny.ENCODERS, key, ("audio", tiny.speech_to_text, tiny.speech_to_text_processor, tiny.sound)
        )
    model, processor = compose_tiny([key])

    def heard(*sounds):
        if way == "call":
            return processor(
                text="<audio>" * len(sounds), audio=list(sounds), sampling_rate=16_000, return_tensors="pt"
            )
        parts = [{"type": "audio", "audio": sound} for sound in sounds]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "seven"}]
        if way == "collator":
            return MultimodalCollator(processor)([{"messages": talk}])
        told = {"return_dict": True, "return_tensors": "pt", "sampling_rate": 16_000}
        return processor.apply_chat_template(talk, tokenize=True, **told)

    for samples in (1, 9, fewest - 1):
        message = f"audio, item 1: the sound has {samples} samples, and its encoder makes no feature of less than {fewest}: pad it"
        with pytest.raises(ValueError, match=message):
            heard(tiny.sound(0, 900), tiny.sound(1, samples))
    model(**heard(tiny.sound(0, 900), tiny.sound(1, fewest)))


def test_what_a_processor_makes_infinite_is_refused_with_the_item():
    _, processor = compose_tiny(["wav2vec2"])
    processor.processors["audio"].zero_mean_unit_var_norm = lambda values, *args, **kwargs: [x / 0 for x in values]
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match="audio, item 0: its processor gave input_values with .*not finite"),
    ):
        processor(text="<audio>", audio=tiny.sound(), sampling_rate=16_000, return_tensors="pt")
    _, processor = compose_tiny(["clip"])
    processor.processors["vision"].image_std = [0.0, 0.0, 0.0]
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match="vision, item 0: its processor gave pixel_values with .*not finite"),
    ):
        processor(text="<image>", images=tiny.image(), return_tensors="pt")


@pytest.mark.parametrize("name", ["Gemma3nAudio", "Parakeet", "SeamlessM4T", "Speech2Text", "Wav2Vec2"])
def test_sounds_in_a_batch_give_what_they_give_alone(name):
    key = f"{name}FeatureExtractor"
    extractor = build_processor(key, SOUNDS[key])
    sounds, rate = [tiny.sound(i, n) for i, n in enumerate((1000, 6000, 3111))], {"sampling_rate": 16_000}
    batch = run_subprocessor(extractor, "audio", "audio", sounds, rate, None)
    for i, sound in enumerate(sounds):
        alone = run_subprocessor(extractor, "audio", "audio", [sound], rate, None)
        for key, (value,) in alone.items():  # (length, ...), in the batch with padding behind
            row = batch[key][i]
            assert torch.equal(row[: len(value)], value) and (not key.endswith("mask") or not row[len(value) :].any())


def test_items_of_several_lengths_for_an_encoder_without_a_mask():
    extractor, sounds = DacFeatureExtractor(sampling_rate=16_000, hop_length=8), [tiny.sound(0), tiny.sound(1, 2000)]

    def run(items, processor=extractor, kind="audio", **options):
        return run_subprocessor(processor, "x", kind, items, options, tiny.esm().config, maskless=True)

    with pytest.raises(
        ValueError, match=r"x, item 1: DacFeature.* \(1600,\) for item 0 and \(2000,\) for item 1.*no mask"
    ):
        run(sounds, sampling_rate=16_000)
    assert run([sounds[0]] * 2, sampling_rate=16_000)["input_values"].shape == (2, 1, 1600)
    with pytest.raises(
        ValueError, match="x, item 1: .*TokenizersBackend gives sizes of 3 for item 0 and 2 for item 1.*no mask"
    ):
        run(["LAG", "LA"], tiny.protein_tokenizer(), "text")
    options = {"sampling_rate": 16_000, "return_attention_mask": False}
    with pytest.raises(ValueError, match="audio, item 1: Wav2Vec2.*no mask"):  # that the caller turned off
        run_subprocessor(tiny.wav2vec2_processor(), "audio", "audio", sounds, options, None)
