"""The base of the composed model's processor: its parts, what clients look for, saving and loading."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from .checkpoints.plain_storage import ProcessorStorage, tokenizer_folder
from .checkpoints.trusted_code import load_shared_code
from .configuration_multimodal import MultimodalConfig
from .encoders.counting import FeatureCounter
from .encoders.own_parts import settle_registered
from .parts.known_encoders import check_facts_registered, registered_facts
from .parts.registries import FEATURE_COUNTS
from .parts.threads import TravellingLock
from .parts.versions import PROCESSOR_HOOKS, check_hooks
from .processing.conversations import DEFAULT_TEMPLATE
from .processing.placeholder_tokens import add_placeholder_tokens, placeholder_tokens
from .processing.subprocessors import build_subprocessor, describe_subprocessor, resolve_subprocessor


class MultimodalProcessorBase(ProcessorStorage, ProcessorMixin):
    """What a processor is besides its call; see `MultimodalProcessor`."""

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
            tokenizer.pad_token = tokenizer.eos_token
        self.tokens = placeholder_tokens(config, tokens or {})
        ids = add_placeholder_tokens(tokenizer, self.tokens)
        check_hooks(ProcessorMixin, PROCESSOR_HOOKS)
        template = chat_template or getattr(tokenizer, "chat_template", None) or DEFAULT_TEMPLATE
        super().__init__(tokenizer, chat_template=template)
        tokenizer._set_processor_class(type(self).__name__)  # as saving does, which would change a fingerprint
        self.processors = {
            name: resolve_subprocessor(p, config.modality(name)["kind"], name) for name, p in (processors or {}).items()
        }
        if model is not None:
            model.set_modality_token_ids(ids)
            for name, token in self.tokens.items():
                model.config.modality(name)["token"] = token
        self.counter = FeatureCounter(
            _for_processing(config, self.tokens, ids), None if model is None else model.encoders
        )
        self.config = self.counter.config
        self.lock = TravellingLock()  # for what holds a state while it is called

    # ---- what clients look for

    def _of_kind(self, kind: str) -> str | None:
        names = self.config.modalities_of_kind(kind)
        return names[0] if len(names) == 1 else None

    def _attribute(self, kind: str, what: str) -> Any:
        name = self._of_kind(kind)
        if what == "processor":
            value = self.processors.get(name)
        else:
            value = None if name is None else self.config.modality(name)[what]
        if value is None:
            raise AttributeError(f"this processor has not exactly one modality of the kind {kind!r} with a {what}")
        return value

    image_processor = property(lambda self: self._attribute("image", "processor"))
    video_processor = property(lambda self: self._attribute("video", "processor"))
    feature_extractor = property(lambda self: self._attribute("audio", "processor"))
    image_token = property(lambda self: self._attribute("image", "token"))
    video_token = property(lambda self: self._attribute("video", "token"))
    audio_token = property(lambda self: self._attribute("audio", "token"))
    image_token_id = property(lambda self: self._attribute("image", "token_id"))
    video_token_id = property(lambda self: self._attribute("video", "token_id"))
    audio_token_id = property(lambda self: self._attribute("audio", "token_id"))

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors that a call may return."""
        names = list(self.tokenizer.model_input_names)
        return names + [key for name in self.config.encoders for key in self.config.modality(name)["input_names"]]

    def modalities_for(self, what: str) -> list[str]:
        """The modalities that a name, or a kind (``"image"``), means.

        Raises:
            ValueError: none, or several that do not share their inputs; names them.
        """
        if what in self.config.encoders:
            return [what]
        names = self.config.modalities_of_kind(what)
        if len(names) > 1 and not any(set(names) <= set(group) for group in self.config.share_inputs):
            raise ValueError(
                f"{what!r} could mean any of {names}: name the modality, or say that they see the same items by "
                f"share_inputs=[{names}]."
            )
        if not names:
            raise ValueError(
                f"{what!r} is no modality of this model, expected one of {self.config.encoders} or its kind."
            )
        return names

    # ---- saving and loading

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: every sub-processor, and the configuration by which features are counted."""
        described = {name: describe_subprocessor(processor, name) for name, processor in self.processors.items()}
        found = {"processor_class": type(self).__name__.removesuffix("Base"), "model_config": self.config.to_dict()}
        found["processors"] = {name: values for name, values in described.items() if values is not None}
        if getattr(self, "auto_map", None):
            found["auto_map"] = self.auto_map
        return found

    def __repr__(self) -> str:
        parts = [f"- {name}: {self.tokens[name]} {type(p).__name__}" for name, p in self.processors.items()]
        return "\n".join([f"{type(self).__name__}:", f"- tokenizer: {type(self.tokenizer).__name__}", *parts])

    def _before_save(self) -> None:
        self.config.encoder_types = registered_facts(
            [getattr(self.config, f"{name}_config") for name in self.config.encoders]
        )
        for name, own in self.counter.own.items():
            if FEATURE_COUNTS.get(name) is None:
                settle_registered(self.config, own)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        values = processor_dict or {}
        if "model_config" not in values:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no processor_config.json of a MultimodalProcessor: save the processor "
                "there by processor.save_pretrained(...)."
            )
        subfolder = kwargs.pop("subfolder", "")
        load_shared_code(pretrained_model_name_or_path, values.get("auto_map"), kwargs)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # never asked for at a prompt
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        config = MultimodalConfig.from_dict(dict(values["model_config"]))
        check_facts_registered(config.encoder_types)
        processors = {name: build_subprocessor(d, name) for name, d in values.get("processors", {}).items()}
        for name in config.encoders:
            if name not in processors and config.modality(name)["kind"] == "text":
                folder = os.path.join(subfolder, tokenizer_folder(name))
                processors[name] = AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, subfolder=folder, **kwargs
                )
        return [tokenizer, processors, config]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build a processor from its loaded parts."""
        tokenizer, processors, config = args
        return_unused = kwargs.pop("return_unused_kwargs", False)
        template = kwargs.pop("chat_template", processor_dict.get("chat_template"))
        processor = cls(tokenizer, processors, config=config, chat_template=template)
        if auto_map := processor_dict.get("auto_map"):
            processor.auto_map = auto_map
        return (processor, kwargs) if return_unused else processor


def _for_processing(config: MultimodalConfig, tokens: Mapping[str, str], ids: Mapping[str, int]) -> MultimodalConfig:
    """A copy of the configuration with the tokens in it and without what only the weights need."""
    config = copy.deepcopy(config)
    for name in config.encoders:
        config.modality(name).update(token=tokens[name], token_id=ids[name])
    for key in ("adapters", "frozen", "part_dtypes", "origins"):
        setattr(config, key, None)
    config.__dict__.pop("auto_map", None)
    return config
