"""push_to_hub(): a composed model, its processor and a card in one call and one commit."""

from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, ProcessorMixin

from .push import push


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
) -> CommitInfo:
    """Share a composed model with its processor: everything in one commit, on top of what the repository holds.

    Weight files of earlier pushes that this one does not have are deleted in the same commit.

    Args:
        model: a composed model, or a projector alone; None for the processor alone.
        processor: its processor, or None.
        repo_id: ``"user/name"``, or ``"name"`` in one's own namespace; made if it does not exist.
        embed, bases: as in `MultimodalModel.save_pretrained`; ``embed=False`` shares what was trained only.
        include_code: let the checkpoint carry its code, see `MultimodalModel.save_pretrained`.
        private: whether a new repository is private.
        token: of the Hub; by default the one that is stored.
        revision: branch; made if it does not exist.
        create_pr: open a pull request instead.
        commit_message, commit_description: of the commit.
        parent_commit: the commit that must still be the newest.
        max_shard_size, variant: as in transformers.
        tags: further tags for the card.
        card: False for none, or its text.
        overwrite_card: replace a card that somebody edited.
        trainer: the Trainer that trained the model, or the path of its `trainer_state.json`: facts for the card.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        TypeError: nothing to push, or something of a wrong type.
        ValueError: what cannot be saved; somebody committed meanwhile; a file with a path of this machine or a token.
        PermissionError: 401 or 403, told apart.
        FileNotFoundError: 404: no such repository, or a private one of somebody else; no such revision.
        OSError: the Hub did not answer.
    """
    if isinstance(processor, str) and repo_id is None:
        processor, repo_id = None, processor
    if not isinstance(repo_id, str):
        raise TypeError(
            f"push_to_hub needs a repo_id, e.g. push_to_hub(model, processor, 'user/name'), got {repo_id!r}."
        )
    if isinstance(model, ProcessorMixin) and processor is None:
        model, processor = None, model
    if model is None and processor is None:
        raise TypeError("push_to_hub needs a model, a processor, or both.")
    if model is not None and not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a composed model or a projector, got {type(model).__name__}.")
    if processor is not None and not isinstance(processor, ProcessorMixin):
        raise TypeError(f"processor must be a MultimodalProcessor, got {type(processor).__name__}.")
    return push(
        model,
        processor,
        repo_id,
        token=token,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        parent_commit=parent_commit,
        tags=tags,
        card=card,
        overwrite_card=overwrite_card,
        trainer=trainer,
        embed=embed,
        bases=bases,
        include_code=include_code,
        max_shard_size=max_shard_size,
        variant=variant,
    )
