"""What a saved model needs besides its weights: a configuration in step with it, from which it can be built again."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapters import adapter_buffers, check_buffers_restorable, restore_token_rows, unwrapped
from ..parts.freezing import frozen_patterns
from ..parts.gathering import nearest_models
from ..parts.known_encoders import registered_facts
from ..parts.names import as_regex, compress, matches
from ..parts.stored_adapters import check_not_injected, record_adapters
from ..parts.stored_modules import check_callbacks_storable
from ..parts.weightless import build_without_weights, without_dtypes


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
                empty[name].copy_(made)
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
