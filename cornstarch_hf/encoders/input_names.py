"""By which keyword each encoder input travels from the processor to the model.  Pure functions, used by both."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils.generic import TransformersKwargs

from ..parts.versions import CACHE_NAMES

OWN_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache",
    "inputs_embeds",
    "labels",
    "use_cache",
    "logits_to_keep",
    "mm_encoder_outputs",
)
# Names that `generate`, Trainer or transformers' decoders give a meaning of their own.
TEXT_NAMES = frozenset([*OWN_INPUTS, *CACHE_NAMES]) | frozenset(
    [
        "token_type_ids",
        "mm_token_type_ids",
        "cache_position",
        "shift_labels",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "encoder_outputs",
        "inputs",
        "return_loss",
    ]
)
# Towers of packed models name their inputs differently from what their processors emit.
PROCESSOR_NAMES = {
    "image": {"hidden_states": "pixel_values", "grid_thw": "image_grid_thw"},
    "video": {"hidden_states": "pixel_values_videos", "grid_thw": "video_grid_thw"},
}

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


def assign_input_names(
    parameters: Mapping[str, Iterable[str]], kinds: Mapping[str, str], language_model: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Give each encoder input its keyword.

    An input keeps the name that its processor emits while that is unique; where two encoders, or an encoder and the
    language model, want one name, every encoder's gets ``"{modality}_"`` in front.

    Args:
        parameters: the inputs of each modality's encoder, by the names of its `forward`.
        kinds: the modalities' kinds.
        language_model: names that the language model's `forward` takes.

    Returns:
        for each modality ``{keyword: parameter of the encoder}``.

    Raises:
        ValueError: a name is still taken with the prefix in front.

    >>> assign_input_names({"vision": ["pixel_values"], "audio": ["input_features", "attention_mask"]},
    ...                    {"vision": "image", "audio": "audio"}, ["input_ids", "attention_mask"])["audio"]
    {'input_features': 'input_features', 'audio_attention_mask': 'attention_mask'}
    """
    emitted = {
        name: {p: PROCESSOR_NAMES.get(kinds[name], {}).get(p, p) for p in names} for name, names in parameters.items()
    }
    text = TEXT_NAMES | transformers_keywords() | set(language_model)
    wanted = [key for names in emitted.values() for key in names.values()]
    assigned: dict[str, dict[str, str]] = {}
    taken = dict.fromkeys(text, "the language model")
    for name, names in emitted.items():
        assigned[name] = {}
        for parameter, key in names.items():
            keyword = f"{name}_{key}" if key in text or wanted.count(key) > 1 else key
            if keyword in taken:
                raise ValueError(f"{name}: its input {key!r} would be named {keyword!r}, which {taken[keyword]} uses.")
            taken[keyword] = f"the encoder {name!r}"
            assigned[name][keyword] = parameter
    return assigned


def keyword_for(emitted: str, modality: str, input_names: Mapping[str, str]) -> str | None:
    """The keyword for a key that a modality's processor emits, None when its encoder takes no such input."""
    for keyword in (f"{modality}_{emitted}", emitted):
        if keyword in input_names:
            return keyword
    keywords = {parameter: keyword for keyword, parameter in input_names.items()}
    return next((keywords[alias] for alias in ALIASES.get(emitted, ()) if alias in keywords), None)


def named_inputs(emitted: Mapping[str, Any], modality: str, input_names: Mapping[str, str]) -> dict[str, Any]:
    """What a modality's processor emits, by keyword; without what its encoder does not take.

    Where several outputs could be one input, the one under the encoder's own name is.  A mask of another name becomes an
    `attention_mask` only where it has one entry for each of ``(items, positions)`` of something else that is emitted, and is
    turned round where the encoder wants it true on padding.
    """
    keywords = {key: keyword_for(key, modality, input_names) for key in emitted}
    own = {key for key, keyword in keywords.items() if keyword in (key, f"{modality}_{key}")}
    found: dict[str, Any] = {}
    for key in sorted(emitted, key=lambda key: key not in own):
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
