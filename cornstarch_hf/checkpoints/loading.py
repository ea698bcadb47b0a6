"""What is done before transformers loads a composed model: find the valid files, check them, join bases and changes."""

import copy
import os
from glob import glob
from typing import Any

from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..limits import check
from ..parts.build_bounds import Shapes, build_guard
from ..parts.stored_errors import explained
from ..parts.stored_values import fingerprint, read_json
from ..parts.weightless import build_without_weights, without_dtypes
from .files import checked_files, header_shapes
from .finding import (
    ADAPTERS,
    COMPOSITION,
    CONFIG,
    DELTA,
    GENERATION,
    PLACES,
    PROCESSOR_FILES,
    Bases,
    CheckpointFiles,
    Options,
)
from .manifest import REMEDY, Composition, LoadPlan, components_of, describe_files, first_weights, read_composition
from .references import assemble_state
from .references import write_reference as write_reference


def plan_load(
    model_class: Any, source: Any, options: Options, bases: Bases, verify: bool, wants_info: bool = False
) -> LoadPlan:
    """Check the files of a checkpoint (ValueError, OSError), and read those that transformers cannot."""
    if source is None or options.get("gguf_file") or os.path.isfile(source):
        return LoadPlan(source, dict(options))  # a state, a GGUF or one single file: there is no folder to check
    plan = checked_files(source, options, verify, wants_info)
    files: Any = plan.files
    composition = plan.composition
    if composition is None:
        if bases:
            raise ValueError(f"{files.source} has no {COMPOSITION} that names a base, so bases= cannot replace one.")
        _check_type(model_class, files, plan.options)
        return plan._replace(guard=_base_of_adapters(plan, files).guard)
    config, options = _config_of(model_class, files, plan.options, composition)
    if composition.references:
        return _by_reference(model_class, plan, config, options, bases, verify)
    if bases:
        raise ValueError(f"bases names {sorted(bases)}, but {files.source} holds all of its weights itself.")
    if options.get("variant") is None and (name := first_weights(composition, None)):
        config.transformers_weights = name  # and no other file, however it came into the folder
    # The configuration is handed over as it was checked, and not read from the file again.
    pinned = {"config": config} if files.is_local else {"config": config, "revision": files.options.get("revision")}
    return plan._replace(options={**options, **pinned})


def _check_type(model_class: Any, files: CheckpointFiles, options: Options) -> None:
    """ValueError for a checkpoint of another type, of which transformers would load what has equal names, without a word."""
    if "config" in options or (path := files.find(CONFIG)) is None:
        return
    values, expected = read_json(path, f"{files.source}: {CONFIG}"), model_class.config_class.model_type
    found = values.get("model_type") if isinstance(values, dict) else None
    if isinstance(found, str) and found != expected:
        raise ValueError(
            f"{files.source} holds a model of the type {found!r} ({CONFIG}), {model_class.__name__} loads {expected!r}: a "
            f"native multimodal model of transformers is taken apart by from_native({str(files.source)!r})."
        )


def check_processor_files(source: Any, options: Options) -> None:
    """Refuse files of a processor and its tokenizers that are beyond the caps (ValueError), before transformers reads them."""
    files = CheckpointFiles(source, options)
    inside = ["", *glob("*_tokenizer/", root_dir=files.folder)] if files.is_local else [""]
    for below in inside:
        for name, path in files.find_all(f"{below}{name}" for name in PROCESSOR_FILES).items():
            if path is None:
                continue
            where = f"{source}: {name}"
            if name.endswith(".json"):
                if not isinstance(values := read_json(path, where), dict):
                    raise ValueError(f"{where} must hold one JSON object, got {type(values).__name__}.")
            else:
                check(os.path.getsize(path), "MAX_CONFIG_BYTES", f"{where}: its size in bytes is")


def _base_of_adapters(plan: LoadPlan, files: CheckpointFiles) -> LoadPlan:
    """Of a folder of adapters alone, the checkpoint below them, which transformers loads."""
    if files.find(CONFIG) is not None or (path := files.find(ADAPTERS)) is None:
        return plan
    base = read_json(path, f"{files.source}: {ADAPTERS}").get("base_model_name_or_path")
    if not isinstance(base, str) or base == files.source:
        return plan
    # The subfolder and the commit were those of the adapters.
    return checked_files(base, {k: v for k, v in plan.options.items() if k not in ("subfolder", "revision")}, False)


def _config_of(
    model_class: type[PreTrainedModel], files: CheckpointFiles, options: Options, composition: Composition
) -> tuple[Any, dict[str, Any]]:
    """The configuration, a copy that may be changed, and the options that are not about it."""
    options = dict(options)
    given = options.pop("config", None)
    if isinstance(given, model_class.config_class or PreTrainedConfig):
        return copy.copy(_still_read(given, files, composition)), options  # transformers makes a deep copy itself
    # The options that are for loading alone, and that a configuration would otherwise take for its own.
    keys = ("dtype", "torch_dtype", "quantization_config", *PLACES)
    kept = {key: options.pop(key) for key in keys if key in options}
    source = files.source if given is None else given
    options |= {"return_unused_kwargs": True, **files.options}
    config, unused = model_class.config_class.from_pretrained(source, **options)
    return config, {**unused, **kept}


def _still_read(config: Any, files: CheckpointFiles, composition: Composition) -> Any:
    """A given configuration, read anew where it came from an earlier save into this folder: the Auto classes read it before
    anything else.  ValueError where it was changed besides, and so belongs to weights that are gone."""
    known, path = getattr(config, "read_from", None), files.find(CONFIG) if files.is_local else None
    if known is None or path is None:
        return config
    place = os.path.abspath(files.source)
    if os.path.basename(place).startswith(".saved-"):  # of an interrupted save, within the folder that was named
        place = os.path.dirname(place)
    # A file that was edited by hand is of no save.
    saved = composition.manifest.get(CONFIG)
    if os.path.abspath(config.name_or_path or "") != place or describe_files({CONFIG: path})[CONFIG] != saved:
        return config
    before, unchanged, arguments = known
    values = type(config)._dict_from_json_file(path)
    if fingerprint(values) == before:
        return config
    arguments = {key: value for key, value in arguments.items() if key != "return_unused_kwargs"}
    again, now = type(config).from_dict(values, **arguments), fingerprint(config.to_dict())
    if fingerprint(again.to_dict()) == now:  # saved since by the model that it belongs to, for example
        return config
    if now != unchanged:
        raise ValueError(
            f"{files.source} was saved again since its configuration was read, which was changed meanwhile: read the "
            "configuration again, change that one, and load with it."
        )
    return again.with_shared_parts()


def _by_reference(
    model_class: Any, plan: LoadPlan, config: MultimodalConfig, options: Options, bases: Bases, verify: bool
) -> LoadPlan:
    """Load the changes and the bases into one state, from which transformers makes the model."""
    files: Any = plan.files
    references: Any = plan.composition.references

    def build(shapes: Shapes) -> PreTrainedModel:
        def build_guarded() -> PreTrainedModel:
            with build_guard(shapes, sized=False, whose=f"{files.source}: {CONFIG}"):
                return model_class(without_dtypes(copy.deepcopy(config)))

        return build_without_weights(build_guarded)

    if unknown := sorted(references.keys() - set(components_of(config))):
        raise ValueError(
            f"{files.source}: {COMPOSITION} refers to {unknown}, the configuration has {components_of(config)}: they do not "
            "belong together."
        )
    if (changed := files.find(DELTA)) is None:
        raise FileNotFoundError(
            f"{files.source}: {COMPOSITION} refers to bases of {sorted(references)}, but {DELTA} with all else is "
            f"missing. {REMEDY}"
        )
    header_shapes(changed)  # refuses a file that is broken, by its name
    with explained(files.source):
        state = assemble_state(build, load_file(changed), references, bases, options, verify)
    guard = build_guard(
        {name: tuple(tensor.shape) for name, tensor in state.items()}, sized=False, whose=f"{files.source}: {CONFIG}"
    )
    # What is loaded lies in memory now: options about files would send transformers to look for some.
    options = {key: value for key, value in options.items() if key not in (*PLACES, "variant", "use_safetensors")}
    return plan._replace(source=None, options=options | {"config": config, "state_dict": state}, guard=guard)


def finish_load(model: PreTrainedModel, loading: LoadPlan, info: Options) -> None:
    """Give a model loaded from a state what transformers reads from files (in place); ValueError if tensors did not reach it,
    or files were replaced meanwhile."""
    files = loading.files
    if files is None:
        return
    if files.is_local and loading.composition is not None:
        found = files.find(COMPOSITION)
        if found is None or read_composition(found) != loading.composition:
            raise ValueError(
                f"{files.source} was saved again while it was read, and could be mixed of both: load again."
            )
    if loading.source is not None:
        return
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    if lost := {key: sorted(map(str, info[key]))[:3] for key in kinds if info.get(key)}:
        raise ValueError(f"{files.source} did not load completely: {lost}.")
    model.config.name_or_path = model.name_or_path = files.source
    if "generation_config" not in loading.options and files.find(GENERATION):
        model.generation_config = GenerationConfig.from_pretrained(files.source, **files.options)
