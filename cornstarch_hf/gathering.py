"""What transformers wants to know of a whole model and only its parts know: ties, plans, layers not to split.

transformers gathers these from direct children; encoders sit one level deeper and PEFT wrappers shift names, so they
are gathered here from the nearest `PreTrainedModel` of every branch, with full dotted prefixes.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapter_tensors import current_name, shared_by_adapters

SETS = ("_no_split_modules", "_skip_keys_device_placement", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
PATTERN_SETS = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
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
    found: dict[str, set[str]] = {key: set() for key in (*SETS, *PATTERN_SETS, "_keys_to_ignore_on_save")}
    for prefix, model in nearest_models(module):
        for key in (*SETS, *PATTERN_SETS):
            found[key] |= set(getattr(model, key, None) or ())
        found["_keys_to_ignore_on_save"] |= {f"{prefix}.{k}" for k in model._keys_to_ignore_on_save or ()}
    return found


def gathered_ties(module: nn.Module) -> dict[str, str]:
    """Tied weights of all parts, ``{target: source}``, by names that the whole model has."""
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    ties = {to: of for to, of in shared_by_adapters(module).items() if to in names}
    for prefix, model in nearest_models(module):
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            to, of = current_name(module, f"{prefix}.{target}"), current_name(module, f"{prefix}.{source}")
            if {to, of} <= names and ties.get(of) != to:
                ties[to] = of
    return ties


def gathered_plans(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Parallelisation plans of all parts, keeping only rules that name something that exists."""
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", n) for n, _ in module.named_modules()}
    names |= {re.sub(r"\.\d+(?=\.|$)", ".*", n) for n, _ in module.named_parameters(remove_duplicate=False)}
    plans: dict[str, dict[Any, Any]] = {key: {} for key in PLANS}
    for prefix, model in nearest_models(module):
        for key in PLANS:
            rules = {_prefixed(prefix, rule): style for rule, style in (getattr(model, key, None) or {}).items()}
            plans[key] |= {rule: style for rule, style in rules.items() if _exists(rule, names)}
        plans["_fsdp_plan"] = _block_rules(prefix, model) | plans["_fsdp_plan"]
    return plans


def _prefixed(prefix: str, rule: Any) -> Any:
    return tuple(_prefixed(prefix, r) for r in rule) if isinstance(rule, tuple) else f"{prefix}.{rule}"


def _exists(rule: Any, names: set[str]) -> bool:
    return all(_exists(r, names) for r in rule) if isinstance(rule, tuple) else rule in names


def _block_rules(prefix: str, model: PreTrainedModel) -> dict[str, str]:
    """One rule per kind of block: encoders inherit FSDP rules that name modules they do not have."""
    blocks = set(model._no_split_modules or ())
    found = {name for name, module in model.named_modules() if type(module).__name__ in blocks}
    return {
        f"{prefix}.{re.sub(r'(^|(?<=[.]))[0-9]+(?=[.]|$)', '*', name)}": "free_full_weight" for name in found if name
    }
