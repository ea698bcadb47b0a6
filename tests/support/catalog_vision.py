"""Tiny vision encoders of every class of transformers: the rows of the catalogue.  A plain module, no tests."""

import torch
from catalog import Case, Inputs, floats

# Height and width of images in patches of 8 pixels; the first is the size that configurations state.
PLANES = ((4, 4), (4, 8), (6, 4), (2, 6), (8, 4))


def image(side: int = 32, other: int | None = None, name: str = "pixel_values"):
    """Items of one square image; of an encoder that takes any size, odd items are of another height."""

    def items(i: int) -> Inputs:
        return {name: floats(i, 1, 3, other if other and i % 2 else side, side)}

    return items


def video(frames: int, side: int = 32):
    """Items of one video, ``(1, frames, 3, side, side)``."""
    return lambda i: {"pixel_values": floats(i, 1, frames, 3, side, side)}


def packed(width: int = 384, name: str = "pixel_values", frames: int = 1, shape: tuple[int, ...] = (), **more):
    """Items of flattened patches with their grid; every third is a video, where the encoder takes several frames."""

    def items(i: int) -> Inputs:
        grid = (frames if i % 3 == 2 else 1, *PLANES[i % len(PLANES)])
        count = grid[0] * grid[1] * grid[2]
        inputs = {name: floats(i, count, *(shape or (width,))), "grid_thw": torch.tensor([grid])}
        return inputs | {key: torch.tensor([value]) for key, value in more.items()}

    return items


def flattened(width: int):
    """Items of patches that begin with their row and column, counted from one (Pix2Struct)."""

    def items(i: int) -> Inputs:
        rows, columns = PLANES[i % len(PLANES)]
        places = torch.cartesian_prod(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
        patches = torch.cat([places, floats(i, rows * columns, width)], -1)
        return {"flattened_patches": patches[None], "attention_mask": torch.ones(1, rows * columns, dtype=torch.long)}

    return items


def masked_patches(i: int) -> Inputs:
    """Patches, their mask and their grid (SigLIP 2)."""
    rows, columns = PLANES[i % len(PLANES)]
    return {
        "pixel_values": floats(i, 1, rows * columns, 192),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
        "spatial_shapes": torch.tensor([(rows, columns)]),
    }


def sized(i: int) -> Inputs:
    """An image with its size, padded with others in one batch (Pixtral)."""
    rows, columns = PLANES[i % len(PLANES)]
    size = (min(rows, 4) * 8, min(columns, 4) * 8)
    return {"pixel_values": floats(i, 1, 3, *size), "image_sizes": torch.tensor([size])}


def strip(i: int) -> Inputs:
    """The patches of an image side by side, one row of them (MiniCPM-V 4.6)."""
    rows, columns = PLANES[i % len(PLANES)]
    return {"pixel_values": floats(i, 1, 3, 8, rows * columns * 8), "target_sizes": torch.tensor([(rows, columns)])}


def side_by_side(inputs) -> Inputs:
    """Strips of patches joined to one."""
    return {
        "pixel_values": torch.cat([one["pixel_values"] for one in inputs], -1),
        "target_sizes": torch.cat([one["target_sizes"] for one in inputs]),
    }


FIXED = Case(image())
ANY_SIZE = Case(image(32, 16))
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "hidden_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 1, 2, 2], "num_encoder_blocks": 4}
SAM = {
    "initializer_range": 0.02,
    "output_channels": 24,
    "mlp_dim": 48,
    "window_size": 2,
    "global_attn_indexes": [1],
    "num_pos_feats": 12,
}
WIDE = {"out_hidden_size": 40}
QWEN = WIDE | {"num_position_embeddings": 64}
DEEPSTACK = QWEN | {"deepstack_visual_indexes": [0]}
WINDOWS = WIDE | {"window_size": 32, "fullatt_block_indexes": [1]}
STATES = Case(packed(name="hidden_states"), WIDE, join="packed")
PIXELS = {"join": "packed"}
ERNIE = Case(packed(192, "hidden_states"), join="packed")
MUSE = Case(packed(), {"pos_emb_height": 4, "pos_emb_width": 4}, join="packed")
MINICPM = Case(strip, {"insert_layer_id": 0}, join=side_by_side)
HIERA_DET = {
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 4],
    "window_size_per_stage": [8, 4, 4, 2],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [3],
}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SAM3_VIT = {"window_size": 2, "global_attn_indexes": [1], "pretrain_image_size": 16}
UNLIMITED_OCR = {
    "sam_config": {key: value for key, value in VIT.items() if key != "intermediate_size"}
    | {"image_size": 64, "patch_size": 8, "output_channels": 16, "mlp_dim": 48, "window_size": 4}
    | {"global_attn_indexes": [1], "downsample_channels": [16, 32], "initializer_range": 0.02},
    "encoder_config": VIT | {"image_size": 64, "patch_size": 32},
}
DOTS = VIT | {"patch_size": 8, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse"]}
DOTS |= {"num_local_experts": 4, "adapter_in_dim": 32, "adapter_out_dim": 40}
HIERA = {"image_size": [64, 64], "embed_dim": 8, "hidden_size": 64, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}
LEVIT = {"image_size": 128, "patch_size": 16, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1]}
LEVIT |= {"num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}
EFFICIENT = {"width_coefficient": 0.125, "depth_coefficient": 0.1, "hidden_dim": 160}

CASES: dict[str, Case] = {
    "Aimv2VisionModel": FIXED,
    "AlignVisionModel": Case(image(64, 32), EFFICIENT, redraw=True),
    "AltCLIPVisionModel": FIXED,
    "BeitModel": FIXED,
    "BitModel": Case(image(64, 32), STAGES | {"num_groups": 2, "embedding_size": 8}),
    "BlipVisionModel": FIXED,
    "Blip2VisionModel": FIXED,
    "BridgeTowerVisionModel": Case(image(name="image"), {"hidden_size": 64}),
    "ChineseCLIPVisionModel": FIXED,
    "CLIPVisionModel": FIXED,
    "CLIPSegVisionModel": FIXED,
    "CohereCompassVisionModel": Case(packed(name="hidden_states"), DEEPSTACK, **PIXELS),
    "ConvNextModel": Case(image(64, 32), STAGES | {"num_hidden_layers": 4}),
    "ConvNextV2Model": Case(image(64, 32), STAGES | {"num_hidden_layers": 4}),
    "Cosmos3EdgeVisionModel": Case(packed(192), {"num_patches": 16}, **PIXELS),
    "Data2VecVisionModel": FIXED,
    "DeiTModel": FIXED,
    "Dinov2Model": ANY_SIZE,
    "Dinov2WithRegistersModel": ANY_SIZE,
    "DINOv3ConvNextModel": Case(image(64, 32), STAGES),
    "DINOv3ViTModel": Case(image(32, 16), {"num_register_tokens": 2}),
    "DonutSwinModel": Case(image(32, 64), SWIN),
    "Dots3NoteVisionModel": Case(packed(192), DOTS, whole=True, **PIXELS),
    "DPTModel": FIXED,
    "EfficientNetModel": Case(image(64, 32), EFFICIENT, redraw=True),
    "Ernie4_5_VLMoeVisionTransformerPretrainedModel": ERNIE,
    "Ernie4_5_VL_MoeVisionTransformerPretrainedModel": ERNIE,
    "Exaone4_5_VisionModel": Case(packed(name="hidden_states"), WINDOWS, kind="image", **PIXELS),
    "FlavaImageModel": FIXED,
    "FlavaImageCodebook": Case(image(32, 16), {"hidden_size": 8, "vocab_size": 40}),
    "GitVisionModel": FIXED,
    "Glm4vVisionModel": STATES,
    "Glm4vMoeVisionModel": STATES,
    "Glm5NextVisionModel": Case(packed(name="hidden_states"), WIDE | {"projection_intermediate_size": 48}, **PIXELS),
    "GlmImageVisionModel": Case(packed(192), **PIXELS),
    "GlmOcrVisionModel": STATES,
    "GLPNModel": Case(image(64, 32), PYRAMID),
    "GotOcr2VisionEncoder": Case(image(), SAM),
    "GraniteDoclingVisionModel": Case(image(), WIDE | {"scale_factor": 2, "deepstack_visual_indexes": [0]}),
    "GroupViTVisionModel": Case(
        image(), {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]}
    ),
    "HieraModel": Case(image(64), HIERA),
    "HunYuanVLVisionTransformer": Case(
        packed(192), {"text_hidden_size": 40, "max_image_size": 64, "min_image_size": 16}, **PIXELS
    ),
    "HYV4VLVisionModel": Case(packed(192), WIDE | {"num_key_value_heads": 4, "max_image_size": 64}, **PIXELS),
    "Idefics2VisionTransformer": ANY_SIZE,
    "Idefics3VisionTransformer": ANY_SIZE,
    "IJepaModel": FIXED,
    "InstructBlipVisionModel": FIXED,
    "InstructBlipVideoVisionModel": FIXED,
    "InternVLVisionModel": Case(image(32, 16), {"image_size": [32, 32], "patch_size": [8, 8]}),
    "JanusVisionModel": FIXED,
    "Kimi_K25VisionModel": Case(packed(shape=(3, 8, 8)), {"pos_emb_height": 8, "pos_emb_width": 8}, **PIXELS),
    "Kosmos2VisionModel": FIXED,
    "Kosmos2_5VisionModel": Case(
        flattened(48), {"patch_embed_hidden_size": 48, "max_num_patches": 64}, join="pad", redraw=True
    ),
    "LevitModel": Case(image(128), LEVIT, redraw=True),
    "Lfm3VlVisionModel": Case(packed(), **PIXELS),
    "Llama4VisionModel": Case(
        image(),
        {"intermediate_size": 128, "projector_input_dim": 40, "projector_output_dim": 40, "vision_output_dim": 40},
    ),
    "MaskFormerSwinModel": Case(image(32, 64), SWIN),
    "MetaClip2VisionModel": FIXED,
    "MiniCPMOcrVisionModel": MINICPM,
    "MiniCPMV4_6VisionModel": MINICPM,
    "MiniCPMV4_7VisionModel": MINICPM,
    "MiniMaxM3VLVisionModel": Case(packed(frames=2), **PIXELS),
    "MLCDVisionModel": ANY_SIZE,
    "MobileNetV1Model": Case(image(64, 32), {"depth_multiplier": 0.125}, redraw=True),
    "MobileNetV2Model": Case(image(64, 32), {"depth_multiplier": 0.125}, redraw=True),
    "MobileViTModel": Case(
        image(64, 32), {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 40]}, redraw=True
    ),
    "MobileViTV2Model": Case(image(64, 128), {"width_multiplier": 0.125, "n_attn_blocks": [1, 1, 1]}, redraw=True),
    "MuseGlimmerVisionModel": MUSE,
    "MuseSparkVisionModel": MUSE,
    "Ovis2VisionModel": FIXED,
    "Owlv2VisionModel": FIXED,
    "OwlViTVisionModel": FIXED,
    "Phi4MultimodalVisionModel": Case(image(), {"crop_size": 32}),
    "Pix2StructVisionModel": Case(
        flattened(48), {"patch_embed_hidden_size": 48, "seq_len": 64, "d_ff": 48, "d_kv": 8}, join="pad", redraw=True
    ),
    "PixioModel": ANY_SIZE,
    "PixtralVisionModel": Case(sized, join="pad"),
    "PoolFormerModel": Case(image(64, 32), STAGES | {"patch_size": 7, "stride": 4}),
    "PPFormulaNetVisionModel": Case(
        image(64),
        SAM
        | {"image_size": 64, "post_conv_in_channels": 24, "post_conv_mid_channels": 32, "post_conv_out_channels": 48},
    ),
    "PvtModel": Case(image(64), PYRAMID | {"image_size": 64}),
    "PvtV2Model": Case(image(64, 32), PYRAMID | {"image_size": [64, 64]}),
    "QianfanOCRVisionModel": Case(image(32, 16), {"image_size": [32, 32], "patch_size": [8, 8]}),
    "Qwen2_5OmniVisionEncoder": Case(packed(name="hidden_states"), WINDOWS, **PIXELS),
    "Qwen2_5_VisionTransformerPretrainedModel": Case(packed(name="hidden_states"), WINDOWS, **PIXELS),
    "Qwen2VisionTransformerPretrainedModel": Case(packed(name="hidden_states"), {"hidden_size": 40}, **PIXELS),
    "Qwen3_5VisionModel": Case(packed(name="hidden_states"), QWEN, **PIXELS),
    "Qwen3_5MoeVisionModel": Case(packed(name="hidden_states"), QWEN, **PIXELS),
    "Qwen3OmniMoeVisionEncoder": Case(packed(name="hidden_states"), DEEPSTACK, **PIXELS),
    "Qwen3VLVisionModel": Case(packed(name="hidden_states"), DEEPSTACK, **PIXELS),
    "Qwen3VLMoeVisionModel": Case(packed(name="hidden_states"), DEEPSTACK, **PIXELS),
    "Qwen4ExpVisionModel": Case(packed(name="hidden_states"), QWEN, **PIXELS),
    "RadioModel": Case(image(32, 16), {"max_img_size": 64}),
    "ResNetModel": Case(image(64, 32), STAGES | {"embedding_size": 8}),
    "SamVisionEncoder": Case(image(), SAM),
    "SamVisionModel": Case(image(), SAM),
    "Sam2HieraDetModel": Case(image(64), HIERA_DET),
    "Sam2VisionModel": Case(
        image(64),
        {
            "backbone_config": {"model_type": "sam2_hiera_det_model", **HIERA_DET},
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        },
    ),
    "Sam3ViTModel": Case(image(), SAM3_VIT),
    "Sam3VisionModel": Case(
        image(),
        {
            "backbone_config": VIT | SAM3_VIT | {"model_type": "sam3_vit_model", "image_size": 32, "patch_size": 8},
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        },
    ),
    "SamHQVisionEncoder": Case(image(), SAM),
    "SamHQVisionModel": Case(image(), SAM),
    "Sapiens2Model": ANY_SIZE,
    "SegformerModel": Case(image(64, 32), PYRAMID | {"num_hidden_layers": 4}),
    "SiglipVisionModel": FIXED,
    "Siglip2VisionModel": Case(masked_patches, {"num_patches": 16}, join="pad"),
    "SmolVLMVisionTransformer": ANY_SIZE,
    "SwiftFormerModel": Case(image(64, 32), {"embed_dims": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}),
    "SwinModel": Case(image(32, 64), SWIN),
    "Swin2SRModel": Case(
        image(8, 16), {"image_size": 8, "hidden_size": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    ),
    "Swinv2Model": Case(image(32, 64), SWIN | {"pretrained_window_sizes": [0, 0]}),
    "TimesformerModel": Case(video(2), {"num_frames": 2}, kind="video"),
    "Tipsv2VisionModel": ANY_SIZE,
    "UnlimitedOcrVisionModel": Case(image(64), UNLIMITED_OCR, whole=True),
    "VideoLlama3VisionModel": Case(packed(192, merge_sizes=2), **PIXELS),
    "VideoMAEModel": Case(video(4), {"num_frames": 4}),
    "ViTModel": FIXED,
    "ViTMAEModel": Case(image(), {"mask_ratio": 0.0}),
    "ViTMSNModel": FIXED,
    "VitDetModel": Case(image(32, 16), {"pretrain_image_size": 32}),
    "VivitModel": Case(video(4), {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "YolosModel": Case(image(32, 16), {"image_size": [32, 32], "num_detection_tokens": 4}),
}

# Tokens and width of what each class gives for item 0, by its architecture: what a composition must see of it.
FEATURES: dict[str, tuple[int, int]] = {
    name: shape
    for shape, names in {
        (2, 32): "GroupViTVisionModel",
        (4, 24): """
            BitModel GLPNModel PoolFormerModel PvtV2Model ResNetModel SegformerModel SwiftFormerModel
            ConvNextModel ConvNextV2Model
        """,
        (4, 32): """
            LevitModel MiniCPMOcrVisionModel MiniCPMV4_6VisionModel MiniCPMV4_7VisionModel
            VideoLlama3VisionModel
        """,
        (4, 40): """
            AlignVisionModel CohereCompassVisionModel Dots3NoteVisionModel Exaone4_5_VisionModel
            Glm4vVisionModel Glm4vMoeVisionModel Glm5NextVisionModel GlmOcrVisionModel GraniteDoclingVisionModel
            Llama4VisionModel MobileViTModel Qwen2_5OmniVisionEncoder Qwen2_5_VisionTransformerPretrainedModel
            Qwen2VisionTransformerPretrainedModel Qwen3_5VisionModel Qwen3_5MoeVisionModel
            Qwen3OmniMoeVisionEncoder Qwen3VLVisionModel Qwen3VLMoeVisionModel Qwen4ExpVisionModel
        """,
        (4, 64): "HieraModel MobileViTV2Model Sam2HieraDetModel Sam2VisionModel UnlimitedOcrVisionModel",
        (4, 128): "Kimi_K25VisionModel MobileNetV1Model MuseGlimmerVisionModel MuseSparkVisionModel",
        (4, 160): "EfficientNetModel",
        (4, 1280): "MobileNetV2Model",
        (5, 24): "DINOv3ConvNextModel PvtModel",
        (8, 40): "HunYuanVLVisionTransformer HYV4VLVisionModel",
        (16, 24): "GotOcr2VisionEncoder SamVisionEncoder SamVisionModel SamHQVisionEncoder SamHQVisionModel",
        (16, 32): """
            Aimv2VisionModel Cosmos3EdgeVisionModel DonutSwinModel
            Ernie4_5_VLMoeVisionTransformerPretrainedModel Ernie4_5_VL_MoeVisionTransformerPretrainedModel
            GlmImageVisionModel Idefics2VisionTransformer Idefics3VisionTransformer IJepaModel JanusVisionModel
            Kosmos2_5VisionModel Lfm3VlVisionModel MaskFormerSwinModel MiniMaxM3VLVisionModel Ovis2VisionModel
            Phi4MultimodalVisionModel Pix2StructVisionModel PixtralVisionModel Sam3ViTModel Sam3VisionModel
            SiglipVisionModel Siglip2VisionModel SmolVLMVisionTransformer SwinModel Swinv2Model VitDetModel
        """,
        (16, 40): "FlavaImageCodebook",
        (17, 32): """
            AltCLIPVisionModel BeitModel BlipVisionModel Blip2VisionModel ChineseCLIPVisionModel CLIPVisionModel
            CLIPSegVisionModel Data2VecVisionModel Dinov2Model DPTModel FlavaImageModel GitVisionModel
            InstructBlipVisionModel InstructBlipVideoVisionModel InternVLVisionModel Kosmos2VisionModel
            MetaClip2VisionModel MLCDVisionModel Owlv2VisionModel OwlViTVisionModel QianfanOCRVisionModel
            ViTModel ViTMAEModel ViTMSNModel
        """,
        (17, 64): "BridgeTowerVisionModel",
        (18, 32): "DeiTModel Tipsv2VisionModel",
        (19, 32): "DINOv3ViTModel",
        (21, 32): "Dinov2WithRegistersModel YolosModel",
        (24, 32): "PixioModel",
        (25, 32): "Sapiens2Model",
        (26, 32): "RadioModel",
        (32, 32): "VideoMAEModel",
        (33, 32): "TimesformerModel VivitModel",
        (64, 16): "Swin2SRModel",
        (64, 24): "PPFormulaNetVisionModel",
    }.items()
    for name in names.split()
}
