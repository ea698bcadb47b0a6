"""Replace a checkpoint in a folder so that a kill, a full disk or a power cut leaves the old one or the new one.

The new files are written into a folder beside the target and synced.  That folder then moves into the target, and a pointer
to it is put into the *head*, the JSON file that every loader reads first (`config.json`): from this one rename on the new
checkpoint is valid, whole, in the folder that the head points to.  Its files then take the places of the old ones (hard
links: nothing is copied), and last of all a head without a pointer.  Files that do not belong to the checkpoint stay.
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
from glob import glob
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..parts.stored_values import POINTER, read_json
from .finding import CONFIG, PROCESSOR, files_below

try:
    import fcntl
except ImportError:  # not on this system: then nothing left over is ever removed, only reported
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
HEADS = (CONFIG, PROCESSOR)
_INSIDE = re.compile(r"\.saved-[0-9a-z_]{8,}")
_BETWEEN = (".placing", ".pointing")  # what a killed save may leave of single steps
_LONGEST_BESIDE = (
    230  # bytes of a folder's name, to which the name of the folder beside it adds some; file systems take 255
)


@contextlib.contextmanager
def replaced_atomically(folder: str | os.PathLike, head: str, owned: Callable[[str], bool]) -> Iterator[str]:
    """Write a checkpoint into the folder that this gives; on leaving, it replaces the one in `folder`.

    Args:
        head: name of the JSON file that loaders read first, one of `HEADS`; it must be written.
        owned: whether a file name in `folder` belongs to a checkpoint of this kind, so that an old one goes.

    Raises:
        OSError: disk full, no permission, a file in the place of the folder, ...: the old checkpoint is still there, whole,
            unless the message says that the new one is.
    """
    target = os.path.abspath(folder)
    existed = os.path.isdir(target)
    if os.path.exists(target) and not existed:
        raise NotADirectoryError(f"{target} is a file: give a folder to save into.")
    made = _missing_folders(target)
    os.makedirs(target, exist_ok=True)
    _complete(target, head)
    report_leftovers(target, remove=True)
    parent, name = os.path.split(target)
    # Beside the target if a rename leads from there into it: that needs the right to write, and one file system.
    beside = os.access(parent, os.W_OK) and os.stat(parent).st_dev == os.stat(target).st_dev
    beside = beside and len(os.fsencode(name)) <= _LONGEST_BESIDE
    staging = tempfile.mkdtemp(prefix=f".{name}.saving-" if beside else ".saved-", dir=parent if beside else target)
    inside = os.path.join(target, ".saved-" + os.path.basename(staging).rpartition("-")[2])
    with _locked(staging):
        with _cleaned_up(staging, inside, target, head, existed):
            with _full_disks_told(target):
                yield staging
            # The data is on the disk before anything points to it, and so are the names of folders that were made for it.
            for path in (staging, *map(str, Path(staging).rglob("*")), *map(os.path.dirname, made)):
                _sync(path)
            with _locked(target, wait=True):  # of two saves one comes after the other, whole
                if beside:
                    os.rename(staging, inside)
                _sync(target)  # and so is the folder's new name
                _point(inside, target, head)
                _put_in_place(inside, target, head, owned)
        _finish(inside, target)
    report_leftovers(target, remove=True)


def _complete(target: str, head: str) -> None:
    """Finish a save that was interrupted after it became valid, for the next one may replace a part of it only (a variant)."""
    if pointer_of(os.path.join(target, head)) is None:
        return
    with _locked(target, wait=True):  # a save that runs is waited for
        inside = pointer_of(os.path.join(target, head))
        if inside is not None and os.path.isfile(os.path.join(target, inside, head)):
            _put_in_place(os.path.join(target, inside), target, head, lambda name: False)
            _finish(os.path.join(target, inside), target)


@contextlib.contextmanager
def _cleaned_up(staging: str, inside: str, target: str, head: str, existed: bool) -> Iterator[None]:
    """After a failure what is not valid goes; what is valid already stays, and the error says where."""
    try:
        yield
    except BaseException as error:
        if pointer_of(os.path.join(target, head)) == os.path.basename(inside):
            error.add_note(
                f"The new checkpoint is whole and valid in {inside}; its files could not all take the places of the old "
                "ones. Save again into the same folder once the cause is gone."
            )
        else:
            for path in {staging, inside}:
                shutil.rmtree(path, ignore_errors=True)
            if not existed and not os.listdir(target):
                os.rmdir(target)
        raise


def _missing_folders(target: str) -> list[str]:
    """The folders that are to be made so that there is the target, from the outermost on."""
    missing: list[str] = []
    while not os.path.isdir(target):
        missing.insert(0, target)
        target = os.path.dirname(target)
    return missing


@contextlib.contextmanager
def _full_disks_told(target: str) -> Iterator[None]:
    """OSError, as of any other writer, where the library that writes weights fails for a reason of the system's."""
    try:
        yield
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), f"{os.strerror(int(found[1]))}, while weights were written", target) from error


def read_between_saves(folder: str, head: str, read: Callable[[], Any]) -> Any:
    """What `read` reads of a local folder's checkpoint, all of it from one save.

    Nobody is kept waiting at first.  Where another process saved into the folder meanwhile (each save puts a new head in its
    place), whatever came of it, an error too, is forgotten and read once more, while saves wait.  ValueError where the file
    system has no locks and the checkpoint was replaced again.
    """
    for last in (False, True):
        with _locked(folder, wait=True, shared=True) if last else contextlib.nullcontext():
            before = _state(folder, head)
            try:
                found = read()
            except Exception:
                if last or _state(folder, head) == before:
                    raise
            else:
                if _state(folder, head) == before:
                    return found
        logger.info("%s was saved again while it was read: it is read once more.", folder)
    raise ValueError(f"{folder} was saved again while it was read, and could be mixed of both: load again.")


def _state(folder: str, head: str) -> tuple[int, ...] | None:
    """What differs after each save of a checkpoint; None where there is none."""
    try:
        found = os.stat(os.path.join(folder, head))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def valid_folder(folder: str | os.PathLike, head: str) -> str:
    """The folder with the valid checkpoint of a local folder: itself but after an interrupted save (ValueError: it is gone)."""
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
        "the same folder to put it in its place.", path, inside
    )  # fmt: skip
    return whole


def pointer_of(head: str) -> str | None:
    """The folder that a head file points to, None if it points nowhere or is no JSON object (ValueError: another pointer)."""
    try:
        values = read_json(head, head)
    except (OSError, ValueError):  # whoever loads it says what is wrong with it
        return None
    inside = values.get(POINTER) if isinstance(values, dict) else None
    if inside is not None and not (isinstance(inside, str) and _INSIDE.fullmatch(inside)):
        raise ValueError(
            f"{POINTER} in {head} is {inside!r:.100}: expected the name of a folder of an interrupted save."
        )
    return inside


def report_leftovers(target: str, remove: bool) -> list[str]:
    """Say which folders of killed saves lie about, and return them; `remove` those that no running save holds."""
    parent, name = os.path.split(target)
    pattern = re.compile(re.escape(f".{name}.saving-") + r"[0-9a-z_]{8,}")
    # A folder that is not there, or not to be listed, has nothing of ours in it for `glob`.
    found = [os.path.join(parent, entry) for entry in glob(".*", root_dir=parent) if pattern.fullmatch(entry)]
    if inside := [entry for entry in glob(".*", root_dir=target) if _INSIDE.fullmatch(entry)]:
        kept = {pointer_of(os.path.join(target, head)) for head in HEADS}  # what is valid is no leftover
        found += [os.path.join(target, entry) for entry in inside if entry not in kept]
    left = []
    for path in found:
        with _locked(path) as held:
            if remove and held:
                shutil.rmtree(path, ignore_errors=True)
                logger.warning("Removed %s, which a save that was interrupted had left over.", path)
            elif held or fcntl is None:
                left.append(path)
                logger.warning("%s was left over by an interrupted save; it is not used and can be deleted.", path)
    return left


@contextlib.contextmanager
def _locked(folder: str, wait: bool = False, shared: bool = False) -> Iterator[bool]:
    """Hold a folder by a lock that ends with the process, alone or beside others that share it; says whether it is held."""
    with contextlib.ExitStack() as stack:
        held = False
        # The save of that folder has just ended, another process holds it, or the file system has no locks.
        with contextlib.suppress(OSError):
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
                held = True
        yield held


def _put_in_place(inside: str, target: str, head: str, owned: Callable[[str], bool]) -> None:
    """Give the files of the valid checkpoint in the folder `inside` the places of the old ones."""
    new = [name for name in files_below(inside) if not name.endswith(_BETWEEN)]
    old = [name for name in os.listdir(target) if os.path.isfile(os.path.join(target, name))]
    # Indexes name their shards: they go first and come last, so that no reader finds one beside shards of another save.
    indexes = [name for name in new if name.endswith(".index.json")]
    stale = [name for name in old if owned(name) and name not in new]
    for name in sorted([*indexes, *stale], key=lambda name: not name.endswith(".index.json")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(target, name))
    for name in [*(name for name in new if name not in (*indexes, head)), *indexes, head]:
        if name == head:
            _sync(target)  # the head is last: all that it stands for is in place
        _place(inside, target, name)


def _finish(inside: str, target: str) -> None:
    """Have the new names on the disk, and only then remove the folder from which the files came."""
    try:
        _sync(target)
        shutil.rmtree(inside)
    except BaseException as error:
        error.add_note(
            f"The new checkpoint is whole, valid and in its place in {target}; what failed is its last step, after which "
            f"{os.path.basename(inside)} is left over there. The next save into the same folder removes that."
        )
        raise


def _point(inside: str, target: str, head: str) -> None:
    """Write the head with a pointer and move it to its place: the moment at which the new checkpoint becomes valid."""
    made = os.path.join(inside, head)
    with open(made, encoding="utf-8") as file:
        values = json.load(file)
    pointing = f"{made}{_BETWEEN[1]}"
    with open(pointing, "w", encoding="utf-8") as file:
        json.dump({**values, POINTER: os.path.basename(inside)}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(pointing, os.path.join(target, head))
    _sync(target)


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
        _sync(between)
    os.replace(between, place)


def _sync(path: str) -> None:
    """Have a file's data, or a folder's list of names, on the disk; of folders where the system can open them."""
    if os.name != "nt" or not os.path.isdir(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
