"""Describe a user's projection or callback by name and JSON arguments, and build it again.

A module's class must be registered, or be one of `torch.nn`'s own, and every constructor argument is found on the instance
under its own name (the convention of `sklearn`'s estimators).
"""

import copy
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from .build_bounds import checked_shapes
from .registries import CALLBACKS

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_PLACEMENT = {"device", "dtype", "factory_kwargs"}  # arguments that say where a module's weights go, not what it is
_MISSING = inspect.Parameter.empty


class NotStorable(ValueError):
    """A module or callback that a checkpoint cannot hold; the message names the reason."""


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a module from attributes of their names, without defaults; NotStorable where one lacks."""
    who, arguments = type(module).__name__, dict[str, Any]()
    for parameter in _parameters(type(module)):
        name, default = parameter.name, parameter.default
        if name in module._parameters:  # a layer's `bias=True` is kept as the parameter that it made
            value: Any = module._parameters[name] is not None
        else:  # `config` comes from the builder
            value = _MISSING if name == "config" else getattr(module, name, _MISSING)
        if value is _MISSING and default is _MISSING:
            raise NotStorable(f"{who} takes {name!r} but keeps no attribute of that name: set self.{name} in __init__")
        if value is not _MISSING and value != default:
            arguments[name] = as_json(value, f"{who}.{name}")
    return arguments


def as_json(value: Any, where: str) -> Any:
    """`value` as JSON gives it back (tuples become lists); NotStorable if JSON cannot hold it."""
    # There and back, so that what is described now equals what a reload reads (keys are texts, tuples are lists).
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise NotStorable(f"{where} = {value!r:.80} is not a JSON value") from error


def _parameters(cls: Callable) -> list[inspect.Parameter]:
    """The named parameters of a constructor, without those of placement."""
    named = [p for p in inspect.signature(cls).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [parameter for parameter in named if parameter.name not in _PLACEMENT]


def torch_spec(module: nn.Module) -> dict[str, Any]:
    """``{"class", "arguments"}`` or ``{"class", "modules"}`` of a module of `torch.nn`'s own classes, ``{"activation"}`` of one
    of transformers' activations, else NotStorable."""
    cls = type(module)
    if cls.__module__ == "transformers.activations" and (name := _activation_name(module)) is not None:
        return {"activation": name}
    if getattr(nn, cls.__name__, None) is not cls:
        raise NotStorable(f"{cls.__module__}.{cls.__qualname__} is not registered")
    if isinstance(module, _CONTAINERS):
        # One module in two places is given once only, and is refused here too.
        if [name for name, _ in module.named_children()] != [str(i) for i in range(len(module))]:
            raise NotStorable(f"{cls.__name__} has named children")
        return {"class": cls.__name__, "modules": [torch_spec(child) for child in module]}
    if list(module.children()):  # a Transformer's layers, say: its arguments do not tell all of them
        raise NotStorable(f"torch.nn.{cls.__name__} holds other modules")
    return {"class": cls.__name__, "arguments": constructor_arguments(module)}


def _activation_name(module: nn.Module) -> str | None:
    """The name under which transformers makes an activation that is this one, None where it makes none."""

    def told(x: nn.Module) -> tuple:
        return type(x), {k: v for k, v in vars(x).items() if not k.startswith("_") and k != "training"}

    return next((name for name in ACT2CLS if told(ACT2FN[name]) == told(module)), None)


def build_torch(spec: Mapping[str, Any]) -> nn.Module:
    """Build what `torch_spec` described; ValueError for anything that is not a module class of `torch.nn`."""
    # From a checkpoint, so not trusted: the name may be that of any attribute of `torch.nn`, the arguments anything.
    if isinstance(spec, Mapping) and set(spec) == {"activation"}:
        if spec["activation"] not in ACT2CLS:
            raise ValueError(f"Unknown activation {spec['activation']!r:.100}, expected one of {sorted(ACT2CLS)}.")
        return copy.deepcopy(ACT2FN[spec["activation"]])  # some entries are one module that everybody would share
    name = spec.get("class") if isinstance(spec, Mapping) else None
    cls: Any = getattr(nn, name, None) if isinstance(name, str) else None
    if not inspect.isclass(cls) or not issubclass(cls, nn.Module) or set(spec) - {"class", "arguments", "modules"}:
        raise ValueError(f"Expected the description of a torch.nn module, got {spec!r:.200}.")
    if issubclass(cls, _CONTAINERS):
        modules = [build_torch(child) for child in spec.get("modules", [])]
        return nn.Sequential(*modules) if issubclass(cls, nn.Sequential) else cls(modules)
    arguments = spec.get("arguments", {})
    if not isinstance(arguments, Mapping) or set(arguments) & _PLACEMENT:
        raise ValueError(f"torch.nn.{name} has the arguments {arguments!r:.200}, expected JSON values of its own.")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"torch.nn.{name} does not take the arguments {sorted(arguments)} ({error}).") from error


def build_by_name(cls: Callable, available: Mapping[str, Any]) -> Any:
    """Call a constructor with those of the `available` values whose names it takes (ValueError where one lacks or is None)."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
    arguments = dict(available.get("projection_kwargs") or {}) if takes_any else {}
    for parameter in _parameters(cls):
        value = available.get(parameter.name)
        if value is not None:  # in_features of a projector without sizes is None, and so is missing
            arguments[parameter.name] = value
        elif parameter.default is _MISSING:
            raise ValueError(
                f"{getattr(cls, '__name__', cls)} takes {parameter.name!r}, expected it among {sorted(available)}: name "
                "its arguments after the configuration's fields or pass them in projection_kwargs."
            )
    return cls(**arguments)


def same_structure(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same class tree, settings and parameter shapes."""
    # `extra_repr` holds what shapes do not show: an epsilon, a dropout, a stride.
    kinds = [[(name, type(child), child.extra_repr()) for name, child in x.named_modules()] for x in (a, b)]
    shapes = [{key: value.shape for key, value in x.state_dict().items()} for x in (a, b)]
    return kinds[0] == kinds[1] and shapes[0] == shapes[1]


def mark_initialized(module: nn.Module) -> None:
    """Mark a module's weights as made already: transformers' `post_init` would fill them with noise otherwise."""
    for each in module.modules():
        each.__dict__["_is_hf_initialized"] = True  # torch looks through all that it knows where an attribute is set
        tensor: Any
        for tensor in (*each._parameters.values(), *each._buffers.values()):
            if tensor is not None:
                tensor._is_hf_initialized = True


# The places in an encoder that a callback may have, in the order in which they run.
SLOTS = ("preprocess_callback", "postprocess_module_callback", "postprocess_projector_callback")


def describe_callback(callback: Any) -> dict[str, Any]:
    """``{"name", "arguments"}`` of a callback; NotStorable if it is not registered, or an argument is no JSON value."""
    # What is registered: a module itself or else its class, the function that a partial binds, or a plain function.
    is_module, is_bound = isinstance(callback, nn.Module), isinstance(callback, functools.partial)
    is_made = is_module and CALLBACKS.name_of(callback) is None
    target = type(callback) if is_made else callback.func if is_bound else callback
    name = CALLBACKS.name_of(target)
    if name is None:
        raise NotStorable(f"{getattr(target, '__qualname__', target)} is not registered")
    if is_made:
        return {"name": name, "arguments": constructor_arguments(callback)}
    if is_bound and callback.args:
        raise NotStorable("functools.partial binds positional arguments, bind them by keyword")
    bound = callback.keywords if is_bound else {}
    return {"name": name, "arguments": {key: as_json(value, f"the argument {key!r}") for key, value in bound.items()}}


def build_callback(described: dict[str, Any], where: str) -> Callable:
    """The callback that `describe_callback` described (ValueError where nothing registered is described)."""
    if not isinstance(described, dict) or set(described) - {"name", "arguments"} or "name" not in described:
        raise ValueError(f"{where} must be {{'name': ..., 'arguments': ...}}, got {described!r:.200}.")
    try:
        target = CALLBACKS[described["name"]].target
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    arguments = described.get("arguments") or {}
    if isinstance(target, type):
        return target(**arguments)  # a module; its parameters are loaded with the other weights
    return functools.partial(target, **arguments) if arguments else target


def declared_count(callback: Callable) -> Callable | None:
    """The `feature_count` that a callback was registered with, bound to its arguments; None without one."""
    try:
        described = describe_callback(callback)
    except NotStorable:
        return None
    count = CALLBACKS[described["name"]].feature_count
    return functools.partial(count, **described["arguments"]) if count is not None else None


def check_callbacks_storable(callbacks: dict[str, Callable | None], name: str) -> dict[str, Any]:
    """Describe an encoder's callbacks, by slot; ValueError for one that cannot be stored names its place and the remedy."""
    described: dict[str, Any] = {}
    for slot, callback in callbacks.items():
        try:
            described |= {} if callback is None else {slot: describe_callback(callback)}
        except NotStorable as error:
            raise ValueError(
                f"{name}.{slot} cannot be saved: {error}. Register the function with register_callback(name, fn) and "
                "bind JSON values by functools.partial, or register a torch.nn.Module class and pass an instance."
            ) from error
    return described


# ---- tensors that a composition keeps and does not use: of a native model, for the way back


class KeptTensors(nn.Module):
    """Buffers by dotted names, in modules that do nothing, of ``{dtype: {name: shape}}`` (ValueError for what is none)."""

    def __init__(self, shapes: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        for dtype, names in checked_shapes(shapes):
            for name, shape in names.items():
                *folders, key = name.split(".")
                module: nn.Module = self
                for folder in folders:
                    if folder not in module._modules:
                        module.add_module(folder, nn.Module())
                    module = module.get_submodule(folder)
                module.register_buffer(key, torch.empty(shape, dtype=getattr(torch, dtype)))
