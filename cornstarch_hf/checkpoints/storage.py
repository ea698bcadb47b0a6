"""Saving and loading of the composed model, as methods of transformers' names."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapter_tensors import shared_by_adapters
from ..parts.classes import SharedCode
from ..parts.freezing import restore_frozen
from ..parts.gathering import gathered_ties
from .code_bundle import export_code
from .config_sync import (
    cast_buffers,
    check_quantized,
    check_rebuildable,
    dtype_plan,
    restore_adapter_buffers,
    sync_config,
)
from .files import check_loaded
from .loading import finish_load, plan_load
from .manifest import staged_save
from .references import chosen_components, embedded, write_reference
from .trusted_code import with_shared_code

logger = logging.getLogger(__name__)
# What `save_pretrained` takes for a push, as in transformers.
HUB_ARGUMENTS = ("repo_id", "private", "revision", "create_pr", "commit_message", "commit_description", "tags", "token")
# Of `push`, for what stands below it: it needs the whole model to write a card.
PUSHERS: dict[str, Callable[..., Any]] = {}


class MultimodalStorageMixin(SharedCode, PreTrainedModel):
    """How a composed model is saved and loaded; see `MultimodalModel`."""

    config: MultimodalConfig
    encoders: Any
    language_model: Any
    _saved = False  # whether the whole model lies in some folder

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        *args,
        embed: bool | Collection[str] = True,
        include_code: bool | None = None,
        bases: Mapping[str, str] | None = None,
        variant: str | None = None,
        **kwargs,
    ):
        """As in transformers, safetensors only; a kill at any moment leaves the old checkpoint or the new one.

        Args:
            save_directory: the folder; files in it that are not of an earlier save stay.
            is_main_process: whether this process writes.
            state_dict: as in transformers.
            push_to_hub: whether to push it afterwards, to `repo_id` (by default the folder's name).
            *args: the further arguments of transformers, by position.
            embed: True stores all weights.  False stores a *reference checkpoint*: projectors, changed tensors and adapters
                alone, with the repositories and commits of the rest.  A list names the components (``"vision_encoder"``,
                ``"language_model"``) whose weights are stored all the same.
            include_code: whether the checkpoint carries the code that loads it, for `trust_remote_code=True` where this package
                is not installed.  By default only a model that came with its code does: code that is frozen into a checkpoint
                gets no fixes and asks each reader to trust it, and this package is one install away.
            bases: repositories (``"user/name"`` or ``"user/name@revision"``) of components for `embed=False`, where they
                are not known from loading.
            variant: as in transformers.
            **kwargs: as in transformers.

        Raises:
            ValueError: something in the model would not come back: an unregistered callback or projection, or weights
                that the configuration does not describe; only adapters would be saved (`add_adapter`) of a model that was
                never saved itself; a component that cannot be referred to.
            OSError: the disk is full, a base cannot be read, ...; the old checkpoint is still there.
        """
        kwargs, hub = split_options(kwargs)
        options = {"variant": variant, **kwargs}
        whole = not getattr(self, "_hf_peft_config_loaded", False)
        if whole:
            check_quantized(self)  # before anything asks for the state: bitsandbytes changes 4-bit weights then
            sync_config(self, self.config, self.encoders, self.language_model)
            check_rebuildable(self)
            # Adapters may have come or gone; saving reads `_tied_weights_keys`, loading the other one.
            self.all_tied_weights_keys = gathered_ties(self)
            self._tied_weights_keys = shared_by_adapters(self) | self.all_tied_weights_keys
        elif not (self.name_or_path or self._saved):
            raise ValueError(
                "After add_adapter only the adapters are saved, but the model below them was never saved, so its projectors "
                "would be lost: call save_pretrained before add_adapter, or wrap the parts with get_peft_model and compose."
            )
        referenced = chosen_components(self.config, embed)
        if not whole or kwargs.get("distributed_checkpoint") or not _writes(is_main_process):
            super().save_pretrained(save_directory, is_main_process, state_dict, False, *args, **options)
        else:
            with staged_save(save_directory, variant) as staged:
                if referenced:
                    staged.components |= write_reference(self, staged.folder, referenced, bases, kwargs | hub)
                else:
                    staged.components |= embedded(self)
                    super().save_pretrained(staged.folder, True, state_dict, False, *args, **options)
                staged.surplus |= export_code(staged.folder, "model", self, save_directory, include_code=include_code)
        self._saved = True
        if push_to_hub and _writes(is_main_process):
            saved = {**options, "state_dict": state_dict, "embed": embed, "bases": bases, "include_code": include_code}
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
        """As in transformers; what was frozen is frozen again, which is said once.

        Args:
            pretrained_model_name_or_path: folder or repository id, of a whole or a reference checkpoint.
            *args: as in transformers.
            verify: compare the hashes of all files with those that were saved; their sizes are compared always.
            bases: for a reference checkpoint, folders or repositories to read components from instead of those that it
                names; they must hold the very same files.
            **kwargs: as in transformers.

        Raises:
            ValueError: files that are not what was saved, a base that is another one.
            OSError: a repository that cannot be read; names the component and the remedy.
        """
        kwargs["use_safetensors"] = _safetensors_only(kwargs.get("use_safetensors"))
        kwargs = with_shared_code(pretrained_model_name_or_path, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        loading = plan_load(cls, pretrained_model_name_or_path, kwargs, bases, verify, wants_info)
        model: Any
        info: dict[str, Any]
        with loading.guard:
            model, info = super().from_pretrained(loading.source, *args, output_loading_info=True, **loading.options)
        if not wants_info:  # who asks what is missing is told
            check_loaded(info, pretrained_model_name_or_path)
        finish_load(model, loading, info)
        restore_adapter_buffers(model)
        cast_buffers(model, model.config.part_dtypes, model.dtype)
        loaded = (model, info) if wants_info else model
        if getattr(model, "_hf_peft_config_loaded", False):
            return loaded  # a folder of adapters, in which PEFT decides what trains
        if frozen := restore_frozen(model, model.config.frozen):
            logger.warning(
                "%d of the loaded parameter tensors are frozen, as they were when saved (%s). unfreeze() trains all.",
                frozen,
                ", ".join(model.config.frozen[:4]) + (", ..." if len(model.config.frozen) > 4 else ""),
            )
        return loaded

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        plan = {
            key: value for key, value in super()._get_dtype_plan(dtype).items() if key not in self._projector_names()
        }
        return plan | dtype_plan(self.config.part_dtypes, dtype)

    @property
    def _keep_in_fp32_modules(self) -> set[str]:
        """What the parts want in float32 and, while the model is quantized, the projectors: small, often still to train."""
        names = self.__dict__.get("_parts_in_fp32", set())
        return names | self._projector_names() if getattr(self, "is_quantized", False) else names

    @_keep_in_fp32_modules.setter
    def _keep_in_fp32_modules(self, names: Iterable[str]) -> None:
        self.__dict__["_parts_in_fp32"] = set(names)

    def _projector_names(self) -> set[str]:
        return {f"{name}_encoder.projector" for name in self.config.encoders}


def _writes(is_main_process: bool) -> bool:
    """Whether this process writes checkpoint files; of several, transformers lets one do so."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_main_process and not (distributed and torch.distributed.get_rank() != 0)


def _safetensors_only(wanted: bool | None) -> bool:
    if wanted is False:
        raise ValueError("Composed models are stored as safetensors only; use_safetensors=False is refused.")
    return True


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a save, and those among them that are for its push."""
    hub = {key: value for key, value in options.items() if key in HUB_ARGUMENTS}
    return {key: value for key, value in options.items() if key not in hub}, hub


def pusher(name: str) -> Callable[..., Any]:
    """A function of `push` by its name; ValueError where code that came with a checkpoint runs without the package."""
    if name not in PUSHERS:
        raise ValueError("Pushing needs the package: pip install cornstarch_hf, then import cornstarch_hf.")
    return PUSHERS[name]
