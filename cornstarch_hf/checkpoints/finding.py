"""The files of a checkpoint: their names, and where they lie, in a folder or in a repository of the Hub at one commit."""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import hub

CONFIG, GENERATION, PROCESSOR = "config.json", "generation_config.json", "processor_config.json"
ADAPTERS = "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPOSITION, DELTA = "composition.json", "composition.safetensors"
TEMPLATES = frozenset(["chat_template.jinja", "chat_template.json"])  # an old one would be read beside a new tokenizer
# JSON files that a load may read, looked at before.
DESCRIPTIONS = (CONFIG, GENERATION, PROCESSOR, "preprocessor_config.json", "tokenizer_config.json", ADAPTERS)
SHARD_OF_MODEL = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ANY_WEIGHTS = re.compile(r".*\.safetensors(\.index(\.\w+)?\.json)?")
# Of `from_pretrained`: where on the Hub files lie, and where in a repository or a folder.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
PLACES = (*HUB_OPTIONS, "subfolder")
# What `save_pretrained` takes for a push, as in transformers.
HUB_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")


def weights_pattern(variant: str | None = None) -> re.Pattern:
    """Names of the weight files of a model."""
    part = f"\\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json")


def of_variant(name: str, variant: str | None) -> str:
    """The name of a weight file, or of an index of shards, of a variant.

    Raises:
        ValueError: the variant is no plain word.
    """
    if variant is None:
        return name
    if not variant.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"variant must be a plain word, got {variant!r}.")
    stem, _, rest = name.partition(".safetensors")
    # transformers puts the variant behind "index" in an index's name, and before the ending of a weight file.
    return f"{stem}.safetensors.index.{variant}.json" if "index" in rest else f"{stem}.{variant}.safetensors"


class CheckpointFiles:
    """Finds the files of one checkpoint; all of a Hub repository's come from one commit.

    Args:
        source: a folder, or a repository id.
        options: those of `PLACES` are used, as in `from_pretrained`.

    Raises:
        OSError: `source` is neither.
    """

    def __init__(self, source: str | os.PathLike, options: Mapping[str, Any] | None = None):
        self.source = os.fspath(source)
        self.is_local = os.path.isdir(self.source)
        if not self.is_local:
            try:
                validate_repo_id(self.source)
            except HFValidationError as error:
                raise OSError(
                    f"{self.source} is no folder of this machine, and cannot be the id of a repository: check the path."
                ) from error
        given = options or {}
        self.options = {key: given[key] for key in PLACES if given.get(key) is not None}
        resolve = getattr(hub, "resolve_revision", None)  # transformers before 5.23 resolves each file by itself
        if resolve is not None and not self.is_local:
            keys = ("token", "local_files_only", "cache_dir")
            found = {key: self.options[key] for key in keys if key in self.options}
            self.options["revision"] = resolve(self.source, self.options.get("revision"), **found)

    @property
    def subfolder(self) -> str:
        """The folder within the source in which the files lie."""
        return self.options.get("subfolder") or ""

    @property
    def folder(self) -> str:
        """The local folder in which the files lie (`subfolder` included); only for local ones."""
        return os.path.join(self.source, self.subfolder)

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
