"""Save to a temporary folder, add the card, upload in one commit: what every `push_to_hub` does."""

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .code_files import read_entry
from .manifests import COMPOSITION, DELTA
from .model_card import card_text, merged_card
from .saving import weights_pattern
from .uploading import upload

logger = logging.getLogger(__name__)
CARD = "README.md"
# What `save_pretrained` takes for a push, as in transformers.
HUB_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")
PICKLES = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json")


def push(
    model: Any,
    processor: Any,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    parent_commit: str | None = None,
    tags: Sequence[str] | None = None,
    card: bool | str = True,
    overwrite_card: bool = False,
    trainer: Any = None,
    **saving: Any,
) -> CommitInfo:
    """Upload a model, a processor, or both, with a card, as one commit; see `hub.push_to_hub`.

    Args:
        model, processor: either may be None.
        repo_id: ``"user/name"``, or ``"name"`` of one's own.
        card: whether one is written, or its text.
        **saving: for the model's `save_pretrained`; all else as in `uploading.upload`.

    Raises:
        TypeError: an unknown argument.
        ValueError, OSError: as saving and uploading raise.
    """
    known = {"embed", "bases", "include_code", "max_shard_size", "variant"}
    if unknown := sorted(set(saving) - known):
        raise TypeError(f"push_to_hub got unknown arguments {unknown}, expected some of {sorted(known)}.")
    saving = {key: value for key, value in saving.items() if value is not None}
    tags = [tags] if isinstance(tags, str) else tags
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "checkpoint")
        if model is not None:
            _save_model(model, folder, saving, token)
        if processor is not None:
            processor.save_pretrained(folder, **{key: saving[key] for key in ("include_code",) if key in saving})
        if card is not False:
            text = (
                card
                if isinstance(card, str)
                else _card(folder, model, processor, repo_id, saving, trainer, token, tags or ())
            )
            there = _card_of(repo_id, revision, token)
            replace = overwrite_card or isinstance(card, str)
            if model is None and there is not None and not replace:
                text = there  # a processor that joins a model: the card is the model's
            _write_card(Path(folder, CARD), text, there, repo_id, replace)
        what = " and ".join(type(part).__name__ for part in (model, processor) if part is not None)
        return upload(
            folder,
            repo_id,
            stale=stale_files(model is not None and not _adapters_only(model), saving.get("variant")),
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {what}",
            commit_description=commit_description,
            parent_commit=parent_commit,
        )


def _save_model(model: Any, folder: str, saving: dict[str, Any], token: str | bool | None) -> None:
    options = {key: value for key, value in saving.items() if key in ("embed", "bases", "include_code")}
    if "embed" in options and token is not None:
        options["token"] = token  # to read the bases
    if not _has_components(model):
        options = {key: value for key, value in options.items() if key == "include_code"}
    sizes = {key: saving[key] for key in ("max_shard_size", "variant") if key in saving}
    model.save_pretrained(folder, **sizes, **options)


def _has_components(model: Any) -> bool:
    return hasattr(model, "encoders")


def stale_files(with_model: bool, variant: str | None = None):
    """Which files of a repository a push replaces, if it does not hold them: weights in any other form, and their list."""
    pattern = weights_pattern(variant)

    def stale(name: str) -> bool:
        if not with_model:
            return False
        others = variant is None and (name in (DELTA, COMPOSITION) or bool(PICKLES.fullmatch(name)))
        return others or bool(pattern.fullmatch(name))

    return stale


def _card(
    folder: str,
    model: Any,
    processor: Any,
    repo_id: str,
    saving: dict[str, Any],
    trainer: Any,
    token: Any,
    tags: Sequence[str],
) -> str:
    full = repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    code = bool(read_entry(folder))
    return card_text(model, processor, full, code, saving.get("embed", True), trainer, token, tags=tags)


def _card_of(repo_id: str, revision: str | None, token: str | bool | None) -> str | None:
    """The card that a repository has, None if it has none."""
    try:
        there = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except HfHubHTTPError as error:
        raise OSError(
            f"{repo_id}: cannot see whether its card was edited ({error}): push again, or with card=False."
        ) from error
    return Path(there).read_bytes().decode("utf-8")


def _write_card(path: Path, generated: str, there: str | None, repo_id: str, replace: bool) -> None:
    """Write the card, unless somebody edited the one that is there: then that one stays, to the letter."""
    text = merged_card(there, generated, replace)
    if text == there and text != generated:
        logger.warning("%s: the card was edited by hand and stays as it is; overwrite_card=True replaces it.", repo_id)
    path.write_bytes(text.encode("utf-8"))


def _adapters_only(model: Any) -> bool:
    """Whether saving a model saves the adapters around it alone, beside which its own weights may lie."""
    return getattr(model, "_hf_peft_config_loaded", False)


def push_saved(part: Any, folder: str | os.PathLike, options: dict[str, Any]) -> CommitInfo:
    """`push` for `save_pretrained(folder, push_to_hub=True)`: into the repository of the folder's name by default."""
    known = (
        *("private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token"),
        *("max_shard_size", "variant", "embed", "bases", "include_code"),
    )
    given = {key: options[key] for key in known if options.get(key) is not None}
    repo_id = options.get("repo_id") or os.path.basename(os.path.abspath(folder))
    pair = (None, part) if hasattr(part, "tokenizer") else (part, None)
    return push(*pair, repo_id, **given)
