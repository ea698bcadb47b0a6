"""Calling the language model of a composition: with its head and loss, or without."""

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, logging

from ..parts.adapters import is_adapted, unwrapped
from ..parts.frozen_modes import is_checkpointing
from ..parts.registries import STEPS
from ..parts.signatures import accepts, forward_function, forward_parameters, takes_any_keyword
from ..parts.versions import CACHE, CACHE_NAMES, is_paged, take_cache
from .extra_inputs import id_input_names, with_positions
from .label_loss import run_at_labels, takes_positions

logger = logging.get_logger(__name__)
# Keywords of the loss beside labels: those that were shifted already, for sequences that are split over devices; and whether
# there shall be a loss and no logits.
LOSS_INPUTS = ("shift_labels", "skip_logits")


def text_keywords(language_model: nn.Module) -> list[str]:
    """Names that the language model's `forward` takes, or passes on to its backbone, which needs them."""
    return list(dict.fromkeys([*forward_parameters(language_model), *id_input_names(language_model)]))


def around_language_model(
    model: Any, run: Callable[[dict[str, Any]], ModelOutput], inputs: dict[str, Any], masks: dict, outputs: dict
) -> ModelOutput:
    """Run the language model by `run(inputs)`, with those steps around it that the composition's configuration asks for.

    `masks` and `outputs` are those of the placeholders and features that were merged, by modality.
    """
    steps = [STEPS[key] for key in model.config.steps]
    past = cached_length(inputs.get("cache")) if steps else 0
    for step in steps:
        inputs = step.before_language_model(model, inputs, masks, outputs, past)
    output = run(inputs)
    for step in steps:
        step.after_language_model(model, inputs, output, past)
    return output


def steps_before_generation(
    model: Any, keywords: dict[str, Any], masks: dict, outputs: dict, shape: tuple[int, int]
) -> dict[str, Any]:
    """Keywords of generation as the composition's steps make them; `shape` is that of the tokens behind the cache."""
    past = cached_length(next((keywords[key] for key in CACHE_NAMES if keywords.get(key) is not None), None))
    for key in model.config.steps:
        keywords = STEPS[key].before_generation(model, keywords, masks, outputs, past, shape)
    return keywords


def steps_before_prefill(model: Any, keywords: dict[str, Any], past: int, length: int, new: int | None) -> None:
    """Let the composition's steps look at a prefill, or its chunk, of `length` ids of which the last are `new` (None: all)."""
    positions = keywords.get("position_ids")
    whole = new is not None or (positions is not None and positions.shape[-1] > length)
    for key in model.config.steps:
        STEPS[key].before_step(model, keywords, past, whole)


def run_language_model(model, *, labels: Tensor | None, logits_to_keep: int | Tensor, **inputs: Any) -> ModelOutput:
    """Run the language model on ids or merged embeddings.

    The configuration of `model`, the composed one, may set `use_cache`, `output_attentions`, `loss_at_labels`, ...; without
    `logits` where the latter holds (in training mode, with labels ``(batch, length)``), or where `skip_logits` among the
    `inputs` says so.  None among these is left out.
    """
    language_model, config = model.language_model, model.config
    settings = {key: getattr(config, key, None) for key in ("use_cache", "output_attentions", "output_hidden_states")}
    settings = {key: value for key, value in settings.items() if value or (key == "use_cache" and value is not None)}
    skip_logits = inputs.pop("skip_logits", None)
    arguments = settings | with_cache(language_model, inputs)
    # Who computes the loss?  The language model, unless its `forward` lacks a parameter that the loss needs (`labels`,
    # `num_items_in_batch`, `shift_labels`): then it runs without them, and the loss is computed here from its logits.
    needed = ("num_items_in_batch", "shift_labels")
    loss_arguments = {key: arguments.pop(key) for key in needed if key in arguments}
    if labels is not None:
        loss_arguments["labels"] = labels  # (batch, length)
    wants_loss = "labels" in loss_arguments or "shift_labels" in loss_arguments
    model_computes_loss = wants_loss and all(accepts(language_model, key) for key in loss_arguments)
    if model_computes_loss:
        arguments |= loss_arguments
    # Where does the head run?  At all positions; at the last ones (`logits_to_keep`), which are cut out afterwards where
    # the language model does not know that parameter; or, in training with `loss_at_labels`, at labelled ones alone.
    keep_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
    at_labels = _skips_logits(model, skip_logits, labels, keep_all)
    slice_afterwards = not keep_all and not accepts(language_model, "logits_to_keep")
    if not keep_all and not slice_afterwards:
        arguments["logits_to_keep"] = logits_to_keep
    arguments = _taken(language_model, arguments)
    if at_labels and model_computes_loss and takes_positions(language_model):
        output = run_at_labels(language_model, arguments)
    else:
        output = language_model(**arguments, return_dict=True)
    if wants_loss and not model_computes_loss:
        given = loss_arguments.pop("labels", None)
        output["loss"] = model.loss_function(output.logits, given, output.logits.shape[-1], **loss_arguments)
    if slice_afterwards:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output["logits"] = output.logits[:, kept]  # (batch, kept, vocabulary)
    return without_logits(output) if at_labels else output


def _skips_logits(model: Any, asked: bool | None, labels: Tensor | None, keep_all: bool) -> bool:
    """Whether the output is to have no logits, by the caller's `skip_logits`, else by the configuration (ValueError)."""
    if asked and (labels is None or not keep_all):
        missing = "needs labels" if labels is None else "says the opposite of logits_to_keep"
        raise ValueError(f"skip_logits=True {missing}: there would be nothing to compute, leave it out or pass labels.")
    if labels is None or not keep_all:
        return False
    return bool(getattr(model.config, "loss_at_labels", False) and model.training if asked is None else asked)


def _taken(language_model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a language model takes; TypeError for others, unless leaving them out changes nothing."""
    if takes_any_keyword(language_model):
        return arguments
    refused = arguments.keys() - forward_parameters(language_model).keys()
    if wrong := sorted(key for key in refused if key != "use_cache" and arguments[key] is not False):
        raise TypeError(f"The language model {type(unwrapped(language_model)).__name__} does not take {wrong}.")
    return {key: value for key, value in arguments.items() if key not in refused}


_WHERE_LOGITS_ARE = (
    "outputs.logits is None: the language model's head ran where labels are, and nowhere else. To read logits beside labels "
    "pass skip_logits=False, or set model.config.loss_at_labels = False."
)


class _NoLogits:
    """The attribute `logits` of an output that has none: None, with a word on how to get them."""

    def __get__(self, output: Any, owner: Any = None) -> Any:
        value = None if output is None else vars(output).get("logits")
        if value is None and output is not None and vars(output).get("_read"):
            warnings.warn(_WHERE_LOGITS_ARE, stacklevel=2)
        return value

    def __set__(self, output: Any, value: Any) -> None:
        vars(output)["logits"] = value


@functools.cache
def _class_without_logits(cls: type) -> Any:
    def finish(self: Any) -> None:
        super(made, self).__post_init__()
        vars(self)["_read"] = True  # from here on by others

    def plain(self: Any) -> Any:
        output = cls(**self)
        vars(output).update({key: value for key, value in vars(self).items() if key != "_read"})
        return output

    body = {"logits": _NoLogits(), "__post_init__": finish, "__module__": cls.__module__, "__doc__": cls.__doc__}
    body |= {"__repr__": lambda self: repr(plain(self)), "__reduce__": lambda self: plain(self).__reduce__()}
    made: Any = type(f"{cls.__name__}WithoutLogits", (cls,), body)
    return made


def without_logits(output: ModelOutput) -> ModelOutput:
    """An output without its logits: those of some positions alone would be taken for those of all."""
    cls = type(output) if torch.compiler.is_compiling() else _class_without_logits(type(output))
    return cls(**{key: value for key, value in output.items() if key != "logits"})


def cached_length(cache: Any) -> int:
    """Tokens in a cache, 0 without one and in a paged one; 1 in one that keeps a running state alone and has seen any."""
    if cache is None or is_paged(cache):
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # transformers: no layer of attention
        return int(cache.has_previous_state())


def is_prefill(cache: Any, new: int) -> bool:
    """Whether nothing is in a cache before `new` tokens; of one whose length lies on the device, whether they are several."""
    if cache is None or torch.compiler.is_compiling():
        return cache is None
    past = cached_length(cache)
    return new > 1 if isinstance(past, Tensor) else past == 0  # to look at it waits for the device


def is_running_state(cache: Any) -> bool:
    """Whether a cache keeps running states alone (Mamba), which have no length."""
    try:
        cache.get_seq_length()
    except ValueError:  # transformers: no layer of attention
        return True
    return False


def cache_keyword(language_model: nn.Module) -> str | None:
    """The parameter through which a language model takes its cache between steps, None where it has no cache."""
    # transformers' own name for caches, or that of an older version, which code from elsewhere may keep
    known = forward_parameters(language_model)
    return next((name for name in CACHE_NAMES if name in known), None)


def with_cache(language_model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that are not None, with the cache by the language model's own name and positions where it needs them."""
    arguments = {key: value for key, value in inputs.items() if value is not None}
    cache = take_cache(arguments)
    arguments = with_positions(language_model, arguments, cached_length(cache))
    if cache is None:
        return arguments
    return arguments | {"cache" if is_paged(cache) else cache_keyword(language_model) or CACHE: cache}


@dataclass(
    repr=False, unsafe_hash=True
)  # two of one model are equal, as a submodule is the same object at every access
class Headless:
    """A composed model without its head: trainers call it for `last_hidden_state`; in all else it is the model."""

    _model: Any  # and this is no `nn.Module`: the model would hold itself as a part, with every parameter twice

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """As `forward`, up to `last_hidden_state`; ValueError for a head with an adapter that trains: it would not learn."""
        # TRL's trainers multiply hidden states (batch, length, hidden) by the head's `weight` themselves.
        head = self._model.get_output_embeddings()
        trains = self._model.training and torch.is_grad_enabled()
        if trains and is_adapted(head) and any(p.requires_grad for p in head.parameters()):
            raise ValueError(
                "The language model's head has an adapter that trains, but base_model runs without the head, and trainers "
                "that use it multiply by the head's weight alone: leave the head out of target_modules, or train all of "
                "it by modules_to_save."
            )
        return self._model.forward_headless(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_model"), name)  # not `self._model`: a copy has none at first


def run_backbone(model, inputs: dict[str, Any]) -> BaseModelOutputWithPast:
    """Run the language model's backbone, adapters included, on ids or merged embeddings (ValueError if it has none)."""
    inner = unwrapped(model.language_model)
    name, backbone = type(inner).__name__, inner.base_model  # by its `base_model_prefix`; adapters in it run along
    if backbone is inner:
        raise ValueError(f"{name} has no backbone apart from its head, so there is no base_model to run.")
    # What its head's `forward` takes and the backbone does not (`logits_to_keep`) has nothing to do here.
    arguments = {key: value for key, value in with_cache(backbone, inputs).items() if accepts(backbone, key)}
    return backbone(**arguments, return_dict=True)


class EmbeddingsMixin(PreTrainedModel):
    """The embeddings, the head and the decoder of a composed model: its language model's."""

    config: Any
    language_model: Any

    def _caching(self, use_cache: bool | None, cache: Any) -> bool | None:
        """Whether the language model is to return a cache; never while it checkpoints, as in transformers."""
        # Its own modules find that out by their training mode, which frozen ones are not in.
        if use_cache is False or cache is not None or not self.training or not is_checkpointing(self.language_model):
            return use_cache
        if use_cache:
            logger.warning_once(
                "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
            )
        return False

    def signature_state(self) -> tuple[Any, list[Any]]:
        """What decides the signatures of this model's methods: values, and objects that have to stay the same."""
        values, language_model = vars(self.config), self.language_model
        entries = [values[f"{name}_modality"] for name in values["encoders"]]
        plain = (values["encoders"], entries, values["share_inputs"], values.get("positions"), values.get("mask"))
        return plain, [language_model, forward_function(language_model)]

    @property
    def base_model(self) -> Headless:
        """This model without its language-model head; a callable, not a module of its own."""
        return Headless(self)

    def get_decoder(self):
        return unwrapped(self.language_model).get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        unwrapped(self.language_model).set_input_embeddings(value)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True) -> nn.Module:
        """As in transformers, done by the language model's class: it may keep the size in more places than one."""
        unwrapped(self.language_model).resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        # With neither argument transformers resizes nothing and just returns the embeddings.
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.vocab_size = self.config.get_text_config().vocab_size
            self.tie_weights()
        return self.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        unwrapped(self.language_model).set_output_embeddings(new_embeddings)
