"""What a live part is, as a configuration says it: its class by name, and what its constructor was given besides."""

import copy
import functools
import inspect
import itertools
import re
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .classes import TRANSFORMERS_CLASS, class_beside, resolve_class
from .weightless import build_without_weights, without_dtypes


def class_name(cls: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The name to store: the class's own where it leads back to it, else a path in transformers; ValueError if none does."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    if TRANSFORMERS_CLASS.fullmatch(path):  # a bare name must lead back to it whatever else is imported
        return cls.__name__ if class_beside(config, cls.__name__) is cls else path
    try:
        found = resolve_class(cls.__name__, config, cls.__name__)
    except ValueError:
        found = None
    if found is not cls:
        raise ValueError(
            f"{path} cannot be found by its name: define it at the top of a module, by a name that no other model class has."
        )
    return cls.__name__


def constructor_options(model: PreTrainedModel) -> dict[str, Any]:
    """Constructor arguments of a model that its configuration does not hold, e.g. ``{"add_pooling_layer": False}``.

    Empty when the defaults fit, or when nothing does (saving then says so).
    """
    # transformers does not keep them, so a model without weights is built with each combination of boolean arguments until
    # the parameters' names are those of the given one.
    parameters = list(inspect.signature(type(model).__init__).parameters.values())[2:]  # behind `self` and `config`
    flipped = [(p.name, not p.default) for p in parameters if isinstance(p.default, bool)]
    if not flipped:
        return {}
    # Names as they were before adapters were put around layers.
    keys = [key for key in model.state_dict() if not re.search(r"\.(lora_\w+|ia3_\w+|modules_to_save)\.", key)]
    expected = {key.replace(".base_layer.", ".").replace(".original_module.", ".") for key in keys}
    config = without_dtypes(copy.deepcopy(model.config))
    for chosen in sorted(itertools.product((False, True), repeat=len(flipped)), key=sum):  # the fewest changes first
        options = dict(itertools.compress(flipped, chosen))
        candidate = build_without_weights(functools.partial(type(model), config, **options))
        if set(candidate.state_dict()) == expected:
            return options
    return {}
