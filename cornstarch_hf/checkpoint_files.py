"""The files of a checkpoint, wherever it lies: in a local folder, in the Hub's cache, on the Hub."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import hub

from .manifests import COMPOSITION, DELTA, Composition, Entry, check_hashes, check_sizes, read_composition
from .saving import CONFIG, weights_pattern
from .snapshots import current

HUB_OPTIONS = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder")


class CheckpointFiles:
    """Finds the files of one checkpoint; all of a Hub repository's come from one commit.

    Args:
        source: a folder, or a repository id.
        options: those of `HUB_OPTIONS` are used, as in `from_pretrained`.
    """

    def __init__(self, source: str | os.PathLike, options: Mapping[str, Any]):
        self.source = os.fspath(source)
        self.is_local = os.path.isdir(self.source)
        self.options = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
        resolve = getattr(hub, "resolve_revision", None)  # transformers before 5.23 resolves each file by itself
        if resolve is not None and not self.is_local:
            keys = ("token", "local_files_only", "cache_dir")
            found = {key: self.options[key] for key in keys if key in self.options}
            self.options["revision"] = resolve(self.source, self.options.get("revision"), **found)

    @property
    def folder(self) -> str:
        """The local folder in which the files lie (`subfolder` included); only for local ones."""
        return os.path.join(self.source, self.options.get("subfolder", ""))

    def find(self, name: str) -> str | None:
        """Where a file lies, downloaded if need be; None if the checkpoint has none of that name.

        Raises:
            OSError: the repository or the Hub cannot be reached, by huggingface_hub's own error classes.
        """
        if self.is_local:
            path = os.path.join(self.folder, name)
            return path if os.path.isfile(path) else None
        try:
            return hf_hub_download(self.source, name, **self.options)
        except LocalEntryNotFoundError:
            # Not in the cache: of no weight where nothing else was asked, a failure where the Hub did not answer.
            if constants.HF_HUB_OFFLINE or self.options.get("local_files_only"):
                return None
            raise
        except EntryNotFoundError:
            return None

    def find_all(self, names: Iterable[str]) -> dict[str, str | None]:
        """`find` for several files; those on the Hub are downloaded several at a time."""
        names = list(names)
        if self.is_local:
            return {name: self.find(name) for name in names}
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(self.find, names), strict=True))


def checked_files(
    source: str | os.PathLike, options: Mapping[str, Any], verify: bool
) -> tuple[CheckpointFiles, dict[str, Any], Composition | None]:
    """Find the valid files of a checkpoint and compare them with what was saved.

    Args:
        source: folder or repository id.
        options: of `from_pretrained`.
        verify: whether the hashes of all files are compared, and not only the sizes of weight files.

    Returns:
        the files, the options with which transformers finds the same, and what `composition.json` says; None where there
        is none, as in checkpoints of other programs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what was saved; nothing to verify by.
    """
    options = dict(options)
    folder = os.path.join(source, options.get("subfolder") or "")
    if os.path.isdir(folder) and (valid := current(folder, CONFIG)) != folder:
        source, options["subfolder"] = valid, ""
    files = CheckpointFiles(source, options)
    found = files.find(COMPOSITION)
    if found is None:
        if verify:
            raise ValueError(
                f"{files.source} has no {COMPOSITION} to verify it by: save it again, or leave out verify=."
            )
        return files, options, None
    composition = read_composition(found)
    entries = composition.manifest if verify else _weights(composition, options.get("variant"))
    paths = files.find_all(entries)
    (check_hashes if verify else check_sizes)(entries, paths.get, files.source)
    return files, options, composition


def _weights(composition: Composition, variant: str | None) -> dict[str, Entry]:
    """The weight files that will be read."""
    pattern = weights_pattern(variant)
    return {n: e for n, e in composition.weights().items() if pattern.fullmatch(n) or n == DELTA}


def first_weights(composition: Composition, variant: str | None) -> str | None:
    """The file with which transformers begins to read weights: the index where there is one."""
    names = [name for name in _weights(composition, variant) if name != DELTA]
    return next((name for name in names if name.endswith(".json")), names[0] if names else None)
