"""Sizes that an encoder does not take are refused by the processor and the model, and all that it runs is let through."""

import films
import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import ASTConfig, ASTModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel, compose
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.encoders.item_sizes import has_other_size, refused_by

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def vit():
    return ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)).eval()


def swin(absolute):
    config = SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2,
                        use_absolute_embeddings=absolute)  # fmt: skip
    return SwinModel(config).eval()


def spectra():
    return ASTModel(
        ASTConfig(**SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8)
    ).eval()


# Encoder, kind, input, and sizes of an item, each with whether the encoder runs it by itself.
CASES = {
    "clip": (tiny.clip, "image", "pixel_values", {(3, 8, 8): True, (3, 36, 36): False, (3, 4, 8): False, (1, 8, 8): False}),
    "siglip": (tiny.siglip, "image", "pixel_values", {(3, 8, 8): True, (3, 16, 12): False, (4, 8, 8): False}),
    "vit": (vit, "image", "pixel_values", {(3, 8, 8): True, (3, 12, 12): False, (1, 12, 12): False}),
    "dinov2": (tiny.dinov2, "image", "pixel_values", {(3, 8, 8): True, (3, 36, 28): True, (1, 8, 8): False}),
    "convnext": (tiny.convnext, "image", "pixel_values", {(3, 36, 40): True, (3, 224, 224): True, (2, 36, 36): False}),
    "swin": (lambda: swin(False), "image", "pixel_values", {(3, 8, 8): True, (3, 12, 20): True, (3, 9, 7): True}),
    "swin with a table": (lambda: swin(True), "image", "pixel_values", {(3, 8, 8): True, (3, 16, 16): False}),
    "whisper": (tiny.whisper, "audio", "input_features", {(8, 12): True, (8, 24): False, (8, 6): False, (7, 12): False}),
    "wav2vec2": (tiny.wav2vec2, "audio", "input_values", {(1600,): True, (3111,): True}),
    "spectra": (spectra, "audio", "input_values", {(16, 8): True, (32, 8): False}),
    "videomae": (films.WHOLE["videomae"], "video", "pixel_values", {(4, 3, 8, 8): True, (4, 3, 16, 16): False}),
    "film by frame": (tiny.clip, "video", "pixel_values", {(2, 3, 8, 8): True, (2, 3, 12, 12): False}),
    "film of any size": (tiny.dinov2, "video", "pixel_values", {(2, 3, 8, 8): True, (3, 3, 12, 20): True}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, kind, key, sizes = CASES[request.param]
    torch.manual_seed(0)
    encoder = ModalEncoderModule(build(), kind=kind)
    return MultimodalModel(encoders={"thing": encoder}, language_model=tiny.llama()).eval(), key, sizes


def fitted(model, key, size):
    """An input of that size; AssertionError where the case speaks of another than the encoder has."""
    assert key in model.config.modality("thing")["input_names"].values()
    return {key: torch.rand(1, *size)}


def test_what_the_encoder_runs_is_counted_and_what_it_refuses_is_refused_by_name(case):
    model, key, sizes = case
    counter = FeatureCounter(model.config, model.encoders)
    for size, runs in sizes.items():
        inputs = fitted(model, key, size)
        if runs:
            with torch.no_grad():
                (features,) = model.encoders["thing"](**inputs).pooler_output
            assert counter.count("thing", inputs) == len(features)
            continue
        own = size[-3:] if model.encoders["thing"].by_frame else size
        told = (
            rf"thing: \w+ takes {key} of \d+( x \d+)+, got {' x '.join(map(str, own))} \(\w+: .*\): let its processor"
        )
        with pytest.raises(ValueError, match=told):
            counter.count("thing", inputs)
        with pytest.raises(ValueError, match=told) as caught:
            model.encoders["thing"](**inputs)
        assert caught.value.__cause__ is not None  # the encoder's own words


@pytest.mark.parametrize("call", ["forward", "features", "generate"])
@pytest.mark.parametrize("shape", [(1, 3, 36, 36), (2, 3, 4, 4), (1, 1, 8, 8)])
def test_pixels_given_to_the_model_itself(call, shape):
    model, processor = compose_tiny(["clip"])
    ids, pixels = torch.tensor([[processor.placeholder_ids["vision"]] * 5]), torch.rand(shape)
    run = {
        "forward": lambda: model(input_ids=ids, pixel_values=pixels),
        "features": lambda: model.get_image_features(pixels),
        "generate": lambda: model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=1),
    }[call]
    got = " x ".join(map(str, shape[1:]))
    with pytest.raises(ValueError, match=f"vision: CLIPVisionModel takes pixel_values of 3 x 8 x 8, got {got}"):
        run()


@pytest.mark.parametrize(
    "error", [RuntimeError("of its own"), torch.OutOfMemoryError("of its own"), ValueError("of its own")]
)
@pytest.mark.parametrize(("key", "size"), [("dinov2", 36), ("convnext", 36), ("clip", 8)])
def test_an_error_that_the_size_did_not_make_stays_as_it_is(key, size, error):
    model, _ = compose_tiny([key])

    def fail(*_):
        raise error

    model.encoders["vision"].module.register_forward_pre_hook(fail)
    with pytest.raises(type(error), match="^of its own$") as caught:
        model.encoders["vision"](pixel_values=torch.rand(1, 3, size, size))
    assert caught.value is error


def test_the_size_that_the_configuration_names_is_no_other():
    model, _ = compose_tiny(["clip"])
    assert (
        refused_by(model.encoders["vision"].module, {"pixel_values": torch.rand(2, 3, 8, 8)}, "image", "vision") is None
    )
    assert not has_other_size({"pixel_values": torch.rand(2, 3, 8, 8)}, model.config.vision_config, "image")


OFF = {"clip": {"do_resize": False, "do_center_crop": False}, "siglip": {"do_resize": False}}


@pytest.mark.parametrize("key", OFF)
@pytest.mark.parametrize("options", ["off", "size"])
def test_the_processor_names_the_item_the_sizes_and_the_remedy(key, options):
    model, processor = compose_tiny([key])
    given = OFF[key] if options == "off" else {"size": {"height": 12, "width": 12}, "do_resize": True}
    given |= {"do_center_crop": False} if key == "clip" else {}
    images = [[tiny.image(0, (8, 8))], [tiny.image(1, (36, 36))]]
    call = {"text": ["<image>"] * 2, "images": [images[1], images[1]], "images_kwargs": given}
    with pytest.raises(
        ValueError, match=r"vision, item 0: .* of 3 x 8 x 8, got 3 x (36 x 36|12 x 12) .*do_resize, do_center_crop"
    ):
        processor(**call)
    if options == "off":
        batch = processor(text=["<image>"], images=[images[0]], images_kwargs=given, return_tensors="pt")
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("road", ["items", "tensors"])
@pytest.mark.parametrize("key", OFF)
def test_positions_that_the_caller_has_interpolated_are_counted(key, road):
    model, processor = compose_tiny([key])
    switch = {"interpolate_pos_encoding": True}
    image = tiny.image(1, (36, 28))
    if road == "items":
        call = {"images": [image], "images_kwargs": OFF[key] | switch}
    else:
        call = {"encoder_inputs": {"vision": {"pixel_values": torch.rand(1, 3, 28, 36), **switch}}}
    batch = processor(text="<image>", **call, return_tensors="pt")
    assert model(**batch, **switch).logits.isfinite().all()
    with pytest.raises(ValueError, match="or pass interpolate_pos_encoding=True to the model"):
        model(**batch)
    with pytest.raises(TypeError, match="vision: interpolate_pos_encoding must be True or False, got 'yes'"):
        processor(text="<image>", images=[image], images_kwargs={"interpolate_pos_encoding": "yes"})
    told = processor._get_num_multimodal_tokens(image_sizes=[(28, 36)], images_kwargs=OFF[key] | switch)
    assert told.num_image_tokens == [(batch["input_ids"] == processor.placeholder_ids["vision"]).sum()]


def test_an_encoder_that_takes_any_size_has_no_such_argument():
    _, processor = compose_tiny(["dinov2"])
    with pytest.raises(TypeError, match=r"takes no option \['interpolate_pos_encoding'\]"):
        processor(text="<image>", images=[tiny.image()], images_kwargs={"interpolate_pos_encoding": True})


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 0, 1]])
def test_a_sound_of_several_windows_is_named_among_short_ones(order):
    _, processor = compose_tiny(["whisper"])
    window = processor.feature_extractor.n_samples
    sounds = [tiny.sound(0, 1600), tiny.sound(1, 2 * window + 160)]
    call = {"audio": [[sounds[i]] for i in order], "text": ["<audio>"] * len(order), "sampling_rate": 16_000}
    told = (
        f"audio, item {order.index(1)}: WhisperEncoder takes input_features of 8 x 12, got 8 x 24 .*split longer sounds"
    )
    with pytest.raises(ValueError, match=told):
        processor(**call, audio_kwargs={"truncation": False})
    with pytest.raises(ValueError, match=rf"audio, item {order.index(1)}: the waveform has {2 * window + 160} samples"):
        processor(**call)
    processor(**call, audio_kwargs={"truncation": True})


def test_a_size_is_asked_for_once():
    _, processor = compose_tiny(["dinov2"])
    runs = []
    probe = processor.counter._probe("vision")
    probe.module.register_forward_hook(lambda *_: runs.append(1))
    for _ in range(3):
        processor(text="<image>", encoder_inputs={"vision": {"pixel_values": torch.rand(1, 3, 36, 36)}})
    assert len(runs) == 1
    processor(text="<image>", encoder_inputs={"vision": {"pixel_values": torch.rand(1, 3, 8, 8)}})
    assert len(runs) == 1  # the size that the configuration names


def test_frames_of_a_video_are_refused_with_their_item():
    parts = {"film": {"model": tiny.siglip(), "processor": tiny.siglip_processor(), "kind": "video"}}
    _, processor = compose(tiny.llama(), parts, "linear", tokenizer=tiny.tokenizer())
    videos = [[[tiny.image(i, (12, 12)) for i in range(3)]]]
    with pytest.raises(
        ValueError, match="film, item 0: SiglipVisionModel takes pixel_values of 3 x 8 x 8, got 3 x 12 x 12"
    ):
        processor(text="<video>", videos=videos, videos_kwargs={"do_resize": False})
