"""PEFT-wrapped parts: see through the wrapper, describe its adapters, wrap a rebuilt part again.

peft is imported when adapters are made: it takes a second to import, and who has not imported it has no adapters.
"""

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .stored_modules import NotStorable, as_json
from .stored_values import check_pattern
from .versions import check_peft
from .weightless import without_weights


def _peft_classes(*names: str) -> tuple[type, ...]:
    """Those of some classes of peft that are there; none, of which nothing is an instance, while peft is not imported.

    Looked up and not imported: another thread may be importing peft at the moment, and importing a part of it then would
    break both.
    """
    files = ("peft.peft_model", "peft.tuners.tuners_utils", "peft.utils.other")
    modules = [sys.modules.get(file) for file in files]
    return tuple(getattr(module, name) for name in names for module in modules if hasattr(module, name))


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model is a `peft.PeftModel`."""
    return isinstance(model, _peft_classes("PeftModel"))  # () where there is no such class yet, nor such a model


def unwrapped(model: Any) -> PreTrainedModel:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_wrapped(model) else model


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether a layer computes with adapters, so that its `weight` is not all of it."""
    return isinstance(layer, _peft_classes("BaseTunerLayer"))


def describe_adapters(model: Any, where: str) -> dict[str, Any] | None:
    """Describe a wrapped part's adapters in JSON values; None for a part that is not wrapped.

    Raises:
        ValueError: the adapters cannot be stored (prompt learning inside a part, values that are not JSON, adapters
            injected without a wrapper).
    """
    if not is_wrapped(model):
        check_not_injected(model, where)
        return None
    if not isinstance(model.base_model, _peft_classes("BaseTuner")):  # no adapters in its layers: a prompt before them
        raise ValueError(
            f"{where}: a checkpoint cannot hold {model.active_peft_config.peft_type} inside a part. Compose the plain "
            "model and wrap the composed one: get_peft_model(mllm, config)."
        )
    if any(getattr(config, "layer_replication", None) for config in model.peft_config.values()):
        raise ValueError(
            f"{where}: a checkpoint cannot hold layer_replication, which changes the layers of the part itself. Use an adapter "
            "configuration without it, or merge_and_unload() before composing."
        )
    plain = {name: _plain(config.to_dict()) for name, config in model.peft_config.items()}
    try:
        configs = {name: as_json(values, f"{where}: the adapter {name!r}") for name, values in plain.items()}
    except NotStorable as error:
        raise ValueError(f"{error}: give the adapter configuration JSON values.") from error
    described = {"configs": configs, "active": list(model.active_adapters), "class": type(model).__name__}
    return described | _layer_state(model, where)


def _layer_state(model: Any, where: str) -> dict[str, Any]:
    """Tell which adapters are merged into the weights at the moment, and whether they are switched off; {} for neither.

    Raises:
        ValueError: layers that differ in it, which a checkpoint cannot say.
    """
    layers = tuner_layers(model)
    # Not every layer has every adapter; the longest list names all that are merged, if they are so alike everywhere.
    merged = max((list(layer.merged_adapters) for layer in layers), key=len, default=[])
    for layer in layers:
        if layer.merged_adapters != _held(layer, merged):
            raise ValueError(
                f"{where}: some layers have the adapters {merged} merged into their weights and others "
                f"{layer.merged_adapters}: merge or unmerge all of them."
            )
    if merged and any(hasattr(layer, "trainable_tokens_original") for layer in layers):
        raise ValueError(
            f"{where}: the adapters {merged} are merged, and a checkpoint would not hold the rows of single tokens "
            "(trainable_token_indices) that they replaced: call unmerge_adapter() before saving, or merge_and_unload()."
        )
    off = [layer.disable_adapters for layer in layers]  # PEFT's own switch is one for all
    if any(off) and not all(off):
        raise ValueError(f"{where}: the adapters of {sum(off)} of {len(off)} layers are disabled: disable all or none.")
    return ({"merged": merged} if merged else {}) | ({"disabled": True} if any(off) else {})


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that hold adapters."""
    kinds = _peft_classes("BaseTunerLayer")
    return [module for module in model.modules() if isinstance(module, kinds)]


def adapter_layers() -> tuple[type, ...]:
    """Classes of layers that hold adapters beside what they wrap; none while peft is not imported."""
    return _peft_classes("BaseTunerLayer", "AuxiliaryTrainingWrapper")


def adapter_containers() -> tuple[type, ...]:
    """Classes of what PEFT wraps whole models in."""
    return _peft_classes("BaseTuner", "PeftModel")


def base_children(layer: nn.Module) -> list[nn.Module]:
    """Those children of an adapter layer that are, or hold, the module that it wraps."""
    wrapped = _wrapped_module(layer)
    return [child for child in layer.children() if any(module is wrapped for module in child.modules())]


def _held(layer: Any, names: list[str]) -> list[str]:
    """Those of the adapters that a layer has."""
    return [name for name in names if name in layer._get_available_adapters()]


def _plain(value: Any) -> Any:
    """Options of an adapter as JSON has them: sets sorted, enumerations by value, paths of this machine left out."""
    if isinstance(value, dict):
        left_out = ("base_model_name_or_path", "auto_mapping")
        return {key: _plain(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)


def check_not_injected(model: nn.Module, where: str) -> None:
    """Refuse to save a part with adapters but without a wrapper that knows of them (ValueError with the remedy)."""
    if not is_wrapped(model) and tuner_layers(model):
        raise ValueError(
            f"{where} has adapters injected without a wrapper, which cannot be restored from a checkpoint: wrap the "
            "part with get_peft_model(part, config) instead of add_adapter or inject_adapter_in_model."
        )


def check_no_wrapped_part(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Refuse adapters around a model whose parts have their own: PEFT would then leave the rest trainable.

    Raises:
        ValueError: names the wrapped parts and both remedies.
    """

    if wrapped := sorted(name for name, part in parts.items() if is_wrapped(part)):
        raise ValueError(
            f"{wrapped} of this {type(model).__name__} are wrapped by PEFT already, and adapters around the whole would leave "
            "the rest trainable without saving it. Build the model again, and either add an adapter to a part, "
            "model.language_model.add_adapter(name, config), or merge the parts first, "
            "model.language_model = model.language_model.merge_and_unload()."
        )


def check_all_kept(model: nn.Module) -> None:
    """Refuse to train, under adapters around the whole model (if it has any), what would not be saved with them.

    PEFT saves the adapters, and modules in `modules_to_save`; whatever else trains would be lost on reload, a projector
    above all.

    Raises:
        ValueError: with the first of the parameters and their number.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or "peft" not in sys.modules:
        return
    # Inside an adapter layer is what PEFT saves, but for the weights that it stands in front of.
    layers: list[Any] = [module for module in model.modules() if isinstance(module, adapter_layers())]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside -= {id(p) for layer in layers for p in _wrapped_module(layer).parameters()}
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())  # PEFT saves these then
    trains = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost := [name for name in trains if not (biases and name.endswith("bias"))]:
        raise ValueError(
            f"{len(lost)} parameters train ({lost[0]} first) that are not saved with the adapters around this model: name "
            'their modules in the adapter configuration, e.g. modules_to_save=["projector"], or freeze them before wrapping: '
            'model.freeze("vision_encoder.module", ...).'
        )


def _wrapped_module(layer: Any) -> nn.Module:
    """The module that an adapter layer wraps; inside of it there may be another such layer."""
    inner = getattr(layer, "original_module", None)
    inner = layer.get_base_layer() if inner is None and hasattr(layer, "get_base_layer") else inner
    return inner if isinstance(inner, nn.Module) else nn.Module()


def wrap_again(model: PreTrainedModel, described: dict[str, Any] | None, where: str) -> nn.Module:
    """Wrap a rebuilt part in the adapters that `describe_adapters` described; weights are loaded afterwards.

    Raises:
        ImportError: peft is not installed.
        ValueError: an adapter type that this version of peft does not know.
    """
    if not described:
        return model
    if is_peft_available():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING as config_classes
    else:
        raise ImportError(f"{where} was saved with PEFT adapters: pip install peft")
    if not isinstance(described, Mapping) or not isinstance(described.get("configs"), Mapping):
        raise ValueError(f"{where}: expected adapters as {{'configs': {{name: options}}}}, got {described!r:.200}.")
    configs = {name: _config(values, where, config_classes) for name, values in described["configs"].items()}
    wrapped = _wrapped(model, configs, where)
    # Which adapters compute; several at once can be set on the tuner inside alone.
    active = described.get("active") or list(configs)[:1]
    if active != list(wrapped.active_adapters):
        wrapped.base_model.set_adapter(active)
        if len(active) == 1:  # the wrapper's own method takes one name alone
            wrapped.set_adapter(active[0])
    for layer in tuner_layers(wrapped) if described.get("merged") else ():  # the weights that follow are merged ones
        layer.merged_adapters.extend(_held(layer, described["merged"]))
    if described.get("disabled"):
        wrapped.base_model.disable_adapter_layers()
    return wrapped


def _wrapped(model: PreTrainedModel, configs: dict[str, Any], where: str) -> Any:
    """Wrap a part; if it has no weights yet, its adapters have none either, while the tables that they compute are real."""
    if is_peft_available():
        from peft import get_peft_model
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


def _config(values: dict[str, Any], where: str, config_classes: Mapping[Any, Any]):
    kind = values.get("peft_type") if isinstance(values, Mapping) else None
    if kind not in config_classes:
        raise ValueError(f"{where}: unknown adapter type {kind!r}, this peft knows {sorted(config_classes)}.")
    # From a checkpoint, so not trusted: peft would import `megatron_core`, and search by whatever pattern it is given.
    options = {k: v for k, v in values.items() if k not in ("peft_type", "peft_version")}
    _check_options(options, where)
    try:
        return config_classes[kind](**options)
    except TypeError as error:
        raise ValueError(f"{where}: the {kind} adapter of this peft does not take its options ({error}).") from error


# Options of an adapter that peft takes as regular expressions over the names of all modules.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")


def _check_options(options: Mapping[str, Any], where: str) -> None:
    """Refuse options that import a module by name, name another base model, or could search without end (ValueError)."""
    if options.get("megatron_config") is not None or options.get("megatron_core") not in (None, "megatron.core"):
        raise ValueError(
            f"{where}: the adapter asks for the module {options.get('megatron_core')!r}, which is not imported."
        )
    if options.get("auto_mapping") is not None:
        raise ValueError(
            f"{where}: the adapter names a class by auto_mapping, expected none: it is built into its part."
        )
    for key in _PATTERNS:
        value = options.get(key)
        keys = (value or ()) if key.endswith("_pattern") else ()  # dictionaries have the patterns as keys
        for pattern in [value] if isinstance(value, str) else keys:
            check_pattern(pattern, f"{where}: {key}")


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that a wrapped part trains: adapter weights and copies kept by `modules_to_save`."""
    if not is_wrapped(model):
        return set()
    prefix = getattr(model.base_model, "prefix", "lora_")  # of the names of all parameters of its kind
    return {name for name, _ in model.named_parameters() if prefix in name or ".modules_to_save." in name}


def record_adapters(config: Any, encoders: Mapping[str, Any], language_model: nn.Module) -> None:
    """Write the adapters of PEFT-wrapped parts into the configuration."""
    parts = {"language_model": language_model} | {f"{n}_encoder.module": e.module for n, e in encoders.items()}
    found = {where: describe_adapters(part, where) for where, part in parts.items() if is_wrapped(part)}
    config.adapters = found or None


class WholeAdaptersMixin(PreTrainedModel):
    """Adapters around a whole composed model, beside none around its parts."""

    # `get_peft_model` sets `peft_config`, and PEFT and Trainer take `hasattr(model, "peft_config")` for "has adapters":
    # hence a property that checks when it is set, and does not exist before.
    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations of adapters around the whole model, by name; there is none before one is added."""
        if "_whole_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["_whole_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        check_no_wrapped_part(self, self._parts())
        self.__dict__["_whole_peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_whole_peft_config", None)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; ValueError where a part has adapters of its own, or PEFT is too old for transformers."""
        check_no_wrapped_part(self, self._parts())
        check_peft("add_adapter")
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError where a part has adapters of its own, or PEFT is too old for transformers."""
        check_no_wrapped_part(self, self._parts())
        check_peft("load_adapter")
        return super().load_adapter(*args, **kwargs)
