"""Replace a checkpoint in a folder.  Unlike the package's, a save that is killed while files move leaves old and new ones."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from ...parts.stored_values import POINTER
from ..finding import files_below


@contextlib.contextmanager
def replaced_atomically(folder: str | os.PathLike, head: str, owned: Callable[[str], bool]) -> Iterator[str]:
    """Write a checkpoint into the folder that this gives; on leaving, its files replace the old ones, the head last."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saved-", dir=folder) as staging:
        yield staging
        new = files_below(staging)
        for name in os.listdir(folder):
            if name not in new and owned(name) and os.path.isfile(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))
        for name in sorted(new, key=lambda name: name == head):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.replace(os.path.join(staging, name), os.path.join(folder, name))


def valid_folder(folder: str | os.PathLike, head: str) -> str:
    """The folder in which the valid checkpoint of a local folder lies: another one after an interrupted save of the package."""
    path = os.path.join(folder, head)
    if not os.path.isfile(path):
        return os.fspath(folder)
    with open(path, encoding="utf-8") as file:
        inside = json.load(file).get(POINTER)
    return os.path.join(folder, os.path.basename(inside)) if inside else os.fspath(folder)


def read_between_saves(folder: str, head: str, read: Callable[[], Any]) -> Any:
    return read()
