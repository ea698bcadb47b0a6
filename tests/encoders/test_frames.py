"""Encoders of images on the frames of videos: each frame as an image of its own, its features in their place."""

import pytest
import tiny
import torch
from native_parts import config as settings
from transformers import TimesformerConfig, TimesformerModel, VideoMAEConfig, VideoMAEModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.encoders.grids import GridQuery, frame_grids, frames_as_items, joined_frames

PIXELS = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 8, "patch_size": 4, "num_frames": 4}  # fmt: skip


def test_frames_become_items_and_their_features_are_joined():
    rows, counts = frames_as_items({"pixel_values": PIXELS, "frame_mask": MASK, "note": 3}, "film")
    assert counts == [2, 4, 1] and rows.keys() == {"pixel_values", "note"}
    assert torch.equal(rows["pixel_values"], torch.cat([PIXELS[0, :2], PIXELS[1], PIXELS[2, :1]]))
    features = torch.arange(7 * 2 * 5.0).reshape(7, 2, 5)
    packed, lengths = joined_frames(features, None, counts)
    assert lengths == [4, 8, 2] and torch.equal(packed, features.flatten(0, 1))
    packed, lengths = joined_frames(features, [1, 2, 1, 1, 1, 1, 2], counts)
    assert lengths == [3, 4, 2] and torch.equal(packed[:3], torch.stack([features[0, 0], *features[1]]))
    whole, lengths = joined_frames(features[:6], None, [3, 3])
    assert lengths is None and torch.equal(whole, features[:6].reshape(2, 6, 5))
    query = GridQuery(rows | {"pixel_values": PIXELS}, settings(patch_size=(8, 4)), "video", [8, 8, 8])
    assert frame_grids(query, "film") == [(4, 1, 2)] * 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": PIXELS[:, 0]}, r"film: expected the frames .*got \{'pixel_values': \(3, 3, 8, 8\)\}"),
        ({"pixel_values": PIXELS, "frame_mask": MASK[:2]}, r"film: frame_mask must be \(3, 4\)"),
        ({"pixel_values": PIXELS, "frame_mask": MASK.flip(-1)}, "zeros after them"),
        ({"pixel_values": PIXELS, "frame_mask": MASK & False}, "zeros after them"),
    ],
)
def test_inputs_that_are_no_frames(inputs, message):
    with pytest.raises(ValueError, match=message):
        frames_as_items(inputs, "film")
    with pytest.raises(ValueError, match="7 features do not divide among 4 frames"):
        frame_grids(GridQuery({"pixel_values": PIXELS[:1]}, settings(), "video", [7]), "film")


def encoder(key, projector=None, **options):
    made = ModalEncoderModule(tiny.ENCODERS[key][1](), projector, kind="video", **options)
    return MultimodalModel({"film": made}, tiny.llama()).eval()


CHOICES = {
    "clip": ("clip", {}),
    "patches": ("clip", {"layer": [-2, 0], "drop_prefix": 1}),
    "siglip": ("siglip", {}),
    "convnext": ("convnext", {}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_each_frame_gives_what_the_image_gives_and_is_counted(choice):
    key, options = CHOICES[choice]
    pixels = PIXELS if key != "convnext" else torch.randn(3, 4, 3, 64, 64)
    model = encoder(key, **options)
    images = ModalEncoderModule(model.film_encoder.module, model.film_encoder.projector, kind="image", **options)
    with torch.no_grad():
        found = model.film_encoder(pixel_values=pixels, frame_mask=MASK).pooler_output
        alone = model.film_encoder(pixel_values=pixels).pooler_output
    counter, bare = FeatureCounter(model.config), FeatureCounter(model.config)
    for i, frames in enumerate(MASK.sum(-1).tolist()):
        with torch.no_grad():
            expected = torch.cat(images(pixel_values=pixels[i, :frames]).pooler_output)
        assert found[i].shape == expected.shape and torch.allclose(found[i], expected, atol=1e-6)
        assert torch.allclose(alone[i][: len(expected)], expected, atol=1e-6)
        padded = {"pixel_values": pixels[i : i + 1], "frame_mask": MASK[i : i + 1]}
        assert counter.count("film", padded) == len(expected)
        assert bare.count("film", {"pixel_values": pixels[i : i + 1, :frames]}) == len(expected)


@pytest.mark.parametrize("kind", ["avg_pool", "pixel_shuffle", "frame_stack"])
def test_projectors_reduce_each_frame(kind):
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type=kind))
    model = encoder("clip", projector, drop_prefix=1)
    with torch.no_grad():
        found = model.film_encoder(pixel_values=PIXELS, frame_mask=MASK).pooler_output
    counter = FeatureCounter(model.config)
    for i, frames in enumerate(MASK.sum(-1).tolist()):
        item = {"pixel_values": PIXELS[i : i + 1], "frame_mask": MASK[i : i + 1]}
        assert counter.count("film", item) == len(found[i]) == frames  # 4 patches of a frame become one feature


def test_encoders_of_whole_videos_get_them():
    for build, config in ((TimesformerModel, TimesformerConfig), (VideoMAEModel, VideoMAEConfig)):
        made = ModalEncoderModule(build(config(**TINY)))
        assert made.kind == "video" and not made.by_frame and "frame_mask" not in made.parameter_names
    assert not ModalEncoderModule(tiny.clip()).by_frame
    assert "frame_mask" in encoder("clip").config.film_modality["input_names"]
