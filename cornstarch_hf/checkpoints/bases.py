"""The bases of reference checkpoints: read a part's own repository at its commit, and compare it with what was saved."""

import contextlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, resolve_revision
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..configuration_multimodal import MultimodalConfig
from ..parts.build_bounds import build_guard
from ..parts.classes import COMMIT, KEYS, is_repo_id, resolve_class
from ..parts.threads import PrivateRandom
from .files import check_files, stored_shapes
from .finding import COMPOSITION, CONFIG, HUB_OPTIONS, INDEX, SHARD_OF_MODEL, WEIGHTS, CheckpointFiles
from .manifest import Entry, check_hashes, check_sizes, describe_files, sha256_of, valid_entry

logger = logging.getLogger(__name__)
# The Hub's cache names large files by their SHA-256; small ones have names of 40 hex digits.
_BLOB = re.compile(r"[0-9a-f]{64}")
# What bases are loaded with, out of the caller's own options.
_OPTIONS = tuple(key for key in HUB_OPTIONS if key != "revision")


class Base(NamedTuple):
    """A part as its own repository holds it: its tensors by the part's names, and what pins them."""

    tensors: dict[str, Tensor]
    entry: dict[str, Any]


def read_base(component: str, origin: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any]) -> Base:
    """Read a part from its own repository, at its commit.

    Args:
        component: its name, for messages.
        origin: as `classes.origin_of` gives it; a `revision` of None means the requested one's, or main's, head.
        dtype: in which its weights are loaded.
        options: `token`, `cache_dir`, ..., `trust_remote_code`.

    Raises:
        ValueError: no safetensors, a class that does not exist or does not fit, a repository that is a composition.
        OSError: the repository, or its commit, cannot be read.
    """
    repo_id = origin["repo_id"]
    with base_errors_explained(component, origin):
        commit = (
            origin.get("revision")
            or resolve_revision(
                repo_id,
                revision=origin.get("requested_revision"),
                **_only(options, ("cache_dir", "local_files_only", "token")),
            ).resolved
        )
        files = CheckpointFiles(
            repo_id, _only(options, _OPTIONS) | {"revision": commit, "subfolder": origin.get("subfolder") or ""}
        )
        pinned, config_file = weight_files_of(files, component), files.find(CONFIG)
    if not COMMIT.fullmatch(str(commit)) or config_file is None:
        raise ValueError(
            f"{component}: the commit of {repo_id!r} is not known ({commit!r}): load it once while the Hub can be reached."
        )
    tensors = part_tensors(component, files, origin, dtype, options)
    entry = {"source": "reference", **{key: origin.get(key) for key in KEYS}, "revision": str(commit)}
    entry |= {"dtype": str(dtype).removeprefix("torch."), "config_sha256": sha256_of(config_file)}
    return Base(tensors, entry | {"weights": {name: value._asdict() for name, value in pinned.items()}})


def weight_files_of(files: CheckpointFiles, component: str) -> dict[str, Entry]:
    """The safetensors files of a base, and their index (ValueError if there are none)."""
    names = [WEIGHTS]
    if files.find(WEIGHTS) is None:
        index = files.find(INDEX)
        if index is None:
            raise ValueError(
                f"{component}: {files.source!r} has no {WEIGHTS}, and a checkpoint refers to safetensors only: store the "
                f"weights, embed=[{component!r}]."
            )
        with open(index, encoding="utf-8") as file:
            # Read as text: nothing but names of shards is taken from it.
            names = [INDEX, *sorted(set(re.findall(SHARD_OF_MODEL, file.read())))]
    return describe_files({name: str(path) for name, path in files.find_all(names).items()})


def part_tensors(
    component: str, files: CheckpointFiles, origin: Mapping[str, Any], dtype: torch.dtype, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a part by its own names, loaded through the class that loads its repository."""
    check_files(files)
    # Weights that the repository lacks are drawn at random: the caller's random state stays as it was.
    with base_errors_explained(component, origin), PrivateRandom():
        config = _base_config(component, files, bool(options.get("trust_remote_code")))
        if isinstance(config, MultimodalConfig):
            raise ValueError(
                f"{component} refers to {files.source!r}, which is a composition itself: refer to the part's own repository."
            )
        cls: Any = resolve_class(origin["class"], config, component)
        with build_guard(stored_shapes(files)):
            root, info = cls.from_pretrained(
                files.source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="eager",  # only weights are wanted: no other kernel need be installed
                output_loading_info=True,
                **files.options,
            )
    try:
        tower = root.get_submodule(origin.get("select") or "")
    except AttributeError as error:
        raise ValueError(f"{component}: {origin['class']} has no part {origin['select']!r}.") from error
    prefix = f"{origin['select']}." if origin.get("select") else ""
    made_up = {str(key).removeprefix(prefix) for key in info["missing_keys"]}  # not in the repository: random
    return {key: tensor for key, tensor in tower.state_dict().items() if key not in made_up}


def _base_config(component: str, files: CheckpointFiles, trusted: bool) -> PreTrainedConfig:
    """The configuration of a base; code of its own is never run unasked, and never asked for at a prompt (ValueError)."""
    try:
        return AutoConfig.from_pretrained(files.source, **files.options, trust_remote_code=trusted)
    except ValueError as error:
        raise ValueError(
            f"{component}: the configuration of its base {files.source!r} cannot be used ({str(error)[:300]}). If it needs "
            f"code of its own, import that first, or pass trust_remote_code=True; or store the weights, embed=[{component!r}]."
        ) from error


def checked_entry(component: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A reference's entry, checked field by field, since a file says it."""
    weights, patterns = entry.get("weights"), entry.get("tensors")
    fine = (
        isinstance(entry.get("repo_id"), str)
        and COMMIT.fullmatch(str(entry.get("revision")))
        and entry.get("dtype") in ("float32", "float16", "bfloat16", "float64")
        and all(isinstance(entry.get(key) or "", str) for key in KEYS)
        and isinstance(weights, dict)
        and all(n in (WEIGHTS, INDEX) or SHARD_OF_MODEL.fullmatch(n) for n in weights)
        and all(isinstance(w, dict) and valid_entry(w.get("sha256"), w.get("size")) for w in weights.values())
        and isinstance(patterns, list)
        and all(isinstance(pattern, str) for pattern in patterns)
    )
    subfolder = str(entry.get("subfolder") or "")
    # The subfolder must not lead out of the repository.
    if not fine or os.path.isabs(subfolder) or ".." in subfolder.split("/"):
        raise ValueError(
            f"{component}: {COMPOSITION} must name a repository, a commit of 40 hex digits, a dtype, weight files with hashes "
            f"and tensors, got {dict(entry)!r:.400}."
        )
    return dict(entry)


def base_files(
    component: str, entry: Mapping[str, Any], given: str | None, options: Mapping[str, Any]
) -> CheckpointFiles:
    """Where a base's files are read: its repository at its commit, or what the caller says."""
    options = _only(options, _OPTIONS) | {"subfolder": entry.get("subfolder") or ""}
    if given is not None and os.path.isdir(given):
        return CheckpointFiles(given, options)
    if given is not None:
        repo_id, _, revision = os.fspath(given).partition("@")
        return CheckpointFiles(repo_id, options | {"revision": revision or None})
    if not is_repo_id(entry["repo_id"]):
        raise ValueError(
            f"{component} refers to {entry['repo_id']!r:.200}, expected the id of a repository: a folder is read only if you "
            f"name it, bases={{{component!r}: folder}}."
        )
    _warn_if_moved(component, entry, options)
    return CheckpointFiles(entry["repo_id"], options | {"revision": entry["revision"]})


def check_base(component: str, entry: Mapping[str, Any], files: CheckpointFiles, verify: bool) -> None:
    """Compare a base's files with what they were when the checkpoint was saved (ValueError, OSError)."""
    whose = f"{component} ({files.source})"
    pinned = {name: Entry(**value) for name, value in entry["weights"].items()}
    with base_errors_explained(component, entry):
        found = files.find_all([*pinned, CONFIG])
    if all(path is None for path in found.values()):
        raise OSError(
            f"{component}: the base {files.source!r} at {entry['revision'][:8]} is not in the local cache, and the Hub may not "
            f"be asked now. Load once while online, or give a folder: bases={{{component!r}: folder}}."
        )
    check_sizes(pinned, found.get, whose)
    # A hash in the name of a cached file is enough, unless all files are to be read.
    unnamed = {n: e for n, e in pinned.items() if verify or _hash_by_name(str(found[n])) is None}
    for name in pinned.keys() - unnamed.keys():
        if _hash_by_name(str(found[name])) != pinned[name].sha256:
            unnamed[name] = pinned[name]  # the name says another hash: the file itself decides
    check_hashes(unnamed, found.get, whose)
    config = found[CONFIG]
    if config is None or sha256_of(config) != entry.get("config_sha256"):
        raise ValueError(f"{whose}: its config.json is not the one with which this checkpoint was saved.")


def _hash_by_name(path: str) -> str | None:
    """The hash by which the Hub's cache names a large file; None for any other file."""
    blob = os.path.basename(os.path.realpath(path))
    return blob if os.path.islink(path) and _BLOB.fullmatch(blob) else None


def _warn_if_moved(component: str, entry: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Say so when the branch that was loaded has moved on; the pinned commit is what is loaded."""
    requested = entry.get("requested_revision") or "main"
    if COMMIT.fullmatch(requested) or constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return
    try:
        now = resolve_revision(entry["repo_id"], revision=requested, **_only(options, ("cache_dir", "token"))).resolved
    except (
        HfHubHTTPError,
        RevisionResolutionError,
        OSError,
    ) as error:  # reading the pinned commit says what is wrong, if anything
        logger.info(
            "%s: cannot ask where %s of %s is now: %s", component, requested, entry["repo_id"], type(error).__name__
        )
        return
    if now != entry["revision"]:
        logger.warning(
            "%s: %s of %s has moved to %s since this checkpoint was saved; the pinned commit %s is loaded.",
            component, requested, entry["repo_id"], str(now)[:8], entry["revision"][:8],
        )  # fmt: skip


@contextlib.contextmanager
def base_errors_explained(component: str, origin: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the Hub that say which component of a checkpoint they concern, and what to do."""
    revision = (origin.get("revision") or origin.get("requested_revision") or "main")[:40]
    where = f"{component}: its base {origin['repo_id']!r} at {revision}"
    remedy = f"give a folder or repository with the same files: bases={{{component!r}: ...}}"
    try:
        yield
    except GatedRepoError as error:
        raise OSError(f"{where} is gated (403): ask for access on its page and pass token=, or {remedy}.") from error
    except RevisionNotFoundError as error:
        raise OSError(f"{where} is not there any more (the commit is gone from its history): {remedy}.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{where} does not exist, or is private (401/404): pass token= of a user who may read it, or {remedy}."
        ) from error
    except (HfHubHTTPError, RevisionResolutionError, OSError) as error:
        raise OSError(f"{where} cannot be read ({type(error).__name__}: {str(error)[:300]}): {remedy}.") from error


def _only(options: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: options[key] for key in keys if options.get(key) is not None}
