"""Features that were computed before, by the content of their items: what a server keeps between requests.

Off until `MultimodalModel.remember_features` is called.  Beside it: `continuing`, which leaves out what lies in a cache.
"""

import hashlib
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..language_model.merging import PER_ITEM
from ..limits import check_count
from ..parts.adapters import is_adapted, unwrapped
from ..parts.registries import ALONE, encoder_options
from .continuing import chosen_inputs
from .items import item_count, split_items, without_padding
from .module import ModalEncoderModule
from .selection import EncoderOutput
from .stand_ins import joint, together

DEFAULT_BYTES = 256 * 2**20
_ENTRY_BYTES = 512  # what an entry takes beside its tensors, about
_STATES = 32  # of encoders, by their weights and adapters, of which features are kept at a time
_PLAIN = (bool, int, float, str, type(None))
# What decides what an adapter layer computes, beside its weights.
_OF_ADAPTERS = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")

Item = dict[str, Any]  # one item's inputs
Entry = dict[str, Any]  # one item's features (n_i, hidden), and what the encoder's output says of it
Key = tuple[int, bytes]  # the number of an encoder's state, and a digest of an item


class FeatureMemo:
    """Features by the content of items; those that were asked for longest ago leave when there are too many bytes.

    Threads may share one.  It is neither copied nor saved with the model that holds it.

    Args:
        max_bytes: how much it may hold, on the device on which the features are (ValueError: no positive integer).

    Attributes:
        bytes: how much it holds.
        hits, misses: how many items were found, and how many were encoded to be kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        check_count(max_bytes, "max_bytes")
        self.max_bytes, self.bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._entries: OrderedDict[Key, tuple[Entry, int]] = OrderedDict()
        self._states: dict[int, _State] = {}  # by number, the one that was met last at the end
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, copied: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple]:
        return type(None), ()

    def clear(self) -> None:
        """Forget all features."""
        with self._lock:
            self._entries.clear()
            self._states.clear()
            self.bytes = 0

    def encode(self, encoder: ModalEncoderModule, inputs: dict[str, Any], options: dict[str, Any]) -> EncoderOutput:
        """What an encoder gives of items; those that are not known are encoded, together.

        Args:
            inputs: of the encoder's `forward`.
            options: how it is called besides.

        Returns:
            `pooler_output`, one ``(n_i, hidden)`` tensor per item, and what is said of single items; where nothing tells which
            inputs belong to which item, or changes of weights cannot be seen, the encoder's own output.
        """
        items, state = _items_of(encoder, inputs), _State(encoder)
        if items is None or not state.is_visible:
            return encoder(**inputs, **options)
        call = [{k: v for k, v in inputs.items() if k not in items[0]}, options, _autocast(encoder)]
        digests = [_digest(item, call, encoder.name) for item in items]
        with self._lock:
            number = self._number_of(state)
            keys = [(number, digest) for digest in digests]
            known = {key: self._found(key) for key in keys if key in self._entries}
        # The first of several equal items stands for all of them.
        missing = {key: i for i, key in reversed([*enumerate(keys)]) if key not in known}
        if positions := sorted(missing.values()):
            output = encoder(**chosen_inputs(inputs, items, positions), **options)
            entries = _entries_of(output, len(positions))
            if entries is None:  # what is of which item is not known
                return output if len(positions) == len(items) else encoder(**inputs, **options)
            known |= {keys[i]: entry for i, entry in zip(positions, entries, strict=True)}
        # A first call may put hooks on layers (transformers' own for hidden states); other weights by now are another's.
        after = _State(encoder) if positions else state
        with self._lock:
            self.hits, self.misses = self.hits + len(keys) - len(positions), self.misses + len(positions)
            number = self._number_of(after) if after.has_weights_of(state) else -1
            for i in positions:
                self._keep((number, digests[i]), _copied(known[keys[i]]))
        # Copies: what a caller writes into features is never what another one gets.
        return _output_of([_copied(known[key]) for key in keys])

    def _found(self, key: Key) -> Entry:
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def _keep(self, key: Key, entry: Entry) -> None:
        size = _ENTRY_BYTES + sum(x.numel() * x.element_size() for x in _tensors_of(entry))
        if key in self._entries or key[0] not in self._states or size > self.max_bytes:
            return  # another thread was faster, or its state is of the past
        self._entries[key] = entry, size
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1][1]

    def _number_of(self, state: "_State") -> int:
        """The number of an encoder's state: of the same one that was met before, else a new one."""
        number = next((n for n, known in self._states.items() if known.equals(state)), None)
        if number is not None:
            self._states[number] = self._states.pop(number)
            return number
        past = [n for n, known in self._states.items() if known.is_past(state)]
        past += [n for n in self._states if n not in past][: max(len(self._states) - len(past) - _STATES + 1, 0)]
        for n in past:
            del self._states[n]
        for key in [key for key in self._entries if key[0] in past]:
            self.bytes -= self._entries.pop(key)[1]
        self._states[number := next(self._numbers)] = state
        return number


class _State:
    """Which weights, callbacks and settings an encoder has at a time; the weights themselves are not held."""

    def __init__(self, encoder: ModalEncoderModule):
        modules = list(_modules_of(encoder))
        tensors = [x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        # Those that were made in inference mode do not tell when they are written into.
        self.is_visible = not any(x.is_inference() for x in tensors)
        self._refs = [weakref.ref(x) for x in tensors]
        self._versions = [x._version for x in tensors] if self.is_visible else []
        # Other memory behind the same parameter: it was moved, cast, or given other `data`.
        self._places = [(0 if is_traceable_wrapper_subclass(x) else x.data_ptr(), x.dtype, x.device) for x in tensors]
        self._facts = [_settings_of(part) for part in joint(encoder)] + [_facts_of(module) for module in modules]

    def equals(self, other: "_State") -> bool:
        """Whether features of one are those of the other."""
        return self._facts == other._facts and self.has_weights_of(other)

    def has_weights_of(self, other: "_State") -> bool:
        """Whether their weights are the same, and as they were."""
        same = self._versions == other._versions and self._places == other._places
        return same and all(a() is b() for a, b in zip(self._refs, other._refs, strict=True))

    def is_past(self, other: "_State") -> bool:
        """Whether its weights are gone, or were written into since, as the other one tells."""
        now = {id(ref()): version for ref, version in zip(other._refs, other._versions, strict=True)}
        own = zip(self._refs, self._versions, strict=True)
        return any((x := ref()) is None or now.get(id(x), version) > version for ref, version in own)


def _modules_of(encoder: ModalEncoderModule) -> Iterator[nn.Module]:
    """All modules that take part, those of joined encoders and those that are another encoder's among them."""
    seen: set[nn.Module] = set()
    for part in joint(encoder):
        for top in (part, part.module, part.projector, *part.callbacks.values()):
            for module in top.modules() if isinstance(top, nn.Module) else ():
                if module not in seen:
                    seen.add(module)
                    yield module


def _settings_of(encoder: Any) -> tuple:
    attention = getattr(unwrapped(encoder.module).config, "_attn_implementation", None)
    callbacks = tuple(encoder.callbacks.values())
    own = (encoder.kind, encoder.selection, encoder.trim, encoder.by_frame, encoder.join)
    return *own, tuple(encoder.additional_args), dict(encoder.merging), callbacks, attention


def _facts_of(module: nn.Module) -> tuple:
    """What a module computes with beside its tensors, as far as it is usual to change it."""
    hooks = (*module._forward_hooks, *module._forward_pre_hooks)
    layer = not module._modules and not module._parameters and module.extra_repr()  # an activation, with its slope
    adapters = is_adapted(module) and [repr(getattr(module, key, None)) for key in _OF_ADAPTERS]
    return type(module), vars(module).get("forward"), hooks, layer, adapters


def _autocast(encoder: ModalEncoderModule) -> Any:
    device = next((p.device.type for p in encoder.module.parameters()), "cpu")
    return torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))


def _items_of(encoder: ModalEncoderModule, inputs: Mapping[str, Any]) -> list[Item] | None:
    """The inputs of each item; None where nothing tells which belong to which, or what they hold."""
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    others = [x for x in inputs.values() if not isinstance(x, Tensor)]
    if any(x.is_meta or x.ndim == 0 for x in tensors) or not all(map(_is_plain, others)):
        return None
    starts = [f"{name}." for name in getattr(encoder.join, "others", ())]
    own = {key: x for key, x in inputs.items() if not key.startswith(tuple(starts))}
    groups = [own, *({key: x for key, x in inputs.items() if key.startswith(start)} for start in starts)]
    tiles = next((len(x) for key, x in own.items() if key.endswith("num_tiles")), None)
    count = item_count(own) if tiles is None else tiles
    try:
        split = [split_items(group, count, encoder.name) for group in groups]
    except ValueError:  # of other rows than items; whether they can be encoded the encoder says
        return None
    items = [{key: x for part in parts for key, x in part.items()} for parts in zip(*split, strict=True)]
    return items if items and all(isinstance(x, Tensor) for x in items[0].values()) and items[0] else None


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (list, tuple)) and all(map(_is_plain, value)))


def _digest(item: Item, call: Sequence[Any], name: str) -> bytes:
    """A digest of an item's content, without padding that its encoder does not see, and of how the encoder is called."""
    digest = hashlib.blake2b(repr([sorted(x.items()) if isinstance(x, dict) else x for x in call]).encode())
    for key, value in sorted(without_padding(item, name).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _entries_of(output: Any, count: int) -> list[Entry] | None:
    """What an encoder gave, item by item; None where it gave other rows than one for each of `count` items."""
    said = {key: output[key] for key in PER_ITEM if isinstance(output.get(key), Tensor)}
    levels = output.get("deepstack_features") or []
    rows = [output.pooler_output, *levels, *said.values()]
    if any(row is None or len(row) != count for row in rows):
        return None
    features = enumerate(output.pooler_output)
    return [
        {"": x, "levels": [level[i] for level in levels], **{k: v[i] for k, v in said.items()}} for i, x in features
    ]


def _tensors_of(entry: Entry) -> Iterator[Tensor]:
    for value in entry.values():
        yield from value if isinstance(value, list) else [value]


def _copied(entry: Entry) -> Entry:
    return {k: [x.clone() for x in v] if isinstance(v, list) else v.detach().clone() for k, v in entry.items()}


def _output_of(entries: Sequence[Entry]) -> EncoderOutput:
    """An encoder's output of entries, one per item, in this order."""
    output = EncoderOutput()
    output["pooler_output"] = [entry[""] for entry in entries]
    if entries[0]["levels"]:  # of each level one (n_i, hidden) tensor per item
        output["deepstack_features"] = [list(level) for level in zip(*(e["levels"] for e in entries), strict=True)]
    for key in PER_ITEM:
        if key in entries[0]:
            output[key] = torch.stack([entry[key] for entry in entries])  # (items, ...)
    return output


class FeatureMemoMixin:
    """How a composed model remembers features."""

    config: Any
    _feature_memo: FeatureMemo | None = None

    def remember_features(self, max_bytes: int = DEFAULT_BYTES) -> FeatureMemo:
        """Keep the features of items that were encoded, so that an item that comes again is not encoded again.

        For servers, where conversations go on and users ask about the same picture.  Only without gradients, of encoders in
        evaluation mode in one process, of items that are given as tensors, and without a `preprocess_callback`.  Features hold
        for the weights, adapters, callbacks and hooks with which they were made, as far as torch tells of changes: who writes
        into weights through ``.data`` calls this again.  An item is known by its content, and its features are as its encoder
        gave them then; callbacks must give of an item what does not depend on the others of its batch.

        Args:
            max_bytes: how much is kept, on the device of the features; what was asked for longest ago leaves first.

        Returns:
            the memo, empty: `bytes`, `hits`, `misses`, ``len()``, and `clear()`.

        Raises:
            ValueError: `max_bytes` is no positive integer.
        """
        self._feature_memo = FeatureMemo(max_bytes)
        return self._feature_memo

    def forget_features(self) -> None:
        """Keep no features any more, and free those that are kept."""
        self._feature_memo = None

    def _run_encoder(self, encoder: Any, inputs: dict[str, Any]) -> Any:
        """The output of an encoder for the items of a step."""
        memo, options = self._feature_memo, encoder_options(self.config, ALONE)
        if memo is not None and torch.is_grad_enabled() and any(m.training for m in _modules_of(encoder)):
            memo.clear()  # fused optimizers write into weights without a word
        if memo is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or together():
            return encoder(**inputs, **options)
        alone = all(part.preprocess_callback is None for part in joint(encoder))  # what one makes may be other rows
        if not alone or any(module.training for module in _modules_of(encoder)):
            return encoder(**inputs, **options)
        return memo.encode(encoder, inputs, options)
