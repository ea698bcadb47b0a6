"""A composed model without its head, and its embeddings and head, which are the language model's."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..parts.adapters import is_adapted, unwrapped
from ..parts.signatures import accepts
from .calling import with_cache


class Headless:
    """A composed model without its head: call it for `last_hidden_state`, use it as the model for all else.

    Trainers that compute a loss of their own call `model.base_model(...)`.
    """

    # No `nn.Module`: the model would hold itself as a part, with every parameter twice.  Two of one model are equal, as a
    # submodule is the same object at every access.
    def __init__(self, model):
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """As the model's `forward`, without labels.

        Returns:
            the language model's backbone output: `last_hidden_state` ``(batch, length, hidden)``, ...

        Raises:
            ValueError: in training, a head with an adapter that trains: it is left out here, so it would not learn.
        """
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

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headless) and other._model is self._model

    def __hash__(self) -> int:
        return hash(("headless", id(self._model)))


def run_backbone(model, inputs: dict[str, Any]) -> BaseModelOutputWithPast:
    """Run the language model's backbone, adapters included, on ids or merged embeddings.

    Raises:
        ValueError: the language model has no backbone of its own.
    """
    inner = unwrapped(model.language_model)
    backbone = inner.base_model  # the module under `base_model_prefix`; adapters inside of it run along
    if backbone is inner:
        raise ValueError(
            f"{type(inner).__name__} has no backbone apart from its head, so there is no base_model to run."
        )
    # What its head's `forward` takes and the backbone does not (`logits_to_keep`) has nothing to do here.
    arguments = {key: value for key, value in with_cache(backbone, inputs).items() if accepts(backbone, key)}
    return backbone(**arguments, return_dict=True)


class EmbeddingsMixin(PreTrainedModel):
    """The embeddings and the head of a composed model: its language model's."""

    config: Any
    language_model: Any

    @property
    def base_model(self) -> Headless:
        """This model without its language-model head; a callable, not a module of its own."""
        return Headless(self)

    def get_decoder(self):
        """The language model without its head."""
        return unwrapped(self.language_model).get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        unwrapped(self.language_model).set_input_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, done by the language model's class: it may keep the size in more places than one.

        Returns:
            the language model's input embeddings.
        """
        unwrapped(self.language_model).resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        # With neither argument transformers resizes nothing and just returns the embeddings.
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.vocab_size = self.config.get_text_config().vocab_size
            self.tie_weights()
        return self.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        unwrapped(self.language_model).set_output_embeddings(new_embeddings)
