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
from collections.abc import Callable, Iterator
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
# What an answer of the Hub means and what to do about it, by its status.
REMEDIES: dict[int | None, tuple[type[Exception], str]] = {
    401: (PermissionError, "not logged in, or the token is not valid (401): run `hf auth login`, or pass token=."),
    403: (
        PermissionError,
        "your token may not do this (403): use one with write access to it, ask its owner, push to a repository of your "
        "own, or open a pull request with create_pr=True.",
    ),
    404: (
        FileNotFoundError,
        "does not exist, or it is private and your token may not see it (404): check its name and the token.",
    ),
    412: (
        ValueError,
        "somebody committed meanwhile (412). Nothing was uploaded: look at that commit, then push again.",
    ),
}


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
    if revision is not None and constants.REGEX_COMMIT_OID.fullmatch(revision):
        raise ValueError(
            f"{repo_id}: {revision} is a commit, and commits are made on branches: give a branch as revision."
        )
    names = uploadable(folder)
    check_no_secrets(folder, names, token)
    with hub_errors_explained(repo_id, revision):
        repo_id = with_retries(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True)).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            with_retries(repo_id, lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        info = with_retries(repo_id, lambda: api.model_info(repo_id, revision=revision))
    if parent_commit is not None and info.sha != parent_commit:
        raise _moved(repo_id, parent_commit, info.sha)
    held = {sibling.rfilename for sibling in info.siblings or ()}
    gone = [name for name in sorted(held - set(names)) if stale(name)]
    mark = MARK.format(uuid.uuid4().hex)
    options = {
        "revision": revision,
        "create_pr": create_pr,
        "parent_commit": info.sha,  # the Hub refuses with 412 where another commit came first
        "commit_message": commit_message,
    }
    options["commit_description"] = f"{commit_description}\n\n{mark}" if commit_description else mark

    def operations() -> list[Any]:  # made anew for each try: what a failed one noted on them is not to be trusted
        added = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
        return [*added, *map(CommitOperationDelete, gone)]

    return _commit(api, repo_id, operations, options, mark)


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
        found = None if os.path.basename(name) in _WORDS else path.search(text)
        if found:
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


def with_retries(repo_id: str, call: Callable[[], Any]) -> Any:
    """What a call gives that may be repeated, after several tries if the Hub does not answer.

    Raises:
        OSError: it does not answer; other errors of the Hub as they are.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, attempt)
            if wait is None:
                raise
            last = error
        if attempt < TRIES - 1:
            time.sleep(wait)
    raise OSError(f"{repo_id}: the Hub did not answer in {TRIES} tries. Last: {last}") from last


def _commit(
    api: HfApi, repo_id: str, operations: Callable[[], list[Any]], options: dict[str, Any], mark: str
) -> CommitInfo:
    """Commit; after an answer that did not come, look whether it was done before trying again."""
    for attempt in range(TRIES):
        try:
            with hub_errors_explained(repo_id, options["revision"]):
                return api.create_commit(repo_id, operations(), **options)
        except Exception as error:
            # "Somebody committed meanwhile" may mean ourselves: an earlier try whose answer did not come, made late.
            late = attempt > 0 and _status(error.__cause__) == 412
            wait = 0.0 if late else _wait(error, attempt)
            if wait is None:
                raise
            last = error
        logger.warning("%s: no answer to the commit (%s); looking whether it was done.", repo_id, type(last).__name__)
        time.sleep(wait)
        if done := _done(api, repo_id, options, mark):
            return done
        if late:
            raise last  # it was somebody else
    raise OSError(
        f"{repo_id}: the Hub did not take the commit in {TRIES} tries; nothing was changed. Last: {last}"
    ) from last


def _status(error: BaseException | None) -> int | None:
    """The status of an answer, None where there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _wait(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next try, None for errors that trying again does not mend."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # so huggingface_hub wraps errors of large files
    if isinstance(error, OfflineModeIsEnabled):
        return None
    status = _status(error)
    if status is None:
        # Errors of httpx, httpcore and http.client, which have no class in common.
        network = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("http")
        return 0.5 * 2**attempt if network else None
    if status != 429 and status < 500:
        return None  # the request itself is wrong, and stays so
    asks = getattr(error, "response").headers.get("Retry-After", "")  # noqa: B009 - its class is the client's own matter
    return min(float(asks), 60.0) if asks.isdigit() else 0.5 * 2**attempt


def _done(api: HfApi, repo_id: str, options: dict[str, Any], mark: str) -> CommitInfo | None:
    """The commit with our mark, if it was made although no answer came; None if nothing happened.

    Raises:
        ValueError: something else was committed meanwhile, instead of it or on top of it.
        OSError: the Hub does not say.
    """
    with hub_errors_explained(repo_id, options["revision"]):
        places = [options["revision"]]
        if options["create_pr"]:  # ours is one of the newest; some may be of others
            refs = with_retries(repo_id, lambda: api.list_repo_refs(repo_id, include_pull_requests=True))
            places = sorted((pull.ref for pull in refs.pull_requests or ()), key=_number)[-PULL_REQUESTS:]
        for place in places:
            # From the newest to the oldest.
            newest, *older = with_retries(repo_id, lambda ref=place: api.list_repo_commits(repo_id, revision=ref))
            if made := [commit.commit_id for commit in older if mark in commit.message]:
                raise ValueError(
                    f"{repo_id}: your commit {made[0][:8]} was made, but somebody committed meanwhile on top of it: "
                    f"look at {newest.commit_id[:8]}."
                )
            if mark in newest.message:
                return CommitInfo(
                    commit_url=f"{api.endpoint}/{repo_id}/commit/{newest.commit_id}",
                    commit_message=options["commit_message"],
                    commit_description=options["commit_description"],
                    oid=newest.commit_id,
                    pr_url=f"{api.endpoint}/{repo_id}/discussions/{_number(place)}" if options["create_pr"] else None,
                )
    if not options["create_pr"] and newest.commit_id != options["parent_commit"]:
        raise _moved(repo_id, options["parent_commit"], newest.commit_id)
    return None


def _number(pull_request: str) -> int:
    """7 of ``refs/pr/7``."""
    return int(pull_request.rpartition("/")[2])


def _moved(repo_id: str, expected: str | None, got: str | None) -> ValueError:
    return ValueError(
        f"{repo_id}: somebody committed meanwhile: expected the newest commit {str(expected)[:8]}, it is {str(got)[:8]}. "
        "Nothing was uploaded: look at that commit, then push again."
    )


@contextlib.contextmanager
def hub_errors_explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Errors of the Hub that tell 401, 403 and 404 apart and name the remedy; the original one is their cause."""
    try:
        validate_repo_id(repo_id)
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} has no revision {revision!r} (404): give a branch, a tag or a commit of it."
        ) from error
    except HfHubHTTPError as error:
        if _status(error) not in REMEDIES:
            raise
        kind, remedy = REMEDIES[_status(error)]
        raise kind(f"{repo_id}: {remedy}") from error
