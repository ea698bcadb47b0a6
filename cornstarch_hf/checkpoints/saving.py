"""How a model is written: staged, described in `composition.json`, swapped in; and the names of its weight files."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .folder_swap import replaced_atomically
from .manifest import COMPOSITION, DELTA, Composition, Entry, read_composition, write_composition

CONFIG, ADAPTERS = "config.json", "adapter_config.json"


@dataclass
class StagedSave:
    """A save that is being written.

    Attributes:
        folder: where to write.
        components: what `composition.json` shall say of the model's parts.
        surplus: further files of the target that shall go.
    """

    folder: str
    components: dict[str, Any] = field(default_factory=dict)
    surplus: set[str] = field(default_factory=set)


@contextlib.contextmanager
def staged_save(folder: str | os.PathLike, variant: str | None = None) -> Iterator[StagedSave]:
    """Save a model: gives the folder to write into, and takes what is to be said of it.

    Weight files of an earlier save go, with all else that it wrote and this one does not; other files stay.

    Args:
        folder: where the checkpoint shall lie.
        variant: as in `save_pretrained`; then files of other variants stay.

    Raises:
        ValueError: adapters around a whole model lie in the folder: who loads it gets them around this model.
        OSError: the disk is full, ...; see `folder_swap.replacing`.
    """
    if os.path.isfile(os.path.join(folder, ADAPTERS)):
        raise ValueError(
            f"{os.fspath(folder)} holds adapters ({ADAPTERS}): whoever loads it would get them around the model that is saved "
            "now. Save into another folder, or remove the adapters first."
        )
    pattern = weights_pattern(variant)
    staged, earlier = StagedSave(""), set[str]()

    def owned(name: str) -> bool:
        old = name in earlier or name in staged.surplus or (name == DELTA and not variant)
        return old or bool(pattern.fullmatch(name))

    with replaced_atomically(folder, CONFIG, owned) as staging:
        staged.folder, before = staging, _earlier_save(folder)
        earlier |= set() if variant or before is None else set(before.manifest)
        yield staged
        write_composition(staging, staged.components, _staying(folder, before, pattern) if variant else None)


def weights_pattern(variant: str | None = None) -> re.Pattern:
    """Names of the weight files of a checkpoint."""
    part = f"\\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def _earlier_save(folder: str | os.PathLike) -> Composition | None:
    path = os.path.join(folder, COMPOSITION)
    if not os.path.isfile(path):
        return None
    try:
        return read_composition(path)
    except ValueError:  # not ours, or of a newer version: only weight files are known to be old ones
        return None


def _staying(folder: str | os.PathLike, before: Composition | None, replaced: re.Pattern) -> dict[str, Entry]:
    """The weight files of other variants that an earlier save described: they stay, and so does what is known of them."""
    described = before.weights() if before is not None else {}
    return {
        name: entry
        for name, entry in described.items()
        if name != DELTA and not replaced.fullmatch(name) and os.path.isfile(os.path.join(folder, name))
    }
