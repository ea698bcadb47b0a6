"""One encoder of a composed model: preprocess, module, select, postprocess, project, postprocess."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..configuration_projector import feature_width
from ..parts.adapters import unwrapped
from ..parts.classes import origin_of
from ..parts.frozen_modes import is_checkpointing
from ..parts.known_encoders import deterministic_inputs, encoder_type, refuse_random_encoder
from ..parts.registries import ALONE, CALLBACKS, SAID, merging_options
from ..parts.signatures import accepts, forward_parameters
from ..parts.stored_modules import SLOTS
from ..processing.video import FRAME_MASK
from ..projectors.projector import MultimodalProjector, per_item
from .grids import Grid, GridQuery, found_grids, frames_as_items, joined_frames
from .item_sizes import refused_by
from .items import MASKS, ItemLengthsUnknown, Padded, feature_lengths, is_raw_sequence, item_count, padding_of, parts_of
from .selection import (
    EncoderOutput,
    Features,
    Selection,
    as_output,
    lengths_of,
    placed,
    rows_of_items,
    select_features,
    wishes,
    with_features,
)
from .towers import NOT_INPUTS, check_types, infer_kind, one_of, packs_frames, resolve_tower
from .unused_layers import Picklable, states_alone

# The encoder's own output, empty where nothing of it is read, and the selected features.
Encoded = tuple[Mapping, Features]


class ModalEncoderModule(Picklable):
    """An encoder with its projector and callbacks.

    The order is: `preprocess_callback` → module → selection → `postprocess_module_callback` → projector, token reduction
    included → `postprocess_projector_callback`.

    Args:
        model: an encoder, or a composite model (CLIPModel, WhisperForConditionalGeneration, ...) whose tower is taken;
            may be wrapped by PEFT.  Also accepted as `module=`.
        projector: None, or one that lacks its sizes, is completed when a model is composed.
        additional_args: names of inputs that only the callbacks see.
        preprocess_callback: ``fn(inputs: dict) -> dict``, before the module.
        postprocess_module_callback: ``fn(inputs, output) -> output`` on the selected features, ``output[0]`` being
            `last_hidden_state`; also accepted as `postprocess_encoder_callback=`.  One that changes their number before a
            reduction over a grid states the new one, ``(items, 2)`` height and width, as `feature_grids` in the output.
        postprocess_projector_callback: ``fn(inputs, output) -> output`` on the projected features; its
            `last_hidden_state` may become ``(items, tokens, hidden)``, a list with one tensor per item, or a
            ``(sum, hidden)`` tensor with `feature_lens` in the output.
        kind: ``"image"``, ``"video"``, ``"audio"``, ``"text"``, ...; inferred when None.
        layer: hidden state to project, or several that are concatenated; -1 is the last hidden state.
        output: output field to project instead.
        drop_prefix: leading tokens of each item to drop.
        data_format: which axis of the encoder's output holds the features' width: ``"channels_last"``, ``"channels_first"`` or
            ``"layers_first"``; found by a dry run when None.
        shares: name of the modality whose very module, and projector where it is that too, these are: one tower for images and
            videos, which is stored once.
        input_names: keywords of the composed model for inputs of the encoder or its callbacks, ``{keyword: input}``; others
            keep the names that processors give them.
        layer_features, merge, marks: how features reach the language model in other ways, see `merging_options`.
        trim: whether its processor tells which frames of a window hold sound, by the mask that the encoder takes: the others
            are no features then.
        tiles: ``"concat"``, ``"newline"`` or ``"unpad"``: how an image's tiles become one sequence, see `tiles.PackedTiles`.

    Raises:
        TypeError: no encoder, a class instead of an instance, an abstract class, a callback that is not callable.
        ValueError: two names of one argument, several towers, a bad selection, an encoder that leaves out a part at random,
            `trim` of one that takes no mask.
    """

    module: Any
    projector: Any
    join: Any = None  # with the features of which encoders these are joined, see `joining`
    known_width: int | None = None  # of the features, where no dry run is to find it; 0: none is needed

    def __init__(
        self,
        model: Any = None,
        projector: MultimodalProjector | None = None,
        additional_args: Sequence[str] | None = None,
        preprocess_callback: Callable | None = None,
        postprocess_module_callback: Callable | None = None,
        postprocess_projector_callback: Callable | None = None,
        *,
        kind: str | None = None,
        layer: int | Sequence[int] = -1,
        output: str | None = None,
        drop_prefix: int = 0,
        data_format: str | None = None,
        trim: bool = False,
        shares: str | None = None,
        input_names: Mapping[str, str] | None = None,
        layer_features: str | None = None,
        merge: str | None = None,
        marks: Mapping[int, int] | None = None,
        tiles: str | None = None,
        module: Any = None,
        postprocess_encoder_callback: Callable | None = None,
    ):
        super().__init__()
        self.shares_with = shares  # until composing makes it so
        self._lenders: dict[str, tuple[str, ModalEncoderModule]] = {}
        given = one_of(model=model, module=module)
        self.module = resolve_tower(given, kind)
        self.origin = origin_of(given, self.module)  # what it was loaded from, and which part of that encodes
        if projector is not None and not isinstance(projector, MultimodalProjector):
            raise TypeError(
                f"projector must be a MultimodalProjector, got {type(projector).__name__}: wrap your module by "
                "MultimodalProjector(MultimodalProjectorConfig(), projection=module)."
            )
        # Registered even where it is missing, so that parameters keep their order, which optimizers rely on.
        self.register_module("projector", projector)
        check_types(additional_args, trim)
        self.additional_args = list(additional_args or [])
        self.kind = kind or infer_kind(self.module)
        if tiles is not None:
            given = (tiles, self.additional_args, postprocess_projector_callback, self.kind)
            self.additional_args, postprocess_projector_callback = CALLBACKS["tiles"].target.chosen(*given)
        self.preprocess_callback = preprocess_callback
        self.postprocess_module_callback = one_of(
            postprocess_module_callback=postprocess_module_callback,
            postprocess_encoder_callback=postprocess_encoder_callback,
        )
        self.postprocess_projector_callback = postprocess_projector_callback
        inner = unwrapped(self.module)
        refuse_random_encoder(inner.config, self.additional_args, type(inner).__name__)
        # One that takes single images, (items, channels, height, width), gets a video as its frames.
        self.by_frame = self.kind == "video" and infer_kind(self.module) == "image" and not packs_frames(self.module)
        self.selection = Selection(output, tuple(layer) if isinstance(layer, list) else layer, drop_prefix, data_format)
        self.trim = trim
        _check_options(self)
        self.merging = merging_options(layer_features, merge, marks, self.kind)
        self.input_names = dict(input_names or {})
        if unknown := sorted(set(self.input_names.values()) - set(self.parameter_names)):
            raise ValueError(f"{self.kind}: input_names names {unknown}, expected some of {self.parameter_names}.")
        self.stand_in: dict[str, Tensor] | None = None  # inputs of an item, for a step without; None: see `stand_ins`
        self.name = self.kind  # until composing gives it the modality's name

    def share(self, part: str, name: str, lender: "ModalEncoderModule") -> None:
        """Use the ``"module"``, the ``"projector"`` or a callback of the encoder of another modality as its own (in place)."""
        self._modules.pop(part, None)
        self.__dict__.pop(part, None)  # None, where it has no such callback itself
        self._lenders[part] = name, lender

    @property
    def shares(self) -> dict[str, str]:
        """What this encoder has not itself: ``{"module": modality, "projector": modality, ...}``."""
        own = {**self._modules, **self.__dict__}
        return {part: name for part, (name, _) in self._lenders.items() if part not in own}

    def __getattr__(self, name: str) -> Any:
        # Looked up each time, so that what is put in a shared part's place (an adapter around it) serves both.
        lent = self.__dict__.get("_lenders", {}).get(name)
        return super().__getattr__(name) if lent is None else getattr(lent[1], name)

    @property
    def callbacks(self) -> dict[str, Callable | None]:
        """The callbacks by the name of their place."""
        return {slot: getattr(self, slot) for slot in SLOTS}

    @property
    def own_callbacks(self) -> dict[str, Callable | None]:
        """The callbacks without those of another encoder."""
        return {slot: callback for slot, callback in self.callbacks.items() if slot not in self.shares}

    @property
    def parameter_names(self) -> list[str]:
        """Inputs of the encoder's `forward`, then the additional arguments."""
        names = [p for p in forward_parameters(self.module) if p not in NOT_INPUTS]
        names += [FRAME_MASK] if self.by_frame else []  # so that a composed model routes the mask here
        return names + [name for name in self.additional_args if name not in names]

    def feature_width(self) -> int | None:
        """Width of the selected features by the encoder's configuration, None where it does not tell."""
        width = feature_width(unwrapped(self.module).config)
        return width and width * len(self.selection.layers)

    def forward(self, *, say: Sequence[str] = (), **inputs: Any) -> EncoderOutput:
        """Encode and project items.

        Args:
            say: what the output is to say of the items beside their features, of `registries.SAID`; `ALONE` where of the
                encoder's own output nothing is read, which is left out then if layers behind the selected ones do not run.
            **inputs: of the encoder's `forward`, and the additional arguments; floats are cast to the encoder's dtype.

        Returns:
            the encoder's own output, with one ``(n_i, hidden)`` tensor per item as `pooler_output`.

        Raises:
            TypeError: a callback returns something else than it should.
            ValueError: a selection that does not exist, a width that does not fit, features that cannot be split.
        """
        if self.join is not None:
            return self.join.run(self, say, inputs)
        return self.finished(say, *self.features(inputs, say))

    def features(self, inputs: dict, say: Sequence[str] = ()) -> tuple[dict, Mapping, Features, list[int] | None]:
        """The items' inputs, the encoder's own output, the features to project, and their lengths before the callback."""
        # (items, tokens, width), or (sum of tokens, width) with `feature_lens`
        inputs, raw, selected = self._selected(inputs, ALONE in say)
        given = selected if self.postprocess_module_callback is None else selected.within(raw)
        # One that writes into what it is given has changed the lengths before it too.
        return inputs, raw, self._postprocess("postprocess_module_callback", inputs, given), lengths_of(given)

    def finished(
        self, say: Sequence[str], inputs: dict, raw: Mapping, output: Features, encoded: list[int] | None
    ) -> EncoderOutput:
        """What `forward` gives, of what `features` gave."""
        output = self._project(inputs, output, encoded)  # (items, fewer or as many, hidden), or packed
        output = self._postprocess("postprocess_projector_callback", inputs, output)
        items = per_item(output[0], output.lengths, self.name)  # one (n_i, hidden) per item
        said: dict[str, Any] = {}
        for what in (*say, *(["levels"] if self.merging["layer_features"] else [])):
            said |= SAID[what](self, inputs, raw, output, encoded, [len(item) for item in items])
        return with_features(raw, raw.get("last_hidden_state"), None, pooler_output=items, **said)

    def select(self, **inputs: Any) -> EncoderOutput:
        """The selected features of items as `last_hidden_state`, before the callbacks that come after the module."""
        _, raw, features = self._selected(inputs)
        return features.within(raw)

    def _selected(self, inputs: dict, alone: bool = False) -> tuple[dict, Mapping, Features]:
        """The items' inputs for the callbacks, the encoder's own output, and the selected features."""
        # These are for the module: callbacks get the items' inputs alone.
        options = {key: inputs.pop(key) for key in ("output_attentions", "output_hidden_states") if key in inputs}
        options[ALONE] = alone
        if self.preprocess_callback is not None:
            inputs = self.preprocess_callback(inputs, **wishes(self.preprocess_callback, self))
            if not isinstance(inputs, dict):
                raise TypeError(f"{self.name}.preprocess_callback must return a dict, got {type(inputs).__name__}.")
        # Callbacks may need more inputs than the encoder takes, which its `forward` would refuse.
        weight, takes = first_weight(self.module), forward_parameters(self.module)
        arguments = {k: placed(v, weight, self.module) for k, v in inputs.items() if k in takes}
        if self.by_frame:
            # (items, frames, channels, height, width), and (items, frames)
            return inputs, *self._encode_frames(arguments | {FRAME_MASK: inputs.get(FRAME_MASK)}, options)
        return inputs, *self._encode(arguments, options)

    def _encode(self, arguments: dict, options: dict) -> Encoded:
        """Items together where that changes nothing, else parts of the batch one after the other."""
        padded, config = padding_of(arguments, self.name), unwrapped(self.module).config
        # By length where an encoder reads the padding; adapters are convolutions that see no mask.
        reads = encoder_type(config).padding_changes_features or getattr(config, "add_adapter", False)
        by_length = padded is not None and (
            is_raw_sequence(arguments, padded) or (reads and min(padded.lengths) < padded.size)
        )
        if not by_length:
            try:
                return self._encode_batch(arguments, padded, options)
            except ItemLengthsUnknown as unknown:
                by_length = padded is not None and not unknown.packed
        items: dict[int, Tensor] = {}
        parts = parts_of(arguments, padded if by_length else None, self.name)
        for part, positions in parts:
            raw, selected = self._encode_batch(part, None, options)
            if len(parts) == 1:
                return raw, selected  # the batch was not split: the encoder's own output can be kept
            # (n_i, width) each, back at its item's place in the batch
            items |= dict(zip(positions, per_item(selected[0], selected.lengths, self.name), strict=True))
        ordered = [items[i] for i in range(len(items))]
        together = EncoderOutput(last_hidden_state=torch.cat(ordered))  # (sum of tokens, width)
        return together, Features(together.last_hidden_state, [len(x) for x in ordered])

    def _encode_frames(self, arguments: dict, options: dict) -> Encoded:
        """Each frame of a video as an image of its own; an item's features are those of its frames, in order."""
        frames, counts = frames_as_items(arguments, self.name)  # (frames of all items, channels, height, width)
        raw, selected = self._encode_batch(frames, None, options)  # (frames of all items, tokens, width), or packed
        # (items, frames * tokens, width) where all have as many, else (sum of tokens, width)
        features, lens = joined_frames(selected[0], selected.lengths, counts)
        if (grids := selected.feature_grids) is not None:
            grids = torch.tensor([[count, *grids[0].tolist()] for count in counts])  # (items, 3)
        return raw, Features(features, lens, grids)

    def _encode_batch(self, arguments: dict, padded: Padded | None, options: dict) -> Encoded:
        """One call of the module, and what is selected of its output."""
        wanted = options | {"return_dict": True}
        if self.selection.needs_hidden_states:
            wanted["output_hidden_states"] = True
        if "use_cache" in forward_parameters(self.module) and self.training and is_checkpointing(self.module):
            wanted["use_cache"] = False  # a frozen encoder does not know that this is training
        wanted = {key: value for key, value in wanted.items() if key != ALONE and accepts(self.module, key)}
        trains = any(getattr(x, "requires_grad", False) for x in (*arguments.values(), *self.module.parameters()))
        fixed = deterministic_inputs(arguments, unwrapped(self.module).config)
        # A frozen encoder keeps no activations, unless gradients pass through it to its inputs.
        with nullcontext() if trains else torch.no_grad():
            try:
                states = states_alone(self, arguments | fixed, options, wanted)
                whole = EncoderOutput(hidden_states=states) if states else self.module(**arguments, **fixed, **wanted)
            except (RuntimeError, ValueError) as error:
                kind = "image" if self.by_frame else self.kind
                if (told := refused_by(self.module, arguments, kind, self.name, error)) is None:
                    raise
                raise ValueError(f"{self.name}: {told}") from error
        raw = as_output(whole)
        # The width tells maps with their channels first from maps with them last.
        alone = self.join is None and self.projector is not None
        width = self.projector.config.in_features if alone else self.feature_width()
        count = item_count(arguments)
        # (rows, tokens, width) -> (items, tokens, width), or (sum of tokens, width)
        features, grid = select_features(raw, self.selection, self.name, width, count)
        features = rows_of_items(features, count)
        own: Mapping = raw if states is None else {}
        lens = feature_lengths(features, arguments, own, self.module, padded, self.selection.drop_prefix)
        grids = raw.feature_grids if grid is None else torch.tensor([grid] * len(features))  # (items, 2)
        return own, Features(features, lens, grids)

    def grids(self, inputs: dict, lengths: list | None, given: Any = None, changed: bool = False) -> list[Grid] | None:
        """The grid of each item's features: the given one, else by what `GridQuery` holds; None where the projector needs none.

        ValueError where it needs one that is not known.
        """
        if self.projector is None or not self.projector.needs_grid or lengths is None:
            return None
        config, dropped = unwrapped(self.module).config, self.selection.drop_prefix
        query = GridQuery(inputs, config, self.kind, lengths, changed, dropped)
        reason = f"the projector ({self.projector.config.projection_type}) reduces over height and width"
        return found_grids(query, given, self.by_frame, self.name, reason)

    def _project(self, inputs: dict, output: Features, encoded: list[int] | None) -> Features:
        """Features, ``(items, tokens, width)`` or packed, in the language model's width; the projector may leave fewer.

        `inputs` may tell the items' grids; `encoded` are the lengths of items before the callback that follows the module.
        """
        if self.projector is None:
            raise ValueError(f"{self.name}: this encoder has no projector yet, compose it into a MultimodalModel.")
        features, expected = output.last_hidden_state, self.projector.config.in_features
        if expected is not None and (width := features.shape[-1]) != expected:
            raise ValueError(
                f"{self.name}: the projector expects features of width {expected}, the encoder gave {width}: set "
                f"in_features={width} in its MultimodalProjectorConfig."
            )
        # Encoder and projector may differ in device and dtype; autocast chooses the dtype by itself.
        if not features.is_meta and not torch.is_autocast_enabled(features.device.type):
            features = placed(features, first_weight(self.projector))
        if not self.projector.reduces:
            # (items, tokens, hidden), or packed as before
            return Features(self.projector(features, return_dict=True).last_hidden_state, output.lengths)
        if (lengths := lengths_of(output)) is None:
            raise ValueError(
                f"{self.name}: features of shape {tuple(features.shape)} do not tell which belong to which item and cannot "
                "be reduced: set output['feature_lens'] in postprocess_module_callback."
            )
        # Where a callback changed their number, the pixels tell no grid any more.
        grids = self.grids(inputs, lengths, output.feature_grids, changed=lengths != encoded)
        try:
            # (items, fewer, hidden), or (sum of them, hidden) where items differ in length
            reduced = self.projector(features, return_dict=True, lengths=output.lengths, grids=grids, inputs=inputs)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return Features(reduced.last_hidden_state, reduced.feature_lens)

    def _postprocess(self, slot: str, inputs: dict, output: Any) -> Any:
        """What a callback makes of features, alone or in an output; unstated lengths and grids hold while the rows do."""
        if (callback := getattr(self, slot)) is None:
            return output
        output = output.within({}) if isinstance(output, Features) else output
        before, lens, grids = output.last_hidden_state, output.feature_lens, output.feature_grids
        # A callback written for an encoder with `return_dict=False` expects the features as the first of its own tuple.
        as_tuple = getattr(unwrapped(self.module).config, "return_dict", True) is False
        given = tuple(v for k, v in output.items() if k not in Features._fields[1:]) if as_tuple else output
        result = callback(inputs, given, **wishes(callback, self))
        if not isinstance(result, (ModelOutput, tuple)):
            what = type(result).__name__
            raise TypeError(f"{self.name}.{slot} must return a model output or a tuple, got {what}.")
        result = as_output(result)
        after = result.last_hidden_state
        same = isinstance(after, Tensor) and after.shape[:-1] == before.shape[:-1]  # as many rows
        stated = (result.feature_lens, lens), (result.feature_grids, grids)
        # Not stated, or handed through as it was.
        kept = [(old if same else None) if new is None or new is old else new for new, old in stated]
        return Features(result[0], *kept)


def _check_options(encoder: ModalEncoderModule) -> None:
    for slot, callback in encoder.callbacks.items():
        if callback is not None and not callable(callback):
            raise TypeError(f"{slot} must be callable, got {type(callback).__name__}.")
    if encoder.trim and set(MASKS).isdisjoint(encoder.parameter_names):
        told = f"{type(unwrapped(encoder.module)).__name__} takes {encoder.parameter_names}"
        raise ValueError(f"{encoder.kind}: trim=True needs an encoder that takes a mask, {told}: leave it out.")


def first_weight(module: nn.Module) -> nn.Parameter | None:
    """The first floating-point parameter of a module, whose device and dtype its inputs get; None where there is none."""
    return next((p for p in module.parameters() if p.is_floating_point()), None)
