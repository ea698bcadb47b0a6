"""Which part of a model encodes, what kind of thing it encodes, and what its `forward` takes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from ..configuration_multimodal import MEDIA_KINDS
from ..language_model.refusals import check_no_language_model
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.known_encoders import PATCH_GRIDS, encoder_type
from ..parts.signatures import forward_parameters
from ..parts.versions import CACHE_NAMES

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
        ValueError: several towers and no `kind`; a model that gives no features; a whole multimodal language model.
    """
    if isinstance(model, type):
        raise TypeError(f"Expected an encoder, got the class {model.__name__}: instantiate it, or use from_pretrained.")
    check_no_language_model(unwrapped(model))
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


def check_types(additional_args: Any, trim: Any) -> None:
    """TypeError for arguments of a `ModalEncoderModule` that are of another kind."""
    if isinstance(additional_args, str) or not all(isinstance(name, str) for name in additional_args or ()):
        raise TypeError(f"additional_args must be a list of names of arguments, got {additional_args!r:.100}.")
    if not isinstance(trim, bool):
        raise TypeError(f"trim must be True or False, got {trim!r:.100}.")


def one_of(**values: Any) -> Any:
    given = [value for value in values.values() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{'= and '.join(values)}= are two names of one argument, give one of them.")
    return given[0] if given else None
