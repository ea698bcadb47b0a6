"""`composition.json`: where each part's weights lie, and size and hash of every file of a checkpoint.

Reading it decides nothing about a model; `references` loads what it refers to, `finding` finds the files.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .finding import ADAPTERS, ANY_WEIGHTS, COMPOSITION, CONFIG, DELTA, weights_pattern
from .folder_swap import replaced_atomically

logger = logging.getLogger(__name__)
FORMAT, FORMAT_VERSION = "cornstarch-composition", 1
REMEDY = "Download or copy the checkpoint again, or save it again if the file was changed on purpose."
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A name, or one in a folder (a modality's tokenizer); neither ".." nor an absolute path.
_FILE = re.compile(r"[\w][\w.\-]{0,199}(/[\w][\w.\-]{0,199})?")
_COMPONENT = re.compile(r"language_model|[a-z][a-z0-9_]{0,63}_encoder")


class Entry(NamedTuple):
    """What a file must be."""

    sha256: str
    size: int


class Composition(NamedTuple):
    """What `composition.json` says.

    Args:
        components: by name (``vision_encoder``, ``language_model``) a dict whose `source` is ``"embedded"`` or
            ``"reference"``; see `references` for the latter.
        manifest: the model's other files, without code.
    """

    components: dict[str, dict[str, Any]]
    manifest: dict[str, Entry]

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """The components whose weights lie in another repository."""
        return {name: entry for name, entry in self.components.items() if entry["source"] == "reference"}

    def weights(self) -> dict[str, Entry]:
        """The files that hold tensors, and the indexes of such files."""
        return {name: entry for name, entry in self.manifest.items() if ANY_WEIGHTS.fullmatch(name)}


def components_of(config: Any) -> list[str]:
    """Names of all components, in order."""
    return [*(f"{name}_encoder" for name in config.encoders), "language_model"]


def chosen_components(config: Any, embed: bool | Collection[str]) -> list[str]:
    """The components that are stored as references.

    Args:
        embed: True for none of them, False for all, or the names of those whose weights are stored.

    Raises:
        ValueError: a name that is no component.
    """
    every = components_of(config)
    if isinstance(embed, bool):
        return [] if embed else every
    if isinstance(embed, str) or (unknown := sorted(set(embed) - set(every))):
        raise ValueError(
            f"embed must be True, False or a list with some of {every}, got {embed if isinstance(embed, str) else unknown!r}."
        )
    return [name for name in every if name not in embed]


def embedded(config: Any) -> dict[str, dict[str, Any]]:
    """The components of a model that is stored whole."""
    return {name: {"source": "embedded"} for name in components_of(config)}


def write_composition(
    folder: str, components: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Entry] | None = None
) -> Composition:
    """Write `composition.json` about all files that lie in a folder, code excepted, and about `kept` ones elsewhere."""
    names = [os.path.join(root, name) for root, _, found in os.walk(folder) for name in found]
    names = sorted(os.path.relpath(path, folder).replace(os.sep, "/") for path in names)
    # Code is left out: a processor that is saved into the same folder adds its own to it.
    names = [name for name in names if name != COMPOSITION and not name.endswith(".py")]
    manifest = {**(kept or {}), **describe_files({name: os.path.join(folder, name) for name in names})}
    composition = Composition({name: dict(entry) for name, entry in components.items()}, manifest)
    values = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "components": composition.components,
        "manifest": {name: entry._asdict() for name, entry in manifest.items()},
    }
    with open(os.path.join(folder, COMPOSITION), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, sort_keys=True)
        file.write("\n")
    return composition


def describe_files(paths: Mapping[str, str]) -> dict[str, Entry]:
    """Size and SHA-256 of files by name; several are hashed at a time."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        hashes = pool.map(sha256_of, paths.values())
        return {n: Entry(h, os.path.getsize(p)) for (n, p), h in zip(paths.items(), hashes, strict=True)}


def sha256_of(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_composition(path: str) -> Composition:
    """Read `composition.json`.

    Raises:
        ValueError: it is none, was written by a newer version, or says what it must not.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{COMPOSITION} is no JSON ({type(error).__name__}: {error}). {REMEDY}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{COMPOSITION} must say format {FORMAT!r}, got {values!r:.100}.")
    version = values.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{COMPOSITION} has format_version {version!r}, this version of cornstarch_hf reads up to {FORMAT_VERSION}: "
            "upgrade cornstarch_hf."
        )
    components, manifest = values.get("components"), values.get("manifest")
    if not isinstance(components, dict) or not isinstance(manifest, dict):
        raise ValueError(f"{COMPOSITION} must have the objects `components` and `manifest`, got {sorted(values)}.")
    for name, entry in components.items():
        if not _COMPONENT.fullmatch(name) or not isinstance(entry, dict):
            raise ValueError(
                f"{COMPOSITION} describes the component {name!r:.100} as {entry!r:.100}, expected an object."
            )
        if entry.get("source") not in ("embedded", "reference"):
            raise ValueError(
                f"{name} has the source {entry.get('source')!r:.100} in {COMPOSITION}, expected 'embedded' or 'reference'."
            )
    return Composition(components, {name: _entry(name, value) for name, value in manifest.items()})


def _entry(name: str, value: Any) -> Entry:
    """A manifest's entry; a file that would lie outside of the checkpoint is refused."""
    known = isinstance(value, dict) and set(value) == {"sha256", "size"}
    if not _FILE.fullmatch(name) or not known or not valid_entry(value["sha256"], value["size"]):
        raise ValueError(
            f"{COMPOSITION} lists the file {name!r:.200} as {value!r:.200}, expected a name inside the checkpoint with its "
            "`sha256` and `size`."
        )
    return Entry(value["sha256"], value["size"])


def valid_entry(sha256: Any, size: Any) -> bool:
    """Whether these are a SHA-256 in hexadecimal and a number of bytes."""
    natural = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return natural and isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256))


def check_sizes(entries: Mapping[str, Entry], find: Callable[[str], str | None], whose: str) -> None:
    """Compare the sizes of files with what they must be.

    Args:
        entries: the files.
        find: where a file lies, None if nowhere.
        whose: the checkpoint or the component, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another size.
    """
    for name, entry in entries.items():
        path = find(name)
        if path is None or not os.path.isfile(path):
            raise FileNotFoundError(f"{whose}: the file {name} ({entry.size} bytes) is missing. {REMEDY}")
        if (size := os.path.getsize(path)) != entry.size:
            raise ValueError(f"{whose}: {name} has {size} bytes, expected {entry.size} as it was saved. {REMEDY}")


def check_hashes(entries: Mapping[str, Entry], find: Callable[[str], str | None], whose: str) -> None:
    """Compare sizes and hashes of files with what they must be; raises as `check_sizes` does."""
    check_sizes(entries, find, whose)
    got = describe_files({name: str(find(name)) for name in entries})
    for name, entry in entries.items():
        if got[name] != entry:
            raise ValueError(f"{whose}: {name} has the SHA-256 {got[name].sha256}, expected {entry.sha256}. {REMEDY}")


def weights_to_read(composition: Composition, variant: str | None) -> dict[str, Entry]:
    """The weight files that a load will read."""
    pattern = weights_pattern(variant)
    return {n: e for n, e in composition.weights().items() if pattern.fullmatch(n) or n == DELTA}


def first_weights(composition: Composition, variant: str | None) -> str | None:
    """The file with which transformers begins to read weights: the index where there is one."""
    names = [name for name in weights_to_read(composition, variant) if name != DELTA]
    return next((name for name in names if name.endswith(".json")), names[0] if names else None)


def checked_composition(
    files: Any, variant: str | None, verify: bool, asks_what_is_missing: bool = False
) -> Composition | None:
    """What `composition.json` of a checkpoint says, after its files were compared with that; None where there is none.

    Args:
        files: a `finding.CheckpointFiles`.
        variant: as in `from_pretrained`.
        verify: whether the hashes of all files are compared, and not only the sizes of weight files.
        asks_what_is_missing: whether the caller wants to be told what was loaded (`output_loading_info`): a weight file of
            another size, exchanged on purpose, is then a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what was saved; nothing to verify by.
    """
    found = files.find(COMPOSITION)
    if found is None:
        if verify:
            raise ValueError(
                f"{files.source} has no {COMPOSITION} to verify it by: save it again, or leave out verify=."
            )
        return None
    composition = read_composition(found)
    entries = weights_to_read(composition, variant)
    if verify:
        if not composition.references and first_weights(composition, variant) is None:
            which = f" of the variant {variant!r}" if variant else ""
            raise ValueError(
                f"{files.source}: {COMPOSITION} lists no weights{which} to verify: save them again, or leave out verify=."
            )
        # Not the weights of other variants, which nobody reads and may not have been downloaded.
        unread = composition.weights().keys() - entries.keys()
        entries = {name: entry for name, entry in composition.manifest.items() if name not in unread}
    found_files = files.find_all(entries)
    try:
        (check_hashes if verify else check_sizes)(entries, found_files.get, files.source)
    except ValueError as error:
        if verify or not asks_what_is_missing:
            raise
        logger.warning("%s It is read all the same: the loading information says what it holds.", error)
    return composition


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
        OSError: the disk is full, ...; see `folder_swap.replaced_atomically`.
    """
    if os.path.isfile(os.path.join(folder, ADAPTERS)):
        raise ValueError(
            f"{os.fspath(folder)} holds adapters ({ADAPTERS}): whoever loads it would get them around the model that is saved "
            "now. Save into another folder, or remove the adapters first."
        )
    pattern = weights_pattern(variant)
    staged, earlier = StagedSave(""), set[str]()

    def owned(name: str) -> bool:
        # Changes of an earlier reference checkpoint would be read beside the new weights.
        old = name in earlier or name in staged.surplus or (name == DELTA and not variant)
        return old or bool(pattern.fullmatch(name))

    with replaced_atomically(folder, CONFIG, owned) as staging:
        staged.folder, before = staging, _earlier_save(folder)  # only here: an interrupted save has been finished now
        # A variant is saved beside what is there.
        earlier |= set() if variant or before is None else set(before.manifest)
        yield staged
        write_composition(staging, staged.components, _staying(folder, before, pattern) if variant else None)


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
