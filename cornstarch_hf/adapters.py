"""PEFT-wrapped parts: see through the wrapper, describe its adapters, wrap a rebuilt part again."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .module_specs import NotStorable, as_json
from .shape_probe import without_weights

if is_peft_available():
    from peft import PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

_TOKEN_ROWS = "trainable_tokens_original"
# Where PEFT keeps the module that an adapter stands in front of.
_WRAPPED_AS = ("original_module", "token_adapter", "base_layer")


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model is a `peft.PeftModel`."""
    return is_peft_available() and isinstance(model, PeftModel)


def unwrapped(model: Any) -> PreTrainedModel:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_wrapped(model) else model


def describe_adapters(model: Any, where: str) -> dict[str, Any] | None:
    """JSON description of a wrapped part's adapters, None for a part that is not wrapped.

    Raises:
        ValueError: the adapters cannot be stored (prompt learning inside a part, values that are not JSON, adapters
            injected without a wrapper).
    """
    if not is_wrapped(model):
        _refuse_injected(model, where)
        return None
    if not isinstance(model.base_model, BaseTuner):
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
        configs = {
            name: as_json(_plain(config.to_dict()), f"{where}: the adapter {name!r}")
            for name, config in model.peft_config.items()
        }
    except NotStorable as error:
        raise ValueError(f"{error}: give the adapter configuration JSON values.") from error
    described = {"configs": configs, "active": list(model.active_adapters), "class": type(model).__name__}
    layers = tuner_layers(model)
    return described | ({"disabled": True} if layers and all(x.disable_adapters for x in layers) else {})


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that hold adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)] if is_peft_available() else []


def check_not_merged(model: nn.Module, where: str) -> None:
    """Refuse adapters that are merged in place: a reload would add them to weights that hold them already.

    Raises:
        ValueError: names the part and the merged adapters.
    """
    merged = sorted({name for layer in tuner_layers(model) for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(
            f"{where}: the adapters {merged} are merged into the weights and still attached, so a checkpoint would hold them "
            "twice. Call unmerge_adapter() on the part before saving, or replace the part by its merge_and_unload()."
        )


def holds_wrapped_part(model: nn.Module) -> bool:
    """Whether anything inside a model is a `peft.PeftModel`."""
    return any(is_wrapped(module) for module in model.modules())


def current_name(model: nn.Module, name: str) -> str:
    """Where a weight lies now that was called `name` before adapters were put in front of its module."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return name
    while not hasattr(module, "_parameters") or module._parameters.get(key) is None:
        inner = next((w for w in _WRAPPED_AS if isinstance(module._modules.get(w), nn.Module)), None)
        if inner is None:
            return name
        module, path = getattr(module, inner), f"{path}.{inner}"
    return f"{path}.{key}"


def shared_by_adapters(model: nn.Module) -> dict[str, str]:
    """Tensors that several layers of wrapped parts share (VeRA's projections, tied layers): ``{name: first name}``."""
    shared: dict[str, str] = {}
    for prefix, part in model.named_modules():
        if is_wrapped(part):
            first: dict[int, str] = {}
            for name, tensor in part.state_dict(keep_vars=True).items():
                full = f"{prefix}.{name}" if prefix else name
                if first.setdefault(id(tensor), full) != full:
                    shared[full] = first[id(tensor)]
    return shared


def adapter_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of adapters that no checkpoint holds: tables and projections made when the adapter is."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in model.named_modules():
        if is_wrapped(part):
            saved = part.state_dict().keys()
            found |= {
                f"{prefix}.{name}": buffer
                for name, buffer in part.named_buffers()
                if name not in saved and _of_an_adapter(part, name)
            }
    return found


def check_buffers_restorable(made: nn.Module) -> None:
    """Refuse adapters whose unsaved buffers cannot be made again (VeRA and others with `save_projection=False`).

    Args:
        made: the model as its configuration builds it, without weights.

    Raises:
        ValueError: names the first of the buffers.
    """
    lost = [n for n, b in adapter_buffers(made).items() if b.is_meta and _TOKEN_ROWS not in n.split(".")]
    if lost:
        raise ValueError(
            f"A checkpoint would not hold the buffers {lost[:2]} ({len(lost)}) that adapters need, and loading cannot make "
            "them again: use save_projection=True in the adapter configuration, or merge_and_unload() the part before saving."
        )


def restore_token_rows(model: nn.Module) -> None:
    """Fill the rows that adapters of single tokens keep of the embeddings, to unmerge them (in place)."""
    for layer in tuner_layers(model):
        for name, rows in getattr(layer, _TOKEN_ROWS, {}).items():
            rows.copy_(layer.get_base_layer().weight.data[layer.token_indices[name]])


def _of_an_adapter(part: Any, name: str) -> bool:
    owner, _, _ = name.rpartition(".")
    return isinstance(part.get_submodule(owner), BaseTunerLayer) or bool(set(part.peft_config) & set(name.split(".")))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _plain(item) for key, item in value.items() if key not in ("base_model_name_or_path", "auto_mapping")
        }
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)


def _refuse_injected(model: nn.Module, where: str) -> None:
    if not is_peft_available() or getattr(model, "_hf_peft_config_loaded", False):
        return
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{where} has adapters injected without a wrapper, which cannot be restored from a checkpoint: wrap the "
            "part with get_peft_model(part, config) before composing."
        )


def wrap_again(model: PreTrainedModel, described: dict[str, Any] | None, where: str) -> nn.Module:
    """Wrap a rebuilt part in the adapters that `describe_adapters` described; weights are loaded afterwards.

    Raises:
        ImportError: peft is not installed.
        ValueError: an adapter type that this version of peft does not know.
    """
    if not described:
        return model
    if not is_peft_available():
        raise ImportError(f"{where} was saved with PEFT adapters: pip install peft")
    configs = {name: _config(values, where) for name, values in described["configs"].items()}
    names = list(configs)
    if any(p.is_meta for p in model.parameters()):
        wrapped = _wrapped_on_meta(model, configs, where)
    else:
        wrapped = _wrapped(model, configs)
    active = described.get("active") or names[:1]
    if active != list(wrapped.active_adapters):
        wrapped.base_model.set_adapter(active)
        if len(active) == 1:
            wrapped.set_adapter(active[0])
    if described.get("disabled"):
        wrapped.base_model.disable_adapter_layers()
    return wrapped


def _wrapped(model: PreTrainedModel, configs: dict[str, Any]) -> Any:
    first, *others = configs
    wrapped = get_peft_model(model, configs[first], adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, configs[name])
    return wrapped


def _wrapped_on_meta(model: PreTrainedModel, configs: dict[str, Any], where: str) -> Any:
    """Wrap a part that has no weights yet: so have its adapters, while the tables that they compute are real."""
    try:
        with without_weights():
            return _wrapped(model, configs)
    except RuntimeError as error:
        kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
        raise ValueError(
            f"{where}: PEFT cannot build adapters of type {kinds} before the weights are there, as loading does "
            f"({type(error).__name__}: {str(error)[:120]}). Use merge_and_unload() on the part before saving, or wrap the "
            "composed model: get_peft_model(mllm, config)."
        ) from error


def _config(values: dict[str, Any], where: str):
    kind = values.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{where}: unknown adapter type {kind!r}, this peft knows {sorted(PEFT_TYPE_TO_CONFIG_MAPPING)}."
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        **{k: v for k, v in values.items() if k not in ("peft_type", "peft_version")}
    )


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that a wrapped part trains: adapter weights and copies kept by `modules_to_save`."""
    if not is_wrapped(model):
        return set()
    prefix = getattr(model.base_model, "prefix", "lora_")
    return {name for name, _ in model.named_parameters() if prefix in name or ".modules_to_save." in name}
