"""Settings of a composition that are no types of values alone: groups of modalities, rules by name, ways of merging."""

from collections.abc import Mapping
from typing import Any


def valid_groups(groups: Any, names: list[str]) -> list[list[str]]:
    """Groups of modalities that see the same items, as lists; ValueError for one that is no such group."""
    groups = groups or []
    for group in [groups] if isinstance(groups, str) else groups:
        if isinstance(group, str) or len(group) < 2 or not set(group) <= set(names):
            raise ValueError(f"share_inputs lists groups of two or more of the modalities {names}, got {group!r}.")
    return [list(group) for group in groups]


def check_rules(values: Mapping[str, Any]) -> None:
    """ValueError for a rule of positions or masks that has no name."""
    for key in ("positions", "mask"):
        rule = values.get(key)
        if rule and not isinstance(rule.get("rule"), str):
            raise ValueError(f'{key} must be {{"rule": name, ...options}}, got {rule!r:.200}.')


def merging_options(layer_features: Any, merge: Any, marks: Any, where: str) -> dict[str, Any]:
    """How one modality's features reach the language model, with ids and rows as integers (ValueError for other values).

    Args:
        layer_features: output field of the encoder with features for the language model's first layers, one tensor per layer.
        merge: ``"add"`` where features are added to the embeddings of their placeholders, which they replace else.
        marks: ``{token_id: row}``: further tokens that stand for rows of a learnt table, the projection's `mark_table` or one
            beside it, in calls with items of this modality.
        where: named in errors.
    """
    if merge not in (None, "add"):
        raise ValueError(f'{where}: merge must be "add" or None, got {merge!r:.100}.')
    if layer_features is not None and not isinstance(layer_features, str):
        raise ValueError(f"{where}: layer_features must name an output field, got {layer_features!r:.100}.")
    try:
        rows = {int(token): int(row) for token, row in (marks or {}).items()}
    except (AttributeError, TypeError, ValueError):
        rows = {-1: 0}
    if any(number < 0 for pair in rows.items() for number in pair):
        raise ValueError(f"{where}: marks must be {{token_id: row}} of integers from 0 on, got {marks!r:.100}.")
    return {"layer_features": layer_features, "merge": merge, "marks": rows}
