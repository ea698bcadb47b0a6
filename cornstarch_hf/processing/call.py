"""Sorts the arguments of a processor's call by the part that takes them, and turns texts with their placeholders into ids.

Knows no encoder: `processing_multimodal` runs the sub-processors in between and counts the features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import AudioKwargs, MultiModalData, TextKwargs

from ..configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from ..limits import check_switch
from ..parts.names import own_names, place_of
from .media import check_kinds, ready_tensors
from .placeholder_text import (
    TEXT_OPTIONS,
    Expanded,
    MarkedText,
    Spans,
    check_even,
    check_filled,
    check_lengths,
    check_text,
    check_texts,
    check_values,
    encode,
    expand,
    occurrences,
    pad_rows,
)
from .subprocessors import ENCODER_SETTINGS, options_of, sampling_rate_of

PLURALS = {"image": "images", "video": "videos", "audio": "audio"}  # keyword of `__call__` for items of each kind
# Names under which a modality's processor may take its items.
MEDIA_KEYS = ("images", "image", "videos", "video", "audio", "raw_speech", "speech", "text", "sequences", "items")
# Settings of image processors that are read only where another one is on.
_SWITCHES = {"size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop", "pad_size": "do_pad"}
_SWITCHES |= {"rescale_factor": "do_rescale", "image_mean": "do_normalize", "image_std": "do_normalize"}
Media = dict[str, dict[str, Any]]


class ClientNames(ProcessorMixin):
    """Attributes of transformers' processors that clients look for, by kind, where there is one modality of that."""

    config: MultimodalConfig
    processors: dict[Any, Any]
    placeholder_ids: Any
    _count_of_size: Any

    def _attribute(self, kind: str, what: str) -> Any:
        names = self.config.modalities_of_kind(kind)
        if len(names) == 1:
            value = self.processors.get(names[0]) if what == "processor" else self.config.modality(names[0])[what]
            if value is not None:
                return value
        raise AttributeError(f"this processor has not exactly one modality of the kind {kind!r} with a {what}")

    image_processor = property(lambda self: self._attribute("image", "processor"))
    video_processor = property(lambda self: self._attribute("video", "processor"))
    feature_extractor = property(lambda self: self._attribute("audio", "processor"))
    image_token = property(lambda self: self._attribute("image", "token"))
    video_token = property(lambda self: self._attribute("video", "token"))
    audio_token = property(lambda self: self._attribute("audio", "token"))
    image_token_id = property(lambda self: self._attribute("image", "token_id"))
    video_token_id = property(lambda self: self._attribute("video", "token_id"))
    audio_token_id = property(lambda self: self._attribute("audio", "token_id"))

    def create_mm_token_type_ids(self, input_ids) -> list[list[int]]:
        """As in transformers, for ids ``(batch, length)``: 1 on placeholders of images, 2 of videos, 3 of sounds, 0 elsewhere.

        ValueError for placeholders of another kind, which have no number.
        """
        rows = [row if isinstance(row, list) else row.tolist() for row in input_ids]
        for name, number in self.placeholder_ids.items():
            kind = self.config.modality(name)["kind"]
            if kind not in MEDIA_KINDS and any(number in row for row in rows):
                raise ValueError(f"{name}: mm_token_type_ids have no number for the kind {kind!r}: leave them out.")
        return super().create_mm_token_type_ids(rows)

    def _ids_of_kind(self, kind: str) -> list[int]:
        return [self.placeholder_ids[name] for name in self.config.modalities_of_kind(kind)]

    image_token_ids = property(lambda self: self._ids_of_kind("image"))
    video_token_ids = property(lambda self: self._ids_of_kind("video"))
    audio_token_ids = property(lambda self: self._ids_of_kind("audio"))

    def _get_num_multimodal_tokens(
        self, image_sizes=None, video_sizes=None, audio_lengths=None, **kwargs: Any
    ) -> MultiModalData:
        """As in transformers: how many placeholder tokens items of these sizes will give, by arithmetic or on shapes alone.

        Args:
            image_sizes, video_sizes: ``(height, width)`` of each image, ``(frames, height, width)`` of each video.
            audio_lengths: samples of each sound, at the rate that its feature extractor expects.
            **kwargs: options of single processors, as in a call.

        ValueError where there is not one modality of that kind.
        """
        options, found = media_options(self.config, self.processors, {}, kwargs), dict[str, list[int]]()
        if kwargs:
            raise TypeError(f"Unknown arguments {sorted(kwargs)}: expected options of single processors, as in a call.")
        for kind, sizes in {"image": image_sizes, "video": video_sizes, "audio": audio_lengths}.items():
            if sizes is None:
                continue
            if len(names := self.config.modalities_of_kind(kind)) != 1:
                raise ValueError(f"Sizes of the kind {kind!r} need one encoder of that kind, the model has {names}.")
            each = [self._count_of_size(names[0], kind, i, size, options[names[0]]) for i, size in enumerate(sizes)]
            found[f"num_{kind}_tokens"] = [count for count, _ in each]
            if kind == "image":
                found["num_image_patches"] = [patches for _, patches in each]
        return MultiModalData(**found)


def call_arguments(config: MultimodalConfig, processors: Mapping[str, Any]) -> list[str]:
    """Names of all arguments that a processor takes for a model of that configuration."""
    names = {*config.encoders, *(f"{name}_kwargs" for name in config.encoders), *PLURALS.values(), *TEXT_OPTIONS}
    names |= {f"{plural}_kwargs" for plural in PLURALS.values()}
    flat = (flat_options(processors.get(name), config.modality(name)["kind"]) for name in config.encoders)
    return sorted(names.union(*flat, {"text", "sampling_rate", "text_kwargs", "common_kwargs"}))


def text_arguments(
    text: Any, llm_inputs: Mapping | None, kwargs: dict, tokenizer: Any
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The text, the tokenizer's options, and what only this package hands over; takes options out of `kwargs`.

    What the call says comes before ``common_kwargs``, and both before what the tokenizer was built with, as in transformers.
    """
    given = dict(mapped(llm_inputs, "llm_inputs"))
    if text is not None and "text" in given:
        raise ValueError("text was given twice: as text= and in llm_inputs.")
    text = check_texts(given.pop("text", text))
    # From this package's own callers, and for native processors.
    internal = {key: given.pop(key, None) for key in ("assistant_spans", "item_lengths", "by_size")}
    known = TEXT_OPTIONS & set(TextKwargs.__annotations__)
    own = {key: getattr(tokenizer, key, value) for key, value in tokenizer.init_kwargs.items() if key in known}
    own |= internal.setdefault("defaults", given.pop("default_options", None) or {})
    common = mapped(kwargs.get("common_kwargs"), "common_kwargs")
    common = {key: value for key, value in common.items() if key in TEXT_OPTIONS}
    flat = {key: kwargs.pop(key) for key in list(kwargs) if key in TEXT_OPTIONS}
    nested = mapped(kwargs.pop("text_kwargs", None), "text_kwargs")
    stated = merged("text", {"by its name": flat, "in text_kwargs": nested, "in llm_inputs": given})
    if unknown := sorted(set(stated) - TEXT_OPTIONS):
        raise TypeError(f"Unknown arguments for the tokenizer: {unknown}, expected some of {sorted(TEXT_OPTIONS)}.")
    if text is None and (idle := sorted(set(stated) - {"return_tensors"})):
        raise ValueError(f"{idle} are the tokenizer's, and there is no text: options of a part go in {{name}}_kwargs=.")
    check_values(common | stated, "text")
    options, internal["stated"] = own | common | stated, {**flat, "text_kwargs": {**nested, **given}}
    check_lengths(options, stated, "text")
    return text, options, internal


def media_arguments(
    config: MultimodalConfig, processors: Mapping, by_kind: Mapping, encoder_inputs: Mapping | None, kwargs: dict
) -> Media:
    """``{modality: {"items": ..., options}}`` from all the ways of handing items over; takes them out of `kwargs`.

    `by_kind` has items, or None, under the keywords of `PLURALS`; `encoder_inputs` items, options or tensors by modality;
    `kwargs` items by modality, options in ``{modality}_kwargs`` and ``images_kwargs``, those of `flat_options`, and
    ``sampling_rate``.  ValueError if something is given twice, or for a modality that the model does not have; TypeError for
    what nothing takes.
    """
    media: Media = {}
    for kind, plural in PLURALS.items():
        for name in config.modalities_for(kind) if by_kind[plural] is not None else ():
            _add_items(media, name, by_kind[plural])
    for name in config.encoders:
        if (items := kwargs.pop(name, None)) is not None:
            _add_items(media, config.modalities_for(name)[0], items)
    inside: Media = {}  # options beside items in `encoder_inputs`
    for name, given in mapped(encoder_inputs, "encoder_inputs").items():
        config.modalities_for(place_of(config, name)[0])  # raises for what the model does not have
        if not mapped(given, f"encoder_inputs of {name}"):
            raise ValueError(f"{name}: encoder_inputs has nothing for it: give items, or leave its name out.")
        for key in given.keys() & MEDIA_KEYS:
            _add_items(media, config.modalities_for(name)[0], given[key])
    for name, given in (encoder_inputs or {}).items():
        owner, start = place_of(config, name)
        if "items" in media.get(owner, ()):
            inside[name] = {k: v for k, v in given.items() if k not in MEDIA_KEYS}
        else:  # tensors that are processed already, and options that would do nothing
            taken = options_of(processors.get(name), config.modality(name)["kind"]) or frozenset()
            names = set(own_names(config, name).values())
            inside[name] = {k: given[k] for k in taken - names | names & {*ENCODER_SETTINGS} if k in given}
            found = ready_tensors({k: v for k, v in given.items() if k not in inside[name]}, name)
            media[owner] = media.get(owner, {}) | {start + k: v for k, v in found.items()}
    for name, options in media_options(config, processors, inside, kwargs).items():
        if "items" in media.get(name, ()):
            media[name] |= options
        elif name in media:
            media[name] |= {k: options.pop(k) for k in [*options] if k.endswith(ENCODER_SETTINGS)}
            if idle := sorted(k for k in options if not k.endswith("sampling_rate")):
                told = f"its tensors are processed already, so that {idle} would do nothing: leave them out."
                raise ValueError(f"{name}: {told}")
    _refuse_unknown(config, processors, kwargs)
    return media


def _refuse_unknown(config: MultimodalConfig, processors: Mapping, left: Mapping[str, Any]) -> None:
    if left:
        taken = call_arguments(config, processors)
        raise TypeError(f"Unknown arguments {sorted(left, key=str)}, this processor takes {taken}.")


def check_arguments(config: MultimodalConfig, processors: Mapping, given: Mapping[str, Any]) -> None:
    """Refuse options for calls to come as a call would (TypeError, ValueError); `given` has no items and no text."""
    kwargs = dict(given)
    check_values({key: kwargs.pop(key) for key in list(kwargs) if key in TEXT_OPTIONS}, "text")
    media_options(config, processors, {}, kwargs)
    _refuse_unknown(config, processors, kwargs)


def media_options(config: MultimodalConfig, processors: Mapping, inside: Media, kwargs: dict) -> Media:
    """Options of every modality, as ``{name}.{option}`` of encoders joined to it; takes all, used or not, out of `kwargs`."""
    kinds = {name: config.modality(name)["kind"] for name in config.encoders}
    flat = {name: flat_options(processors.get(name), kind) for name, kind in kinds.items()}
    stated = {key: kwargs.pop(key) for key in list(kwargs) if any(key in names for names in flat.values())}
    groups = dict.fromkeys([*config.encoders, *PLURALS.values()])  # "audio" may be a name and a plural
    nested = {key: mapped(kwargs.pop(f"{key}_kwargs", None), f"{key}_kwargs") for key in groups}
    common = mapped(kwargs.pop("common_kwargs", None), "common_kwargs")
    found: Media = {}
    for name, kind in kinds.items():
        plural, processor = PLURALS.get(kind, name), processors.get(name)
        sources = {
            "by its name": {key: value for key, value in stated.items() if key in flat[name]},
            f"in {plural}_kwargs": nested[plural],
            "in encoder_inputs": inside.get(name, {}),
        } | ({f"in {name}_kwargs": nested[name]} if name != plural else {})
        options = merged(name, sources)
        rate = {key: options.pop(key) for key in _rate_option(processor, kind) if key in options}
        for key in set(options).intersection(ENCODER_SETTINGS, own_names(config, name).values()):
            rate[key] = check_switch(options.pop(key), f"{name}: {key}")
        taken = options_of(processor, kind)
        shared = {key: value for key, value in common.items() if key in (taken or ()) and key != "return_tensors"}
        check_options(processor, kind, name, shared | options)
        owner, start = place_of(config, name)
        found.setdefault(owner, {}).update((start + k, v) for k, v in (shared | options | rate).items())
    known = TEXT_OPTIONS.union(*(options_of(processors.get(name), kind) or () for name, kind in kinds.items()))
    if unknown := sorted(set(common) - known):
        raise TypeError(f"common_kwargs: no part takes {unknown}.")
    for kind, plural in PLURALS.items():
        if nested[plural] and kind not in kinds.values() and plural not in kinds:
            raise TypeError(f"{plural}_kwargs was given, but the model has no encoder of the kind {kind!r}: {kinds}.")
    return found


def _add_items(media: Media, name: str, items: Any) -> None:
    if "items" in media.setdefault(name, {}):
        raise ValueError(f"{name}: its items were given twice, by kind, by name or in encoder_inputs: give them once.")
    media[name]["items"] = items


# ---- which options each part takes


def flat_options(processor: Any, kind: str) -> frozenset[str]:
    """Those that a call may state for all modalities of a kind at once, as in transformers' processors."""
    taken = options_of(processor, kind) or frozenset()
    if kind == "audio":  # what else sounds and images have in common is meant for the images
        return taken & set(AudioKwargs.__annotations__) - TEXT_OPTIONS | _rate_option(processor, kind)
    return taken if kind in ("image", "video") else frozenset()


def _rate_option(processor: Any, kind: str) -> frozenset[str]:
    """``sampling_rate``, where it says how a modality's bare arrays were sampled."""
    taken = options_of(processor, kind)
    told = processor is None or taken is None or "sampling_rate" in taken or sampling_rate_of(processor) is not None
    return frozenset(["sampling_rate"] if kind == "audio" and told else [])


def check_options(processor: Any, kind: str, name: str, options: Mapping[str, Any]) -> None:
    """Refuse what a modality's processor does not take (TypeError), or takes and would not do (ValueError)."""
    taken = options_of(processor, kind)
    if taken is not None and (unknown := sorted(set(options) - taken)):
        raise TypeError(f"{name}: {type(processor).__name__} takes no option {unknown} in a call, but {sorted(taken)}.")
    if isinstance(processor, PreTrainedTokenizerBase):
        check_values(options, name)
        check_lengths({"padding": True, "truncation": False, **options}, options, name)
    elif taken is not None and processor is not None:
        check_kinds(processor, name, options)
        by_rate = options.get("fps") or (options.get("num_frames") is None and getattr(processor, "fps", None))
        if options.get("source_fps") is not None and not by_rate and not hasattr(processor, "get_video_processor_dict"):
            raise ValueError(f"{name}: source_fps= does nothing without fps=, the frames per second that are kept.")
    for key, switch in _SWITCHES.items() if isinstance(processor, ImageProcessingMixin) else ():
        if options.get(key) is not None and not options.get(switch, getattr(processor, switch, True)):
            raise ValueError(
                f"{name}: {key}= does nothing while {switch} is off: pass {switch}=True too, or leave it out."
            )


def merged(owner: str, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All options of one part, by where they were given (ValueError: one that was given twice)."""
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, options in sources.items():
        for key, value in options.items():
            if key in found:
                raise ValueError(f"{owner}: {key!r} was given twice, {origin[key]} and {source}: give it once.")
            found[key], origin[key] = value, source
    return found


def mapped(value: Any, where: str) -> Mapping[str, Any]:
    """What a keyword holds by name, nothing for None (TypeError: no dict)."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a dict, by name, got {type(value).__name__}.")
    if wrong := [key for key in value or () if not isinstance(key, str)]:
        raise TypeError(f"{where} must have names as its keys, got {wrong[0]!r:.100}.")
    return {} if value is None else value


# ---- texts


def encode_texts(
    tokenizer: Any,
    texts: list[str],
    tokens: Mapping[str, str],
    ids: Mapping[str, int],
    lengths: Mapping[str, list[int]],
    options: Mapping[str, Any],
    spans: list[Spans] | None = None,
) -> dict[str, Any]:
    """What a tokenizer makes of texts, ``(batch, length)`` each, with every placeholder repeated for its item's features.

    Args:
        texts: with one placeholder for each item, see `check_items`.
        tokens, ids: placeholder token of each modality, and its id.
        lengths: features of each item, by modality.
        options: of `TEXT_OPTIONS`; ValueError if truncation would cut features.
        spans: of each text, in characters; adds `assistant_masks`.
    """
    by_token = {tokens[name]: [tokens[name] * count for count in counts] for name, counts in lengths.items()}
    taken: dict[str, int] = {}  # how many items of each token are used up; advances from text to text
    expanded = [expand(text, by_token, taken) for text in texts]
    return encode_expanded(tokenizer, expanded, tokens, ids, options, spans)


def encode_expanded(
    tokenizer: Any, expanded: list[Expanded], tokens: Mapping, ids: Mapping, options: Mapping, spans: list[Spans] | None
) -> dict[str, Any]:
    """As `encode_texts`, of texts in which each placeholder stands as often as its item has features."""
    options = dict(options)
    as_tensors = options.pop("return_tensors", None)
    # Not for the tokenizer's call: rows are padded last, with masks and offsets, when nothing can be cut any more.
    padding = {k: options.pop(k) for k in ("padding", "pad_to_multiple_of", "padding_side") if k in options}
    with_mask = options.pop("return_attention_mask", None)
    cuts = options.get("truncation")
    if cuts is None:  # a length alone cuts, as in transformers, where nothing is filled up to it
        cuts = options.get("max_length") is not None and padding.get("padding", False) is False
    options["truncation"] = cuts if cuts != "do_not_truncate" else False
    if spans is not None:  # from characters of the text to those of the expanded one
        spans = [[(e.moved(a), e.moved(b)) for a, b in turns] for e, turns in zip(expanded, spans, strict=True)]
    rows = encode(tokenizer, [e.text for e in expanded], spans, **options)
    for sample, (text, row) in enumerate(zip(expanded, rows, strict=True)):
        for name, token in tokens.items():
            wanted, left = text.counts.get(token, 0), row["input_ids"].count(ids[name])
            if wanted != left:
                need = f"{wanted} features need as many placeholder tokens ({token}), but {left} are left"
                told = "after truncation: raise max_length, or shorten the text."
                told = "with split_special_tokens=True: leave it out." if options.get("split_special_tokens") else told
                raise ValueError(f"{name}, sample {sample}: {need} {told}")
    extra = {k: [row.pop(k) for row in rows] for k in ("assistant_masks", "offset_mapping") if k in rows[0]}
    check_filled(tokenizer, options | padding, len(expanded), "text")
    data = pad_rows(tokenizer, rows, extra, padding, options.get("max_length"))
    if with_mask is False:
        data.pop("attention_mask")
    if as_tensors:
        check_even(data["input_ids"], options.get("max_length"), padding.get("padding", False))
    if as_tensors and not any(data["input_ids"]):  # of empty texts alone, of which torch and numpy would make floats
        data = {key: np.zeros((len(expanded), 0, 2)[: 3 if key == "offset_mapping" else 2], np.int64) for key in data}
    return dict(BatchFeature(data, tensor_type=as_tensors)) if as_tensors else data


def check_items(texts: list[str], tokens: Mapping[str, str], counts: Mapping[str, int], samples: Mapping) -> None:
    """Refuse texts that are none, or with other than one placeholder for each item (ValueError with both numbers).

    `counts` tells how many items each modality has, `samples` how many of them belong to each text where that was given.
    """
    for sample, text in enumerate(texts):
        if not isinstance(text, MarkedText):
            check_text(text, f"sample {sample}: ")
    found = [occurrences(text, list(tokens.values())) for text in texts]
    for name, token in tokens.items():
        written, given = [row[token] for row in found], samples.get(name)
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{name}: items were given for {len(given)} samples, but there are {len(texts)} texts.")
        # Without a list per sample only the sums can be compared.
        for sample, (count, items) in enumerate(zip(written, given or written, strict=True)):
            if count != items:
                told = f"the text has {count} placeholders {token}"
                raise ValueError(f"{name}, sample {sample}: {told}, but {items} items were given.")
        if sum(written) != counts[name]:
            told = f"the texts have {sum(written)} placeholders {token} {written}, but {counts[name]} items were given"
            raise ValueError(f"{name}: {told}: write one placeholder for each item.")
