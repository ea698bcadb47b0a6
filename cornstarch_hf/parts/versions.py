"""Versions of transformers that are tested, and every name and hook of it that differs between versions.

Importing this module warns outside the tested range.  A checkpoint's own code carries it, where no installer checks.
"""

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations.peft import MIN_PEFT_VERSION

# CONTRIBUTING.md says what runs with which version; a checkpoint with code is held to the range that it was saved with.
OLDEST, BELOW = "5.20.2", "5.25"  # the oldest that is tested, and the first that is not
_FOUND = Version(transformers.__version__)
_RANGE = f"transformers >= {OLDEST}, < {BELOW}"
_REMEDY = f'Remedy: pip install "transformers>={OLDEST},<{BELOW}"'

# Keywords of a cache, the newest first: from 5.24 on one name stands for all; before it running states had one of their own.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# The keyword by which `generate` of this version hands a cache from step to step, None for an unknown one.
_known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE: Any = next((name for name in CACHE_NAMES if name in _known), None)
# What continuous batching gives to `forward`; its cache is `cache` in every version, and no kind of `Cache`.
PAGED_INPUTS = frozenset(PagedAttentionArgs.__annotations__)

# Methods of transformers' classes that this package overrides, and that nobody but transformers calls: renamed there, they
# would go on existing here, and nothing would fail.
GENERATION_HOOKS = (
    "_expand_multimodal_outputs", "_extract_generation_mode_kwargs", "_get_candidate_generator",
    "_get_logits_processor", "_maybe_prepare_encoder_kwargs_for_generation",
    "_prepare_cache_for_generation", "_prepare_position_ids_for_generation", "_supports_default_dynamic_cache",
    "_validate_model_kwargs", "heal_tokens", "prepare_inputs_for_generation",
)  # fmt: skip
MODEL_HOOKS = (
    "_get_dtype_plan", "_set_gradient_checkpointing", "get_expanded_tied_weights_keys", "init_parallel_plans",
    "init_weights", "initialize_weights",
)  # fmt: skip
PROCESSOR_HOOKS = ("_get_arguments_from_pretrained", "from_args_and_dict")


def take_cache(keywords: dict[str, Any], names: Iterable[str] = CACHE_NAMES) -> Any:
    """Take the cache out of keyword arguments (in place), whatever its name among `names`; None where there is none.

    TypeError for what is no cache, ValueError for two, or in a version of transformers whose name for it is unknown.
    """
    given = [(name, keywords.pop(name)) for name in names if name in keywords]
    given = [(name, cache) for name, cache in given if cache is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"A cache was given {len(given)} times, as {sorted(dict(given))}: give it once, as {CACHE}=.")
    check_caches_known()
    name, cache = given[0]
    if not hasattr(cache, "get_seq_length") and not is_paged(cache):
        raise TypeError(f"{name} must be a cache of transformers, e.g. DynamicCache(), got {type(cache).__name__}.")
    if name != CACHE == "cache" and not torch.compiler.is_compiling():  # a tracer cannot follow a warning
        warnings.warn(f"`{name}` is deprecated, as in transformers: use `cache`.", FutureWarning, stacklevel=3)
    return cache


def is_paged(cache: Any) -> bool:
    """Whether a cache is that of continuous batching, which holds many requests and tells no length."""
    return isinstance(cache, PagedAttentionCache)


def check_caches_known() -> None:
    """Refuse to work with a cache whose name is unknown (ValueError): it would be dropped, or continued wrongly."""
    if CACHE is None:
        raise ValueError(
            f"Composed models cannot generate, or take a cache, with transformers {_FOUND}: it names caches in a way that "
            f"is not known, they are tested with {_RANGE}. {_REMEDY}"
        )


@functools.cache
def check_hooks(owner: type, names: tuple[str, ...]) -> None:
    """Refuse to go on where a class of transformers lacks overridden methods (ValueError): nobody would call the override."""
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise ValueError(
            f"transformers {_FOUND} has no {owner.__name__}.{', '.join(missing)}, which composed models replace; they are "
            f"tested with {_RANGE}. {_REMEDY}"
        )


@functools.cache
def peft_is_behind() -> bool:
    """Whether PEFT is older than this version of transformers wants it: it knows caches by their former name."""
    try:
        return Version(importlib.metadata.version("peft")) < Version(MIN_PEFT_VERSION)
    except importlib.metadata.PackageNotFoundError:
        return False


def check_peft(method: str) -> None:
    """Refuse a method of transformers that needs a newer PEFT than there is (ValueError)."""
    if peft_is_behind():
        raise ValueError(
            f"{method}() of transformers {_FOUND} needs peft >= {MIN_PEFT_VERSION}, but peft "
            f"{importlib.metadata.version('peft')} is installed. Remedy: a newer peft; or get_peft_model(model, config), "
            "PeftModel.from_pretrained(model, folder) and AutoPeftModelForCausalLM.from_pretrained(folder), which work with "
            "this one."
        )


def _warn_if_untested() -> None:
    # Compared by numbers alone: a development version of 5.25 is outside, a release candidate of the oldest inside.
    if not Version(OLDEST).release <= _FOUND.release < Version(BELOW).release:
        told = f"cornstarch_hf is tested with {_RANGE}, but transformers {_FOUND} is installed. {_REMEDY}"
        warnings.warn(told, stacklevel=2)


_warn_if_untested()
