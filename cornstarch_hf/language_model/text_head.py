"""A causal language model of a bare text stack and a head, for stacks that transformers has no ...ForCausalLM class of.

Checkpoints carry this file only where they name the class; `supported` builds it again by that name.
"""

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..parts.classes import class_name, resolve_class
from ..parts.gathering import SETS, GatheringMixin
from ..parts.signatures import PerInstanceSignature
from ..parts.stored_modules import mark_initialized

# What transformers reads on a class of models, and what only the text stack knows.
_TRAITS = ("supports_gradient_checkpointing", "_is_stateful", "_can_compile_fullgraph", *SETS)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Arguments of the loss, which no text stack takes.
_OF_LOSS = ("num_items_in_batch", "shift_labels")


class TextModelWithHead(PreTrainedModel, GenerationMixin):
    """A text stack of transformers with a linear head over it: logits are ``softcap * tanh(scale * head(x) / softcap)``.

    Such a class stands in for text stacks that are made for one composite model alone (Qwen2-VL's, GLM-4V's, Molmo2's), and
    for heads that are simpler than those of the stack's own ...ForCausalLM class.  Its keys are ``model.*`` and ``lm_head.*``.

    Args:
        model: the text stack, a live model of transformers; or the configuration of one that is built with fresh weights.
        lm_head: a `torch.nn.Linear` from the hidden size to the vocabulary, None for one with fresh weights.  It is tied to the
            embeddings where the configuration has ``tie_word_embeddings=True``.
        scale: what logits are multiplied by, None for 1.
        softcap: the bound of logits (Gemma 2, Riviere et al. 2024), None for none.
        backbone: the name of the text stack's class, None for the one that `AutoModel` chooses.
        bias: whether a fresh head has one.

    Raises:
        TypeError: `model` is neither, or `lm_head` is no linear layer.
        ValueError: a head of other sizes; one that is tied where the configuration says that it is not, or the other way
            around; an unknown class; a `scale` or `softcap` that is no number, or not above 0.
    """

    config: Any
    model: Any
    base_model_prefix = "model"
    # `post_init` gathers from the text stack what its class has of these.
    _no_split_modules: Any = None

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        lm_head: nn.Linear | None = None,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        backbone: str | None = None,
        bias: bool = False,
    ):
        live = isinstance(model, PreTrainedModel)
        if not live and not isinstance(model, PreTrainedConfig):
            raise TypeError(f"TextModelWithHead takes a text stack or its configuration, got {type(model).__name__}.")
        config: Any = model.config if live else model
        _check_stack(model if live else None, config)
        cls = type(model) if live else _stack_class(config, backbone)
        for name, value in (("scale", scale), ("softcap", softcap)):
            check_factor(name, value)
        # Before transformers' constructor, which looks at them: what the stack can do, this can.
        self.__dict__.update({name: getattr(cls, name) for name in _TRAITS if hasattr(cls, name)})
        self.__dict__.update({name: getattr(cls, name) for name in dir(cls) if _says_what_is_supported(name, cls)})
        for name in ("_can_set_experts_implementation", "_can_set_attn_implementation"):  # told by the class's own file
            self.__dict__[name] = getattr(cls, name)
        super().__init__(config)
        self.model = model if live else cls(config)
        fresh = lm_head is None
        self.lm_head = lm_head if lm_head is not None else self._fresh_head(config, bias)
        self.scale, self.softcap = scale, softcap
        self.loss_type = "ForCausalLM"  # transformers would guess it from the name of the class
        embeddings = self.get_input_embeddings()
        self._tied_weights_keys = self._tie_to(embeddings)
        if not fresh:
            self._check_head(config, embeddings)
        for part in (*([self.model] if live else []), *([] if fresh else [self.lm_head])):
            mark_initialized(part)  # else `post_init` would draw its weights anew
        self.post_init()

    @staticmethod
    def _fresh_head(config: Any, bias: bool) -> nn.Linear:
        return nn.Linear(config.hidden_size, config.vocab_size, bias=bias)

    def _tie_to(self, embeddings: nn.Module) -> dict[str, str]:
        """``{"lm_head.weight": name of the embeddings' weight}``, empty where the table is no single weight."""
        where = next((name for name, module in self.named_modules() if module is embeddings), None)
        single = where is not None and isinstance(getattr(embeddings, "weight", None), nn.Parameter)
        return {"lm_head.weight": f"{where}.weight"} if single else {}

    def _check_head(self, config: Any, embeddings: Any) -> None:
        head = self.lm_head
        if not isinstance(head, nn.Linear):
            raise TypeError(f"lm_head must be a torch.nn.Linear, got {type(head).__name__}.")
        sizes, expected = tuple(head.weight.shape), (config.vocab_size, config.hidden_size)
        if sizes != expected:
            raise ValueError(
                f"lm_head has the weight {sizes}, the configuration of {type(self.model).__name__} says (vocab_size, "
                f"hidden_size) = {expected}: pass the head that belongs to it."
            )
        tied, says = head.weight is getattr(embeddings, "weight", None), bool(config.tie_word_embeddings)
        if tied != says:
            raise ValueError(
                f"lm_head is {'' if tied else 'not '}the embeddings' weight, but the text configuration says "
                f"tie_word_embeddings={says}: composite models keep that in their outer configuration. Give the text stack a "
                f"configuration of its own with tie_word_embeddings={tied}."
            )

    @property
    def constructor_options(self) -> dict[str, Any]:
        """What builds this again beside the configuration: JSON values by keyword, without defaults."""
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        options["bias"] = True if self.lm_head.bias is not None else None
        if _auto_class(self.config) is not type(self.model):
            options["backbone"] = class_name(type(self.model), self.config)
        return {key: value for key, value in options.items() if value is not None}

    def signature_changes(self, method: str) -> tuple[list[str], list[str]]:
        """Parameters that this instance's `forward` has in addition: those of its text stack."""
        stack: Any = type(self.model)
        return [], [*_parameters(stack), *([] if self._router_loss is None else ["output_router_logits"])]

    @property
    def _router_loss(self) -> Any:
        """The loss by which the stack's experts are to be used evenly, None for a stack without experts."""
        return getattr(sys.modules.get(type(self.model).__module__), "load_balancing_loss_func", None)

    @PerInstanceSignature
    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any
    ):  # fmt: skip
        """Run the text stack and the head.

        Args:
            input_ids: ``(batch, length)``, or None with `inputs_embeds` ``(batch, length, hidden)``.
            labels: ``(batch, length)``, -100 where no loss is wanted.
            logits_to_keep: how many last positions get logits, 0 for all; or positions ``(kept,)``, or of each row ``(batch,
                kept)``, or a bool mask ``(batch, length)``, whose positions then stand one behind the other.
            **kwargs: what the text stack's `forward` takes; `shift_labels` and `num_items_in_batch` of the loss.

        Returns:
            `loss`, `logits` ``(batch, kept, vocabulary)``, and what the text stack returns.
        """
        return_dict = kwargs.pop("return_dict", None)
        loss_arguments = {key: kwargs.pop(key) for key in _OF_LOSS if key in kwargs}
        if kwargs.get("output_router_logits") is None and self._router_loss is not None:
            kwargs["output_router_logits"] = getattr(self.config, "output_router_logits", False)
        given = {key: value for key, value in kwargs.items() if value is not None}
        outputs = self.model(input_ids=input_ids, **given)
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)  # (batch, kept, hidden)
        logits = self._bounded(self.lm_head(hidden))  # (batch, kept, vocabulary)
        loss = None
        if labels is not None or loss_arguments.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments)
        others = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if kwargs.get("output_router_logits"):
            others["aux_loss"] = self._balance(outputs.router_logits, kwargs.get("attention_mask"))
            if loss is not None:
                output["loss"] = loss + self.config.router_aux_loss_coef * others["aux_loss"].to(loss.device)
        for key, value in others.items():
            output[key] = value
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _bounded(self, logits: Tensor) -> Tensor:
        """Logits, scaled and capped, in as many operations as transformers' own: each of them rounds."""
        if self.scale is not None:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _balance(self, router_logits: Any, attention_mask: Any) -> Tensor:
        experts = next(getattr(self.config, name) for name in _EXPERTS if hasattr(self.config, name))
        return self._router_loss(router_logits, experts, self.config.num_experts_per_tok, attention_mask)

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    # transformers treats this class as custom code, whose modules without parameters of their own it leaves out.
    initialize_weights = GatheringMixin.initialize_weights

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)


def slice_logits_to_keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Hidden states ``(batch, length, hidden)`` of the positions that get logits, as transformers 5.24 chooses them."""
    if isinstance(logits_to_keep, int):
        return hidden[:, slice(-logits_to_keep, None) if logits_to_keep else slice(None)]
    if logits_to_keep.ndim < 2:
        return hidden[:, logits_to_keep]  # the same positions of each row
    if logits_to_keep.dtype == torch.bool:
        return hidden[logits_to_keep]  # (positions of all rows, hidden)
    return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)


def _check_stack(model: Any, config: Any) -> None:
    """ValueError for a live model that has a head already, and for a configuration that is no text stack's."""
    if model is not None and model.get_output_embeddings() is not None:
        raise ValueError(
            f"TextModelWithHead takes a text stack, and {type(model).__name__} has a head already: compose it as it is, or "
            "pass the stack below (get_decoder()) and its head."
        )
    if missing := [key for key in ("vocab_size", "hidden_size") if not isinstance(getattr(config, key, None), int)]:
        raise ValueError(f"TextModelWithHead takes a text stack, but {type(config).__name__} has no {missing}.")


def check_factor(name: str, value: Any) -> None:
    """ValueError for a factor of logits that is neither None nor a number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < float("inf")):
        raise ValueError(f"TextModelWithHead: {name} must be None or a number above 0, got {value!r:.100}.")


@functools.cache
def _parameters(stack: Any) -> tuple[str, ...]:
    """Names that the `forward` of a class of text stacks takes; asked for at every step of generation."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(
        name for name, p in list(inspect.signature(stack.forward).parameters.items())[1:] if p.kind not in kinds
    )


def _says_what_is_supported(name: str, cls: type) -> bool:
    return name.startswith("_supports_") and isinstance(getattr(cls, name), bool)


def _auto_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _stack_class(config: PreTrainedConfig, backbone: str | None) -> type[PreTrainedModel]:
    cls: Any = _auto_class(config) if backbone is None else resolve_class(backbone, config, "language_model")
    if cls is None:
        raise ValueError(
            f"transformers has no AutoModel for {type(config).__name__}: name the class of the text stack by backbone=."
        )
    return cls
