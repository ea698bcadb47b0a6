"""What a checkpoint says of a part by name: its class, found again safely, its implementations of attention, its origin.

Only transformers' own modules are imported; any other class must have been imported by the user already.
"""

import copy
import functools
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .adapters import unwrapped
from .registries import OR_TRUST, last_definition
from .weightless import build_without_weights, without_dtypes

CODE_ENTRY = "multimodal_code"  # the module in a checkpoint's own code that an `auto_map` names
TRANSFORMERS_CLASS = re.compile(r"(transformers\.models\.\w+\.modeling_\w+)\.(\w+)")


def subclasses_of(cls: type) -> Iterator[Any]:
    """All imported classes below one, however deep; those with two bases below it twice."""
    sub: Any
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses_of(sub)


def class_beside(config: PreTrainedConfig, name: str) -> type[PreTrainedModel] | None:
    """The class of that name in the modeling module of a configuration of transformers."""
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    return _attribute(module, name) if module.startswith("transformers.models.") else None


def _attribute(module: str, name: str) -> type[PreTrainedModel] | None:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError:
        return None
    return found if inspect.isclass(found) and issubclass(found, PreTrainedModel) else None


def resolve_class(name: str, config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    """The model class that `class_name` named (ValueError: none in transformers, and none or several among imported ones)."""
    # Never by importing what a name says: a full path has the form of transformers' own, a bare name is looked for beside
    # the configuration's class, and then among the classes that somebody has imported already.
    match = TRANSFORMERS_CLASS.fullmatch(name or "")
    found = _attribute(match[1], match[2]) if match else None
    if found := found or (class_beside(config, name) if name else None):
        return found
    # Classes without a `forward` are bases, made to be inherited from.
    named = {c for c in subclasses_of(PreTrainedModel) if c.__name__ == name and c.forward is not nn.Module.forward}
    imported = last_definition([cls for cls in named if cls.config_class is type(config)] or list(named))
    if len(imported) == 1:
        return imported[0]
    raise ValueError(
        f"{where}: the model class {name!r} is not in transformers; expected one imported class of that name for "
        f"{type(config).__name__}, found {len(imported)}. Import the file that defines it {OR_TRUST}"
    )


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model class that transformers' Auto classes choose for a configuration, or None."""
    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


class SharedConfig(PreTrainedConfig):
    """The stored values of a configuration whose class is part of a checkpoint's own code, which has not been run."""

    def __init__(self, **kwargs):
        self.stored = kwargs.pop("stored", {})
        super().__init__()
        self.model_type = self.stored.get("model_type", "")  # an attribute of the class elsewhere
        self.__dict__.update({key: value for key, value in self.stored.items() if not hasattr(self, key)})

    def to_dict(self) -> dict[str, Any]:
        """The stored values."""
        return {"transformers_version": None, **copy.deepcopy(self.stored)}


class SharedCode:
    """Base of the classes that a checkpoint's code holds."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing: `save_pretrained(..., include_code=True)` carries the code, for every Auto class."""
        # transformers marks a class that it loaded as remote code, and then copies files on its own whenever an object of
        # it is saved; `code_bundle` does that here, completely, so the mark is not set.


def carries_code(auto_map: Any) -> bool:
    """Whether an ``auto_map`` names the code of a checkpoint that was saved with ``include_code=True``."""
    return code_source(auto_map) is not None


def code_source(auto_map: Any) -> str | None:
    """The repository that the code is taken from, "" for the checkpoint's own; None where no code is named."""
    references = [x for x in auto_map.values() if isinstance(x, str)] if isinstance(auto_map, dict) else []
    # "multimodal_code.Class", or "user/name--multimodal_code.Class" for the code of another repository.
    split = [reference.rpartition("--") for reference in references]
    return next((repo for repo, _, name in split if name.partition(".")[0] == CODE_ENTRY), None)


# ---- implementations.  transformers stores none and sets those of all parts from the whole's on loading: a model whose
# encoder ran with "sdpa" and whose language model ran with "eager" would come back with other bits.
FAMILIES = ("attn", "experts")


def part_implementations(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """``{part: {"attn": value, "experts": value}}``: names, or ``{"": name, part below: name}`` as in transformers."""
    found = {}
    for key in config.sub_configs:
        if not key.endswith("_projector_config"):
            values = {family: _implementation(getattr(config, key, None), family) for family in FAMILIES}
            found[key] = {family: value for family, value in values.items() if value}
    return {key: values for key, values in found.items() if values}


def _implementation(part: Any, family: str) -> Any:
    own = getattr(part, f"_{family}_implementation_internal", None)
    # A kernel repository is code: it is never taken from a checkpoint, so none is written.
    own = own if isinstance(own, str) and "/" not in own else None
    parts = {key: getattr(part, key, None) for key in getattr(part, "sub_configs", None) or {}}  # vision in a CLIP
    below = {key: _implementation(x, family) for key, x in parts.items() if isinstance(x, PreTrainedConfig)}
    if all(value == own for value in below.values()):
        return own
    return {key: value for key, value in {"": own, **below}.items() if value}


def apply_implementations(config: PreTrainedConfig, stored: Mapping[str, Any]) -> None:
    """Give parts that have none yet their stored implementations (in place); ValueError for what is no name of one."""
    for key, values in stored.items():
        part = getattr(config, key, None) if key in config.sub_configs else None
        if not isinstance(values, dict) or not isinstance(part, PreTrainedConfig) or not set(values) <= set(FAMILIES):
            parts = list(config.sub_configs)
            raise ValueError(f"part_implementations names {key!r}: {values!r}, expected some of {parts}.")
        for family, value in values.items():
            _check_names(value, key, family)
            # What the caller asks for (attn_implementation=) is there already, and counts more.
            if getattr(part, f"_{family}_implementation_internal", None) is None:
                setattr(part, f"_{family}_implementation", value)


def _check_names(value: Any, key: str, family: str) -> None:
    if isinstance(value, dict) and value:
        for below, each in value.items():
            _check_names(each, f"{key}.{below}" if below else key, family)
    elif not isinstance(value, str) or "/" in value:
        raise ValueError(
            f"{key} asks for the {family} implementation {value!r}: kernels from a repository are code, pass "
            f"attn_implementation={value!r} yourself if you trust it."
        )


# ---- origins: from which repository each part came, so that a checkpoint may refer to it instead of holding its weights.
COMMIT = re.compile(r"[0-9a-f]{40}")
KEYS = ("repo_id", "revision", "requested_revision", "subfolder", "class", "select")


def names_repository(value: Any) -> bool:
    """Whether this is a ``user/name`` or ``name`` of the Hub."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return isinstance(value, str)


def is_repo_id(name: Any) -> bool:
    """Whether a text is the id of a repository, and no path of this machine."""
    return names_repository(name) and not os.path.exists(name)


def origin_of(given: Any, part: nn.Module) -> dict[str, Any] | None:
    """What a model `given`, of which a `part` or all is used, was loaded from, by `KEYS`; None if that was not the Hub.

    `revision` is None, since a loaded model does not know its commit: who loads it may tell, and `references` looks it up.
    """
    root, inner = unwrapped(given), unwrapped(part)
    if not isinstance(root, PreTrainedModel) or not is_repo_id(root.name_or_path):
        return None
    select = next((name for name, module in root.named_modules() if module is inner), None)  # "vision_model", or ""
    if select is None:
        return None
    path = f"{type(root).__module__}.{type(root).__qualname__}"
    name = path if TRANSFORMERS_CLASS.fullmatch(path) else type(root).__name__
    return dict(zip(KEYS, (root.name_or_path, None, None, "", name, select), strict=True))


def check_origins(origins: Any) -> dict[str, dict[str, Any]] | None:
    """The `origins` of a configuration; ValueError if not ``{component: {key: text or None}}`` with the keys of `origin_of`."""
    if not origins:
        return None
    entries = origins if isinstance(origins, dict) else {"origins": origins}
    for name, entry in entries.items():
        texts = isinstance(entry, dict) and all(value is None or isinstance(value, str) for value in entry.values())
        if not texts or set(entry) - set(KEYS) or not names_repository(entry.get("repo_id")):
            expected = f"texts under some of {KEYS}, with a repo_id"
            raise ValueError(f"origins[{name!r}] must be {expected}, got {entry!r:.200}.")
    return {name: dict(entry) for name, entry in entries.items()}


# ---- a live part as a configuration says it: its class by name, and what its constructor was given besides


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
    if (own := getattr(model, "constructor_options", None)) is not None:  # one that keeps them
        return own
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
