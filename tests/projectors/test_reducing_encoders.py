"""Encoders whose projector reduces: grids of every kind of tower, ragged items, callbacks before and after."""

import pytest
import tiny
import torch
import user_parts
from native_parts import randomized
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel, VideoMAEConfig, VideoMAEModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.encoders.counting import FeatureCounter

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 4}


def reducing(model, projection_type, width=16, out=8, options=None, **settings):
    fields = {"projection_type": projection_type, "in_features": width, "out_features": out, **(options or {})}
    made = MultimodalProjector(MultimodalProjectorConfig(**fields))
    randomized(made)
    return ModalEncoderModule(model, made, **settings).eval()


def counted(encoder, name="vision", **inputs):
    """What a processor would count for one item."""
    encoder.projector.config.out_features = 8
    model = MultimodalModel(encoders={name: encoder}, language_model=tiny.llama(hidden_size=8, head_dim=2)).eval()
    return FeatureCounter(model.config).count(name, inputs), FeatureCounter(model.config, model.encoders).count(
        name, inputs
    )


def test_images_that_are_no_squares():
    made = reducing(tiny.siglip(), "pixel_shuffle")
    pixels = torch.randn(2, 3, 8, 16)
    options = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    found = made(**options).pooler_output
    features = made.module(**options).last_hidden_state  # (2, 2 * 4, 16)
    blocks = features.reshape(2, 2, 2, 2, 16)  # items, rows, block, columns of a block, width
    expected = torch.stack([blocks[:, :, j].flatten(1) for j in range(2)], 1)
    assert torch.equal(torch.stack(found), made.projector.projection.head(expected))
    one = {**options, "pixel_values": pixels[:1]}
    assert counted(made, **one) == (2, 2)


def test_maps_have_their_own_grid_whichever_axis_holds_the_channels():
    made = reducing(tiny.convnext(), "avg_pool", width=20)
    pixels = torch.randn(2, 3, 64, 160)
    maps = made.module(pixels).last_hidden_state
    expected = made.projector.projection.head(
        nn.functional.avg_pool2d(maps, 2, ceil_mode=True).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(torch.stack(made(pixel_values=pixels).pooler_output), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (2, 3, 8)
    with pytest.raises(ValueError, match="vision: the projector .*avg_pool.* 9 features"):
        cut = reducing(tiny.convnext(), "avg_pool", width=20, drop_prefix=1)
        cut.name = "vision"
        cut(pixel_values=pixels)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "avg_pool", "conv", "frame_stack", "resampler"])
def test_packed_items_are_reduced_alone(kind):
    small = (
        {"num_queries": 3, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4} if kind == "resampler" else {}
    )
    small |= {"remainder": "pad"} if kind == "pixel_shuffle" else {}
    made = reducing(tiny.qwen2_vl(), kind, width=24, options=small)
    grids = [(1, 4, 4), (1, 4, 12), (3, 6, 8), (1, 4, 4)]
    items = [torch.randn(t * h * w, 96) for t, h, w in grids]
    together = made(hidden_states=torch.cat(items), grid_thw=torch.tensor(grids)).pooler_output
    for item, grid, found in zip(items, grids, together, strict=True):
        (alone,) = made(hidden_states=item, grid_thw=torch.tensor([grid])).pooler_output
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)
        assert counted(made, hidden_states=item, grid_thw=torch.tensor([grid])) == (len(found),) * 2


def test_unmerged_patches_of_a_packed_tower_lie_in_no_rows():
    made = reducing(tiny.qwen2_vl(), "pixel_shuffle", layer=-2)
    with pytest.raises(
        ValueError, match="1 x 4 x 4 patches gave 16 features, but patches merged 2 x 2 give 4: only merged"
    ):
        made(hidden_states=torch.randn(16, 96), grid_thw=torch.tensor([[1, 4, 4]]))


def test_padded_patches_of_siglip2():
    torch.manual_seed(0)
    made = reducing(Siglip2VisionModel(Siglip2VisionConfig(**VIT, num_patches=16, vision_use_head=False)), "avg_pool")
    shapes = [(2, 4), (3, 3), (1, 5)]
    patches, mask = torch.zeros(3, 9, 48), torch.zeros(3, 9, dtype=torch.long)
    for i, (rows, columns) in enumerate(shapes):
        patches[i, : rows * columns], mask[i, : rows * columns] = torch.randn(rows * columns, 48), 1
    inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}
    together = made(**inputs).pooler_output
    assert [len(x) for x in together] == [2, 4, 3]
    for i, (rows, columns) in enumerate(shapes):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        unpadded = one | {key: one[key][:, : rows * columns] for key in ("pixel_values", "pixel_attention_mask")}
        (alone,) = made(**unpadded).pooler_output
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-5)
        assert counted(made, **one) == (len(alone),) * 2


def test_frames_of_a_video():
    torch.manual_seed(0)
    tower = VideoMAEModel(VideoMAEConfig(**VIT, image_size=16, num_frames=4, tubelet_size=2))
    video = {"pixel_values": torch.randn(2, 4, 3, 16, 16)}
    for options, count in (({}, 8), ({"dims": 3, "pool_size": [2, 4, 2]}, 2)):
        made = reducing(tower, "avg_pool", options=options, kind="video")
        assert [len(x) for x in made(**video).pooler_output] == [count] * 2
        assert counted(made, "clip", pixel_values=video["pixel_values"][:1]) == (count, count)
    frames = tower(**video).last_hidden_state.reshape(2, 2, 4, 4, 16)
    halves = frames.reshape(2, 1, 2, 1, 4, 2, 2, 16).mean((2, 4, 6)).flatten(1, 3)
    torch.testing.assert_close(torch.stack(made(**video).pooler_output), made.projector.projection.head(halves))


@pytest.mark.parametrize("kind", ["frame_stack", "avg_pool", "conv"])
def test_padded_sounds_give_what_they_give_alone(kind):
    made = reducing(tiny.wav2vec2(), kind, options={"dims": 1} if kind != "frame_stack" else {})
    items = [torch.randn(n) for n in (400, 231, 400, 90)]
    batch = nn.utils.rnn.pad_sequence(items, batch_first=True)
    mask = torch.stack([(torch.arange(400) < len(x)).long() for x in items])
    together = made(input_values=batch, attention_mask=mask).pooler_output
    for item, found in zip(items, together, strict=True):
        (alone,) = made(input_values=item[None]).pooler_output
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        assert counted(made, "audio", input_values=item[None]) == (len(alone),) * 2


# ---- callbacks


def test_callbacks_run_before_and_after_the_reduction():
    seen = []

    def before(inputs, output):
        seen.append(tuple(output[0].shape))
        output.last_hidden_state = output[0][:, 1:]
        return output

    def after(inputs, output):
        seen.append(tuple(output[0].shape))
        return output

    made = reducing(
        tiny.clip(), "pixel_shuffle", postprocess_module_callback=before, postprocess_projector_callback=after
    )
    assert len(made(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output[0]) == 1
    assert seen == [(2, 5, 16), (2, 1, 8)]


def test_a_callback_states_the_grid_of_what_it_leaves():
    def left_half(inputs, output, state=True):
        output.last_hidden_state = output[0].unflatten(1, (4, 4))[:, :, :2].flatten(1, 2)
        if state:
            output["feature_grids"] = torch.tensor([[4, 2]] * len(output[0]))
        return output

    pixels = torch.randn(2, 3, 16, 16)
    made = reducing(tiny.siglip(image_size=16), "pixel_shuffle", postprocess_module_callback=left_half)
    assert [len(x) for x in made(pixel_values=pixels).pooler_output] == [2, 2]
    model = MultimodalModel(encoders={"vision": made}, language_model=tiny.llama(hidden_size=8, head_dim=2))
    assert FeatureCounter(model.config, model.encoders).count("vision", {"pixel_values": pixels[:1]}) == 2
    made.postprocess_module_callback = lambda inputs, output: left_half(inputs, output, state=False)
    with pytest.raises(
        ValueError, match=r"8 features do not fill the grid of 4 x 4 = 16 patches.*output\['feature_grids'\]"
    ):
        made(pixel_values=pixels)


def test_a_class_token_is_named_with_both_numbers():
    made = reducing(tiny.clip(image_size=16), "avg_pool")
    with pytest.raises(
        ValueError,
        match=r"image: the projector \(avg_pool\).* 17 features .*4 x 4 = 16 patches, 1 too many.*drop_prefix=1",
    ):
        made(pixel_values=torch.randn(1, 3, 16, 16))


def test_features_of_nobody_are_not_reduced():
    made = reducing(
        tiny.clip(), "frame_stack", postprocess_module_callback=lambda inputs, output: (output[0].flatten(0, 1),)
    )
    with pytest.raises(
        ValueError, match=r"image: features of shape \(10, 16\) do not tell which belong to which item.*feature_lens"
    ):
        made(pixel_values=torch.randn(2, 3, 8, 8))


# ---- projections of users


def test_a_users_projection_gets_each_item_alone_and_its_grid():
    shapes = []

    class Seen(user_parts.Rows):
        def forward(self, x, grid):
            shapes.append((tuple(x.shape), grid))
            return super().forward(x, grid)

    made = ModalEncoderModule(tiny.qwen2_vl(), MultimodalProjector(MultimodalProjectorConfig(), Seen(24, 8))).eval()
    grids = [(1, 4, 4), (1, 2, 8), (1, 4, 4)]
    packed = torch.randn(48, 96)
    found = made(hidden_states=packed, grid_thw=torch.tensor(grids)).pooler_output
    assert [len(x) for x in found] == [2, 1, 2] and shapes == [((2, 4, 24), (1, 2, 2)), ((1, 4, 24), (1, 1, 4))]


def test_a_users_projection_that_returns_something_else_is_refused():
    class Wrong(user_parts.Halving):
        def feature_count(self, length, grid):
            return length

    class Flat(user_parts.Halving):
        def forward(self, x):
            return self.linear(x).flatten(0, 1)

    for cls, message in (
        (Wrong, r"\(2, 4, 16\) to \(2, 4, 8\), it gave \(2, 2, 8\)"),
        (Flat, r"\(2, fewer, 8\), it gave \(8, 8\)"),
    ):
        made = ModalEncoderModule(tiny.siglip(), MultimodalProjector(MultimodalProjectorConfig(), cls(16, 8)))
        with pytest.raises(ValueError, match=rf"The projection {cls.__name__} must map .*{message}"):
            made(pixel_values=torch.randn(2, 3, 8, 8))
