"""Rows of the conversion table of native types whose positions, masks or merging follow the items: data only, as in `table`."""

from collections.abc import Mapping
from typing import Any

from .entries import At, Count, HiddenState, Marks, Native, NativeSettings, Part, Product, Projector, Step

_IMAGE, _VIDEO, _TEXT = "image_token_id", "video_token_id", "model.language_model"
_CONNECTOR = "model.multi_modal_projector"
IDENTITY = Projector("torch", {"module": {"class": "Identity"}})
MROPE: dict[str, Any] = {"rule": "mrope", "axes": 3}
_APART = MROPE | {"frames_apart": True}
_VIDEO_NAMES = {"pixel_values_videos": "hidden_states", "video_grid_thw": "grid_thw"}
_DEEP: dict[str, Any] = {"layer_features": "deepstack_features"}


def native_module(model_type: str, names: Mapping[str, str] | str = _CONNECTOR, **options: Any) -> Projector:
    """A module of the native model as it is; see `projectors.native`."""
    names = {"": names} if isinstance(names, str) else names
    found = {f"module.{ours}".rstrip("."): theirs for ours, theirs in names.items()}
    return Projector("native", {"native_type": model_type, "settings": NativeSettings(model_type)}, found, **options)


def _merger(architecture: str, positions: Mapping[str, Any], video: bool = True, **options: Any) -> Native:
    """A tower of packed patches that merges them itself; videos go through it too."""
    seconds = ("second_per_grid_ts",) if "time_step" in positions else ()
    image = Part("model.visual", "image", _IMAGE, IDENTITY, **options)
    film = Part(
        None, "video", _VIDEO, shares="vision", additional_args=seconds,
        input_names=_VIDEO_NAMES | {name: name for name in seconds}, **options,
    )  # fmt: skip
    return Native(architecture, _TEXT, {"vision": image} | ({"video": film} if video else {}), positions=positions)


_CAP = At("text_config.final_logit_softcapping", optional=True)  # which the native class applies, not its text's
_RULES_OF_GEMMA: dict[str, Any] = {"rule": "item_blocks", "windowed": True}
_GEMMA3 = {"vision": Part("model.vision_tower", "image", _IMAGE, native_module("gemma3"))}
RULED: dict[str, Native] = {
    "qwen2_vl": _merger("Qwen2VLForConditionalGeneration", MROPE),
    "qwen2_5_vl": _merger(
        "Qwen2_5_VLForConditionalGeneration", MROPE | {"time_step": {"video": At("vision_config.tokens_per_second")}}
    ),
    "qwen3_vl": _merger("Qwen3VLForConditionalGeneration", _APART, **_DEEP),
    "qwen3_vl_moe": _merger("Qwen3VLMoeForConditionalGeneration", _APART, **_DEEP),
    "cosmos3_omni": _merger("Cosmos3OmniForConditionalGeneration", _APART, **_DEEP),
    "qwen3_5": _merger("Qwen3_5ForConditionalGeneration", _APART),
    "qwen3_5_moe": _merger("Qwen3_5MoeForConditionalGeneration", _APART),
    # GLM marks frames of videos by the token of images.
    "glm4v": _merger("Glm4vForConditionalGeneration", _APART, video=False),
    "glm46v": _merger("Glm46VForConditionalGeneration", _APART, video=False),
    "glmga": _merger("Glm46VForConditionalGeneration", _APART, video=False),
    "glm4v_moe": _merger("Glm4vMoeForConditionalGeneration", _APART, video=False),
    "glm_ocr": _merger("GlmOcrForConditionalGeneration", _APART, video=False),
    "paddleocr_vl": Native("PaddleOCRVLForConditionalGeneration", _TEXT, {"vision": Part(
        "model.visual", "image", _IMAGE, native_module("paddleocr_vl", "model.projector"),
        steps={"preprocess_callback": Step("native_one_batch")},
    )}, positions=MROPE),
    "cosmos3_edge": Native("Cosmos3EdgeForConditionalGeneration", _TEXT, {"vision": Part(
        "model.visual", "image", _IMAGE, native_module("cosmos3_edge", "model.projector"),
    )}, positions=_APART),
    "hunyuan_vl": Native("HunYuanVLForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_tower", "image", _IMAGE, IDENTITY, output="pooler_output",
        steps={"postprocess_projector_callback": Step("native_row_grids", {"merge": At("vision_config.spatial_merge_size")})},
    )}, positions={"rule": "xdrope", "axes": Count("text_config.rope_parameters.mrope_section")}),
    "shieldgemma2": Native("Gemma3ForConditionalGeneration", _TEXT, _GEMMA3, plain_head=True, mask=_RULES_OF_GEMMA,
                       only={"text_config.use_bidirectional_attention": False}),
    "gemma3": Native("Gemma3ForConditionalGeneration", _TEXT, _GEMMA3, plain_head=True, mask=_RULES_OF_GEMMA,
                       only={"text_config.use_bidirectional_attention": False}),
    "gemma4": Native("Gemma4ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_tower", "image", _IMAGE,
        native_module("gemma4", "model.embed_vision", width=At("vision_config.hidden_size")),
        input_names={"pixel_values": "pixel_values", "image_position_ids": "pixel_position_ids"},
    )}, mask=_RULES_OF_GEMMA | {"layers": ["sliding_attention"]}, softcap=_CAP,
       only={"text_config.use_bidirectional_attention": "vision"}),
    "paligemma": Native("PaliGemmaForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_tower", "image", _IMAGE, Projector("linear", {}, {"": f"{_CONNECTOR}.linear"}),
    )}, positions={"rule": "counted", "first": 1}, mask={"rule": "prefix"}, softcap=_CAP),
    "molmo2": Native("Molmo2ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_tower", "image", _IMAGE,
        native_module(
            "molmo2", width=Product(("vision_config.hidden_size", Count("adapter_config.vision_feature_layer")))
        ),
        layer=HiddenState("adapter_config.vision_feature_layer"), additional_args=("image_token_pooling", "image_grids"),
        merge="add",
    )}, mask={"rule": "one_block"}),
    "ovis2": Native("Ovis2ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_tower", "image", _IMAGE,
        native_module("ovis2", "model.visual_embeddings_table"), output="pooler_output", data_format="channels_last",
        marks=Marks(
            "visual_indicator_token_ids", "vision_config.vocab_size", "vision_config.num_visual_indicator_tokens"
        ),
    )}),
}  # fmt: skip
