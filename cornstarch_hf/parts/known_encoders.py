"""What is known of encoders that neither their classes nor their configurations tell: one row per type, in one table.

Users add rows by `register_encoder_type`.  `encoder_type` finds the row of an encoder; no other file has a table of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .registries import OR_TRUST, Registry
from .stored_values import check_names

Count = Callable[[Mapping[str, Any], PreTrainedConfig], int | None]
LAST, ALL = "last", "all"  # of an encoder's hidden states


@dataclass(frozen=True)
class EncoderType:
    """What is known of the encoders of one type, as `register_encoder_type` explains; by default nothing."""

    # How many features an item gives
    count: Count | None = None
    count_layers: str = LAST
    width_layers: str | None = None
    padding_changes_features: bool = False
    # What chance does to an item
    random_input: str | None = None
    fixed_input: Callable[[Mapping[str, Any], PreTrainedConfig], Tensor] | None = None
    random_loss: Callable[[PreTrainedConfig], str | None] | None = None
    # What goes in
    kind: str | None = None
    any_number_of_frames: bool = False
    casts_inputs: bool = False
    positions_after_padding: bool = False
    example_text: str | None = None
    # What comes out instead of features
    no_features: str | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                fits, expected = value in _CHOICES[field.name], f"one of {_CHOICES[field.name]}"
            elif isinstance(field.default, bool):
                fits, expected = isinstance(value, bool), "True or False"
            elif field.name in ("count", "fixed_input", "random_loss"):
                fits, expected = value is None or callable(value), "a function"
            else:
                fits, expected = value is None or (isinstance(value, str) and value != ""), "a text"
            if not fits:
                raise TypeError(f"{field.name} of an encoder type must be {expected}, got {value!r:.100}.")
        if (self.random_input is None) != (self.fixed_input is None):
            raise ValueError("random_input of an encoder type is what fixed_input computes: give both or neither.")

    @property
    def facts(self) -> list[str]:
        """Names of the fields that say something else than the default."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    @property
    def functions(self) -> list[Callable]:
        """The functions among the facts."""
        return [value for value in vars(self).values() if callable(value)]


_CHOICES = {"count_layers": (LAST, ALL), "width_layers": (None, LAST, ALL)}
_UNKNOWN = EncoderType()


def encoder_type(config: Any, class_name: str | None = None) -> EncoderType:
    """The row of an encoder: of its class, else of its configuration's `model_type`; one of defaults where there is none."""
    return ENCODER_TYPES.get(class_name) or ENCODER_TYPES.get(getattr(config, "model_type", None)) or _UNKNOWN


def register_encoder_type(model_type: str, **facts: Any) -> None:
    """State what this package cannot find out about the encoders of a type, e.g. of a class of your own.

    A checkpoint names the facts, and loading it needs the same registration: import the module that makes it first, or save
    with ``include_code=True`` and load with ``trust_remote_code=True``.

        register_encoder_type("my_encoder", count=lambda inputs, config: inputs["pixel_values"].shape[-1] // config.patch_size)

    Args:
        model_type: of the encoder's configuration.
        **facts: one or more of

            - count: ``fn(inputs, config) -> int | None``, features of one item (axis 0 of the encoder's `inputs`) before
              `drop_prefix`, callbacks and projector.  Where it gives None a dry run counts; `register_feature_count` wins.
            - count_layers: ``"all"`` where each hidden state has as many; by default ``"last"``.
            - width_layers: which hidden states, ``"all"`` or ``"last"``, are sequences ``(items, tokens, width)`` of the width
              that the configuration names; where it is not given, a dry run finds axes and width.
            - padding_changes_features: True where it does in spite of a mask: items of each length are encoded apart then.
            - random_input: name of an input that the encoder draws unless it is given, in evaluation too.
            - fixed_input: ``fn(inputs, config) -> Tensor``, the value for `random_input` that keeps items as they are.
            - random_loss: ``fn(config) -> str | None``, what items lose by chance, in evaluation too, and what to do about it.
              Such an encoder is refused, unless `random_input` is in its `additional_args`.
            - kind: ``"image"``, ``"video"``, ``"audio"``, ``"text"``, ..., where the class states another one.
            - any_number_of_frames: True where `num_frames` of the configuration limits no video.
            - casts_inputs: True where it casts floats by itself, after it has computed with them as they came.
            - positions_after_padding: True where positions begin after the padding token's id, as in RoBERTa.
            - example_text: of the kind that it reads, for the usage snippet of a model card.
            - no_features: what it gives instead of features, and what to take; such an encoder is refused.

    Raises:
        TypeError: an unknown fact, or one of another kind.
        ValueError: no facts, `random_input` without `fixed_input`, or other facts are known of that type already.
    """
    names = [field.name for field in fields(EncoderType)]
    call = f"register_encoder_type({model_type!r}, ...)"
    if unknown := sorted(set(facts) - set(names)):
        raise TypeError(f"{call} does not take {unknown}, expected some of {names}.")
    try:
        row = EncoderType(**facts)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}: {error}") from error
    if not row.facts:
        raise ValueError(f"{call} states nothing, expected some of {names}.")
    try:
        ENCODER_TYPES.add(model_type, row)
    except ValueError as error:
        hint = "It is the model_type of the configuration's class; another count is stated by register_feature_count."
        raise ValueError(f"{error} {hint}") from error


def registered_facts(configs: Sequence[PreTrainedConfig]) -> dict[str, list[str]] | None:
    """Facts from users' rows, as a checkpoint names them: ``{model_type: [names of facts]}``; None if there are none."""
    types = {config.model_type for config in configs} - OWN_TYPES
    return {name: ENCODER_TYPES[name].facts for name in sorted(types) if name in ENCODER_TYPES} or None


def check_facts_registered(stored: Mapping[str, Any] | None) -> None:
    """Refuse `registered_facts` of a configuration that are not known here (ValueError with the missing call)."""
    for name, facts in (stored or {}).items():
        check_names(facts, f"encoder_types[{name!r}]")
        known = ENCODER_TYPES.get(name, _UNKNOWN).facts
        if missing := [fact for fact in facts if fact not in known]:
            raise ValueError(
                f"The model relies on {missing} of its encoder type {name!r}, which nothing here states: import the module "
                f"that calls register_encoder_type({name!r}, {', '.join(f'{fact}=...' for fact in facts)}) {OR_TRUST}"
            )


# ---- chance


def deterministic_inputs(inputs: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Tensor]:
    """What to add to an encoder's inputs so that items give the same features each time."""
    row = encoder_type(config)
    if row.random_input is None or row.fixed_input is None or inputs.get(row.random_input) is not None:
        return {}
    return {row.random_input: row.fixed_input(inputs, config)}


def refuse_random_encoder(config: PreTrainedConfig, additional_args: Sequence[str], who: str) -> None:
    """Refuse an encoder of the class `who` that leaves out parts of items at random, unless `additional_args` give its draw."""
    row = encoder_type(config, who)
    reason = row.random_loss(config) if row.random_loss and row.random_input not in additional_args else None
    if reason:
        raise ValueError(f"{who} {reason}.")


def _patches_in_order(inputs: Mapping[str, Any], config: PreTrainedConfig) -> Tensor:
    """ViT-MAE keeps the patches of the least noise, in the order of their noise (He et al. 2021, arXiv 2111.06377)."""
    pixels = inputs["pixel_values"]  # (items, channels, height, width)
    height, width = (size // config.patch_size for size in pixels.shape[-2:])
    noise = torch.arange(height * width, dtype=torch.float32, device=pixels.device)
    return noise.expand(len(pixels), -1)  # (items, patches)


def _masked_patches(config: PreTrainedConfig) -> str | None:
    remedy = "set its config.mask_ratio = 0, or pass `noise` with the images and name it in additional_args"
    return _drawn(f"leaves out {config.mask_ratio:.0%} of an image's patches,", remedy) if config.mask_ratio else None


def _dropped_values(config: PreTrainedConfig) -> str | None:
    share, remedy = config.speech_decoder_prenet_dropout, "set its config.speech_decoder_prenet_dropout = 0"
    return _drawn(f"drops {share:.0%} of the values in its prenet,", remedy) if share else None


def _drawn_keys(config: PreTrainedConfig) -> str | None:
    remedy = "set attention_type='full' in its configuration before it is built"
    return _drawn("attends to keys that are", remedy) if config.attention_type == "prob" else None


def _drawn(what: str, remedy: str) -> str:
    return f"{what} drawn at random, in evaluation as well: {remedy}"


# ---- counts: features of one item; each is tested against the encoder, and its docstring stands in the documents


def _patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`(height // patch_size) * (width // patch_size)`"""
    height, width = inputs["pixel_values"].shape[-2:]
    patch: Any = patch_size(config)
    return (height // patch[0]) * (width // patch[1])


def _patches_and_class(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`(height // patch_size) * (width // patch_size) + 1`"""
    return _patches(inputs, config) + 1


def _merged_patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`t * h * w / spatial_merge_size ** 2` of the grid"""
    return int(inputs["grid_thw"].prod()) // config.spatial_merge_size**2


def _pooled_patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """patches that `pixel_position_ids` do not call padding, `/ pooling_kernel_size ** 2`"""
    return int((inputs["pixel_position_ids"] != -1).all(-1).sum()) // config.pooling_kernel_size**2


def _window(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`max_source_positions`; of a mask's valid frames `(frames - 1) // 2 + 1`"""
    mask = inputs.get("attention_mask")
    frames = inputs["input_features"].shape[-1]
    is_of_frames = mask is not None and mask.shape[-1] == frames  # a mask of samples tells the encoder nothing
    return (int(mask.sum()) - 1) // 2 + 1 if is_of_frames else config.max_source_positions


def _windows(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`(frames - 1) // 2 + 1`, three times, of the valid frames of each window of `2 * n_window`"""
    frames = inputs["input_features_mask"].unflatten(-1, (-1, 2 * config.n_window)).sum(-1)
    for _ in range(3):
        frames = (frames - 1) // 2 + 1  # none stays none
    return int(frames.sum())


def _waveform(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int | None:
    """`(samples - kernel) // stride + 1`, once per convolution; with an adapter by a dry run"""
    length = inputs["input_values"].shape[-1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        length = max(length - kernel + stride, 0) // stride
    return None if config.add_adapter else length


def _rows(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """rows of `features`, those of its mask"""
    mask = inputs.get("attention_mask")
    return inputs["features"].shape[1] if mask is None else int(mask.sum())


def _tokens(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """tokens of the text"""
    return inputs["input_ids"].shape[-1]


def _series(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`values // patch_length`, without patches of padding"""
    patches = inputs["past_values"].shape[-1] // config.patch_length
    lengths = unpadded_patches(inputs, patches)
    return patches if lengths is None else lengths[0]


# ---- reading inputs and configurations

PATCH_GRIDS = ("grid_thw", "grid_hws")  # numbers of patches of packed items along their axes, ``(items, 2 or 3)``
GRIDS = (*PATCH_GRIDS, "target_sizes")  # the same and that of MiniCPM-V, whose items may have a slice each


def grid_of(inputs: Mapping[str, Any], names: tuple[str, ...] = GRIDS) -> Tensor | None:
    """The grid of packed items, ``(items, 2 or 3)``, None where there is none."""
    return next((v for k, v in inputs.items() if k.endswith(names) and isinstance(v, Tensor)), None)


def unpadded_patches(inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
    """Tokens of each time series of `tokens` equal patches, None without padding."""
    padding = inputs.get("past_values_padding")  # (items, length), 1 where a value is padding
    if not isinstance(padding, Tensor) or padding.ndim != 2 or padding.shape[1] % tokens:
        return None
    patches = (padding == 0).unflatten(1, (tokens, -1)).any(-1)  # (items, tokens)
    return None if bool(patches.all()) else patches.sum(-1).tolist()


def patch_size(config: Any) -> tuple[int, int] | None:
    """Height and width of a patch by an encoder's configuration, None if it does not name them."""
    size = getattr(config, "patch_size", None)
    if isinstance(size, (list, tuple)):  # of one number, of two, or with that of frames before them
        return int(size[-2:][0]), int(size[-1])
    return (size, size) if isinstance(size, int) else None


def merged_patches(config: Any) -> tuple[int, int]:
    """Rows and columns of patches that a packed tower merges into one feature, by its configuration."""
    # Qwen2-VL has one number for both sides, Kimi-VL's `merge_kernel_size` one for each.
    size = getattr(config, "spatial_merge_size", None) or getattr(config, "merge_kernel_size", None) or 1
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def is_staged(config: Any) -> bool:
    """Whether a tower merges patches from stage to stage: then its configuration has lists with one entry per stage."""
    stages = ("depths", "depth", "hidden_sizes", "embed_dims")
    return any(isinstance(getattr(config, name, None), (list, tuple)) for name in stages)


# ---- the table

_VIT = EncoderType(count=_patches_and_class, count_layers=ALL, width_layers=ALL)
_ROBERTA = EncoderType(count=_tokens, count_layers=ALL, positions_after_padding=True)
_AFTER_PADDING = EncoderType(positions_after_padding=True)
_PADDING_MATTERS = EncoderType(padding_changes_features=True)
_SOUNDS = "take an encoder of audio features"
_CODES = EncoderType(no_features=f"codes and sounds made of them: {_SOUNDS}")

# By model type, or by class where one type has several kinds of encoders.
ENCODER_TYPES = Registry(
    "encoder type",
    "Add one with register_encoder_type(model_type, ...).",
    {
        # images
        **dict.fromkeys(("clip_vision_model", "dinov2", "vit"), _VIT),
        "gemma4_vision": EncoderType(count=_pooled_patches, casts_inputs=True),  # scales pixels before it casts them
        "siglip_vision_model": EncoderType(count=_patches, count_layers=ALL, width_layers=ALL),
        "vit_mae": EncoderType(random_input="noise", fixed_input=_patches_in_order, random_loss=_masked_patches),
        # Layers before the last one have patches that are not merged, of another width.
        "qwen2_vl_vision": EncoderType(count=_merged_patches, width_layers=LAST),
        "Apertus1p5VisionTokenizerModel": EncoderType(no_features="codes of images: take an encoder of image features"),
        # videos
        "instructblipvideo_vision_model": EncoderType(kind="image"),  # states videos, takes each frame as an image
        "timesformer": EncoderType(any_number_of_frames=True),
        "xclip_vision_model": EncoderType(kind="image"),  # states a number of frames, takes them as images in a row
        # sounds
        "wav2vec2": EncoderType(count=_waveform, count_layers=ALL, width_layers=ALL),
        "qwen3_asr_encoder": EncoderType(count=_windows),
        "whisper": EncoderType(count=_window, count_layers=ALL, width_layers=ALL),
        **dict.fromkeys(("pe_audio_encoder", "phi4_multimodal_audio", "seamless_m4t"), _PADDING_MATTERS),
        **dict.fromkeys(("seamless_m4t_v2", "speech_to_text"), _PADDING_MATTERS),
        "SpeechT5DecoderWithSpeechPrenet": EncoderType(random_loss=_dropped_values),
        **dict.fromkeys(("EncodecModel", "Xcodec2Model", "XcodecModel"), _CODES),
        "MimiModel": EncoderType(no_features="codes and sounds made of them: take MimiEncoderModel"),
        "NeuCodecModel": EncoderType(no_features=f"sounds: {_SOUNDS}"),
        "UnivNetModel": EncoderType(no_features=f"sounds made of spectra: {_SOUNDS}"),
        "WavTokenizerEncoderModel": EncoderType(no_features=f"codes of sounds: {_SOUNDS}"),
        "WavTokenizerModel": EncoderType(no_features=f"codes of sounds and sounds made of them: {_SOUNDS}"),
        # texts
        "bert": EncoderType(count=_tokens, count_layers=ALL, width_layers=ALL),
        **dict.fromkeys(("deberta-v2", "distilbert", "modernbert"), EncoderType(count=_tokens, count_layers=ALL)),
        "esm": replace(_ROBERTA, width_layers=ALL, example_text="MKTAYIAKQR"),
        **dict.fromkeys(("mpnet", "xlm-roberta"), _ROBERTA),
        **dict.fromkeys(("altclip_text_model", "bridgetower_text_model", "camembert", "ibert"), _AFTER_PADDING),
        **dict.fromkeys(("clap_text_model", "data2vec-text", "layoutlmv3", "lilt", "longformer"), _AFTER_PADDING),
        **dict.fromkeys(("luke", "markuplm", "roberta", "roberta-prelayernorm"), _AFTER_PADDING),
        **dict.fromkeys(("xlm-roberta-xl", "xmod"), _AFTER_PADDING),
        # series, and features from elsewhere
        "informer": EncoderType(random_loss=_drawn_keys),
        **dict.fromkeys(("timesfm", "timesfm2_5"), EncoderType(count=_series)),
        "precomputed_features": EncoderType(count=_rows, width_layers=ALL),
    },
)
OWN_TYPES = frozenset(ENCODER_TYPES)  # those of this package, not of a user
