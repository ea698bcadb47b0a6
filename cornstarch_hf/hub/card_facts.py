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
        state, versions = _read_state(trainer), []  # a state tells no versions of what wrote it
        how = _numbers([("batch size per device", state.get("train_batch_size"))])
    elif hasattr(trainer, "args") and hasattr(trainer, "state"):
        state, versions = vars(trainer.state), _versions()
        how = _argument_facts(trainer.args) + _optimizer_facts(trainer)
    else:
        raise TypeError(
            f"trainer must be a transformers.Trainer or the path of a trainer_state.json, got {type(trainer).__name__}."
        )
    if not state.get("global_step"):
        return []
    length = _numbers([("epochs", state.get("epoch")), ("optimizer steps", state.get("global_step"))])
    return length + how + _measured(state.get("log_history")) + versions


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


def _argument_facts(args: Any) -> Facts:
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
    found, sizes = [], [getattr(args, key, 1) for key in keys]
    if all(_is_number(size) for size in sizes):
        each = f"{sizes[0]} per device x {sizes[1]} accumulated x {sizes[2]} processes"
        found.append(("batch size", f"{math.prod(map(int, sizes))} ({each})"))
    precision = [name for name in ("bf16", "fp16", "tf32") if getattr(args, name, None) is True]
    found.append(("mixed precision", precision[0] if precision else "none"))
    found += _numbers([(label, getattr(args, key, None) or None) for key, label in _ARGUMENTS.items()])
    if getattr(args, "gradient_checkpointing", False) is True:
        found.append(("gradient checkpointing", "yes"))
    return found + _numbers([("seed", getattr(args, "seed", None)), ("data seed", getattr(args, "data_seed", None))])


def _optimizer_facts(trainer: Any) -> Facts:
    """Of the optimizer that ran, which need not be the one that the arguments name."""
    from transformers.trainer_utils import SchedulerType  # slow to import, and few programs need it

    args, optimizer = trainer.args, getattr(trainer, "optimizer", None)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if optimizer is None:
        found = _numbers([("learning rate", getattr(args, "learning_rate", None))])
    else:
        found = [("optimizer", type(optimizer).__name__), ("learning rate", _learning_rates(optimizer.param_groups))]
    # Only of a scheduler that Trainer made itself do its arguments tell the kind.
    if getattr(trainer, "_created_lr_scheduler", False) or getattr(trainer, "lr_scheduler", None) is None:
        schedule = getattr(args, "lr_scheduler_type", None)
        schedule = getattr(schedule, "value", schedule)
        if schedule in {known.value for known in SchedulerType}:  # a word of transformers' own list
            found.append(("learning rate schedule", schedule))
    return [fact for fact in found if fact[1]]


def _learning_rates(groups: list[dict[str, Any]]) -> str:
    """The initial rates, by part where `parameter_groups` named them."""
    rates: dict[str, list[str]] = {}
    for group in groups:
        rate: Any = group.get("initial_lr", group.get("lr"))  # where schedulers keep the rate that they began with
        name = group.get("name")
        if _is_number(rate):
            parts = rates.setdefault(_shown(rate), [])
            parts += [name] if isinstance(name, str) and _GROUP.fullmatch(name) and name not in parts else []
    if len(rates) == 1:
        return next(iter(rates))
    return ", ".join(f"{rate} ({', '.join(parts)})" if parts else rate for rate, parts in rates.items())


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
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return [("versions", ", ".join(found))]


def _numbers(found: list[tuple[str, Any]]) -> Facts:
    return [(label, _shown(value)) for label, value in found if _is_number(value)]


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
        commits: the bases' repositories, with the commit of each, None where that is not known.
        given: licences by repository, which are taken as they are.
        token: of the Hub, which is asked for the others; False asks nothing.

    Raises:
        ValueError: a given licence that is no identifier such as ``apache-2.0``.
    """
    given = {repo_id: _identifier(name, f"licenses[{repo_id!r}]") for repo_id, name in (given or {}).items()}
    asked = {} if token is False else {repo_id: commit for repo_id, commit in commits.items() if repo_id not in given}
    found = given | {repo_id: _asked_license(repo_id, commit, token) for repo_id, commit in asked.items()}
    return {repo_id: found.get(repo_id) for repo_id in commits}


def _asked_license(repo_id: str, commit: str | None, token: str | bool | None) -> str | None:
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
    """The metadata of a card that tells its licence.

    Args:
        own: what the user said.
        bases: of every part; None where it is not known.

    Returns:
        the user's word; else the one that all bases have; ``other`` where known ones differ; nothing where one is
        unknown, since an unknown licence allows no promise.

    Raises:
        ValueError: `own` is no licence identifier.
    """
    if own is not None:
        return {"license": _identifier(own, "license")}
    found = list(bases)
    known = {name for name in found if name is not None}
    if len(known) > 1:
        return {"license": "other", "license_name": "those-of-its-parts"}
    return {"license": known.pop()} if known and None not in found else {}


# ---- the example: items that it makes itself, and imports


class Examples(NamedTuple):
    """Python for a message about one item of each kind.

    Attributes:
        imports: lines that the parts need.
        parts: of the message's content.
        left_out: modalities of which no item can be made: no processor, arguments of their own, an unknown kind.
    """

    imports: list[str]
    parts: list[str]
    left_out: list[str]


def examples(model: Any, processor: Any) -> Examples:
    """Items for a composed model and its processor; by kind where one modality, or a group that shares its items, has it."""
    items = {name: _item(encoder, processor.processors.get(name)) for name, encoder in model.encoders.items()}
    left_out = [name for name, item in items.items() if item is None]
    found: dict[str, dict[str, str]] = {}
    for name, item in items.items():
        kind = model.encoders[name].kind
        same = model.config.modalities_of_kind(kind)
        together = len(same) == 1 or any(set(same) <= set(group) for group in model.config.share_inputs)
        # A part of the type "text" is the message's own.
        by_kind = together and kind != "text" and not set(same) & set(left_out)
        if item is not None:
            found.setdefault(kind if by_kind else name, item)
    parts = [
        ", ".join(f'"{key}": {value}' for key, value in {"type": f'"{type}"', **found[type]}.items()) for type in found
    ]
    imports = [line for use, line in _IMPORTS.items() if any(use in part for part in parts)]
    return Examples(imports, [f"{{{part}}}" for part in parts], left_out)


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
        importable = all(word.isidentifier() for word in words) and words[0] not in ("__main__", "transformers_modules")
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
