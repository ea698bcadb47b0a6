"""How many features an item will give: by a registered count, by a rule, or by a dry run.  Needs no weights."""

import contextlib
import copy
import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_multimodal import MultimodalConfig
from ..configuration_projector import MultimodalProjectorConfig
from ..limits import check_features
from ..parts.build_bounds import bounded_tensors, build_guard
from ..parts.classes import resolve_class
from ..parts.known_encoders import COUNT_RULES, COUNT_RULES_OF_EACH_LAYER, STAGES
from ..parts.registries import FEATURE_COUNTS
from ..parts.stored_modules import SLOTS, declared_count
from ..parts.threads import TravellingLock
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes
from ..projectors.projector import Grid, per_item
from .grids import frames_as_items
from .items import MASKS, packed_sizes
from .module import ModalEncoderModule
from .own_parts import OwnParts, settle
from .rebuilding import build_encoder

MOST = 4_096


class CountCache:
    """Numbers by key, of which the one that was asked for longest ago goes when there are too many.

    Threads may share it.
    """

    def __init__(self, most: int = MOST):
        self.most = most
        self._counts: OrderedDict[Any, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def get(self, key: Any) -> int | None:
        """The number, None if it is not known."""
        count = self._counts.get(key)
        if count is not None:
            with contextlib.suppress(KeyError):  # another thread has just put it out
                self._counts.move_to_end(key)
        return count

    def put(self, key: Any, count: int) -> None:
        """Remember a number."""
        self._counts[key] = count
        while len(self._counts) > self.most:
            self._counts.popitem(last=False)


def key_of(name: str, inputs: Mapping[str, Any]) -> tuple:
    """What an item's count depends on: of floating-point inputs the shape, of others all."""
    return name, *sorted((key, _signature(value)) for key, value in inputs.items())


def _signature(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_floating_point():
        return tuple(value.shape), str(value.dtype)
    return tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).digest()


POSTPROCESS_PROJECTOR = "postprocess_projector_callback"
# Numbers of layers that are alike; hierarchical encoders have a list for their stages, `depths`.
DEPTHS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "depth")
# Settings of single layers by their numbers; `out_indices` chooses among the outputs of backbones.
LAYER_NUMBERS = re.compile(r"layer_(id|idx|index)s?$|_layers$|(?<!out)_(indexes|indices)$")
_REMEDY = "register_feature_count({!r}, fn)."


class FeatureCounter:
    """Counts features per item, after selection, callbacks and token reduction, from a configuration alone.

    Threads may share it.  It is pickled, copied and hashed without what it has counted or built.

    Args:
        config: of the composed model; copied where `live` is given.
        live: encoders of a live model, as they are now: their callbacks and projections are written into the configuration's
            copy, and kept themselves where it cannot hold them.
    """

    def __init__(self, config: MultimodalConfig, live: Mapping[str, ModalEncoderModule] | None = None):
        self.config = copy.deepcopy(config) if live else config
        self.own: dict[str, OwnParts] = settle(self.config, live) if live else {}
        self._begin()

    def _begin(self) -> None:
        self._lock = TravellingLock()  # encoders keep a state while they run
        self._probes: dict[tuple[str, bool], Any] = {}
        self._cache = CountCache()
        self._needs_all_layers: set[str] = set()  # encoders of which few layers do not do
        self._few_layers_suffice: set[str] = set()  # and of which they do

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def count(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features that one item of a modality gives.

        Args:
            name: the modality.
            inputs: the item's encoder inputs by the names of the encoder's `forward`; axis 0 has one item, or the
                item's own patches where the encoder packs them.

        Raises:
            ValueError: a registered count is no natural number, the dry run fails, or the count is above
                `limits.MAX_ITEM_FEATURES`.
        """
        key = key_of(name, inputs)
        count = self._cache.get(key)
        if count is None:
            with self._lock:
                known = self._cache.get(key)  # by a thread that came first
                count = self._counted(name, inputs) if known is None else known
            check_features(count, name)
            self._cache.put(key, count)
        return count

    def has_preprocessing(self, name: str) -> bool:
        """Whether a callback sees the inputs of an encoder before it does."""
        own = self.own[name].callbacks if name in self.own else {}
        return "preprocess_callback" in {*self.config.modality(name)["callbacks"], *own}

    def _counted(self, name: str, inputs: Mapping[str, Any]) -> int:
        encoder_config = getattr(self.config, f"{name}_config")
        registered = FEATURE_COUNTS.get(name) or FEATURE_COUNTS.get(encoder_config.model_type)
        if registered is not None:
            return _natural(registered(inputs, encoder_config), name, "the registered feature count")
        encoder = self._cheapest_stub(name)
        callbacks = {slot: cb for slot, cb in encoder.callbacks.items() if cb is not None}
        declared = {slot: fn for slot, cb in callbacks.items() if (fn := declared_count(cb)) is not None}
        after_module = set(callbacks) - {POSTPROCESS_PROJECTOR}
        if any(slot.startswith("post") and slot not in declared for slot in callbacks) or (
            after_module and encoder.projector.needs_grid  # a callback may state a grid, which only a run tells
        ):
            return self._count_by_dry_run(name, inputs)
        count, grid = self._encoded(name, inputs, encoder, set(callbacks) == set(declared), tuple(declared))
        for slot in SLOTS:  # in the order in which they run
            if slot == POSTPROCESS_PROJECTOR:
                count = self._reduced(name, encoder, count, grid)
            if slot in declared:
                count = _natural(declared[slot](inputs, count), name, f"the feature_count of {slot}")
        return count

    def _encoded(
        self, name: str, inputs: Mapping[str, Any], encoder: ModalEncoderModule, by_rule: bool, without: tuple[str, ...]
    ) -> tuple[int, Grid | None]:
        """Selected features before the callbacks that follow the module, and their grid where the projector needs it."""
        entry, encoder_config = self.config.modality(name), getattr(self.config, f"{name}_config")
        model_type = encoder_config.model_type
        holds = not entry["output"] and (entry["layer"] == -1 or model_type in COUNT_RULES_OF_EACH_LAYER)
        # Packed features have no prefix to drop, as a run says.
        holds = holds and not (entry["drop_prefix"] and packed_sizes(inputs))
        rule = COUNT_RULES.get(model_type) if by_rule and holds else None
        items, frames = frames_as_items(inputs, name) if rule is not None and encoder.by_frame else (inputs, [1])
        count = rule(items, encoder_config) if rule is not None else None
        if count is not None:
            lengths, given_grids = [(count - entry["drop_prefix"]) * frames[0]], None
        else:
            output = self._dry_run_with_fallbacks(name, inputs, without, ModalEncoderModule.select)
            lengths = [len(item) for item in per_item(output.last_hidden_state, output.lengths, name)]
            given_grids = output.feature_grids
        grids = encoder.grids(dict(inputs), lengths, given_grids)
        if grids is not None and len(grids) != 1:
            raise ValueError(
                f"{name}: one item gave features in {len(grids)} grids. State its number: {_REMEDY.format(name)}"
            )
        return sum(lengths), grids[0] if grids else None

    def _reduced(self, name: str, encoder: ModalEncoderModule, count: int, grid: Grid | None) -> int:
        """Features that the projector leaves, by its own count or by a run of it alone."""
        projector = encoder.projector
        try:
            left = projector.feature_count(count, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if left is None:
            left = self._reduced_by_run(name, count, grid)
        return _natural(left, name, f"the feature_count of {type(projector.projection).__name__}")

    def _cheapest_stub(self, name: str) -> ModalEncoderModule:
        """The encoder for what stands around its layers: of few layers where it can be built so."""
        if not self._is_stack(name):
            return self._probe(name)
        try:
            return self._probe(name, shallow=True)
        except Exception:  # all layers are built instead, or tell what is wrong
            self._needs_all_layers.add(name)
        return self._probe(name)

    def _probe(self, name: str, shallow: bool = False) -> ModalEncoderModule:
        """The encoder without weights, where it is `shallow` of no more layers than the selected ones need."""
        if (name, shallow) not in self._probes:
            plain, own = without_dtypes(copy.deepcopy(self.config)), self.own.get(name)
            plain.adapters = None
            encoder_config = with_plain_kernels(getattr(plain, f"{name}_config"))
            if shallow:
                _make_shallow(encoder_config, self.config.modality(name)["layer"])
            if own is not None and own.projector is not None:
                setattr(plain, f"{name}_projector_config", MultimodalProjectorConfig(in_features=1, out_features=1))
            try:
                encoder = build_without_weights(functools.partial(_built_encoder, plain, name))
            except RuntimeError as error:  # a tensor of a size that no machine has
                raise ValueError(f"{name}: its encoder cannot be built to count features ({error!s:.300}).") from error
            if own is not None:
                own.put_into(encoder)
            self._probes[name, shallow] = weights_to_meta(encoder.eval())
        return self._probes[name, shallow]

    def _reduced_by_run(self, name: str, count: int, grid: Grid | None) -> int:
        projector = self._cheapest_stub(name).projector
        features = torch.empty(1, count, projector.config.in_features, device="meta")
        run = functools.partial(projector, return_dict=True, grids=None if grid is None else [grid])
        try:
            return dry_run(run, {"inputs_embeds": features}).last_hidden_state.shape[1]
        except Exception as error:
            raise ValueError(
                f"{name}: what {type(projector.projection).__name__} leaves of {count} features could not be found by running "
                f"it on shapes ({type(error).__name__}: {error}). Give its class a method feature_count(length, grid), or "
                f"state it: {_REMEDY.format(name)}"
            ) from error

    def _count_by_dry_run(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features by a run of the whole chain on shapes."""
        return sum(
            len(item)
            for item in self._dry_run_with_fallbacks(name, inputs, (), ModalEncoderModule.__call__).pooler_output
        )

    def _dry_run_with_fallbacks(
        self, name: str, inputs: Mapping[str, Any], without: tuple[str, ...], method: Callable
    ) -> Any:
        """Run a method of the encoder on shapes, the callbacks in some places left out."""
        if self._is_uniform(name):
            try:
                output = self._dry_run_once(self._probe(name, shallow=True), inputs, without, method)
                if name in self._few_layers_suffice or self._same_with_all_layers(
                    name, output, inputs, without, method
                ):
                    self._few_layers_suffice.add(name)
                    return output
            except Exception:  # too few layers for this class: all of them tell, or say what is wrong
                pass
            self._needs_all_layers.add(name)
        failed: Exception | None = None
        # Masks that an encoder makes of its features have no values.
        for given in (inputs, _without_full_masks(inputs)):
            try:
                return self._dry_run_once(self._probe(name), given, without, method)
            except Exception as error:
                failed = failed or error
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
        raise ValueError(
            f"{name}: the number of features for an item of shapes {shapes} could not be found by running "
            f"{type(self._probe(name).module).__name__} and its callbacks on shapes ({type(failed).__name__}: {failed}). "
            f"State it: {_REMEDY.format(name)}"
        ) from failed

    def _same_with_all_layers(
        self, name: str, output: Any, inputs: Mapping[str, Any], without: tuple[str, ...], method: Callable
    ) -> bool:
        """Whether all layers give as many features as a few did; run only where some layer is told apart by its number, as
        by MiniCPM-V's `insert_layer_id`, after which there are fewer features."""
        if not _names_layers(getattr(self.config, f"{name}_config")):
            return True
        return _sizes(output) == _sizes(self._dry_run_once(self._probe(name), inputs, without, method))

    def _is_uniform(self, name: str) -> bool:
        """Whether a few of the encoder's layers give as many features as all of them."""
        callbacks = self.own[name].callbacks if name in self.own else {}
        return not self.config.modality(name)["output"] and not callbacks and self._is_stack(name)

    def _is_stack(self, name: str) -> bool:
        """Whether the encoder is a stack of layers that are alike, of transformers' own classes."""
        if name in self._needs_all_layers:
            return False
        encoder_config = getattr(self.config, f"{name}_config")
        if _is_staged(encoder_config) and (
            self.config.modality(name)["layer"] != -1
            or not isinstance(getattr(encoder_config, "depths", None), (list, tuple))
        ):
            return False
        cls = resolve_class(self.config.modality(name)["encoder_class"], encoder_config, name)
        return cls.__module__.startswith("transformers.models.")

    @staticmethod
    def _dry_run_once(probe: ModalEncoderModule, inputs: Mapping[str, Any], without: tuple[str, ...], method: Callable):
        encoder = copy.copy(probe)
        encoder._modules = {key: module for key, module in encoder._modules.items() if key not in without}
        encoder.__dict__.update(dict.fromkeys(without))
        return dry_run(functools.partial(method, encoder), dict(inputs))


def _built_encoder(config: MultimodalConfig, name: str) -> ModalEncoderModule:
    with build_guard(), bounded_tensors():
        return build_encoder(config, name)


def _is_staged(config: PreTrainedConfig) -> bool:
    return any(isinstance(getattr(config, stages, None), (list, tuple)) for stages in STAGES)


def _names_layers(config: PreTrainedConfig) -> bool:
    """Whether a setting besides the depth speaks of single layers by their numbers."""
    for key, value in config.to_dict().items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if LAYER_NUMBERS.search(key) and key not in DEPTHS and any(type(n) is int for n in numbers):
            return True
    return False


def _without_full_masks(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """An item's inputs without masks that say that all of it is valid: they change no number of features."""
    full = [k for k, x in inputs.items() if MASKS.get(k) and isinstance(x, Tensor) and bool(x.bool().all())]
    return {key: value for key, value in inputs.items() if key not in full}


def _sizes(output: Any) -> Any:
    """Features of each item that an encoder gave, after its projector or before."""
    if isinstance(items := output.pooler_output, list):
        return [len(item) for item in items]
    return output.last_hidden_state.shape[:-1], output.lengths


def _make_shallow(config: PreTrainedConfig, layer: int | list[int]) -> None:
    """Take as few layers as the selected hidden states need, the first of which is of the embeddings; one per stage."""
    if _is_staged(config):
        config.depths = type(config.depths)(1 for _ in config.depths)
        return
    needed = max(-index if index < 0 else index + 1 for index in ([layer] if isinstance(layer, int) else layer))
    for depth in DEPTHS:
        if isinstance(layers := getattr(config, depth, None), int):
            setattr(config, depth, min(layers, needed))


def _natural(count: Any, name: str, what: str) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name}: {what} must be an integer >= 0, got {count!r}.")
    return count
