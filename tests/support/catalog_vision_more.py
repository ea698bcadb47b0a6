"""Tiny vision encoders of classes that want more than one image tensor, or another shape of it.  A plain module, no tests."""

import torch
from catalog import Case, Inputs, floats
from catalog_vision import PLANES, UNLIMITED_OCR, VIT, image


def placed(i: int) -> Inputs:
    """Patches with their column and row; -1 pads (Gemma 4)."""
    rows, columns = PLANES[i % len(PLANES)]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)
    return {"pixel_values": floats(i, 1, rows * columns, 192), "pixel_position_ids": places[None]}


def tiles(i: int) -> Inputs:
    """An image of two tiles, of which odd items fill both (Mllama)."""
    return {
        "pixel_values": floats(i, 1, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[1 + i % 2]]),
        "aspect_ratio_mask": torch.tensor([[[1, i % 2]]]),
    }


def row_of_patches(i: int) -> Inputs:
    """All patches in one row of a batch, with their grid (PaddleOCR-VL)."""
    rows, columns = PLANES[i % len(PLANES)]
    return {"pixel_values": floats(i, 1, rows * columns, 3, 8, 8), "grid_thw": torch.tensor([(1, rows, columns)])}


def one_row(inputs) -> Inputs:
    """Rows of patches joined to one."""
    return {
        "pixel_values": torch.cat([one["pixel_values"] for one in inputs], 1),
        "grid_thw": torch.cat([one["grid_thw"] for one in inputs]),
    }


def tokens_of_images(i: int) -> Inputs:
    """Squares of pixels, each of which becomes one feature, with their grid (Inkling 2)."""
    rows, columns = (n // 2 for n in PLANES[i % len(PLANES)])
    return {"pixel_values": floats(i, rows * columns, 16, 16, 3), "image_grid_thw": torch.tensor([(1, rows, columns)])}


def clip(frames: int):
    """Items of one video, ``(1, frames, 3, 32, 32)``."""
    return lambda i: {"pixel_values_videos": floats(i, 1, frames, 3, 32, 32)}


def prompted(i: int) -> Inputs:
    """An image with the image and the mask of an example (SegGPT)."""
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: floats(3 * i + k, 1, 3, 32, 32) for k, name in enumerate(names)}


DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DINOV2 |= {"image_size": 32, "patch_size": 8, "mlp_ratio": 2}

MORE: dict[str, Case] = {
    "DeepseekOcr2VisionModel": Case(
        image(64),
        {
            "sam_config": UNLIMITED_OCR["sam_config"],
            "encoder_config": VIT | {"num_key_value_heads": 2, "vocab_size": 320},
        },
        whole=True,
    ),
    "DepthProModel": Case(
        image(128),
        {
            "patch_size": 32,
            "fusion_hidden_size": 16,
            "intermediate_hook_ids": [1, 0],
            "intermediate_feature_dims": [16, 16],
            "scaled_images_feature_dims": [32, 32, 16],
            "merge_padding_value": 1,
            **dict.fromkeys(("image_model_config", "patch_model_config", "fov_model_config"), DINOV2),
        },
        whole=True,
    ),
    "Gemma4VisionModel": Case(
        placed,
        {"pooling_kernel_size": 2, "position_embedding_size": 64, "num_key_value_heads": 4},
        join="pad",
        padding={"pixel_position_ids": -1},
    ),
    "Inkling2VisionModel": Case(
        tokens_of_images, {"posemb_grid_size": 4, "projection_hidden_dim": 48, "text_hidden_size": 40}, join="packed"
    ),
    "MllamaVisionModel": Case(
        tiles,
        {
            "attention_heads": 4,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
    ),
    "Molmo2VisionModel": Case(
        lambda i: {"pixel_values": floats(i, 1, 16, 192)},
        {"image_size": [32, 32], "num_position_embeddings": 16, "num_key_value_heads": 4},
    ),
    "PaddleOCRVisionModel": Case(row_of_patches, join=one_row),
    "PaddleOCRVisionTransformer": Case(row_of_patches, join=one_row),
    "SegGptModel": Case(
        prompted,
        {
            "image_size": [64, 32],
            "mlp_dim": 48,
            "pretrain_image_size": 32,
            "merge_index": 0,
            "intermediate_hidden_state_indices": [1],
        },
    ),
    "Step3p7VisionModel": Case(image(64), {"image_size": 64, "max_position_embeddings": 64}),
    "UnlimitedOcrVisionEncoder": Case(lambda i: {"patch_embeds": floats(i, 1, 32, 4, 4)}),
    "VideoPrismVisionModel": Case(
        clip(2), {"num_frames": 2, "tubelet_size": [1, 8, 8], "num_spatial_layers": 1, "num_temporal_layers": 1}
    ),
    "VJEPA2Model": Case(
        clip(4),
        {
            "hidden_size": 48,
            "crop_size": 32,
            "frames_per_clip": 4,
            "num_pooler_layers": 1,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 2,
        },
    ),
    "XCLIPVisionModel": Case(
        lambda i: {"pixel_values": floats(i, 2, 3, 32, 32)},
        {"num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 48, "mit_num_attention_heads": 4},
    ),
}

# Tokens and width of what each class gives for item 0, by its architecture: of Mllama the one tile that is filled, of X-CLIP
# the tokens of both frames.
MORE_FEATURES: dict[str, tuple[int, int]] = {
    "DeepseekOcr2VisionModel": (144, 32),
    "DepthProModel": (17, 32),
    "Gemma4VisionModel": (4, 32),
    "Inkling2VisionModel": (4, 40),
    "MllamaVisionModel": (17, 64),
    "Molmo2VisionModel": (16, 32),
    "PaddleOCRVisionModel": (16, 32),
    "PaddleOCRVisionTransformer": (16, 32),
    "SegGptModel": (32, 32),
    "Step3p7VisionModel": (4, 128),
    "UnlimitedOcrVisionEncoder": (17, 32),
    "VideoPrismVisionModel": (32, 32),
    "VJEPA2Model": (32, 48),
    "XCLIPVisionModel": (34, 32),
}
