"""Callbacks of converted models: what native models do around towers and projectors, with JSON arguments only.

A checkpoint's code carries this file only where its configuration names one of them.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput

from ..parts.registries import register_callback
from ..projectors.projector import per_item


def patches_with_pixels(mask: Tensor, patch_size: int, whole: bool = False) -> Tensor:
    """Of a mask of pixels ``(items, height, width)`` that of patches: which have a pixel, or are `whole`; in bool."""
    counts = mask.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).sum((-1, -2))
    return counts == patch_size**2 if whole else counts > 0


def patch_mask(inputs: dict[str, Any], patch_size: int) -> dict[str, Any]:
    """`pixel_mask` ``(items, height, width)`` as `patch_attention_mask`, where it is given (Aria)."""
    others = {key: value for key, value in inputs.items() if key != "pixel_mask"}
    if inputs.get("pixel_mask") is None:
        return others
    return others | {"patch_attention_mask": patches_with_pixels(inputs["pixel_mask"], patch_size)}


def real_images(inputs: dict[str, Any], patch_size: int, whole_patches: bool = False) -> dict[str, Any]:
    """Images ``(rows, images, channels, height, width)`` one per row, without those of zeros that pad a row (Idefics 2, 3).

    `pixel_attention_mask` ``(rows, images, height, width)`` becomes `patch_attention_mask`.
    """
    images: Tensor = inputs["pixel_values"].flatten(0, 1)  # (rows * images, channels, height, width)
    real = (images != 0).flatten(1).any(-1)
    images = images[real].contiguous()
    mask = inputs.get("pixel_attention_mask")
    if mask is None:
        mask = torch.ones(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    else:
        mask = mask.flatten(0, 1)[real].contiguous()
    patches = patches_with_pixels(mask, patch_size, whole_patches)
    others = {key: value for key, value in inputs.items() if key != "pixel_attention_mask"}
    return others | {"pixel_values": images, "patch_attention_mask": patches}


def one_batch(inputs: dict[str, Any]) -> dict[str, Any]:
    """Patches of all images ``(patches, ...)`` as a batch of one, which the tower takes (PaddleOCR-VL)."""
    return inputs | {"pixel_values": inputs["pixel_values"].unsqueeze(0)}


def row_grids(inputs: dict[str, Any], output: Any, merge: int) -> Any:
    """Say how features lie whose rows end in one more, without that (HunYuan-VL)."""
    output["feature_grids"] = inputs["grid_thw"][:, 1:] // merge  # (images, 2)
    return output


def tiles(inputs: dict[str, Any], pinpoints: list[list[int]], image_size: int) -> dict[str, Any]:
    """Tiles ``(images, most tiles, channels, height, width)`` one per row, without those that pad (LLaVA-NeXT).

    `image_sizes` ``(images, 2)`` tell how many each image has; with `batch_num_images` a row of several images has one of each.
    """
    pixels: Tensor = inputs["pixel_values"]
    if pixels.ndim != 5:
        return inputs
    counts = _tile_counts(inputs, pinpoints, image_size)
    return inputs | {"pixel_values": torch.cat([x[:n] for x, n in zip(pixels, counts, strict=True)])}


def _tile_counts(inputs: dict[str, Any], pinpoints: list[list[int]], image_size: int) -> list[int]:
    """How many tiles each image has."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    given, sizes = inputs.get("batch_num_images"), inputs["image_sizes"]
    alone = [True] * len(sizes) if given is None else [n == 1 for n in given.tolist() for _ in range(n)]
    return [
        image_size_to_num_patches(size, grid_pinpoints=pinpoints, patch_size=image_size) if cut else 1
        for size, cut in zip(sizes, alone, strict=True)
    ]


class AnyResolution(nn.Module):
    """Puts the tiles of an image together again, cuts off its padding and ends each row by a learnt vector.

    As in LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-OneVision (arXiv 2408.03326).

    Args:
        hidden_size: width of the vector.
        pinpoints: sizes in pixels, height and width, to which images are fitted.
        image_size, patch_size: of the tower.
        aspect_ratio: ``"anyres_max_9"``: features of more than 9 tiles are made fewer; None where they are not.
    """

    def __init__(
        self, hidden_size: int, pinpoints: list[list[int]], image_size: int, patch_size: int, aspect_ratio: str | None = None
    ):  # fmt: skip
        super().__init__()
        self.hidden_size, self.pinpoints, self.aspect_ratio = hidden_size, pinpoints, aspect_ratio
        self.image_size, self.patch_size = image_size, patch_size
        self.image_newline = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, inputs: dict[str, Any], output: Any) -> BaseModelOutput:
        """Projected tiles ``(tiles of all images, tokens, hidden)`` to one ``(n_i, hidden)`` per image.

        Of videos, which have no `image_sizes`, frames ``(videos, frames * tokens, hidden)`` to a quarter and the vector.
        """
        if inputs.get("image_sizes") is None:
            videos: Any = per_item(output.last_hidden_state, output.lengths, "video")
            return BaseModelOutput(last_hidden_state=[self._video(x) for x in videos])  # type: ignore[arg-type]
        counts = _tile_counts(inputs, self.pinpoints, self.image_size)
        images = output.last_hidden_state.split(counts)
        packed: Any = [self._packed(x, size) for x, size in zip(images, inputs["image_sizes"], strict=True)]
        return BaseModelOutput(last_hidden_state=packed)

    def _packed(self, features: Tensor, size: Tensor) -> Tensor:
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

        newline = self.image_newline.to(features)
        if len(features) == 1:
            return torch.cat([features[0], newline[None]])
        side = self.image_size // self.patch_size
        rows, columns = get_anyres_image_grid_shape(size, self.pinpoints, self.image_size)
        # (tiles, tokens, hidden) to maps (hidden, rows of tokens, columns of tokens)
        maps = features[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).contiguous()
        maps = self._fewer(unpad_image(maps.flatten(1, 2).flatten(2, 3), size), side)
        maps = torch.cat([maps, newline[:, None, None].expand(*maps.shape[:-1], 1)], dim=-1)
        return torch.cat([features[0], maps.flatten(1, 2).transpose(0, 1)])

    def _video(self, features: Tensor) -> Tensor:
        side = self.image_size // self.patch_size
        maps = (
            features.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2).contiguous()
        )  # (frames, hidden, rows, columns)
        half = [math.ceil(n / 2) for n in maps.shape[2:]]
        pooled = nn.functional.interpolate(maps, size=half, mode="bilinear").permute(0, 2, 3, 1)
        return torch.cat([pooled.reshape(-1, pooled.shape[-1]), self.image_newline.to(features)[None]])

    def _fewer(self, maps: Tensor, side: int) -> Tensor:
        if self.aspect_ratio is None:
            return maps
        most, (height, width) = int(self.aspect_ratio.removeprefix("anyres_max_")), maps.shape[1:]
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio <= 1.1:
            return maps
        return nn.functional.interpolate(maps[None], [int(height // ratio), int(width // ratio)], mode="bilinear")[0]


class HighResolution(nn.Module):
    """Joins features of a second tower, which sees larger images, to those of the first (DeepSeek-VL, arXiv 2403.05525).

    Args:
        tower: configuration of the second tower.
        grid: side of the square in which features of an image lie.
        global_layer: the layer whose hidden state is added to the last one.
    """

    def __init__(self, tower: dict[str, Any], grid: int, global_layer: int):
        super().__init__()
        from transformers.models.deepseek_vl_hybrid import modeling_deepseek_vl_hybrid as modeling

        self.tower, self.grid, self.global_layer = tower, grid, global_layer
        values = {key: value for key, value in tower.items() if key != "model_type"}
        config = CONFIG_MAPPING[tower["model_type"]](**values)
        self.model = AutoModel.from_config(config)
        self.neck = modeling.DeepseekVLSamVisionNeck(config)
        self.proj = modeling.DeepseekVLSamVisionProj(config, output_size=grid)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: dict[str, Any], output: Any) -> Any:
        """Features ``(items, tokens, width)`` and `high_res_pixel_values` to ``(items, tokens, both widths)``."""
        seen = self.model(inputs["high_res_pixel_values"].to(self.alpha), output_hidden_states=True, return_dict=True)
        early = self.proj(self.neck(seen.hidden_states[self.global_layer + 1]))
        maps = (self.proj(seen.last_hidden_state) + early * self.alpha).permute(
            0, 2, 3, 1
        )  # (items, rows, columns, width)
        features = maps.reshape(len(maps), -1, maps.shape[-1])
        output["last_hidden_state"] = torch.cat([output.last_hidden_state, features], dim=-1)
        return output


def pooled_frames(inputs: dict[str, Any], output: Any, mode: str, stride: int, side: int) -> Any:
    """Features of frames, ``side * side`` each, pooled over squares of `stride` (LLaVA-NeXT-Video).

    The output's features are ``(videos, frames * tokens, width)``, or packed.
    """
    lengths, features = output.lengths, output.last_hidden_state
    maps = features.reshape(-1, side, side, features.shape[-1]).permute(
        0, 3, 1, 2
    )  # (frames of all videos, width, ...)
    pool = nn.functional.avg_pool2d if mode == "average" else nn.functional.max_pool2d
    pooled = pool(maps, stride, stride).flatten(2).transpose(1, 2).contiguous()  # (frames of all videos, fewer, width)
    left = pooled.shape[1]
    if lengths is None:
        output["last_hidden_state"] = pooled.reshape(len(features), -1, pooled.shape[-1])
        return output
    output["last_hidden_state"] = pooled.flatten(0, 1)
    output["feature_lens"] = torch.tensor([n // side**2 * left for n in lengths])
    return output


def unit_rms(inputs: dict[str, Any], output: Any, eps: float) -> Any:
    """Projected features divided by the root of their mean square (Muse Glimmer)."""
    features = output.last_hidden_state
    precise = features.float()
    scaled = precise * torch.pow(precise.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    output["last_hidden_state"] = scaled.to(features.dtype)
    return output


def sound_mask(inputs: dict[str, Any], config: Any) -> dict[str, Any]:
    """A mask of frames ``(items, frames)``, `feature_attention_mask`, as the tower's layers take it (Qwen2-Audio)."""
    mask = inputs["feature_attention_mask"]
    frames = (inputs["input_features"].shape[-1] - 2) // 2 + 1  # after the second convolution
    lengths = (mask.sum(-1) - 1) // 2 + 1
    valid = torch.arange(frames, device=mask.device)[None] < lengths[:, None]  # (items, frames)
    positions = torch.zeros(*valid.shape, 1, dtype=config.dtype or torch.float32, device=mask.device)
    ready = create_bidirectional_mask(config=config, inputs_embeds=positions, attention_mask=valid.long())
    return inputs | {"attention_mask": ready}


def sound_lengths(inputs: dict[str, Any], output: Any) -> Any:
    """Features of the frames that a mask names, after two strides of 2 (Qwen2-Audio)."""
    lengths = (inputs["feature_attention_mask"].sum(-1) - 1) // 2 + 1
    output["feature_lens"] = (lengths - 2) // 2 + 1
    return output


sound_mask.takes_config = True  # type: ignore[attr-defined]
register_callback("native_any_resolution", AnyResolution)
register_callback("native_one_batch", one_batch)
register_callback("native_high_resolution", HighResolution)
register_callback("native_patch_mask", patch_mask)
register_callback("native_pooled_frames", pooled_frames)
register_callback("native_real_images", real_images)
register_callback("native_row_grids", row_grids)
register_callback("native_tiles", tiles)
register_callback("native_unit_rms", unit_rms)
register_callback("native_sound_mask", sound_mask)
register_callback("native_sound_lengths", sound_lengths)
