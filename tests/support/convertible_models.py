"""Tiny random native multimodal models of transformers, by model type, and batches of uneven media for them.

`TYPES` says of each type how its configuration is made small and what its inputs look like.  Knows nothing of compositions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING

IMAGE, VIDEO, AUDIO, VOCABULARY = 90, 91, 92, 96
# What makes any configuration small, by the names that configurations have for it.
_WIDTHS = dict.fromkeys(
    ("hidden_size", "embed_dim", "d_model", "dim", "width", "projection_dim", "hidden_dim", "out_dim"), 32
)
_INNER = dict.fromkeys(
    (
        "intermediate_size",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "mlp_dim",
        "intermediate_size_mlp",
        "mlp_hidden",
    ),
    48,
)
_LAYERS = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "depth", "n_layers", "encoder_layers", "num_encoder_blocks", "decoder_layers"),
    2,
)
_HEADS = dict.fromkeys(
    (
        "num_attention_heads",
        "num_heads",
        "encoder_attention_heads",
        "attention_heads",
        "num_key_value_heads",
        "n_heads",
    ),
    4,
)
_EXPERTS = dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), 2)
_EXPERTS |= {
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_OTHERS = {"vocab_size": VOCABULARY, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, "num_query_tokens": 4, "sliding_window": 64, "image_size": 32, "patch_size": 8,
           "num_mel_bins": 8, "max_source_positions": 32, "word_embed_proj_dim": 32, "encoder_hidden_size": 32,
           "output_dim": 32, "out_hidden_size": 32, "first_k_dense_replace": 1}  # fmt: skip
SMALL: dict[str, Any] = _WIDTHS | _INNER | _LAYERS | _HEADS | _EXPERTS | _LATENT | _OTHERS
_TOKENS = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO,
           "audio_token_id": AUDIO, "audio_token_index": AUDIO}  # fmt: skip


def small(config_class: Any, changes: dict[str, Any] | None = None) -> Any:
    """A configuration of a class with the values of `SMALL` for what it has, and `changes`, nested by sub-configurations."""
    changes, default = changes or {}, config_class()
    names = {*default.to_dict(), *getattr(config_class, "attribute_map", {})}
    values: dict[str, Any] = {}
    for name in names & set(config_class.sub_configs):
        if (part := getattr(default, name, None)) is not None and hasattr(part, "to_dict"):
            values[name] = small(type(part), changes.get(name))
    given = {key: value for key, value in changes.items() if key not in values}
    own = {
        key: value
        for key, value in (SMALL | _TOKENS).items()
        if key in names and (key in _TOKENS or getattr(default, key, None) is not None)
    }
    own = {
        k: [v, v] if isinstance(getattr(default, k), (list, tuple)) and k == "image_size" else v for k, v in own.items()
    }
    return config_class(
        **(own if not config_class.sub_configs else {k: v for k, v in own.items() if k in _TOKENS}) | given | values
    )


def build(model_type: str, **changes: Any) -> Any:
    """A random native model of a type in evaluation mode; `changes` of its configuration come on top of the type's."""
    row = TYPES[model_type]
    return made(model_type, row.architecture, row.changes | changes)


def made(model_type: str, architecture: str, changes: dict[str, Any]) -> Any:
    """A random model of a class, with parameters far from zero: what is left out or scaled otherwise shows."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(small(CONFIG_MAPPING[model_type], changes)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values * 0.1) if parameter.ndim > 1 else parameter.data.add_(values * 0.1)
    return model


# ---- batches


@dataclass
class Media:
    """Inputs of a model, and how many features each item of a kind has, in order, by its placeholder's id."""

    inputs: dict[str, Any]
    counts: dict[int, list[int]]


def batch(media: Media) -> dict[str, Any]:
    """Left-padded rows: one with the first item of each kind, one with the others, one without media."""
    generator = torch.Generator().manual_seed(2)

    def words(count: int) -> Tensor:
        return torch.randint(5, 80, (count,), generator=generator)

    rows = [[words(3)], [words(2)], [words(6)]]
    for token, counts in media.counts.items():
        for place, count in enumerate(counts):
            rows[min(place, 1)] += [torch.full((count,), token), words(2)]
    texts = [torch.cat(row) for row in rows]
    length = max(map(len, texts))
    ids = torch.stack([torch.cat([torch.zeros(length - len(x), dtype=torch.long), x]) for x in texts])
    mask = torch.stack([(torch.arange(length) >= length - len(x)).long() for x in texts])
    return {"input_ids": ids, "attention_mask": mask} | media.inputs


def features_per_item(output: Any) -> list[int]:
    """How many features each item has in what a native `get_*_features` gives."""
    found = getattr(output, "pooler_output", None)
    found = getattr(output, "last_hidden_state", output) if found is None else found
    if isinstance(found, Tensor) and found.ndim == 2:
        return [len(found)]
    return [x.reshape(-1, x.shape[-1]).shape[0] for x in found]


def count(model: Any, kind: str, **inputs: Any) -> list[int]:
    owner = model.model if hasattr(getattr(model, "model", None), f"get_{kind}_features") else model
    with torch.no_grad():
        return features_per_item(getattr(owner, f"get_{kind}_features")(**inputs))


def _side(model: Any) -> int:
    side = model.config.vision_config.image_size
    return side[0] if isinstance(side, (list, tuple)) else side


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(model: Any) -> Media:
    pixels = noise(3, 3, _side(model), _side(model))
    return Media({"pixel_values": pixels}, {IMAGE: count(model, "image", pixel_values=pixels)})


def renamed_squares(model: Any) -> Media:
    media = squares(model)
    return Media({"pixel_values_images": media.inputs["pixel_values"]}, media.counts)


def tiled(model: Any) -> Media:
    side = _side(model)
    sizes = torch.tensor([[side, 2 * side - 7], [2 * side, side], [side - 5, 2 * side]])
    inputs = {"pixel_values": noise(3, 3, 3, side, side), "image_sizes": sizes}
    return Media(inputs, {IMAGE: count(model, "image", **inputs)})


def rows_of_images(model: Any) -> Media:
    side = _side(model)
    pixels, mask = noise(3, 2, 3, side, side), torch.ones(3, 2, side, side, dtype=torch.bool)
    pixels[0, 1] = pixels[2] = 0  # padding of a row, and a row without images
    mask[1, 0, :, side // 2 :] = False
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
    per_row = count(model, "image", **inputs)
    each = sum(per_row) // 3
    return Media(inputs, {IMAGE: [each] * 3})


def masked_squares(model: Any) -> Media:
    media, side = squares(model), _side(model)
    mask = torch.ones(3, side, side, dtype=torch.bool)
    mask[1, side // 2 :] = False
    return Media(media.inputs | {"pixel_mask": mask}, media.counts)


def sized(model: Any) -> Media:
    side = _side(model)
    sizes = torch.tensor([[side, side], [side // 2, side], [side, side // 2]])
    inputs = {"pixel_values": noise(3, 3, side, side), "image_sizes": sizes}
    return Media(inputs, {IMAGE: count(model, "image", **inputs)})


def shaped_patches(model: Any) -> Media:
    shapes, size = torch.tensor([[4, 4], [2, 4], [4, 2]]), model.config.vision_config.patch_size
    mask = (torch.arange(16)[None] < shapes.prod(-1)[:, None]).long()
    inputs = {"pixel_values": noise(3, 16, 3 * size**2), "spatial_shapes": shapes, "pixel_attention_mask": mask}
    return Media(inputs, {IMAGE: count(model, "image", **inputs)})


def instructed(model: Any) -> Media:
    media = queried(model)
    ids, mask = torch.randint(5, 80, (3, 4)), torch.tensor([[1] * 4, [1, 1, 0, 0], [1] * 4])
    return Media(media.inputs | {"qformer_input_ids": ids, "qformer_attention_mask": mask}, media.counts)


def queried(model: Any) -> Media:
    return Media(
        {"pixel_values": noise(3, 3, _side(model), _side(model))}, {IMAGE: [model.config.num_query_tokens] * 3}
    )


def two_sizes(model: Any) -> Media:
    side = model.config.high_res_vision_config.image_size
    pixels, large = noise(3, 3, _side(model), _side(model)), noise(3, 3, side, side)
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return Media({"pixel_values": pixels, "high_res_pixel_values": large}, {IMAGE: [grid**2] * 3})


def ready_patches(model: Any) -> Media:
    return Media({"pixel_values": noise(3, 5, model.model.vision_embed_tokens.in_features)}, {IMAGE: [5] * 3})


def packed(model: Any, **extra: Any) -> Media:
    grid = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 4, 2]])
    inputs = {"pixel_values": _patches(model, grid), "image_grid_thw": grid} | extra
    return Media(inputs, {IMAGE: count(model, "image", **inputs)})


def merge_sized(model: Any) -> Media:
    return packed(model, image_merge_sizes=torch.full((3,), 2))


def _patches(model: Any, grid: Tensor) -> Tensor:
    vision = model.config.vision_config
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    size, total = vision.patch_size, int(grid.prod(-1).sum())
    shape = (3, size, size) if model.config.model_type in ("kimi_k25",) else (3 * frames * size**2,)
    return noise(total, *shape, seed=total)


def mel(length: Callable[[Any], int], mask: str | None, item: bool = True, **extra: Any) -> Callable[[Any], Media]:
    """Spectrograms of `length` frames, with a mask of that name; `item`: each is counted alone."""

    def made(model: Any) -> Media:
        audio, frames = model.config.audio_config, length(model.config)
        lengths = torch.tensor([frames, frames * 5 // 8, frames // 2])
        inputs: dict[str, Any] = {"input_features": noise(3, audio.num_mel_bins, frames)}
        if mask is not None:
            inputs[mask] = (torch.arange(frames)[None] < lengths[:, None]).long()
        inputs |= dict.fromkeys(extra.get("copies", ()), inputs[mask]) if mask else {}
        items = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(3)]
        return Media(inputs, {AUDIO: [sum(count(model, "audio", **one)) for one in items]})

    return made


def _window(config: Any) -> int:
    return 2 * config.audio_config.max_source_positions


def whisper_like(model: Any) -> Media:
    frames = _window(model.config)
    lengths = torch.tensor([frames, frames // 2, frames // 4])
    mask = (torch.arange(frames)[None] < lengths[:, None]).long()
    features = noise(3, model.config.audio_config.num_mel_bins, frames)
    counts = model.model.audio_tower._get_feat_extract_output_lengths(lengths)[1].tolist()
    return Media({"input_features": features, "feature_attention_mask": mask}, {AUDIO: counts})


def windows(model: Any) -> Media:
    features = noise(3, model.config.audio_config.num_mel_bins, _window(model.config))
    each = sum(count(model, "audio", input_features=features)) // 3
    return Media({"input_features": features}, {AUDIO: [each] * 3})


def queried_frames(model: Any) -> Media:
    features = noise(3, 24, model.config.encoder_config.input_dim)
    whole = count(model, "audio", input_features=features)[0]
    kept = torch.tensor([whole, whole - 1, whole - 2])
    mask = torch.arange(whole)[None] < kept[:, None]
    return Media({"input_features": features, "input_features_mask": mask}, {AUDIO: kept.tolist()})


def audio_frames(model: Any) -> Media:
    mask = (torch.arange(12)[None] < torch.tensor([12, 8, 6])[:, None]).long()
    inputs = {"input_features": noise(3, 12, model.config.audio_config.input_size), "input_features_mask": mask}
    return Media(inputs, {AUDIO: mask.sum(-1).tolist()})


def frames_of_videos(model: Any) -> Media:
    """Two videos of as many frames, ``(videos, frames, channels, height, width)``."""
    pixels = noise(2, 3, 3, _side(model), _side(model), seed=7)
    with torch.no_grad():
        found = model.model.get_video_features(pixel_values_videos=pixels).pooler_output
    return Media({"pixel_values_videos": pixels}, {VIDEO: [found.reshape(-1, found.shape[-1]).shape[0] // 2] * 2})


def packed_videos(model: Any, **extra: Any) -> Media:
    grid = torch.tensor([[2, 4, 4], [3, 2, 4]])
    inputs = {"pixel_values_videos": _patches(model, grid), "video_grid_thw": grid} | extra
    return Media(inputs, {VIDEO: count(model, "video", **inputs)})


def merge_sized_videos(model: Any) -> Media:
    return packed_videos(model, video_merge_sizes=torch.full((2,), 2))


# ---- types


@dataclass
class Row:
    """How a type is made small, its class, its inputs, those of videos."""

    architecture: str
    media: Callable[[Any], Media]
    changes: dict[str, Any] = field(default_factory=dict)
    videos: Callable[[Any], Media] | None = None
    text_items: bool = True


_CLIP = {"model_type": "clip_vision_model"}
_TILES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}
TYPES: dict[str, Row] = {
    "llava": Row("LlavaForConditionalGeneration", squares),
    "vipllava": Row("VipLlavaForConditionalGeneration", squares, {"vision_feature_layer": [-2, -1]}),
    "llava_next": Row("LlavaNextForConditionalGeneration", tiled, _TILES),
    "llava_next_video": Row("LlavaNextVideoForConditionalGeneration", tiled, _TILES, frames_of_videos),
    "llava_onevision": Row("LlavaOnevisionForConditionalGeneration", tiled, _TILES, frames_of_videos),
    "video_llava": Row("VideoLlavaForConditionalGeneration", renamed_squares, {}, frames_of_videos),
    "internvl": Row("InternVLForConditionalGeneration", squares),
    "qianfan_ocr": Row("QianfanOCRForConditionalGeneration", squares),
    "idefics2": Row("Idefics2ForConditionalGeneration", rows_of_images, {
        "perceiver_config": {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8},
    }),
    "idefics3": Row("Idefics3ForConditionalGeneration", rows_of_images),
    "smolvlm": Row("SmolVLMForConditionalGeneration", rows_of_images),
    "janus": Row("JanusForConditionalGeneration", squares, {
        "vision_config": {"projection_dim": 32, "depth": 3},
        "vq_config": {"embed_dim": 8, "num_embeddings": 16, "base_channels": 32, "latent_channels": 32, "projection_dim": 32,
                      "channel_multiplier": [1, 1], "num_patches": 4, "image_token_embed_dim": 32},
    }),
    "deepseek_vl": Row("DeepseekVLForConditionalGeneration", squares),
    "deepseek_vl_hybrid": Row("DeepseekVLHybridForConditionalGeneration", two_sizes, {
        "high_res_vision_config": {"image_size": 64, "output_channels": 16, "global_attn_indexes": [0], "window_size": 2},
    }),
    "aya_vision": Row("AyaVisionForConditionalGeneration", squares),
    "cohere2_vision": Row("Cohere2VisionForConditionalGeneration", squares, {"alignment_intermediate_size": 64}),
    "got_ocr2": Row("GotOcr2ForConditionalGeneration", squares),
    "pp_chart2table": Row("GotOcr2ForConditionalGeneration", squares),
    "lfm2_vl": Row("Lfm2VlForConditionalGeneration", shaped_patches, {"vision_config": {"num_patches": 16}}),
    "aria": Row("AriaForConditionalGeneration", masked_squares, {"projector_patch_to_query_dict": {16: 4}}),
    "mistral3": Row("Mistral3ForConditionalGeneration", sized),
    "mistral_large4": Row("MistralLarge4ForConditionalGeneration", sized),
    "lighton_ocr": Row("LightOnOcrForConditionalGeneration", sized),
    "blip-2": Row("Blip2ForConditionalGeneration", queried),
    "instructblip": Row("InstructBlipForConditionalGeneration", instructed),
    "fuyu": Row("FuyuForCausalLM", ready_patches),
    "lfm3_vl": Row("Lfm3VlForConditionalGeneration", packed, {
        "text_config": {"layer_types": ["conv", "full_attention"]}
    }, packed_videos),
    "hyperclovax_vision_v2": Row("HyperCLOVAXVisionV2ForConditionalGeneration", packed, {}, packed_videos),
    "exaone4_5": Row("Exaone4_5_ForConditionalGeneration", packed, {}, packed_videos),
    "video_llama_3": Row("VideoLlama3ForConditionalGeneration", merge_sized, {}, merge_sized_videos),
    "kimi_k25": Row("Kimi_K25ForConditionalGeneration", packed, {"projection_hidden_size": 32}, packed_videos),
    "muse_glimmer": Row("MuseGlimmerForConditionalGeneration", packed, {
        "out_hidden_size": 128, "projector_hidden_size": 48
    }, packed_videos),
    "qwen2_audio": Row("Qwen2AudioForConditionalGeneration", whisper_like),
    "voxtral": Row("VoxtralForConditionalGeneration", windows, {
        "audio_config": {"intermediate_size": 128, "encoder_ffn_dim": 128}
    }),
    "audioflamingo3": Row("AudioFlamingo3ForConditionalGeneration", mel(_window, "input_features_mask")),
    "glmasr": Row("GlmAsrForConditionalGeneration", mel(lambda c: 64, "input_features_mask"), {
        "audio_config": {"intermediate_size": 128}
    }),
    "qwen3_asr": Row("Qwen3ASRForConditionalGeneration", mel(lambda c: 8 * c.audio_config.n_window, "input_features_mask")),
    "moss_transcribe_diarize": Row(
        "MossTranscribeDiarizeForConditionalGeneration", mel(_window, "input_features_mask", copies=("padding_mask",))
    ),
    "granite_speech": Row("GraniteSpeechForConditionalGeneration", queried_frames, {"has_lora_adapter": False}),
    "granite_speech_plus": Row("GraniteSpeechPlusForConditionalGeneration", queried_frames, {"has_lora_adapter": False}),
    "fun_asr_nano": Row("FunAsrNanoForConditionalGeneration", audio_frames, {
        "adaptor_config": {"intermediate_size": 8}
    }),
}  # fmt: skip
