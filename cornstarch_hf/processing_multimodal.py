"""The processor of a composed model: raw inputs to tensors, each placeholder repeated for its item's features.

`processing.call` sorts the arguments; `encoders.counting` tells how many features the encoder and the projector will make.
"""

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from .checkpoints.plain_storage import ProcessorStorage, tokenizer_folder
from .checkpoints.trusted_code import load_shared_code
from .configuration_multimodal import MultimodalConfig
from .encoders.counting import FeatureCounter
from .encoders.items import item_count, split_items, without_padding
from .encoders.own_parts import settle_registered
from .encoders.towers import keyword_for, named_inputs
from .parts.classes import carries_code
from .parts.known_encoders import check_facts_registered, registered_facts
from .parts.names import own_names
from .parts.registries import FEATURE_COUNTS, STEPS
from .parts.stored_errors import explained
from .parts.stored_values import check_values
from .parts.threads import TravellingLock
from .parts.versions import PROCESSOR_HOOKS, check_hooks
from .processing.call import ClientNames, Media, check_items, encode_texts, media_arguments, text_arguments
from .processing.chats import ChatTemplating, as_given, with_media
from .processing.media import check_finite, flatten, of_item
from .processing.placeholder_text import MultimodalBatch, add_placeholder_tokens, placeholder_tokens
from .processing.rendering import DEFAULT_TEMPLATE
from .processing.sounds import refuse_short
from .processing.stored_processors import describe_subprocessor, load_parts, named_parts, native_of
from .processing.subprocessors import (
    ENCODER_SETTINGS,
    ItemCounts,
    check_padding,
    resolve_subprocessor,
    run_subprocessor,
    sampling_rate_of,
    tensor_names,
)
from .processing.video import named_for_encoder


class MultimodalProcessor(ChatTemplating, ClientNames, ItemCounts, ProcessorStorage):
    """Tokenizer and single-modality processors as one, for a composed model.

    Args:
        tokenizer: of the language model; copied, placeholder tokens are added to the copy.
        processors: an image processor, feature extractor or tokenizer by modality name.
        model: a composed model, into whose configuration the placeholder ids are written.
        config: a `MultimodalConfig` instead of a model.
        tokens: placeholder tokens by modality name; by default ``<image>``, ``<audio>``, ``<video>`` where one
            modality has that kind, else ``<{name}>``.
        chat_template: a Jinja template; by default the tokenizer's, else a plain one.
        native: what holds a native processor, from `from_native`; it then makes text and tensors of items.

    Raises:
        TypeError: something of a wrong type.
        ValueError: neither model nor config, a processor for a modality that the model does not have, placeholder
            tokens that collide.
    """

    def __init__(
        self, tokenizer=None, processors=None, model=None, config=None, tokens=None, chat_template=None, native=None,
        **kwargs,
    ):  # fmt: skip
        if kwargs:
            raise TypeError(f"MultimodalProcessor() got unexpected arguments {sorted(kwargs)}.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}.")
        config = config if model is None else model.config
        if not isinstance(config, MultimodalConfig):
            raise ValueError("MultimodalProcessor needs model= (a composed model) or config= (its MultimodalConfig).")
        if unknown := sorted(set(processors or {}) - set(config.encoders)):
            raise ValueError(f"processors names {unknown}, the model has the encoders {config.encoders}.")
        tokenizer = copy.deepcopy(tokenizer)
        if native is None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # batches need one; masks tell it from a real end
        self.native, own = native, {} if native is None else native.written
        self.tokens = placeholder_tokens(config, tokens or own)
        # A native processor's placeholders have ids of their own, those of the model.
        ids = {name: config.modality(name)["token_id"] for name in own} or add_placeholder_tokens(
            tokenizer, self.tokens
        )
        check_hooks(ProcessorMixin, PROCESSOR_HOOKS)
        tokenizer.chat_template = as_given(getattr(tokenizer, "chat_template", None))  # it may be of a checkpoint
        template = as_given(chat_template) or tokenizer.chat_template or DEFAULT_TEMPLATE
        super().__init__(tokenizer, chat_template=template)
        tokenizer._set_processor_class(type(self).__name__)  # as saving does, which would change a fingerprint
        kinds = {name: config.modality(name)["kind"] for name in config.encoders}
        self.processors = {name: resolve_subprocessor(p, kinds[name], name) for name, p in (processors or {}).items()}
        if model is not None:
            model.set_modality_token_ids(ids)  # by which the model finds placeholders
            for name, token in self.tokens.items():
                config.modality(name)["token"] = token  # the model's own
        config = copy.deepcopy(config)
        for name in self.tokens:
            config.modality(name).update(token=self.tokens[name], token_id=ids[name])
        for key in ("adapters", "frozen", "frozen_parts", "part_dtypes", "origins"):  # what only the weights need
            setattr(config, key, None)
        config.__dict__.pop("auto_map", None)
        self.counter = FeatureCounter(config, None if model is None else model.encoders)
        self.config = self.counter.config
        self.lock = TravellingLock()  # for what holds a state while it is called

    def __call__(
        self, images=None, text=None, videos=None, audio=None, *, encoder_inputs=None, llm_inputs=None, **kwargs: Any
    ) -> BatchFeature:
        """Process text and media.

        Args:
            images, videos, audio: items of the modality of that kind: one, a list, or a list per sample.
            text: one text or a list, with one placeholder per item.
            encoder_inputs: ``{modality: {argument: value}}``, the items under any of their usual names, or tensors
                that are processed already under the names that the encoder takes.
            llm_inputs: ``{"text": ..., further arguments of the tokenizer}``.
            **kwargs: items by modality name (``protein=[...]``); ``sampling_rate`` of bare audio arrays in Hz; arguments of
                the tokenizer (`padding`, `truncation`, `max_length`, `return_tensors`, ...), and of single processors in
                ``{modality}_kwargs``, ``images_kwargs``, ``audio_kwargs``, ``text_kwargs``.

        Returns:
            `BatchFeature` with `input_ids`, `attention_mask` ``(batch, length)`` and each encoder's inputs; `labels` put
            into it become -100 on placeholders.

        Raises:
            TypeError: an unknown argument.
            ValueError: nothing to process, something given twice or to no effect, placeholders and items that differ in
                number, unusable items, truncation that would cut features.
        """
        text, options, llm = text_arguments(text, llm_inputs, kwargs, self.tokenizer)
        with_types = options.pop("return_mm_token_type_ids", False)
        by_kind = {"images": images, "videos": videos, "audio": audio}
        media = media_arguments(self.config, self.processors, by_kind, encoder_inputs, kwargs)
        if text is None and not media:
            raise ValueError(f"Nothing to process: give text=, or items of {self.config.encoders} by name or by kind.")
        if self.native is not None:
            return MultimodalBatch(self.native(self, text, media, llm), placeholder_ids=self.placeholder_ids.values())
        # First: the text needs the numbers of features.
        tensors, lengths, samples = self._process_media(media, llm["by_size"])
        data: dict[str, Any] = {}
        if text is not None:
            texts, ids = [text] if isinstance(text, str) else list(text), self.placeholder_ids
            check_items(texts, self.tokens, {name: len(found) for name, found in lengths.items()}, samples)
            with self.lock:  # a tokenizer keeps the options of its last call
                spans = llm["assistant_spans"]
                data = encode_texts(self.tokenizer, texts, self.tokens, ids, lengths, options, spans)
            if with_types:
                types: Any = self.create_mm_token_type_ids(data["input_ids"])
                kind = options.get("return_tensors")  # of empty texts alone torch and numpy would make floats
                types = {"mm_token_type_ids": np.asarray(types, np.int64) if kind else types}
                data |= BatchFeature(types, tensor_type=kind)
        if llm["item_lengths"]:  # the collator asks how many features each item has
            data["item_lengths"] = lengths
        if options.get("return_tensors") == "np":
            tensors = {key: np.asarray(value) for key, value in tensors.items()}
        return MultimodalBatch({**data, **tensors}, placeholder_ids=self.placeholder_ids.values())

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of each modality's placeholder token."""
        return {name: self.config.modality(name)["token_id"] for name in self.tokens}

    def _process_media(self, media: Media, by_size: bool | None):
        """Tensors by keyword, features of each item by modality, items per sample where they were given so.

        With `by_size` there are no tensors of images whose files tell their sizes.
        """
        tensors: dict[str, Any] = {}
        lengths: dict[str, list[int]] = {name: [] for name in self.tokens}
        samples: dict[str, Any] = {}
        for name, given in media.items():
            given = dict(given)
            settings = {key: given.pop(key) for key in ENCODER_SETTINGS if key in given}
            if "items" in given:
                items, samples[name] = flatten(given.pop("items"), self.config.modality(name)["kind"])
                if not items:
                    continue  # there are samples, none with an item
                # What the encoder is told besides may change the number of features.
                counts = self._counted_by_size(name, items, given) if by_size and not settings else None
                used, lengths[name] = ({}, counts) if counts else self._process_items(name, items, given, settings)
            else:  # tensors made elsewhere
                ready = STEPS["join"].ready if name in self.config.joined.values() else type(self)._ready
                used, split = ready(self, name, given)
                lengths[name] = self._counted(name, split, settings)
            tensors |= used
        return tensors, lengths, samples

    def _ready(self, name: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """As `_used`, of tensors made elsewhere (TypeError for some that nothing takes)."""
        names, kind = own_names(self.config, name), self.config.modality(name)["kind"]
        taken = {*names.values(), *tensor_names(self.processors.get(name), kind, True)}
        if wrong := [key for key in given if key not in taken and keyword_for(key, name, names) is None]:
            raise TypeError(f"{name}: its encoder takes no tensors {wrong}, but {sorted(names)}.")
        # Tiles have one row for each.
        return self._used(name, given, len(given.get("num_tiles", ())) or item_count(given))

    def _process_items(
        self, name: str, items: list[Any], options: dict[str, Any], settings: dict[str, Any]
    ) -> tuple[dict[str, Any], list[int]]:
        """The tensors of one modality's items by keyword, and how many features each gives."""
        try:
            used, split = self._tensors(name, items, options)
            for i, item in enumerate(split):
                check_finite(item, f"{name}, item {i}")
            return used, self._counted(name, split, settings)
        except ValueError:
            if self.config.modality(name)["kind"] == "audio":
                for i, item in enumerate(items) if len(items) > 1 else ():  # in a batch all are as long as the longest
                    with of_item(name, i):
                        self._process_items(name, [item], options, settings)
                features = partial(self.features_of_sound, name, options=options)
                rate = sampling_rate_of(self.processors.get(name))
                refuse_short(items, name, rate, options.get("sampling_rate"), features)
            raise

    def _tensors(
        self, name: str, items: list[Any], options: dict[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What the encoder of a modality, and those that are joined to it, take of its items: by keyword, and of each item."""
        if name in self.config.joined.values():
            return STEPS["join"].tensors(self, name, items, options)
        return self._used(name, self._run_subprocessor(name, items, options), len(items))

    def _used(self, name: str, output: dict[str, Any], count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What its encoder takes of a modality's tensors: by keyword, and by the encoder's own names for each item."""
        names = own_names(self.config, name)  # keyword of the composed model -> parameter of the encoder
        used = self._for_encoder(name, output)
        if not used:
            raise ValueError(f"{name}: its encoder takes {sorted(names)}, but got only {sorted(output)}.")
        check_padding(output, used, self.processors.get(name), name)
        return used, split_items({names[keyword]: value for keyword, value in used.items()}, count, name)

    def _counted(self, name: str, split: list[dict[str, Any]], settings: dict[str, Any]) -> list[int]:
        """Features of each item alone (ValueError: a sound of none, which would leave no trace)."""
        counts = []
        for i, item in enumerate(split):
            with of_item(name, i):
                counts.append(self.counter.count(name, without_padding(item) | settings))
        if self.config.modality(name)["kind"] == "audio" and 0 in counts:
            raise ValueError(f"{name}, item {counts.index(0)}: the sound gives no features: it is too short.")
        return counts

    def _for_encoder(self, name: str, output: dict[str, Any]) -> dict[str, Any]:
        """What its encoder takes of the tensors of a modality's processor, by keyword of the composed model."""
        names = own_names(self.config, name)  # keyword of the composed model -> parameter of the encoder
        if self.config.modality(name)["kind"] == "video":
            output = named_for_encoder(output, name, partial(keyword_for, modality=name, input_names=names))
        return named_inputs(output, name, names)

    def _masked(self, name: str) -> bool:
        """Whether a mask is wanted of what is padded to a window: to leave out the padding, or as the encoder's own input."""
        trim = self.config.modality(name)["trim"]
        return trim or any(x.endswith("features_mask") for x in own_names(self.config, name).values())

    def _run_subprocessor(self, name: str, items: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        if name not in self.processors:
            raise ValueError(f"{name}: there is no processor for it, give processors={{{name!r}: ...}}.")
        kind, config = self.config.modality(name)["kind"], getattr(self.config, f"{name}_config")
        masked = self._masked(name)
        maskless = not any(x.endswith("mask") for x in own_names(self.config, name).values())
        prepared = self.counter.has_preprocessing(name)  # then images may come as crops
        own = self.processors[name]
        with self.lock if kind == "text" else nullcontext():  # a tokenizer keeps the options of its last call
            return run_subprocessor(own, name, kind, items, options, config, masked, prepared, maskless)

    # ---- what clients look for

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call with text and items of every modality returns."""
        names = list(dict.fromkeys([*self.tokenizer.model_input_names, "attention_mask"]))
        for name in self.config.encoders:
            entry = self.config.modality(name)
            emitted = tensor_names(self.processors.get(name), entry["kind"], self._masked(name))
            tiled = entry["additional_args"] if self.counter.has_preprocessing(name) == "tiles" else []
            values = {key: torch.zeros(1, 1) for key in [*emitted, *tiled]}
            names += self._for_encoder(name, values) if emitted else own_names(self.config, name)
        return names

    # ---- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: every sub-processor, and the configuration by which features are counted."""
        described = {name: describe_subprocessor(processor, name) for name, processor in self.processors.items()}
        kinds = {name: self.config.modality(name)["kind"] for name in self.config.encoders}
        parts = named_parts({name: values for name, values in described.items() if values is not None}, kinds)
        found = {"processor_class": type(self).__name__, "model_config": self.config.to_dict()} | parts
        found |= {} if self.native is None else {"native": self.native.describe()}
        return found | ({"auto_map": self.auto_map} if getattr(self, "auto_map", None) else {})

    def __repr__(self) -> str:
        parts = [f"- {name}: {self.tokens.get(name, '-')} {type(p).__name__}" for name, p in self.processors.items()]
        return "\n".join([f"{type(self).__name__}:", f"- tokenizer: {type(self.tokenizer).__name__}", *parts])

    def _before_save(self) -> None:
        check_facts_registered(self.config.encoder_types)  # what is not known here would be left out
        configs = [getattr(self.config, f"{name}_config") for name in self.config.encoders]
        self.config.encoder_types = registered_facts(configs)
        for name, own in self.counter.own.items():
            if FEATURE_COUNTS.get(name) is None:  # else that count is final, and no part is asked
                settle_registered(self.config, own)

    def _after_write(self, folder: str) -> None:
        # The default template, and named ones.
        for path in (*Path(folder).glob(CHAT_TEMPLATE_FILE), *Path(folder, CHAT_TEMPLATE_DIR).glob("*.jinja")):
            template = with_media(path.read_bytes().decode(), self.tokens, self.config.modalities_for, self._kinds())
            path.write_bytes(template.encode())

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        values = processor_dict or {}
        if "model_config" not in values:
            where = f"{pretrained_model_name_or_path} has no processor_config.json of a MultimodalProcessor"
            raise ValueError(f"{where}: save the processor there by processor.save_pretrained(...).")
        load_shared_code(pretrained_model_name_or_path, values.get("auto_map"), kwargs)  # defines what is named below
        with explained("processor_config.json: model_config"):
            described = dict(values["model_config"])
            check_values(described, "MultimodalConfig")
            config = MultimodalConfig.from_checked(described)  # parts that count run by no kernel, whatever was stored
            check_facts_registered(config.encoder_types)
        kinds = {name: config.modality(name)["kind"] for name in config.encoders}
        tokenizer, parts, unused = load_parts(pretrained_model_name_or_path, values, kinds, kwargs, tokenizer_folder)
        native = native_of(values.get("native"), kinds, tokenizer, parts)
        # A pipeline hands the model's loading keywords on to every part.
        if unused and not (kwargs.get("return_unused_kwargs") or kwargs.get("_from_pipeline")):
            raise TypeError(f"from_pretrained() got unexpected arguments {sorted(unused)}: no part takes them.")
        return [tokenizer, parts, config, native, unused]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build a processor from its loaded parts."""
        tokenizer, processors, config, native, unused = args
        template = kwargs.get("chat_template", processor_dict.get("chat_template"))
        with explained("processor_config.json, tokenizer_config.json or another file of the processor"):
            processor = cls(tokenizer, processors, config=config, chat_template=template, native=native)
            for name, number in processor.placeholder_ids.items():
                if (stored := config.modality(name)["token_id"]) not in (None, number):
                    told = f"{processor.tokens[name]} has the id {number} in this tokenizer, {stored} in the model"
                    remedy = "build MultimodalProcessor(tokenizer, ..., model=model), which sets both."
                    raise ValueError(f"{name}: the placeholder {told}: {remedy}")
        if carries_code(auto_map := processor_dict.get("auto_map")):  # what stands for no code is written anew
            processor.auto_map = auto_map
        return (processor, unused) if kwargs.get("return_unused_kwargs") else processor
