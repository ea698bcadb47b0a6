"""Named things that users can add to: projector types, callbacks, feature counts.

A checkpoint holds names only; nothing in it is imported or run.  Every other module looks names up here.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Registry:
    """A mapping from names to objects whose lookup error lists the valid names.

    Args:
        what: how an error calls an entry, e.g. ``"projection type"``.
        remedy: what an error tells the user to do about a missing name.
        entries: that are there from the start.
    """

    def __init__(self, what: str, remedy: str, entries: Mapping[str, Any] | None = None):
        self.what, self.remedy = what, remedy
        self._entries: dict[str, Any] = dict(entries or {})

    def add(self, name: str, entry: Any) -> None:
        """Register `entry`; a name that another entry holds is refused (ValueError)."""
        if not isinstance(name, str) or not name:
            article = "an" if self.what[0] in "aeiou" else "a"
            raise TypeError(f"The name of {article} {self.what} must be a non-empty string, got {name!r}.")
        registered = self._entries.get(name)
        if registered is not None and not _same_definition(registered, entry):
            raise ValueError(
                f"The {self.what} {name!r} is registered already, as something else: register it once, or choose another name."
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
        entries = list(self._entries.items())  # another thread may register something meanwhile
        same = (name for name, value in entries if _target(value) is entry)
        found = next(same, None)
        if found is None and not isinstance(entry, functools.partial):  # a file may be imported twice, once as a copy
            again = (name for name, value in entries if same_text(_target(value), entry))
            found = next(again, None)
        return found


class Callback(NamedTuple):
    """A registered callback: a function, or a `torch.nn.Module` class, and how many features it leaves."""

    target: Callable
    feature_count: Callable | None = None


def _same_definition(registered: Any, entry: Any) -> bool:
    """Whether two entries are one definition that was run again, as when a notebook's cell or a module is reloaded."""
    if registered == entry:
        return True
    if dataclasses.is_dataclass(registered) and type(registered) is type(entry):  # a row: each of its fields
        pairs = zip(vars(registered).values(), vars(entry).values(), strict=True)
        return all(_same_definition(a, b) for a, b in pairs)
    places = [
        (getattr(_target(e), "__module__", None), getattr(_target(e), "__qualname__", "<")) for e in (registered, entry)
    ]
    return (places[0] == places[1] and "<" not in places[0][1]) or same_text(_target(registered), _target(entry))


def same_text(registered: Any, entry: Any) -> bool:
    """Whether two functions or classes of different modules are one definition: a file and its copy in a checkpoint."""
    names = [getattr(target, "__qualname__", "<") for target in (registered, entry)]
    modules = [getattr(target, "__module__", None) for target in (registered, entry)]
    if names[0] != names[1] or "<" in names[0] or modules[0] == modules[1] or None in modules:
        return False
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


PROJECTORS = Registry(
    "projection type",
    "Add your own with register_projector(name, cls) before you load or build, or pass "
    "trust_remote_code=True for a checkpoint that carries it.",
)
CALLBACKS = Registry(
    "callback",
    "Import the module that calls register_callback(name, fn) before you load or build, or "
    "pass trust_remote_code=True for a checkpoint that carries it.",
)
FEATURE_COUNTS = Registry("feature count", "Add one with register_feature_count(modality_or_encoder_type, fn).")


def register_projector(name: str, cls: Callable) -> None:
    """Make a projector class known under a name, for `projection_type=name` and for wrapped instances of the class.

    The constructor's arguments are found by name: ``config`` receives the `MultimodalProjectorConfig`; any other
    argument its field of that name (``in_features``, ``out_features``, ``activation``) or an entry of
    ``config.projection_kwargs``.  An instance that is wrapped by hand is stored with the values of its attributes
    named like the arguments.

    A class may leave fewer features: it then gets ``(items, length, in_features)``, only items of equal length together,
    and returns ``(items, fewer, out_features)``.  With the class attribute ``needs_grid = True`` its `forward` also gets
    ``grid``, ``(height, width)`` or ``(frames, height, width)``.  How many are left is found by a dry run, or by a
    method ``feature_count(length, grid) -> int`` of the class.

    Args:
        name: the projection type.
        cls: a `torch.nn.Module` class that maps ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: another class has that name.
        TypeError: `cls` is not callable.
    """
    if not callable(cls):
        raise TypeError(f"register_projector({name!r}, cls) expects a torch.nn.Module class, got {cls!r}.")
    PROJECTORS.add(name, cls)


def register_callback(name: str, fn: Callable, feature_count: Callable | None = None) -> None:
    """Make a callback storable: checkpoints keep its name and JSON keyword arguments.

    Args:
        name: the name that a checkpoint holds.
        fn: a function, used as it is or bound by `functools.partial(fn, **json_arguments)`; or a `torch.nn.Module`
            class whose instances keep each constructor argument in an attribute of the same name (their parameters
            are saved with the checkpoint).
        feature_count: ``feature_count(inputs, num_features, **arguments) -> int``, the number of features that one
            item has after the callback.  `inputs` holds the item's encoder inputs (leading axis of one item) and
            `num_features` what it had before.  Without it the number is found by a dry run alone.

    Raises:
        ValueError: another callback has that name.
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"register_callback({name!r}, fn) expects a function or a torch.nn.Module class, got {fn!r}.")
    CALLBACKS.add(name, Callback(fn, feature_count))


def register_feature_count(modality_or_encoder_type: str, fn: Callable) -> None:
    """State how many features an item gives, by modality name (looked up first) or by the encoder's `model_type`.

    Args:
        modality_or_encoder_type: e.g. ``"vision"`` or ``"clip_vision_model"``.
        fn: ``fn(inputs, encoder_config) -> int`` for one item: `inputs` holds what its processor made of it (leading
            axis of one item).  The answer is final: callbacks and token reduction are included in it.

    Raises:
        ValueError: another function is registered for it.
        TypeError: `fn` is not callable.
    """
    if not callable(fn):
        raise TypeError(f"register_feature_count({modality_or_encoder_type!r}, fn) expects a function, got {fn!r}.")
    FEATURE_COUNTS.add(modality_or_encoder_type, fn)
