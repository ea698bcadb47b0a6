"""Reentrant checkpointing (`use_reentrant=True`) that loses no gradients, or says so.

torch's passes gradients on through positional arguments and the members of one tuple.  In keywords, in tuples of tuples
(PVT v2) and behind inputs without gradients they end without a word.
"""

import functools
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def whole_gradients(checkpoint: Callable) -> Callable:
    """A checkpoint function of the same signature under which all gradients flow; any other than a reentrant one as it is.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` with its options, as `gradient_checkpointing_enable` makes it.
    """
    reentrant = isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant")
    return functools.partial(_checkpoint, checkpoint) if reentrant else checkpoint


def _checkpoint(checkpoint: Callable, function: Callable, *args: Any, **options: Any) -> Any:
    """Run a function on its tensors alone, wherever they were.

    Raises:
        ValueError: the function leaves tensors for later layers in a dictionary or list, beside what it returns.
    """
    keywords: dict[str, Any] = {}
    layer = _layer_of(function)
    if isinstance(function, functools.partial):  # as transformers' layers give it
        function, keywords = functools.partial(function.func, *function.args), function.keywords
    leaves, structure = tree_flatten((args, tuple(keywords.values())), is_leaf=_stays)
    places = _places(leaves, layer)
    returned: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Any, ...]:
        given = dict(zip(places, tensors, strict=True))
        inner, named = tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        written = (*leaves, *inner, *named)
        before = _held(written)
        values, form = tree_flatten(function(*inner, **dict(zip(keywords, named, strict=True))))
        if places and _held(written) != before and not torch.is_grad_enabled():
            raise ValueError(
                f"{type(layer).__name__} hands tensors to later layers beside its output, and reentrant checkpointing would "
                'lose their gradients: use gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        returned[:] = [form]
        return tuple(values)

    values = checkpoint(flat, *places.values(), **options)
    return tree_unflatten(list(values), returned[0])


def _places(leaves: list[Any], layer: nn.Module | None) -> dict[int, Tensor]:
    """The tensors through which gradients flow, by their place; where a layer is the first to train, one that stands for it."""
    floats = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()}
    found = {i: x for i, x in floats.items() if x.requires_grad}
    if not found and floats and layer is not None and any(p.requires_grad for p in layer.parameters()):
        i, tensor = next(iter(floats.items()))
        return {i: tensor.detach().requires_grad_()}
    return found


def _layer_of(function: Callable) -> nn.Module | None:
    """The layer whose `forward`, or bound method, a partial function calls."""
    if not isinstance(function, functools.partial):
        return None
    owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _stays(value: Any) -> bool:
    """Whether a value is passed on as the object that it is: a layer may write into dictionaries and lists."""
    if isinstance(value, dict):
        return True
    return isinstance(value, list) and not any(isinstance(x, Tensor) and x.requires_grad for x in value)


def _held(values: Iterable[Any]) -> list[list[int]]:
    """What the dictionaries and lists among some values hold, by identity."""
    mappings = [list(x.values()) if isinstance(x, MutableMapping) else x for x in values]
    return [[id(item) for item in x] for x in mappings if isinstance(x, list)]
