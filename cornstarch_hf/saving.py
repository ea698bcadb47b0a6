"""How a model is written: staged, described in `composition.json`, swapped in; and the names of its weight files."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .manifests import COMPOSITION, DELTA, read_composition, write_composition
from .snapshots import replacing

CONFIG = "config.json"


@dataclass
class Staged:
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
def saving(folder: str | os.PathLike, variant: str | None = None) -> Iterator[Staged]:
    """Save a model: gives the folder to write into, and takes what is to be said of it.

    Weight files of an earlier save go, with all else that it wrote and this one does not; other files stay.

    Args:
        folder: where the checkpoint shall lie.
        variant: as in `save_pretrained`; then files of other variants stay.

    Raises:
        OSError: the disk is full, ...; see `snapshots.replacing`.
    """
    pattern = weights_pattern(variant)
    earlier = set() if variant else _files_of_earlier_save(folder)

    staged = Staged("")

    def owned(name: str) -> bool:
        old = name in earlier or name in staged.surplus or (name == DELTA and not variant)
        return old or bool(pattern.fullmatch(name))

    with replacing(folder, CONFIG, owned) as staging:
        staged.folder = staging
        yield staged
        write_composition(staging, staged.components)


def weights_pattern(variant: str | None = None) -> re.Pattern:
    """Names of the weight files of a checkpoint."""
    part = f"\\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def _files_of_earlier_save(folder: str | os.PathLike) -> set[str]:
    path = os.path.join(folder, COMPOSITION)
    if not os.path.isfile(path):
        return set()
    try:
        return set(read_composition(path).manifest)
    except ValueError:  # not ours, or of a newer version: only weight files are known to be old ones
        return set()
