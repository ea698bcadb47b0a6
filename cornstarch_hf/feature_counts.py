"""How many features an item will give: by a registered count, by a rule, or by a run on shapes.  Needs no weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .callbacks import declared_count
from .composition import build_encoder
from .configuration_multimodal import MultimodalConfig, MultimodalProjectorConfig
from .encoders import ModalEncoderModule
from .registries import FEATURE_COUNTS
from .shape_probe import run_on_shapes, weights_to_meta, without_weights


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    height, width = inputs["pixel_values"].shape[-2:]
    rows, columns = _pair(config.patch_size)
    return (height // rows) * (width // columns)


def _waveform(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int | None:
    if config.add_adapter:
        return None
    length = inputs["input_values"].shape[-1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        length = (length - kernel) // stride + 1
    return length


# Tokens of the last hidden state of one item by the encoder's model type, None where the rule does not hold; each is
# tested against the encoder.
RULES: dict[str, Callable[[Mapping[str, Any], PreTrainedConfig], int | None]] = {
    "clip_vision_model": lambda inputs, config: _patches(inputs, config) + 1,
    "dinov2": lambda inputs, config: _patches(inputs, config) + 1,
    "siglip_vision_model": _patches,
    "vit": lambda inputs, config: _patches(inputs, config) + 1,
    "whisper": lambda inputs, config: config.max_source_positions,
    "wav2vec2": _waveform,
    "qwen2_vl_vision": lambda inputs, config: int(inputs["grid_thw"].prod()) // config.spatial_merge_size**2,
}


class FeatureCounter:
    """Counts features per item, after selection, callbacks and token reduction, from a configuration alone.

    Args:
        config: of the composed model.
        live: encoders of a live model, whose callbacks are run where the configuration cannot hold them.
    """

    def __init__(self, config: MultimodalConfig, live: Mapping[str, ModalEncoderModule] | None = None):
        self.config = config
        self._live = dict(live or {})
        self._probes: dict[str, Any] = {}
        self._cache: dict[tuple, int] = {}

    def count(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features that one item of a modality gives.

        Args:
            name: the modality.
            inputs: the item's encoder inputs by the names of the encoder's `forward`; axis 0 has one item, or the
                item's own patches where the encoder packs them.

        Raises:
            ValueError: a registered count is no natural number, or the run on shapes fails.
        """
        key = (name, *sorted((k, _signature(v)) for k, v in inputs.items()))
        if key not in self._cache:
            self._cache[key] = self._counted(name, inputs)
        return self._cache[key]

    def _counted(self, name: str, inputs: Mapping[str, Any]) -> int:
        encoder_config = getattr(self.config, f"{name}_config")
        registered = FEATURE_COUNTS.get(name) or FEATURE_COUNTS.get(encoder_config.model_type)
        if registered is not None:
            return _natural(registered(inputs, encoder_config), name, "the registered feature count")
        entry = self.config.modality(name)
        callbacks = {slot: cb for slot, cb in self._live_or_built(name).items() if cb is not None}
        declared = {slot: fn for slot, cb in callbacks.items() if (fn := declared_count(cb)) is not None}
        if any(slot.startswith("post") and slot not in declared for slot in callbacks):
            return self._probed(name, inputs, without=())
        rule = RULES.get(encoder_config.model_type)
        plain = entry["layer"] == -1 and entry["output"] is None and set(callbacks) == set(declared)
        count = rule(inputs, encoder_config) if rule is not None and plain else None
        if count is None:
            count = self._probed(name, inputs, without=tuple(declared))
        else:
            count -= entry["drop_prefix"]
        for slot in callbacks:  # in the order in which they run
            if slot in declared:
                count = _natural(declared[slot](inputs, count), name, f"the feature_count of {slot}")
        return count

    def _live_or_built(self, name: str) -> dict[str, Callable | None]:
        return self._live[name].callbacks if name in self._live else self._probe(name).callbacks

    def _probe(self, name: str) -> ModalEncoderModule:
        if name not in self._probes:
            plain, live = copy.deepcopy(self.config), self._live.get(name)
            plain.adapters = None
            if live is not None:
                plain.modality(name)["callbacks"] = {}
                setattr(plain, f"{name}_projector_config", MultimodalProjectorConfig(in_features=1, out_features=1))
            with without_weights():
                encoder = build_encoder(plain, name)
            if live is not None:
                encoder.projector = copy.deepcopy(live.projector)
                for slot, callback in live.callbacks.items():
                    setattr(encoder, slot, copy.deepcopy(callback) if isinstance(callback, nn.Module) else callback)
            self._probes[name] = weights_to_meta(encoder.eval())
        return self._probes[name]

    def _probed(self, name: str, inputs: Mapping[str, Any], without: tuple[str, ...]) -> int:
        """Features by a run on shapes, the callbacks in some places left out."""
        encoder = copy.copy(self._probe(name))
        encoder._modules = {key: module for key, module in encoder._modules.items() if key not in without}
        encoder.__dict__.update(dict.fromkeys(without))
        try:
            output = run_on_shapes(encoder, dict(inputs))
        except Exception as error:
            shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
            raise ValueError(
                f"{name}: the number of features for an item of shapes {shapes} could not be found by running "
                f"{type(encoder.module).__name__} and its callbacks on shapes ({type(error).__name__}: {error}). State it: "
                f"register_feature_count({name!r}, fn)."
            ) from error
        return sum(len(item) for item in output.pooler_output)


def _natural(count: Any, name: str, what: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name}: {what} must be an integer >= 0, got {count!r}.")
    return count


def _signature(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    small = not value.is_floating_point() and value.numel() <= 4096
    return tuple(value.shape), value.numpy().tobytes() if small else str(value.dtype)


def typical_item(config: PreTrainedConfig, kind: str) -> dict[str, Tensor] | None:
    """Inputs of an ordinary item, where the encoder's configuration fixes their shape; on the meta device."""
    size = getattr(config, "image_size", None)
    if kind == "image" and size is not None:
        return {"pixel_values": torch.empty(1, getattr(config, "num_channels", 3), *_pair(size), device="meta")}
    if getattr(config, "max_source_positions", None) and getattr(config, "num_mel_bins", None):
        return {"input_features": torch.empty(1, config.num_mel_bins, 2 * config.max_source_positions, device="meta")}
    return None
