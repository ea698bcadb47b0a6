"""How many features an item will give: by a registered count, by a rule, or by a dry run.  Needs no weights."""

import contextlib
import copy
import functools
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..configuration_multimodal import MultimodalConfig
from ..configuration_projector import MultimodalProjectorConfig
from ..limits import check_count, check_features
from ..parts.build_bounds import bounded_tensors, build_guard
from ..parts.classes import resolve_class
from ..parts.known_encoders import ALL, encoder_type, is_staged
from ..parts.registries import FEATURE_COUNTS, STEPS
from ..parts.stored_errors import explained
from ..parts.stored_modules import SLOTS, declared_count
from ..parts.threads import TravellingLock
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes
from ..projectors.projector import Grid, per_item
from .grids import first_frames, frames_as_items
from .item_sizes import refused_size
from .items import MASKS, packed_sizes
from .module import ModalEncoderModule
from .own_parts import OwnParts, settle
from .rebuilding import build_encoder
from .selection import wishes
from .towers import TRUE_ON_PADDING

MOST = 4_096  # counts that are remembered: a server would else keep one for every size that it ever saw


class CountCache:
    """Numbers by key, of which the one that was asked for longest ago goes when there are too many.  Threads may share it."""

    def __init__(self, most: int = MOST):
        self.most = most
        self._counts: OrderedDict[Any, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def get(self, key: Any) -> int | None:
        """The number, None if it is not known."""
        count = self._counts.get(key)
        with contextlib.suppress(KeyError):  # not known, or another thread has just put it out
            self._counts.move_to_end(key)
        return count

    def put(self, key: Any, count: int) -> None:
        """Remember a number."""
        self._counts[key] = count
        while len(self._counts) > self.most:
            self._counts.popitem(last=False)


def key_of(name: str, inputs: Mapping[str, Any]) -> tuple:
    """What an item's count depends on: of floating-point inputs the shape, of others all."""
    found: list[Any] = [name]
    for key, value in sorted(inputs.items()):  # for the order of the keywords makes no difference
        if not isinstance(value, Tensor):
            found.append((key, repr(value)))
        else:  # the values of pixels and waves decide nothing; those of masks, grids and ids do
            is_float = value.is_floating_point()
            content = value.dtype if is_float else hashlib.sha256(value.numpy().tobytes()).digest()
            found.append((key, tuple(value.shape), content))
    return tuple(found)


# Numbers of layers that are alike; hierarchical encoders have a list for their stages, `depths`.
DEPTHS = ("num_hidden_layers", "encoder_layers", "num_layers", "n_layers", "depth")
# Settings of single layers by their numbers; `out_indices` chooses among the outputs of backbones.
LAYER_NUMBERS = re.compile(r"layer_(id|idx|index)s?$|_layers$|(?<!out)_(indexes|indices)$")
_REMEDY = "register_feature_count({!r}, fn)."


class FeatureCounter:
    """Counts features per item, after selection, callbacks and token reduction, from a configuration alone.

    A count that a user registered is final.  Else the number goes along the chain: a rule of the encoder's type, or a dry run
    where none holds; then what the callbacks declare and what the projector leaves.  With a callback behind the module that
    declares nothing, the whole chain is run.  Threads may share a counter; it is pickled, copied and hashed without its counts.

    Args:
        config: of the composed model; copied where `live` is given.
        live: encoders of a live model: their callbacks and projections are written into the configuration's copy, and kept
            themselves where it cannot hold them.
    """

    def __init__(self, config: MultimodalConfig, live: Mapping[str, ModalEncoderModule] | None = None):
        config = copy.deepcopy(config) if live else config  # `settle` writes into it
        self.__setstate__({"config": config, "own": settle(config, live) if live else {}})

    def __getstate__(self) -> dict[str, Any]:
        # The lock, the counts and the probes are made anew where it arrives.
        return {"config": self.config, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config: MultimodalConfig = state["config"]
        self.own: dict[str, OwnParts] = state["own"]
        self._lock = TravellingLock()  # encoders keep a state while they run
        self._cache = CountCache()
        self._probes: dict[tuple[str, bool], ModalEncoderModule] = {}  # by modality, and whether of few layers
        # Do few layers suffice?  By modality: True once a run has shown it, False once anything has failed, None until then.
        self._few_layers: dict[str, bool | None] = {}

    def count(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features that one item of a modality gives.

        `inputs` are by the names of the encoder's `forward`; axis 0 has one item, or the item's own patches where the encoder
        packs them.  ValueError where a registered count is no natural number, the dry run fails, or the count is above
        `limits.MAX_ITEM_FEATURES`.
        """
        key = key_of(name, inputs)
        if (count := self._cache.get(key)) is None:
            with self._lock:
                if (count := self._cache.get(key)) is None:  # else by a thread that came first
                    count = self._counted(name, inputs)
            self._cache.put(key, count)
        check_features(count, name)  # each time: a user may lower the cap, or raise it and ask again
        return count

    def batch_count(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features of all items of a batch together; a function in front of the encoder sees its values, a run only shapes."""
        with self._lock:
            first, slot = self._probe(name).preprocess_callback, SLOTS[:1]
            early = first is not None and not isinstance(first, torch.nn.Module)
            inputs = first(dict(inputs), **wishes(first, self._probe(name))) if early else dict(inputs)
            if (count := self._cache.get(key := ("batch", *key_of(name, inputs)))) is None:
                output = self._output(name, inputs, ModalEncoderModule.__call__, slot if early else ())
                count = sum(map(len, output.pooler_output))
                self._cache.put(key, count)
        check_features(count, name)
        return count

    def dry_count(self, name: str, inputs: Mapping[str, Any]) -> int:
        """Features of one item by a dry run of the whole encoder, callbacks and projector (ValueError if it fails)."""
        with self._lock:
            return sum(map(len, self._output(name, inputs, ModalEncoderModule.__call__).pooler_output))

    def has_preprocessing(self, name: str) -> bool | str:
        """Whether a callback sees the inputs of an encoder before it does; ``"tiles"`` where one packs tiles of images."""
        own, stored = self.own[name].callbacks if name in self.own else {}, self.config.modality(name)["callbacks"]
        if stored.get(SLOTS[2], {}).get("name") == "tiles":
            return "tiles"
        return "preprocess_callback" in {*stored, *own}

    # ---- the chain

    def _counted(self, name: str, inputs: Mapping[str, Any]) -> int:
        encoder_config = getattr(self.config, f"{name}_config")
        # What was registered for the modality comes before what was registered for its encoder's type.
        registered = FEATURE_COUNTS.get(name) or FEATURE_COUNTS.get(encoder_config.model_type)
        if registered is not None:
            return check_count(registered(inputs, encoder_config), f"{name}: the registered feature count", least=0)
        encoder = self._probe(name)
        # By place, None for a callback that declares nothing.
        declared = {slot: declared_count(cb) for slot, cb in encoder.callbacks.items() if cb is not None}
        undeclared = encoder.join or any(slot in declared and declared[slot] is None for slot in SLOTS[1:])
        undeclared = undeclared or encoder.projector.config.in_features is None  # a native one, which cannot run alone
        # A callback may state a grid, which only a run tells.
        if undeclared or (encoder.projector.needs_grid and any(slot in declared for slot in SLOTS[:2])):
            return sum(map(len, self._output(name, inputs, ModalEncoderModule.__call__).pooler_output))
        count, grid = self._selected(name, inputs, encoder, declared)
        for slot in SLOTS:  # in the order in which they run
            if slot == SLOTS[2]:  # behind the projector
                count = self._reduced(name, encoder.projector, count, grid)
            if (fn := declared.get(slot)) is not None:
                count = check_count(fn(inputs, count), f"{name}: the feature_count of {slot}", least=0)
        return count

    def _selected(self, name: str, inputs: Mapping[str, Any], encoder: Any, declared: dict) -> tuple[int, Grid | None]:
        """Selected features before the callbacks that follow the module, and their grid where the projector needs it."""
        # A callback in front of the module that declares nothing may hand it other inputs than a rule would see.
        count = None if None in declared.values() else self._by_rule(name, inputs, encoder.by_frame)
        if count is not None:
            if told := self._refused(name, inputs):  # of which a rule knows nothing
                raise ValueError(f"{name}: {told}")
            lengths, given_grids = [count], None
        else:  # without the callbacks whose counts are added afterwards
            without = tuple(slot for slot, fn in declared.items() if fn is not None)
            output = self._output(name, inputs, ModalEncoderModule.select, without)
            lengths = [len(item) for item in per_item(output.last_hidden_state, output.lengths, name)]
            given_grids = output.feature_grids
        grids = encoder.grids(dict(inputs), lengths, given_grids)
        if grids is not None and len(grids) != 1:
            many = f"one item gave features in {len(grids)} grids"
            raise ValueError(f"{name}: {many}. State its number: {_REMEDY.format(name)}")
        return sum(lengths), grids[0] if grids else None

    def _by_rule(self, name: str, inputs: Mapping[str, Any], by_frame: bool) -> int | None:
        """Selected features by the rule of the encoder's type, None where none holds of what is selected."""
        entry, encoder_config = self.config.modality(name), getattr(self.config, f"{name}_config")
        known, dropped = encoder_type(encoder_config), entry["drop_prefix"]
        holds = not entry["output"] and (entry["layer"] == -1 or known.count_layers == ALL)
        if known.count is None or not holds or (dropped and packed_sizes(inputs)):
            return None  # packed features have no prefix to drop, as a run says
        # A video for an encoder of images is (frames, channels, height, width): the rule counts for one frame.
        items, frames = frames_as_items(inputs, name) if by_frame else (inputs, [1])
        with _by_configuration(name):
            count = known.count(items, encoder_config)
        if count is None:
            return None
        check_count(count, f"{name}: the count of {encoder_config.model_type!r}", least=0)
        if dropped and count <= dropped:
            raise ValueError(f"{name}: drop_prefix={dropped} needs items of more tokens than that, got {count}.")
        return (count - dropped) * frames[0]  # the prefix is dropped of each frame

    def _reduced(self, name: str, projector: Any, count: int, grid: Grid | None) -> int:
        """Features that the projector leaves, by its own count or by a dry run of it alone."""
        what = type(projector.projection).__name__
        try:
            left = projector.feature_count(count, grid)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if left is None:
            # (1, count, width), without values
            features = torch.empty(1, count, projector.config.in_features, device="meta")
            run = functools.partial(projector, return_dict=True, grids=None if grid is None else [grid])
            try:
                left = dry_run(run, {"inputs_embeds": features}).last_hidden_state.shape[1]
            except Exception as error:
                raise ValueError(
                    f"{name}: what {what} leaves of {count} features could not be found by running it on shapes "
                    f"({type(error).__name__}: {error}). Give its class a method feature_count(length, grid), or state it: "
                    f"{_REMEDY.format(name)}"
                ) from error
        return check_count(left, f"{name}: the feature_count of {what}", least=0)

    # ---- dry runs

    def _output(self, name: str, inputs: Mapping[str, Any], method: Callable, without: tuple[str, ...] = ()) -> Any:
        """What a method of the encoder gives for the shapes of an item, the callbacks in some places left out."""

        def run(probe: ModalEncoderModule, inputs: Mapping[str, Any]) -> Any:
            encoder = copy.copy(probe)  # shares all parts but the callbacks that are left out
            encoder._modules = {key: module for key, module in encoder._modules.items() if key not in without}
            encoder.__dict__.update(dict.fromkeys(without))
            return dry_run(functools.partial(method, encoder), dict(inputs))

        probe = self._probe(name)
        if (suffices := self._few_layers[name]) is not False:
            with contextlib.suppress(Exception):  # too few for this class: all of them tell, or say what is wrong
                output = run(probe, inputs)
                # Where some layer is told apart by its number, all of them are run once: behind MiniCPM-V's
                # `insert_layer_id` there are fewer features.
                suffices = suffices or not _names_layers(getattr(self.config, f"{name}_config"))
                if suffices or _sizes(output) == _sizes(run(self._built(name, False), inputs)):
                    self._few_layers[name] = True
                    return output
            self._few_layers[name] = False
            probe = self._probe(name)
        masks = {k: x for k, x in inputs.items() if k in MASKS and k not in TRUE_ON_PADDING and isinstance(x, Tensor)}
        full = [key for key, mask in masks.items() if bool(mask.bool().all())]
        failed: Exception | None = None
        # A second time without masks of all that is valid: one that an encoder makes of its features has no values here.
        for left_out in ([], full):
            try:
                return run(probe, {key: value for key, value in inputs.items() if key not in left_out})
            except Exception as error:
                failed = failed or error
        if told := self._refused(name, inputs):
            raise ValueError(f"{name}: {told}") from failed
        if isinstance(failed, ValueError) and str(failed).startswith(f"{name}, item"):
            raise failed  # what a callback says of the item itself
        shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
        raise ValueError(
            f"{name}: the number of features for an item of shapes {shapes} could not be found by running "
            f"{type(probe.module).__name__} and its callbacks on shapes ({type(failed).__name__}: {failed}). "
            f"State it: {_REMEDY.format(name)}"
        ) from failed

    def _refused(self, name: str, inputs: Mapping[str, Any]) -> str | None:
        """What to say of an item of a size that the encoder does not take; None where a callback makes its inputs."""
        encoder = self._probe(name)
        if encoder.preprocess_callback is not None:
            return None
        items = first_frames(inputs) if encoder.by_frame else inputs
        with _by_configuration(name):
            return refused_size(encoder.module, items, "image" if encoder.by_frame else encoder.kind, name)

    def _probe(self, name: str) -> ModalEncoderModule:
        """The encoder without weights, of few layers unless these are known not to suffice."""
        if name not in self._few_layers:
            entry, encoder_config = self.config.modality(name), getattr(self.config, f"{name}_config")
            # One layer per stage keeps the size of the last hidden state alone.
            by_stage = isinstance(getattr(encoder_config, "depths", None), (list, tuple)) and entry["layer"] == -1
            own = name in self.own and self.own[name].callbacks
            alike = not entry["output"] and not own and (by_stage or not is_staged(encoder_config))
            if alike:  # of layers of transformers' own one may stand for all
                cls = resolve_class(entry["encoder_class"], encoder_config, name)
                alike = cls.__module__.startswith("transformers.models.")
            self._few_layers[name] = None if alike else False
        if self._few_layers[name] is not False:
            try:
                return self._built(name, True)
            except Exception:  # all layers are built instead, or tell what is wrong
                self._few_layers[name] = False
        return self._built(name, False)

    def _built(self, name: str, few_layers: bool) -> ModalEncoderModule:
        """The encoder without weights, with as many layers as the selected ones need, or with all."""
        if (name, few_layers) in self._probes:
            return self._probes[name, few_layers]
        plain, own = without_dtypes(copy.deepcopy(self.config)), self.own.get(name)
        plain.adapters = None  # adapters change no number of features
        encoder_config = with_plain_kernels(getattr(plain, f"{name}_config"))
        if few_layers:
            _make_shallow(encoder_config, self.config.modality(name)["layer"])
        if own is not None and own.projector is not None:
            # A stand-in of the smallest size: `put_into` replaces it by the user's own projector.
            setattr(plain, f"{name}_projector_config", MultimodalProjectorConfig(in_features=1, out_features=1))

        def build() -> ModalEncoderModule:
            with build_guard(), bounded_tensors():
                return build_encoder(plain, name)

        with explained(
            f"{name}: its encoder cannot be built to count features"
        ):  # a tensor of a size that no machine has
            encoder = build_without_weights(build)
        if own is not None:
            own.put_into(encoder)
        weights_to_meta(encoder.eval())
        if name in self.config.joined.values():
            STEPS["join"].connect_probe(self.config, name, encoder, lambda other: self._built(other, False))
        return self._probes.setdefault((name, few_layers), encoder)


@contextlib.contextmanager
def _by_configuration(name: str) -> Iterator[None]:
    """What arithmetic with settings of an encoder raises where these make no sense is a ValueError that names it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: features cannot be counted by {name}_config and the names of inputs in {name}_modality "
            f"({type(error).__name__}: {error!s:.300}): restore the values that were saved."
        ) from error


def _names_layers(config: PreTrainedConfig) -> bool:
    """Whether a setting besides the depth speaks of single layers by their numbers."""
    settings = [v for k, v in config.to_dict().items() if LAYER_NUMBERS.search(k) and k not in DEPTHS]
    return any(type(n) is int for v in settings for n in (v if isinstance(v, (list, tuple)) else [v]))  # no bool


def _sizes(output: Any) -> Any:
    """Features of each item that an encoder gave, after its projector or before."""
    if isinstance(items := output.pooler_output, list):
        return [len(item) for item in items]
    return output.last_hidden_state.shape[:-1], output.lengths


def _make_shallow(config: PreTrainedConfig, layer: int | list[int]) -> None:
    """Take as few layers as the selected hidden states need, the first of which is of the embeddings; one per stage."""
    if is_staged(config):
        # The number of stages stays, and with it the factor by which they shrink a picture.
        config.depths = type(config.depths)(1 for _ in config.depths)
        return
    # -2 needs two layers, for it counts from the end; 2, the output of the second one, gets one more than it needs.
    needed = max(-index if index < 0 else index + 1 for index in ([layer] if isinstance(layer, int) else layer))
    for depth in DEPTHS:
        if isinstance(layers := getattr(config, depth, None), int):
            setattr(config, depth, min(layers, needed))
