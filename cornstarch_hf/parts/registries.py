"""Named things that users can add to: projector types, callbacks, feature counts, rules of positions and masks.

A checkpoint holds names only; nothing in it is imported or run.  Every other module looks names up here.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

OR_TRUST = "before you load or build, or pass trust_remote_code=True for a checkpoint that carries it."


class Registry:
    """A mapping from names to objects; its errors call an entry `what`, list the valid names and tell the `remedy`."""

    def __init__(self, what: str, remedy: str, entries: Mapping[str, Any] | None = None):
        self.what, self.remedy = what, remedy
        self._entries = dict(entries or {})

    def add(self, name: str, entry: Any) -> None:
        """Register `entry`; a name that another entry holds is refused (ValueError)."""
        if not isinstance(name, str) or not name:
            article = "an" if self.what[0] in "aeiou" else "a"
            raise TypeError(f"The name of {article} {self.what} must be a non-empty string, got {name!r}.")
        registered = self._entries.get(name)
        if registered is not None and not _same_definition(registered, entry):
            raise ValueError(
                f"Another {self.what} {name!r} is registered already: choose another name, or register it once."
            )
        self._entries[name] = entry

    def get(self, name: Any, default: Any = None) -> Any:
        """The entry of that name, or `default`."""
        return self._entries.get(name, default)

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise ValueError(f"Unknown {self.what} {name!r}, expected one of {sorted(self._entries)}. {self.remedy}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def name_of(self, entry: Any) -> str | None:
        """The name under which this very object was registered, or None."""
        targets = [(name, _target(value)) for name, value in list(self._entries.items())]  # threads may add meanwhile
        found = [name for name, target in targets if target is entry]
        if not found and not isinstance(entry, functools.partial):  # a file may be imported twice, once as a copy
            found = [name for name, target in targets if same_text(target, entry)]
        return found[0] if found else None


class Callback(NamedTuple):
    """A registered callback: a function, or a `torch.nn.Module` class, and how many features it leaves."""

    target: Callable
    feature_count: Callable | None = None


def _same_definition(registered: Any, entry: Any) -> bool:
    """Whether two entries are one definition that was run again, as when a notebook's cell or a module is reloaded."""
    if registered == entry:
        return True
    if dataclasses.is_dataclass(registered) and type(registered) is type(entry):  # a row: each of its fields
        return all(map(_same_definition, vars(registered).values(), vars(entry).values()))
    return same_text(_target(registered), _target(entry), again=True)


def same_text(registered: Any, entry: Any, again: bool = False) -> bool:
    """Whether two functions or classes are one definition: a file and its copy in a checkpoint, or a module run `again`."""
    name = getattr(registered, "__qualname__", "<")
    if "<" in name or name != getattr(entry, "__qualname__", "<"):
        return False
    modules = [getattr(target, "__module__", None) for target in (registered, entry)]
    if modules[0] == modules[1] or None in modules:
        return again and modules[0] == modules[1]
    try:
        return inspect.getsource(registered) == inspect.getsource(entry)
    except (OSError, TypeError):
        return False


def _target(entry: Any) -> Any:
    return entry.target if isinstance(entry, Callback) else entry


def last_definition(classes: list) -> list:
    """The classes, or the one imported last where all are one definition: a file and its copies in checkpoints."""
    if len(classes) > 1 and all(same_text(classes[0], cls) for cls in classes[1:]):
        order = list(sys.modules)
        return [max(classes, key=lambda cls: order.index(cls.__module__) if cls.__module__ in order else -1)]
    return classes


PROJECTORS = Registry("projection type", f"Add your own with register_projector(name, cls) {OR_TRUST}")
CALLBACKS = Registry("callback", f"Import the module that calls register_callback(name, fn) {OR_TRUST}")
FEATURE_COUNTS = Registry("feature count", "Add one with register_feature_count(modality_or_encoder_type, fn).")


class Step:
    """What some compositions do between merging and the language model, by the configuration's word for it; here: nothing.

    Files of `language_model/` that only such compositions need put one into `STEPS`, so that what calls them imports none.
    """

    inputs: tuple[str, ...] = ()  # keywords of `forward` that are for this step

    def encoder_options(self, config: Any) -> dict[str, Any]:
        """Keywords of each encoder's `forward`."""
        return {}

    def check(self, model: Any) -> None:
        """Refuse a configuration that does not fit (ValueError)."""

    def before_language_model(self, model: Any, inputs: dict, masks: dict, outputs: dict, past: int) -> dict:
        """Inputs of the language model, of those so far; `masks` of placeholders and `outputs` of encoders by modality."""
        return inputs

    def merge(self, model: Any, name: str, embeds: Any, mask: Any, features: Any, input_ids: Any) -> Any:
        """Embeddings ``(batch, length, hidden)`` with one modality's features where the mask ``(batch, length)`` is set."""
        return embeds

    def after_language_model(self, model: Any, inputs: dict, output: Any, past: int) -> None:
        """Keep with the output what a later call needs."""

    def before_generation(
        self, model: Any, keywords: dict, masks: dict, outputs: dict, past: int, shape: tuple[int, int]
    ) -> dict:
        """Keywords of the steps, of those so far; `shape` is that of the tokens behind the `past` ones in the cache."""
        return keywords

    def before_step(self, model: Any, keywords: dict, past: int, whole: bool) -> None:
        """Look at the keywords of a first step, `whole` with the tokens in the cache among its rows."""


STEPS: dict[str, Any] = {}  # of `Step`, by the configuration's words
# What outputs of encoders can say of items beside their features, by a word for it; `encoders/said_of_items` has it.
ALONE = "alone"  # said of features beside which nothing of the encoder's output is read
SAID: dict[str, Callable[..., dict[str, Any]]] = {ALONE: lambda *_: {}}


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


def step_inputs(config: Any) -> list[str]:
    """Keywords of `forward` that are for the steps which a configuration asks for."""
    return [key for name in config.steps for key in STEPS[name].inputs]


def encoder_options(config: Any, *say: str) -> dict[str, Any]:
    """Keywords of each encoder's `forward` by the steps which a configuration asks for, and what else it is to `say`."""
    options = {key: value for name in config.steps for key, value in STEPS[name].encoder_options(config).items()}
    return options | ({"say": [*options.get("say", []), *say]} if say else {})


def check_steps(model: Any) -> None:
    """ValueError for a composed model that cannot do what its configuration asks for."""
    for name in model.config.steps:
        STEPS[name].check(model)


def register_projector(name: str, cls: Callable) -> None:
    """Make a projector class known under a name, for `projection_type=name` and for wrapped instances of the class.

    The constructor's arguments are found by name: ``config`` receives the `MultimodalProjectorConfig`; any other its field of
    that name (``in_features``, ``out_features``, ``activation``) or an entry of ``config.projection_kwargs``.  Of an instance
    that is wrapped by hand, the attributes named like the arguments are stored.

    A class may leave fewer features: it then gets ``(items, length, in_features)``, only items of equal length together,
    and returns ``(items, fewer, out_features)``, how many is found by a dry run or its method ``feature_count(length, grid)``.
    With the class attribute ``needs_grid = True`` `forward` also gets ``grid``, ``(height, width)`` or with frames before them.

    Args:
        name: the projection type.
        cls: a `torch.nn.Module` class that maps ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: another class has that name.
        TypeError: `cls` is not callable, or a module: its class is registered.
    """
    if not callable(cls) or isinstance(cls, nn.Module):
        remedy = f": register {type(cls).__name__}, its class" if isinstance(cls, nn.Module) else ""
        raise TypeError(f"register_projector({name!r}, cls) expects a torch.nn.Module class, got {cls!r:.200}{remedy}.")
    PROJECTORS.add(name, cls)


def register_callback(name: str, fn: Callable, feature_count: Callable | None = None) -> None:
    """Make a callback storable: checkpoints keep its name and JSON keyword arguments.

    Args:
        name: the name that a checkpoint holds.
        fn: a function, used as it is or bound by `functools.partial(fn, **json_arguments)`; or a `torch.nn.Module` class whose
            instances keep each constructor argument in an attribute of its name (parameters are saved with the checkpoint).
        feature_count: ``feature_count(inputs, num_features, **arguments) -> int``, features of one item after the callback,
            by the encoder's inputs (leading axis of one item) and their number before it.  Without it a dry run counts.

    Raises:
        ValueError: another callback has that name.
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"register_callback({name!r}, fn) expects a function or a torch.nn.Module class, got {fn!r}.")
    CALLBACKS.add(name, Callback(fn, feature_count))


def check_function(caller: str, name: str, fn: Any) -> None:
    """Refuse what cannot be called (TypeError)."""
    if not callable(fn):
        raise TypeError(f"{caller}({name!r}, fn) expects a function, got {fn!r}.")


def register_feature_count(modality_or_encoder_type: str, fn: Callable) -> None:
    """State how many features an item gives, by modality name (looked up first) or by the encoder's `model_type`.

    Args:
        modality_or_encoder_type: e.g. ``"vision"`` or ``"clip_vision_model"``.
        fn: ``fn(inputs, encoder_config) -> int`` for what its processor made of one item (leading axis of one item).  The
            answer is final: it includes callbacks and token reduction.

    Raises:
        ValueError: another function is registered for it.
        TypeError: `fn` is not callable.
    """
    check_function("register_feature_count", modality_or_encoder_type, fn)
    FEATURE_COUNTS.add(modality_or_encoder_type, fn)


def valid_groups(groups: Any, names: list[str]) -> list[Any]:
    """Groups of modalities that see the same items, as lists or dicts; ValueError for one that is no such group."""
    groups = groups or []
    for group in [groups] if isinstance(groups, (str, Mapping)) else groups:
        found = group.get("encoders") if isinstance(group, Mapping) else group
        if isinstance(found, (str, type(None))) or len(found) < 2 or not set(found) <= set(names):
            raise ValueError(f"share_inputs lists groups of two or more of the modalities {names}, got {group!r}.")
    if any(isinstance(group, Mapping) for group in groups):
        return STEPS["join"].valid_groups(groups)
    return [list(group) for group in groups]


def check_rules(values: Mapping[str, Any]) -> None:
    """ValueError for a rule of positions or masks that has no name."""
    for key in ("positions", "mask"):
        rule = values.get(key)
        if rule and not isinstance(rule.get("rule"), str):
            raise ValueError(f'{key} must be {{"rule": name, ...options}}, got {rule!r:.200}.')


# ---- rules of positions and masks, which only some compositions name

POSITION_RULES = Registry("position rule", f"Add your own with register_position_rule(name, fn) {OR_TRUST}")
MASK_RULES = Registry("mask rule", f"Add your own with register_mask_rule(name, fn) {OR_TRUST}")


def register_position_rule(name: str, fn: Callable) -> None:
    """Make a rule of positions known under a name, for ``config.positions = {"rule": name, **options}``.

    Args:
        name: the name that a checkpoint holds.
        fn: ``fn(query, **options) -> positions``, of a `PositionQuery`: int64 ``(axes, batch, length)``, as the language model
            takes them, or ``(batch, length)``.  With the attribute ``text_row = False`` `generate` does not put the positions
            of plain text before the axes, which most models with several axes expect; with ``numbers_text = True`` it is
            asked for text without features too, which the language model else numbers itself; with ``needs_grids = False``
            nobody looks for grids.

    Raises:
        ValueError: another function has that name.
        TypeError: `fn` is not callable.
    """
    check_function("register_position_rule", name, fn)
    POSITION_RULES.add(name, fn)


def register_mask_rule(name: str, fn: Callable) -> None:
    """Make a rule of masks known under a name, for ``config.mask = {"rule": name, **options}``.

    Args:
        name: the name that a checkpoint holds.
        fn: ``fn(types, marks, **options) -> blocks``, of int64 ``(batch, length)`` that is 0 for text and i where the i-th
            modality is seen, and of `token_type_ids` or None: tokens of one block, ``(batch, length)``, attend to each other
            both ways, -1 for none.  With the attribute ``masks_text = True`` it is asked for prompts without features too.

    Raises:
        ValueError: another function has that name.
        TypeError: `fn` is not callable.
    """
    check_function("register_mask_rule", name, fn)
    MASK_RULES.add(name, fn)


def check_rule_options(key: str, rule: Callable, given: int, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """ValueError for options that a rule of ``config.positions`` or ``config.mask`` does not take, lacks or finds wrong.

    Args:
        key: which of both.
        rule: its function; an attribute ``check(names, **options)`` of it says more of their values.
        given: how many arguments it gets besides.
        options: those of the configuration.
        names: the modalities.
    """
    signature = inspect.signature(rule)
    try:
        signature.bind(*[None] * given, **options)
    except TypeError as error:
        takes = list(signature.parameters)[given:]
        raise ValueError(f"{key}: its rule has the options {sorted(options)}, but takes {takes} ({error}).") from error
    if callable(check := getattr(rule, "check", None)):
        check(names, **options)
