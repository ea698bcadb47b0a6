"""What batches hold, in the log of `transformers.Trainer`; apart from the rest, as Trainer's callbacks are slow to import."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..modeling_multimodal import MultimodalModel


class BatchMetrics(TrainerCallback):
    """What batches hold, in Trainer's log: tokens of each modality, padding, speed.

    Adds to each training entry ``tokens/text`` and ``tokens/{modality}`` (since the last entry, over all processes),
    ``padding_ratio`` (padding positions among all), and ``tokens_per_second`` (positions that are no padding; evaluating
    and saving not counted).  They stand in `trainer.state.log_history`; for TensorBoard and other reporters this callback
    must come before theirs, as `BatchMetrics.add_to(trainer)` places it.

    Args:
        prefix: in front of the four names.

    Raises:
        ValueError: when training begins: the model is not a composed one.
    """

    def __init__(self, prefix: str = ""):
        self.prefix = prefix
        self._counts: dict[str, Tensor] = {}

    @classmethod
    def add_to(cls, trainer, prefix: str = "") -> "BatchMetrics":
        """Add one to a `transformers.Trainer` in front of its reporters, and return it."""
        callback = cls(prefix)
        trainer.add_callback(callback)
        handler = trainer.callback_handler
        handler.callbacks.insert(0, handler.callbacks.pop())  # it was added last, behind the reporters
        return callback

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        # The model may be inside of PEFT, or of a wrapper for several processes.
        composed = next((m for m in model.modules() if isinstance(m, MultimodalModel)), None)
        if composed is None:
            raise ValueError(f"BatchMetrics counts for composed models, got {type(model).__name__}.")
        self._counts, self._seconds, self._mark = {}, 0.0, time.perf_counter()
        self._hook = composed.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._hook.remove()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Count the time since the last step, save or evaluation."""
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """Leave the time for evaluating out."""
        self._mark = time.perf_counter()

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add the figures to an entry about training."""
        if not self._counts or logs is None or "loss" not in logs:
            return  # an entry about an evaluation, or the summary at the end
        names = sorted(self._counts)
        values = torch.stack([self._counts[name] for name in names])
        if args.world_size > 1:
            from accelerate.utils import reduce

            values = reduce(values, reduction="sum")  # each process has counted its own rows
        found = dict(zip(names, values.tolist(), strict=True))
        positions = sum(found.values())
        padding = found.pop("padding")
        measured: dict[str, float] = {f"tokens/{name}": number for name, number in found.items()}
        measured |= {"padding_ratio": padding / positions, "tokens_per_second": (positions - padding) / self._seconds}
        measured = {self.prefix + key: value for key, value in measured.items()}
        logs.update(measured)
        state.log_history[-1].update(measured)  # Trainer has put its copy of the entry there already
        self._counts, self._seconds = {}, 0.0

    def _count(self, model: MultimodalModel, args: tuple, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return  # an evaluation
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given["inputs_embeds"][..., 0]  # (batch, length), for its shape alone
        mask = given.get("attention_mask")
        # (batch, length), True where a position is no padding
        mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(tokens).bool()
        counts = {"padding": (~mask).sum()}  # tensors: nothing waits for the device before the log is written
        for name in model.config.encoders:
            token_id = model.config.modality(name)["token_id"]
            found = (ids == token_id) & mask if ids is not None and token_id is not None else None
            counts[name] = mask.new_zeros((), dtype=torch.long) if found is None else found.sum()
        counts["text"] = torch.tensor(tokens.numel(), device=tokens.device) - sum(counts.values())
        for name, number in counts.items():  # text is what is neither padding nor a placeholder
            self._counts[name] = self._counts.get(name, 0) + number
