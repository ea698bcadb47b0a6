"""The composed model: encode → merge → language model → output; what else it can do comes from the rooms, as mixins."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .checkpoints.described import check_replaced
from .checkpoints.plain_storage import first_dtype
from .checkpoints.storage import MultimodalStorageMixin
from .composition import compose_config, describe_model
from .configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from .encoders.continuing import items_to_encode
from .encoders.feature_layout import find_stand_in
from .encoders.feature_memo import FeatureMemoMixin
from .encoders.module import ModalEncoderModule
from .encoders.rebuilding import build_parts, connect
from .encoders.stand_ins import idle_encoders, run_stand_in
from .encoders.towers import OWN_INPUTS, main_input, transformers_keywords
from .language_model.calling import (
    LOSS_INPUTS,
    EmbeddingsMixin,
    around_language_model,
    is_prefill,
    run_backbone,
    run_language_model,
    text_keywords,
)
from .language_model.generation import MultimodalGenerationMixin
from .language_model.merging import MergingMixin, check_lengths, check_tensors
from .parts.adapters import WholeAdaptersMixin
from .parts.build_bounds import bounded_tensors, check_built
from .parts.freezing import FreezingMixin, restore_frozen
from .parts.gathering import GatheringMixin, untied_weights
from .parts.registries import check_steps, encoder_options, step_inputs
from .parts.signatures import PerInstanceSignature
from .parts.stored_modules import KeptTensors, mark_initialized
from .parts.versions import CACHE, GENERATION_HOOKS, MODEL_HOOKS, PAGED_INPUTS, check_hooks, is_paged, take_cache
from .parts.weightless import WithoutInitializers, is_building

EncoderOutputs = dict[str, Any]


class MultimodalModel(
    MultimodalGenerationMixin, FreezingMixin, WholeAdaptersMixin, GatheringMixin, EmbeddingsMixin, MergingMixin,
    FeatureMemoMixin, MultimodalStorageMixin, GenerationMixin,
):  # fmt: skip
    """A multimodal language model composed of named encoders, projectors and a causal language model.

    Args:
        config: a `MultimodalConfig` to build with fresh weights; a dict given here means `encoders`.
        language_model: a causal language model of transformers, PEFT-wrapped or not.
        init_projector_type, init_activation: of the projectors that encoders lack.
        encoders: `ModalEncoderModule`s by name; `vision` becomes `model.vision_encoder`.
        positions, mask: rules that replace the language model's own, ``{"rule": name, **options}``, see `MultimodalConfig`.
        share_inputs: groups of encoders that see the same items, whose features may be joined, see `MultimodalConfig`.

    Raises:
        TypeError: parts of wrong types.
        ValueError: an empty configuration, bad names, widths that do not fit, shared weights, a language model that
            cannot take embeddings.
    """

    config: MultimodalConfig
    language_model: Any
    config_class = MultimodalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("text", "image", "audio", "video")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _items_to_encode = items_to_encode

    def __init__(
        self,
        config: MultimodalConfig | Mapping[str, ModalEncoderModule] | None = None,
        language_model: Any = None,
        init_projector_type: str = "linear",
        init_activation: str = "gelu",
        *,
        encoders: Mapping[str, ModalEncoderModule] | None = None,
        positions: dict[str, Any] | None = None,
        mask: dict[str, Any] | None = None,
        share_inputs: Any = None,
    ):
        if isinstance(config, Mapping):
            if encoders is not None:
                raise TypeError("encoders were given twice: as the first argument and by keyword.")
            config, encoders = None, config
        if (config is None) == (language_model is None and encoders is None):
            raise TypeError("MultimodalModel takes either a config, or encoders= and language_model=.")
        supplied = config is None
        if config is None:
            encoders = {} if encoders is None else encoders
            rules = {"positions": positions, "mask": mask, "share_inputs": share_inputs}
            config = compose_config(encoders, language_model, init_projector_type, init_activation, rules)
            for part in (language_model, *encoders.values()):
                mark_initialized(part)  # else `post_init` would draw its weights anew
        else:
            if not isinstance(config, MultimodalConfig):
                raise TypeError(f"config must be a MultimodalConfig, got {type(config).__name__}.")
            sizes = [getattr(config, key, None) for key in config.sub_configs]
            # The configuration may come from a file: its sizes are bounded before tensors of those sizes are made.
            with bounded_tensors(*sizes, config.adapters), WithoutInitializers():
                encoders, language_model = build_parts(config)
        # A method that transformers has renamed would never be called, without a word.
        check_hooks(GenerationMixin, GENERATION_HOOKS)
        check_hooks(PreTrainedModel, MODEL_HOOKS)
        super().__init__(config)
        for name, encoder in encoders.items():
            self.add_module(f"{name}_encoder", encoder)  # in this order, by which optimizers number parameters
        self.language_model = language_model
        if kept := (config.native or {}).get("tensors"):
            self.native_rest = KeptTensors(kept)
        self.loss_type = "ForCausalLM"  # transformers would guess it from the name of the class
        self._inherit_from_language_model(supplied)
        self._stand_ins: dict[str, dict[str, Tensor]] = {}  # by modality, as far as they were needed
        check_steps(self)
        # A live head without its tie stays as it is; what has no weights yet says nothing of ties.
        self._untied = untied_weights(self) if supplied and not is_building() else frozenset()
        self.post_init()  # when all parts are there: it gathers their tied weights
        if not supplied:
            check_built(self)
            restore_frozen(self, config.frozen)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in torch; ValueError for another part in the place of one (wrapped around the same, it is the same)."""
        old = self.__dict__.get("_modules", {}).get(name, value)  # itself, where there is none yet
        part = value is not old and (name == "language_model" or name.removesuffix("_encoder") in self.config.encoders)
        if part:
            check_replaced(self.config, {name: value})
        super().__setattr__(name, value)
        if part:
            connect(self.encoders)

    def signature_changes(self, method: str) -> tuple[list[str], list[str]] | None:
        """Parameters that this instance's `forward` or `get_{kind}_features` lacks and has in addition."""
        own = method == "forward"
        names = self.config.encoders if own else self._answering(method.removeprefix("get_").removesuffix("_features"))
        added = [key for n in names for key in self.config.modality(n)["input_names"]]
        if not own:
            return ([], added) if names else None
        text = text_keywords(self.language_model)
        removed = [key for key in ("position_ids",) if key not in text]
        if CACHE not in ("cache", None):  # of an older version, which reads this signature
            removed, added = [*removed, "cache"], [*added, CACHE]
        return removed, added + step_inputs(self.config) + [key for key in text if key not in OWN_INPUTS]

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
            input_ids, inputs_embeds: ``(batch, length)`` with one placeholder id per feature; or ``(batch, length, hidden)``,
                placeholders embedded by their id.
            attention_mask, position_ids: ``(batch, length)``, or what the language model takes; used as they are.
            cache: the language model's cache; also by the names that older versions have for it.
            labels: ``(batch, length)``, -100 where no loss is wanted; placeholders are never labelled.
            use_cache: whether the language model returns a cache.
            logits_to_keep: how many last positions get logits, 0 for all.
            mm_encoder_outputs: outputs of encoders that ran before, by modality.
            **kwargs: the encoders' inputs by their keywords, and what the language model's `forward` takes; `skip_logits`,
                whether there shall be a loss and no logits (None: in training with labels and `config.loss_at_labels`).

        Returns:
            The language model's own output: `loss`, `logits` ``(batch, length, vocabulary)``, `cache` (before transformers 5.24
            `past_key_values`), ..., with the encoders' outputs as the attributes `image_outputs`, `audio_outputs`, ...

        Raises:
            TypeError: an unknown keyword.
            ValueError: placeholders and features that do not match in number; labelled placeholders that were counted.
        """
        return_dict, kwargs = kwargs.pop("return_dict", None), kwargs | {"cache": cache}
        cache = take_cache(kwargs)  # a caller may use any of the cache's names; from here on there is one
        given = (input_ids, inputs_embeds, mm_encoder_outputs, cache, kwargs, labels is None)
        inputs, masks, outputs = self._encode_and_merge(*given)
        tokens: Any = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        check_lengths(tokens.shape[1], attention_mask, labels)
        own = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        own |= {"use_cache": self._caching(use_cache, cache), "logits_to_keep": logits_to_keep}
        labels, own = self._without_placeholder_labels(labels, masks, inputs), own | inputs

        def run(arguments: dict[str, Any]) -> ModelOutput:
            return run_language_model(self, labels=labels, **arguments)

        output = around_language_model(self, run, own, masks, outputs)
        self._attach_features(output, outputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def forward_headless(self, input_ids: Tensor | None = None, **kwargs: Any):
        """As `forward`, without the language-model head: the backbone's output with `last_hidden_state`."""
        for key in ("labels", "logits_to_keep", "return_dict"):  # without a head there are neither logits nor a loss
            kwargs.pop(key, None)
        cache = take_cache(kwargs)
        embeds, given, use_cache = (kwargs.pop(k, None) for k in ("inputs_embeds", "mm_encoder_outputs", "use_cache"))
        own = {key: kwargs.pop(key, None) for key in ("attention_mask", "position_ids")}
        inputs, masks, outputs = self._encode_and_merge(input_ids, embeds, given, cache, kwargs)
        inputs = {**own, "cache": cache, "use_cache": self._caching(use_cache, cache), **inputs}
        output = around_language_model(self, partial(run_backbone, self), inputs, masks, outputs)
        self._attach_features(output, outputs)
        return output

    def _encode_and_merge(
        self, input_ids: Any, inputs_embeds: Any, given: Any, cache: Any, kwargs: dict[str, Any], alone: bool = True
    ) -> tuple[dict[str, Any], dict[str, Tensor], EncoderOutputs]:
        """The corridor up to the language model: its inputs, ``(batch, length)`` masks of placeholders, features by modality.

        Inputs are ids of text alone, or embeddings ``(batch, length, hidden)`` with features in them, the other one is None.
        `alone`: nobody asks where placeholders are, unless features are.
        """
        check_tensors(input_ids=input_ids)
        paged = is_paged(cache)
        media, text = self._route(kwargs, PAGED_INPUTS if paged else frozenset())
        # Continuous batching is asked for placeholders at its door: no step of it may wait for the device.
        tokens: Any = inputs_embeds if input_ids is None else input_ids
        prefill = not paged and is_prefill(cache, 0 if tokens is None else tokens.shape[1])
        decodes = paged or (not prefill and tokens is not None and tokens.shape[1] == 1)
        if decodes and alone and not (media or text or given or self.config.steps):  # a token like any other
            return {"input_ids": input_ids, "inputs_embeds": inputs_embeds}, {}, {}
        encoded = given is not None and not torch.is_grad_enabled()  # by `generate`, in every process
        # pooler_output: per item (n_i, hidden); features of encoders that ran without an item, (n, hidden) each
        outputs, unused = self._encode(media, given, None if decodes or encoded else [inputs_embeds])
        masks = self._placeholder_masks(input_ids, inputs_embeds, text_only=not outputs)  # (batch, length) by modality
        self._check_merge(masks, outputs, encoded_here=set(media), prefill=prefill)
        # Text alone stays ids (batch, length); with features it becomes embeddings (batch, length, hidden).
        ids, embeds, text = self._merge(input_ids, inputs_embeds, outputs, masks, text, unused)
        return {"input_ids": ids, "inputs_embeds": embeds, **text}, masks, outputs

    def _route(
        self, kwargs: dict[str, Any], others: frozenset[str] = frozenset()
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Split keywords into each encoder's inputs, by its names, and the language model's; TypeError for those of neither."""
        media: dict[str, dict[str, Any]] = {}
        text = dict(kwargs)
        for name in self.config.encoders if kwargs else ():
            names = self.config.modality(name)["input_names"]
            inputs = {names[key]: text.pop(key) for key in names if key in text}
            inputs = {key: value for key, value in inputs.items() if value is not None}
            main = main_input(self.encoders[name].module)
            given = [key for key in names if isinstance(inputs.get(names[key]), Tensor)]
            has_main = inputs.get(main) is not None
            if given and not has_main and self.encoders[name].preprocess_callback is None:  # which makes it of others
                raise ValueError(f"{name}: got {given} without {main!r}, the input that its encoder needs.")
            has_items = len(inputs[main]) > 0 if has_main else bool(given)
            if has_items:  # inputs without one run no encoder
                media[name] = inputs
        taken = sorted({*text_keywords(self.language_model), *step_inputs(self.config)}) if text else []
        if unknown := sorted(set(text) - {*taken, *transformers_keywords(), *LOSS_INPUTS, *others}) if text else []:
            keywords = [key for n in self.config.encoders for key in self.config.modality(n)["input_names"]]
            raise TypeError(
                f"forward() got unexpected keyword arguments {unknown}: the encoders take {keywords}, the language model "
                f"takes {taken}."
            )
        return media, text

    def _encode(
        self, media: dict[str, dict[str, Any]], given: dict[str, Any] | None, others: list[Any] | None
    ) -> tuple[EncoderOutputs, list[Tensor]]:
        """Outputs by modality, and features of encoders that run without an item; `others` have gradients, None: none."""
        outputs: EncoderOutputs = {self._named(key): value for key, value in (given or {}).items() if value is not None}
        if twice := sorted(set(outputs) & set(media)):
            raise ValueError(f"{twice[0]}: give either its inputs or its mm_encoder_outputs, not both.")
        ready = [item for output in outputs.values() for item in output.pooler_output]
        idle = [] if others is None else idle_encoders(self, {*outputs, *media}, [*others, *ready])
        unused: list[Tensor] = []
        for name, encoder in self.encoders.items():  # in this order in every process
            if name in media:
                outputs[name] = self._run_encoder(encoder, media[name])
            elif name in idle:
                if name not in self._stand_ins:
                    self._stand_ins[name] = find_stand_in(self, name)
                unused += run_stand_in(encoder, self._stand_ins[name])
        return outputs, unused

    @PerInstanceSignature
    def get_image_features(
        self, *inputs: Any, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any
    ):
        """Features of images: the encoder's output, with one ``(n_i, hidden)`` projected tensor per image as `pooler_output`.

        Args:
            *inputs: the encoder's inputs in the order of its own, the images (``pixel_values``) first.
            modality: which encoder, where several take images (else ValueError).
            return_dict: a model output (default), or a tuple.
            **kwargs: the encoder's inputs by their keywords.
        """
        return self._features("image", modality, return_dict, inputs, kwargs)

    @PerInstanceSignature
    def get_audio_features(
        self, *inputs: Any, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any
    ):
        """Features of sounds; see `get_image_features`."""
        return self._features("audio", modality, return_dict, inputs, kwargs)

    @partial(PerInstanceSignature, on_class=False)
    def get_video_features(
        self, *inputs: Any, modality: str | None = None, return_dict: bool | None = None, **kwargs: Any
    ):
        """Features of videos; see `get_image_features`."""
        return self._features("video", modality, return_dict, inputs, kwargs)

    def _features(
        self, kind: str, modality: str | None, return_dict: bool | None, given: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        names = self._answering(kind) if modality is None else [self._named(modality)]
        if len(names) > 1:
            raise ValueError(f"Several encoders take {kind}s, name one of them: modality= one of {names}.")
        keywords = self.config.modality(names[0])["input_names"]
        main = main_input(self.encoders[names[0]].module)
        order = sorted(keywords, key=lambda key: keywords[key] != main)  # the main input, then as in its `forward`
        by_position = dict(zip(order, given, strict=False))
        if len(given) > len(order) or set(by_position) & set(kwargs):
            raise TypeError(
                f"get_{kind}_features() got {len(given)} inputs by position and {sorted(kwargs)} by name, expected each of "
                f"{order} once, in this order."
            )
        kwargs = by_position | kwargs
        inputs = {keywords[key]: value for key, value in kwargs.items() if key in keywords and value is not None}
        options = ("output_attentions", "output_hidden_states")
        inputs |= {key: value for key, value in kwargs.items() if key in options}
        if unknown := sorted(set(kwargs) - {*keywords, *options, *transformers_keywords()}):
            raise TypeError(
                f"get_{kind}_features() got unexpected keyword arguments {unknown}, expected {sorted(keywords)}."
            )
        output = self.encoders[names[0]](**inputs, **encoder_options(self.config))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _answering(self, kind: str) -> list[str]:
        """The modalities of a kind, else one of that name: features that were computed elsewhere are of no kind of media."""
        return self.config.modalities_of_kind(kind) or [name for name in self.config.encoders if name == kind]

    @property
    def encoders(self) -> dict[str, ModalEncoderModule]:
        """The encoders by name, in order."""
        return {name: getattr(self, f"{name}_encoder") for name in self.config.encoders}

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the language model: the parts may differ."""
        return first_dtype(self.language_model)

    @property
    def device(self) -> torch.device:
        """Device of the first part that is in memory: the first of all may be on disk, where `generate` sends nothing."""
        first = super().device
        there = (p.device for p in self.parameters() if p.device.type != "meta")
        return next(there, first) if first.type == "meta" else first

    def get_encoder(self, modality: str | None = None):
        """The encoder module of a modality, by name or kind; where there is none, the model itself, as in transformers.

        An image encoder answers for videos too, frame by frame.  ValueError for a word that is no modality.
        """
        encoders, kinds = self.encoders, self.config.modalities_of_kind
        if modality is None:
            return self
        if modality == "video" and modality not in encoders and not kinds(modality):
            modality = "image"
        none = modality in MEDIA_KINDS and modality not in encoders and not kinds(modality)
        return self if none else (encoders.get(modality) or encoders[self._named(modality)]).module

    def _named(self, modality: str) -> str:
        """The name of a modality given by name, or by a kind that only one has (ValueError)."""
        config = self.config
        found = config.modalities_for(modality) if modality in config.encoders else config.modalities_of_kind(modality)
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{modality!r} is {'no modality' if not found else 'the kind of several modalities'} of this model, expected "
            f"one of {found or config.encoders}."
        )

    def describe(self) -> str:
        """Print, and return, the parts: classes, parameters, how many train, features per item, tokens."""
        print(text := describe_model(self))
        return text
