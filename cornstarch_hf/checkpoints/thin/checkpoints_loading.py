"""What is done before transformers loads a checkpoint that holds all of its weights: find the valid files, compare them."""

import os
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

from ..code_folder import needs_package
from ..finding import CONFIG, Bases, CheckpointFiles, Options
from ..manifest import LoadPlan, checked_composition, valid_place


def plan_load(
    model_class: Any, source: Any, options: Options, bases: Bases, verify: bool, wants_info: bool = False
) -> LoadPlan:
    """Compare the files of a checkpoint with what was saved (ValueError, OSError, ImportError for weights elsewhere)."""
    if source is None or options.get("gguf_file") or os.path.isfile(source):
        return LoadPlan(source, dict(options))
    source, options = valid_place(source, options, CONFIG)
    files = CheckpointFiles(source, options)
    composition = checked_composition(files, options.get("variant"), verify, wants_info)
    if bases or (composition is not None and composition.references):
        raise needs_package("What loads weights from other repositories")
    pinned = {} if files.is_local else {"revision": files.options.get("revision")}
    return LoadPlan(files.source, {**options, **pinned}, files, composition=composition)


def check_processor_files(source: Any, options: Options) -> None: ...


def finish_load(model: PreTrainedModel, loading: LoadPlan, info: Options) -> None: ...


def write_reference(
    model: PreTrainedModel, folder: str, referenced: Collection[str], bases: Bases, options: Options
) -> dict[str, dict[str, Any]]:
    raise needs_package("What stores a model by reference (embed=False)")
