"""Replace a checkpoint in a folder so that a kill, a full disk or a power cut leaves the old one or the new one.

The new files are written into a folder beside the target and synced.  That folder then moves into the target, and a pointer
to it is put into the *head*, the JSON file that every loader reads first (`config.json`): from this one rename on the new
checkpoint is valid, whole, in the folder that the head points to.  Its files then take the places of the old ones (hard
links: nothing is copied), and last of all a head without a pointer.  Files that do not belong to the checkpoint stay.
What is saved, and how it is loaded, is the business of other modules.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator

from ..parts.stored_values import POINTER
from .finding import CONFIG, PROCESSOR

try:
    import fcntl
except ImportError:  # not on this system: then nothing left over is ever removed, only reported
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
HEADS = (CONFIG, PROCESSOR)
_INSIDE = re.compile(r"\.saved-[0-9a-z_]{8,}")
_BETWEEN = (".placing", ".pointing")  # what a killed save may leave of single steps
# Indexes name their shards: they go first and come last, so that no reader finds one beside shards of another save.
_INDEX = re.compile(r".*\.index\.json")


@contextlib.contextmanager
def replaced_atomically(folder: str | os.PathLike, head: str, owned: Callable[[str], bool]) -> Iterator[str]:
    """Write a checkpoint into the folder that this gives; on leaving, it replaces the one in `folder`.

    Args:
        folder: where the checkpoint shall lie; made if it does not exist.
        head: name of the JSON file that loaders read first, one of `HEADS`; it must be written.
        owned: whether a file name in `folder` belongs to a checkpoint of this kind, so that an old one goes.

    Raises:
        OSError: disk full, no permission, ...: the old checkpoint is still there, whole, unless the message says that
            the new one is.
        NotADirectoryError: `folder` is a file.
    """
    target = os.path.abspath(os.fspath(folder))
    if os.path.exists(target) and not os.path.isdir(target):
        raise NotADirectoryError(f"{target} is a file: give a folder to save into.")
    existed = os.path.isdir(target)
    os.makedirs(target, exist_ok=True)
    _complete(target, head)
    report_leftovers(target, remove=True)
    staging = _staging_folder(target)
    inside = os.path.join(target, ".saved-" + os.path.basename(staging).rpartition("-")[2])
    lock = _locked(staging)
    try:
        yield staging
        _sync_tree(staging)  # the data is on the disk before anything points to it
        with _alone(target):
            if inside != staging:
                os.rename(staging, inside)
            _sync_folder(target)  # and so is the folder's new name
            _point(inside, target, head)
            _put_in_place(inside, target, head, owned)
    except BaseException as error:
        _clean_up(staging, inside, target, head, existed, error)
        raise
    finally:
        _unlock(lock)
    report_leftovers(target, remove=True)


def _complete(target: str, head: str) -> None:
    """Finish a save that was interrupted after it became valid, for the next one may replace a part of it only (a variant)."""
    if pointer_of(os.path.join(target, head)) is None:
        return
    with _alone(target):  # one that runs is waited for
        inside = pointer_of(os.path.join(target, head))
        if inside is not None and os.path.isfile(os.path.join(target, inside, head)):
            for name in _files(os.path.join(target, inside)):
                if name.endswith(_BETWEEN):
                    os.remove(os.path.join(target, inside, name))
            _put_in_place(os.path.join(target, inside), target, head, lambda name: False)


def _clean_up(staging: str, inside: str, target: str, head: str, existed: bool, error: BaseException) -> None:
    """After a failure: what is not valid goes; what is valid already stays, and the error says where."""
    if pointer_of(os.path.join(target, head)) == os.path.basename(inside):
        error.add_note(
            f"The new checkpoint is whole and valid in {inside}; its files could not all take the places of the old ones. "
            "Save again into the same folder once the cause is gone."
        )
        return
    for path in {staging, inside}:
        shutil.rmtree(path, ignore_errors=True)
    if not existed and not os.listdir(target):
        os.rmdir(target)


def valid_folder(folder: str | os.PathLike, head: str) -> str:
    """The folder in which the valid checkpoint of a local folder lies: the folder itself but after an interrupted save.

    Raises:
        ValueError: the head points to a folder that is not there.
    """
    path = os.fspath(folder)
    inside = pointer_of(os.path.join(path, head))
    report_leftovers(os.path.abspath(path), remove=False)
    if inside is None:
        return path
    whole = os.path.join(path, inside)
    if not os.path.isfile(os.path.join(whole, head)):
        raise ValueError(
            f"{head} in {path} says that the checkpoint lies in its folder {inside}, which is not there: an interrupted save "
            "was moved or uploaded in part. Copy the whole folder, or save again."
        )
    logger.warning(
        "The last save into %s was interrupted after it was complete: the new checkpoint is read from %s. Save again into "
        "the same folder to put it in its place.",
        path,
        inside,
    )
    return whole


def pointer_of(head: str) -> str | None:
    """The folder that a head file points to, None if it points nowhere or is no JSON object.

    Raises:
        ValueError: the pointer is no name of a folder that an interrupted save leaves.
    """
    try:
        with open(head, encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError, RecursionError):  # whoever loads it says what is wrong with it
        return None
    inside = values.get(POINTER) if isinstance(values, dict) else None
    if inside is not None and not (isinstance(inside, str) and _INSIDE.fullmatch(inside)):
        raise ValueError(
            f"{POINTER} in {head} is {inside!r:.100}: expected the name of a folder of an interrupted save."
        )
    return inside


def report_leftovers(target: str, remove: bool) -> list[str]:
    """Say which folders of killed saves lie about; `remove` those that no running save holds.

    Returns:
        the folders that are left.
    """
    parent, name = os.path.split(target)
    pattern = re.compile(re.escape(f".{name}.saving-") + r"[0-9a-z_]{8,}")
    found = [entry.path for entry in _entries(parent) if pattern.fullmatch(entry.name)]
    if inside := [entry for entry in _entries(target) if _INSIDE.fullmatch(entry.name)]:
        kept = {pointer_of(os.path.join(target, head)) for head in HEADS}  # what is valid is no leftover
        found += [entry.path for entry in inside if entry.name not in kept]
    left = []
    for path in found:
        lock = _locked(path)
        if remove and lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            logger.warning("Removed %s, which a save that was interrupted had left over.", path)
        elif lock is not None or fcntl is None:
            left.append(path)
            logger.warning("%s was left over by an interrupted save; it is not used and can be deleted.", path)
        _unlock(lock)
    return left


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # not there, or not to be listed: nothing of ours is found in it
        return []


def _staging_folder(target: str) -> str:
    """A new folder beside the target, or inside where there is no way from there into the target."""
    parent, name = os.path.split(target)
    # A rename needs the right to write, and both folders on one file system.
    if os.access(parent, os.W_OK) and os.stat(parent).st_dev == os.stat(target).st_dev:
        return tempfile.mkdtemp(prefix=f".{name}.saving-", dir=parent)
    return tempfile.mkdtemp(prefix=".saved-", dir=target)


def _locked(folder: str) -> int | None:
    """A lock on a folder that ends with the process; None if another one holds it, or the system has no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its save has just ended
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _alone(target: str) -> Iterator[None]:
    """Wait until no other process puts files into this folder: of two saves one comes after the other, whole."""
    descriptor = os.open(target, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _unlock(descriptor)


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _put_in_place(inside: str, target: str, head: str, owned: Callable[[str], bool]) -> None:
    """Give the files of the valid checkpoint in the folder `inside` the places of the old ones, then remove that folder."""
    new = _files(inside)
    stale = [
        entry.name for entry in _entries(target) if entry.is_file() and owned(entry.name) and entry.name not in new
    ]
    for name in sorted(stale, key=lambda name: not _INDEX.fullmatch(name)):
        os.remove(os.path.join(target, name))
    indexes = [name for name in new if _INDEX.fullmatch(name)]
    for name in indexes:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(target, name))
    for name in [*(n for n in new if n != head and n not in indexes), *indexes, head]:
        if name == head:
            _sync_folder(target)  # the head is last: all that it stands for is in place
        _place(inside, target, name)
    _sync_folder(target)
    shutil.rmtree(inside)


def _point(inside: str, target: str, head: str) -> None:
    """Write the head with a pointer and move it to its place: the moment at which the new checkpoint becomes valid."""
    made, place = os.path.join(inside, head), os.path.join(target, head)
    with open(made, encoding="utf-8") as file:
        values = json.load(file)
    pointing = f"{made}{_BETWEEN[1]}"
    with open(pointing, "w", encoding="utf-8") as file:
        json.dump({**values, POINTER: os.path.basename(inside)}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointing, place)
    _sync_folder(target)


def _place(inside: str, target: str, name: str) -> None:
    """Put one file in its place in one step: a second name for it, where the file system has such, else a copy."""
    source, place = os.path.join(inside, name), os.path.join(target, name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    between = f"{source}{_BETWEEN[0]}"
    if os.path.exists(place) and os.path.samefile(source, place):
        return  # by a save that was interrupted after this step
    with contextlib.suppress(FileNotFoundError):
        os.remove(between)
    try:
        os.link(source, between)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):  # a copy would fail in the same way
            raise
        shutil.copy2(source, between)
        _sync_file(between)
    os.replace(between, place)


def _files(folder: str) -> list[str]:
    """Names of all files of a checkpoint in a folder and below, relative to it."""
    found = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    found = [path for path in found if not path.endswith(_BETWEEN)]
    return sorted(os.path.relpath(path, folder) for path in found)


def _sync_tree(folder: str) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            _sync_file(os.path.join(root, name))
        _sync_folder(root)


def _sync_file(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    """Sync a folder's list of names, where the system can open folders."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
