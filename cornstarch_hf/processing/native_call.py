"""A native processor of transformers inside of ours: it turns items into tensors and text as it always does.

What ours adds: items are checked, text that a user typed stays text, and placeholders are held against features.  Only
checkpoints that hold such a processor carry this file.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from ..parts.stored_errors import explained
from .call import PLURALS, Media, check_items
from .media import check_finite, flatten, image_form, layout_of_call, ready_image
from .native_texts import NativeTexts, TokenizerInCall, recording
from .placeholder_text import occurrences, unmark
from .sounds import ready_audio
from .stored_processors import NATIVE, build_subprocessor, describe_subprocessor
from .subprocessors import ENCODER_SETTINGS, image_channels, sampling_rate_of

# Attribute of a native processor -> kind of items.
PARTS = {
    "image_processor": "image",
    "video_processor": "video",
    "feature_extractor": "audio",
    "audio_processor": "audio",
}
# Of processors whose placeholder in a text is not the token that they repeat, nor the attribute named by its kind.
_WRITTEN = {"QianfanOCRProcessor": {"image": "image_placeholder_token"}}
# They put items before a text, in which nothing stands for them.
_UNWRITTEN = frozenset(["Blip2Processor", "FuyuProcessor"])
# They take a flat list of images for those of one text.
_NESTED = frozenset(["Gemma3Processor", "Lfm2VlProcessor"])
# They take apart what the model shall learn, and put its end behind it: the keyword of their call.
_SUFFIX = "suffix"


class NativeCall:
    """A native processor without its tokenizer, which ours holds.

    Args:
        processor: of transformers.
        kinds: of each modality of the composition.

    Raises:
        ValueError: a processor that cannot be part of ours; says why.
    """

    def __init__(self, processor: ProcessorMixin, kinds: Mapping[str, str]):
        self.who, self.kinds = type(processor).__name__, dict(kinds)
        names = {kind: name for name, kind in kinds.items()}
        held = [part for part in processor.get_attributes() if part != "tokenizer"]
        if other := [part for part in held if part not in PARTS]:
            raise ValueError(f"{self.who} has {other} beside the processors of items, which a composition cannot hold.")
        # Its attributes of which a modality's processor is the same, and others.
        self.places = {part: names[PARTS[part]] for part in held if PARTS[part] in names}
        self.written = {name: self._written(processor, kind) for name, kind in kinds.items()}
        self._native = copy.copy(processor)
        for part in held:
            setattr(self._native, part, None if part in self.places else copy.deepcopy(getattr(processor, part)))
        self._native.tokenizer = None

    def _written(self, processor: Any, kind: str) -> str:
        """The placeholder of a kind as a user writes it."""
        classes = [cls.__name__ for cls in type(processor).__mro__]
        named: Mapping[str, str] = next((_WRITTEN[name] for name in classes if name in _WRITTEN), {})
        token = getattr(processor, named.get(kind) or f"{kind}_token", None)
        token = getattr(token, "content", token)
        if not isinstance(token, str) or not _UNWRITTEN.isdisjoint(classes):
            raise ValueError(
                f"{self.who} has no placeholder of the kind {kind!r} in its texts, which says where items lie."
            )
        return token

    def whole(self, tokenizer: Any, processors: Mapping[str, Any]) -> Any:
        """The native processor with a tokenizer and with the processors of modalities in their places."""
        native = copy.copy(self._native)
        native.tokenizer = tokenizer
        for part, name in self.places.items():
            setattr(native, part, processors[name])
        return native

    def describe(self) -> dict[str, Any]:
        """A JSON dictionary: its class, the arguments that build it, and processors of items that no modality has."""
        native = copy.copy(self._native)
        parts = [part for part in PARTS if getattr(native, part, None) is not None]
        described = {part: describe_subprocessor(getattr(native, part), part) for part in parts}
        for part in [*PARTS, "tokenizer"]:
            native.__dict__.pop(part, None)
        values = {key: value for key, value in native.to_dict().items() if key not in ("auto_map", "processor_class")}
        return {"processor_class": self.who, "arguments": values, "parts": described}

    @classmethod
    def build(
        cls, described: Any, kinds: Mapping[str, str], tokenizer: Any, processors: Mapping[str, Any]
    ) -> "NativeCall":
        """What `describe` described (ValueError where it does not fit); the tokenizer gets tokens that its class adds."""
        name: Any = described.get("processor_class") if isinstance(described, Mapping) else None
        if name not in PROCESSOR_MAPPING_NAMES.values():
            raise ValueError(f"native names the processor {name!r:.100}, which is none of transformers.")
        native_class = getattr(transformers, name)
        takes, values = inspect.signature(native_class.__init__).parameters, described.get("arguments")
        if not isinstance(values, Mapping) or not set(values) <= set(takes):
            raise ValueError(f"native: {name} takes the arguments {sorted(takes)}, got {values!r:.200}.")
        names = {kind: name for name, kind in kinds.items()}
        parts = {part: build_subprocessor(value, part) for part, value in (described.get("parts") or {}).items()}
        for part in native_class.get_attributes():
            if part in PARTS and part not in parts:
                parts[part] = processors.get(names.get(PARTS[part], ""))
        with explained(f"native: {name}"):
            return cls(native_class(**parts, tokenizer=tokenizer, **values), kinds)

    def count_of_size(self, owner: Any, name: str, size: Any, options: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens that stand for an item of a size, and its rows of pixels, as the native processor tells them (ValueError)."""
        native, kind = self.whole(owner.tokenizer, owner.processors), self.kinds[name]
        keyword = {"image": "image_sizes", "video": "video_sizes", "audio": "audio_lengths"}[kind]
        told: Any = None
        if hasattr(native, "_get_num_multimodal_tokens"):
            with self._refusing():
                told = native._get_num_multimodal_tokens(**{keyword: [size]}, **options)
        if (tokens := getattr(told, f"num_{kind}_tokens", None)) is None:
            reason = f"{self.who} does not tell by its size what it makes of an item"
            raise ValueError(f"{name}: {reason}: call the processor with one of that size.")
        return int(tokens[0]), int((getattr(told, f"num_{kind}_patches", None) or [1])[0])

    # ---- a call

    def __call__(self, owner: Any, text: Any, media: Media, llm: Mapping[str, Any]) -> dict[str, Any]:
        """What the native processor gives, by the names that the composed model takes too.

        Args:
            owner: the processor that this is part of.
            text: None, one text, or a list of them.
            media: items and options by modality, as `call.media_arguments` sorts them.
            llm: what else `call.text_arguments` tells: the text's options as they were given, and what our own callers ask.

        Raises:
            ValueError: items and placeholders, or placeholders and features, that differ in number; an unusable item; what the
                native processor refuses.
        """
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        items, options, samples = self._ready(owner, media)
        if texts is not None:
            counts = {name: len(items.get(name, ())) for name in self.kinds}
            check_items(texts, self.written, counts, samples)
        tokens = {self.kinds[name]: token for name, token in self.written.items()}
        learns = llm["item_lengths"] and _SUFFIX in inspect.signature(type(self._native).__call__).parameters
        call = NativeTexts(owner.tokenizer, texts, llm["assistant_spans"], tokens, learns)
        native = self.whole(TokenizerInCall(call), owner.processors)
        cls: Any = type(native)
        native.__class__ = recording(cls)
        native._call = call
        given: dict[str, Any] = {f"{PLURALS[self.kinds[name]]}_kwargs": one for name, one in options.items() if one}
        given |= {PLURALS[self.kinds[name]]: self._grouped(name, own, texts, samples) for name, own in items.items()}
        stated = llm["stated"]
        if llm["item_lengths"]:  # of the collator, which wants lists, and makes types of tokens itself
            stated = {**stated, "return_tensors": "pt", "text_kwargs": dict(stated["text_kwargs"])}
            stated["text_kwargs"].pop("return_token_type_ids", None)
        defaults = {key: value for key, value in llm["defaults"].items() if key not in stated}
        given |= stated | {"text_kwargs": defaults | stated["text_kwargs"]}
        given |= {} if call.suffixes is None else {_SUFFIX: call.suffixes}
        with owner.lock, self._refusing():  # a tokenizer keeps the options of its last call
            data = dict(native(text=call.texts, **given))
        self._check(owner, data, items, {name: settings_of(media[name]) for name in items}, call)
        if llm["item_lengths"]:
            data = self._for_collator(owner, data, items, call)
        return data

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong in the native processor, which seldom says of what it speaks, is a ValueError that names it."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            kind = "" if isinstance(error, ValueError) else f" ({type(error).__name__})"
            raise ValueError(f"{self.who} refuses the call{kind}: {unmark(str(error)):.500}") from error

    def _ready(self, owner: Any, media: Media) -> tuple[dict[str, list], dict[str, dict], dict[str, Any]]:
        """Items, options of their processors, and items per sample where they were given so, by modality."""
        items: dict[str, list] = {}
        options: dict[str, dict] = {}
        samples: dict[str, Any] = {}
        for name, given in media.items():
            if "items" not in given:
                reason = "of tensors alone it does not know what text stands for them"
                raise ValueError(f"{name}: {self.who} makes text of items, and {reason}: give the items.")
            one = {key: value for key, value in given.items() if key not in (*ENCODER_SETTINGS, "items")}
            own, samples[name] = flatten(given["items"], self.kinds[name])
            if not own:
                continue
            processor, kind = owner.processors[name], self.kinds[name]
            if kind == "image":
                form = image_form(processor, name, one, image_channels(getattr(owner.config, f"{name}_config")))
                own = [ready_image(item, f"{name}, item {i}", form) for i, item in enumerate(own)]
                one |= layout_of_call(processor, own, form)
            elif kind == "audio":
                rate, told = sampling_rate_of(processor), one.pop("sampling_rate", None)
                own = [ready_audio(item, f"{name}, item {i}", rate, told) for i, item in enumerate(own)]
                one |= {"sampling_rate": rate}
                self._check_lengths(owner, name, own, one)
            items[name], options[name] = own, one
        return items, options, samples

    def _check_lengths(self, owner: Any, name: str, sounds: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Refuse sounds of which the native processor would leave out the end (ValueError)."""
        processor, rate = owner.processors[name], options["sampling_rate"]
        seconds, window = getattr(self._native, "max_audio_len", None), getattr(processor, "n_samples", None)
        most = seconds * rate if seconds is not None else window
        for i, sound in enumerate(sounds):
            if most is None or len(sound) <= most:
                continue
            # Some split what is longer than their window, and then twice the sound gives more than the sound.
            if (
                seconds is None
                and len(set(map(partial(self._tokens_of, owner, options), (sound, np.tile(sound, 2))))) > 1
            ):
                continue
            told = f"the sound has {len(sound) / rate:g} s, of which {self.who} keeps {most / rate:g} s"
            raise ValueError(f"{name}, item {i}: {told}: split it.")

    def _tokens_of(self, owner: Any, options: Mapping[str, Any], sound: Any) -> int:
        """How many tokens the native processor makes of a sound."""
        native = self.whole(owner.tokenizer, owner.processors)
        text = next(token for name, token in self.written.items() if self.kinds[name] == "audio")
        with owner.lock, self._refusing():
            return len(
                native(text=[text], audio=[sound], audio_kwargs=dict(options), return_tensors="pt")["input_ids"][0]
            )

    def _grouped(self, name: str, items: list[Any], texts: list[str] | None, samples: Mapping[str, Any]) -> list[Any]:
        """Items as the native processor takes them: in one list, or in one for each text."""
        if self.kinds[name] != "image" or not any(cls.__name__ in _NESTED for cls in type(self._native).__mro__):
            return items
        token = self.written[name]
        counts = samples.get(name) if texts is None else [occurrences(text, [token])[token] for text in texts]
        start, groups = 0, []
        for count in counts or [len(items)]:
            groups.append(items[start : start + count])
            start += count
        return groups

    def _check(
        self, owner: Any, data: Mapping, items: Mapping[str, list], settings: Mapping, call: NativeTexts
    ) -> None:
        """Hold placeholders against features, by modality (ValueError with both numbers, or for an item of none)."""
        ids = None if "input_ids" not in data else [list(map(int, row)) for row in data["input_ids"]]
        for name, lengths in self._lengths(owner, items, call).items():
            if 0 in lengths:
                raise ValueError(
                    f"{name}, item {lengths.index(0)}: {self.who} makes no feature of it: it is too short."
                )
            names = owner.config.modality(name)["input_names"]
            tensors = {taken: _tensor(data[key]) for key, taken in names.items() if key in data}
            check_finite(tensors, name)
            features = owner.counter.batch_count(name, tensors | settings[name])
            written = None if ids is None else sum(row.count(owner.placeholder_ids[name]) for row in ids)
            if written is not None and written != features:
                told = f"{self.who} writes {written} placeholder tokens for {len(items[name])} items, whose encoder"
                reason = "its settings do not fit the model's, or text was cut"
                raise ValueError(f"{name}: {told} gives {features} features: {reason}.")

    def _lengths(self, owner: Any, items: Mapping[str, list], call: NativeTexts) -> dict[str, list[int]]:
        """Placeholders of each item by what stands for it; none where the class does not tell."""
        placeholders = owner.tokenizer.convert_ids_to_tokens(list(owner.placeholder_ids.values()))
        tokens = dict(zip(owner.placeholder_ids, placeholders, strict=True))
        texts = {name: call.replacements.get(self.kinds[name], ()) for name in items}
        return {name: [text.count(tokens[name]) for text in found] for name, found in texts.items()}

    def _for_collator(self, owner: Any, data: dict, items: Mapping[str, list], call: NativeTexts) -> dict[str, Any]:
        """Of one text: without values of tokens that are made anew of a batch, and with features of each item."""
        rows = {key: data[key].tolist() for key in ("input_ids", "attention_mask", "assistant_masks") if key in data}
        lengths: dict[str, list[int]] = {name: [] for name in self.kinds} | self._lengths(owner, items, call)
        for name, own in items.items():
            if not lengths[name]:  # what it writes for each item is the same
                lengths[name] = [rows["input_ids"][0].count(owner.placeholder_ids[name]) // len(own)] * len(own)
        taken = {key for name in items for key in owner.config.modality(name)["input_names"]}
        return rows | {key: data[key] for key in taken if key in data} | {"item_lengths": lengths}


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an encoder among the options of a modality."""
    return {key: given[key] for key in ENCODER_SETTINGS if key in given}


def _tensor(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    rows = value if isinstance(value, (list, tuple)) else [value]
    return torch.as_tensor(np.asarray([np.asarray(row) for row in rows]) if value is rows else np.asarray(value))


NATIVE["call"] = NativeCall
