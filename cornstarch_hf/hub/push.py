"""Save to a temporary folder, add the card, upload in one commit: what every `push_to_hub` does."""

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from ..checkpoints.manifest import COMPOSITION, DELTA, weights_pattern
from ..checkpoints.storage import HUB_ARGUMENTS, PUSHERS
from ..checkpoints.users_code import read_entry
from .card import card_text, merged_card
from .upload import hub_errors_explained, upload, with_retries

logger = logging.getLogger(__name__)
CARD = "README.md"
# What transformers' `save_pretrained` takes about how weights are written.
WRITING = ("max_shard_size", "variant", "state_dict", "save_peft_format", "save_original_format")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
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
    **save_options: Any,
) -> CommitInfo:
    """Upload a model, a processor, or both, with a card, as one commit; see `hub.push_to_hub`.

    Args:
        model, processor: either may be None.
        repo_id: ``"user/name"``, or ``"name"`` of one's own.
        card: whether one is written, or its text.
        **saving: for the model's `save_pretrained`; all else as in `upload.upload`.

    Raises:
        TypeError: an unknown argument.
        ValueError, OSError: as saving and uploading raise.
    """
    known = {"embed", "bases", "include_code", *WRITING}
    if unknown := sorted(set(save_options) - known):
        raise TypeError(f"push_to_hub got unknown arguments {unknown}, expected some of {sorted(known)}.")
    save_options = {key: value for key, value in save_options.items() if value is not None}
    tags = [tags] if isinstance(tags, str) else tags
    repo_id = _full_name(repo_id, token)
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "checkpoint")
        if model is not None:
            _save_model(model, folder, save_options, token)
        if processor is not None:
            processor.save_pretrained(
                folder, **{key: save_options[key] for key in ("include_code",) if key in save_options}
            )
        if card is not False:
            head, there = _head_and_card(repo_id, revision, token)
            parent_commit = parent_commit or head  # the card that is judged here is the one that is replaced
            replace = overwrite_card or isinstance(card, str)
            if model is not None or there is None or replace:  # a processor that joins a model: the card is the model's
                made = (
                    card
                    if isinstance(card, str)
                    else _card(folder, model, processor, repo_id, save_options, trainer, token, tags or ())
                )
                _write_card(Path(folder, CARD), made, there, repo_id, replace)
        what = " and ".join(type(part).__name__ for part in (model, processor) if part is not None)
        return upload(
            folder,
            repo_id,
            stale=stale_files(model is not None and not _adapters_only(model), save_options.get("variant")),
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {what}",
            commit_description=commit_description,
            parent_commit=parent_commit,
        )


def _save_model(model: Any, folder: str, save_options: dict[str, Any], token: str | bool | None) -> None:
    options = {key: value for key, value in save_options.items() if key in ("embed", "bases", "include_code")}
    if "embed" in options and token is not None:
        options["token"] = token  # to read the bases
    if not _has_components(model):
        options = {key: value for key, value in options.items() if key == "include_code"}
    model.save_pretrained(folder, **{key: save_options[key] for key in WRITING if key in save_options}, **options)


def _has_components(model: Any) -> bool:
    return hasattr(model, "encoders")


def stale_files(with_model: bool, variant: str | None = None):
    """Which files of a repository a push replaces, if it does not hold them: weights in any other form, and their list.

    Adapters too: who loads the repository would get them around the model that was pushed.
    """
    pattern = weights_pattern(variant)

    def stale(name: str) -> bool:
        if not with_model:
            return False
        others = variant is None and (name in (DELTA, COMPOSITION, *ADAPTERS) or bool(PICKLES.fullmatch(name)))
        return others or bool(pattern.fullmatch(name))

    return stale


def _full_name(repo_id: str, token: str | bool | None) -> str:
    """``user/name`` of a repository in one's own namespace: a name alone means another one to readers."""
    if "/" in repo_id:
        return repo_id
    lost = PermissionError(
        f"{repo_id}: not logged in, so it is not known whose it is to be: run `hf auth login`, pass token=, or give "
        f"'user/{repo_id}'."
    )
    if token is False:
        raise lost
    api = HfApi(token=token)
    with hub_errors_explained(repo_id):
        try:
            return f"{with_retries(repo_id, api.whoami)['name']}/{repo_id}"
        except LocalTokenNotFoundError as error:
            raise lost from error


def _card(
    folder: str,
    model: Any,
    processor: Any,
    repo_id: str,
    save_options: dict[str, Any],
    trainer: Any,
    token: Any,
    tags: Sequence[str],
) -> str:
    code = bool(read_entry(folder))
    return card_text(model, processor, repo_id, code, save_options.get("embed", True), trainer, token, tags=tags)


def _head_and_card(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[str | None, str | None]:
    """The newest commit and the card in it; None for what there is not.

    The card is read at that commit: under a branch's name an older one may come from the cache.
    """
    api = HfApi(token=token)
    for name in dict.fromkeys((revision, None)):  # a new branch starts from main
        try:
            with hub_errors_explained(repo_id, name):
                info = with_retries(repo_id, lambda name=name: api.model_info(repo_id, revision=name))
        except FileNotFoundError:
            continue
        except PermissionError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                break  # also said, without a token, of a repository that does not exist
            raise
        if not any(sibling.rfilename == CARD for sibling in info.siblings or ()):
            return info.sha, None
        with hub_errors_explained(repo_id, info.sha):
            there = with_retries(
                repo_id, lambda sha=info.sha: hf_hub_download(repo_id, CARD, revision=sha, token=token)
            )
        return info.sha, Path(there).read_bytes().decode("utf-8")
    return None, None


def _write_card(path: Path, generated: str, there: str | None, repo_id: str, replace: bool) -> None:
    """Write the card, unless somebody edited the one that is there: that one is left alone."""
    text = merged_card(there, generated, replace)
    if text == there and text != generated:
        logger.warning("%s: the card was edited by hand and stays as it is; overwrite_card=True replaces it.", repo_id)
    else:
        path.write_bytes(text.encode("utf-8"))


def _adapters_only(model: Any) -> bool:
    """Whether saving a model saves the adapters around it alone, beside which its own weights may lie."""
    return getattr(model, "_hf_peft_config_loaded", False)


def push_saved(part: Any, folder: str | os.PathLike, options: dict[str, Any]) -> CommitInfo:
    """`push` for `save_pretrained(folder, push_to_hub=True)`: into the repository of the folder's name by default."""
    known = (
        *(key for key in HUB_ARGUMENTS if key != "repo_id"),
        *("embed", "bases", "include_code", *WRITING),
    )
    given = {key: options[key] for key in known if options.get(key) is not None}
    repo_id = options.get("repo_id") or os.path.basename(os.path.abspath(folder))
    pair = (None, part) if hasattr(part, "tokenizer") else (part, None)
    return push(*pair, repo_id, **given)


PUSHERS.update(push=push, push_saved=push_saved)
