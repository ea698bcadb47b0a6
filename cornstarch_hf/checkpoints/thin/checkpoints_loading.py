"""What is done before transformers loads a checkpoint that holds all of its weights: find the valid files, compare them."""

import contextlib
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..code_folder import needs_package
from ..finding import CONFIG, CheckpointFiles
from ..folder_swap import valid_folder
from ..manifest import Composition, checked_composition


class LoadPlan(NamedTuple):
    """How transformers shall load."""

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
    """Compare the files of a checkpoint with what was saved.

    Raises:
        ValueError: a file that is missing, or is not what was saved; names it.
        OSError: a repository that cannot be read.
        ImportError: weights that lie in other repositories.
    """
    if source is None or options.get("gguf_file") or os.path.isfile(source):
        return LoadPlan(source, options)
    options = dict(options)
    folder = os.path.join(source, options.get("subfolder") or "")
    if os.path.isdir(folder) and (valid := valid_folder(folder, CONFIG)) != folder:
        source, options["subfolder"] = valid, ""
    files = CheckpointFiles(source, options)
    composition = checked_composition(files, options.get("variant"), verify, asks_what_is_missing)
    if bases or (composition is not None and composition.references):
        raise needs_package("What loads weights from other repositories")
    pinned = {} if files.is_local else {"revision": files.options.get("revision")}
    return LoadPlan(files.source, options | pinned, files, composition=composition)


def finish_load(model: PreTrainedModel, loading: LoadPlan, info: Mapping[str, Any]) -> None:
    """Nothing is left to do."""


def write_reference(
    model: PreTrainedModel,
    folder: str,
    referenced: Collection[str],
    bases: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """ImportError: what to install."""
    raise needs_package("What stores a model by reference (embed=False)")
