"""Callbacks of an encoder: how one is described in a checkpoint and built again."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from .registries import CALLBACKS
from .stored_modules import NotStorable, as_json, constructor_arguments

SLOTS = ("preprocess_callback", "postprocess_module_callback", "postprocess_projector_callback")


def describe_callback(callback: Any) -> dict[str, Any]:
    """``{"name", "arguments"}`` of a registered callback.

    Raises:
        NotStorable: it is not registered, or an argument is no JSON value.
    """
    arguments: Any
    if isinstance(callback, nn.Module) and CALLBACKS.name_of(callback) is None:
        name, arguments = CALLBACKS.name_of(type(callback)), constructor_arguments
    elif isinstance(callback, functools.partial):
        name, arguments = CALLBACKS.name_of(callback.func), _bound_arguments
    else:
        name, arguments = CALLBACKS.name_of(callback), lambda _: {}
    if name is None:
        what = type(callback) if isinstance(callback, nn.Module) else getattr(callback, "func", callback)
        raise NotStorable(f"{getattr(what, '__qualname__', what)} is not registered")
    return {"name": name, "arguments": arguments(callback)}


def _bound_arguments(callback: functools.partial) -> dict[str, Any]:
    if callback.args:
        raise NotStorable("functools.partial binds positional arguments, bind them by keyword")
    return {key: as_json(value, f"the argument {key!r}") for key, value in callback.keywords.items()}


def build_callback(described: dict[str, Any], where: str) -> Callable:
    """The callback that `describe_callback` described.

    Raises:
        ValueError: the description is malformed or names nothing that is registered.
    """
    if not isinstance(described, dict) or set(described) - {"name", "arguments"} or "name" not in described:
        raise ValueError(f"{where} must be {{'name': ..., 'arguments': ...}}, got {described!r:.200}.")
    try:
        target = CALLBACKS[described["name"]].target
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    arguments = described.get("arguments") or {}
    if isinstance(target, type):
        return target(**arguments)
    return functools.partial(target, **arguments) if arguments else target


def declared_count(callback: Callable) -> Callable | None:
    """The `feature_count` that a callback's registration declares, bound to its arguments; None without one."""
    try:
        described = describe_callback(callback)
    except NotStorable:
        return None
    count = CALLBACKS[described["name"]].feature_count
    return functools.partial(count, **described["arguments"]) if count is not None else None


def check_callbacks_storable(callbacks: dict[str, Callable | None], name: str) -> dict[str, Any]:
    """Descriptions of an encoder's callbacks by slot.

    Raises:
        ValueError: one cannot be stored; names its place and the remedy.
    """
    described = {}
    for slot, callback in callbacks.items():
        if callback is None:
            continue
        try:
            described[slot] = describe_callback(callback)
        except NotStorable as error:
            raise ValueError(
                f"{name}.{slot} cannot be saved: {error}. Register the function with register_callback(name, fn) and "
                "bind JSON values by functools.partial, or register a torch.nn.Module class and pass an instance."
            ) from error
    return described
