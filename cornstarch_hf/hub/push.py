"""push_to_hub(): a composed model, its processor and a card, saved to a temporary folder and uploaded in one commit."""

import functools
import logging
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel, ProcessorMixin

from ..checkpoints.code_folder import read_entry
from ..checkpoints.finding import COMPOSITION, DELTA, HUB_ARGUMENTS, weights_pattern
from ..checkpoints.plain_storage import PUSHERS
from .card import card_text, merged_card
from .upload import upload, with_retries

logger = logging.getLogger(__name__)
CARD = "README.md"
# What transformers' `save_pretrained` takes about how weights are written, and what ours takes.
WRITING = ("max_shard_size", "variant", "state_dict", "save_peft_format", "save_original_format")
SAVING = ("embed", "bases", "include_code", *WRITING)
OTHER_WEIGHTS = (DELTA, COMPOSITION, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLES = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin|pytorch_model\.bin\.index\.json")


def push_to_hub(
    model: PreTrainedModel | None,
    processor: ProcessorMixin | None = None,
    repo_id: str | None = None,
    *,
    embed: bool | Collection[str] = True,
    bases: Mapping[str, str] | None = None,
    include_code: bool | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    parent_commit: str | None = None,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    tags: list[str] | None = None,
    card: bool | str = True,
    overwrite_card: bool = False,
    trainer: Any = None,
    **writing: Any,
) -> CommitInfo:
    """Share a composed model with its processor: everything in one commit, on top of what the repository holds.

    Weight files of earlier pushes that this one does not have are deleted in the same commit.

    Args:
        model: a composed model, or a projector alone; None for the processor alone.
        processor: its processor, or None.
        repo_id: ``"user/name"``, or ``"name"`` in one's own namespace; made if it does not exist.
        embed, bases, include_code: as in `MultimodalModel.save_pretrained`; ``embed=False`` shares what was trained only.
        private: whether a new repository is private.
        token: of the Hub; by default the one that is stored.
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead.
        commit_message, commit_description: of the commit; a last line ``Push-Id: ...`` tells it from others.
        parent_commit: the commit that must still be the newest.
        max_shard_size, variant: as in transformers.
        tags: further tags for the card.
        card: False for none, or its text.
        overwrite_card: replace a card that somebody edited.
        trainer: the Trainer that trained the model, or the path of its `trainer_state.json`: facts for the card.
        **writing: what else transformers' `save_pretrained` takes about weights, such as `state_dict`.

    Raises:
        TypeError: nothing to push, or something of a wrong type.
        ValueError: what cannot be saved; somebody committed meanwhile; a file with a path of this machine or a token.
        PermissionError: 401 or 403, told apart.
        FileNotFoundError: 404: no such repository, or a private one of somebody else; no such revision.
        OSError: the Hub did not answer.
    """
    model, processor, repo_id = _checked(model, processor, repo_id)
    if unknown := sorted(set(writing) - set(WRITING)):
        raise TypeError(f"push_to_hub got unknown arguments {unknown}, expected some of {sorted(SAVING)}.")
    writing |= {"max_shard_size": max_shard_size, "variant": variant, "include_code": include_code}
    saving = {k: v for k, v in {**writing, "embed": embed, "bases": bases}.items() if v is not None}
    repo_id = _full_name(repo_id, token)
    with tempfile.TemporaryDirectory() as root:
        folder = os.path.join(root, "checkpoint")
        _save(model, processor, folder, saving, token)
        if card is not False:
            head, there = _head_and_card(repo_id, revision, token)
            parent_commit = parent_commit or head  # the card that is judged here is the one that is replaced
            replace = overwrite_card or isinstance(card, str)
            if model is not None or there is None or replace:  # a processor that joins a model: the card is the model's
                facts = (bool(read_entry(folder)), saving.get("embed", True), trainer, token)
                tags = [tags] if isinstance(tags, str) else tags or []
                text = card if isinstance(card, str) else card_text(model, processor, repo_id, *facts, tags=tags)
                _write_card(Path(folder, CARD), text, there, repo_id, replace)
        what = " and ".join(type(part).__name__ for part in (model, processor) if part is not None)
        # Saving a model with adapters around it saves them alone, beside which its own weights may lie.
        whole = model is not None and not getattr(model, "_hf_peft_config_loaded", False)
        return upload(
            folder, repo_id, stale=stale_files(whole, variant), token=token, private=private, revision=revision,
            create_pr=create_pr, commit_message=commit_message or f"Upload {what}", commit_description=commit_description,
            parent_commit=parent_commit,
        )  # fmt: skip


def push_saved(part: Any, folder: str | os.PathLike, options: Mapping[str, Any]) -> CommitInfo:
    """`push_to_hub` for `save_pretrained(folder, push_to_hub=True)`: into the repository of the folder's name by default."""
    given = {key: options[key] for key in (*HUB_ARGUMENTS, *SAVING) if options.get(key) is not None}
    repo_id = given.pop("repo_id", None) or os.path.basename(os.path.abspath(folder))
    return push_to_hub(part, None, repo_id, **given)


PUSHERS.update(push=push_to_hub, push_saved=push_saved)  # `checkpoints` lies below this room and cannot import it


def _checked(model: Any, processor: Any, repo_id: Any) -> tuple[Any, Any, str]:
    """Model, processor and repository of a call that may have left out either of the first two (TypeError)."""
    if isinstance(processor, str) and repo_id is None:  # push_to_hub(model, "user/name")
        processor, repo_id = None, processor
    if not isinstance(repo_id, str):
        raise TypeError(f"push_to_hub needs a repo_id: push_to_hub(model, processor, 'user/name'), got {repo_id!r}.")
    if isinstance(model, ProcessorMixin) and processor is None:
        model, processor = None, model
    if model is None and processor is None:
        raise TypeError("push_to_hub needs a model, a processor, or both.")
    if not isinstance(model, (PreTrainedModel, type(None))):
        raise TypeError(f"model must be a composed model or a projector, got {type(model).__name__}.")
    if not isinstance(processor, (ProcessorMixin, type(None))):
        raise TypeError(f"processor must be a MultimodalProcessor, got {type(processor).__name__}.")
    return model, processor, repo_id


def _save(
    model: Any, processor: Any, folder: str, options_of_save: Mapping[str, Any], token: str | bool | None
) -> None:
    code = {key: options_of_save[key] for key in ("include_code",) if key in options_of_save}
    if model is not None:
        if hasattr(model, "encoders"):
            options = {**options_of_save, **({} if token is None else {"token": token})}  # the token reads the bases
        else:  # a projector has no components to refer to
            options = code | {key: options_of_save[key] for key in WRITING if key in options_of_save}
        model.save_pretrained(folder, **options)
    if processor is not None:
        processor.save_pretrained(folder, **code)


def stale_files(with_model: bool, variant: str | None = None) -> Callable[[str], bool]:
    """Which files of a repository a push replaces, if it does not hold them: weights in any other form, their list, and
    adapters, which who loads the repository would get around the model that was pushed."""
    weights = weights_pattern(variant)

    def stale(name: str) -> bool:
        # A variant stands beside other files: it replaces its own alone.
        others = variant is None and (name in OTHER_WEIGHTS or bool(PICKLES.fullmatch(name)))
        return with_model and (others or bool(weights.fullmatch(name)))

    return stale


def _full_name(repo_id: str, token: str | bool | None) -> str:
    """``user/name`` of a repository in one's own namespace: a name alone means another one to readers."""
    if "/" in repo_id:
        return repo_id
    try:
        if token is False:  # `whoami` would take the one that is stored
            raise LocalTokenNotFoundError
        return f"{with_retries(repo_id, HfApi(token=token).whoami)['name']}/{repo_id}"
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"{repo_id}: not logged in, so it is not known whose it is to be: run `hf auth login`, pass token=, or give "
            f"'user/{repo_id}'."
        ) from error


def _head_and_card(repo_id: str, revision: str | None, token: str | bool | None) -> tuple[str | None, str | None]:
    """The newest commit and the card in it; None for what there is not.

    The card is read at that commit: under a branch's name an older one may come from the cache.
    """
    api = HfApi(token=token)
    for name in dict.fromkeys((revision, None)):  # a new branch starts from main
        try:
            info = with_retries(repo_id, functools.partial(api.model_info, repo_id, revision=name), name)
        except FileNotFoundError:
            continue
        except PermissionError as error:
            if isinstance(error.__cause__, RepositoryNotFoundError):
                break  # also said, without a token, of a repository that does not exist
            raise
        if not any(sibling.rfilename == CARD for sibling in info.siblings or ()):
            return info.sha, None
        download = functools.partial(hf_hub_download, repo_id, CARD, revision=info.sha, token=token)
        there = with_retries(repo_id, download, info.sha)
        return info.sha, Path(there).read_bytes().decode("utf-8")
    return None, None


def _write_card(path: Path, generated: str, there: str | None, repo_id: str, replace: bool) -> None:
    """Write the card, unless somebody edited the one that is there: that one is left alone."""
    text = merged_card(there, generated, replace)
    if text == there and text != generated:
        logger.warning("%s: the card was edited by hand and stays as it is; overwrite_card=True replaces it.", repo_id)
    else:
        path.write_bytes(text.encode("utf-8"))  # to the letter: text mode may change line ends
