"""Saving, pushing and loading under transformers' names, written once for models, projectors and processors.

`storage` adds what only a composed model has.  A checkpoint's own code carries both: what they lean on and only the package
needs (writing that survives a kill, guards, other repositories) stands in files that have thin ones for a checkpoint.
"""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..parts.classes import SharedCode
from .code_bundle import export_code
from .code_folder import INSTALL
from .finding import CONFIG, HUB_ARGUMENTS, PROCESSOR, TEMPLATES, Bases, Options
from .folder_swap import read_between_saves, replaced_atomically
from .loading import check_processor_files, finish_load, plan_load
from .manifest import StagedSave, staged_save, valid_place
from .trusted_code import with_shared_code

# Of rooms above, for what stands below them: `hub.push`, which needs the whole model to write a card, and `conversion`.
PUSHERS: dict[str, Callable[..., Any]] = {}


def pusher(name: str) -> Callable[..., Any]:
    """One of them by its name; ValueError where code that came with a checkpoint runs without the package."""
    if name not in PUSHERS:
        raise ValueError(f"Pushing and from_native need the package: {INSTALL}, then import cornstarch_hf.")
    return PUSHERS[name]


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
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}  # for the push alone
        own = {key: kwargs.pop(key) for key in self._save_options if key in kwargs}
        whole = self._before_save(**own)  # before anything is written, since it may refuse
        write = super().save_pretrained
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        # Of several processes transformers lets one write.
        writes = is_main_process and not (distributed and torch.distributed.get_rank() != 0)
        # Adapters alone, shards of all processes, or a process that writes nothing: transformers' own way.
        if not whole or kwargs.get("distributed_checkpoint") or not writes:
            write(save_directory, is_main_process, state_dict, False, *args, **kwargs)
        else:
            with staged_save(save_directory, kwargs.get("variant")) as staged:
                if not self._write(staged, kwargs | hub, **own):
                    write(staged.folder, True, state_dict, False, *args, **kwargs)
                references = any(part["source"] == "reference" for part in staged.components.values())
                where = staged.folder, self._side, self, save_directory
                staged.surplus |= export_code(*where, include_code, (), references)
        self._saved = True
        if push_to_hub and writes:
            saved = {**kwargs, "state_dict": state_dict, **own, "include_code": include_code}
            pusher("push_saved")(self, save_directory, saved | hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push this model with a card, in one commit; takes what `cornstarch_hf.push_to_hub` takes and raises the same."""
        return pusher("push")(self, None, repo_id, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, verify: bool = False, bases: Bases = None, **kwargs):
        """As in transformers; what was frozen is frozen again, which is said once.

        Args:
            pretrained_model_name_or_path: folder or repository id, of a whole or a reference checkpoint.
            *args, **kwargs: as in transformers.
            verify: compare the hashes of all files with those that were saved; their sizes are compared always.
            bases: for a reference checkpoint, folders or repositories to read components from instead of those that it
                names; they must hold the very same files.

        Raises:
            ValueError: files that are not what was saved, a base that is another one; tensors that the model lacks or that it
                does not take (with ``output_loading_info=True`` they are listed, as transformers lists them).
            OSError: a repository that cannot be read; names the component and the remedy.
        """
        source, options = pretrained_model_name_or_path, cls._load_options(kwargs)
        read = functools.partial(cls._from_files, source, args, options, bases, verify)
        return _whole(source, options, CONFIG, read)

    @classmethod
    def _from_files(cls, source: Any, args: tuple[Any, ...], options: Options, bases: Bases, verify: bool) -> Any:
        # Before the configuration is read, which may name the user's classes.
        options = with_shared_code(source, dict(options))
        wants_info = options.pop("output_loading_info", False)
        plan = plan_load(cls, source, options, bases, verify, wants_info)
        with plan.guard:
            loaded: Any = super().from_pretrained(plan.source, *args, output_loading_info=True, **plan.options)
        model, info = loaded
        model._after_load(source, info, wants_info)
        if plan.composition is not None and not wants_info:
            check_taken(model, info, source)
        finish_load(model, plan, info)
        return (model, info) if wants_info else model

    # ---- what differs

    def _before_save(self, **options: Any) -> bool:
        """Refuse what a checkpoint cannot hold, and bring the configuration up to date; whether all of it is saved."""
        return True

    def _write(self, staged: StagedSave, options: Options, **own: Any) -> bool:
        """Say which components there are; whether the files were written here, and not by transformers."""
        return False

    @classmethod
    def _load_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        return options

    def _after_load(self, source: Any, info: Options, wants_info: bool) -> None:
        """Bring back what transformers does not (in place)."""


class ProcessorStorage(SharedCode, ProcessorMixin):
    """How a processor is saved and loaded, with the tokenizers of single modalities in folders of their own."""

    tokenizer: Any
    processors: dict[Any, Any]

    def save_pretrained(self, save_directory, push_to_hub: bool = False, include_code: bool | None = None, **kwargs):
        """As in transformers; other files in the folder stay, and a kill leaves the old processor or the new one.

        `include_code` says whether the checkpoint carries the code that loads it, see `code_bundle.export_code`.

        Raises:
            ValueError: a processor or a callback that a checkpoint cannot hold; names the remedy.
        """
        self._before_save()
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        surplus, parts = set[str](), [self.tokenizer, *self.processors.values()]
        replaced = replaced_atomically(save_directory, PROCESSOR, lambda name: name in TEMPLATES or name in surplus)
        tokenizers = {n: p for n, p in self.processors.items() if isinstance(p, PreTrainedTokenizerBase)}
        with _as_built([self.tokenizer, *tokenizers.values()]), replaced as folder:
            files = super().save_pretrained(folder, **kwargs)
            self._after_write(folder)
            for name, tokenizer in tokenizers.items():
                tokenizer.save_pretrained(os.path.join(folder, tokenizer_folder(name)))
            surplus |= export_code(folder, "processor", self, save_directory, include_code, parts, False)
        if push_to_hub:
            pusher("push_saved")(self, save_directory, {**hub, "include_code": include_code})
        # Written in the staging folder, which has become the target by now.
        return [os.path.join(save_directory, os.path.relpath(file, folder)) for file in files or ()]

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Push this processor in one commit, as `cornstarch_hf.push_to_hub` does; a model's card that is there stays."""
        return pusher("push")(None, self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; after an interrupted save, what is valid of the folder (ValueError: files beyond the caps)."""
        read = functools.partial(cls._from_files, pretrained_model_name_or_path, args, kwargs)
        return _whole(pretrained_model_name_or_path, kwargs, PROCESSOR, read)

    @classmethod
    def _from_files(cls, source: Any, args: tuple[Any, ...], options: Options) -> Any:
        source, options = valid_place(source, options, PROCESSOR)
        check_processor_files(source, options)
        return super().from_pretrained(source, *args, **options)

    def _before_save(self) -> None:
        """Refuse what a checkpoint cannot hold, and bring the configuration up to date."""

    def _after_write(self, folder: str) -> None:
        """Change what transformers has written into a folder."""


def _whole(source: Any, options: Options, head: str, read: Callable[[], Any]) -> Any:
    """What `read` reads of a checkpoint, of one save where that is a folder."""
    folder = os.path.normpath(os.path.join(source or "", options.get("subfolder") or ""))
    return read_between_saves(folder, head, read) if source and os.path.isdir(folder) else read()


def tokenizer_folder(name: str) -> str:
    """The folder, within a checkpoint, of the tokenizer of one modality."""
    return f"{name}_tokenizer"


@contextlib.contextmanager
def _as_built(tokenizers: Iterable[PreTrainedTokenizerBase]) -> Iterator[None]:
    """Have tokenizers save the sides that were set as attributes, nothing of their last call, and be as before then."""
    with contextlib.ExitStack() as stack:
        for tokenizer in tokenizers:
            options = tokenizer.init_kwargs
            stack.callback(setattr, tokenizer, "init_kwargs", options)
            # A tokenizer writes what it was built with, not its attributes.
            sides = {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
            told = {side: options.get(side, getattr(type(tokenizer), side)) for side in sides}
            # One that says nothing leaves the side to native processors, some of which pad on the left then.
            tokenizer.init_kwargs = options | {side: value for side, value in sides.items() if value != told[side]}
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
                cut, filled = (
                    backend.truncation,
                    backend.padding,
                )  # of the last call; a load would take them for defaults
                stack.callback(lambda b=backend, x=cut: b.enable_truncation(**x) if x else b.no_truncation())
                stack.callback(lambda b=backend, x=filled: b.enable_padding(**x) if x else b.no_padding())
                backend.no_truncation()
                backend.no_padding()
        yield


# Buffers that older versions of transformers stored with a model, and that no version reads.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias)$")


def check_taken(model: nn.Module, info: Options, source: Any) -> None:
    """Refuse a model that took not all of a checkpoint's tensors (ValueError): it is another one than was saved."""
    computed = {name for name, _ in model.named_buffers()}  # some that were stored once are computed by now
    surplus = [key for key in map(str, info.get("unexpected_keys") or ()) if key not in computed]
    surplus = sorted(key for key in surplus if not _COMPUTED.search(key))
    if surplus and getattr(model, "hf_quantizer", None) is not None:  # which stores further tensors of a layer
        layers = {f"{name}." for name, module in model.named_modules() if name and not any(module.children())}
        surplus = [key for key in surplus if not any(key.startswith(layer) for layer in layers)]
    if surplus:
        raise ValueError(
            f"{source} holds {len(surplus)} tensors that the model does not take ({surplus[:3]}): its configuration describes "
            "another model than was saved, with fewer layers or without a part. Restore the configuration that was saved with "
            "the weights; to load the rest alone, pass output_loading_info=True, which lists them."
        )


def first_dtype(module: nn.Module) -> torch.dtype:
    """dtype of the first floating-point parameter, else buffer, else torch's default."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
