"""Layers behind the selected hidden states do not run: an encoder is called as far as the deepest state that is projected.

`states_alone` calls a view, made anew for each call, of the modules on the way to an encoder's layers, and changes nothing
of them; `module` asks it, and calls the whole encoder where it gives None.  `Picklable` leaves out of pickles what
transformers hooks to an encoder that is asked for its hidden states.
"""

import copy
import functools
import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _has_any_global_hook
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..parts.adapters import unwrapped
from ..parts.frozen_modes import in_evaluation_mode
from ..parts.names import shallow
from ..parts.registries import ALONE
from .items import OUTPUT_MASKS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURING = "transformers.utils.output_capturing"  # whose hooks do nothing unless hidden states are asked for
_INSTALLED = "_output_capturing_hooks_installed"
_WISHES = ("output_hidden_states", "output_attentions")
# Of encoders, by layers, mode and the names of their inputs: what was found out about them.
_PLANS: Any = weakref.WeakKeyDictionary()

States = tuple[Tensor | None, ...]  # one for each hidden state, those that are not selected left out


class _ReachedError(Exception):
    """Ends the call of a view: all that is selected has been computed."""


@dataclass
class _Plan:
    """How an encoder is called as far as some hidden states.

    Attributes:
        path: names of the modules on the way from the encoder to its list of layers; None: the whole encoder runs.
        count: of hidden states.
        behind: depth on the way, and name, of other modules that may run behind the layers that are needed.
        shape: the modules on the way, as weak references, and the classes of the layers.
        equal: whether the states were equal to the bit, by whether anything that does not run was in training mode.
        tries: how often it may be looked for.
    """

    path: tuple[str, ...] | None = None
    count: int = 0
    behind: tuple[tuple[int, str], ...] = ()
    shape: tuple[Any, ...] = ()
    equal: dict[bool, bool] = field(default_factory=dict)
    tries: int = 3

    def is_of(self, tower: nn.Module) -> bool:
        """Whether the encoder is still made of the same modules, as far as this goes by them."""
        if self.path is None:
            return True
        way = _way(tower, self.path)
        return way is not None and _shape(way) == self.shape


def states_alone(encoder: Any, inputs: dict, options: dict, wanted: dict) -> Any:
    """A tuple of an encoder's hidden states with None for those not selected; None where the whole encoder has to run.

    Once per encoder, selection and names of inputs the whole encoder runs beside it, by copies of its modules.  Unless the
    states are equal to the bit, and as many random numbers were drawn, the encoder runs whole from then on.

    Args:
        encoder: a `ModalEncoderModule`.
        inputs: of its module.
        options: what its caller wants beside features; `ALONE` where nothing else of its output is read.
        wanted: further keywords of the module's `forward`, `output_hidden_states` among them.
    """
    tower, chosen = encoder.module, encoder.selection.layers
    if not _is_enough(encoder, options) or not _is_plain(tower, inputs):
        return None
    plans = _PLANS.setdefault(tower, {})
    attention = getattr(unwrapped(tower).config, "_attn_implementation", None)
    given = sorted(name for name, value in inputs.items() if value is not None)
    key = (tuple(chosen), tower.training, str(attention), *given)
    if key not in plans or not plans[key].is_of(tower):
        plans[key] = _Plan()
    plan = plans[key]  # complete from the beginning, whatever other threads find out
    if plan.path is not None:
        behind = list(_behind(tower, plan, chosen))
        if not all(map(_is_untouched, behind)):
            return None
        if (equal := plan.equal.get(any(module.training for module in behind))) is not None:
            return _run(tower, plan, chosen, inputs, wanted) if equal else None
    if plan.tries == 0 or not _may_be_checked(tower):
        return None
    plans[key], states = _checked(tower, plan, chosen, inputs, wanted)
    return states


def _is_enough(encoder: Any, options: Mapping[str, Any]) -> bool:
    """Whether the selected hidden states are all that is read of what an encoder gives."""
    config, selection = unwrapped(encoder.module).config, encoder.selection
    return (
        options.get(ALONE, False)
        and selection.needs_hidden_states
        and encoder.postprocess_module_callback is None
        and not encoder.merging["layer_features"]
        and not any(options.get(wish) or getattr(config, wish, False) for wish in _WISHES)
    )


def _is_plain(tower: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether it is an ordinary encoder on ordinary tensors: not traced, no copy by `DataParallel`, not quantized."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _has_any_global_hook():
        return False
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_meta for x in tensors):
        return False
    inner: Any = unwrapped(tower)
    odd = ("is_quantized", "_is_replica", "_is_fsdp_managed_module")  # the last one of both kinds of FSDP
    return not any(getattr(each, key, False) for key in odd for each in (tower, inner))


def _may_be_checked(tower: nn.Module) -> bool:
    """Whether an encoder may run twice: its weights are not in pieces, and no statistics of batches move."""
    pieces = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in tower.parameters())
    pieces |= any(hasattr(m, "_fsdp_wrapped_module") for m in tower.modules())
    recorded = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()  # in a CUDA graph nothing waits
    moving = any(isinstance(m, _NormBase) and m.training for m in tower.modules())
    return _is_untouched(tower) and not (pieces or recorded or moving)


def _is_untouched(module: nn.Module) -> bool:
    """Whether nobody would miss a call of a module: no hooks, no `forward` of its own, no statistics of batches."""
    own = module.__dict__
    if any(own.get(kind) and not all(map(_captures, own[kind].values())) for kind in _HOOKS):
        return False
    forward = own.get("forward")
    ours = isinstance(forward, functools.partial) and forward.func is in_evaluation_mode and forward.args[2] is None
    if (forward is not None and not ours) or own.get("_compiled_call_impl") is not None:
        return False
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return False
    return not (isinstance(module, _NormBase) and module.training)


def _captures(hook: Callable) -> bool:
    return getattr(hook, "__module__", None) == _CAPTURING


# ---- the way to the layers


def _way(tower: nn.Module, path: Sequence[str]) -> list[nn.Module] | None:
    """The modules from an encoder to its list of layers; None where they are not there."""
    way = [tower]
    for name in path:
        if (module := way[-1]._modules.get(name)) is None:
            return None
        way.append(module)
    return way


def _shape(way: Sequence[nn.Module]) -> tuple[Any, ...]:
    return (*map(weakref.ref, way), *map(type, way[-1]._modules.values()))


def _behind(tower: nn.Module, plan: _Plan, chosen: Sequence[int]) -> Iterator[nn.Module]:
    """What does not run, or not to its end: modules on the way, layers behind, and other modules that follow them."""
    way = _way(tower, plan.path or ()) or []
    yield from way
    others = [way[depth]._modules.get(name) for depth, name in plan.behind]
    for module in [*others, *list(way[-1]._modules.values())[max([layer % plan.count for layer in chosen]) :]]:
        if module is not None:
            yield from module.modules()


def _run(tower: nn.Module, plan: _Plan, chosen: Sequence[int], inputs: Mapping, wanted: Mapping) -> States | None:
    """Hidden states by a view of an encoder whose layers end the call where the deepest state is reached."""
    path, positions = plan.path or (), [layer % plan.count for layer in chosen]
    found: dict[int, Tensor] = {}  # (items, tokens, width) each, or as the encoder has them
    top = view = shallow(tower)
    for name in path:
        view._modules[name] = shallow(view._modules[name])  # type: ignore[arg-type]
        view = view._modules[name]  # type: ignore[assignment]
    for i, (name, layer) in enumerate(view._modules.items()):
        if i >= max(positions) or i in positions:
            own: dict[str, Any] = {kind: OrderedDict() for kind in _HOOKS} | {"_compiled_call_impl": None}
            forward = functools.partial(_kept, found, i, layer if i < max(positions) else None)
            # Checkpointing is the layer's own affair, which is called by this one.
            view._modules[name] = shallow(layer, forward=forward, gradient_checkpointing=False, **own)  # type: ignore[arg-type]
    try:
        top(**inputs, **{key: value for key, value in wanted.items() if key != "output_hidden_states"})
    except _ReachedError:
        deepest = found.pop(min(i for i in found if i >= max(positions)))  # layers before it may have been left out
        found[max(positions)] = deepest
    return tuple(found.get(i) for i in range(plan.count)) if set(positions) == set(found) else None


def _kept(found: dict[int, Tensor], place: int, layer: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
    """Keep what a layer is given, a hidden state, and run it; None: end the call."""
    found[place] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if layer is None:
        raise _ReachedError
    return layer(*args, **kwargs)


# ---- the check


def _checked(tower: Any, plan: _Plan, chosen: Sequence[int], inputs: Mapping, wanted: Mapping) -> tuple[_Plan, Any]:
    """Hidden states by a view that gives those of the whole encoder, None without one; before them what is known now."""
    device = next((x.device for x in inputs.values() if isinstance(x, Tensor)), torch.device("cpu"))
    before, later = _random_state(device), replace(plan, tries=plan.tries - 1)
    try:
        states, order = _reference(tower, inputs, wanted)
    except Exception:  # the whole encoder, which is called instead, says what is wrong
        return later, None
    finally:
        after = _random_state(device)
        _set_random_state(before, device)
    count = len(states)
    if not all(-count <= layer < count for layer in chosen) or count - 1 in [layer % count for layer in chosen]:
        return replace(plan, tries=0), None  # the whole encoder says so, or is needed
    expected = {i: states[i] for i in [layer % count for layer in chosen]}
    if any(_same(states[i], states[j]) for i in expected for j in range(count) if i != j):
        return later, None  # nothing would tell which of them it was
    paths = _lists(tower, count - 1) if plan.path is None else ()
    for one in (plan,) if plan.path is not None else (_planned(tower, p, order, count, max(expected)) for p in paths):
        behind = list(_behind(tower, one, chosen))
        if not all(map(_is_untouched, behind)):
            return one, None
        found = _tried(tower, one, expected, chosen, inputs, wanted)
        # What is drawn afterwards, for dropout in the language model, must be the same too.
        right = found is not None and _random_state(device) == after
        if right or found is not None or one is plan:
            one.equal[any(module.training for module in behind)] = right
        if right:
            _hook(tower, (_way(tower, one.path or ()) or [])[-1])
            return one, found
        _set_random_state(before, device)
        if one.equal:
            return one, None
    return replace(plan, tries=0), None


def _tried(tower: Any, plan: _Plan, expected: Mapping, *call: Any) -> States | None:
    """Hidden states by a view, None where they are not the expected ones."""
    try:
        found = _run(tower, plan, *call)
    except Exception:  # it cannot be called like this
        return None
    return found if found is not None and all(_same(found[i], state) for i, state in expected.items()) else None


def _planned(
    tower: nn.Module, path: tuple[str, ...], order: Mapping[nn.Module, tuple[int, int]], count: int, first: int
) -> _Plan:
    """A plan by a list of layers, the `first` of which is the first that is not needed; `order` as of `_reference`."""
    way = _way(tower, path) or []
    layer: Any = list(way[-1]._modules.values())[first]
    start = order.get(layer, (0, 0))[0]
    # What has begun for the last time before that layer runs in any case, such as embeddings.
    others = [
        (i, name, child) for i, m in enumerate(way[:-1]) for name, child in m.named_children() if child not in way
    ]
    behind = tuple((i, name) for i, name, m in others if order.get(m, (0, start))[1] >= start)
    return _Plan(path, count, behind, _shape(way))


def _reference(
    tower: Any, inputs: Mapping, wanted: Mapping
) -> tuple[tuple[Any, ...], dict[nn.Module, tuple[int, int]]]:
    """The hidden states of a whole encoder, and when each of its modules began for the first and the last time.

    It is run by copies of all of its modules, to which transformers may hook what it needs.  No states where a call changes
    the encoder itself, or gives a mask of which rows are features.
    """
    copies: dict[nn.Module, nn.Module] = {}
    began: list[nn.Module] = []

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            hooks: dict[str, Any] = {kind: OrderedDict() for kind in _HOOKS}
            made = copies[module] = shallow(module, **hooks)
            made.__dict__["_buffers"] = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
            made.__dict__.pop(_INSTALLED, None)
            if "forward" in made.__dict__ and _is_untouched(module):
                del made.__dict__["forward"]  # which checkpoints the module itself
            made._modules.update({k: child if child is None else copied(child) for k, child in module._modules.items()})
            made.register_forward_pre_hook(lambda *_: began.append(module))
        return copies[module]

    top = copied(tower)
    kept = {module: dict(made.__dict__) for module, made in copies.items()}
    # Inputs are other objects, which tells whether they were kept.  With gradients where the call has them, as kernels
    # may differ by that.
    given = {name: x.view_as(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    output = top(**given, **wanted)
    odd = not isinstance(output, Mapping) or any(output.get(mask) is not None for mask in OUTPUT_MASKS)
    if odd or any(_has_changed(module, made, kept[module]) for module, made in copies.items()):
        return (), {}
    order: dict[nn.Module, tuple[int, int]] = {}
    for i, module in enumerate(began):
        order[module] = order.get(module, (i, i))[0], i
    states = output.get("hidden_states") or ()
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in states), order


def _has_changed(module: nn.Module, made: nn.Module, kept: Mapping[str, Any]) -> bool:
    """Whether a call of a module's copy wrote to it: attributes, or numbers of its buffers."""
    now = {key: value for key, value in made.__dict__.items() if key != _INSTALLED}
    if now.keys() != kept.keys() or any(value is not kept[key] for key, value in now.items()):
        return True
    pairs = [(b, made._buffers.get(k)) for k, b in module._buffers.items() if b is not None]
    return len(made._buffers) != len(module._buffers) or not all(_same(*pair) for pair in pairs)


def _lists(module: nn.Module, length: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The ways to lists of as many layers in a module."""
    for name, child in module.named_children():
        if length > 0 and isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) == length:
            yield (*path, name)
        yield from _lists(child, length, (*path, name))


def _same(a: Any, b: Any) -> bool:
    """Whether two tensors are equal to the bit, and lie alike in memory."""
    alike = isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and a.stride() == b.stride() and torch.equal(a, b)


def _random_state(device: torch.device) -> list[Any]:
    """States of all generators that an encoder may draw from, which compare by `==`."""
    name, keys, *others = np.random.get_state()
    own = [] if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device).tolist()
    return [random.getstate(), (name, keys.tolist(), *others), torch.get_rng_state().tolist(), own]


def _set_random_state(state: list[Any], device: torch.device) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(torch.tensor(state[2], dtype=torch.uint8))
    if state[3]:
        torch.get_device_module(device).set_rng_state(torch.tensor(state[3], dtype=torch.uint8), device)


# ---- pickling


class Picklable(nn.Module):
    """A module of which transformers' hooks for hidden states are left out in pickles and deep copies.

    They are functions inside a function, which nothing can pickle, and come back at the first call that needs them.
    """

    def __getstate__(self) -> dict[str, Any]:
        parts = {name: child and _without_captures(child) for name, child in self._modules.items()}
        return self.__dict__ | {"_modules": parts}

    def __copy__(self) -> "Picklable":
        return shallow(self)  # type: ignore[return-value]


def _without_captures(module: nn.Module) -> nn.Module:
    """A module itself, or a copy with the same tensors without transformers' hooks, if it has such."""
    if not any(map(_captures, (hook for m in module.modules() for hook in m._forward_hooks.values()))):
        return module
    tensors = [*module.parameters(), *module.buffers()]
    made = copy.deepcopy(module, {id(x): x for x in tensors})
    _unhook(made)
    return made


def _unhook(module: nn.Module) -> None:
    for inner in module.modules():
        for number in [n for n, hook in inner._forward_hooks.items() if _captures(hook)]:
            del inner._forward_hooks[number]
        inner.__dict__.pop(_INSTALLED, None)


def _hook(tower: Any, layers: nn.Module) -> None:
    """Have transformers hook what it needs, as a call of the whole encoder does, but for one that is compiled, which fails."""
    if not all(any(map(_captures, layer._forward_hooks.values())) for layer in layers.children()):
        _unhook(tower)  # of other layers, which stood there before
    maybe_install_capturing_hooks(unwrapped(tower))
