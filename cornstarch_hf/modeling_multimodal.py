"""The composed model: encode → merge → language model → output.  Its base and generation are beside it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput, logging

from .composition import compose_config
from .configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from .encoders.module import ModalEncoderModule
from .encoders.rebuilding import build_parts
from .encoders.towers import OWN_INPUTS, main_input, transformers_keywords
from .language_model.calling import cached_length, run_backbone, run_language_model, text_keywords
from .language_model.extra_inputs import embed_ids, id_inputs
from .language_model.generation import MultimodalGenerationMixin
from .language_model.merging import (
    check_counts,
    check_labels,
    check_lengths,
    embedded_placeholder_mask,
    mask_labels,
    placeholder_mask,
    scatter_features,
    shifted_left,
    without_placeholders,
)
from .modeling_base import MultimodalPreTrainedModel
from .parts.build_bounds import bounded_tensors, check_built
from .parts.freezing import restore_frozen
from .parts.frozen_modes import is_checkpointing
from .parts.signatures import PerInstanceSignature
from .parts.stored_modules import mark_initialized
from .parts.versions import CACHE, GENERATION_HOOKS, MODEL_HOOKS, check_hooks, take_cache
from .parts.weightless import WithoutInitializers

logger = logging.get_logger(__name__)
EncoderOutputs = dict[str, Any]


class MultimodalModel(MultimodalGenerationMixin, MultimodalPreTrainedModel, GenerationMixin):
    """A multimodal language model composed of named encoders, projectors and a causal language model.

    Args:
        config: a `MultimodalConfig` to build with fresh weights; a dict given here means `encoders`.
        language_model: a causal language model of transformers, PEFT-wrapped or not.
        init_projector_type: type of the projectors that encoders lack.
        init_activation: activation of those projectors.
        encoders: `ModalEncoderModule`s by name; `vision` becomes `model.vision_encoder`.

    Raises:
        TypeError: parts of wrong types.
        ValueError: an empty configuration, bad names, widths that do not fit, shared weights, a language model that
            cannot take embeddings.
    """

    def __init__(
        self,
        config: MultimodalConfig | Mapping[str, ModalEncoderModule] | None = None,
        language_model: Any = None,
        init_projector_type: str = "linear",
        init_activation: str = "gelu",
        *,
        encoders: Mapping[str, ModalEncoderModule] | None = None,
    ):
        if isinstance(config, Mapping):
            if encoders is not None:
                raise TypeError("encoders were given twice: as the first argument and by keyword.")
            config, encoders = None, config
        if (config is None) == (language_model is None and encoders is None):
            raise TypeError("MultimodalModel takes either a config, or encoders= and language_model=.")
        if config is None:
            encoders = {} if encoders is None else encoders
            config = compose_config(encoders, language_model, init_projector_type, init_activation)
            parts: Any = (language_model, *encoders.values())
            for part in parts:
                mark_initialized(part)
            supplied = True
        else:
            if not isinstance(config, MultimodalConfig):
                raise TypeError(f"config must be a MultimodalConfig, got {type(config).__name__}.")
            parts = (getattr(config, key, None) for key in config.sub_configs)
            with bounded_tensors(*parts, config.adapters), WithoutInitializers():
                encoders, language_model = build_parts(config)
            supplied = False
        check_hooks(GenerationMixin, GENERATION_HOOKS)
        check_hooks(PreTrainedModel, MODEL_HOOKS)
        super().__init__(config)
        for name, encoder in encoders.items():
            self.add_module(f"{name}_encoder", encoder)
        self.language_model = language_model
        self.loss_type = "ForCausalLM"
        self._inherit_from_language_model(supplied)
        self.post_init()
        if not supplied:
            check_built(self)
            restore_frozen(self, config.frozen)

    def signature_changes(self, method: str) -> tuple[list[str], list[str]] | None:
        """Parameters that this instance's `forward` or `get_{kind}_features` lacks and has in addition."""
        if method == "forward":
            text = text_keywords(self.language_model)
            removed = [key for key in ("position_ids",) if key not in text]
            added = [key for n in self.config.encoders for key in self.config.modality(n)["input_names"]]
            if CACHE not in ("cache", None):  # of an older version, which reads this signature
                removed, added = [*removed, "cache"], [*added, CACHE]
            return removed, added + [key for key in text if key not in OWN_INPUTS]
        names = self.config.modalities_of_kind(method.removeprefix("get_").removesuffix("_features"))
        return ([], [key for n in names for key in self.config.modality(n)["input_names"]]) if names else None

    @PerInstanceSignature
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """Encode, merge, run the language model.

        Args:
            input_ids: ``(batch, length)`` with one placeholder id per feature.
            attention_mask: ``(batch, length)``, or what the language model takes; used as it is.
            position_ids: ``(batch, length)``; used as they are.
            cache: the language model's cache; also by the names that older versions have for it.
            inputs_embeds: ``(batch, length, hidden)`` instead of `input_ids`, placeholders embedded by their id.
            labels: ``(batch, length)``, -100 where no loss is wanted; placeholders are never labelled.
            use_cache: whether the language model returns a cache.
            logits_to_keep: how many last positions get logits, 0 for all.
            mm_encoder_outputs: outputs of encoders that ran before, by modality.
            **kwargs: the encoders' inputs by their keywords, and what the language model's `forward` takes.

        Returns:
            The language model's own output: `loss`, `logits` ``(batch, length, vocabulary)``, `cache` (before transformers
            5.24 `past_key_values`), ..., with the encoders' outputs as the attributes `image_outputs`, `audio_outputs`, ...
            With `config.loss_at_labels`, in training mode and with labels, `logits` is None.

        Raises:
            TypeError: an unknown keyword.
            ValueError: placeholders and features that do not match in number; labelled placeholders where their
                number has been counted already.
        """
        return_dict = kwargs.pop("return_dict", None)
        kwargs = kwargs | {"cache": cache}
        cache = take_cache(kwargs)
        media, text = self._route(kwargs)
        outputs = self._encode(media, mm_encoder_outputs)
        masks = self._placeholder_masks(input_ids, inputs_embeds, text_only=not outputs)
        self._check_merge(masks, outputs, encoded_here=set(media), prefill=cached_length(cache) == 0)
        ids, embeds, text = self._merge(input_ids, inputs_embeds, outputs, masks, text)
        check_lengths((embeds if ids is None else ids).shape[1], attention_mask, labels)
        output = run_language_model(
            self,
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            labels=self._without_placeholder_labels(labels, masks, text),
            use_cache=self._caching(use_cache, cache),
            logits_to_keep=logits_to_keep,
            **text,
        )
        self._attach_features(output, outputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _attach_features(self, output: ModelOutput, outputs: EncoderOutputs) -> None:
        """Say what each encoder gave (in place), None without items: `output.image_outputs`, ...

        Where a kind has several encoders, or one of another kind bears its name, it is by their names.  They are
        attributes and no keys: Trainer would gather keys as predictions, and DistributedDataParallel would wait for
        gradients of all that they were computed with.
        """
        for name in self.config.encoders:
            kind = self.config.modality(name)["kind"]
            alone = kind in MEDIA_KINDS and self.config.modalities_of_kind(kind) == [name]
            alone = alone and (kind == name or kind not in self.config.encoders)
            setattr(output, f"{kind if alone else name}_outputs", outputs.get(name))

    def _caching(self, use_cache: bool | None, cache: Any) -> bool | None:
        """Whether the language model is to return a cache; never while it checkpoints, as in transformers.

        Its own modules find that out by their training mode, which frozen ones are not in.
        """
        if use_cache is False or cache is not None or not self.training or not is_checkpointing(self.language_model):
            return use_cache
        if use_cache:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
        return False

    def _route(self, kwargs: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Split keyword arguments into each encoder's inputs (by its own names) and the language model's."""
        media: dict[str, dict[str, Any]] = {}
        text = dict(kwargs)
        for name in self.config.encoders:
            names = self.config.modality(name)["input_names"]
            inputs = {names[key]: text.pop(key) for key in names if key in text}
            inputs = {key: value for key, value in inputs.items() if value is not None}
            if self._has_items(name, inputs):
                media[name] = inputs
        unknown = sorted(
            set(text) - set(text_keywords(self.language_model)) - transformers_keywords() - {"shift_labels"}
        )
        if unknown:
            known = [key for n in self.config.encoders for key in self.config.modality(n)["input_names"]]
            raise TypeError(
                f"forward() got unexpected keyword arguments {unknown}: the encoders take {known}, the language model "
                f"takes {sorted(text_keywords(self.language_model))}."
            )
        return media, text

    def _has_items(self, name: str, inputs: dict[str, Any]) -> bool:
        main = main_input(self.encoders[name].module)
        value = inputs.get(main)
        if value is None and self.encoders[name].preprocess_callback is None:
            if left := [key for key, item in inputs.items() if isinstance(item, Tensor)]:
                raise ValueError(f"{name}: got {left} without {main!r}, the input that its encoder needs.")
            return False
        if value is None:
            return any(isinstance(item, Tensor) for item in inputs.values())
        return len(value) > 0

    def _encode(self, media: dict[str, dict[str, Any]], given: dict[str, Any] | None) -> EncoderOutputs:
        outputs: EncoderOutputs = {self._named(key): value for key, value in (given or {}).items() if value is not None}
        for name, inputs in media.items():
            if name in outputs:
                raise ValueError(f"{name}: give either its inputs or its mm_encoder_outputs, not both.")
            outputs[name] = self.encoders[name](**inputs)
        return outputs

    def _placeholder_masks(self, input_ids, inputs_embeds, text_only: bool) -> dict[str, Tensor]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        ids = self.placeholder_ids(text_only)
        if input_ids is not None:
            return {name: placeholder_mask(input_ids, token_id) for name, token_id in ids.items()}
        embed: Any = self.get_input_embeddings()
        rows = getattr(embed, "num_embeddings", None) or embed.weight.shape[0]
        return {
            name: embedded_placeholder_mask(inputs_embeds, embed(torch.tensor(i, device=inputs_embeds.device)))
            for name, i in ids.items()
            if i < rows
        }

    def _check_merge(self, masks: dict, outputs: EncoderOutputs, encoded_here: set[str], prefill: bool) -> None:
        for name in outputs:
            if name not in masks:
                raise ValueError(
                    f"{name}: there are features but no placeholder token: build the processor with model=, or call "
                    f"set_modality_token_ids({{{name!r}: token_id}})."
                )
        if torch.compiler.is_compiling():
            return
        for name, mask in masks.items():
            token = self.config.modality(name)["token"] or f"id {self.config.modality(name)['token_id']}"
            if name in encoded_here:
                check_counts(name, token, mask, [len(item) for item in outputs[name].pooler_output])
            elif name not in outputs and prefill and bool(mask.any()):
                raise ValueError(
                    f"{name}: the text has {int(mask.sum())} placeholder tokens ({token}) but there is no input for the "
                    f"encoder (0 features): pass {list(self.config.modality(name)['input_names'])}."
                )

    def placeholder_ids(self, text_only: bool = False) -> dict[str, int]:
        """Token id of each modality's placeholder.

        A checkpoint may hold ids that no processor ever named; in text alone such an id is an ordinary word.
        """
        entries = {name: self.config.modality(name) for name in self.config.encoders}
        ids = {name: entry["token_id"] for name, entry in entries.items() if entry["token_id"] is not None}
        if text_only and not self._strict_placeholders:
            return {name: token_id for name, token_id in ids.items() if entries[name]["token"] is not None}
        return ids

    def _merge(self, input_ids, inputs_embeds, outputs: EncoderOutputs, masks: dict[str, Tensor], text: dict[str, Any]):
        """``(input_ids, None, text)`` for text alone, else ``(None, embeddings with the features in them, text)``.

        `text`, the language model's other inputs, gets those that it computes from the ids that are gone now.
        """
        if not outputs:
            return input_ids, inputs_embeds, text
        every = torch.stack(list(masks.values())).any(0)
        given = {key for key, value in text.items() if value is not None}
        text = text | id_inputs(self.language_model, input_ids, every, given)
        if inputs_embeds is None:
            inputs_embeds = embed_ids(self.language_model, without_placeholders(input_ids, every))
        for name, output in outputs.items():
            features = output.pooler_output
            features = torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, -2)
            mask = masks[name].to(inputs_embeds.device)
            inputs_embeds = scatter_features(inputs_embeds, mask, features)
        return None, inputs_embeds, text

    def _without_placeholder_labels(self, labels, masks: dict[str, Tensor], text: dict[str, Any]) -> Tensor | None:
        if not masks or (labels is None and text.get("shift_labels") is None):
            return labels
        placeholders = torch.stack(list(masks.values())).any(0)
        if not torch.compiler.is_compiling():
            ids = [self.config.modality(name)["token_id"] for name in masks]
            counted = text.get("num_items_in_batch") is not None
            check_labels(placeholders, ids, labels, text.get("shift_labels"), counted)
        if text.get("shift_labels") is not None:
            text["shift_labels"] = mask_labels(shifted_left(placeholders), text["shift_labels"])
        return mask_labels(placeholders, labels)

    def forward_headless(self, input_ids: Tensor | None = None, **kwargs: Any):
        """As `forward`, without the language-model head: the backbone's output with `last_hidden_state`."""
        kwargs.pop("labels", None)
        kwargs.pop("return_dict", None)
        cache = take_cache(kwargs)
        own = {key: kwargs.pop(key, None) for key in OWN_INPUTS if key not in ("input_ids", "labels", "logits_to_keep")}
        kwargs.pop("logits_to_keep", None)
        media, text = self._route(kwargs)
        outputs = self._encode(media, own.pop("mm_encoder_outputs"))
        embeds = own.pop("inputs_embeds")
        masks = self._placeholder_masks(input_ids, embeds, text_only=not outputs)
        self._check_merge(masks, outputs, set(media), prefill=cached_length(cache) == 0)
        ids, embeds, text = self._merge(input_ids, embeds, outputs, masks, text)
        own["use_cache"] = self._caching(own["use_cache"], cache)
        output = run_backbone(self, {"input_ids": ids, "inputs_embeds": embeds, **own, **text, "cache": cache})
        self._attach_features(output, outputs)
        return output

    @PerInstanceSignature
    def get_image_features(self, *, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any):
        """Features of images.

        Args:
            modality: which encoder, where several take images.
            return_dict: a model output (default), or a tuple.
            **kwargs: the encoder's inputs by their keywords, e.g. ``pixel_values``.

        Returns:
            the encoder's output, with one ``(n_i, hidden)`` projected tensor per image as `pooler_output`.

        Raises:
            ValueError: several encoders take images and none is named.
        """
        return self._features("image", modality, return_dict, kwargs)

    @PerInstanceSignature
    def get_audio_features(self, *, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any):
        """Features of sounds; see `get_image_features`."""
        return self._features("audio", modality, return_dict, kwargs)

    def get_video_features(self, *, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any):
        """Features of videos; see `get_image_features`."""
        return self._features("video", modality, return_dict, kwargs)

    get_video_features = PerInstanceSignature(get_video_features, on_class=False)  # type: ignore[assignment]

    def _features(self, kind: str, modality: str | None, return_dict: bool | None, kwargs: dict[str, Any]):
        names = self.config.modalities_of_kind(kind) if modality is None else [self._named(modality)]
        if len(names) > 1:
            raise ValueError(f"Several encoders take {kind}s, name one of them: modality= one of {names}.")
        keywords = self.config.modality(names[0])["input_names"]
        inputs = {keywords[key]: value for key, value in kwargs.items() if key in keywords and value is not None}
        options = ("output_attentions", "output_hidden_states")
        inputs |= {key: value for key, value in kwargs.items() if key in options}
        known = {*keywords, *options, *transformers_keywords()}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(
                f"get_{kind}_features() got unexpected keyword arguments {unknown}, expected {sorted(keywords)}."
            )
        output = self.encoders[names[0]](**inputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
