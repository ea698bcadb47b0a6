"""What is done before transformers loads a composed model: find the valid files, check them, join bases and changes."""

import contextlib
import copy
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..parts.build_bounds import Shapes, build_guard
from ..parts.stored_values import read_json
from ..parts.weightless import build_without_weights, without_dtypes
from .files import Checked, checked_files, guarded
from .finding import ADAPTERS, COMPOSITION, CONFIG, DELTA, GENERATION, PLACES, CheckpointFiles
from .manifest import REMEDY, Composition, components_of, first_weights, read_composition
from .references import assemble_state
from .references import write_reference as write_reference


class LoadPlan(NamedTuple):
    """How transformers shall load: from `source`, or where that is None from a `state_dict` among the options."""

    source: str | None
    options: dict[str, Any]
    files: CheckpointFiles | None = None
    guard: Any = contextlib.nullcontext()
    composition: Composition | None = None


def plan_load(
    model_class: type[PreTrainedModel],
    source: Any,
    options: dict[str, Any],
    bases: Mapping[str, str] | None,
    verify: bool,
    asks_what_is_missing: bool = False,
) -> LoadPlan:
    """Check the files of a checkpoint, and read those that transformers cannot.

    Args:
        model_class: the class to build.
        source: folder or repository id, as given to `from_pretrained`.
        options: the other arguments of `from_pretrained`.
        bases: see `references.assemble_state`.
        verify: whether hashes are compared, and not sizes alone.
        asks_what_is_missing: see `files.checked_files`.

    Raises:
        ValueError: a file that is missing, or is not what was saved; names it.
        OSError: a repository that cannot be read.
    """
    if source is None or options.get("gguf_file") or os.path.isfile(source):
        return LoadPlan(source, options)  # a state, a GGUF or one single file: there is no folder to check
    checked = checked_files(source, options, verify, asks_what_is_missing)
    files, options, composition = checked.files, checked.options, checked.composition
    source = files.source
    if composition is None:
        if bases:
            raise ValueError(f"{source} has no {COMPOSITION} that names a base, so bases= cannot replace one.")
        return LoadPlan(source, options, None, guarded(_base_of_adapters(checked)))
    config, options = _config_of(model_class, files, options)
    if composition.references:
        return _by_reference(model_class, files, composition, config, options, bases, verify)
    if bases:
        raise ValueError(f"bases names {sorted(bases)}, but {source} holds all of its weights itself.")
    if options.get("variant") is None and (name := first_weights(composition, None)):
        config.transformers_weights = name  # and no other file, however it came into the folder
    # The configuration is handed over as it was checked, and not read from the file again.
    return LoadPlan(source, options | {"config": config} | _hub(files), files, guarded(checked), composition)


def _base_of_adapters(checked: Checked) -> Checked:
    """Of a folder of adapters alone, the checkpoint below them, which transformers loads."""
    files = checked.files
    if files.find(CONFIG) is not None or (path := files.find(ADAPTERS)) is None:
        return checked
    base = read_json(path, f"{files.source}: {ADAPTERS}").get("base_model_name_or_path")
    if not isinstance(base, str) or base == files.source:
        return checked
    # The subfolder and the commit were those of the adapters.
    return checked_files(base, {k: v for k, v in checked.options.items() if k not in ("subfolder", "revision")}, False)


def _config_of(
    model_class: type[PreTrainedModel], files: CheckpointFiles, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The configuration, a copy that may be changed, and the options that are not about it."""
    options = dict(options)
    given = options.pop("config", None)
    if isinstance(given, model_class.config_class or PreTrainedConfig):
        return copy.copy(given), options  # transformers makes a deep copy itself
    # The options that are for loading alone, and that a configuration would otherwise take for its own.
    kept = {key: options.pop(key) for key in ("dtype", "torch_dtype", "quantization_config") if key in options}
    hub = {key: options.pop(key) for key in PLACES if key in options}
    source = files.source if given is None else given
    config, unused = model_class.config_class.from_pretrained(
        source, return_unused_kwargs=True, **files.options, **options
    )
    return config, {**unused, **kept, **hub}


def _hub(files: CheckpointFiles) -> dict[str, Any]:
    return {} if files.is_local else {"revision": files.options.get("revision")}


def _by_reference(
    model_class: type[PreTrainedModel],
    files: CheckpointFiles,
    composition: Composition,
    config: MultimodalConfig,
    options: dict[str, Any],
    bases: Mapping[str, str] | None,
    verify: bool,
) -> LoadPlan:
    """Load the changes and the bases into one state, from which transformers makes the model."""

    def build(shapes: Shapes) -> PreTrainedModel:
        def build_guarded() -> PreTrainedModel:
            with build_guard(shapes, sized=False):
                return model_class(without_dtypes(copy.deepcopy(config)))

        return build_without_weights(build_guarded)

    if unknown := sorted(composition.references.keys() - set(components_of(config))):
        raise ValueError(
            f"{files.source}: {COMPOSITION} refers to {unknown}, the configuration has {components_of(config)}: they do not "
            "belong together."
        )
    if (changed := files.find(DELTA)) is None:
        raise FileNotFoundError(
            f"{files.source}: {COMPOSITION} refers to bases of {sorted(composition.references)}, but {DELTA} with all else is "
            f"missing. {REMEDY}"
        )
    stored = load_file(changed)
    state = assemble_state(build, stored, composition.references, bases, options, verify)
    guard = build_guard({name: tuple(tensor.shape) for name, tensor in state.items()}, sized=False)
    # What is loaded lies in memory now: options about files would send transformers to look for some.
    options = {key: value for key, value in options.items() if key not in (*PLACES, "variant", "use_safetensors")}
    return LoadPlan(None, options | {"config": config, "state_dict": state}, files, guard, composition)


def finish_load(model: PreTrainedModel, loading: LoadPlan, info: Mapping[str, Any]) -> None:
    """Give a model that was loaded from a state what transformers reads from files (in place).

    Raises:
        ValueError: tensors that did not reach the model; files that were replaced meanwhile.
    """
    files = loading.files
    if files is not None and files.is_local and loading.composition is not None:
        found = files.find(COMPOSITION)
        if found is None or read_composition(found) != loading.composition:
            raise ValueError(
                f"{files.source} was saved again while it was read, so what was read could be of both: load again."
            )
    if loading.source is not None or files is None:
        return
    if lost := {
        key: sorted(map(str, info[key]))[:3]
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(key)
    }:
        raise ValueError(f"{files.source} did not load completely: {lost}.")
    model.config.name_or_path = model.name_or_path = files.source
    if "generation_config" not in loading.options and files.find(GENERATION):
        model.generation_config = GenerationConfig.from_pretrained(files.source, **files.options)
