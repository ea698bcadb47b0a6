"""Adapters of PEFT-wrapped parts as a configuration holds them: described when a model is saved, put on again when it is built.

peft is imported when adapters are made: it takes a second to import, and who has not imported it has no adapters.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .adapters import is_wrapped, peft_classes, tuner_layers
from .stored_modules import NotStorable, as_json
from .stored_values import check_pattern
from .weightless import without_weights


def record_adapters(config: Any, encoders: Mapping[str, Any], language_model: nn.Module) -> None:
    """Write the adapters of PEFT-wrapped parts into the configuration."""
    parts = {"language_model": language_model} | {
        f"{n}_encoder.module": e.module for n, e in encoders.items() if "module" not in e.shares
    }
    config.adapters = {name: describe_adapters(part, name) for name, part in parts.items() if is_wrapped(part)} or None


def describe_adapters(model: Any, where: str) -> dict[str, Any] | None:
    """A wrapped part's adapters in JSON values, None if it is not wrapped; ValueError for what a checkpoint cannot hold."""
    if not is_wrapped(model):
        check_not_injected(model, where)
        return None
    if not isinstance(model.base_model, peft_classes("BaseTuner")):  # no adapters in its layers: a prompt before them
        raise ValueError(
            f"{where}: a checkpoint cannot hold {model.active_peft_config.peft_type} inside a part. Compose the plain "
            "model and wrap the composed one: get_peft_model(mllm, config)."
        )
    if any(getattr(config, "layer_replication", None) for config in model.peft_config.values()):
        raise ValueError(
            f"{where}: a checkpoint cannot hold layer_replication, which changes the layers of the part itself. Use an adapter "
            "configuration without it, or merge_and_unload() before composing."
        )
    try:
        options = {name: _plain(config.to_dict()) for name, config in model.peft_config.items()}
        configs = {name: as_json(value, f"{where}: the adapter {name!r}") for name, value in options.items()}
    except NotStorable as error:
        raise ValueError(f"{error}: give the adapter configuration JSON values.") from error
    described = {"configs": configs, "active": list(model.active_adapters), "class": type(model).__name__}
    return described | _layer_state(model, where)


def _layer_state(model: Any, where: str) -> dict[str, Any]:
    """Which adapters are merged into the weights at the moment, and whether they are disabled; ValueError if layers differ."""
    layers = tuner_layers(model)
    # Not every layer has every adapter; the longest list names all that are merged, if they are so alike everywhere.
    merged = max((list(layer.merged_adapters) for layer in layers), key=len, default=[])
    for layer in layers:
        if layer.merged_adapters != [name for name in merged if name in layer._get_available_adapters()]:
            others = f"have the adapters {merged} merged into their weights and others {layer.merged_adapters}"
            raise ValueError(f"{where}: some layers {others}: merge or unmerge all of them.")
    if merged and any(hasattr(layer, "trainable_tokens_original") for layer in layers):
        raise ValueError(
            f"{where}: the adapters {merged} are merged, and a checkpoint would not hold the rows of single tokens "
            "(trainable_token_indices) that they replaced: call unmerge_adapter() before saving, or merge_and_unload()."
        )
    off = [layer.disable_adapters for layer in layers]
    if any(off) and not all(off):
        raise ValueError(f"{where}: the adapters of {sum(off)} of {len(off)} layers are disabled: disable all or none.")
    return ({"merged": merged} if merged else {}) | ({"disabled": True} if any(off) else {})


def _plain(value: Any) -> Any:
    """Options of an adapter as JSON has them: sets sorted, enumerations by value, paths of this machine left out."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in ("base_model_name_or_path", "auto_mapping")}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else getattr(value, "value", value)


def check_not_injected(model: nn.Module, where: str) -> None:
    """Refuse to save a part with adapters but without a wrapper that knows of them (ValueError with the remedy)."""
    if not is_wrapped(model) and tuner_layers(model):
        raise ValueError(
            f"{where} has adapters injected without a wrapper, which cannot be restored from a checkpoint: wrap the "
            "part with get_peft_model(part, config) instead of add_adapter or inject_adapter_in_model."
        )


def check_no_views(model: nn.Module) -> None:
    """Refuse adapters of wrapped parts that are views of each other (of tied targets): loading would part them (ValueError)."""
    for where, part in [(name, module) for name, module in model.named_modules() if is_wrapped(module)]:
        first: dict[int, str] = {}
        for name, p in part.named_parameters():  # each tensor once; those without memory have no address
            if p.data_ptr() and first.setdefault(p.data_ptr(), name) != name:
                raise ValueError(
                    f"{where}: {first[p.data_ptr()]} and {name} are views of one tensor (ensure_weight_tying=True with tied "
                    "target_modules), which a checkpoint cannot hold. Use ensure_weight_tying=False, name one of the two "
                    "modules in modules_to_save instead, or merge_and_unload() the part before saving."
                )


def wrap_again(model: PreTrainedModel, described: dict[str, Any] | None, where: str) -> nn.Module:
    """Wrap a rebuilt part in the adapters that `describe_adapters` described; weights are loaded afterwards.

    ImportError without peft, ValueError for an adapter type that this peft does not know, or options that are refused.
    """
    if not described:
        return model
    if is_peft_available():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model
    else:
        raise ImportError(f"{where} was saved with PEFT adapters: pip install peft")
    if not isinstance(described, Mapping) or not isinstance(described.get("configs"), Mapping):
        raise ValueError(f"{where}: expected adapters as {{'configs': {{name: options}}}}, got {described!r:.200}.")
    stored = described["configs"].items()
    configs = {name: _adapter_config(values, where, PEFT_TYPE_TO_CONFIG_MAPPING) for name, values in stored}
    wrapped = _wrapped(get_peft_model, model, configs, where)
    active = described.get("active") or list(configs)[:1]
    if active != list(wrapped.active_adapters):
        wrapped.base_model.set_adapter(active)
        if len(active) == 1:  # the wrapper's own method takes one name alone
            wrapped.set_adapter(active[0])
    for layer in tuner_layers(wrapped) if described.get("merged") else ():  # the weights that follow are merged ones
        available = layer._get_available_adapters()
        layer.merged_adapters.extend(name for name in described["merged"] if name in available)
    if described.get("disabled"):
        wrapped.base_model.disable_adapter_layers()
    return wrapped


def _wrapped(get_peft_model: Callable, model: PreTrainedModel, configs: dict[str, Any], where: str) -> Any:
    """Wrap a part; if it has no weights yet, its adapters have none either, while the tables that they compute are real."""
    without = any(p.is_meta for p in model.parameters())
    first, *others = configs
    try:
        with without_weights() if without else contextlib.nullcontext():
            # In the part's dtype: which adapters are in another one is known by the names of their weights.
            wrapped = get_peft_model(model, configs[first], adapter_name=first, autocast_adapter_dtype=False)
            for name in others:
                wrapped.add_adapter(name, configs[name], autocast_adapter_dtype=False)
            return wrapped
    except RuntimeError as error:
        if not without:
            raise
        kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
        raise ValueError(
            f"{where}: PEFT cannot build adapters of type {kinds} before the weights are there, as loading does "
            f"({type(error).__name__}: {str(error)[:120]}). Use merge_and_unload() on the part before saving, or wrap the "
            "composed model: get_peft_model(mllm, config)."
        ) from error


# Options of an adapter that peft takes as regular expressions over the names of all modules.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


def _adapter_config(values: Any, where: str, config_classes: Mapping[Any, Any]) -> Any:
    """A configuration of peft, without options that import by name, name another base or search without end (ValueError)."""
    kind = values.get("peft_type") if isinstance(values, Mapping) else None
    if kind not in config_classes:
        raise ValueError(f"{where}: unknown adapter type {kind!r}, this peft knows {sorted(config_classes)}.")
    # From a checkpoint, so not trusted: peft would import `megatron_core`, and search by whatever pattern it is given.
    options = {k: v for k, v in values.items() if k not in ("peft_type", "peft_version")}
    core = options.get("megatron_core")
    if options.get("megatron_config") is not None or core not in (None, "megatron.core"):
        raise ValueError(f"{where}: the adapter asks for the module {core!r}, which is not imported.")
    if options.get("auto_mapping") is not None:
        raise ValueError(f"{where}: the adapter names a class by auto_mapping, expected none: its part has one.")
    for key in _PATTERNS:
        value = options.get(key)
        keys = (value or ()) if key.endswith("_pattern") else ()  # dictionaries have the patterns as keys
        for pattern in [value] if isinstance(value, str) else keys:
            check_pattern(pattern, f"{where}: {key}")
    for name, hint in get_type_hints(
        config_classes[kind]
    ).items():  # peft looks at what stands in those when it is called
        nested, value = any(map(is_dataclass, (hint, *get_args(hint)))), options.get(name)
        if nested and not isinstance(value, (bool, Mapping, type(None))):
            raise ValueError(f"{where}: {name} of the {kind} adapter is {value!r:.100}, expected an object or null.")
    try:
        return config_classes[kind](**options)
    except TypeError as error:
        raise ValueError(f"{where}: the {kind} adapter of this peft does not take its options ({error}).") from error
