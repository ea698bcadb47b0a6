"""The conversion table: one row per native type of transformers, data only; `entries` says what the fields mean."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .entries import (
    At,
    Case,
    Count,
    Entry,
    First,
    HiddenState,
    Inverse,
    Native,
    Part,
    Product,
    Projector,
    Ratio,
    Step,
    Sum,
    Whole,
)
from .table_rules import IDENTITY as _IDENTITY
from .table_rules import RULED
from .table_rules import native_module as _native

_CLASS_TOKEN = Case("vision_feature_select_strategy", {"default": 1, "full": 0})
_IMAGE, _VIDEO, _AUDIO = "image_token_id", "video_token_id", "audio_token_id"
_TEXT, _CONNECTOR = "model.language_model", "model.multi_modal_projector"
_TOWER = "model.vision_tower"


def _mlp(at: str = _CONNECTOR, first: str = "linear_1", last: str = "linear_2", **options: Any) -> Projector:
    names = {"0": f"{at}.{first}", "2": f"{at}.{last}"}
    return Projector("mlp", {"activation": At("projector_hidden_act")} | options, names)


def _linear(inside: Any, out: Any, bias: Any = True) -> dict[str, Any]:
    return {"class": "Linear", "arguments": {"in_features": inside, "out_features": out, "bias": bias}}


def _shuffle(names: Mapping[str, str], **options: Any) -> Projector:
    return Projector("pixel_shuffle", options, {f"head.{ours}": theirs for ours, theirs in names.items()})


# ---- LLaVA and its relatives

_TWO_LAYERS = _mlp(bias=At("multimodal_projector_bias"))
_LAYER: dict[str, Any] = {"layer": HiddenState("vision_feature_layer"), "drop_prefix": _CLASS_TOKEN}
_TILES = Step("native_tiles", {"pinpoints": At("image_grid_pinpoints"), "image_size": At("vision_config.image_size")})


def _packed_tiles(**options: Any) -> Step:
    arguments: dict[str, Any] = {
        "hidden_size": At("text_config.hidden_size"), "pinpoints": At("image_grid_pinpoints"),
        "image_size": At("vision_config.image_size"), "patch_size": At("vision_config.patch_size"),
    }  # fmt: skip
    return Step("native_any_resolution", arguments | options, {"image_newline": "model.image_newline"})


def _video(*others: str, **options: Any) -> Part:
    """Videos through the tower and the projector of images; `others` are inputs beside the pixels."""
    names = {"pixel_values_videos": "pixel_values"} | {f"video_{name}": name for name in others}
    return Part(None, "video", _VIDEO, shares="vision", input_names=names, **options)


def _any_resolution(*others: str, **options: Any) -> Part:
    return Part(
        _TOWER, "image", _IMAGE, _TWO_LAYERS, **_LAYER, additional_args=("image_sizes", *others),
        steps={"preprocess_callback": _TILES, "postprocess_projector_callback": _packed_tiles(**options)},
    )  # fmt: skip


_INTERNVL = Part(
    _TOWER, "image", _IMAGE,
    _shuffle(
        {"norm": f"{_CONNECTOR}.layer_norm", "linear_1": f"{_CONNECTOR}.linear_1", "linear_2": f"{_CONNECTOR}.linear_2"},
        scale_factor=Inverse("downsample_ratio"), activation=At("projector_hidden_act"),
    ),
    layer=At("vision_feature_layer"), drop_prefix=_CLASS_TOKEN,
)  # fmt: skip
_VIP_WIDTH = Product(("vision_config.hidden_size", Count("vision_feature_layer")))
_VIP = [
    {"class": "LayerNorm", "arguments": {"normalized_shape": [_VIP_WIDTH], "eps": At("projector_layernorm_eps")}},
    _linear(_VIP_WIDTH, At("text_config.hidden_size")),
    {"activation": At("projector_hidden_act")},
    _linear(At("text_config.hidden_size"), At("text_config.hidden_size")),
]
_LLAVA: dict[str, Native] = {
    "llava": Native("LlavaForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _TWO_LAYERS, **_LAYER,
    )}),
    "vipllava": Native("VipLlavaForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE,
        Projector(
            "torch", {"module": {"class": "Sequential", "modules": _VIP}},
            {"0": f"{_CONNECTOR}.projector_layernorm", "1": f"{_CONNECTOR}.linear_1", "3": f"{_CONNECTOR}.linear_2"},
        ),
        layer=HiddenState("vision_feature_layer"), drop_prefix=1,
    )}),
    "llava_next": Native("LlavaNextForConditionalGeneration", _TEXT, {"vision": _any_resolution()}),
    "llava_next_video": Native("LlavaNextVideoForConditionalGeneration", _TEXT, {
        "vision": _any_resolution(),
        "video": _video(**_LAYER, steps={"postprocess_module_callback": Step("native_pooled_frames", {
            "mode": Case("spatial_pool_mode", {"average": "average", "max": "max"}), "stride": At("spatial_pool_stride"),
            "side": Ratio("vision_config.image_size", "vision_config.patch_size", exact=False),
        })}),
    }),
    "llava_onevision": Native("LlavaOnevisionForConditionalGeneration", _TEXT, {
        "vision": _any_resolution("batch_num_images", aspect_ratio=At("vision_aspect_ratio")),
        "video": _video(**_LAYER, shared_steps=("postprocess_projector_callback",)),
    }),
    "video_llava": Native("VideoLlavaForConditionalGeneration", _TEXT, {"vision": Part(
        "model.image_tower", "image", _IMAGE, _TWO_LAYERS, **_LAYER, input_names={"pixel_values_images": "pixel_values"},
    ), "video": Part(
        "model.video_tower", "video", _VIDEO, layer=HiddenState("vision_feature_layer"), shares="vision",
        input_names={"pixel_values_videos": "pixel_values"},
    )}),
    "internvl": Native("InternVLForConditionalGeneration", _TEXT, {"vision": _INTERNVL}),
    "qianfan_ocr": Native("QianfanOCRForConditionalGeneration", _TEXT, {"vision": _INTERNVL}),
}  # fmt: skip

# ---- other images

_REAL_IMAGES = Step("native_real_images", {"patch_size": At("vision_config.patch_size")})
_WHOLE_PATCHES = Step("native_real_images", {"patch_size": At("vision_config.patch_size"), "whole_patches": True})
_IDEFICS3 = Part(
    "model.vision_model", "image", _IMAGE,
    _shuffle(
        {"linear_1": "model.connector.modality_projection.proj"},
        scale_factor=At("scale_factor"), num_layers=1, norm="none", bias=False,
    ),
    additional_args=("pixel_attention_mask",), steps={"preprocess_callback": _REAL_IMAGES},
)  # fmt: skip
_ALIGNER = {"0": "model.aligner.fc1"} | {f"{2 * i + 2}": f"model.aligner.hidden_layers.{i}" for i in range(16)}
_BY_SIZES: dict[str, Any] = {"kind": "image", "token": _IMAGE}
_CHANNELS = At("vision_config.output_channels")
_BRIDGE = {"query_tokens": "query_tokens", "qformer": "qformer", "language_projection": "language_projection"}
_IMAGES: dict[str, Native] = {
    "idefics2": Native("Idefics2ForConditionalGeneration", "model.text_model", {"vision": Part(
        "model.vision_model", "image", _IMAGE, _native("idefics2", "model.connector"),
        additional_args=("pixel_attention_mask",), steps={"preprocess_callback": _WHOLE_PATCHES},
    )}),
    "idefics3": Native("Idefics3ForConditionalGeneration", "model.text_model", {"vision": _IDEFICS3}),
    "smolvlm": Native("SmolVLMForConditionalGeneration", "model.text_model", {"vision": _IDEFICS3}),
    "janus": Native("JanusForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_model", "image", _IMAGE,
        Projector(
            "mlp",
            {"activation": At("vision_config.hidden_act"), "num_layers": At("vision_config.depth"),
             "hidden_size": At("vision_config.projection_dim")},
            _ALIGNER,
        ),
    )}),
    "deepseek_vl": Native("DeepseekVLForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_model", "image", _IMAGE, _mlp("model.aligner", "linear1", "linear2", activation="gelu"),
    )}),
    "deepseek_vl_hybrid": Native("DeepseekVLHybridForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_model", "image", _IMAGE,
        _native("deepseek_vl_hybrid", "model.aligner", width=Sum((
            At("vision_config.hidden_size"), Product(("high_res_vision_config.output_channels", 4))
        ))),
        additional_args=("high_res_pixel_values",), steps={"postprocess_module_callback": Step("native_high_resolution", {
            "tower": Whole("high_res_vision_config"), "global_layer": Entry("high_res_vision_config.global_attn_indexes", 0),
            "grid": Ratio("vision_config.image_size", "vision_config.patch_size", exact=False),
        }, {"model": "model.high_res_vision_model", "neck": "model.high_res_vision_neck",
            "proj": "model.high_res_vision_proj", "alpha": "model.high_res_vision_alpha"})},
    )}),
    "aya_vision": Native("AyaVisionForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE,
        _shuffle(
            {"norm": f"{_CONNECTOR}.layernorm", "linear_1": f"{_CONNECTOR}.linear_1", "linear_2": f"{_CONNECTOR}.linear_2"},
            scale_factor=At("downsample_factor"), activation="silu", gated=True, norm_eps=At("adapter_layer_norm_eps"),
            hidden_size=Ratio(First(("alignment_intermediate_size", "text_config.hidden_size")), 2),
        ),
        **_LAYER,
    )}, plain_head=True),
    "cohere2_vision": Native("Cohere2VisionForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("cohere2_vision"),
    )}, plain_head=True),
    "got_ocr2": Native("GotOcr2ForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("got_ocr2", width=_CHANNELS),
    )}),
    "pp_chart2table": Native("GotOcr2ForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("pp_chart2table", width=_CHANNELS),
    )}),
    "lfm2_vl": Native("Lfm2VlForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("lfm2_vl"),
    )}),
    "llama4": Native("Llama4ForConditionalGeneration", "language_model", {"vision": Part(
        "vision_model", "image", _IMAGE, Projector(
            "torch",
            {"module": _linear(At("vision_config.vision_output_dim"), At("text_config.hidden_size"), False)},
            {"": "multi_modal_projector.linear_1"},
        ),
    )}),
    "aria": Native("AriaForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("aria"), layer=HiddenState("vision_feature_layer"), additional_args=("pixel_mask",),
        steps={"preprocess_callback": Step("native_patch_mask", {"patch_size": At("vision_config.patch_size")})},
    )}),
    "mistral3": Native("Mistral3ForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("mistral3"), layer=HiddenState("vision_feature_layer"),
    )}),
    "mistral_large4": Native("MistralLarge4ForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("mistral_large4"), layer=HiddenState("vision_feature_layer"),
    )}, plain_head=True, softcap=At("text_config.final_logit_softcapping")),
    "lighton_ocr": Native("LightOnOcrForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_encoder", "image", _IMAGE, _native("lighton_ocr", "model.vision_projection"),
    )}),
    "blip-2": Native("Blip2ForConditionalGeneration", "language_model", {"vision": Part(
        "vision_model", "image", _IMAGE, _native("blip-2", _BRIDGE),
    )}, only={"use_decoder_only_language_model": True}),
    "instructblip": Native("InstructBlipForConditionalGeneration", "language_model", {"vision": Part(
        "vision_model", "image", _IMAGE, _native("instructblip", _BRIDGE),
        additional_args=("qformer_input_ids", "qformer_attention_mask"),
    )}, only={"use_decoder_only_language_model": True}),
    "fuyu": Native("FuyuForCausalLM", _TEXT, {"vision": Part(
        None, "image", _IMAGE, Projector("linear", {}, {"": "model.vision_embed_tokens"}),
        width=Product(("patch_size", "patch_size", "num_channels")), input_names={"pixel_values": "features"},
    )}),
}  # fmt: skip

# ---- packed patches of images and videos

_KERNEL = "vision_config.merge_kernel_size"
_KERNEL_WIDTH = Product(("vision_config.hidden_size", Entry(_KERNEL, 0), Entry(_KERNEL, 1)))
_GRID_NAMES = {"pixel_values": "pixel_values", "image_grid_thw": "grid_thw"}
# Of towers that call their patches hidden states.
_PACKED_VIDEO = Part(
    None,
    "video",
    _VIDEO,
    shares="vision",
    input_names={"pixel_values_videos": "hidden_states", "video_grid_thw": "grid_thw"},
)
_UNIT_RMS = {"postprocess_projector_callback": Step("native_unit_rms", {"eps": At("text_config.rms_norm_eps")})}
_PACKED: dict[str, Native] = {
    "lfm3_vl": Native("Lfm3VlForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("lfm3_vl"), input_names=_GRID_NAMES,
    ), "video": _video("grid_thw")}),
    "hyperclovax_vision_v2": Native("HyperCLOVAXVisionV2ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_model", "image", _IMAGE, Projector("linear", {}, {"": "model.projector"}),
    ), "video": _PACKED_VIDEO}, scale=At("text_config.logits_scaling")),
    "exaone4_5": Native("Exaone4_5_ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.visual", "image", _IMAGE, _IDENTITY,
    ), "video": _PACKED_VIDEO}),
    "video_llama_3": Native("VideoLlama3ForConditionalGeneration", _TEXT, {"vision": Part(
        "model.vision_model", "image", _IMAGE, _mlp("model.projector", "readout.0", "readout.2", activation="gelu"),
        input_names=_GRID_NAMES | {"image_merge_sizes": "merge_sizes"},
    ), "video": _video("grid_thw", "merge_sizes")}),
    "kimi_k25": Native("Kimi_K25ForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE, _native("kimi_k25", "model.mm_projector", width=_KERNEL_WIDTH), input_names=_GRID_NAMES,
    ), "video": _video("grid_thw")}),
    "muse_glimmer": Native("MuseGlimmerForConditionalGeneration", _TEXT, {"vision": Part(
        _TOWER, "image", _IMAGE,
        Projector(
            "torch",
            {"module": {"class": "Sequential", "modules": [
                _linear(At("out_hidden_size"), At("projector_hidden_size"), False), {"activation": At("projector_hidden_act")},
                _linear(At("projector_hidden_size"), At("projector_hidden_size"), False),
                {"activation": At("projector_hidden_act")},
                _linear(At("projector_hidden_size"), At("text_config.hidden_size"), False),
            ]}},
            {"0": "model.vision_adapter.fc1", "2": "model.vision_adapter.fc2", "4": "model.vision_projection"},
        ),
        steps=_UNIT_RMS, input_names=_GRID_NAMES,
    ), "video": _video("grid_thw", steps=_UNIT_RMS)},
        plain_head=True, scale=At("text_config.output_multiplier"), softcap=At("text_config.final_logit_softcapping"),
    ),
}  # fmt: skip

# ---- sounds

_STACK = {"head.linear_1": f"{_CONNECTOR}.linear_1", "head.linear_2": f"{_CONNECTOR}.linear_2"}
_SOUND: dict[str, Any] = {"tower": "model.audio_tower", "kind": "audio", "token": _AUDIO}
_MASK = ("input_features_mask",)
_QUERIES = Part(
    "model.encoder",
    "audio",
    _AUDIO,
    _native("granite_speech", "model.projector"),
    additional_args=_MASK,
    input_names={"input_features": "hidden_states"},
)
_QUERIES_PLUS = replace(_QUERIES, projector=_native("granite_speech_plus", "model.projector"))
_SOUNDS: dict[str, Native] = {
    "qwen2_audio": Native("Qwen2AudioForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND, projector=Projector("linear", {}, {"": f"{_CONNECTOR}.linear"}), additional_args=("feature_attention_mask",),
        steps={"preprocess_callback": Step("native_sound_mask"), "postprocess_module_callback": Step("native_sound_lengths")},
    )}),
    "voxtral": Native("VoxtralForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND,
        projector=Projector(
            "frame_stack",
            {"stack_factor": Ratio("audio_config.intermediate_size", "audio_config.d_model"), "bias": False,
             "remainder": "error", "activation": At("projector_hidden_act")},
            _STACK,
        ),
    )}),
    "audioflamingo3": Native("AudioFlamingo3ForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND, projector=_mlp(bias=At("projector_bias")),
    )}),
    "glmasr": Native("GlmAsrForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND, projector=_native("glmasr"), additional_args=_MASK,
    )}),
    "qwen3_asr": Native("Qwen3ASRForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND,
        projector=_mlp(activation=At("audio_config.activation_function"), hidden_size=At("audio_config.d_model")),
    )}),
    "moss_transcribe_diarize": Native("MossTranscribeDiarizeForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND, projector=_native("moss_transcribe_diarize"), additional_args=("input_features_mask", "padding_mask"),
    )}),
    "granite_speech": Native(
        "GraniteSpeechForConditionalGeneration", _TEXT, {"audio": _QUERIES}, plain_head=True, only={"has_lora_adapter": False}
    ),
    "granite_speech_plus": Native(
        "GraniteSpeechPlusForConditionalGeneration", _TEXT, {"audio": _QUERIES_PLUS}, plain_head=True,
        only={"has_lora_adapter": False},
    ),
    "fun_asr_nano": Native("FunAsrNanoForConditionalGeneration", _TEXT, {"audio": Part(
        **_SOUND, projector=_native("fun_asr_nano"),
    )}),
}  # fmt: skip

NATIVE: dict[str, Native] = _LLAVA | _IMAGES | _PACKED | RULED | _SOUNDS
