"""The outer configuration of a native model: what no part of a composition holds, and all of it put together again."""

import copy
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..parts.stored_errors import make_config
from .entries import Native, setting
from .keys import tower_of
from .refusals import entry_of_type

# What the whole says of a part that it holds, which loading and composing set anew.
OUTER = frozenset(["dtype", "tie_word_embeddings"])


def _places(config: Any, part: Any, path: str = "") -> Iterator[str]:
    """Dotted paths in a configuration at which another one stands, as that object."""
    for key, value in vars(config).items():
        if value is part:
            yield f"{path}{key}"
        elif isinstance(value, PreTrainedConfig):
            yield from _places(value, part, f"{path}{key}.")


def held_configs(native: Any, entry: Native) -> dict[str, str]:
    """``{path in the native configuration: key of ours}`` of configurations that parts of a composition hold."""
    texts = {"text_config": native.get_submodule(entry.language_model).config}
    towers = {f"{n}_config": tower_of(native, p).config for n, p in entry.parts_for(native.config).items() if p.tower}
    found = {}
    for key, part in (texts | towers).items():
        place = next(_places(native.config, part), None)
        if place is not None and "." not in place:
            found[place] = key
    return found


def outer_values(native: Any, entry: Native, held: dict[str, str]) -> dict[str, Any]:
    """What ``config.native["config"]`` keeps: the native configuration as it is saved, without what parts hold, `held`."""
    rest = copy.copy(native.config)
    for place in held:  # parts take most of the time that telling what is not by default takes
        vars(rest).pop(place)
    values = rest.to_diff_dict()
    text = native.get_submodule(entry.language_model).config
    for place, key in held.items():
        # What loading and composing set anew: the dtype, and the tie, which the outer configuration told.
        part = getattr(native.config, place)
        values[place] = {"dtype": str(part.dtype).removeprefix("torch.") if part.dtype is not None else None}
        if key == "text_config":
            values[place] |= {key: getattr(text, key) for key in ("tie_word_embeddings",) if hasattr(text, key)}
    return values


def native_config(model: Any, model_type: str | None = None) -> tuple[Any, Native]:
    """The native configuration of a composition that was native, and its row of the table (ValueError for another type)."""
    known = model.config.native
    _check_known(known, model.config)
    if model_type not in (None, known["model_type"]):
        raise ValueError(f"This composition was a {known['model_type']!r}, and cannot become a {model_type!r}.")
    entry = entry_of_type(known["model_type"])
    values, parts = copy.deepcopy(known["config"]), {}
    for place, key in known["parts"].items():
        parts[place] = getattr(model.config, key)
        given = parts[place].to_dict()
        if key == "text_config" and "tie_word_embeddings" not in values[place]:
            given.pop("tie_word_embeddings", None)  # the native text configuration does not know it
        values[place] = given | values[place]
    config = make_config(CONFIG_MAPPING[known["model_type"]].from_dict, values, "config.native['config']")
    for place, part in parts.items():
        getattr(config, place)._attn_implementation = part._attn_implementation
    # Placeholders may have got other ids since.
    for name, part in entry.parts_for(config).items():
        *folders, last = part.token.split(".")
        token_id = model.config.modality(name)["token_id"]
        if token_id is not None:
            setattr(setting(config, ".".join(folders)) if folders else config, last, token_id)
    return config, entry


def _check_known(known: dict[str, Any], config: Any) -> None:
    """ValueError where what a composition's configuration keeps of the native one is not as `outer_values` made it."""
    if not isinstance(known.get("model_type"), str):
        raise ValueError(f"config.native has the model_type {known.get('model_type')!r:.100}, expected a name.")
    values, parts = known.get("config"), known.get("parts")
    whole = isinstance(values, dict) and isinstance(parts, dict)
    if not whole or not all(set(values.get(place) or {"": 0}) <= OUTER for place in parts):
        raise ValueError(
            "config.native must hold 'config', the native configuration, and 'parts', {place in it: key of this one}, got "
            f"{known!r:.300}."
        )
    if unknown := [key for key in parts.values() if not isinstance(key, str) or key not in config.sub_configs]:
        raise ValueError(f"config.native: parts names {unknown}, this composition has {list(config.sub_configs)}.")
