"""The loss at labelled positions: the language model's head runs there alone, and in chunks where there are many.

The language model's own `forward` does all of it, so that soft-capping, scaling, adapters, routers' losses and the loss itself
stay its own: what is called is a shallow copy of it, with something that stands in for its backbone and chooses positions.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..parts.adapters import is_wrapped, unwrapped
from ..parts.names import shallow
from ..parts.signatures import accepts, forward_parameters, takes_any_keyword
from .merging import shifted_left

IGNORED = -100
# So many numbers of logits are made at once, 64 MiB of them in float32: some copies of them are all that a step adds.
LOGITS_AT_ONCE = 2**24
# Of language models: whether the losses of chunks add up to that of the whole.
_ADDS_UP: Any = weakref.WeakKeyDictionary()


def takes_positions(language_model: Any) -> bool:
    """Whether a language model's head can run at chosen positions and its loss at the labels of these."""
    # By the parameter `logits_to_keep`, and a loss that is transformers' own (`loss_function`) and knows `shift_labels`,
    # which reach it by ``**kwargs``.
    if "logits_to_keep" not in forward_parameters(language_model) or not takes_any_keyword(language_model):
        return False
    # Learnt prompts in front shift what positions are, and the first token gets a label there.
    if is_wrapped(language_model) and language_model.active_peft_config.is_prompt_learning:
        return False
    inner: Any = unwrapped(language_model)
    # There is no other sign of how it computes its loss.  One that somebody has set may tell rows apart.
    loss = inner.loss_function
    own = getattr(loss, "__module__", "").partition(".")[0] == "transformers"
    return own and "loss_function" in _names_used(inner) and "shift_labels" in inspect.signature(loss).parameters


def _names_used(inner: Any) -> tuple[str, ...]:
    """Names in the code of a language model's `forward`."""
    return inspect.unwrap(type(inner).forward).__code__.co_names


def run_at_labels(language_model: Any, arguments: dict[str, Any]) -> ModelOutput:
    """The output of a language model that `takes_positions`, its head run at labelled positions alone.

    Its loss is that of all positions, with equal gradients; its `logits` are those of some positions and mean nothing.

    Args:
        language_model: PEFT-wrapped or not.
        arguments: of its `forward`; with `labels` ``(batch, length)``, and `shift_labels` where they are shifted already.
    """
    targets = arguments.get("shift_labels")
    if targets is None:
        targets = shifted_left(arguments["labels"], IGNORED)  # (batch, length): what each position is to predict
    backbone = _backbone(language_model)
    if backbone is None or torch.compiler.is_compiling():
        return language_model(**arguments | _columns(targets), return_dict=True)
    wanted = targets != IGNORED  # bool (batch, length)
    # Without any label the loss is that of no label at all, as it would be with all logits.
    wanted[:1, -1:] |= ~wanted.any()
    rows, columns = wanted.nonzero().unbind(1)  # (labelled,) each; the one time that this waits for the device
    labels = targets[rows, columns][None]  # (1, labelled), of all rows one behind the other

    def choose(output: Any) -> Tensor:
        # (batch, length, hidden) -> (1, labelled, hidden)
        return output[0].flatten(0, 1).index_select(0, rows * targets.shape[1] + columns)[None]

    head = _Head(language_model, backbone, arguments, labels)
    if head.takes_parts and (output := head.in_parts(choose)) is not None:
        return output

    def run(*args: Any, **kwargs: Any) -> Any:
        output = backbone(*args, **kwargs)
        return _with_hidden(output, choose(output))

    view = _with_parts(language_model, {backbone: _StandIn(backbone, run)})
    return view(**arguments | {"shift_labels": labels}, return_dict=True)


def _columns(targets: Tensor) -> dict[str, Tensor]:
    """Positions of any row's labels, taken in all rows, and the labels there; for a language model that is called as it is."""
    columns = (targets != IGNORED).any(0).nonzero().flatten()  # (kept,)
    labels = targets[:, columns]  # (batch, kept)
    # Two more, without a label: so there are some where there is no label, and a compiler knows that they are several.
    return {
        "logits_to_keep": torch.nn.functional.pad(columns, (0, 2)),
        "shift_labels": torch.nn.functional.pad(labels, (0, 2), value=IGNORED),
    }


def _backbone(language_model: Any) -> Any:
    """The backbone of a language model, where something can stand in for it; else None."""
    inner: Any = unwrapped(language_model)
    names, backbone = _names_used(inner), inner
    # What its `forward` calls: a model of transformers in it, or one in that (OPT calls the decoder of its backbone).
    while isinstance(backbone, PreTrainedModel):
        called = [m for n, m in backbone._modules.items() if n in names and isinstance(m, PreTrainedModel)]
        if len(called) != 1:
            break
        backbone = called[0]
    replaced = any(map(_is_replaced, _path(language_model, inner)))
    # Somebody's own class may take more into its loss than what the head makes of hidden states.
    known = type(inner).__module__.partition(".")[0] == "transformers" or hasattr(inner, "constructor_options")
    return None if backbone is inner or replaced or not known or _captures(inner) else backbone


def _is_replaced(module: nn.Module) -> bool:
    """Whether a call of a module's copy would be one of the module: accelerate's hooks, `module.compile()`."""
    return "forward" in vars(module) or vars(module).get("_compiled_call_impl") is not None


def _captures(inner: Any) -> bool:
    """Whether a language model's `forward` records what its layers give: on those of the very module that it is called on."""
    function: Any = type(inner).forward
    while (
        function is not None and "capture_outputs" not in getattr(function, "__code__", _captures.__code__).co_qualname
    ):
        function = getattr(function, "__wrapped__", None)
    return function is not None


def _path(root: nn.Module, part: nn.Module) -> list[nn.Module]:
    """The modules from `root` down to one of its parts, both included; empty where it is none."""
    if root is part:
        return [root]
    for child in root.children():
        if child is part or any(module is part for module in child.modules()):
            return [root, *_path(child, part)]
    return []


def _with_parts(root: Any, others: Mapping[nn.Module, nn.Module]) -> Any:
    """A module with others in the place of some of its parts; shallow copies lead to these, and nothing is changed."""
    copies: dict[int, Any] = {id(part): other for part, other in others.items()}
    for part in others:
        path = _path(root, part)
        for holder, child in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):  # from the part up
            if id(holder) not in copies:
                copies[id(holder)] = shallow(holder)
            modules = copies[id(holder)]._modules
            modules |= {name: copies[id(child)] for name, each in modules.items() if each is child}
    return copies[id(root)]


class _StandIn(nn.Module):
    """Stands in for a backbone: a call of it is one of `run`, in all else it is the backbone."""

    def __init__(self, backbone: nn.Module, run: Callable[..., Any]):
        super().__init__()
        self.__dict__.update(backbone=backbone, run=run)  # no part of it: it has no weights

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["backbone"], name)  # a language model may ask its backbone for more than a run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def _with_hidden(output: Any, hidden: Tensor, alone: bool = False) -> Any:
    """A backbone's output with other hidden states; these `alone`, without what else it says."""
    if not isinstance(output, ModelOutput):
        return (hidden, *([] if alone else output[1:]))
    return type(output)(**{**({} if alone else output), "last_hidden_state": hidden})


class _Head:
    """What a language model computes behind its backbone, for positions with labels ``(1, labelled)``, some at a time."""

    def __init__(self, language_model: Any, backbone: Any, arguments: dict[str, Any], labels: Tensor):
        self.language_model, self.backbone, self.arguments, self.labels = language_model, backbone, arguments, labels
        self.inner: Any = unwrapped(language_model)
        self.module: Any = self.inner.get_output_embeddings()
        counted = arguments.get("num_items_in_batch")
        self.total = labels.numel() if counted is None else counted  # what the sum of losses is divided by
        self.rows = max(LOGITS_AT_ONCE // self.inner.config.get_text_config().vocab_size, 1)  # logits at once
        self.output: Any = None  # of the backbone

    @property
    def takes_parts(self) -> bool:
        """Whether the labelled positions are too many for logits of all of them, and can be taken apart."""
        if self.labels.numel() <= self.rows or self.module is None:
            return False
        # Sharded weights are whole where the language model itself runs; hooks on weights are for whole gradients.
        odd = any(getattr(self.inner, key, False) for key in ("_is_fsdp_managed_module", "_is_replica"))
        if odd or _ADDS_UP.get(self.inner) == (self.inner.loss_function, False):
            return False
        if any(hasattr(p, "ds_id") or p._backward_hooks for p in self._weights()):
            return False
        place = self.labels.device.type
        half = next(self.inner.parameters()).dtype == torch.float16
        half |= torch.is_autocast_enabled(place) and torch.get_autocast_dtype(place) == torch.float16
        # In float16 gradients are lost unless the loss is scaled, which whoever calls does afterwards.
        return not (half and torch.is_grad_enabled())

    def in_parts(self, choose: Callable[[Any], Tensor]) -> ModelOutput | None:
        """The language model's output, its loss that of parts of the positions that `choose` takes.

        None where the losses of parts do not add up.
        """
        chosen: list[Tensor] = []

        def first(*args: Any, **kwargs: Any) -> Any:
            self.output = self.backbone(*args, **kwargs)
            chosen.append(choose(self.output))
            return _with_hidden(self.output, chosen[0][:, :1])

        # One position without a label: what the language model makes of it is what else is in its loss (that of routers).
        nothing = {"shift_labels": torch.full_like(self.labels[:, :1], IGNORED), "num_items_in_batch": 1}
        parts = {self.backbone: _StandIn(self.backbone, first), self.module: _with_forward(self.module, _quiet)}
        output = _with_parts(self.language_model, parts)(**self.arguments | nothing, return_dict=True)
        hidden = chosen[0]  # (1, labelled, hidden)
        if not self._adds_up(hidden.detach()):
            return None
        if torch.is_grad_enabled():
            loss = _LossInParts.apply(self, hidden, *self._learners(hidden))
        else:
            loss = self.gradients(hidden, [])[0]
        output["loss"] = loss + output.loss
        return output

    def _weights(self) -> list[Tensor]:
        """Weights that logits come from: all of the language model's but its backbone's."""
        inside = {id(module) for module in self.backbone.modules()}
        left = [module for module in self.inner.modules() if id(module) not in inside]
        return list({id(p): p for module in left for p in module._parameters.values() if p is not None}.values())

    def _learners(self, hidden: Tensor) -> list[Tensor]:
        """Weights that get gradients from logits, wherever they lie: a tied head may use what belongs to the embeddings."""
        with torch.enable_grad():
            left, found = [self.loss(hidden[:, :1].detach(), self.labels[:, :1]).grad_fn], dict[int, Tensor]()
        seen: set[Any] = {None}
        while left:
            if (node := left.pop()) in seen:
                continue
            seen.add(node)
            if (weight := getattr(node, "variable", None)) is not None:
                found[id(weight)] = weight
            left += [before for before, _ in node.next_functions]
        return list(found.values())

    def loss(self, hidden: Tensor, labels: Tensor, head: nn.Module | None = None) -> Tensor:
        """What positions ``(1, positions, hidden)`` with labels ``(1, positions)`` add to the loss of all."""
        answer = _StandIn(self.backbone, lambda *_, **__: _with_hidden(self.output, hidden, alone=True))
        view = _with_parts(self.inner, {self.backbone: answer} | ({} if head is None else {self.module: head}))
        options = {"use_cache": False, "output_router_logits": False, "return_dict": True}
        options = {key: value for key, value in options.items() if accepts(self.inner, key)}
        given = {"labels": labels, "shift_labels": labels, "num_items_in_batch": self.total}
        # `forward` itself: hooks on the language model have run, for all positions at once.
        return view.forward(inputs_embeds=hidden, **given, **options).loss

    @torch.no_grad()
    def _adds_up(self, hidden: Tensor) -> bool:
        """Whether the losses of two positions are the loss of both: found once, as something else may be in a loss."""
        function, known = _ADDS_UP.get(self.inner, (None, False))
        if function is not self.inner.loss_function:
            both = self.loss(hidden[:, :2], self.labels[:, :2])
            apart = [self.loss(hidden[:, i : i + 1], self.labels[:, i : i + 1]) for i in range(2)]
            limit = 50 * torch.finfo(hidden.dtype).eps
            known = torch.allclose(both, apart[0] + apart[1], rtol=limit, atol=0)
            if both.isfinite().all():
                _ADDS_UP[self.inner] = self.inner.loss_function, known
        return known

    def gradients(self, hidden: Tensor, weights: Sequence[Tensor]) -> list[Any]:
        """The loss; its gradient by hidden states ``(1, labelled, hidden)``, None where they need none; those by weights."""
        needed = hidden.requires_grad or bool(weights)
        gathered = _Gathered(self.module) if any(p is own for p in weights for own in _own(self.module)) else None
        by_hidden: list[Tensor] = []
        sums: list[Any] = [None] * len(weights)
        total: Any = 0
        for part, labels in zip(hidden.split(self.rows, 1), self.labels.split(self.rows, 1), strict=True):
            with torch.set_grad_enabled(needed):
                rows = part.detach().requires_grad_(hidden.requires_grad)
                loss = self.loss(rows, labels, None if gathered is None else gathered.module)
            total = total + loss.detach()
            if not needed:
                continue
            asked = [*([rows] if hidden.requires_grad else []), *weights]
            found = list(torch.autograd.grad(loss, asked, allow_unused=True))
            by_hidden += [found.pop(0)] if hidden.requires_grad else []
            sums = [a if b is None else (b if a is None else a.add_(b)) for a, b in zip(sums, found, strict=True)]
        if gathered is not None:
            sums = [gathered.sums.pop(id(p), grad) for p, grad in zip(weights, sums, strict=True)]
            gathered.module = None  # which holds it
        return [total, torch.cat(by_hidden, 1) if by_hidden else None, *sums]


def _own(head: Any) -> list[Tensor]:
    """Weights whose gradients can be gathered: of a linear layer that computes with nothing else, in their own dtype."""
    if type(head) is not nn.Linear or set(head._parameters) != {"weight", "bias"} or head._forward_pre_hooks:
        return []  # pruned, normalised by hooks
    plain = not _is_replaced(head) and not torch.is_autocast_enabled(head.weight.device.type)
    return [p for p in head.parameters() if type(p) is nn.Parameter] if plain else []


def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Any:
    """A shallow copy of a module, with its weights and hooks, that runs ``forward(module, *args)``."""
    return shallow(module, forward=functools.partial(forward, module))


@torch.no_grad()
def _quiet(head: nn.Module, *args: Any) -> Any:
    return head.forward(*args)


class _Gathered:
    """A linear layer whose weights' gradients are added up in one tensor each, however often it runs."""

    def __init__(self, head: Any):
        self.sums: dict[int, Tensor] = {}
        self.module = _with_forward(head, lambda head, x: _GatheredLinear.apply(x, head.weight, head.bias, self))

    def add(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right``, ``(rows, positions) @ (positions, columns)``, to a weight's gradient."""
        if id(weight) in self.sums:
            self.sums[id(weight)].addmm_(left, right)
        else:
            self.sums[id(weight)] = left @ right


class _GatheredLinear(torch.autograd.Function):
    """``x @ weight.T + bias``; in the backward pass gradients of weight and bias go to a `_Gathered`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, into: _Gathered) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.into = weight, bias, into
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (positions, vocabulary)
        if ctx.weight.requires_grad:
            ctx.into.add(ctx.weight, rows.T, x.flatten(0, -2))
        if ctx.bias is not None and ctx.bias.requires_grad:
            sums = ctx.into.sums
            sums[id(ctx.bias)] = rows.sum(0) + sums.get(id(ctx.bias), 0)
        return gradient @ ctx.weight if ctx.needs_input_grad[0] else None, None, None, None


class _LossInParts(torch.autograd.Function):
    """The loss added up over parts of the positions; gradients are taken part by part, so that no logits wait for them."""

    @staticmethod
    def forward(ctx: Any, head: _Head, hidden: Tensor, *weights: Tensor) -> Tensor:
        loss, *ctx.gradients = head.gradients(hidden, weights)
        place = hidden.device.type
        ctx.head, ctx.cast = head, (place, torch.get_autocast_dtype(place), torch.is_autocast_enabled(place))
        ctx.save_for_backward(hidden, *weights)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden, *weights = ctx.saved_tensors
        found, ctx.gradients = ctx.gradients, None
        if found is None:  # a second pass: the first one gave them away
            with torch.autocast(*ctx.cast):
                found = ctx.head.gradients(hidden, weights)[1:]
        return None, *(None if x is None else x.mul_(gradient.reshape(())) for x in found)
