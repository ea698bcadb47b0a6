"""The files of a checkpoint: their names, and where they lie, in a folder or in a repository of the Hub at one commit."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import httpx
from transformers.utils import hub

from ..parts.classes import names_repository

CONFIG, GENERATION, PROCESSOR = "config.json", "generation_config.json", "processor_config.json"
ADAPTERS = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPOSITION, DELTA = "composition.json", "composition.safetensors"
TEMPLATES = frozenset(["chat_template.jinja", "chat_template.json"])  # an old one would be read beside a new tokenizer
# JSON files that a load may read, looked at before.
DESCRIPTIONS = (CONFIG, GENERATION, PROCESSOR, "preprocessor_config.json", "tokenizer_config.json", ADAPTERS)
# Those of processors and tokenizers, that transformers reads.
PROCESSOR_FILES = (*DESCRIPTIONS[2:5], "special_tokens_map.json", "added_tokens.json", *sorted(TEMPLATES))
SHARD_OF_MODEL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Of `from_pretrained`: where on the Hub files lie, and where in a repository or a folder.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
PLACES = (*HUB_OPTIONS, "subfolder")
# What `save_pretrained` takes for a push, as in transformers.
HUB_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")
Options = Mapping[str, Any]  # of `from_pretrained` or `save_pretrained`
Bases = Mapping[str, str] | None  # by component a folder or repository to read it from, ``"user/name@revision"``


def weights_pattern(variant: str | None = None) -> re.Pattern:
    """Names of the weight files of a model."""
    part = f"\\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def files_below(folder: str | os.PathLike) -> list[str]:
    """Names of all files in a folder and in those inside, relative to it, with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def picked(options: Options, keys: Iterable[str]) -> dict[str, Any]:
    """Those of some options that are set."""
    return {key: options[key] for key in keys if options.get(key) is not None}


@contextlib.contextmanager
def network_errors_named(what: str) -> Iterator[None]:
    """OSError that says what could not be read, where the Hub fails or no answer comes; its other answers stay as they are."""
    try:
        yield
    except (httpx.HTTPError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500 and status != 429:  # an answer about the repository, which names it
            raise
        cause = error.__cause__ or error
        raise OSError(
            f"{what} could not be read from the Hub ({type(cause).__name__}: {str(cause)[:300]}): try again later; what was "
            "loaded once can be loaded with local_files_only=True."
        ) from error


class CheckpointFiles:
    """Finds the files of one checkpoint, a folder or a repository (OSError: neither); all of a Hub repository's come from one
    commit."""

    def __init__(self, source: str | os.PathLike, options: Options | None = None):
        self.source = os.fspath(source)
        self.is_local = os.path.isdir(self.source)
        if not self.is_local and not names_repository(self.source):
            problem = "is no folder of this machine, and cannot be the id of a repository: check the path."
            raise OSError(f"{self.source} {problem}")
        self.options = picked(options or {}, PLACES)
        self.subfolder: str = self.options.get("subfolder") or ""  # within the source
        self.folder = os.path.join(self.source, self.subfolder)  # where the files lie, of local ones
        resolve = getattr(hub, "resolve_revision", None)  # transformers before 5.23 resolves each file by itself
        if resolve is not None and not self.is_local:
            found = picked(self.options, ("token", "local_files_only", "cache_dir"))
            self.options["revision"] = resolve(self.source, self.options.get("revision"), **found)

    def find(self, name: str) -> str | None:
        """Where a file lies, downloaded if need be; None if the checkpoint has none of that name (OSError: the Hub fails)."""
        if self.is_local:
            path = os.path.join(self.folder, name)
            return path if os.path.isfile(path) else None
        with network_errors_named(f"{self.source}: {name}"):
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
