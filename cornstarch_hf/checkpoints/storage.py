"""Saving and loading of the composed model, as methods of transformers' names; what all classes share is in `plain_storage`."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapters import shared_by_adapters
from ..parts.freezing import restore_frozen
from ..parts.gathering import gathered_ties
from .loading import write_reference
from .manifest import StagedSave, chosen_components, embedded
from .plain_storage import (
    ModelStorage,
    cast_buffers,
    check_quantized,
    check_rebuildable,
    dtype_plan,
    restore_adapter_buffers,
    sync_config,
)

logger = logging.getLogger(__name__)


class MultimodalStorageMixin(ModelStorage):
    """How a composed model is saved and loaded; see `MultimodalModel`."""

    config: MultimodalConfig
    encoders: Any
    language_model: Any
    _saved = False  # whether the whole model lies in some folder
    _save_options = ("embed", "bases")

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
        own: dict[str, Any] = {"embed": embed, "bases": bases, "include_code": include_code, "variant": variant}
        return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **own, **kwargs)

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
        return super().from_pretrained(pretrained_model_name_or_path, *args, verify=verify, bases=bases, **kwargs)

    def _before_save(self, embed: bool | Collection[str] = True, bases: Mapping[str, str] | None = None) -> bool:
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
        chosen_components(self.config, embed)  # a wrong name is refused before anything is written
        return whole

    def _write(
        self,
        staged: StagedSave,
        options: Mapping[str, Any],
        embed: bool | Collection[str] = True,
        bases: Mapping[str, str] | None = None,
    ) -> bool:
        if referenced := chosen_components(self.config, embed):
            staged.components |= write_reference(self, staged.folder, referenced, bases, options)
        else:
            staged.components |= embedded(self.config)
        return bool(referenced)

    @classmethod
    def _load_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("use_safetensors") is False:
            raise ValueError("Composed models are stored as safetensors only; use_safetensors=False is refused.")
        return options | {"use_safetensors": True}

    def _after_load(self, source: Any, info: Mapping[str, Any], wants_info: bool) -> None:
        if not wants_info:  # who asks what is missing is told
            check_loaded(info, source)
        # In this order: casting finds the buffers of adapters filled.
        restore_adapter_buffers(self)
        cast_buffers(self, self.config.part_dtypes, self.dtype)
        if getattr(self, "_hf_peft_config_loaded", False):
            return  # a folder of adapters, in which PEFT decides what trains
        if frozen := restore_frozen(self, self.config.frozen):
            logger.warning(
                "%d of the loaded parameter tensors are frozen, as they were when saved (%s). unfreeze() trains all.",
                frozen,
                ", ".join(self.config.frozen[:4]) + (", ..." if len(self.config.frozen) > 4 else ""),
            )

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        # While quantized, projectors are listed to keep them as they are; that is no wish for float32.
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


def check_loaded(info: Mapping[str, Any], source: Any) -> None:
    """Refuse a model some of whose tensors the checkpoint did not hold (ValueError): they are random now."""
    if missing := sorted(info.get("missing_keys") or ()):
        raise ValueError(
            f"{source} does not hold {len(missing)} tensors of the model that its configuration names ({missing[:3]}): they "
            "would be random. Load a whole checkpoint, or save this one again from the whole model."
        )
