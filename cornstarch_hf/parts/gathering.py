"""What transformers wants to know of a whole model and only its parts know: ties, plans, layers not to split.

transformers gathers these from direct children; encoders sit one level deeper and PEFT wrappers shift names, so here they
come from the nearest `PreTrainedModel` of every branch, with full dotted prefixes.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import current_name, shared_by_adapters, unwrapped
from .names import modules_by_name, parameters_by_name, starred
from .weightless import KeepsInitialized

# Class names and regular expressions, which need no prefix.
SETS = (
    *("_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
    *("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"),
)
PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")


def nearest_models(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    """The `PreTrainedModel`s below a module that have no other one between, with their dotted names."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, PreTrainedModel):
            yield path, child
        else:
            yield from nearest_models(child, path + ".")


def gathered_sets(module: nn.Module) -> dict[str, set[str]]:
    """Union of the parts' sets of module and key names, by attribute."""
    parts = list(nearest_models(module))
    found = {key: {value for _, model in parts for value in getattr(model, key, None) or ()} for key in SETS}
    ignored = {f"{prefix}.{key}" for prefix, model in parts for key in model._keys_to_ignore_on_save or ()}
    return found | {"_keys_to_ignore_on_save": ignored}


def gathered_ties(module: nn.Module) -> dict[str, str]:
    """Tied weights of all parts, ``{target: source}``, by names that the whole model has."""
    # PEFT forwards its model's ties with a wrong prefix, and transformers fails on a name that nothing has.
    names = {name for name, _ in parameters_by_name(module)}
    ties = {to: of for to, of in shared_by_adapters(module).items() if to in names}
    for prefix, model in nearest_models(module):
        for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            to, of = (current_name(module, f"{prefix}.{key}") for key in pair)
            if {to, of} <= names and ties.get(of) != to:  # never a circle of two
                ties[to] = of
    return {to: of for to, of in ties.items() if to not in getattr(module, "_untied", ())}


def untied_weights(module: nn.Module) -> frozenset[str]:
    """Weights that by a part's configuration are another's, but are a tensor of their own at the moment."""
    live = {name: value for name, value in parameters_by_name(module) if not value.is_meta}
    ties = gathered_ties(module)
    return frozenset(to for to, of in ties.items() if to in live and of in live and live[to] is not live[of])


def gathered_plans(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Parallelisation plans of all parts, keeping only rules that name something that exists."""
    plans: dict[str, dict[Any, Any]] = {key: {} for key in PLANS}
    for prefix, model in nearest_models(module):
        for key in PLANS:
            rules = (getattr(model, key, None) or {}).items()
            plans[key] |= {_prefixed(prefix, rule): style for rule, style in rules if _exists(rule, model)}
        # CLIP and Whisper inherit FSDP rules for modules that they do not have: one rule per kind of block replaces them.
        kinds = set(model._no_split_modules or ())
        blocks = [name for name, module in modules_by_name(model) if name and type(module).__name__ in kinds]
        by_kind = dict.fromkeys((prefix + starred(f".{name}") for name in blocks), "free_full_weight")
        plans["_fsdp_plan"] = by_kind | plans["_fsdp_plan"]
    return plans


def _prefixed(prefix: str, rule: Any) -> Any:
    return tuple(_prefixed(prefix, r) for r in rule) if isinstance(rule, tuple) else f"{prefix}.{rule}"


def _exists(rule: Any, model: nn.Module) -> bool:
    """Whether a rule names modules or parameters of a model, ``*`` for any number; of a tuple, all of it."""
    if isinstance(rule, tuple):
        return all(_exists(r, model) for r in rule)
    found: list[Any] = [model]
    for key in rule.split("."):  # a walk down the rule's path: faster than to match the names of thousands of modules
        held = [p for owner in found if isinstance(owner, nn.Module) for p in (owner._modules, owner._parameters)]
        found = [x for places in held for name, x in places.items() if name == key or (key == "*" and name.isdigit())]
    return any(x is not None for x in found)


class GatheringMixin(PreTrainedModel):
    """What transformers asks of a whole composed model, answered by its parts."""

    config: Any
    language_model: Any
    input_modalities: Any

    def init_parallel_plans(self) -> None:
        """Gather the parts' parallelisation plans, by names that this model has."""
        super().init_parallel_plans()
        for key, plan in gathered_plans(self).items():
            setattr(self, key, plan)

    def init_weights(self) -> None:
        """Gather what else the parts know, then initialise and tie as in transformers."""
        # Here, since `post_init` has collected from the direct children by now and does not look again.
        for key, values in gathered_sets(self).items():
            setattr(self, key, values)
        self.all_tied_weights_keys = gathered_ties(self)
        super().init_weights()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tied weights of all parts by names that exist, adapters in front of them or not."""
        return gathered_ties(self) if all_submodels else {}

    def initialize_weights(self) -> None:
        """Initialise what was not loaded, each part as its own class does."""
        # transformers treats models from outside as custom code and then leaves out modules without parameters of their
        # own, among them those that fill the buffers of transformers' own parts.
        parts = [part for _, part in nearest_models(self)]
        for part in parts:  # a supplied part is marked as initialised from top to bottom, and is skipped
            if not all(getattr(module, "_is_hf_initialized", False) for module in part.modules()):
                part.initialize_weights()
        with torch.no_grad(), KeepsInitialized():
            for module in _outside(self, set(map(id, parts))):  # wrappers, adapters and a user's callbacks
                self._initialize_weights(module, is_custom_code=self.is_custom_code())

    def _inherit_from_language_model(self, supplied: bool) -> None:
        """Take over those traits of the parts that transformers reads on the whole."""
        inner = unwrapped(self.language_model)
        kinds = dict.fromkeys(self.config.modality(name)["kind"] for name in self.config.encoders)
        self.input_modalities = (*kinds, *(() if "text" in kinds else ("text",)))
        self._is_stateful = inner._is_stateful
        self._can_compile_fullgraph = inner._can_compile_fullgraph
        if supplied and inner.generation_config is not None:
            self.generation_config = copy.deepcopy(inner.generation_config)


def _outside(module: nn.Module, parts: set[int]) -> Iterator[nn.Module]:
    """A module and those below it that are neither one of the parts nor inside of one, children first."""
    for child in module.children():
        if id(child) not in parts:
            yield from _outside(child, parts)
    yield module
