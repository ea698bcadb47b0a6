"""A catalogue of tiny encoders of every class: how each is built, what one item is, how items are joined.

A plain module, no tests.  The rows are in `catalog_vision` and `catalog_others`, one `Case` per encoder class of transformers.
Nothing of a class is imported before it is built.
"""

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from shrunk import built, shrunk
from torch import Tensor
from torch.nn.functional import pad

# Tables of rows; CASES were measured and are to compose, MORE are forms beyond those.
TABLES = ("catalog_vision", "catalog_vision_more", "catalog_others")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One encoder class.

    Attributes:
        items: ``fn(i) -> inputs`` of one item, axis 0 having one row (or the item's own patches), by the names of `forward`.
            Even `i` give items that can be joined; odd ones may have another size where the encoder takes any.
        changes: of the configuration, on top of `shrunk`.
        join: ``"stack"``: rows of equal shapes; ``"packed"``: patches one after the other, and so their grids; ``"pad"``:
            zeros on the right of every axis, or what `padding` says; or a function from a list of inputs to inputs.
        padding: the value that pads an input, by name.
        kind: of the modality, where it is not inferred.
        module_kwargs: of `ModalEncoderModule`.
        options: keyword arguments of the model's constructor.
        config: name of the configuration's class, where it is not the model's `config_class`.
        whole: the changes are the whole configuration, where `shrunk` cannot read the class's defaults.
        redraw: draw weights of the size that keeps a signal's, where the class's own initialisation lets it fade to nothing.
        folder: of the class below ``transformers.models``, where several hold one of its name.
    """

    items: Callable[[int], Inputs]
    changes: Mapping = field(default_factory=dict)
    join: str | Callable[[Sequence[Inputs]], Inputs] = "stack"
    padding: Mapping[str, float] = field(default_factory=dict)
    kind: str | None = None
    module_kwargs: Mapping = field(default_factory=dict)
    options: Mapping = field(default_factory=dict)
    config: str | None = None
    whole: bool = False
    redraw: bool = False
    folder: str | None = None


@functools.cache
def cases() -> dict[str, Case]:
    """The rows of all tables, by class name."""
    tables = [importlib.import_module(name) for name in TABLES if importlib.util.find_spec(name)]
    rows = [getattr(table, key, {}) for table in tables for key in ("CASES", "MORE")]
    return {name: case for row in rows for name, case in row.items()}


@functools.cache
def homes() -> dict[str, list[str]]:
    """The modules of transformers that define a class, by its name; found by their text, none is imported."""
    root = Path(importlib.util.find_spec("transformers").origin).parent
    found: dict[str, list[str]] = {}
    for path in sorted(root.glob("models/*/*.py")):
        if path.name.startswith(("modeling_", "configuration_")):
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
                found.setdefault(name, []).append(module)
    return found


def here(names: Iterable[str]) -> list[str]:
    """Those of some classes that this version of transformers has, in order; the newest has all."""
    return sorted(name for name in names if homes().get(name))


def found_class(name: str, folder: str | None = None):
    """A class of transformers by its name.

    Raises:
        LookupError: there is none, or there are several.
    """
    modules = [m for m in homes().get(name, []) if folder in (None, m.split(".")[2])]
    if len(modules) != 1:
        raise LookupError(f"{name}: expected one module of transformers that defines it, found {modules}")
    return getattr(importlib.import_module(modules[0]), name)


def config_of(name: str, case: Case | None = None):
    """The tiny configuration of a class."""
    case = case or cases()[name]
    model_class = found_class(name, case.folder)
    config_class = found_class(case.config) if case.config else model_class.config_class
    return config_class(**case.changes) if case.whole else shrunk(config_class, **case.changes)


def build(name: str, case: Case | None = None, seed: int = 0):
    """A tiny model of a class with random weights, the same each time, in evaluation mode."""
    case = case or cases()[name]
    model = built(found_class(name, case.folder), config_of(name, case), seed, **case.options)
    if case.redraw:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            redraw(model)
            settle_norms(model, joined(name, together(name, case=case), case))
    return model


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Give matrices and kernels a variance of 2 / fan-in (He et al. 2015); vectors stay near what they were."""
    for weight in model.parameters():
        noise = torch.randn(weight.shape)
        if weight.ndim > 1:
            weight.copy_(noise * (2 / weight[0].numel()) ** 0.5)
        else:
            weight.add_(0.1 * noise)


@torch.no_grad()
def settle_norms(model: torch.nn.Module, inputs: Inputs) -> None:
    """Set the statistics of batch norms to those of some inputs."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        momentum = [module.momentum for module in norms]
        for module in norms:
            module.momentum = 1.0
        model.train()(**inputs)
        for module, value in zip(norms, momentum, strict=True):
            module.momentum = value
        model.eval()


def item(name: str, i: int, case: Case | None = None) -> Inputs:
    """Inputs of one item; even `i` give items that can be joined."""
    return (case or cases()[name]).items(i)


def together(name: str, count: int = 3, case: Case | None = None) -> list[Inputs]:
    """Inputs of several items that can be joined, of different sizes where the encoder takes such in one batch."""
    case = case or cases()[name]
    return [case.items(2 * i if case.join == "stack" else i) for i in range(count)]


def joined(name: str, inputs: Sequence[Inputs], case: Case | None = None) -> Inputs:
    """Inputs of several items in one batch."""
    case = case or cases()[name]
    if callable(case.join):
        return case.join(inputs)
    if case.join == "pad":
        inputs = [{key: _padded(x, key, inputs, case.padding) for key, x in one.items()} for one in inputs]
    return {key: torch.cat([one[key] for one in inputs]) for key in inputs[0]}


def _padded(x: Tensor, key: str, inputs: Sequence[Inputs], padding: Mapping[str, float]) -> Tensor:
    sizes = torch.tensor([list(one[key].shape[1:]) for one in inputs]).amax(0).tolist()
    missing = [wanted - have for wanted, have in zip(sizes, x.shape[1:], strict=True)]
    return pad(x, [n for m in reversed(missing) for n in (0, m)], value=padding.get(key, 0))


def floats(i: int, *shape: int) -> Tensor:
    """Random floats, another draw for each `i`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + i))
