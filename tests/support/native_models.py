"""Tiny random native multimodal models of transformers, their inputs, and compositions of their parts.  A plain module, no tests."""

import copy

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    TextModelWithHead,
)

IMAGE, VIDEO, VOCABULARY = 250, 251, 256
# Types that are compared with their compositions: of towers that pack patches, and of towers that take pictures.
PACKED = [
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "glmga", "glm4v_moe",
    "glm_ocr", "paddleocr_vl", "cosmos3_omni", "cosmos3_edge", "hunyuan_vl",
]  # fmt: skip
PICTURES = ["gemma3", "shieldgemma2", "gemma4", "paligemma", "ovis2", "molmo2"]
COMPARED = [*PACKED, *PICTURES]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MROPE = {"rope_parameters": ROPE | {"mrope_section": [4, 2, 2]}}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "depth": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
DEEP = TOWER | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
GLM = TOWER | {"out_hidden_size": 64, "intermediate_size": 64, "image_size": 32}
GLM_MARKS = {
    "image_start_token_id": 240,
    "image_end_token_id": 241,
    "video_start_token_id": 242,
    "video_end_token_id": 243,
}
GLM_MOE = EXPERTS | {
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}  # fmt: skip
GEMMA3 = {
    "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
QWEN3_5 = {
    "head_dim": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
    "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25},
}  # fmt: skip
# model_type -> (class, text configuration, vision configuration, outer settings)
NATIVE: dict[str, tuple[str, dict, dict, dict]] = {
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", MROPE, {"embed_dim": 32, "hidden_size": 64, "num_heads": 2, "depth": 2, "patch_size": 4}, {}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", MROPE, TOWER | {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16, "tokens_per_second": 4}, {}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", MROPE | {"head_dim": 16}, DEEP, {}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", MROPE | EXPERTS | {"head_dim": 16}, DEEP, {}),
    "glm4v": ("Glm4vForConditionalGeneration", MROPE, GLM, GLM_MARKS),
    "glmga": ("Glm46VForConditionalGeneration", MROPE, GLM, GLM_MARKS),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", GLM_MOE, GLM, GLM_MARKS),
    "glm_ocr": ("GlmOcrForConditionalGeneration", MROPE | {"head_dim": 16}, GLM, GLM_MARKS),
    "cosmos3_omni": ("Cosmos3OmniForConditionalGeneration", MROPE | {"head_dim": 16}, DEEP, {}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", QWEN3_5 | EXPERTS | {"shared_expert_intermediate_size": 16}, DEEP, {}),
    "shieldgemma2": ("Gemma3ForConditionalGeneration", GEMMA3, SIGLIP, {"mm_tokens_per_image": 16}),
    "glm46v": ("Glm46VForConditionalGeneration", MROPE, GLM, GLM_MARKS),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", QWEN3_5, DEEP, {}),
    "paddleocr_vl": ("PaddleOCRVLForConditionalGeneration", MROPE | {"head_dim": 16}, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}, {}),
    "cosmos3_edge": ("Cosmos3EdgeForConditionalGeneration", MROPE | {"head_dim": 16}, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "num_patches": 64}, {"projector_hidden_size": 48}),
    "hunyuan_vl": ("HunYuanVLForConditionalGeneration", {"head_dim": 16, "rope_parameters": ROPE | {"xdrope_section": [2, 2, 2, 2]}}, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "out_hidden_size": 64, "text_hidden_size": 64, "max_image_size": 64}, {"im_start_id": 240, "im_end_id": 241, "im_newline_id": 242}),
    "molmo2": ("Molmo2ForConditionalGeneration", {"head_dim": 16, "additional_vocab_size": 16}, SIGLIP | {"num_key_value_heads": 2, "head_dim": 16, "image_size": [32, 32], "num_position_embeddings": 64}, {"adapter_config": {"vision_feature_layer": [-1, -2], "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "text_hidden_size": 64}, "image_patch_id": IMAGE, "image_start_token_id": 240, "image_end_token_id": 241, "low_res_image_start_token_id": 242}),
    "muse_glimmer": ("MuseGlimmerForConditionalGeneration", {"head_dim": 16, "sliding_window": 16}, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8}, {"out_hidden_size": 128, "projector_hidden_size": 64}),
    "gemma3": ("Gemma3ForConditionalGeneration", GEMMA3, SIGLIP, {"mm_tokens_per_image": 16}),
    "gemma4": ("Gemma4ForConditionalGeneration", {"head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0, "use_bidirectional_attention": "vision", "final_logit_softcapping": 5.0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, {"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4}, {"audio_config": None}),
    "paligemma": ("PaliGemmaForConditionalGeneration", {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "sliding_window": 8}, SIGLIP | {"model_type": "siglip_vision_model", "projection_dim": 64}, {"projection_dim": 64, "hidden_size": 64}),
    "ovis2": ("Ovis2ForConditionalGeneration", {}, SIGLIP | {"vocab_size": 48}, {"hidden_size": 64, "vocab_size": VOCABULARY, "visual_indicator_token_ids": [243, 244, 245, 246, 247]}),
    "cohere2_vision": ("Cohere2VisionForConditionalGeneration", {"logit_scale": 0.25, "sliding_window": 8}, SIGLIP | {"model_type": "siglip_vision_model"}, {"downsample_factor": 2, "alignment_intermediate_size": 64}),
}  # fmt: skip


def configuration(model_type, text=None, vision=None, **outer):
    """A tiny configuration of a native model; `text`, `vision` and `outer` change its parts and itself."""
    _, own, tower, settings = NATIVE[model_type]
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    text_values = {"model_type": default.text_config.model_type} | TEXT | own
    vision_values = {"model_type": getattr(default.vision_config, "model_type", None)} | tower | (vision or {})
    names = ("image_token_id", "image_token_index")
    tokens = {"tie_word_embeddings": False} | {key: IMAGE for key in names if key in vars(default)}
    tokens |= {"video_token_id": VIDEO} if "video_token_id" in vars(default) else {}
    return cls(text_config=text_values | (text or {}), vision_config=vision_values, **tokens | settings | outer)


def native(model_type, seed=0, **changes):
    """The native model, every parameter drawn at random, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, NATIVE[model_type][0])(configuration(model_type, **changes)).eval()
    return randomized(model, seed)


def randomized(model, seed=0):
    """A model whose parameters are far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.08) if parameter.ndim > 1 else parameter.add_(noise * 0.1)
    return model


# ---- inputs of native models


def rows(counts, tokens=IMAGE, seed=3, around=None, text_row=True):
    """Left-padded rows of ids and their mask: `counts[i]` features of each item of row i, `tokens` the placeholder of each."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(5, 200, (n,), generator=generator).tolist()

    made = []
    for i, items in enumerate(counts):
        row = words(2 + i)
        for item in items:
            count, token = item if isinstance(item, tuple) else (item, tokens)
            middle = [token] * count
            row += [*middle, *words(3)] if around is None else [around[0], *middle, around[1], *words(2)]
        made.append(row)
    made += [words(6)] if text_row else []
    length = max(map(len, made))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in made])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in made])
    return {"input_ids": ids, "attention_mask": mask}


def patches(grids, width, seed=5):
    """Packed random patches ``(sum of patches, width)`` of items with grids ``(frames, height, width)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(torch.tensor(grids).prod(-1).sum()), width, generator=generator)


def types(ids):
    """`mm_token_type_ids` as native processors give them."""
    return (ids == IMAGE).long() + 2 * (ids == VIDEO).long()


# ---- compositions of a native model's parts

MROPE_RULE = {"rule": "mrope", "axes": 3}
APART = MROPE_RULE | {"frames_apart": True}
RULES: dict[str, dict] = {
    "qwen2_vl": {"positions": MROPE_RULE},
    "qwen2_5_vl": {"positions": MROPE_RULE | {"time_step": {"video": 4}}},
    "glm4v": {"positions": APART},
    "glm46v": {"positions": APART},
    "qwen3_vl": {"positions": APART},
    "qwen3_vl_moe": {"positions": APART},
    "qwen3_5": {"positions": APART},
    "gemma3": {"mask": {"rule": "item_blocks", "windowed": True}},
    "gemma4": {"mask": {"rule": "item_blocks", "layers": ["sliding_attention"], "windowed": True}},
    "paligemma": {"positions": {"rule": "counted", "first": 1}, "mask": {"rule": "prefix"}},
}
HEAD_OPTIONS: dict[str, dict] = {
    "muse_glimmer": {"scale": 0.19611613513818404, "softcap": 20.0},
    "paligemma": {"softcap": 3.0},
    "gemma4": {"softcap": 5.0},
}


def head(native):
    """A copy of a native model's text stack and head, as a language model."""
    stack = copy.deepcopy(native.get_decoder())
    stack.config.tie_word_embeddings = False
    return TextModelWithHead(stack, copy.deepcopy(native.lm_head), **HEAD_OPTIONS.get(native.config.model_type, {}))


def plain(module, **options):
    """An encoder whose features are the language model's embeddings already."""
    return ModalEncoderModule(
        module, MultimodalProjector(MultimodalProjectorConfig(), projection=nn.Identity()), **options
    )


def compose(native, video=False, **options):
    """A composition of copies of a native model's parts, with its rules, in evaluation mode."""
    model_type = native.config.model_type
    if model_type in JOINED:
        return compose_joined(native, **options)
    tower = native.model.visual
    more = {"layer_features": "deepstack_features"} if hasattr(tower, "deepstack_merger_list") else {}
    encoders = {"image": plain(copy.deepcopy(tower), kind="image", **more)}
    if video:
        seconds = ["second_per_grid_ts"] if model_type == "qwen2_5_vl" else []
        encoders["video"] = plain(copy.deepcopy(tower), kind="video", additional_args=seconds, **more)
    rules = copy.deepcopy(RULES.get(model_type, {}))
    if not video and rules.get("positions"):
        rules["positions"].pop("time_step", None)
    model = MultimodalModel(encoders=encoders, language_model=head(native), **rules | options)
    model.set_modality_token_ids({"image": IMAGE, "video": VIDEO} if video else {"image": IMAGE})
    return model.eval()


# Of images and of videos, (frames, height, width) in patches; sides are merged two by two.
IMAGES, VIDEOS = [[1, 8, 12], [1, 4, 8], [1, 8, 4]], [[2, 4, 8], [3, 4, 4]]


def image_inputs(native):
    """A batch with one and two images of uneven sizes, and a row of text."""
    vision = native.config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    pixels = patches(IMAGES, width)
    if native.config.model_type == "paddleocr_vl":
        pixels = pixels.unflatten(1, (3, vision.patch_size, vision.patch_size))
    # HunYuan's has one more feature at the end of each row, and two around all.
    counts = [[30], [12, 14]] if native.config.model_type == "hunyuan_vl" else [[24], [8, 8]]
    inputs = rows(counts) | {"pixel_values": pixels, "image_grid_thw": torch.tensor(IMAGES)}
    return inputs | {"mm_token_type_ids": types(inputs["input_ids"])}


def video_inputs(native, apart):
    """A batch with an image and a video in a row, and another video; `apart` says whether text parts frames."""
    vision = native.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    films = [[(8, VIDEO)] * 2, [(4, VIDEO)] * 3] if apart else [[(16, VIDEO)], [(12, VIDEO)]]
    inputs = rows([[(24, IMAGE), *films[0]], films[1]])
    inputs |= {"pixel_values": patches(IMAGES[:1], width), "image_grid_thw": torch.tensor(IMAGES[:1])}
    inputs |= {"pixel_values_videos": patches(VIDEOS, width), "video_grid_thw": torch.tensor(VIDEOS)}
    return inputs | {"mm_token_type_ids": types(inputs["input_ids"])}


class Joined(PreTrainedModel):
    """A native tower with what comes behind it, as one encoder: its features are embeddings."""

    config_class = PreTrainedConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config, inner=None):
        super().__init__(config)
        self.inner = inner

    def forward(self, pixel_values=None, image_position_ids=None, **kwargs):
        more = {} if image_position_ids is None else {"image_position_ids": image_position_ids}
        output = self.inner.get_image_features(pixel_values=pixel_values, **more, return_dict=True)
        return {"last_hidden_state": torch.stack(list(output.pooler_output))}


JOINED = {"gemma3", "gemma4", "paligemma"}


def compose_joined(native, **options):
    """A composition in which the native model itself encodes images, and its text stack, copied, is the language model."""
    config = PreTrainedConfig(hidden_size=native.config.get_text_config().hidden_size)
    config.model_type = "joined"
    encoder = Joined(config)
    encoder.__dict__["inner"] = copy.deepcopy(native.model)
    model = MultimodalModel(
        encoders={"image": plain(encoder, kind="image")}, language_model=head(native),
        **copy.deepcopy(RULES[native.config.model_type]) | options,
    )  # fmt: skip
    model.set_modality_token_ids({"image": IMAGE})
    return model.eval()


def picture_inputs(native):
    """A batch with one and two images of one size, and a row of text, and what native processors say of the types."""
    model_type, vision = native.config.model_type, native.config.vision_config
    generator = torch.Generator().manual_seed(7)
    if model_type == "gemma4":
        side = vision.pooling_kernel_size
        places = torch.full((3, 4 * side * side, 2), -1)
        for i, (width, height) in enumerate(((2, 2), (1, 4), (4, 1))):
            grid = torch.meshgrid(torch.arange(height * side), torch.arange(width * side), indexing="xy")
            grid = torch.stack(grid, -1).reshape(-1, 2)
            places[i, : len(grid)] = grid
        pixels = torch.randn(3, 4 * side * side, 3 * vision.patch_size**2, generator=generator)
        counts, more = [[4], [4, 4]], {"pixel_values": pixels, "image_position_ids": places}
    elif model_type == "molmo2":
        side = vision.image_size[0] // vision.patch_size
        pixels = torch.randn(3, side * side, 3 * vision.patch_size**2, generator=generator)
        squares = torch.arange(side * side).reshape(side, side).unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
        pooled = torch.cat([squares + side * side * i for i in range(3)])
        pooled[-1, 2:] = -1  # a square at the edge
        half = side // 2
        counts = [[half * half], [half * half] * 2]
        more = {
            "pixel_values": pixels,
            "image_token_pooling": pooled,
            "image_grids": torch.tensor([[half, half, 0, 0]] * 3),
        }
    else:
        pixels = torch.randn(3, 3, vision.image_size, vision.image_size, generator=generator)
        count = {"gemma3": 16, "shieldgemma2": 16, "paligemma": 64, "ovis2": 64}[model_type]
        counts, more = [[count], [count, count]], {"pixel_values": pixels}
    inputs = rows(counts) | more
    if model_type == "ovis2":
        inputs["input_ids"][1, -3:] = torch.tensor([244, 243, 247])  # marks around an image
        return inputs
    name = "mm_token_type_ids" if model_type in ("gemma4", "molmo2") else "token_type_ids"
    kinds = torch.zeros_like(inputs["input_ids"]) if model_type == "paligemma" else types(inputs["input_ids"])
    return inputs | {name: kinds}
