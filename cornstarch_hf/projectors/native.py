"""Projectors that are a module of one native model of transformers, run as that model runs it.

A checkpoint names the native type and the place of the module in it; only what `NATIVE_MODULES` lists is built.  A checkpoint's
code carries this file only where it names the type.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig

from ..parts.registries import Registry, register_projector
from ..parts.stored_modules import as_json
from .projector import Grids, Lengths
from .qformer import QFormerBridge

# What a module makes of features: `(module, features, lengths, grids, inputs)` to features and how many each item has.
Run = Callable[[Any, Tensor, Lengths, Grids, Mapping[str, Any]], tuple[Tensor, Lengths]]


def _plain(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Each feature alone, or items ``(items, length, width)`` of one length: what the module gives is what they have."""
    return module(features), lengths


def _as_maps(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items that become maps ``(items, height, columns, hidden)``, which are read row by row."""
    return module(features).flatten(1, 2), None


def _maps(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items as maps ``(items, width, height, columns)``."""
    height, width = (grids or [()])[0]
    return module(features.transpose(1, 2).unflatten(2, (height, width))), lengths


def _image_sizes(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Patches of all images ``(sum, width)`` with the images' sizes in pixels (Mistral 3)."""
    sizes = inputs["image_sizes"]
    merger = module.patch_merger
    side = merger.patch_size * merger.spatial_merge_size
    return module(_packed(features), sizes), [(int(h) // side) * (int(w) // side) for h, w in sizes]


def _patch_mask(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items with the mask of their patches (Idefics 2)."""
    return module(features, attention_mask=inputs["patch_attention_mask"].flatten(1)), None


def _masked_patches(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items with a mask that is true on patches of padding, None where there is none (Aria)."""
    mask = inputs.get("patch_attention_mask")
    return module(features, attn_mask=None if mask is None else ~mask.flatten(1)), None


def _blocks(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Blocks of patches of all images as one map of ``factor`` rows, padding included (LFM2-VL)."""
    factor, shapes = module.factor, inputs["spatial_shapes"]
    images, patches = features.shape[:2]
    columns = shapes[:, 1, None]  # of patches, (images, 1)
    counts = (shapes // factor).prod(-1)  # blocks of each image
    block = torch.arange(patches // factor**2, device=features.device)[None]  # (1, blocks of the largest image)
    inside, of_image = (
        torch.arange(factor, device=features.device),
        torch.arange(images, device=features.device) * patches,
    )
    row = (block // (columns // factor) * factor)[..., None, None] + inside[:, None]
    column = (block % (columns // factor) * factor)[..., None, None] + inside
    place = of_image[:, None, None, None] + row * columns[..., None, None] + column  # (images, blocks, factor, factor)
    real = block < counts[:, None]
    place = place.masked_fill(~real[..., None, None], 0).flatten(0, 1).permute(1, 0, 2).reshape(factor, -1)
    projected = module(features.reshape(-1, features.shape[-1])[place].unsqueeze(0))
    return projected.reshape(-1, projected.shape[-1])[real.flatten()], counts.tolist()


def _groups(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Patches that the tower has joined to one feature, one by one again (Kimi)."""
    return module(features.unflatten(1, (-1, module.pre_norm.normalized_shape[0]))).squeeze(1), lengths


def _merged(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Packed patches, of which the module joins neighbours (LFM3-VL): as many fewer of each item as of all."""
    projected = module(features)
    projected = projected.reshape(-1, projected.shape[-1])
    each = sum(lengths or ()) // len(projected)
    return projected, [n // each for n in lengths or ()]


def _sound_frames(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Four frames joined, and the features of valid frames kept (GLM-ASR)."""
    joined = module(features.reshape(len(features), -1, module.linear_1.in_features))
    frames = (inputs["input_features_mask"].sum(-1) - 1) // 2 + 1  # after the strided convolution
    return joined, ((frames - 4) // 4 + 1).tolist()


def _valid_frames(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Frames with their mask, of which the valid ones are kept (Fun-ASR-Nano)."""
    mask = inputs["input_features_mask"]
    return module(features, mask), mask.sum(-1).tolist()


def _queries(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Queries of windows, of which the mask of features names those that are kept (Granite Speech)."""
    mask = inputs.get("input_features_mask")
    return module(features), None if mask is None else mask.sum(-1).tolist()


def _merged_frames(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Valid frames of all sounds joined, those of padding that fill up a group included (MOSS Transcribe Diarize)."""
    merge = module.linear_1.in_features // features.shape[-1]
    frames = (inputs["input_features_mask"].sum(-1) - 1) // 2 + 1
    kept = (frames + merge - 1) // merge * merge
    # (sum of kept frames,) places in all frames; told by the mask alone, for a run on shapes has no values of features.
    rows = (torch.arange(features.shape[1], device=kept.device)[None] < kept[:, None]).flatten().nonzero()[:, 0]
    found = features.flatten(0, 1)[rows]
    return module(found.reshape(-1, merge * features.shape[-1])), (kept // merge).tolist()


def _halves(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Features of two towers, joined, each for its own layer (DeepSeek-VL)."""
    width = module.vision_proj.in_features
    return module(features[..., :width].contiguous(), features[..., width:].contiguous()), None


def _instructed(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items with the text that instructs the Q-Former (InstructBLIP)."""
    return module(features, inputs.get("qformer_input_ids"), inputs.get("qformer_attention_mask")), None


def _blocks_of_grids(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Packed patches with the grids of their items, of which squares become one feature (PaddleOCR-VL)."""
    sides = inputs["grid_thw"]
    side = module.merge_kernel_size[0]
    return module(_packed(features), sides), (sides.prod(-1) // side**2).tolist()


def _pooled(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Items ``(items, length, width)``, of which all become as many features (Gemma 3)."""
    return module(features), None


def _pooled_by_index(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Patches of all crops, pooled by the indices of those that make one feature (Molmo 2)."""
    sides = inputs["image_grids"]
    counts = sides[:, 0] * sides[:, 1] + sides[:, 2] * sides[:, 3]
    return module(features, inputs["image_token_pooling"]).last_hidden_state, counts.tolist()


def _visual_words(module: Any, features: Tensor, lengths: Lengths, grids: Grids, inputs: Mapping[str, Any]):
    """Probabilities of visual words, to which the marks in the same table add none (Ovis 2)."""
    marks = features.new_zeros(*features.shape[:-1], module.num_embeddings - features.shape[-1])
    return module(torch.cat([features, marks], dim=-1)), lengths


def _two_configs(settings: Any, cls: Any) -> nn.Module:
    return cls(settings.vision_config, settings.text_config)


def _adapter(settings: Any, cls: Any) -> nn.Module:
    return cls(settings.adapter_config)


def _table(settings: Any, cls: Any) -> nn.Module:
    return cls(settings.vision_config.vocab_size, settings.hidden_size)


def _packed(features: Tensor) -> Tensor:
    return features if features.ndim == 2 else features.flatten(0, 1)


def _queried(settings: Any, cls: Any) -> nn.Module:
    return QFormerBridge(cls(settings.qformer_config), settings.num_query_tokens, settings.text_config.hidden_size)


@dataclass(frozen=True)
class NativeModule:
    """A module of a native model.

    Attributes:
        class_name: of its class, in the modeling file of the `family` (by default the model type).
        settings: what it reads of the native configuration: dotted paths of values or of whole configurations.
        run: how features reach it.
        family: folder of its class in transformers.
        bridge: what is built around the class.
        needs_grid: whether the grid of the items' features must be known.
    """

    class_name: str
    settings: Sequence[str]
    run: Run = _plain
    family: str | None = None
    bridge: Callable[..., nn.Module] | None = None
    needs_grid: bool = False


_MISTRAL3 = (
    "vision_config.hidden_size", "vision_config.patch_size", "text_config.hidden_size", "text_config.rms_norm_eps",
    "spatial_merge_size",
)  # fmt: skip
_MISTRAL3_MLP = (*_MISTRAL3, "vision_feature_layer", "multimodal_projector_bias", "projector_hidden_act")
_GOT = ("vision_config.output_channels", "text_config.hidden_size")
_GRANITE = ("projector_config", "downsample_rate", "window_size", "text_config.hidden_size")
_QFORMER = ("qformer_config", "num_query_tokens", "text_config.hidden_size")
_FRAMES = ("audio_config.intermediate_size", "text_config.hidden_size", "projector_hidden_act")
NATIVE_MODULES: dict[str, NativeModule] = {
    "cohere2_vision": NativeModule(
        "Cohere2VisionMultiModalProjector",
        ("downsample_factor", "alignment_intermediate_size", "vision_config.hidden_size", "text_config.hidden_size"),
        _as_maps,
    ),
    "deepseek_vl_hybrid": NativeModule(
        "DeepseekVLHybridAligner",
        ("vision_config.hidden_size", "high_res_vision_config.output_channels", "text_config.hidden_size"),
        _halves,
    ),
    "idefics2": NativeModule(
        "Idefics2Connector",
        ("vision_config.hidden_size", "text_config.intermediate_size", "text_config.hidden_size", "text_config.hidden_act",
         "perceiver_config"),
        _patch_mask,
    ),
    "got_ocr2": NativeModule("GotOcr2MultiModalProjector", _GOT, _maps, needs_grid=True),
    "pp_chart2table": NativeModule("GotOcr2MultiModalProjector", _GOT, _maps, "got_ocr2", needs_grid=True),
    "lfm2_vl": NativeModule(
        "Lfm2VlMultiModalProjector",
        ("vision_config.hidden_size", "text_config.hidden_size", "downsample_factor", "projector_use_layernorm",
         "projector_hidden_size", "projector_bias", "projector_hidden_act"),
        _blocks,
    ),
    "lfm3_vl": NativeModule(
        "Lfm3VlMultiModalProjector",
        ("vision_config.hidden_size", "vision_config.spatial_merge_size", "text_config.hidden_size", "projector_hidden_size",
         "projector_bias", "projector_hidden_act"),
        _merged,
    ),
    "aria": NativeModule(
        "AriaProjector",
        ("vision_config.hidden_size", "vision_config.num_attention_heads", "text_config.hidden_size",
         "projector_patch_to_query_dict", "max_value_projector_patch_to_query_dict"),
        _masked_patches,
    ),
    "mistral3": NativeModule("Mistral3MultiModalProjector", _MISTRAL3_MLP, _image_sizes),
    "mistral_large4": NativeModule("MistralLarge4MultiModalProjector", _MISTRAL3_MLP, _image_sizes),
    "lighton_ocr": NativeModule("LightOnOcrMultiModalProjector", _MISTRAL3, _image_sizes),
    "kimi_k25": NativeModule(
        "Kimi_K25MultimodalProjection",
        ("vision_config.hidden_size", "vision_config.merge_kernel_size", "projection_hidden_size",
         "projection_layer_norm_eps", "text_config.hidden_size"),
        _groups,
    ),
    "blip-2": NativeModule("Blip2QFormerModel", _QFORMER, _plain, "blip_2", _queried),
    "instructblip": NativeModule("InstructBlipQFormerModel", _QFORMER, _instructed, bridge=_queried),
    "glmasr": NativeModule("GlmAsrMultiModalProjector", _FRAMES, _sound_frames),
    "moss_transcribe_diarize": NativeModule(
        "MossTranscribeDiarizeMultiModalProjector",
        ("adaptor_input_dim", "text_config.hidden_size", "text_config.rms_norm_eps", "projector_bias",
         "projector_hidden_act"),
        _merged_frames,
    ),
    "paddleocr_vl": NativeModule(
        "PaddleOCRProjector", ("vision_config.hidden_size", "vision_config.spatial_merge_size", "text_config.hidden_size"),
        _blocks_of_grids,
    ),
    "cosmos3_edge": NativeModule(
        "Cosmos3EdgePatchMerger",
        ("vision_config.hidden_size", "vision_config.spatial_merge_size", "text_config.hidden_size", "projector_hidden_size"),
        _merged,
    ),
    "gemma3": NativeModule(
        "Gemma3MultiModalProjector",
        ("vision_config.hidden_size", "vision_config.layer_norm_eps", "vision_config.image_size", "vision_config.patch_size",
         "text_config.hidden_size", "mm_tokens_per_image"),
        _pooled,
    ),
    "gemma4": NativeModule(
        "Gemma4MultimodalEmbedder", ("vision_config.hidden_size", "vision_config.rms_norm_eps", "text_config.hidden_size"),
        bridge=_two_configs,
    ),
    "molmo2": NativeModule("Molmo2Adapter", ("adapter_config",), _pooled_by_index, bridge=_adapter),
    "ovis2": NativeModule(
        "Ovis2VisualEmbeddingTable", ("vision_config.vocab_size", "hidden_size"), _visual_words, bridge=_table
    ),
    "granite_speech": NativeModule("GraniteSpeechEncoderProjector", _GRANITE, _queries),
    "granite_speech_plus": NativeModule("GraniteSpeechPlusEncoderProjector", _GRANITE, _queries),
    "fun_asr_nano": NativeModule(
        "FunAsrNanoMultiModalProjector", ("audio_config.hidden_size", "adaptor_config"), _valid_frames
    ),
}  # fmt: skip
_BY_TYPE = Registry("native projector", "Its type is known to another version of cornstarch_hf.", NATIVE_MODULES)


def native_settings(model_type: str, config: Any) -> dict[str, Any]:
    """What a native projector reads of a native configuration, as JSON values."""
    found: dict[str, Any] = {}
    for path in _BY_TYPE[model_type].settings:
        *folders, key = path.split(".")
        place, value = found, config
        for folder in folders:
            place, value = place.setdefault(folder, {}), getattr(value, folder)
        value = getattr(value, key)
        place[key] = value.to_dict() if hasattr(value, "to_dict") else value
        # Which attention it runs decides about bits; any other one is chosen where the model is loaded.
        if getattr(value, "_attn_implementation", None) == "eager":
            found.setdefault("eager", []).append(key)
    return as_json(found, "settings")


def _as_object(value: Any, cls: Any = None) -> Any:
    """Stored settings with attributes instead of keys; of a native configuration's class, its own ones made again."""
    if not isinstance(value, Mapping):
        return value
    if value and all(key.isdigit() for key in value):  # JSON has texts as keys
        return {int(key): each for key, each in value.items()}
    if isinstance(value.get("model_type"), str):  # all of a configuration
        made = CONFIG_MAPPING[value["model_type"]] if cls in (None, AutoConfig) else cls
        return made(**{key: each for key, each in value.items() if key != "model_type"})
    inner = getattr(cls, "sub_configs", None) or {}
    made = SimpleNamespace(**{key: _as_object(each, inner.get(key)) for key, each in value.items()})
    for key in value.get("eager", ()):
        getattr(made, key)._attn_implementation = "eager"
    return made


class NativeProjection(nn.Module):
    """The projector of a native model.

    Args:
        native_type: of the native model, a key of `NATIVE_MODULES`.
        settings: what the module reads of the native configuration, see `native_settings`.

    Raises:
        ValueError: an unknown native type, settings that its module does not take.
    """

    whole = True  # it takes all items at once, with what is known of them

    def __init__(self, native_type: str, settings: Mapping[str, Any]):
        super().__init__()
        self.native_type, self.settings = native_type, dict(settings)
        self._of = _BY_TYPE[native_type]
        family = self._of.family or native_type
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        cls, values = getattr(modeling, self._of.class_name), _as_object(self.settings, CONFIG_MAPPING[native_type])
        try:
            self.module = cls(values) if self._of.bridge is None else self._of.bridge(values, cls)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"The native projector of {native_type!r} does not take its settings: {error}.") from error

    @property
    def mark_table(self) -> nn.Embedding | None:
        """The table of learnt tokens, of which projected features are mixtures, where the module is one (Ovis 2)."""
        return self.module if isinstance(self.module, nn.Embedding) else None

    @property
    def needs_grid(self) -> bool:
        """Whether it must be given the grid of an item's features."""
        return self._of.needs_grid

    def forward(
        self, features: Tensor, lengths: Lengths = None, grids: Grids = None, inputs: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, Lengths]:
        """Features ``(items, length, width)`` or packed ``(sum, width)`` to projected ones and how many each item has.

        `inputs` are the encoder's and the callbacks', which tell of masks and sizes.
        """
        return self._of.run(self.module, features, lengths, grids, inputs or {})


register_projector("native", NativeProjection)
