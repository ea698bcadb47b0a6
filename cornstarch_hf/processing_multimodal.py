"""The processor of a composed model: raw inputs to tensors, each placeholder repeated for its item's features.

`processing.call` sorts the arguments; `encoders.counting` tells how many features the encoder and the projector will make.
"""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from .checkpoints.plain_storage import ProcessorStorage, tokenizer_folder
from .checkpoints.trusted_code import load_shared_code
from .configuration_multimodal import MultimodalConfig
from .encoders.counting import FeatureCounter
from .encoders.items import split_items, without_padding
from .encoders.own_parts import settle_registered
from .encoders.towers import keyword_for, named_inputs
from .parts.classes import carries_code
from .parts.known_encoders import check_facts_registered, grid_of, registered_facts
from .parts.registries import FEATURE_COUNTS
from .parts.threads import TravellingLock
from .parts.versions import PROCESSOR_HOOKS, check_hooks
from .processing.assistant_turns import assistant_spans
from .processing.call import (
    ClientNames,
    Media,
    call_arguments,
    check_items,
    encode_texts,
    media_arguments,
    text_arguments,
)
from .processing.conversations import (
    DEFAULT_TEMPLATE,
    ConversationReader,
    chosen_template,
    is_batch,
    refuse_typed,
    render,
)
from .processing.media import flatten
from .processing.placeholder_text import MultimodalBatch, add_placeholder_tokens, placeholder_tokens
from .processing.stored_processors import describe_subprocessor, load_parts, named_parts
from .processing.subprocessors import (
    check_padding,
    image_channels,
    resolve_subprocessor,
    run_subprocessor,
    sampling_rate_of,
    tensor_names,
    tensors_of_size,
)
from .processing.video import named_for_encoder
from .processing.video_processors import is_video_processor


class MultimodalProcessor(ClientNames, ProcessorStorage):
    """Tokenizer and single-modality processors as one, for a composed model.

    Args:
        tokenizer: of the language model; copied, placeholder tokens are added to the copy.
        processors: an image processor, feature extractor or tokenizer by modality name.
        model: a composed model, into whose configuration the placeholder ids are written.
        config: a `MultimodalConfig` instead of a model.
        tokens: placeholder tokens by modality name; by default ``<image>``, ``<audio>``, ``<video>`` where one
            modality has that kind, else ``<{name}>``.
        chat_template: a Jinja template; by default the tokenizer's, else a plain one.

    Raises:
        TypeError: something of a wrong type.
        ValueError: neither model nor config, a processor for a modality that the model does not have, placeholder
            tokens that collide.
    """

    def __init__(
        self, tokenizer=None, processors=None, model=None, config=None, tokens=None, chat_template=None, **kwargs
    ):
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
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # batches need one; masks tell it from a real end
        self.tokens = placeholder_tokens(config, tokens or {})
        ids = add_placeholder_tokens(tokenizer, self.tokens)
        check_hooks(ProcessorMixin, PROCESSOR_HOOKS)
        template = chat_template or getattr(tokenizer, "chat_template", None) or DEFAULT_TEMPLATE
        super().__init__(tokenizer, chat_template=template)
        tokenizer._set_processor_class(type(self).__name__)  # as saving does, which would change a fingerprint
        kinds = {name: config.modality(name)["kind"] for name in config.encoders}
        self.processors = {name: resolve_subprocessor(p, kinds[name], name) for name, p in (processors or {}).items()}
        if model is not None:
            model.set_modality_token_ids(ids)  # by which the model finds placeholders
            for name, token in self.tokens.items():
                config.modality(name)["token"] = token  # the model's own
        config = copy.deepcopy(config)
        for name in config.encoders:
            config.modality(name).update(token=self.tokens[name], token_id=ids[name])
        for key in ("adapters", "frozen", "part_dtypes", "origins"):  # what only the weights need
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
        tensors, lengths, samples = self._process_media(media)  # first: the text needs the numbers of features
        data: dict[str, Any] = {}
        if text is not None:
            texts, ids = [text] if isinstance(text, str) else list(text), self.placeholder_ids
            check_items(texts, self.tokens, {name: len(found) for name, found in lengths.items()}, samples)
            with self.lock:  # a tokenizer keeps the options of its last call
                spans = llm["assistant_spans"]
                data = encode_texts(self.tokenizer, texts, self.tokens, ids, lengths, options, spans)
            if with_types:
                types = {"mm_token_type_ids": self.create_mm_token_type_ids(data["input_ids"])}
                data |= BatchFeature(types, tensor_type=options.get("return_tensors"))
        if llm["item_lengths"]:  # the collator asks how many features each item has
            data["item_lengths"] = lengths
        if options.get("return_tensors") == "np":
            tensors = {key: np.asarray(value) for key, value in tensors.items()}
        return MultimodalBatch({**data, **tensors}, placeholder_ids=self.placeholder_ids.values())

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Id of each modality's placeholder token."""
        return {name: self.config.modality(name)["token_id"] for name in self.tokens}

    def _process_media(self, media: Media):
        """Tensors by keyword, features of each item by modality, items per sample where they were given so."""
        tensors: dict[str, Any] = {}
        lengths: dict[str, list[int]] = {name: [] for name in self.config.encoders}
        samples: dict[str, Any] = {}
        for name, given in media.items():
            entry = self.config.modality(name)
            given = dict(given)
            if "items" in given:
                items, samples[name] = flatten(given.pop("items"), entry["kind"])
                if not items:
                    continue  # there are samples, none with an item
                output, count = self._run_subprocessor(name, items, given), len(items)
            else:  # tensors made elsewhere
                output = {key: torch.as_tensor(value) for key, value in given.items()}
                grid = grid_of(output)  # packed patches have one row for each, their grids one for each item
                count = len(next(iter(output.values())) if grid is None else grid)
            names, used = entry["input_names"], self._for_encoder(name, output)
            if not used:
                raise ValueError(f"{name}: its encoder takes {sorted(names)}, but got only {sorted(output)}.")
            check_padding(output, used, self.processors.get(name), name)
            split = split_items({names[keyword]: value for keyword, value in used.items()}, count, name)
            lengths[name] = [self.counter.count(name, without_padding(item)) for item in split]  # of each item alone
            tensors |= used
        return tensors, lengths, samples

    def _for_encoder(self, name: str, output: dict[str, Any]) -> dict[str, Any]:
        """What its encoder takes of the tensors of a modality's processor, by keyword of the composed model."""
        entry = self.config.modality(name)
        names = entry["input_names"]  # keyword of the composed model -> parameter of the encoder
        if entry["kind"] == "video":
            output = named_for_encoder(output, name, partial(keyword_for, modality=name, input_names=names))
        return named_inputs(output, name, names)

    def _masked(self, name: str) -> bool:
        """Whether its encoder wants a mask of its features also where they are padded to a window."""
        return any(taken.endswith("features_mask") for taken in self.config.modality(name)["input_names"].values())

    def _run_subprocessor(self, name: str, items: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        if name not in self.processors:
            raise ValueError(f"{name}: there is no processor for it, give processors={{{name!r}: ...}}.")
        entry, config = self.config.modality(name), getattr(self.config, f"{name}_config")
        masked = self._masked(name)
        prepared = self.counter.has_preprocessing(name)  # then images may come as crops
        own, kind = self.processors[name], entry["kind"]
        with self.lock if kind == "text" else nullcontext():  # a tokenizer keeps the options of its last call
            return run_subprocessor(own, name, kind, items, options, config, masked, prepared)

    def apply_chat_template(
        self, conversation, chat_template: str | None = None, tools=None, documents=None,
        add_generation_prompt: bool = False, continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False, tokenize: bool = False, return_tensors=None,
        return_dict: bool = False, processor_kwargs: dict | None = None, **kwargs: Any,
    ):  # fmt: skip
        """Turn a conversation, or a batch of them, into text or into inputs.

        A part's type is ``"text"``, a kind (``"image"``, ``"audio"``, ``"video"``) or a modality's name.  A placeholder
        that a user typed in a message stays text when tokenized; where text is returned it is refused (ValueError).

        Args:
            conversation: a list of messages, or a list of such lists.
            chat_template: a template, or the name of one; this processor's by default.
            return_assistant_tokens_mask: adds `assistant_masks`, 1 on tokens that the assistant wrote.
            tokenize, return_tensors, return_dict, add_generation_prompt, continue_final_message, tools, documents: as in
                transformers.
            processor_kwargs: arguments of this processor's call.
            **kwargs: those too, and variables of the template.

        Returns:
            text or a list of texts; with `tokenize` `input_ids`, or with `return_dict` a `BatchFeature`.
        """
        template = chosen_template(self.chat_template, chat_template)
        batched = is_batch(conversation)
        conversations = list(conversation) if batched else [conversation]
        own = call_arguments(self.config, self.processors)
        call = {k: kwargs.pop(k) for k in list(kwargs) if k in own or k.endswith("_kwargs")}
        call |= processor_kwargs or {}
        variables: Any = {**self.tokenizer.special_tokens_map, "tools": tools, "documents": documents, **kwargs}
        ending: Any = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        texts: list[str] = []
        spans: list[Any] = []
        media: list[dict[str, list]] = []
        for one in conversations:
            messages, found = self._reader().read(one, template)  # takes the media out, marks what users typed
            if return_assistant_tokens_mask:
                text, turns = assistant_spans(messages, template, specials=self._specials(), **variables)
            else:
                text, turns = render(messages, template, **ending, **variables)
            texts, spans, media = [*texts, text], [*spans, turns], [*media, found]
        if not tokenize:
            texts = [refuse_typed(text) for text in texts]
            return texts if batched else texts[0]
        for name in self.config.encoders:
            if any(name in found for found in media):
                if call.get(name) is not None:
                    raise ValueError(f"{name}: its items were given twice, in the messages and by name.")
                call[name] = [found.get(name, []) for found in media]  # a list for each text
        llm: dict[str, Any] = {"text": texts, "default_options": self.bos_options(texts[0])}
        llm |= {"assistant_spans": spans} if return_assistant_tokens_mask else {}
        out = self(llm_inputs=llm, return_tensors=return_tensors, **call)
        return out if return_dict else out["input_ids"]

    def read_labelled(
        self, conversation, *, given=None, first: int = 0, chat_template: str | None = None, **variables: Any
    ) -> tuple[str, list[tuple[int, int]], dict[str, list]]:
        """A conversation's text, the spans of the assistant's turns in it, and its media, for the collator.

        Parts without an item take those `given` by modality; turns count from the message `first` on.  ValueError for variables
        of the template that are options of this processor's call.
        """
        own = {
            key for key in variables if key in call_arguments(self.config, self.processors) or key.endswith("_kwargs")
        }
        if own:
            raise ValueError(
                f"chat_template_kwargs has {sorted(own)}, which are the processor's and no variables of a template."
            )
        template = chosen_template(self.chat_template, chat_template)
        messages, media = self._reader().read(conversation, template, given)
        variables = {**self.tokenizer.special_tokens_map, **variables}
        text, spans = assistant_spans(messages, template, first=first, specials=self._specials(), **variables)
        return text, spans, media

    def bos_options(self, text: str) -> dict[str, Any]:
        """The tokenizer's options for a text: one that begins with the bos token gets no second one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}

    def _reader(self) -> ConversationReader:
        kinds = {name: self.config.modality(name)["kind"] for name in self.tokens}
        return ConversationReader(self.tokens, self.config.modalities_for, kinds)

    def _specials(self) -> list[str]:
        return list(dict.fromkeys([*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()]))

    # ---- what clients look for

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call with text and items of every modality returns."""
        names = list(dict.fromkeys([*self.tokenizer.model_input_names, "attention_mask"]))
        for name in self.config.encoders:
            entry = self.config.modality(name)
            emitted = tensor_names(self.processors.get(name), entry["kind"], self._masked(name))
            values = {key: torch.zeros(1, 1) for key in emitted}
            names += self._for_encoder(name, values) if emitted else entry["input_names"]
        return names

    def _count_of_size(self, name: str, kind: str, size: Any, options: dict[str, Any]) -> tuple[int, int]:
        """Features of an item of a size, and its rows of pixels: patches where its processor packs them, else 1."""
        processor = self.processors.get(name)
        if isinstance(processor, ImageProcessingMixin) and not is_video_processor(processor):
            channels = image_channels(getattr(self.config, f"{name}_config"))
            output = tensors_of_size(processor, name, size, options, channels, self.counter.has_preprocessing(name))
        elif kind == "audio":
            silence = {"array": np.zeros(size, np.float32), "sampling_rate": sampling_rate_of(processor)}
            output = self._run_subprocessor(name, [silence], options)
        else:
            told = f"{type(processor).__name__} does not tell by its size what it makes of an item"
            raise ValueError(f"{name}: {told}: call the processor with one of that size.")
        used, names = self._for_encoder(name, output), self.config.modality(name)["input_names"]
        (item,) = split_items({names[keyword]: value for keyword, value in used.items()}, 1, name)
        return self.counter.count(name, without_padding(item)), len(next(iter(used.values())))

    # ---- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: every sub-processor, and the configuration by which features are counted."""
        described = {name: describe_subprocessor(processor, name) for name, processor in self.processors.items()}
        kinds = {name: self.config.modality(name)["kind"] for name in self.config.encoders}
        parts = named_parts({name: values for name, values in described.items() if values is not None}, kinds)
        found = {"processor_class": type(self).__name__, "model_config": self.config.to_dict()} | parts
        return found | ({"auto_map": self.auto_map} if getattr(self, "auto_map", None) else {})

    def __repr__(self) -> str:
        parts = [f"- {name}: {self.tokens[name]} {type(p).__name__}" for name, p in self.processors.items()]
        return "\n".join([f"{type(self).__name__}:", f"- tokenizer: {type(self.tokenizer).__name__}", *parts])

    def _before_save(self) -> None:
        check_facts_registered(self.config.encoder_types)  # what is not known here would be left out
        configs = [getattr(self.config, f"{name}_config") for name in self.config.encoders]
        self.config.encoder_types = registered_facts(configs)
        for name, own in self.counter.own.items():
            if FEATURE_COUNTS.get(name) is None:  # else that count is final, and no part is asked
                settle_registered(self.config, own)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        values = processor_dict or {}
        if "model_config" not in values:
            where = f"{pretrained_model_name_or_path} has no processor_config.json of a MultimodalProcessor"
            raise ValueError(f"{where}: save the processor there by processor.save_pretrained(...).")
        load_shared_code(pretrained_model_name_or_path, values.get("auto_map"), kwargs)  # defines what is named below
        config = MultimodalConfig.from_dict(dict(values["model_config"]))
        check_facts_registered(config.encoder_types)
        kinds = {name: config.modality(name)["kind"] for name in config.encoders}
        tokenizer, parts, unused = load_parts(pretrained_model_name_or_path, values, kinds, kwargs, tokenizer_folder)
        if unused and not kwargs.get("return_unused_kwargs"):
            raise TypeError(f"from_pretrained() got unexpected arguments {sorted(unused)}: no part takes them.")
        return [tokenizer, parts, config, unused]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build a processor from its loaded parts."""
        tokenizer, processors, config, unused = args
        template = kwargs.get("chat_template", processor_dict.get("chat_template"))
        processor = cls(tokenizer, processors, config=config, chat_template=template)
        for name, number in processor.placeholder_ids.items():
            if (stored := config.modality(name)["token_id"]) not in (None, number):
                told = f"the placeholder {processor.tokens[name]} has the id {number} in this tokenizer, {stored} in the model"
                raise ValueError(
                    f"{name}: {told}: build MultimodalProcessor(tokenizer, ..., model=model), which sets both."
                )
        if carries_code(auto_map := processor_dict.get("auto_map")):  # what stands for no code is written anew
            processor.auto_map = auto_map
        return (processor, unused) if kwargs.get("return_unused_kwargs") else processor
