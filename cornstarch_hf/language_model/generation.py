"""Generation on a composed model: every encoder runs once, before the prefill, and beams repeat whole samples."""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    CandidateGenerator,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PromptLookupCandidateGenerator,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation import utils as generation_utils
from transformers.masking_utils import create_masks_for_generate

from ..parts.adapters import unwrapped
from ..parts.registries import ALONE, encoder_options
from ..parts.versions import CACHE, check_caches_known, peft_is_behind, take_cache
from .calling import cache_keyword, cached_length, is_running_state, steps_before_generation, steps_before_prefill
from .extra_inputs import crosses_longrope_limit, first_position
from .merging import (
    TextRequests,
    cached_columns,
    check_tensors,
    check_text_requests,
    chosen_items,
    items_behind_cache,
    items_of_samples,
)

TOKENIZERS = ("tokenizer", "assistant_tokenizer")  # of stop strings, token healing, drafts; `serve` gives the processor
SLICES_FEATURES = hasattr(generation_utils, "_slice_mm_encoder_output")  # among the chunks of a prefill; from 5.23 on
# Options of `generate` that continuous batching passes over, or whose processors transformers does not say it can run in it.
GENERATE_ALONE = (
    "num_beams", "stop_strings", "max_time", "token_healing", "prompt_lookup_num_tokens", "assistant_early_exit",
    "constraints", "force_words_ids", "output_scores", "output_logits", "output_attentions", "output_hidden_states",
    "min_length", "min_new_tokens", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "begin_suppress_tokens", "guidance_scale", "watermarking_config", "min_p", "top_h",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "remove_invalid_values",
)  # fmt: skip
_CHANGES_NOTHING = dict.fromkeys(
    ("num_beams", "repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1
)


class SuppressPlaceholders(SuppressTokensLogitsProcessor):
    """What `suppress_tokens` does, for placeholders; of another type, since transformers takes one of each for both."""

    supports_continuous_batching = True


# Those that look up the score of every id of the text.
BY_IDS = (
    EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor, NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)  # fmt: skip


@dataclass
class Widened(LogitsProcessor):
    """A processor that finds a score for each id up to `width`, -inf behind the table: nothing changes for the others."""

    processor: LogitsProcessor
    width: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        wide = nn.functional.pad(scores, (0, max(self.width - size, 0)), value=-torch.inf)  # (batch, width)
        return self.processor(input_ids, wide)[:, :size].contiguous()  # (batch, vocabulary)


@dataclass
class Lookup(CandidateGenerator):
    """Prompt lookup in which ids behind the table count as 0, so that their scores are not asked for."""

    generator: PromptLookupCandidateGenerator

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        known: Any = input_ids.masked_fill(input_ids >= self.generator.vocab_size, 0)
        return continuing(input_ids, self.generator.get_candidates(known, **kwargs)[0]), None

    def update_candidate_strategy(self, *args: Any) -> None:
        self.generator.update_candidate_strategy(*args)


def continuing(prompt: Tensor, sequences: Tensor) -> Tensor:
    """Sequences ``(1, length + new)`` with the prompt's own ids ``(1, length)`` in front."""
    return torch.cat([prompt, sequences[:, prompt.shape[1] :].to(prompt.device)], 1)


class Draft:
    """An assistant of a composed model, which sees its own placeholder ids and features; in all else it is itself.

    Args:
        main: the composed model that it drafts for.
        model: any causal language model; a composed one encodes the items of the modalities that it has (by name or kind).
        keywords: of `generate`, the encoders' inputs among them; None if it drafts from text alone.
    """

    def __init__(self, main: Any, model: Any, keywords: Mapping[str, Any] | None):
        self._main, self._model, self._keywords = main, model, keywords or {}
        self._inner: Any = unwrapped(model)
        composed = hasattr(self._inner, "placeholder_ids")  # by what it has: a checkpoint may bring its own code
        self._own_ids: dict[str, int] = self._inner.placeholder_ids() if composed else {}
        names = main.config.encoders if composed and keywords is not None else ()
        counterparts = {name: self._counterpart(name) for name in names}
        self._names = {name: own for name, own in counterparts.items() if own in self._own_ids}
        self._outputs: dict[str, Any] | None = None

    @property
    def __class__(self) -> type:  # by whose name transformers tells kinds of drafts apart
        return type(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def generate(self, input_ids: Tensor, logits_processor: Any = (), mm_encoder_outputs: Any = None, **kwargs: Any):
        """As the model's own, for a prompt of the main model's ids and with the main model's features."""
        table: Any = self._inner.get_input_embeddings()
        rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
        words = torch.tensor(list(self._own_ids.values()), device=input_ids.device)
        ids = input_ids.masked_fill((input_ids >= rows) | torch.isin(input_ids, words), 0)  # (1, length)
        features = {name: x for name, x in (mm_encoder_outputs or {}).items() if name in self._names}
        for name in features:
            token_id = self._main.config.modality(name)["token_id"]
            ids = ids.masked_fill(input_ids == token_id, self._own_ids[self._names[name]])
        if features and self._outputs is None:  # at the first of many drafts
            self._outputs = {self._names[name]: self._encoded(name, x) for name, x in features.items()}
        # Processors that look ids up it makes of its own prompt, by the same configuration.
        given = [p for p in logits_processor if not isinstance(p, (Widened, *BY_IDS))]
        kwargs |= {"mm_encoder_outputs": self._outputs} if features else {}
        output = self._model.generate(input_ids=ids, logits_processor=given, **kwargs)
        output["sequences"] = continuing(input_ids, output.sequences)
        return output

    def _counterpart(self, name: str) -> str:
        """The draft's modality of the name, else the only one of its kind; "" where there is none."""
        config = self._inner.config
        same = config.modalities_of_kind(self._main.config.modality(name)["kind"])
        return name if name in config.encoders else same[0] if len(same) == 1 else ""

    def _encoded(self, name: str, output: Any) -> Any:
        """What the draft's encoder makes of the items that gave the main model's `output`."""
        encoder = self._inner.encoders[self._names[name]]
        if encoder is self._main.encoders[name]:
            return output
        names = self._main.config.modality(name)["input_names"]
        inputs = {names[key]: x for key, x in self._keywords.items() if key in names and x is not None}
        known = set(self._inner.config.modality(self._names[name])["input_names"].values())
        who = f"assistant_model: {name}: the draft has an encoder of its own"
        if not inputs or not set(inputs) <= known:
            raise ValueError(
                f"{who}, which takes {sorted(known)}, got {sorted(inputs) or 'mm_encoder_outputs of this model'}: pass "
                "inputs that both encoders take, or a draft without this modality."
            )
        device = self._inner.device
        inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in inputs.items()}
        found = encoder(**inputs, **encoder_options(self._inner.config, ALONE))
        lengths, expected = ([len(item) for item in x.pooler_output] for x in (found, output))
        if lengths[-len(expected) :] != expected:
            raise ValueError(
                f"{who}, which gives {lengths} features where this model's gives {expected}: take a draft whose encoder "
                "gives as many, or one without this modality."
            )
        return found


class MultimodalGenerationMixin:
    """Overrides of `transformers.GenerationMixin` for encoders of any kind (its own know images and videos)."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        check_caches_known()
        cache = take_cache(kwargs)
        kwargs |= {key: getattr(kwargs[key], "tokenizer", kwargs[key]) for key in TOKENIZERS if key in kwargs}
        return super().generate(*args, **kwargs, **({} if cache is None else {CACHE: cache}))

    def heal_tokens(self, input_ids: Tensor, tokenizer: Any = None) -> Tensor:
        """As in transformers, for text (ValueError for media): it makes ids anew from the text, without placeholders."""
        for name, token_id in self.placeholder_ids(text_only=True).items():
            if count := int((input_ids == token_id).sum()):
                raise ValueError(
                    f"{name}: token_healing takes text alone, but the prompt has {count} placeholder tokens: leave it out."
                )
        return super().heal_tokens(input_ids, tokenizer)

    def init_continuous_batching(self, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; options that it would pass over, and requests with placeholders, raise (ValueError)."""
        for key in GENERATE_ALONE:
            value = getattr(generation_config or self.generation_config, key, None)
            if value not in (None, 0) and value != _CHANGES_NOTHING.get(key):
                raise ValueError(f"generate_batch() cannot do {key}={value!r}: leave it out, or call generate().")
        return TextRequests(self, super().init_continuous_batching(generation_config, *args, **kwargs))

    @functools.wraps(GenerationMixin.generate_batch)
    def generate_batch(self, inputs: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(super().generate_batch).parameters
        own = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
        # As `generate`: what is not configured is the model's, and keywords are options (transformers drops them).
        new = {key: value for key, value in kwargs.items() if getattr(generation_config, key, None) is not value}
        generation_config, rest = self._prepare_generation_config(generation_config, **new)
        check_text_requests(self, inputs, rest)
        return super().generate_batch(inputs, generation_config, *args, **own)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; where the keys in the cache are of no use any more, the whole row is run again."""
        # Sampling and beams hand these on to `forward`, which no model reads them in.
        kwargs = {key: value for key, value in kwargs.items() if key not in TOKENIZERS} | {"cache": cache}
        if "assistant_model" in kwargs:  # which greedy search and sampling keep to themselves
            raise ValueError("assistant_model cannot draft tokens for beams: leave it out, or num_beams.")
        cache = take_cache(kwargs, ("cache", CACHE or "cache"))  # by this version's name, or by ours
        past = cached_length(cache)
        if anew := crosses_longrope_limit(self.language_model, past, input_ids.shape[1]) and past > 0:
            # transformers then gives all of input_ids (batch, length) to the model, not the last one alone.
            cache = next_sequence_length = None
        kwargs |= {CACHE: cache, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        # To look at the length of a static cache, which lies on the device, at each token would wait for it.
        empty = not (next_sequence_length == 1 and isinstance(past, Tensor)) and past == 0
        if is_first_iteration or empty:
            steps_before_prefill(self, kwargs, past, input_ids.shape[1], next_sequence_length)
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        # transformers leaves features out of all iterations but the first, an assistant's prefill and a row that runs again.
        if (features := kwargs.get("mm_encoder_outputs")) is not None and (anew or (cache is not None and empty)):
            inputs.setdefault("mm_encoder_outputs", features)
        if self.config.mask and past and not is_first_iteration:  # drafted tokens and answers are of no type
            inputs = {key: value for key, value in inputs.items() if not key.endswith("token_type_ids")}
        states = inputs.get("cache_params") is not None or (cache is not None and is_running_state(cache))
        if states and not is_first_iteration:
            inputs.pop("attention_mask", None)  # a running state has passed the padding already
        if "prepare_inputs_for_generation" in vars(self) and peft_is_behind() and CACHE in inputs:
            # PEFT has put its own method on this model, calls this one from there, and looks for a cache by its former name.
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers; the encoders' inputs are known even where `forward` was replaced."""
        # Trainers that put their own `forward` on the instance copy the class's signature, which names no encoder.
        check_tensors(input_ids=model_kwargs.get("input_ids"), attention_mask=model_kwargs.get("attention_mask"))
        _, known = self.signature_changes("forward")
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in known})

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether the language model works with transformers' cache, or makes one of its own (MiniMax)."""
        return unwrapped(self.language_model)._supports_default_dynamic_cache()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any, **kwargs: Any) -> None:
        """As in transformers, by the name that the language model has for a cache; none where it has no cache."""
        keyword = cache_keyword(self.language_model)
        if keyword is None:
            generation_config.use_cache = False  # transformers would make one, which `forward` does not take
            if model_kwargs.get("inputs_embeds") is not None:
                name = type(unwrapped(self.language_model)).__name__
                raise ValueError(
                    f"{name} has no cache, so each step needs the whole prompt, which inputs_embeds give to the first one "
                    "alone: generate from input_ids."
                )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if keyword == "cache_params" != CACHE != "cache" and CACHE in model_kwargs:
            # Before 5.24 transformers hands a running state on by the name that it has in the language model's output.
            model_kwargs[keyword] = model_kwargs.pop(CACHE)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """As in transformers, from the language model's first position on."""
        first = first_position(self.language_model)
        found = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs) + first  # (batch, length)
        # With an axis in front they are not the caller's: a rule replaces them when the encoders have run.
        return found[None] if self.config.positions else found

    def create_masks_for_generate(self, config, **kwargs: Any) -> Any:
        """As in transformers, or as the language model's class does it; for caches of a fixed size."""
        inner = unwrapped(self.language_model)
        if self.config.mask and kwargs["inputs_embeds"].shape[1] > 1:  # by its rule, when the placeholders are known
            return kwargs["attention_mask"]
        create = getattr(inner, "create_masks_for_generate", create_masks_for_generate)
        return create(config=inner.config, **kwargs)  # its own configuration: the whole's has no layer types

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config
    ) -> dict[str, Any]:
        """Run the encoders and hand their outputs on, so that no step and no beam runs them again."""
        keywords = [key for name in self.config.encoders for key in self.config.modality(name)["input_names"]]
        media, _ = self._route({key: model_kwargs.pop(key) for key in keywords if key in model_kwargs})
        is_ids = model_input_name != "inputs_embeds"
        ids, embeds = (inputs_tensor, None) if is_ids else (None, inputs_tensor)
        length, mask = inputs_tensor.shape[1], model_kwargs.get("attention_mask")
        whole = getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[-1]
        # Embeddings are always whole rows, ids may be the new tokens alone.
        cached = cached_columns(length, whole if is_ids else length, cached_length(model_kwargs.get(CACHE)))
        text_only = not media and not model_kwargs.get("mm_encoder_outputs")
        if cached and media:
            media = self._items_to_encode(media, self._placeholder_masks(ids, embeds, text_only=False), cached)
        # By name, items of (n_i, hidden) each; `unused` are of encoders that run because those of other processes do.
        outputs, unused = self._encode(media, model_kwargs.get("mm_encoder_outputs"), [])
        masks = self._placeholder_masks(ids, embeds, text_only)  # by name, (batch, length)
        if cached:  # features belong to the tokens behind the cache; those of whole rows are cut to these
            for name in media:
                lengths = [len(item) for item in outputs[name].pooler_output]
                behind = items_behind_cache(name, lengths, masks.get(name), cached)
                outputs[name] = chosen_items(outputs[name], behind)
            outputs = {name: output for name, output in outputs.items() if len(output.pooler_output)}
            masks = {name: mask[:, cached:] for name, mask in masks.items()}  # (batch, length - cached)
        self._check_merge(masks, outputs, encoded_here=set(media) & set(outputs), prefill=True)
        if outputs and generation_config.prefill_chunk_size is not None and not SLICES_FEATURES:
            raise ValueError(
                "This version of transformers cannot split features among the chunks of a prefill: leave out "
                "prefill_chunk_size, or upgrade transformers to 5.23."
            )
        marked = [name for name in outputs if self.config.modality(name)["marks"]]
        if marked and generation_config.prefill_chunk_size is not None:
            told = f"{marked[0]}: its learnt tokens (marks) need the whole prompt"
            raise ValueError(f"{told}: leave out prefill_chunk_size.")
        model_kwargs.pop("mm_encoder_outputs", None)
        model_kwargs = steps_before_generation(
            self, model_kwargs, masks, outputs, (len(inputs_tensor), length - cached)
        )
        return model_kwargs | ({"mm_encoder_outputs": outputs} if outputs or unused else {})

    def _expand_multimodal_outputs(
        self, input_ids: Any, mm_encoder_output: dict[str, Any], expand_size: int = 1, inputs_embeds: Any = None
    ) -> dict[str, Any]:
        """Repeat the items of each sample together: beams of one sample stand side by side.

        transformers repeats each image by itself, which mixes up samples that have several: of rows with the items
        ``[a, b], [c]`` two beams need ``a b a b c c``, not ``a a b b c c``.
        """
        ids, embeds = (None, inputs_embeds) if input_ids is None or input_ids.numel() == 0 else (input_ids, None)
        masks = self._placeholder_masks(ids, embeds, text_only=False)  # (batch, length), before rows are repeated
        expanded = {}
        for name, output in mm_encoder_output.items():
            name = self._named(name)
            lengths = [len(item) for item in output.pooler_output]  # of one row that goes on from a cache the new items
            counts = [sum(lengths)] if len(masks[name]) == 1 else masks[name].sum(-1).tolist()
            groups = items_of_samples(lengths, counts)  # batch x numbers of items
            items = list(chain.from_iterable([*group] * expand_size for group in groups))  # of batch * expand_size rows
            expanded[name] = chosen_items(output, items)
        return expanded

    def _get_logits_processor(
        self, generation_config, *args: Any, logits_processor: Any = None, device: Any = None,
        model_kwargs: Any = None, **kwargs: Any,
    ) -> LogitsProcessorList:  # fmt: skip
        """As in transformers, and never generate a placeholder: there would be no features for it."""
        head = self.get_output_embeddings()
        size = head.weight.shape[0] if head is not None else self.config.get_text_config().vocab_size  # of the logits
        ids = self.placeholder_ids(text_only=not (model_kwargs or {}).get("mm_encoder_outputs")).values()
        device = self.device if device is None else device
        inside = [token_id for token_id in ids if token_id < size]
        # The caller's come after transformers' own and before temperature, top-k and others of their kind; so do these.
        own = [SuppressPlaceholders(inside, device=device)] if inside else []
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=[*own, *(logits_processor or ())], device=device,
            model_kwargs=model_kwargs, **kwargs,
        )  # fmt: skip
        if len(inside) == len(ids):
            return processors
        width = max(ids) + 1
        return LogitsProcessorList(Widened(p, width) if isinstance(p, BY_IDS) else p for p in processors)

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer) -> dict:
        """As in transformers; a draft model gets prompts and features in its own terms."""
        found = super()._extract_generation_mode_kwargs(custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        if found.get("assistant_model") is not None:
            shared = found.get("assistant_tokenizer") is None  # else it reads the text, which has no placeholders
            found["assistant_model"] = Draft(self, found["assistant_model"], dict(kwargs) if shared else None)
        return found

    def _get_candidate_generator(self, generation_config, *args: Any, **kwargs: Any) -> CandidateGenerator:
        """As in transformers; what is looked up in the prompt are ids in the table."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: a composed model cannot stop at a layer to draft tokens: leave it out, or pass a "
                "smaller model as assistant_model=."
            )
        generator = super()._get_candidate_generator(generation_config, *args, **kwargs)
        return Lookup(generator) if isinstance(generator, PromptLookupCandidateGenerator) else generator
