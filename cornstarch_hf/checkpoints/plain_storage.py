"""Saving, pushing and loading under transformers' names, written once for models, projectors and processors.

`storage` adds what only a composed model has.  A checkpoint's own code carries both: what they lean on and only the package
needs (writing that survives a kill, guards, other repositories) stands in files that have thin ones for a checkpoint.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..parts.classes import SharedCode
from .code_bundle import export_code
from .finding import HUB_ARGUMENTS, PROCESSOR, TEMPLATES
from .folder_swap import replaced_atomically, valid_folder
from .loading import finish_load, plan_load
from .manifest import StagedSave, staged_save
from .trusted_code import with_shared_code

# Of `hub.push`, for what stands below it: it needs the whole model to write a card.
PUSHERS: dict[str, Callable[..., Any]] = {}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a save, and those among them that are for its push."""
    hub = {key: value for key, value in options.items() if key in HUB_ARGUMENTS}
    return {key: value for key, value in options.items() if key not in hub}, hub


def pusher(name: str) -> Callable[..., Any]:
    """A function of `push` by its name; ValueError where code that came with a checkpoint runs without the package."""
    if name not in PUSHERS:
        raise ValueError("Pushing needs the package: pip install cornstarch_hf, then import cornstarch_hf.")
    return PUSHERS[name]


def writes(is_main_process: bool) -> bool:
    """Whether this process writes checkpoint files; of several, transformers lets one do so."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_main_process and not (distributed and torch.distributed.get_rank() != 0)


class ModelStorage(SharedCode, PreTrainedModel):
    """How models and projectors are saved and loaded: weights, configuration and code as one, or not at all."""

    config: Any
    _side = "model"  # a key of `code_folder.SIDES`
    _save_options: tuple[str, ...] = ()  # of `save_pretrained`, for `_before_save` and `_write`

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        include_code: bool | None = None,
        **kwargs,
    ):
        """As in transformers, crash-safe, with `include_code` as of composed models; ValueError for what cannot be stored."""
        kwargs, hub = split_options(kwargs)
        own = {key: kwargs.pop(key) for key in self._save_options if key in kwargs}
        whole = self._before_save(**own)
        write = super().save_pretrained
        if not whole or kwargs.get("distributed_checkpoint") or not writes(is_main_process):
            write(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        else:
            with staged_save(save_directory, kwargs.get("variant")) as staged:
                if not self._write(staged, kwargs | hub, **own):
                    write(staged.folder, True, state_dict, False, *args, **kwargs)
                references = any(part["source"] == "reference" for part in staged.components.values())
                staged.surplus |= export_code(
                    staged.folder, self._side, self, save_directory, include_code=include_code, references=references
                )
        self._saved = True
        if push_to_hub and writes(is_main_process):
            saved = {**kwargs, "state_dict": state_dict, **own, "include_code": include_code}
            pusher("push_saved")(self, save_directory, saved | hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push this model with a card, in one commit; takes what `cornstarch_hf.push_to_hub` takes, which also takes the
        processor along, and raises the same."""
        return pusher("push")(self, None, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        verify: bool = False,
        bases: Mapping[str, str] | None = None,
        **kwargs,
    ):
        """As in transformers; sizes of files are compared with those that were saved, with `verify` their hashes."""
        source = pretrained_model_name_or_path
        options = with_shared_code(source, cls._load_options(kwargs))
        wants_info = options.pop("output_loading_info", False)
        plan = plan_load(cls, source, options, bases, verify, wants_info)
        model: Any
        info: dict[str, Any]
        with plan.guard:
            model, info = super().from_pretrained(plan.source, *args, output_loading_info=True, **plan.options)
        model._after_load(source, info, wants_info)
        finish_load(model, plan, info)
        return (model, info) if wants_info else model

    # ---- what differs

    def _before_save(self, **options: Any) -> bool:
        """Refuse what a checkpoint cannot hold, and bring the configuration up to date; whether all of it is saved."""
        return True

    def _write(self, staged: StagedSave, options: Mapping[str, Any], **own: Any) -> bool:
        """Say which components there are; whether the files were written here, and not by transformers."""
        return False

    @classmethod
    def _load_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def _after_load(self, source: Any, info: Mapping[str, Any], wants_info: bool) -> None:
        """Bring back what transformers does not (in place)."""


class ProcessorStorage(SharedCode):
    """How a processor is saved and loaded, with the tokenizers of single modalities in folders of their own."""

    tokenizer: Any
    processors: dict[Any, Any]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, include_code: bool | None = None, **kwargs):
        """As in transformers; other files in the folder stay, and a kill leaves the old processor or the new one.

        Args:
            save_directory: the folder.
            push_to_hub, **kwargs: as in transformers.
            include_code: whether the checkpoint carries the code that loads it, see `code_bundle.export_code`.

        Raises:
            ValueError: a processor or a callback that a checkpoint cannot hold; names the remedy.
        """
        self._before_save()
        kwargs, hub = split_options(kwargs)
        surplus: set[str] = set()
        parts = [self.tokenizer, *self.processors.values()]
        with (
            _sides_written(part for part in parts if isinstance(part, PreTrainedTokenizerBase)),
            replaced_atomically(save_directory, PROCESSOR, lambda name: name in TEMPLATES or name in surplus) as folder,
        ):
            files = super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
            for name, processor in self.processors.items():
                if isinstance(processor, PreTrainedTokenizerBase):
                    processor.save_pretrained(os.path.join(folder, tokenizer_folder(name)))
            surplus |= export_code(folder, "processor", self, save_directory, include_code=include_code, others=parts)
        if push_to_hub:
            pusher("push_saved")(self, save_directory, {**hub, "include_code": include_code})
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files or ()]

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push this processor in one commit; takes what `cornstarch_hf.push_to_hub` takes, and raises the same.  A card that
        is there, a model's, stays."""
        return pusher("push")(None, self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; after an interrupted save, what is valid of the folder."""
        source = pretrained_model_name_or_path
        folder = os.path.join(source, kwargs.get("subfolder") or "")
        if os.path.isdir(folder) and (valid := valid_folder(folder, PROCESSOR)) != folder:
            source, kwargs = valid, {**kwargs, "subfolder": ""}
        return super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]

    def _before_save(self) -> None:
        """Refuse what a checkpoint cannot hold, and bring the configuration up to date."""


def tokenizer_folder(name: str) -> str:
    """The folder, within a checkpoint, of the tokenizer of one modality."""
    return f"{name}_tokenizer"


@contextlib.contextmanager
def _sides_written(tokenizers: Iterable[PreTrainedTokenizerBase]) -> Iterator[None]:
    """Have tokenizers save the sides that were set as attributes; afterwards they are what they were."""
    before = [(tokenizer, tokenizer.init_kwargs) for tokenizer in tokenizers]
    try:
        for tokenizer, options in before:
            sides = {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
            tokenizer.init_kwargs = options | sides
        yield
    finally:
        for tokenizer, options in before:
            tokenizer.init_kwargs = options
