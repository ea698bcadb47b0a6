"""One folder to one commit of a repository on the Hub: what goes, what stays away, what is deleted, and what may fail."""

import contextlib
import fnmatch
import getpass
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)
# No part of a checkpoint: leftovers of writers, states of a training run, logs.
NEVER = (
    *(
        ".*",
        "*.tmp",
        "*.tmp.*",
        "training_args.bin",
        "optimizer*",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*",
        "trainer_state.json",
    ),
    *("events.out.*", "*.log", "runs", "checkpoint-*", "global_step*", "__pycache__"),
)
_TEXT = (".json", ".md", ".py", ".jinja", ".yaml", ".yml")
_WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json")  # whatever stands in a vocabulary is no path
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
TRIES = 4


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    stale: Callable[[str], bool],
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a composed model",
    commit_description: str | None = None,
    parent_commit: str | None = None,
) -> CommitInfo:
    """Make a repository hold the files of a folder, in one commit on top of what is there now.

    Args:
        folder: the files; those that are no part of a checkpoint (`NEVER`) stay.
        repo_id: ``"name"`` or ``"user/name"``; made if it does not exist.
        stale: whether a file of the repository that the folder does not have is to be deleted.
        token: of the Hub; by default the one that is stored.
        private: whether a new repository is private.
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead.
        commit_message, commit_description: of the commit.
        parent_commit: the commit that must be the newest one; by default whatever is.

    Raises:
        PermissionError: 401 or 403, told apart in the message.
        FileNotFoundError: 404, no such repository or revision.
        ValueError: somebody committed meanwhile; a file that would give away a path of this machine or a token.
        OSError: the Hub did not answer, after several tries.
    """
    api = HfApi(token=token)
    names = uploadable(folder)
    check_discreet(folder, names, token)
    with explained(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    if parent_commit is not None and info.sha != parent_commit:
        raise _moved(repo_id, parent_commit, info.sha)
    held = {sibling.rfilename for sibling in info.siblings or ()}
    operations: list[Any] = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
    operations += [CommitOperationDelete(name) for name in sorted(held - set(names)) if stale(name)]
    options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    return _commit(api, repo_id, operations, info.sha, options | {"commit_description": commit_description})


def uploadable(folder: str | os.PathLike) -> list[str]:
    """Names of the files of a folder that belong to a checkpoint, relative to it."""
    root = Path(folder)
    names = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    kept = [n for n in names if not any(fnmatch.fnmatch(part, pattern) for part in n.parts for pattern in NEVER)]
    for name in kept:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"{name} is a link that leads out of the folder, so it is not uploaded: put the file itself there."
            )
    return [name.as_posix() for name in kept]


def check_discreet(folder: str | os.PathLike, names: list[str], token: str | bool | None) -> None:
    """Refuse text files that name a place on this machine or hold a token (ValueError that names the file, not the secret)."""
    places = {os.path.expanduser("~"), os.getcwd(), tempfile.gettempdir(), os.fspath(folder), constants.HF_HOME}
    places |= {os.path.realpath(place) for place in places} | {
        f"/home/{getpass.getuser()}",
        f"/Users/{getpass.getuser()}",
    }
    inside = "|".join(re.escape(place) for place in sorted(places) if len(place) > 1)
    path = re.compile(rf"(?<![\w.])({inside})(?![\w.-])")
    secrets = {text for text in (token, get_token()) if isinstance(text, str) and len(text) > 8}
    for name in names:
        if not name.endswith(_TEXT) or os.path.basename(name) in _WORDS:
            continue
        text = Path(folder, name).read_text(encoding="utf-8", errors="replace")
        if _TOKEN.search(text) or any(secret in text for secret in secrets):
            raise ValueError(
                f"{name} holds a token of the Hub, so nothing is uploaded: take it out, and revoke it if it was shared."
            )
        if found := path.search(text):
            line = text[: found.start()].count("\n") + 1
            raise ValueError(
                f"{name}, line {line}, names a place on this machine ({found[1]}...), so nothing is uploaded: take it out of "
                "what you save (configuration, chat template, your own code)."
            )


def _commit(api: HfApi, repo_id: str, operations: list[Any], head: str | None, options: dict[str, Any]) -> CommitInfo:
    """Commit; after an answer that did not come, look whether it was done before trying again."""
    known = _pulls(api, repo_id, options)
    for attempt in range(TRIES):
        try:
            with explained(repo_id, options["revision"]):
                return api.create_commit(repo_id, operations, parent_commit=head, **options)
        except (PermissionError, FileNotFoundError, ValueError):
            raise
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None:
                raise
            logger.warning(
                "%s: no answer to the commit (%s); looking whether it was done.", repo_id, type(error).__name__
            )
            time.sleep(wait)
            if done := _done(api, repo_id, operations, head, known, options):
                return done
            if attempt == TRIES - 1:
                raise OSError(
                    f"{repo_id}: the Hub did not take the commit in {TRIES} tries; nothing was changed. Last: {error}"
                ) from error
            operations = [_again(operation) for operation in operations]
    raise AssertionError("unreachable")


def _again(operation: Any) -> Any:
    """A fresh operation: what a failed commit noted on it is not to be trusted."""
    if isinstance(operation, CommitOperationAdd):
        return CommitOperationAdd(operation.path_in_repo, operation.path_or_fileobj)
    return operation


def _wait(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next try, None for errors that trying again does not mend."""
    response = getattr(error, "response", None)
    if response is None:
        network = isinstance(error, OSError) or type(error).__module__.split(".")[0].startswith("http")
        return 0.5 * 2**attempt if network else None
    if response.status_code != 429 and response.status_code < 500:
        return None
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else 0.5 * 2**attempt


def _pulls(api: HfApi, repo_id: str, options: dict[str, Any]) -> set[str]:
    if not options["create_pr"]:
        return set()
    return {pull.ref for pull in api.list_repo_refs(repo_id, include_pull_requests=True).pull_requests or ()}


def _done(
    api: HfApi, repo_id: str, operations: list[Any], head: str | None, known: set[str], options: dict[str, Any]
) -> CommitInfo | None:
    """The commit, if it was made although no answer came; None if nothing happened.

    Raises:
        ValueError: something else was committed meanwhile.
    """
    with explained(repo_id, options["revision"]):
        new = sorted(_pulls(api, repo_id, options) - known)
        revision = new[-1] if new else options["revision"]
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        if not new and (info.sha == head or options["create_pr"]):
            return None
        commits = api.list_repo_commits(repo_id, revision=revision)
    there = {s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or ()}
    for operation in operations:
        name, wanted = operation.path_in_repo, None
        if isinstance(operation, CommitOperationAdd):
            wanted = {operation.upload_info.sha256.hex(), _git_oid(operation)}
        if (there.get(name) not in wanted) if wanted else (name in there):
            raise _moved(repo_id, head, info.sha)
    if len(commits) < 2 or commits[1].commit_id != head:
        raise _moved(repo_id, head, info.sha)
    url = f"{api.endpoint}/{repo_id}"
    pull = f"{url}/discussions/{new[-1].rpartition('/')[2]}" if new else None
    return CommitInfo(
        commit_url=f"{url}/commit/{info.sha}",
        commit_message=options["commit_message"],
        commit_description=options["commit_description"] or "",
        oid=str(info.sha),
        pr_url=pull,
    )


def _git_oid(operation: CommitOperationAdd) -> str:
    import hashlib

    with operation.as_file() as file:
        data = file.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _moved(repo_id: str, expected: str | None, got: str | None) -> ValueError:
    return ValueError(
        f"{repo_id}: somebody committed meanwhile: expected the newest commit {str(expected)[:8]}, it is {str(got)[:8]}. "
        "Nothing was uploaded: look at that commit, then push again."
    )


@contextlib.contextmanager
def explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Errors of the Hub that tell 401, 403 and 404 apart and name the remedy; the original one is their cause."""
    try:
        validate_repo_id(repo_id)
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r} (404): give a branch, a tag or a commit of it."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            raise PermissionError(
                f"{repo_id}: not logged in, or the token is not valid (401): run `hf auth login`, or pass token=."
            ) from error
        if status == 403:
            raise PermissionError(
                f"{repo_id}: your token may not do this (403): use one with write access to it, ask its owner, push to a "
                "repository of your own, or open a pull request with create_pr=True."
            ) from error
        if status == 404:
            raise FileNotFoundError(
                f"{repo_id} does not exist, or it is private and your token may not see it (404): check its name and the token."
            ) from error
        if status == 412:
            raise ValueError(
                f"{repo_id}: somebody committed meanwhile (412). Nothing was uploaded: look at that commit, then push again."
            ) from error
        raise
