"""Saving and loading of the composed model, as methods of transformers' names; what all classes share is in `plain_storage`."""

import copy
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapters import (
    adapter_buffers,
    check_buffers_restorable,
    restore_token_rows,
    shared_by_adapters,
    unwrapped,
)
from ..parts.freezing import frozen_patterns, restore_frozen
from ..parts.gathering import gathered_ties, nearest_models, untied_weights
from ..parts.known_encoders import check_facts_registered, registered_facts
from ..parts.names import as_regex, compress, matches
from ..parts.stored_adapters import check_no_views, check_not_injected, record_adapters
from ..parts.stored_modules import check_callbacks_storable
from ..parts.weightless import build_without_weights, without_dtypes
from .described import check_projector, check_replaced, check_settings
from .finding import Bases, Options
from .loading import write_reference
from .manifest import Embed, StagedSave, chosen_components, components_of
from .plain_storage import ModelStorage, first_dtype, pusher

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
        embed: Embed = True,
        include_code: bool | None = None,
        bases: Bases = None,
        variant: str | None = None,
        **kwargs,
    ):
        """As in transformers, safetensors only; a kill at any moment leaves the old checkpoint or the new one.

        Args:
            save_directory: the folder; files in it that are not of an earlier save stay.
            is_main_process, state_dict, *args, variant, **kwargs: as in transformers.
            push_to_hub: whether to push it afterwards, to `repo_id` (by default the folder's name).
            embed: True stores all weights.  False stores a *reference checkpoint*: projectors, changed tensors and adapters
                alone, with the repositories and commits of the rest.  A list names the components (``"vision_encoder"``,
                ``"language_model"``) whose weights are stored all the same.
            include_code: whether the checkpoint carries the code that loads it, for `trust_remote_code=True` where this package
                is not installed.  By default only a model that came with its code does: code that is frozen into a checkpoint
                gets no fixes and asks each reader to trust it, and this package is one install away.
            bases: repositories (``"user/name"`` or ``"user/name@revision"``) of components for `embed=False`, where they
                are not known from loading.

        Raises:
            ValueError: something in the model would not come back: an unregistered callback or projection, or weights
                that the configuration does not describe; only adapters would be saved (`add_adapter`) of a model that was
                never saved itself; a component that cannot be referred to.
            OSError: the disk is full, a base cannot be read, ...; the old checkpoint is still there.
        """
        own: dict[str, Any] = {"embed": embed, "bases": bases, "include_code": include_code, "variant": variant}
        return super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **own, **kwargs)

    @classmethod
    def from_pretrained_multimodal_model(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The composition of a native multimodal model's parts; takes and raises what `cornstarch_hf.from_native` does."""
        return pusher("from_native")(pretrained_model_name_or_path, **kwargs)[0]

    def _before_save(self, embed: Embed = True, bases: Bases = None) -> bool:
        whole = not getattr(self, "_hf_peft_config_loaded", False)
        if whole:
            check_quantized(self)  # before anything asks for the state: bitsandbytes changes 4-bit weights then
            sync_config(self, self.config, self.encoders, self.language_model)
            check_no_views(self)
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

    def _write(self, staged: StagedSave, options: Options, embed: Embed = True, bases: Bases = None) -> bool:
        staged.components |= {name: {"source": "embedded"} for name in components_of(self.config)}
        if referenced := chosen_components(self.config, embed):
            staged.components |= write_reference(self, staged.folder, referenced, bases, options)
        return bool(referenced)

    @classmethod
    def _load_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("use_safetensors") is False:
            raise ValueError("Composed models are stored as safetensors only; use_safetensors=False is refused.")
        return options | {"use_safetensors": True}

    def _after_load(self, source: Any, info: Mapping[str, Any], wants_info: bool) -> None:
        if not wants_info:  # who asks what is missing is told
            check_loaded(info, source)
        restore_buffers(self)
        self._untied = untied_weights(self)  # what transformers has left apart, as it was saved
        if getattr(self, "_hf_peft_config_loaded", False):
            return  # a folder of adapters, in which PEFT decides what trains
        if frozen := restore_frozen(self, self.config.frozen):
            logger.warning(
                "%d of the loaded parameter tensors are frozen, as they were when saved (%s). unfreeze() trains all.",
                frozen, ", ".join(self.config.frozen[:4]) + (", ..." if len(self.config.frozen) > 4 else ""),
            )  # fmt: skip

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        # While quantized, projectors are listed to keep them as they are; that is no wish for float32.
        projectors = self._projector_names()
        plan = {key: value for key, value in super()._get_dtype_plan(dtype).items() if key not in projectors}
        stored = self.config.part_dtypes or {}
        if stored.get("") == _name(dtype):  # any other dtype than the one in which it was saved is meant for all of it
            for name in [name for name in stored if name not in ("", "buffers")]:
                plan |= {as_regex(pattern): getattr(torch, name) for pattern in stored[name]}
        return plan

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


def sync_config(model: nn.Module, config: MultimodalConfig, encoders: Mapping[str, Any], language_model: nn.Module):
    """Write into the configuration what only the live model knows: frozen names, dtypes, adapters, callbacks (ValueError for
    what a checkpoint cannot hold)."""
    check_replaced(config, {"language_model": language_model} | {f"{name}_encoder": e for name, e in encoders.items()})
    check_not_injected(language_model, "language_model")
    for name, encoder in encoders.items():
        check_projector(config, name, encoder.projector)
        setattr(config, f"{name}_projector_config", encoder.projector.config)  # of one that was put in place of another
        check_not_injected(encoder.module, f"{name}_encoder.module")
        encoder.projector.check_storable(f"{name}_encoder.projector")
        config.modality(name)["callbacks"] = check_callbacks_storable(encoder.own_callbacks, name)
        config.modality(name)["shares"] = encoder.shares
    record_adapters(config, encoders, language_model)
    check_facts_registered(config.encoder_types)  # what is not known here would be left out
    config.encoder_types = registered_facts([unwrapped(encoder.module).config for encoder in encoders.values()])
    config.frozen = frozen_patterns(model) or None
    config.part_dtypes = dtypes_by_pattern(model, first_dtype(language_model))
    _sync_tie(unwrapped(language_model))


def _sync_tie(text: PreTrainedModel) -> None:
    """Say that a head is the table of embeddings, where it was made so by hand (ValueError where its class cannot say it)."""
    head, table = (getattr(x, "weight", None) for x in (text.get_output_embeddings(), text.get_input_embeddings()))
    if head is None or head is not table or text.config.tie_word_embeddings:
        return
    if not text._tied_weights_keys:  # the checkpoint would hold no head
        raise ValueError(
            f"The head of the language model is its table of embeddings, which {type(text).__name__} cannot store: give it a "
            "copy of its own, torch.nn.Parameter(weight.detach().clone())."
        )
    text.config.tie_word_embeddings = True


def dtypes_by_pattern(model: nn.Module, main: torch.dtype) -> dict[str, Any] | None:
    """Which tensors have another dtype than the language model, None where none has.

    As ``{"": main, dtype: [patterns of saved tensors], "buffers": {dtype: [patterns of buffers]}}``.  Loading makes buffers
    that are not saved, and some that are (wav2vec 2.0 Conformer's frequencies), in float32; a model that was cast as a
    whole has them in the dtype of its weights.
    """
    saved = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    found = _grouped(saved, main)
    if buffers := _grouped(dict(model.named_buffers()), torch.float32):
        found["buffers"] = buffers
    return {"": _name(main), **found} if found else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _grouped(tensors: Mapping[str, torch.Tensor], usual: torch.dtype) -> dict[str, Any]:
    """Patterns of floating-point tensors by dtype, which match no other tensor: loading casts whatever they match."""
    others = sorted({_name(t.dtype) for t in tensors.values() if t.dtype != usual and t.is_floating_point()})
    return {d: compress((n for n, t in tensors.items() if _name(t.dtype) == d), tensors) for d in others}


def built_again(model: PreTrainedModel) -> nn.Module:
    """A model of the same class as its configuration builds it, without weights."""
    return build_without_weights(lambda: type(model)(without_dtypes(copy.deepcopy(model.config))))


def restore_buffers(model: PreTrainedModel) -> None:
    """Fill the buffers of adapters that no checkpoint holds, which loading leaves empty, and give floating-point buffers the
    dtypes that they had when the model was saved (in place)."""
    if model.config.adapters:
        empty = adapter_buffers(model)
        for name, made in (adapter_buffers(built_again(model)) if empty else {}).items():
            if not made.is_meta:
                empty[name].copy_(made)  # computed when it was built; else nothing is known of it
        restore_token_rows(model)
    part_dtypes = model.config.part_dtypes
    if not part_dtypes or part_dtypes.get("") != _name(model.dtype):
        return
    floating = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    for name, patterns in part_dtypes.get("buffers", {}).items():
        dtype = getattr(torch, name)
        for parent, _, key in (buffer.rpartition(".") for buffer in matches(patterns, floating)):
            module = model.get_submodule(parent)
            # A norm whose class asks for float32 has weights in it, and statistics beside them.
            if all(p.dtype == dtype for p in module.parameters(recurse=False) if p.is_floating_point()):
                module._buffers[key] = module.get_buffer(key).to(dtype)


def check_rebuildable(model: PreTrainedModel) -> None:
    """Build the model again from its configuration, without weights, and compare names and shapes of what it saves; ValueError,
    with the first differing weights, where the checkpoint would not load as this model."""
    if getattr(model, "hf_quantizer", None) is not None or any(hasattr(p, "ds_id") for p in model.parameters()):
        return  # weights in another form than the configuration's: quantized, or split up by DeepSpeed
    again: Any = built_again(model)
    check_settings(model.encoders, again.encoders)
    check_buffers_restorable(again)
    for name, encoder in model.encoders.items():
        mine, built = (layers_of(m.projector.projection) for m in (encoder, again.encoders[name]))
        if mine != built:
            raise ValueError(
                f"{name}_encoder.projector: its layers are {mine}, and its configuration builds {built}: put a projector of "
                "its own configuration there instead, MultimodalProjector(MultimodalProjectorConfig(...))."
            )
    expected, got = (
        {name: tuple(t.shape) for name, t in made.state_dict().items() if isinstance(t, torch.Tensor)}
        for made in (model, again)
    )
    ignored = model._keys_to_ignore_on_save or set()
    changed = sorted(n for n in expected.keys() & got.keys() if expected[n] != got[n])
    missing, surplus = sorted(expected.keys() - got.keys() - ignored), sorted(got.keys() - expected.keys() - ignored)
    if changed or missing or surplus:
        raise ValueError(
            "This model cannot be saved so that it loads again: its configuration describes other weights. Only in the "
            f"model: {missing[:4]} ({len(missing)}); only in what the configuration builds: {surplus[:4]} "
            f"({len(surplus)}); other shapes: {[(n, expected[n], got[n]) for n in changed[:3]]}. Undo the change to the "
            "part, or give the part a class of its own whose configuration holds it."
        )


def layers_of(projection: nn.Module) -> dict[str, str]:
    """Classes of a projection's layers that have no weights, by their names: a checkpoint would not tell of another one."""
    return {
        name: type(module).__name__
        for name, module in projection.named_modules()
        if not [*module.parameters(), *module.buffers(), *module.children()]
    }


def check_quantized(model: PreTrainedModel) -> None:
    """Refuse quantized weights that would not come back as they are (ValueError): of a part that was quantized before
    composing, or in the form for inference on a CPU, which loses digits when bitsandbytes turns it back for saving."""
    for name, part in nearest_models(model):
        if getattr(model, "hf_quantizer", None) is None and getattr(unwrapped(part), "hf_quantizer", None) is not None:
            raise ValueError(
                f"{name} was quantized before composing, and a checkpoint cannot hold that: compose and save the plain parts, "
                "then load them with from_pretrained(folder, quantization_config=...); its adapters are saved apart."
            )
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} holds 4-bit weights in the form that bitsandbytes made for inference on a CPU, from which saving "
                "would not give them back exactly: save before running the model, or save the adapters alone."
            )
