"""What a model card tells of a training run: facts picked one by one from a Trainer or its `trainer_state.json`.

A Trainer's arguments hold folders, tokens and host names.  Nothing is copied but what this list names, and only where
it is a number or a word of a known list.
"""

import importlib.metadata
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

FRAMEWORKS = ("cornstarch-hf", "transformers", "torch", "peft", "trl")
# No dot and no slash in front: evaluation sets are named by users, perhaps by their files.
METRIC = re.compile(r"eval_[A-Za-z0-9_@-]{1,64}(/[A-Za-z0-9_@-]{1,64})?")
_GROUP = re.compile(r"[A-Za-z0-9_.*?]{1,64}")
# What Trainer measures of the machine, not of the model.
_SPEED = re.compile(r"eval_(.*_)?(runtime|samples_per_second|steps_per_second|model_preparation_time)")
_ARGUMENTS = {"warmup_steps": "warmup steps", "weight_decay": "weight decay", "max_grad_norm": "gradient clipping",
              "label_smoothing_factor": "label smoothing", "neftune_noise_alpha": "NEFTune noise"}  # fmt: skip

Facts = list[tuple[str, str]]


def training_facts(trainer: Any) -> Facts:
    """Facts of a run as ``(what, value)``.

    Args:
        trainer: a `transformers.Trainer` (or a subclass of it, as in TRL); or the path of a checkpoint folder of one or
            of its `trainer_state.json`.

    Returns:
        how long, in which batches, by which optimizer it was trained, and what it measured last; plain text.  Of a run
        without a step, nothing.

    Raises:
        ValueError: a path without a readable `trainer_state.json`.
        TypeError: neither a Trainer nor a path.
    """
    if isinstance(trainer, (str, os.PathLike)):
        read = _read_state(trainer)
        return _state_facts(read) if read.get("global_step") else []
    if not hasattr(trainer, "args") or not hasattr(trainer, "state"):
        raise TypeError(
            f"trainer must be a transformers.Trainer or the path of a trainer_state.json, got {type(trainer).__name__}."
        )
    if not trainer.state.global_step:
        return []
    state = {key: getattr(trainer.state, key, None) for key in ("epoch", "global_step", "log_history")}
    arguments = _state_facts(state, alone=False) + _argument_facts(trainer.args) + _optimizer_facts(trainer)
    return arguments + _measured(state["log_history"]) + _versions()


def _read_state(path: str | os.PathLike) -> Mapping[str, Any]:
    file = os.path.join(path, "trainer_state.json") if os.path.isdir(path) else path
    try:
        with open(file, encoding="utf-8") as opened:
            state = json.load(opened)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"trainer: {file} cannot be read ({error}): pass the Trainer itself, or a checkpoint folder that it wrote."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"trainer: {file} must hold a JSON object, got {type(state).__name__}.")
    return state


def _state_facts(state: Mapping[str, Any], alone: bool = True) -> Facts:
    found = [("epochs", state.get("epoch")), ("optimizer steps", state.get("global_step"))]
    if alone:  # of a live Trainer the arguments say more
        found += [("batch size per device", state.get("train_batch_size"))]
    return _numbers(found) + (_measured(state.get("log_history")) if alone else [])


def _argument_facts(args: Any) -> Facts:
    sizes = [
        getattr(args, key, 1) for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    ]
    found: Facts = []
    if all(_is_number(size) for size in sizes):
        product = math.prod(int(size) for size in sizes)
        found.append(
            ("batch size", f"{product} ({sizes[0]} per device x {sizes[1]} accumulated x {sizes[2]} processes)")
        )
    precision = [name for name in ("bf16", "fp16", "tf32") if getattr(args, name, None) is True]
    found.append(("mixed precision", precision[0] if precision else "none"))
    found += _numbers([(label, getattr(args, key, None) or None) for key, label in _ARGUMENTS.items()])
    if getattr(args, "gradient_checkpointing", False) is True:
        found.append(("gradient checkpointing", "yes"))
    return found + _numbers([("seed", getattr(args, "seed", None)), ("data seed", getattr(args, "data_seed", None))])


def _optimizer_facts(trainer: Any) -> Facts:
    """Of the optimizer that ran, which need not be the one that the arguments name."""
    args, optimizer = trainer.args, getattr(trainer, "optimizer", None)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if optimizer is None:
        found = _numbers([("learning rate", getattr(args, "learning_rate", None))])
    else:
        found = [("optimizer", type(optimizer).__name__), ("learning rate", _learning_rates(optimizer.param_groups))]
    if getattr(trainer, "_created_lr_scheduler", False) or getattr(trainer, "lr_scheduler", None) is None:
        found += _word("learning rate schedule", getattr(args, "lr_scheduler_type", None))
    return [fact for fact in found if fact[1]]


def _learning_rates(groups: list[dict[str, Any]]) -> str:
    """The initial rates, by part where `parameter_groups` named them."""
    rates: dict[str, list[str]] = {}
    for group in groups:
        rate: Any = group.get("initial_lr", group.get("lr"))
        name = group.get("name")
        if _is_number(rate):
            parts = rates.setdefault(_shown(rate), [])
            parts += [name] if isinstance(name, str) and _GROUP.fullmatch(name) and name not in parts else []
    if len(rates) == 1:
        return next(iter(rates))
    return ", ".join(f"{rate} ({', '.join(parts)})" if parts else rate for rate, parts in rates.items())


def _word(label: str, value: Any) -> Facts:
    """A schedule's name, of transformers' own list."""
    from transformers.trainer_utils import SchedulerType

    value = getattr(value, "value", value)
    return [(label, value)] if value in {known.value for known in SchedulerType} else []


def _measured(history: Any) -> Facts:
    """The last losses and the last evaluation."""
    entries = [entry for entry in history or [] if isinstance(entry, Mapping)]
    found: list[tuple[str, Any]] = []
    for key, label in (("loss", "last training loss"), ("train_loss", "mean training loss")):
        found += [(label, entry[key]) for entry in entries if _is_number(entry.get(key))][-1:]
    evaluations: dict[str, Any] = {}
    for entry in entries:
        evaluations |= {key: value for key, value in entry.items() if isinstance(key, str) and METRIC.fullmatch(key)}
    found += [(key, value) for key, value in evaluations.items() if not _SPEED.fullmatch(key)]
    return _numbers(found)


def _versions() -> Facts:
    found = []
    for name in FRAMEWORKS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return [("versions", ", ".join(found))]


def _numbers(found: list[tuple[str, Any]]) -> Facts:
    return [(label, _shown(value)) for label, value in found if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
