"""How frozen parts run while the rest trains: in evaluation mode, checkpointed all the same.  What is frozen: `freezing`."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapters import ADAPTER_CONTAINERS, ADAPTER_LAYERS, base_children, peft_classes

# ---- reentrant checkpointing.  torch's reentrant checkpoint runs a function without gradients, and again with them in the
# backward pass, where it sees only tensors that are positional arguments or direct results.  Tensors in keywords, tuples
# and lists, and layers whose inputs need no gradients, would lose theirs in silence; here all of them reach it flat.


def whole_gradients(checkpoint: Callable) -> Callable:
    """A checkpoint function of the same signature under which all gradients flow; any but a reentrant one as it is."""
    reentrant = isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant")
    return functools.partial(_checkpoint, checkpoint) if reentrant else checkpoint


def _checkpoint(checkpoint: Callable, function: Callable, *args: Any, **options: Any) -> Any:
    """Run a checkpoint of a function that takes its tensors flat, wherever they were (ValueError if it hands on others)."""
    layer: nn.Module | None = None
    keywords: dict[str, Any] = {}
    if isinstance(function, functools.partial):  # of a layer's `forward` or bound method, as transformers gives it
        owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
        layer = owner if isinstance(owner, nn.Module) else None
        function, keywords = functools.partial(function.func, *function.args), function.keywords
    leaves, structure = tree_flatten((args, tuple(keywords.values())), is_leaf=_stays)
    places = _places(leaves, layer)
    returned: list[Any] = []

    def flat(*tensors: Tensor) -> tuple[Any, ...]:
        given = dict(zip(places, tensors, strict=True))  # each back in its place, and the structure around it
        inner, named = tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        written = (*leaves, *inner, *named)
        before = _held(written)
        values, form = tree_flatten(function(*inner, **dict(zip(keywords, named, strict=True))))
        # Without gradients is the first run; in the second one such tensors are not seen by the backward pass.
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
    """The tensors through which gradients flow, by their place; for the first layer that trains, a tensor made to."""
    floats = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()}
    found = {i: x for i, x in floats.items() if x.requires_grad}
    if found or not floats or layer is None or not any(p.requires_grad for p in layer.parameters()):
        return found
    i, tensor = next(iter(floats.items()))
    return {i: tensor.detach().requires_grad_()}  # without any, torch would not run the layer backward at all


def _stays(value: Any) -> bool:
    """Whether a value is passed on as the object that it is: a layer may write into dictionaries and lists."""
    tracked = isinstance(value, list) and any(isinstance(x, Tensor) and x.requires_grad for x in value)
    return isinstance(value, (dict, list)) and not tracked


def _held(values: Iterable[Any]) -> list[list[int]]:
    """What the dictionaries and lists among some values hold, by identity."""
    lists = [list(x.values()) if isinstance(x, MutableMapping) else x for x in values]
    return [[id(item) for item in x] for x in lists if isinstance(x, list)]


# ---- evaluation mode.  `requires_grad=False` alone does not freeze: dropout, layer skipping and masks over sounds still
# draw, and norm statistics still move, as long as a module is in training mode.


def keep_frozen_in_eval(parts: Mapping[str, nn.Module]) -> None:
    """Put the frozen regions of parts into evaluation mode: nothing drops, no norm statistics change.

    A module trains when a parameter in it does, those of adapters not counted; adapter layers follow the adapters that
    they hold.  What has no parameters (dropout) is as the module around it.  A module that holds a list of layers, some
    of them frozen, does not train: it could not skip the others alone.
    """
    layers = peft_classes(*ADAPTER_LAYERS)
    wrappers = (*layers, *peft_classes(*ADAPTER_CONTAINERS))
    holding: set[nn.Module] = set()  # modules with a parameter at or below them
    training: set[nn.Module] = set()  # ... one that trains
    base: set[nn.Module] = set()  # ... one that trains and is no adapter's

    def survey(module: nn.Module) -> None:
        own, below = [p.requires_grad for p in module.parameters(recurse=False)], list(module.children())
        for child in below:
            survey(child)
        adapter = isinstance(module, layers)
        wrapped = base_children(module) if adapter else below  # of an adapter layer, what it wraps counts alone
        found = [(holding, bool(own), below), (training, any(own), below), (base, any(own) and not adapter, wrapped)]
        for modules, here, inner in found:
            if here or not modules.isdisjoint(inner):
                modules.add(module)

    def set_mode(module: nn.Module, around: bool) -> None:
        if isinstance(module, wrappers):
            mode = module in training
        elif module in holding:
            mode = module in base and not any(x in holding and x not in base for x in layers_in_lists(module))
        else:
            mode = around
        # Quantized linear layers take evaluation for inference, and change to a form without gradients.  Routers of experts,
        # which draw, are linear layers of plain numbers.
        weight = module.weight if isinstance(module, nn.Linear) else None
        plain = weight is None or (type(weight) is nn.Parameter and weight.is_floating_point())
        module.training = mode or not plain
        for child in module.children():
            set_mode(child, mode)

    for part in parts.values():
        survey(part)
        set_mode(part, True)


def layers_in_lists(module: nn.Module) -> list[nn.Module]:
    """The layers that a module holds in its lists of modules."""
    return [layer for child in module.children() if isinstance(child, nn.ModuleList) for layer in child]


def keep_strided_layers(parts: Mapping[str, nn.Module]) -> None:
    """Have adapters that shorten what an encoder gives run all of their layers (in place), which stay in training mode."""
    # wav2vec 2.0's skip each at random (`layerdrop`), and an item then gives more features than it has placeholders.
    for part in parts.values():
        for module in part.modules():
            if type(module).__name__.endswith("Adapter") and hasattr(module, "layerdrop"):
                module.training = False


# ---- checkpointing of what is frozen.  transformers' layers checkpoint only where `self.training` holds, so a frozen
# language model in evaluation mode would keep all activations that gradients to the projectors flow through.  Such layers
# get a `forward` of their own instance that checkpoints.


def checkpoint_frozen_layers(model: nn.Module) -> None:
    """Have the frozen layers of a model in training checkpoint where gradients flow through them, if all layers do (in place).

    A layer that is given a cache runs as it is: a cache would be written once more when the layer is computed again.
    """
    layers = _checkpointing_layers(model) if model.training else ()
    wanted = {layer: owner for layer, owner in layers if not owner.training}
    for layer in model.modules():
        current, owner = layer.__dict__.get("forward"), wanted.get(layer)
        ours = isinstance(current, functools.partial) and current.func is in_evaluation_mode
        if ours and current.args[1] is owner:
            continue  # the same object still, for what has been compiled with it
        before = current.args[2] if ours else current  # a `forward` that accelerate's hooks gave the instance, or None
        # Of its own layer by an argument, and not a closure: a copy of the model keeps to its own layers.
        forward = before if owner is None else functools.partial(in_evaluation_mode, layer, owner, before)
        if forward is not None:
            layer.__dict__["forward"] = forward
        elif ours:
            del layer.__dict__["forward"]


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any layer of a model checkpoints in this pass."""
    return torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) is True for m in model.modules())


def require_grads(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that has floating-point outputs require gradients, however many a module gives."""
    for value in tree_flatten(output)[0]:
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(True)


def _checkpointing_layers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Layers that checkpoint, each with the module that knows how: itself, or one that loops over plain layers."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is not True:
            continue
        if isinstance(module, GradientCheckpointingLayer):
            yield module, module
        elif not any(isinstance(inner, GradientCheckpointingLayer) for inner in module.modules()):
            yield from ((layer, module) for layer in layers_in_lists(module))


def in_evaluation_mode(layer: Any, owner: Any, before: Callable | None, *args: Any, **kwargs: Any) -> Any:
    """A frozen layer's `forward`: checkpointed where its owner checkpoints and gradients flow."""
    run = before or functools.partial(type(layer).forward, layer)
    cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    if cached or owner.training or not owner.gradient_checkpointing or not torch.is_grad_enabled():
        return run(*args, **kwargs)
    checkpoint = whole_gradients(owner._gradient_checkpointing_func)
    return checkpoint(functools.partial(run, **kwargs), *args)
