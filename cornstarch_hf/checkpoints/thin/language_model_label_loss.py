"""In a checkpoint's own code the head runs at the positions of any row's labels in all rows, with the same loss."""

import inspect
from typing import Any

from torch.nn.functional import pad
from transformers.utils import ModelOutput

from ...parts.adapters import is_wrapped, unwrapped
from ...parts.signatures import forward_parameters, takes_any_keyword


def takes_positions(language_model: Any) -> bool:
    inner: Any = unwrapped(language_model)
    if is_wrapped(language_model) and language_model.active_peft_config.is_prompt_learning:
        return False
    names = inspect.unwrap(type(inner).forward).__code__.co_names
    takes = "logits_to_keep" in forward_parameters(language_model) and takes_any_keyword(language_model)
    return takes and "loss_function" in names and "shift_labels" in inspect.signature(inner.loss_function).parameters


def run_at_labels(language_model: Any, arguments: dict[str, Any]) -> ModelOutput:
    targets = arguments.get("shift_labels")
    targets = pad(arguments["labels"][:, 1:], (0, 1), value=-100) if targets is None else targets
    columns = (targets != -100).any(0).nonzero().flatten()
    labels = pad(targets[:, columns], (0, 2), value=-100)
    return language_model(
        **arguments | {"logits_to_keep": pad(columns, (0, 2)), "shift_labels": labels}, return_dict=True
    )
