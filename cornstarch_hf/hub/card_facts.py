"""Facts for a model card: of a training run, of the bases' licences, and of what an example needs; `card` tells them.

A Trainer's arguments hold folders, tokens and host names.  Nothing is copied but what is named here, and only where
it is a number or a word of a known list.
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi
from transformers.image_processing_base import ImageProcessingMixin

from ..parts.adapters import unwrapped
from ..parts.known_encoders import ENCODER_TYPES, encoder_type
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, PROJECTORS
from ..processing.own_processors import PrecomputedFeaturesProcessor, TimeSeriesProcessor
from ..processing.subprocessors import sampling_rate_of

logger = logging.getLogger(__name__)
FRAMEWORKS = ("cornstarch-hf", "transformers", "torch", "peft", "trl")
# No dot and no slash in front: evaluation sets are named by users, perhaps by their files.
METRIC = re.compile(r"eval_[A-Za-z0-9_@-]{1,64}(/[A-Za-z0-9_@-]{1,64})?")
_GROUP = re.compile(r"[A-Za-z0-9_.*?]{1,64}")
# What Trainer measures of the machine, not of the model.
_SPEED = re.compile(r"eval_(.*_)?(runtime|samples_per_second|steps_per_second|model_preparation_time)")
_ARGUMENTS = {"warmup_steps": "warmup steps", "weight_decay": "weight decay", "max_grad_norm": "gradient clipping",
              "label_smoothing_factor": "label smoothing", "neftune_noise_alpha": "NEFTune noise"}  # fmt: skip

LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
TIMEOUT = 10.0  # seconds to ask for the licence of a base
OWN_MODULES = ("cornstarch_hf", "transformers", "torch", "peft", "builtins", "functools")
# What an example imports, by what it holds then.
_IMPORTS = {"np.": "import numpy as np", "Image.": "from PIL import Image"}

Facts = list[tuple[str, str]]


def training_facts(trainer: Any) -> Facts:
    """Facts of a run as ``(what, value)``, in plain text: how long it trained and by what, and what it measured last.

    Args:
        trainer: a `transformers.Trainer` (or a subclass of it, as in TRL), or the path of its `trainer_state.json` or of a
            checkpoint folder that holds one.  Of a run without a step there are no facts.

    Raises:
        ValueError: a path without a readable `trainer_state.json`.
        TypeError: neither a Trainer nor a path.
    """
    versions: list[str] = []
    if isinstance(trainer, (str, os.PathLike)):  # a state tells no versions of what wrote it
        state = _read_state(trainer)
        how = _numbers({"batch size per device": state.get("train_batch_size")})
    elif hasattr(trainer, "args") and hasattr(trainer, "state"):
        state = vars(trainer.state)
        how = _argument_facts(trainer.args) + _optimizer_facts(trainer)
        for name in FRAMEWORKS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions.append(f"{name} {importlib.metadata.version(name)}")
    else:
        raise TypeError(
            f"trainer must be a transformers.Trainer or the path of a trainer_state.json, got {type(trainer).__name__}."
        )
    if not state.get("global_step"):
        return []
    length = _numbers({"epochs": state.get("epoch"), "optimizer steps": state.get("global_step")})
    measured = _measured(state.get("log_history"))
    return length + how + measured + ([("versions", ", ".join(versions))] if versions else [])


def _read_state(path: str | os.PathLike) -> Mapping[str, Any]:
    file = os.path.join(path, "trainer_state.json") if os.path.isdir(path) else path
    try:
        state = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"trainer: {file} cannot be read ({error}): pass the Trainer itself, or a checkpoint folder that it wrote."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"trainer: {file} must hold a JSON object, got {type(state).__name__}.")
    return state


def _argument_facts(args: Any) -> Facts:
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    each = "{} per device x {} accumulated x {} processes".format(*sizes)
    precision = next((name for name in ("bf16", "fp16", "tf32") if getattr(args, name) is True), "none")
    found = [("batch size", f"{math.prod(sizes)} ({each})"), ("mixed precision", precision)]
    found += _numbers({label: getattr(args, key) or None for key, label in _ARGUMENTS.items()})
    if args.gradient_checkpointing is True:
        found.append(("gradient checkpointing", "yes"))
    return found + _numbers({"seed": args.seed, "data seed": args.data_seed})


def _optimizer_facts(trainer: Any) -> Facts:
    """Of the optimizer that ran, which need not be the one that the arguments name."""
    from transformers.trainer_utils import SchedulerType  # slow to import, and few programs need it

    args = trainer.args
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in accelerate's wrapper
    if optimizer is None:
        found = _numbers({"learning rate": args.learning_rate})
    else:
        found = [("optimizer", type(optimizer).__name__), ("learning rate", _learning_rates(optimizer.param_groups))]
    # Only of a scheduler that Trainer made itself do its arguments tell the kind.
    if getattr(trainer, "_created_lr_scheduler", False) or trainer.lr_scheduler is None:
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        if schedule in {kind.value for kind in SchedulerType}:  # a word of transformers' own list
            found.append(("learning rate schedule", schedule))
    return [fact for fact in found if fact[1]]


def _learning_rates(groups: list[dict[str, Any]]) -> str:
    """The initial rates, by part where `parameter_groups` named them."""
    rates: dict[str, dict[str, None]] = {}
    for group in groups:
        rate: Any = group.get("initial_lr", group.get("lr"))  # where schedulers keep the rate that they began with
        if _is_number(rate):
            parts, name = rates.setdefault(_shown(rate), {}), group.get("name")
            parts |= {name: None} if isinstance(name, str) and _GROUP.fullmatch(name) else {}
    if len(rates) == 1:
        return next(iter(rates))
    return ", ".join(f"{rate} ({', '.join(parts)})" if parts else rate for rate, parts in rates.items())


def _measured(history: Any) -> Facts:
    """The last losses and the last evaluation."""
    entries = [entry for entry in history or [] if isinstance(entry, Mapping)]
    found: dict[str, Any] = {}
    for key, label in (("loss", "last training loss"), ("train_loss", "mean training loss")):
        found[label] = next((entry[key] for entry in reversed(entries) if _is_number(entry.get(key))), None)
    for entry in entries:
        found |= {key: value for key, value in entry.items() if isinstance(key, str) and METRIC.fullmatch(key)}
    return _numbers({key: value for key, value in found.items() if not _SPEED.fullmatch(key)})


def _numbers(found: Mapping[str, Any]) -> Facts:
    return [(label, _shown(value)) for label, value in found.items() if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


# ---- licences of the bases


def find_licenses(
    commits: Mapping[str, str | None], given: Mapping[str, str] | None = None, token: str | bool | None = None
) -> dict[str, str | None]:
    """The licence of each base, None where it is not known: a push does not stop for one.

    Args:
        commits: of the bases by repository, None where that is not known.
        given: licences by repository, for which the Hub is not asked (ValueError where one is no identifier).
        token: of the Hub; False asks nothing.
    """
    found: dict[str, Any] = {base: _identifier(name, f"licenses[{base!r}]") for base, name in (given or {}).items()}
    for base, commit in commits.items():
        if base not in found:
            found[base] = _asked_license(base, commit, token)
    return {base: found[base] for base in commits}


def _asked_license(repo_id: str, commit: str | None, token: str | bool | None) -> str | None:
    if token is False:
        return None
    try:
        data: Any = HfApi().model_info(repo_id, revision=commit, token=token, timeout=TIMEOUT).card_data or {}
    except Exception as error:  # offline, private, gone, a proxy in between: the reason is not the card's business
        logger.info("The licence of %s is not known (%s).", repo_id, type(error).__name__)
        return None
    # What others wrote in their cards becomes text of this one: identifiers only.
    # Where the licence is "other", the name beside it says which.
    names = (data.get("license_name"), data.get("license"))
    return next((name for name in names if isinstance(name, str) and LICENSE.fullmatch(name)), None)


def _identifier(name: Any, where: str) -> str:
    if not isinstance(name, str) or not LICENSE.fullmatch(name):
        raise ValueError(f"{where} must be an identifier such as 'apache-2.0', got {name!r:.100}.")
    return name


def license_fields(own: str | None, bases: Iterable[str | None]) -> dict[str, str]:
    """The metadata of a card that tells its licence, given those of all bases; None for one that is not known.

    Returns:
        the user's `own` word (ValueError where it is no identifier); else the one that all bases have; ``other`` where
        known ones differ; nothing where one is unknown, since an unknown licence allows no promise.
    """
    if own is not None:
        return {"license": _identifier(own, "license")}
    found = set(bases)
    if len(found - {None}) > 1:
        return {"license": "other", "license_name": "those-of-its-parts"}
    return {"license": str(found.pop())} if found and None not in found else {}


# ---- the example: items that it makes itself, and imports


class Examples(NamedTuple):
    """Python for a message about one item of each kind: imports, parts of its content; modalities of which none can be made."""

    imports: list[str]
    parts: list[str]
    left_out: list[str]


def examples(model: Any, processor: Any) -> Examples:
    """Items for a composed model and its processor; by kind where one modality, or a group that shares its items, has it."""
    items = {name: _item(encoder, processor.processors.get(name)) for name, encoder in model.encoders.items()}
    left_out = [name for name, item in items.items() if item is None]
    found: dict[str, str] = {}
    for name, item in items.items():
        if name in model.config.joined:  # the first one of its group has the items
            continue
        kind = model.encoders[name].kind
        same = set(model.config.modalities_of_kind(kind))
        together = len(same) == 1 or any(
            same <= set(group) for group in model.config.share_inputs if isinstance(group, list)
        )
        # A part of the type "text" is the message's own.
        by_kind = together and kind != "text" and same.isdisjoint(left_out)
        if item is not None:
            type = kind if by_kind else name
            values = ", ".join(f'"{key}": {value}' for key, value in {"type": f'"{type}"', **item}.items())
            found.setdefault(type, f"{{{values}}}")
    parts = list(found.values())
    imports = [line for use, line in _IMPORTS.items() if any(use in part for part in parts)]
    return Examples(imports, parts, left_out)


def _item(encoder: Any, processor: Any) -> dict[str, str] | None:
    """The values of a content part, as Python; None where making an item takes more than a card knows."""
    config = unwrapped(encoder.module).config
    if processor is None or encoder.additional_args:
        return None
    match encoder.kind:
        case "image":
            return {"image": 'Image.new("RGB", (320, 240), "red")'}
        case "audio":
            rate = sampling_rate_of(processor)
            # One second, or the extractor's window where that is shorter.
            samples = min(rate or 16_000, getattr(processor, "n_samples", None) or rate or 16_000)
            wave = {"audio": f"np.sin(np.arange({samples}, dtype=np.float32) / 10)"}
            return wave | ({"sampling_rate": str(rate)} if rate else {})
        case "video":
            if isinstance(processor, ImageProcessingMixin) and hasattr(processor, "merge_size"):
                return None  # it packs patches of images, and none of videos
            frames = getattr(config, "num_frames", None) or getattr(processor, "num_frames", None) or 8
            film = {"video": f"np.zeros(({frames}, 240, 320, 3), dtype=np.uint8)"}
            return film | ({"fps": "24"} if getattr(processor, "fps", None) else {})
        case "text":
            return {"text": f'"{encoder_type(config).example_text or "Some text of its own."}"'}
        case "time" if isinstance(processor, TimeSeriesProcessor):
            length = processor.context_length or 4 * (processor.patch_length or 16)
            shape = f"({length}, {processor.num_channels})" if processor.num_channels else f"({length},)"
            return {"time": f"np.ones({shape}, dtype=np.float32)"}
        case "features" if isinstance(processor, PrecomputedFeaturesProcessor):
            return {"features": f"np.ones((4, {processor.feature_size}), dtype=np.float32)"}
    return None


def own_imports(model: Any) -> list[str]:
    """Imports of the user's own files, without which a checkpoint that does not carry them cannot be built."""
    needed: dict[str, list[str]] = {}
    for what, thing in own_parts(model).items():
        needed.setdefault(thing.__module__, []).append(what)
    lines = []
    for module, parts in needed.items():
        remark = f"defines {', '.join(parts)}; not part of this repository"
        words = module.split(".")
        importable = all(map(str.isidentifier, words)) and words[0] not in ("__main__", "transformers_modules")
        lines.append(f"import {module}  # {remark}" if importable else f"# First run the code that {remark}.")
    return lines


def own_parts(model: Any) -> dict[str, Any]:
    """Classes and functions of a composed model that neither this package nor transformers define, by what they are."""
    found: dict[str, Any] = {}
    for part in (model.language_model, *(encoder.module for encoder in model.encoders.values())):
        found[f"the class {type(unwrapped(part)).__name__}"] = type(unwrapped(part))
    for name, encoder in model.encoders.items():
        projection = encoder.projector.config.projection_type
        if projection in PROJECTORS:
            found[f"the projection {projection!r}"] = PROJECTORS[projection]
        for callback in filter(None, encoder.callbacks.values()):
            target = getattr(callback, "func", callback)  # of a functools.partial
            # Of an object that can be called its class was registered.
            target = target if CALLBACKS.name_of(target) else type(target)
            if registered := CALLBACKS.name_of(target):
                found[f"the callback {registered!r}"] = target
        for key in (name, str(unwrapped(encoder.module).config.model_type)):
            if key in FEATURE_COUNTS:
                found[f"the feature count of {key!r}"] = FEATURE_COUNTS[key]
            for function in ENCODER_TYPES[key].functions if key in ENCODER_TYPES else ():
                found[f"the encoder type {key!r}"] = function
    return {what: thing for what, thing in found.items() if thing.__module__.split(".")[0] not in OWN_MODULES}
