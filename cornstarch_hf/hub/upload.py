"""One folder to one commit of a repository on the Hub: what goes, what stays away, what is deleted, and what may fail."""

import contextlib
import fnmatch
import getpass
import logging
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)
# No part of a checkpoint: leftovers of writers, states of a training run, logs.
NEVER = (
    *(".*", "*.tmp", "*.tmp.*", "training_args.bin", "optimizer*.pt", "optimizer*.bin", "optimizer_[0-9]*"),
    *("scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", "events.out.*", "*.log", "runs"),
    *("checkpoint-*", "global_step*", "__pycache__"),
)
# Not text: not searched for paths and tokens.
_BINARY = (".safetensors", ".bin", ".pt", ".pth", ".model", ".npz", ".npy", ".onnx", ".png", ".jpg")
# Whatever stands in a vocabulary is no path.
_WORDS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}\b")
TRIES = 4  # 0.5, 1 and 2 seconds apart, unless the Hub asks for another time
PULL_REQUESTS = 10  # the newest ones, among which ours is looked for when the answer to a commit was lost
MARK = "Push-Id: {}"  # the last line of a commit's description, by which it is known again
_PUSH_AGAIN = "Nothing was uploaded: look at that commit, then push again."
# What an answer of the Hub means and what to do about it, by its status.
REMEDIES: dict[int | None, tuple[type[Exception], str]] = {
    401: (PermissionError, "not logged in, or the token is not valid (401): run `hf auth login`, or pass token=."),
    403: (PermissionError, "your token may not do this (403): use one with write access to it, ask its owner, push to a "
          "repository of your own, or open a pull request with create_pr=True."),
    404: (FileNotFoundError, "does not exist, or it is private and your token may not see it (404): check its name and the "
          "token."),
    412: (ValueError, f"somebody committed meanwhile (412). {_PUSH_AGAIN}"),
}  # fmt: skip


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
    """Make a repository hold the files of a folder, but for `NEVER`, in one commit on top of what is there now.

    Args:
        stale: whether a file of the repository that the folder does not have is to be deleted.

    Takes and raises else what `push_to_hub` does.
    """
    api = HfApi(token=token)
    if revision is not None and constants.REGEX_COMMIT_OID.fullmatch(revision):
        raise ValueError(f"{repo_id}: {revision} is a commit, and commits are made on branches: give a branch.")
    names = uploadable(folder)
    check_no_secrets(folder, names, token)
    repo_id = with_retries(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        with_retries(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), revision)
    info = with_retries(repo_id, lambda: api.model_info(repo_id, revision=revision), revision)
    if parent_commit is not None and info.sha != parent_commit:
        raise _moved(repo_id, parent_commit, info.sha)
    held = {sibling.rfilename for sibling in info.siblings or ()}
    gone = [name for name in sorted(held - set(names)) if stale(name)]
    mark = MARK.format(uuid.uuid4().hex)
    options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
    options["commit_description"] = f"{commit_description}\n\n{mark}" if commit_description else mark
    options["parent_commit"] = info.sha  # the Hub refuses with 412 where another commit came first

    def commit() -> CommitInfo:
        # Made anew for each try: what a failed one noted on them is not to be trusted.
        added: list[Any] = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
        return api.create_commit(repo_id, [*added, *map(CommitOperationDelete, gone)], **options)

    return with_retries(repo_id, commit, revision, made=lambda: _made(api, repo_id, options, mark))


def uploadable(folder: str | os.PathLike) -> list[str]:
    """Names of the files of a folder that belong to a checkpoint, relative to it."""
    root = Path(folder)
    names = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    kept = [n for n in names if not any(fnmatch.fnmatch(part, pattern) for part in n.parts for pattern in NEVER)]
    for name in kept:
        if not (root / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{name} is a link that leads out of the folder, and is not uploaded: put the file there.")
    return [name.as_posix() for name in kept]


def check_no_secrets(folder: str | os.PathLike, names: list[str], token: str | bool | None) -> None:
    """Refuse text files that name a place on this machine or hold a token (ValueError that names the file, not the secret)."""
    # Longer places first, so that the message names the whole of one; "/" alone would be in every text.
    inside = "|".join(re.escape(place) for place in sorted(_places(folder), key=len, reverse=True) if len(place) > 1)
    path = re.compile(rf"(?<![\w.])({inside})(?![\w.-])")  # whole names: /home/ann does not stand in /home/anna
    # A short one would be found by chance.
    secrets = {text for text in (token, get_token()) if isinstance(text, str) and len(text) > 8}
    for name in names:
        data = b"\0" if name.endswith(_BINARY) else Path(folder, name).read_bytes()  # counts as binary below
        if b"\0" in data:
            continue
        text = data.decode("utf-8", errors="replace")
        if _TOKEN.search(text) or any(secret in text for secret in secrets):
            raise ValueError(
                f"{name} holds a token of the Hub, so nothing is uploaded: take it out, and revoke it if it was shared."
            )
        if os.path.basename(name) not in _WORDS and (found := path.search(text)):
            line = text[: found.start()].count("\n") + 1
            raise ValueError(
                f"{name}, line {line}, names a place on this machine ({found[1]}...), so nothing is uploaded: take it out of "
                "what you save (configuration, chat template, your own code)."
            )


def _places(folder: str | os.PathLike) -> set[str]:
    """Folders of this machine and of its user, as they may stand in a text."""
    places = {os.path.expanduser("~"), tempfile.gettempdir(), os.path.abspath(folder)}
    places |= {constants.HF_HOME, constants.HF_HUB_CACHE}
    with contextlib.suppress(FileNotFoundError):  # the working folder may be gone
        places.add(os.getcwd())
    with contextlib.suppress(KeyError, OSError):  # in a container the user may have no name
        places |= {f"/home/{getpass.getuser()}", f"/Users/{getpass.getuser()}"}
    return places | {os.path.realpath(place) for place in places}


def with_retries(repo_id: str, call: Callable, revision: str | None = None, made: Callable | None = None) -> Any:
    """What a call to the Hub gives, after several tries if there is no answer.

    Args:
        made: of a commit, which must not be made twice: gives it, if it was made although no answer came.

    Raises:
        OSError: the Hub does not answer.  Its own errors tell 401, 403 and 404 apart and name the remedy.
    """
    validate_repo_id(repo_id)
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            # "Somebody committed meanwhile" may mean ourselves: an earlier try whose answer did not come, made late.
            late = made is not None and attempt > 0 and _status(error) == 412
            wait = 0.0 if late else _wait(error, attempt)
            if wait is None:
                _explain(error, repo_id, revision)
                raise
            last = error
        if made is not None or attempt < TRIES - 1:
            time.sleep(wait)
        if made is not None:
            kind = type(last).__name__
            logger.warning("%s: no answer to the commit (%s); looking whether it was done.", repo_id, kind)
            if commit := made():
                return commit
        if late:  # it was somebody else
            _explain(last, repo_id, revision)
            raise last
    failed = f"the Hub did not answer in {TRIES} tries"
    if made is not None:
        failed = f"the Hub did not take the commit in {TRIES} tries; nothing was changed"
    raise OSError(f"{repo_id}: {failed}. Last: {last}") from last


def _explain(error: BaseException, repo_id: str, revision: str | None) -> None:
    """Raise what an answer of the Hub means, if it is one of `REMEDIES`."""
    if isinstance(error, RevisionNotFoundError):
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r} (404): give a branch, a tag or a commit of it."
        ) from error
    if isinstance(error, HfHubHTTPError) and _status(error) in REMEDIES:
        kind, remedy = REMEDIES[_status(error)]
        raise kind(f"{repo_id}: {remedy}") from error


def _status(error: BaseException | None) -> int | None:
    """The status of an answer, None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next try, None for errors that trying again does not mend."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # so huggingface_hub wraps errors of large files
    status, asks = _status(error), ""
    if status is not None:
        again = status == 429 or status >= 500  # else the request itself is wrong, and stays so
        asks = getattr(error, "response").headers.get("Retry-After", "")  # noqa: B009 - its class is the client's own matter
    else:
        # Errors of httpx, httpcore and http.client, which have no class in common.
        network = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("http")
        again = network and not isinstance(error, OfflineModeIsEnabled)
    seconds = min(float(asks), 60.0) if asks.isdigit() else 0.5 * 2**attempt
    return seconds if again else None


def _made(api: HfApi, repo_id: str, options: dict[str, Any], mark: str) -> CommitInfo | None:
    """The commit with our mark, if it was made although no answer came; ValueError if another one was, None if nothing."""

    def pull_number(ref: str) -> int:  # 7 of refs/pr/7
        return int(ref.rpartition("/")[2])

    places = [options["revision"]]
    if options["create_pr"]:  # ours is one of the newest; some may be of others
        refs = with_retries(repo_id, lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
        places = sorted((pull.ref for pull in refs.pull_requests or ()), key=pull_number)[-PULL_REQUESTS:]
    for place in places:
        # From the newest to the oldest.
        newest, *older = with_retries(repo_id, lambda ref=place: api.list_repo_commits(repo_id, revision=ref), place)
        if made := [commit.commit_id for commit in older if mark in commit.message]:
            raise ValueError(
                f"{repo_id}: your commit {made[0][:8]} was made, but somebody committed meanwhile on top of it: "
                f"look at {newest.commit_id[:8]}."
            )
        if mark in newest.message:
            page = f"{api.endpoint}/{repo_id}"
            return CommitInfo(
                commit_url=f"{page}/commit/{newest.commit_id}",
                commit_message=options["commit_message"],
                commit_description=options["commit_description"],
                oid=newest.commit_id,
                pr_url=f"{page}/discussions/{pull_number(place)}" if options["create_pr"] else None,
            )
    if not options["create_pr"] and newest.commit_id != options["parent_commit"]:
        raise _moved(repo_id, options["parent_commit"], newest.commit_id)
    return None


def _moved(repo_id: str, expected: str | None, got: str | None) -> ValueError:
    return ValueError(
        f"{repo_id}: somebody committed meanwhile: expected the newest commit {str(expected)[:8]}, it is {str(got)[:8]}. "
        f"{_PUSH_AGAIN}"
    )
