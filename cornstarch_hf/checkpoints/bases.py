"""The bases of reference checkpoints: read a part's own repository at its commit, and compare it with what was saved."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from huggingface_hub import constants, errors, resolve_revision
from torch import Tensor
from transformers import AutoConfig

from ..configuration_multimodal import MultimodalConfig
from ..parts.build_bounds import build_guard
from ..parts.classes import COMMIT, KEYS, is_repo_id, resolve_class
from ..parts.stored_values import read_text
from ..parts.threads import PrivateRandom
from .files import check_files, stored_shapes
from .finding import COMPOSITION, CONFIG, HUB_OPTIONS, INDEX, SHARD_OF_MODEL, WEIGHTS, CheckpointFiles, Options, picked
from .manifest import Entry, check_hashes, check_sizes, describe_files, sha256_of, valid_entry

logger = logging.getLogger(__name__)
_UNREACHABLE = (errors.HfHubHTTPError, errors.RevisionResolutionError, OSError)
# What bases are loaded with, out of the caller's own options.
_OPTIONS = tuple(key for key in HUB_OPTIONS if key != "revision")


class Base(NamedTuple):
    """A part as its own repository holds it: its tensors by the part's names, and what pins them."""

    tensors: dict[str, Tensor]
    entry: dict[str, Any]


def read_base(component: str, origin: Mapping[str, Any], dtype: torch.dtype, options: Options) -> Base:
    """Read a part from its own repository, at its commit; without a `revision` in its `origin`, at the requested one's head.

    Raises:
        ValueError: no safetensors, a class that does not exist or does not fit, a repository that is a composition.
        OSError: the repository, or its commit, cannot be read.
    """
    repo_id, commit = origin["repo_id"], origin.get("revision")
    with base_errors_explained(component, origin):
        if not commit:
            hub = picked(options, ("cache_dir", "local_files_only", "token"))
            commit = resolve_revision(repo_id, revision=origin.get("requested_revision"), **hub).resolved
        places = {"revision": commit, "subfolder": origin.get("subfolder") or ""}
        files = CheckpointFiles(repo_id, picked(options, _OPTIONS) | places)
        pinned, config_file = _weight_files(files, component), files.find(CONFIG)
    if not COMMIT.fullmatch(str(commit)) or config_file is None:
        raise ValueError(
            f"{component}: the commit of {repo_id!r} is not known ({commit!r}): load it once while the Hub can be reached."
        )
    tensors = part_tensors(component, files, origin, dtype, options)
    entry = {"source": "reference", **{key: origin.get(key) for key in KEYS}, "revision": str(commit)}
    entry |= {"dtype": str(dtype).removeprefix("torch."), "config_sha256": sha256_of(config_file)}
    return Base(tensors, entry | {"weights": {name: value._asdict() for name, value in pinned.items()}})


def _weight_files(files: CheckpointFiles, component: str) -> dict[str, Entry]:
    """The safetensors files of a base, and their index (ValueError if there are none)."""
    names = [WEIGHTS]
    if files.find(WEIGHTS) is None:
        if (index := files.find(INDEX)) is None:
            raise ValueError(
                f"{component}: {files.source!r} has no {WEIGHTS}, and a checkpoint refers to safetensors only: store the "
                f"weights, embed=[{component!r}]."
            )
        # Read as text: nothing but names of shards is taken from it.
        text = read_text(index, f"{component}: {files.source}: {INDEX}")
        names = [INDEX, *sorted(set(re.findall(SHARD_OF_MODEL, text)))]
    return describe_files({name: str(path) for name, path in files.find_all(names).items()})


def part_tensors(
    component: str, files: CheckpointFiles, origin: Mapping[str, Any], dtype: torch.dtype, options: Options
) -> dict[str, Tensor]:
    """The tensors of a part by its own names, loaded through the class that loads its repository."""
    check_files(files, options=options)
    # Weights that the repository lacks are drawn at random: the caller's random state stays as it was.
    with base_errors_explained(component, origin), PrivateRandom():
        try:  # code of the base's own is never run unasked, and never asked for at a prompt
            trusted = bool(options.get("trust_remote_code"))
            config = AutoConfig.from_pretrained(files.source, **files.options, trust_remote_code=trusted)
        except ValueError as error:
            raise ValueError(
                f"{component}: the configuration of its base {files.source!r} cannot be used ({str(error)[:300]}). If it "
                "needs code of its own, import that first, or pass trust_remote_code=True; or store the weights, "
                f"embed=[{component!r}]."
            ) from error
        if isinstance(config, MultimodalConfig):
            raise ValueError(
                f"{component} refers to {files.source!r}, which is a composition itself: refer to the part's own repository."
            )
        cls: Any = resolve_class(origin["class"], config, component)
        # Only weights are wanted: no other kernel need be installed.
        wanted = {"dtype": dtype, "use_safetensors": True, "attn_implementation": "eager", "output_loading_info": True}
        with build_guard(stored_shapes(files)):
            root, info = cls.from_pretrained(files.source, config=config, **wanted, **files.options)
    select = origin.get("select") or ""
    try:
        tower = root.get_submodule(select)
    except AttributeError as error:
        raise ValueError(f"{component}: {origin['class']} has no part {select!r}.") from error
    prefix = f"{select}." if select else ""
    made_up = {str(key).removeprefix(prefix) for key in info["missing_keys"]}  # not in the repository: random
    return {key: tensor for key, tensor in tower.state_dict().items() if key not in made_up}


def checked_entry(component: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A reference's entry, checked field by field, since a file says it."""
    weights, patterns = entry.get("weights"), entry.get("tensors")
    subfolder = str(entry.get("subfolder") or "")
    fine = (
        isinstance(entry.get("repo_id"), str)
        and COMMIT.fullmatch(str(entry.get("revision")))
        and entry.get("dtype") in ("float32", "float16", "bfloat16", "float64")
        and all(isinstance(entry.get(key) or "", str) for key in KEYS)
        and not (os.path.isabs(subfolder) or ".." in subfolder.split("/"))  # it must not lead out of the repository
        and isinstance(weights, dict)
        and all(n in (WEIGHTS, INDEX) or SHARD_OF_MODEL.fullmatch(n) for n in weights)
        and all(map(valid_entry, weights.values()))
        and isinstance(patterns, list)
        and all(isinstance(pattern, str) for pattern in patterns)
    )
    if not fine:
        raise ValueError(
            f"{component}: {COMPOSITION} must name a repository, a commit of 40 hex digits, a dtype, weight files with hashes "
            f"and tensors, got {dict(entry)!r:.400}."
        )
    return dict(entry)


def base_files(component: str, entry: Mapping[str, Any], given: str | None, options: Options) -> CheckpointFiles:
    """Where a base's files are read: its repository at its commit, or what the caller says."""
    options = picked(options, _OPTIONS) | {"subfolder": entry.get("subfolder") or ""}
    if given is not None:
        repo_id, _, revision = (given, "", "") if os.path.isdir(given) else os.fspath(given).partition("@")
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
            f"{component}: the base {files.source!r} at {entry['revision'][:8]}, which {COMPOSITION} names, "
            "is not in the local cache, and the Hub may not be asked now. Load once while online, or give a folder: "
            f"bases={{{component!r}: folder}}."
        )
    check_sizes(pinned, found.get, whose)
    # The Hub's cache links to large files by their SHA-256 (to small ones by 40 hex digits).  That name is enough, unless all
    # files are to be read; where it is another one, the file itself decides.
    linked = {n: os.path.basename(os.path.realpath(path)) for n, path in found.items() if path and os.path.islink(path)}
    unsure = {n: entry for n, entry in pinned.items() if verify or linked.get(n) != entry.sha256}
    check_hashes(unsure, found.get, whose)
    config = found[CONFIG]
    if config is None or sha256_of(config) != entry.get("config_sha256"):
        raise ValueError(f"{whose}: its config.json is not the one with which this checkpoint was saved.")


def _warn_if_moved(component: str, entry: Mapping[str, Any], options: Options) -> None:
    """Say so when the branch that was loaded has moved on; the pinned commit is what is loaded."""
    requested, repo_id = entry.get("requested_revision") or "main", entry["repo_id"]
    if COMMIT.fullmatch(requested) or constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return
    try:
        now = resolve_revision(repo_id, revision=requested, **picked(options, ("cache_dir", "token"))).resolved
    except _UNREACHABLE as error:
        # Reading the pinned commit says what is wrong, if anything.
        logger.info("%s: cannot ask where %s of %s is now: %s", component, requested, repo_id, type(error).__name__)
        return
    if now != entry["revision"]:
        logger.warning(
            "%s: %s of %s has moved to %s since this checkpoint was saved; the pinned commit %s is loaded.",
            component, requested, repo_id, str(now)[:8], entry["revision"][:8],
        )  # fmt: skip


@contextlib.contextmanager
def base_errors_explained(component: str, origin: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the Hub that say which component of a checkpoint they concern, and what to do."""
    revision = (origin.get("revision") or origin.get("requested_revision") or "main")[:40]
    remedy = f"give a folder or repository with the same files: bases={{{component!r}: ...}}"
    try:
        yield
    except _UNREACHABLE as error:
        if isinstance(error, errors.GatedRepoError):
            problem = "is gated (403): ask for access on its page and pass token=, or "
        elif isinstance(error, errors.RevisionNotFoundError):
            problem = "is not there any more (the commit is gone from its history): "
        elif isinstance(error, errors.RepositoryNotFoundError):
            problem = "does not exist, or is private (401/404): pass token= of a user who may read it, or "
        else:
            problem = f"cannot be read ({type(error).__name__}: {str(error)[:300]}): "
        where = f"{component}: its base {origin['repo_id']!r} at {revision}"
        raise OSError(f"{where} {problem}{remedy}.") from error
