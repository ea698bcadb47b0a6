"""What a row of the conversion table is made of: values of a native configuration, projectors, parts.  `table` holds the rows.

Each value reads a setting of the native model's configuration; what stands in a row as it is is that value itself.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..parts.stored_modules import as_json
from ..projectors.native import native_settings

# Names under which towers' configurations count their layers.
_LAYERS = ("num_hidden_layers", "encoder_layers", "depth", "num_layers", "n_layers")


def setting(config: Any, path: str) -> Any:
    """The value at a dotted path of a configuration (ValueError where there is none)."""
    try:
        return functools.reduce(
            lambda at, key: at[key] if isinstance(at, dict) else getattr(at, key), path.split("."), config
        )
    except (AttributeError, KeyError) as error:
        raise ValueError(f"{type(config).__name__} has no setting {path!r}, which its conversion reads.") from error


def _layers(tower: Any) -> int:
    """Layers of a tower, by its configuration."""
    return next(getattr(tower, name) for name in _LAYERS if isinstance(getattr(tower, name, None), int))


@dataclass(frozen=True)
class At:
    """The value of a setting; None where an `optional` one is not there."""

    path: str
    optional: bool = False

    def read(self, config: Any) -> Any:
        try:
            return setting(config, self.path)
        except ValueError:
            if not self.optional:
                raise
            return None


@dataclass(frozen=True)
class Case:
    """What the value of a setting stands for; ValueError for a value that is not listed."""

    path: str
    values: Mapping[Any, Any]

    def read(self, config: Any) -> Any:
        value = setting(config, self.path)
        if value not in self.values:
            raise ValueError(
                f"{self.path}={value!r} of {type(config).__name__} cannot be converted, expected one of {list(self.values)}."
            )
        return self.values[value]


@dataclass(frozen=True)
class HiddenState:
    """The index of a hidden state, or several: of a tower whose last hidden state comes before a norm, -1 is not ours."""

    path: str
    tower: str = "vision_config"

    def read(self, config: Any) -> Any:
        value, layers = setting(config, self.path), _layers(setting(config, self.tower))
        for layer in value if isinstance(value, (list, tuple)) else [value]:
            if not -layers - 1 <= layer <= layers:
                raise ValueError(
                    f"{self.path}={value} of {type(config).__name__}: layer {layer} does not exist, the tower gives "
                    f"{layers + 1} hidden states."
                )
        if isinstance(value, int):
            # Ours names the last hidden state by its place: -1 is what the tower gives after its last norm.
            return layers if value == -1 else value
        return [layers if layer == -1 else layer for layer in value]


@dataclass(frozen=True)
class Inverse:
    """One divided by the value of a setting, as an integer."""

    path: str

    def read(self, config: Any) -> int:
        return int(1 / setting(config, self.path))


@dataclass(frozen=True)
class Ratio:
    """A value divided by another one, each a setting by its path or any other (ValueError where it does not divide)."""

    value: Any
    by: Any
    exact: bool = True  # else the rest is left out

    def read(self, config: Any) -> int:
        value, by = (setting(config, x) if isinstance(x, str) else resolved(x, config) for x in (self.value, self.by))
        if self.exact and value % by:
            raise ValueError(f"{self.value}={value} of {type(config).__name__} is no multiple of {self.by}={by}.")
        return value // by


@dataclass(frozen=True)
class First:
    """The first setting, of several, that a configuration has."""

    paths: Sequence[str]

    def read(self, config: Any) -> Any:
        *others, last = self.paths
        return next((getattr(config, path) for path in others if hasattr(config, path)), None) or setting(config, last)


@dataclass(frozen=True)
class Product:
    """The product of settings, by their paths, and of other values."""

    factors: Sequence[Any]

    def read(self, config: Any) -> int:
        return math.prod(setting(config, f) if isinstance(f, str) else resolved(f, config) for f in self.factors)


@dataclass(frozen=True)
class Sum:
    """The sum of values."""

    terms: Sequence[Any]

    def read(self, config: Any) -> int:
        return sum(resolved(term, config) for term in self.terms)


@dataclass(frozen=True)
class Whole:
    """All of a configuration below, as JSON values."""

    path: str

    def read(self, config: Any) -> dict[str, Any]:
        return as_json(setting(config, self.path).to_dict(), self.path)


@dataclass(frozen=True)
class Entry:
    """One entry of a setting that is a list."""

    path: str
    place: int

    def read(self, config: Any) -> Any:
        return setting(config, self.path)[self.place]


@dataclass(frozen=True)
class Count:
    """How many a setting lists, 1 for a single value."""

    path: str

    def read(self, config: Any) -> int:
        value = setting(config, self.path)
        return len(value) if isinstance(value, (list, tuple)) else 1


@dataclass(frozen=True)
class NativeSettings:
    """What the projector of a native type reads of the configuration."""

    model_type: str

    def read(self, config: Any) -> dict[str, Any]:
        return native_settings(self.model_type, config)


@dataclass(frozen=True)
class Marks:
    """``{token_id: row}`` of tokens for the last `count` rows of a table of a `size`; each is the path of a setting."""

    tokens: str
    size: str
    count: str

    def read(self, config: Any) -> dict[int, int]:
        first = setting(config, self.size) - setting(config, self.count)
        return {token: first + i for i, token in enumerate(setting(config, self.tokens))}


VALUES = (
    At, Case, HiddenState, Inverse, Ratio, First, Product, Count, NativeSettings, Marks, Sum, Whole, Entry,
)  # fmt: skip


def resolved(value: Any, config: Any) -> Any:
    """A value of a row, or a dict or list of such, for one configuration."""
    if isinstance(value, VALUES):
        return value.read(config)
    if isinstance(value, Mapping):
        return {key: resolved(each, config) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolved(each, config) for each in value]
    return value


def settings_for(value: Any, wanted: Any) -> dict[str, Any]:
    """Settings by their paths with which a value of a row reads as `wanted`; none for a value that no setting of its own has.

    The way back of `resolved`; ValueError where no setting gives that.
    """
    if isinstance(value, (At, HiddenState)):
        return {value.path: wanted}
    if isinstance(value, Case):
        found = [key for key, meant in value.values.items() if meant == wanted]
        if not found:
            raise ValueError(f"its {value.path} can only mean one of {list(value.values.values())}, not {wanted!r}")
        return {value.path: found[0]}
    if isinstance(value, Inverse):
        if wanted & (wanted - 1):  # 1 / 3 is no number of floating point, and sizes are multiplied by it
            raise ValueError(f"its {value.path}=1/{wanted} is no exact number, powers of two have one")
        return {value.path: 1 / wanted}
    return {}


@dataclass(frozen=True)
class Projector:
    """A projector of a registered type.

    Attributes:
        kind: the `projection_type`.
        options: its `projection_kwargs` (and `activation`).
        names: its submodules, and the native modules that they are.
        width: of the features that it takes, None for the tower's.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    width: Any = None


@dataclass(frozen=True)
class Step:
    """A registered callback: its name, JSON arguments, and tensors of it by the names of native ones."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One encoder of a native model.

    Attributes:
        tower: dotted name of the module, None for features that come ready.
        kind: of the modality.
        token: setting with the placeholder's id.
        projector: what maps its features.
        layer, output, data_format, drop_prefix, additional_args, input_names: as of `ModalEncoderModule`.
        steps: callbacks by their places.
        shares: name of the part before it whose tower, and whose projector, it uses where it has none of its own.
        shared_steps: places of callbacks that are those of that part.
        width: of ready features.
        layer_features, merge, marks: as of `ModalEncoderModule`.
    """

    tower: str | None
    kind: str
    token: str
    projector: Projector | None = None
    layer: Any = -1
    output: str | None = None
    data_format: str | None = None
    drop_prefix: Any = 0
    additional_args: Sequence[str] = ()
    input_names: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, Step] = field(default_factory=dict)
    shares: str | None = None
    shared_steps: Sequence[str] = ()
    width: Any = None
    layer_features: str | None = None
    merge: str | None = None
    marks: Any = None


@dataclass(frozen=True)
class Native:
    """One native type.

    Attributes:
        architecture: name of its class with a language-model head.
        language_model: dotted name of the text stack, or of the whole causal language model.
        parts: encoders by the names of their modalities.
        plain_head: whether its head is linear whatever the text stack's own ...ForCausalLM class makes of logits.
        scale, softcap: of the logits, where the head is a plain one.
        only: settings, and the only values of them that can be converted.
        positions, mask: rules that the native model follows.
    """

    architecture: str
    language_model: str
    parts: Mapping[str, Part]
    plain_head: bool = False
    scale: Any = None
    softcap: Any = None
    only: Mapping[str, Any] = field(default_factory=dict)
    positions: Mapping[str, Any] | None = None
    mask: Mapping[str, Any] | None = None

    def parts_for(self, config: Any) -> dict[str, Part]:
        """The parts that a configuration has placeholders of, each its own: models for images alone name none for videos."""
        found: dict[str, Part] = {}
        tokens = set()
        for name, part in self.parts.items():
            token = setting(config, part.token) if name == next(iter(self.parts)) else getattr(config, part.token, None)
            if token is not None and token not in tokens:
                found[name] = part
                tokens.add(token)
        return found
