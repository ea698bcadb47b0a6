"""Features of several encoders that see the same items, joined along their channels for one projector.

The first encoder of a group has its projector, placeholder and inputs; the others run within its call.  Checkpoints carry this
file only where their configuration joins encoders; `registries.STEPS` leads here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..parts.adapters import unwrapped
from ..parts.names import own_names
from ..parts.registries import ALONE, STEPS, Step
from ..processing.call import ENCODER_SETTINGS
from ..projectors.projector import per_item
from .grids import PLANE_KINDS, Grid, GridQuery, found_grids
from .item_sizes import refused_size
from .items import without_padding
from .module import first_weight
from .selection import EncoderOutput, Features, lengths_of, with_features

KEYS = {"encoders", "join", "resample"}
# How features come from one grid to another: modes of `torch.nn.functional.interpolate`, by whether items lie in a plane.
MODES = {True: ("bilinear", "bicubic", "nearest-exact"), False: ("linear", "nearest-exact")}
WITHIN = "join"  # said to an encoder that the first one of its group runs
_REASON = "its features are joined to others by their places in a grid"


class Part(NamedTuple):
    """Features of one encoder's items before they are joined."""

    name: str
    output: EncoderOutput | Features  # (items, tokens, width), or (sum of tokens, width) with lengths
    grids: list[Grid]  # of each item; one number each where they lie in no plane


@dataclass
class Joined:
    """An encoder's place in a group: the first one has the `others`, in the order in which they are joined."""

    owner: str
    others: Mapping[str, Any]
    resample: str | None = None

    def run(self, encoder: Any, say: Sequence[str], inputs: dict[str, Any]) -> EncoderOutput:
        """What the encoder's `forward` gives: of the first one, all features projected; of others, their own before that.

        ValueError where items or grids differ, inputs of one of them lack, or another than the first one is called.
        """
        if encoder.name == self.owner:
            starts = tuple(f"{name}." for name in self.others)
            own = {key: value for key, value in inputs.items() if not key.startswith(starts)}
            own, raw, output, encoded = encoder.features(own, say)
            parts = [Part(encoder.name, output, grids_of_features(encoder, own, output, encoded))]
            parts += [self._of_other(name, other, inputs) for name, other in self.others.items()]
            return encoder.finished(say, own, raw, joined_features(parts, self.resample), encoded)
        if WITHIN not in say:
            raise ValueError(f"{encoder.name}: its features are joined to those of {self.owner!r}: call that encoder.")
        inputs, _, output, encoded = encoder.features(inputs, say)
        grids = grids_of_features(encoder, inputs, output, encoded)
        return with_features({}, output.last_hidden_state, output.lengths, feature_grids=grids)

    def _of_other(self, name: str, other: Any, inputs: Mapping[str, Any]) -> Part:
        start = f"{name}."
        own = {key.removeprefix(start): value for key, value in inputs.items() if key.startswith(start)}
        if not any(isinstance(value, Tensor) for value in own.values()):
            raise ValueError(
                f"{self.owner}: its features are joined to those of {name!r}, of which there are no inputs: pass the tensors "
                "of both encoders, as the processor makes them."
            )
        try:
            output = other(say=(WITHIN, ALONE), **own)  # called, so that what is hooked to it runs
        except (RuntimeError, ValueError) as error:
            weight = first_weight(other.module)  # with weights it says so itself
            told = refused_size(other.module, own, other.kind, name) if weight is not None and weight.is_meta else None
            if told is None:
                raise
            raise ValueError(f"{name}: {told}") from error
        return Part(name, output, output.feature_grids)


def grids_of_features(encoder: Any, inputs: dict, output: Features, encoded: list[int] | None) -> list[Grid]:
    """The grid of each item's features, or their number where they lie in no plane (ValueError where nothing tells)."""
    lengths = lengths_of(output)
    if lengths is None:
        shape = tuple(output.last_hidden_state.shape)
        raise ValueError(
            f"{encoder.name}: features of shape {shape} do not tell which belong to which item and cannot be joined: set "
            "output['feature_lens'] in postprocess_module_callback."
        )
    if encoder.kind not in PLANE_KINDS:
        return [(length,) for length in lengths]
    config, dropped = unwrapped(encoder.module).config, encoder.selection.drop_prefix
    query = GridQuery(inputs, config, encoder.kind, lengths, lengths != encoded, dropped)
    axes = 2 if encoder.kind == "image" else 3  # patches that are packed have a frame of an image before these
    return [
        tuple(grid)[-axes:]
        for grid in found_grids(query, output.feature_grids, encoder.by_frame, encoder.name, _REASON)
    ]


def joined_features(parts: Sequence[Part], resample: str | None) -> Features:
    """Features of all parts side by side, ``(items, tokens, sum of widths)`` or packed, in the grids of the first one."""
    first, device = parts[0], parts[0].output.last_hidden_state.device
    check_grids(parts, resample)
    planes = torch.tensor(first.grids) if all(len(grid) > 1 for grid in first.grids) else None
    rows = [part.output.last_hidden_state for part in parts]
    if all(x.ndim == 3 for x in rows) and all(p.output.lengths is None and p.grids == first.grids for p in parts):
        # (items, tokens, width) each
        return Features(torch.cat([x.to(device) for x in rows], dim=-1), None, planes)
    columns = []
    for part in parts:  # items of (n_i, width)
        items = per_item(part.output.last_hidden_state.to(device), part.output.lengths, part.name)
        grids = zip(items, part.grids, first.grids, strict=True)
        columns.append([item if grid == to else resampled(item, grid, to, str(resample)) for item, grid, to in grids])
    items = [torch.cat(features, dim=-1) for features in zip(*columns, strict=True)]  # (n_i, sum of widths)
    return Features(torch.cat(items), [len(item) for item in items], planes)


def check_grids(parts: Sequence[Part], resample: str | None) -> None:
    """ValueError for other numbers of items, and for grids that differ where they are not to be resampled."""
    first = parts[0]
    for part in parts[1:]:
        if len(part.grids) != len(first.grids):
            raise ValueError(different_numbers(first.name, len(first.grids), part.name, len(part.grids)))
        for item, (there, here) in enumerate(zip(first.grids, part.grids, strict=True)):
            frames = len(there) == 3 and there[0] != here[0]
            if there != here and (resample is None or frames or len(there) != len(here)):
                modes = MODES[len(there) > 1]
                remedy = (
                    "sample as many frames for both"
                    if frames
                    else (
                        f"choose sizes of items that give equal ones, drop leading tokens by drop_prefix=, or say resample=, "
                        f"{list(modes)}, in share_inputs"
                    )
                )
                shown = " and ".join(
                    f"{' x '.join(map(str, g))} of {p.name!r}" for g, p in ((there, first), (here, part))
                )
                raise ValueError(
                    f"{first.name}, item {item}: features are joined by place, but lie in {shown}: {remedy}."
                )


def different_numbers(first: str, here: int, other: str, there: int) -> str:
    return f"{first} has {here} items, and {other!r}, joined to it, has {there}: give both encoders the same items."


def under(name: str, item: dict[str, Any]) -> dict[str, Any]:
    """One item's inputs for an encoder that another one runs, by their names there, without padding."""
    return {f"{name}.{key}": value for key, value in without_padding(item).items()}


def resampled(features: Tensor, grid: Grid, to: Grid, mode: str) -> Tensor:
    """Features ``(tokens, width)`` of one grid in another one, each frame alone, as `torch.nn.functional.interpolate` does.

    In float32 at least, by the centres of pixels (``align_corners=False``) and without antialiasing, as Cambrian-1 does
    (https://arxiv.org/abs/2406.16860).
    """
    plane, size = (grid[-2:], to[-2:]) if len(grid) > 1 else (grid, to)
    maps = features.unflatten(0, (-1, *plane)).movedim(-1, 1)  # (frames, width, *plane)
    precise = maps.to(torch.promote_types(maps.dtype, torch.float32))
    options = {} if mode.startswith("nearest") else {"align_corners": False}
    maps = F.interpolate(precise, size=size, mode=mode, **options).to(features.dtype)  # (frames, width, *size)
    return maps.movedim(1, -1).flatten(0, -2)  # (tokens, width)


class Join(Step):
    """Groups of encoders whose features are joined: what their configuration may say, and encoders that know each other."""

    def valid_groups(self, groups: Sequence[Any]) -> list[list[str] | dict[str, Any]]:
        """The groups as lists and dicts; ValueError for keys, joins or encoders that make no sense."""
        found: list[list[str] | dict[str, Any]] = []
        used: set[str] = set()
        for group in groups:
            if not isinstance(group, Mapping):
                found.append(list(group))
                continue
            names, resample = list(group["encoders"]), group.get("resample")
            if unknown := sorted(set(group) - KEYS, key=str):
                raise ValueError(
                    f"share_inputs: a group of joined encoders has no {unknown}, expected some of {sorted(KEYS)}."
                )
            if group.get("join") != "channels":
                raise ValueError(f"share_inputs: join must be 'channels', got {group.get('join')!r:.100}.")
            if resample is not None and resample not in {*MODES[True], *MODES[False]}:
                modes = sorted({*MODES[True], *MODES[False]})
                raise ValueError(f"share_inputs: resample must be one of {modes}, got {resample!r:.100}.")
            if twice := [name for name in names if name in used or names.count(name) > 1]:
                raise ValueError(f"share_inputs joins {twice[0]!r} twice: name each encoder once, in one group.")
            used |= set(names)
            found.append({"encoders": names, "join": "channels"} | ({"resample": resample} if resample else {}))
        return found

    def tensors(self, processor: Any, name: str, items: list[Any], options: dict[str, Any]) -> Any:
        """What the encoders of a group take of its items: by keyword of the composed model, and by input of each item."""
        others = [other for other, owner in processor.config.joined.items() if owner == name]
        own = {key: value for key, value in options.items() if "." not in key}
        used, split = processor._used(name, processor._run_subprocessor(name, items, own), len(items))
        for other in others:
            given = {k.removeprefix(f"{other}."): v for k, v in options.items() if k.startswith(f"{other}.")}
            told = {key: given.pop(key) for key in ENCODER_SETTINGS if key in given}
            more, each = processor._used(other, processor._run_subprocessor(other, items, given), len(items))
            used |= more
            split = [item | under(other, theirs | told) for item, theirs in zip(split, each, strict=True)]
        return used, split

    def ready(self, processor: Any, name: str, given: Mapping[str, Any]) -> Any:
        """As `tensors`, of what was processed elsewhere: all encoders' inputs, by keyword or with `{name}.` before others'.

        ValueError where those of one of them lack, or are of another number of items.
        """
        group = [name, *(other for other, owner in processor.config.joined.items() if owner == name)]
        parts: dict[str, dict[str, Any]] = {each: {} for each in group}
        for key, value in given.items():
            other = next(
                (o for o in group[1:] if key.startswith(f"{o}.") or key in own_names(processor.config, o)), name
            )
            parts[other][key.removeprefix(f"{other}.")] = value
        told = {other: {k: own.pop(k) for k in ENCODER_SETTINGS if k in own} for other, own in parts.items()}
        if lack := [each for each, own in parts.items() if not own]:
            raise ValueError(
                f"{name}: the features of {group} are joined, and encoder_inputs has no tensors of {lack}: give those of all, "
                f"encoder_inputs={{{', '.join(f'{each!r}: ...' for each in group)}}}, or items."
            )
        used, split = processor._ready(name, parts.pop(name))
        for other, own in parts.items():
            more, each = processor._ready(other, own)
            if len(each) != len(split):
                raise ValueError(different_numbers(name, len(split), other, len(each)))
            used |= more
            split = [item | under(other, theirs | told[other]) for item, theirs in zip(split, each, strict=True)]
        return used, split

    def connect(self, groups: Sequence[Any], encoders: Mapping[str, Any]) -> None:
        """Let encoders of a group know each other (in place); ValueError where they do not fit."""
        for group in groups:
            if not isinstance(group, Mapping) or group["encoders"][0] not in encoders:
                continue
            names, resample = group["encoders"], group.get("resample")
            self._check(names, resample, encoders)
            for other in names[1:]:
                if encoders[other].shares.get("projector") != names[0]:
                    raise ValueError(
                        f"{other}_modality: shares must name {names[0]!r} for its projector, which is of both."
                    )
                encoders[other].join = Joined(names[0], {})
            encoders[names[0]].join = Joined(names[0], {other: encoders[other] for other in names[1:]}, resample)

    def connect_probe(self, config: Any, name: str, encoder: Any, build: Callable[[str], Any]) -> None:
        """As `connect`, for one first encoder (in place), and the others of its group as they are built by name."""
        others = {other: build(other) for other, owner in config.joined.items() if owner == name}
        self.connect(config.share_inputs, {name: encoder, **others})

    def share_projectors(self, groups: Sequence[Any], encoders: Mapping[str, Any]) -> None:
        """Have encoders of a group use the projector of its first one (in place); ValueError where they do not fit."""
        order = list(encoders)
        for names in (group["encoders"] for group in groups if isinstance(group, Mapping)):
            self._check(names, None, encoders)
            for other in names[1:]:
                encoder = encoders[other]
                if order.index(other) < order.index(names[0]):
                    raise ValueError(f"{other}: it is joined to {names[0]!r}, which must come before it in encoders.")
                if encoder.projector is not None and encoder.shares.get("projector") != names[0]:
                    raise ValueError(
                        f"{other}: it has a projector, but its features are joined to those of {names[0]!r}: give that one the "
                        f"projector of all, with in_features the sum of their widths, and {other!r} none."
                    )
                if encoder.postprocess_projector_callback is not None:
                    raise ValueError(
                        f"{other}: it has a postprocess_projector_callback, but the projector is that of {names[0]!r}: give "
                        "it to that one."
                    )
                encoder.share("projector", names[0], encoders[names[0]])
        for encoder in encoders.values():
            encoder.join = None  # of a model that it was a part of before
        self.connect(groups, encoders)

    def _check(self, names: Sequence[str], resample: str | None, encoders: Mapping[str, Any]) -> None:
        kinds = {name: encoders[name].kind for name in names}
        if len(set(kinds.values())) > 1:
            raise ValueError(
                f"share_inputs joins encoders of different kinds, {kinds}: only those of one see the same items."
            )
        modes = MODES[kinds[names[0]] in PLANE_KINDS]
        if resample is not None and resample not in modes:
            raise ValueError(
                f"{names[0]}: resample={resample!r} is not for items of the kind {kinds[names[0]]!r}, expected {modes}."
            )
        own = ("layer_features", "merge", "marks")
        if said := [f"{name}: {key}" for name in names[1:] for key in own if encoders[name].merging[key]]:
            raise ValueError(
                f"{said[0]} is of features in the language model, which {names[0]!r} has: say it of that one."
            )


STEPS["join"] = Join()
