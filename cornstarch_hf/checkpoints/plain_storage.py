"""Saving, pushing and loading under transformers' names, written once for models, projectors and processors.

`storage` adds what only a composed model has.  A checkpoint's own code carries both: what they lean on and only the package
needs (writing that survives a kill, guards, other repositories) stands in files that have thin ones for a checkpoint.
"""

import contextlib
import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapters import adapter_buffers, check_buffers_restorable, restore_token_rows, unwrapped
from ..parts.classes import SharedCode
from ..parts.freezing import frozen_patterns
from ..parts.gathering import nearest_models
from ..parts.known_encoders import check_facts_registered, registered_facts
from ..parts.names import as_regex, compress, matches
from ..parts.stored_adapters import check_not_injected, record_adapters
from ..parts.stored_modules import check_callbacks_storable
from ..parts.weightless import build_without_weights, without_dtypes
from .code_bundle import export_code
from .code_folder import INSTALL
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
        raise ValueError(f"Pushing needs the package: {INSTALL} (a clone or a wheel), then import cornstarch_hf.")
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
        whole = self._before_save(**own)  # before anything is written, since it may refuse
        write = super().save_pretrained
        # Adapters alone, shards of all processes, or a process that writes nothing: transformers' own way.
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
        # Before the configuration is read, which may name the user's classes.
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


class ProcessorStorage(SharedCode, ProcessorMixin):
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
            files = super().save_pretrained(folder, **kwargs)
            for name, processor in self.processors.items():
                if isinstance(processor, PreTrainedTokenizerBase):
                    processor.save_pretrained(os.path.join(folder, tokenizer_folder(name)))
            surplus |= export_code(folder, "processor", self, save_directory, include_code=include_code, others=parts)
        if push_to_hub:
            pusher("push_saved")(self, save_directory, {**hub, "include_code": include_code})
        # Written in the staging folder, which has become the target by now.
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
        return super().from_pretrained(source, *args, **kwargs)

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
            # A tokenizer writes what it was built with, not its attributes.
            sides = {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
            tokenizer.init_kwargs = options | sides
        yield
    finally:
        for tokenizer, options in before:
            tokenizer.init_kwargs = options


def sync_config(model: nn.Module, config: MultimodalConfig, encoders: Mapping[str, Any], language_model: nn.Module):
    """Write into the configuration what only the live model knows: frozen names, dtypes, adapters, callbacks.

    Raises:
        ValueError: a projector, a callback or adapters that a checkpoint cannot hold; names the remedy.
    """
    check_not_injected(language_model, "language_model")
    for name, encoder in encoders.items():
        check_not_injected(encoder.module, f"{name}_encoder.module")
        encoder.projector.check_storable(f"{name}_encoder.projector")
        config.modality(name)["callbacks"] = check_callbacks_storable(encoder.callbacks, name)
    record_adapters(config, encoders, language_model)
    check_facts_registered(config.encoder_types)  # what is not known here would be left out
    config.encoder_types = registered_facts([unwrapped(encoder.module).config for encoder in encoders.values()])
    config.frozen = frozen_patterns(model) or None
    config.part_dtypes = dtypes_by_pattern(model, first_dtype(language_model))


def first_dtype(module: nn.Module) -> torch.dtype:
    """dtype of the first floating-point parameter, else buffer, else torch's default."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def dtypes_by_pattern(model: nn.Module, main: torch.dtype) -> dict[str, Any] | None:
    """Which tensors have another dtype than the language model.

    Returns:
        ``{"": main, dtype: [patterns of saved tensors], "buffers": {dtype: [patterns of buffers]}}``, None where there is
        nothing to tell.  Loading makes buffers that are not saved, and some that are (wav2vec 2.0 Conformer's frequencies),
        in float32; a model that was cast as a whole has them in the dtype of its weights.
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


def _applies(part_dtypes: dict[str, Any] | None, main: torch.dtype) -> bool:
    """Whether a model is loaded in the dtype in which it was saved; any other one is meant for all of it."""
    return bool(part_dtypes) and part_dtypes.get("") == _name(main)


def dtype_plan(part_dtypes: dict[str, Any] | None, main: torch.dtype) -> dict[str, torch.dtype]:
    """Regular expressions of parameter names and the dtype in which each is loaded."""
    if part_dtypes is None or not _applies(part_dtypes, main):
        return {}
    groups = {dtype: patterns for dtype, patterns in part_dtypes.items() if dtype not in ("", "buffers")}
    return {as_regex(pattern): getattr(torch, dtype) for dtype, patterns in groups.items() for pattern in patterns}


def cast_buffers(model: nn.Module, part_dtypes: dict[str, Any] | None, main: torch.dtype) -> None:
    """Give floating-point buffers the dtypes that they had when the model was saved (in place)."""
    if part_dtypes is None or not _applies(part_dtypes, main):
        return
    floating = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    for name, patterns in part_dtypes.get("buffers", {}).items():
        dtype = getattr(torch, name)
        for parent, _, key in (buffer.rpartition(".") for buffer in matches(patterns, floating)):
            module = model.get_submodule(parent)
            # A norm whose class asks for float32 has weights in it, and statistics beside them.
            if all(p.dtype == dtype for p in module.parameters(recurse=False) if p.is_floating_point()):
                module._buffers[key] = module.get_buffer(key).to(dtype)


def built_again(model: PreTrainedModel) -> nn.Module:
    """A model of the same class as its configuration builds it, without weights."""
    return build_without_weights(lambda: type(model)(without_dtypes(copy.deepcopy(model.config))))


def restore_adapter_buffers(model: PreTrainedModel) -> None:
    """Fill the buffers of adapters that no checkpoint holds, which loading leaves empty (in place)."""
    if not model.config.adapters:
        return
    empty = adapter_buffers(model)
    if empty:
        again = built_again(model)
        for name, made in adapter_buffers(again).items():
            if not made.is_meta:
                empty[name].copy_(made)  # computed when it was built; else nothing is known of it
    restore_token_rows(model)


def check_rebuildable(model: PreTrainedModel) -> None:
    """Build the model again from its configuration, on the meta device, and compare names and shapes of its weights.

    Raises:
        ValueError: the checkpoint would not load as this model; names the first differing weights.
    """
    if getattr(model, "hf_quantizer", None) is not None or any(hasattr(p, "ds_id") for p in model.parameters()):
        return  # weights in another form than the configuration's: quantized, or split up by DeepSpeed
    again = built_again(model)
    check_buffers_restorable(again)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    got = {name: tuple(t.shape) for name, t in again.state_dict().items() if isinstance(t, torch.Tensor)}
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


def check_quantized(model: PreTrainedModel) -> None:
    """Refuse quantized weights that would not come back as they are.

    Raises:
        ValueError: a part that was quantized before composing; 4-bit weights that have run on a CPU, whose form for
            inference loses digits when bitsandbytes turns it back for saving.
    """
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
