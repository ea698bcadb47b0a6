"""Which part of a model encodes, what kind of thing it encodes, and what its `forward` takes, of which size."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from ..configuration_multimodal import MEDIA_KINDS
from ..limits import is_count
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.classes import constructor_options
from ..parts.known_encoders import PATCH_GRIDS, encoder_type
from ..parts.signatures import forward_parameters
from ..parts.versions import CACHE_NAMES
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes

KIND_BY_INPUT = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio",
                 "input_values": "audio", "input_ids": "text", "past_values": "time"}  # fmt: skip
# The inputs of which one holds an item, in order of preference; `feature_layout.item_shapes` has shapes of each.
ITEM_INPUTS = ("pixel_values", "pixel_values_videos", "image", "flattened_patches", "input_values", "input_features",
               "audio_mel", "input_ids", "past_values", "hidden_states", "inputs")  # fmt: skip
# What a model's own training, decoding or outputs need; `additional_args` brings any of them back.
NOT_INPUTS = frozenset([
    "labels", "output_attentions", "output_hidden_states", "return_dict", "use_cache", *CACHE_NAMES, "cache_position",
    "encoder_hidden_states", "encoder_attention_mask", "bool_masked_pos", "mask_time_indices", "head_mask", "noise",
    "sampled_negative_indices", "decoder_input_ids", "decoder_attention_mask",
])  # fmt: skip


def resolve_tower(model: Any, kind: str | None = None) -> nn.Module:
    """The encoder inside a model, PEFT-wrapped or not: itself, or the tower (of that kind) of a composite or headed one.

    Raises:
        TypeError: no model, a class instead of an instance, or an abstract class.
        ValueError: several towers and no `kind`; a model that gives no features.
    """
    if isinstance(model, type):
        raise TypeError(f"Expected an encoder, got the class {model.__name__}: instantiate it, or use from_pretrained.")
    if is_wrapped(model):
        return model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Expected a transformers.PreTrainedModel as the encoder, got {type(model).__name__}.")
    if type(model).forward is nn.Module.forward:
        concrete = [c.__name__ for c in type(model).__subclasses__() if c.forward is not nn.Module.forward]
        raise TypeError(f"{type(model).__name__} is abstract and has no forward, use one of {sorted(concrete)}.")
    if reason := encoder_type(model.config, type(model).__name__).no_features:
        raise ValueError(f"{type(model).__name__} gives no features but {reason}.")
    tower = _inner_tower(model, kind)
    return model if tower is model else resolve_tower(tower, kind)


def _inner_tower(model: PreTrainedModel, kind: str | None) -> nn.Module:
    if model.config.is_encoder_decoder and isinstance(inner := model.get_encoder(), PreTrainedModel):
        return inner  # Whisper, T5: what the decoder makes is no feature
    # Asked for a modality, transformers' models give its tower; an image tower serves for videos, frame by frame.
    wanted = [k for k in ("image", "audio") if kind in (None, k) or (kind, k) == ("video", "image")]
    towers = [(k, model.get_encoder(k)) for k in wanted]
    # A model without such a tower answers with itself.
    towers = [(k, tower) for k, tower in towers if isinstance(tower, PreTrainedModel) and tower is not model]
    found = {k: tower for k, tower in towers if set(ITEM_INPUTS) & set(forward_parameters(tower))}
    if len({id(tower) for tower in found.values()}) > 1:  # one tower that answers for both is no choice
        raise ValueError(f"{type(model).__name__} has towers for {sorted(found)}: choose one by kind=.")
    if found:
        return next(iter(found.values()))
    base = model.base_model  # below a head; the model itself where there is none
    items = set(KIND_BY_INPUT) & set(forward_parameters(model))
    # A stack of layers below may want what this model makes of an item.
    takes_items = isinstance(base, PreTrainedModel) and (not items or items & set(forward_parameters(base)))
    return base if takes_items else model


def infer_kind(module: nn.Module) -> str:
    """What an encoder encodes: ``"image"``, ``"video"``, ``"audio"``, ``"text"``, ``"time"``, or its main input's name."""
    model = unwrapped(module)
    if known := encoder_type(model.config, type(model).__name__).kind:
        return known
    stated: Any = model.input_modalities
    stated = (stated,) if isinstance(stated, str) else tuple(stated)
    parameters = forward_parameters(module)
    names = [name for name in (model.main_input_name, *parameters) if name in parameters]
    taken = [KIND_BY_INPUT[name] for name in names if name in KIND_BY_INPUT]
    if "image" in taken and stated == ("image",) and getattr(model.config, "num_frames", None):
        return "video"  # TimeSformer calls its videos images
    kinds = [kind for kind in (*MEDIA_KINDS, "time") if kind in stated]
    if kinds:  # a tower may state all that the whole model takes
        return next((kind for kind in (*kinds, "text") if kind in stated and kind in taken), kinds[0])
    if any(name.endswith(PATCH_GRIDS) for name in names):
        return "image"  # patches of images, whatever the input that holds them is called
    return next(iter(taken), model.main_input_name)


def packs_frames(module: nn.Module) -> bool:
    """Whether an encoder takes packed patches with the frames, rows and columns of each item (Qwen2-VL)."""
    return any(name.endswith(("grid_thw", "grid_thws")) for name in forward_parameters(module))


def main_input(module: nn.Module) -> str:
    """The input of which an encoder's items consist: what its class states if it takes that, else the first that is no mask."""
    # The encoder inside an encoder-decoder states the whole model's (`past_values`, where Informer's takes `inputs_embeds`).
    parameters = list(forward_parameters(module))
    stated = unwrapped(module).main_input_name
    return stated if stated in parameters else next((n for n in parameters if not n.endswith("mask")), parameters[0])


def counted_lengths(module: nn.Module, lengths: Tensor, size: int, tokens: int) -> list[int] | None:
    """Feature counts that an audio encoder derives from its input's valid lengths, ``(items,)``.

    None where it has no method for that, or one that speaks of other features (of a later layer, after pooling) than the
    `tokens` that it gave for all `size` positions.
    """
    every = torch.cat([lengths, lengths.new_tensor([size])])  # (items + 1,), to compare the last one with `tokens`
    # The convolutional front ends of transformers' audio encoders tell their output length by one of these methods.
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        counted = helper(every) if (helper := getattr(unwrapped(module), name, None)) else ()
        for stage in counted[::-1] if isinstance(counted, tuple) else (counted,):  # before pooling, after it
            *found, whole = stage.tolist()  # of all positions: it must be what the encoder gave
            if whole == tokens:
                return found
    return None


# What a composed model's `forward` takes itself.
OWN_INPUTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "labels", "use_cache",
              "logits_to_keep", "mm_encoder_outputs")  # fmt: skip
# Names under which an encoder may take what its processor emits under another one, the likeliest first.
ALIASES = {
    "pixel_values": ("image", "inputs"),
    "image_position_ids": ("pixel_position_ids",),
    "image_merge_sizes": ("merge_sizes",),
    "input_features": ("audio_mel", "hidden_states"),
    "audio_input_features": ("input_features", "hidden_states"),
    "attention_mask": ("input_features_mask", "padding_mask", "audio_mel_mask"),
    "input_features_mask": ("attention_mask", "padding_mask", "audio_mel_mask"),
    "padding_mask": ("attention_mask", "input_features_mask"),
    "input_values_mask": ("attention_mask", "padding_mask"),
    "audio_attention_mask": ("attention_mask", "mask"),
}
# Masks that an encoder wants true on padding, where every processor emits 1 on what is valid.
TRUE_ON_PADDING = frozenset(["audio_mel_mask"])


def transformers_keywords() -> frozenset[str]:
    """The keyword arguments that transformers passes through any model."""
    return frozenset(TransformersKwargs.__optional_keys__) | frozenset(TransformersKwargs.__required_keys__)


def keyword_for(emitted: str, modality: str, input_names: Mapping[str, str]) -> str | None:
    """The keyword for a key that a modality's processor emits, None when its encoder takes no such input."""
    # Its own name first: the bare one may be another encoder's.
    own = [keyword for keyword in (f"{modality}_{emitted}", emitted) if keyword in input_names]
    keywords = {parameter: keyword for keyword, parameter in input_names.items()}
    return next(iter(own + [keywords[alias] for alias in ALIASES.get(emitted, ()) if alias in keywords]), None)


def named_inputs(emitted: Mapping[str, Any], modality: str, input_names: Mapping[str, str]) -> dict[str, Any]:
    """What a modality's processor emits, by keyword; without what its encoder does not take.

    Of several outputs that could be one input, the one under the encoder's own name is.  A mask of another name becomes an
    `attention_mask` only where it has the ``(items, positions)`` of something else, and is turned round for `TRUE_ON_PADDING`.
    """
    keywords = {key: keyword_for(key, modality, input_names) for key in emitted}
    own = {key for key, keyword in keywords.items() if keyword in (key, f"{modality}_{key}")}
    found: dict[str, Any] = {}
    for key in sorted(emitted, key=lambda key: key not in own):  # so that an alias never takes the place of an own name
        keyword = keywords[key]
        if keyword is None or keyword in found:
            continue
        parameter, value = input_names[keyword], emitted[key]
        if key in own:
            found[keyword] = value
        elif parameter in TRUE_ON_PADDING:
            found[keyword] = ~value.bool()
        elif parameter != "attention_mask" or any(
            x.shape[:2] == value.shape for k, x in emitted.items() if not k.endswith("mask")
        ):
            found[keyword] = value
    return found


# ---- sizes of items: the one that a configuration fixes, and what to say of another that the encoder does not take

SWITCH = "interpolate_pos_encoding"  # an argument of encoders whose tables of positions fit one size without it


def first_positive_setting(config: PreTrainedConfig, *attributes: str, default: int) -> int:
    """The first of some attributes that is a positive integer, or the largest entry of a list of such."""
    for attribute in attributes:
        value: Any = getattr(config, attribute, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
            value = max(value)
        if is_count(value):
            return value
    return default


def channels_of(config: PreTrainedConfig) -> int:
    """Channels of an image, by an encoder's configuration."""
    return first_positive_setting(config, "num_channels", "in_channels", "in_chans", default=3)


def configured_sides(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of an image by an encoder's configuration, None where it does not name both."""
    size: Any = getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    size = (size, size) if isinstance(size, int) else size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 and all(size) else None


def typical_item(config: PreTrainedConfig, kind: str) -> dict[str, Tensor] | None:
    """Inputs of an ordinary item, where the encoder's configuration fixes their shape; on the meta device."""
    if kind == "image" and (sides := configured_sides(config)):
        return {"pixel_values": torch.empty(1, channels_of(config), *sides, device="meta")}
    if (positions := getattr(config, "max_source_positions", None)) and getattr(config, "num_mel_bins", None):
        return {"input_features": torch.empty(1, config.num_mel_bins, 2 * positions, device="meta")}
    return None


def _fixed_shapes(config: PreTrainedConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes that a configuration may fix: those of `typical_item`, of videos and of spectra that are windows."""
    if (item := typical_item(config, kind)) is not None:
        return {key: tuple(value.shape) for key, value in item.items()}
    frames: Any
    length: Any
    frames, length = getattr(config, "num_frames", None), getattr(config, "max_length", None)
    if kind == "video" and (sides := configured_sides(config)) and is_count(frames):
        return {"pixel_values": (1, frames, channels_of(config), *sides)}
    bins: Any = getattr(config, "num_mel_bins", None)
    return {"input_values": (1, length, bins)} if is_count(length) and is_count(bins) else {}


def has_other_size(inputs: Mapping[str, Any], config: PreTrainedConfig, kind: str) -> bool:
    """Whether items have another size than the encoder's configuration fixes; False where it fixes none."""
    shapes = _fixed_shapes(config, kind)
    return any(isinstance(x := inputs.get(k), Tensor) and x.shape[1:] != size[1:] for k, size in shapes.items())


def refused_size(module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str) -> str | None:
    """What to say of items whose size an encoder, without weights, does not take; None where it takes them, or all fails.

    Found by running it on shapes: of these items, and of an ordinary one.  `inputs` are by the names of its `forward`.
    """
    config: Any = unwrapped(module).config
    if not has_other_size(inputs, config, kind):
        return None
    ((key, ordinary),) = _fixed_shapes(config, kind).items()
    settings = {SWITCH: inputs[SWITCH]} if inputs.get(SWITCH) is not None else {}
    shape = tuple(inputs[key].shape)

    def failure(size: tuple[int, ...]) -> Exception | None:
        try:
            dry_run(module, {key: torch.empty(size, device="meta"), **settings})
        except Exception as error:
            return error
        return None

    failed = failure(shape)
    if failed is None:
        return None
    # As many channels may be all that is wrong.
    nearest = (*ordinary[:2], *shape[2:]) if len(shape) == len(ordinary) else ordinary
    taken = next((size for size in (nearest, ordinary) if failure(size) is None), None)
    if taken is None:
        return None
    expected, got = (" x ".join(map(str, size[1:])) for size in (taken, shape))
    if len(shape) != len(ordinary):
        expected, got = f"shape (items, {', '.join(map(str, ordinary[1:]))})", f"shape {shape}"
    remedy = "let its processor make it, by the settings it came with (do_resize, do_center_crop, size, crop_size)"
    if kind == "audio":
        remedy = (
            "let its processor make such windows, as it does by default (padding, truncation), and split longer sounds"
        )
    elif shape[1:2] != taken[1:2]:
        remedy = "let its processor make it"
    elif SWITCH in forward_parameters(module):
        remedy += f"; or pass {SWITCH}=True to the model, and in {name}_kwargs= to the processor"
    cause = f"{type(failed).__name__}: {failed!s:.200}"
    return f"{type(unwrapped(module)).__name__} takes {key} of {expected}, got {got} ({cause}): {remedy}."


def refused_by(module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str) -> str | None:
    """As `refused_size`, of an encoder with weights, of which one without is built."""
    inner: Any = unwrapped(module)
    if not has_other_size(inputs, inner.config, kind):
        return None
    config = without_dtypes(with_plain_kernels(copy.deepcopy(inner.config)))
    try:
        made = build_without_weights(functools.partial(type(inner), config, **constructor_options(inner)))
    except Exception:  # a class of somebody's own that needs more than its configuration: its own error stands
        return None
    return refused_size(weights_to_meta(made.eval()), inputs, kind, name)
