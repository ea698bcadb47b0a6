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

from ..parts.stored_values import read_json
from .finding import ADAPTERS, COMPOSITION, CONFIG, DELTA, CheckpointFiles, Options, files_below, weights_pattern
from .folder_swap import replaced_atomically, valid_folder

logger = logging.getLogger(__name__)
FORMAT, FORMAT_VERSION = "cornstarch-composition", 1
REMEDY = "Download or copy the checkpoint again, or save it again if the file was changed on purpose."
Embed = bool | Collection[str]  # whether weights are stored, or the names of the components whose are
_ANY_WEIGHTS = re.compile(r".*\.safetensors(\.index(\.\w+)?\.json)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A name, or one in a folder (a modality's tokenizer); neither ".." nor an absolute path.
_FILE = re.compile(r"[\w][\w.\-]{0,199}(/[\w][\w.\-]{0,199})?")
_COMPONENT = re.compile(r"language_model|[a-z][a-z0-9_]{0,63}_encoder")


class Entry(NamedTuple):
    """What a file must be."""

    sha256: str
    size: int


class Composition(NamedTuple):
    """What `composition.json` says."""

    # By name ("vision_encoder", "language_model") a dict whose `source` is "embedded" or "reference", see `references`.
    components: dict[str, dict[str, Any]]
    manifest: dict[str, Entry]  # the model's other files, without code

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """The components whose weights lie in another repository."""
        return {name: entry for name, entry in self.components.items() if entry["source"] == "reference"}

    def weights(self) -> dict[str, Entry]:
        """The files that hold tensors, and the indexes of such files."""
        return {name: entry for name, entry in self.manifest.items() if _ANY_WEIGHTS.fullmatch(name)}


class LoadPlan(NamedTuple):
    """How transformers shall load: from `source`, or where that is None from a `state_dict` among the options."""

    source: str | None
    options: dict[str, Any]
    files: CheckpointFiles | None = None
    guard: Any = contextlib.nullcontext()  # bounds what is built within by what the checkpoint holds
    composition: Composition | None = None  # None in checkpoints of other programs


def components_of(config: Any) -> list[str]:
    """Names of all components, in order."""
    return [*(f"{name}_encoder" for name in config.encoders), "language_model"]


def chosen_components(config: Any, embed: Embed) -> list[str]:
    """The components that are stored as references, not embedded (ValueError for a name that is no component)."""
    every = components_of(config)
    if isinstance(embed, bool):
        return [] if embed else every
    if isinstance(embed, str) or (unknown := sorted(set(embed) - set(every))):
        got = embed if isinstance(embed, str) else unknown
        raise ValueError(f"embed must be True, False or a list with some of {every}, got {got!r}.")
    return [name for name in every if name not in embed]


def write_composition(
    folder: str, components: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Entry] | None = None
) -> Composition:
    """Write `composition.json` about all files that lie in a folder, code excepted, and about `kept` ones elsewhere."""
    # Code is left out: a processor that is saved into the same folder adds its own to it.
    names = [name for name in files_below(folder) if name != COMPOSITION and not name.endswith(".py")]
    manifest = {**(kept or {}), **describe_files({name: os.path.join(folder, name) for name in names})}
    composition = Composition({name: dict(entry) for name, entry in components.items()}, manifest)
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, "components": composition.components}
    values["manifest"] = {name: entry._asdict() for name, entry in manifest.items()}
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
    """Read `composition.json`; ValueError if it is none, was written by a newer version, or says what it must not."""
    try:
        values = read_json(path, COMPOSITION)
    except ValueError as error:
        raise ValueError(f"{error} {REMEDY}") from error
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
                f"{COMPOSITION} describes among its components {name!r:.100} as {entry!r:.100}, not an object."
            )
        if entry.get("source") not in ("embedded", "reference"):
            raise ValueError(
                f"{name} has the source {entry.get('source')!r:.100} in {COMPOSITION}, expected 'embedded' or 'reference'."
            )
    for name, value in manifest.items():
        if not _FILE.fullmatch(name) or not valid_entry(value):
            raise ValueError(
                f"{COMPOSITION}: its manifest lists the file {name!r:.200} as {value!r:.200}, expected a name inside the "
                "checkpoint with its `sha256` and `size`."
            )
    return Composition(components, {name: Entry(**value) for name, value in manifest.items()})


def valid_entry(value: Any) -> bool:
    """Whether a value from JSON says what a file must be: a SHA-256 in hexadecimal and a number of bytes."""
    if not isinstance(value, dict) or set(value) != {"sha256", "size"} or not isinstance(value["sha256"], str):
        return False
    return type(value["size"]) is int and value["size"] >= 0 and bool(_SHA256.fullmatch(value["sha256"]))


def check_sizes(entries: Mapping[str, Entry], find: Callable[[str], str | None], whose: str) -> None:
    """Compare the sizes of files, which `find` finds, with what they must be (FileNotFoundError, ValueError: another size)."""
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


def valid_place(source: Any, options: Options, head: str) -> tuple[Any, dict[str, Any]]:
    """Source and options of `from_pretrained`; after an interrupted save those of the valid files within the source."""
    folder = os.path.join(source, options.get("subfolder") or "")
    if os.path.isdir(folder) and (valid := valid_folder(folder, head)) != folder:
        return valid, {**options, "subfolder": ""}
    return source, dict(options)


def checked_composition(
    files: CheckpointFiles, variant: str | None, verify: bool, wants_info: bool = False
) -> Composition | None:
    """What `composition.json` of a checkpoint says, after its files were compared with that; None where there is none.

    Args:
        verify: whether the hashes of all files are compared, and not only the sizes of weight files.
        wants_info: whether the caller asks what was loaded (`output_loading_info`): a weight file of another size, exchanged
            on purpose, is then a warning.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what was saved; nothing to verify by.
    """
    if (path := files.find(COMPOSITION)) is None:
        if verify:
            raise ValueError(
                f"{files.source} has no {COMPOSITION} to verify it by: save it again or leave out verify=."
            )
        return None
    composition = read_composition(path)
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
    found = files.find_all(entries)
    try:
        (check_hashes if verify else check_sizes)(entries, found.get, files.source)
    except ValueError as error:
        if verify or not wants_info:
            raise
        logger.warning("%s It is read all the same: the loading information says what it holds.", error)
    return composition


@dataclass
class StagedSave:
    """A save that is being written."""

    folder: str  # where to write
    components: dict[str, Any] = field(default_factory=dict)  # for `composition.json`
    surplus: set[str] = field(default_factory=set)  # further files of the target that shall go


@contextlib.contextmanager
def staged_save(folder: str | os.PathLike, variant: str | None = None) -> Iterator[StagedSave]:
    """Save a model into `folder`: gives the folder to write into, and takes what is to be said of it.

    Weight files of an earlier save go, with all else that it wrote and this one does not; other files, and with a
    `variant` those of other variants, stay.  ValueError where adapters around a whole model lie in the folder.
    """
    if os.path.isfile(os.path.join(folder, ADAPTERS)):
        raise ValueError(
            f"{os.fspath(folder)} holds adapters ({ADAPTERS}): whoever loads it would get them around the model that is saved "
            "now. Save into another folder, or remove the adapters first."
        )
    pattern = weights_pattern(variant)
    staged, before = StagedSave(""), Composition({}, {})

    def owned(name: str) -> bool:
        # Changes of an earlier reference checkpoint would be read beside the new weights; a variant is saved beside all.
        earlier = not variant and (name in before.manifest or name == DELTA)
        return earlier or name in staged.surplus or bool(pattern.fullmatch(name))

    with replaced_atomically(folder, CONFIG, owned) as staged.folder:
        path = os.path.join(folder, COMPOSITION)
        if os.path.isfile(path):  # looked at only here: an interrupted save has been finished now
            with contextlib.suppress(ValueError):  # not ours, or of a newer version: only weight files are known as old
                before = read_composition(path)
        yield staged
        # Weight files of other variants stay, and so does what is known of them.
        others = {n: e for n, e in before.weights().items() if variant and n != DELTA and not pattern.fullmatch(n)}
        staying = {n: e for n, e in others.items() if os.path.isfile(os.path.join(folder, n))}
        write_composition(staged.folder, staged.components, staying)
