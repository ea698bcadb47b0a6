"""The files of a checkpoint, looked at before anything in them is used: which there are, what they name, what they hold.

`check_files` is called before a configuration is believed, `stored_shapes` gives `build_bounds` what to compare with.
"""

import json
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..limits import cap
from ..parts.build_bounds import build_guard
from ..parts.stored_values import SHARD, check_auto_map, read_json
from .finding import CONFIG, DESCRIPTIONS, INDEX, WEIGHTS, CheckpointFiles, of_variant
from .folder_swap import valid_folder
from .manifest import Composition, checked_composition, first_weights


def check_files(files: CheckpointFiles, variant: str | None = None) -> Mapping[str, Any]:
    """Refuse a checkpoint whose files name something outside of it, or hold pickled code.

    Args:
        files: of the checkpoint; of a repository only the configuration and the index of shards are fetched.
        variant: as in `from_pretrained`.

    Returns:
        the configuration's values; empty where there is none.

    Raises:
        ValueError: a path that leaves the folder, weights other than safetensors, an `auto_map` of elsewhere, a
            JSON file that has a key twice (its values are the configuration class's to check).
    """
    if ".." in os.path.normpath(files.subfolder or ".").split(os.sep) or os.path.isabs(files.subfolder):
        raise ValueError(f"subfolder {files.subfolder!r} leaves {files.source}.")
    config: Mapping[str, Any] = {}
    for name in DESCRIPTIONS if files.is_local else (CONFIG,):
        if (path := files.find(name)) is not None:
            values = read_json(path, f"{files.source}: {name}")
            _check_description(values, files, name)
            config = values if name == CONFIG else config
    if files.is_local:
        _check_weight_names(files, variant, config.get("transformers_weights"))
    return config


def _check_description(values: Any, files: CheckpointFiles, name: str) -> None:
    where = f"{files.source}: {name}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold one JSON object, got {type(values).__name__}.")
    check_auto_map(values.get("auto_map"), where, None if files.is_local else files.source, here_only=True)
    if name != CONFIG:
        return
    explicit = values.get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and _is_weights(explicit)):
        raise ValueError(
            f"{where}: transformers_weights is {explicit!r:.200}, expected a safetensors file of this folder."
        )


def _is_weights(name: str) -> bool:
    bare = name.removesuffix(".index.json")
    return SHARD.fullmatch(bare) is not None and not name.startswith(".")


def _check_weight_names(files: CheckpointFiles, variant: str | None, explicit: str | None) -> None:
    for name in {of_variant(INDEX, variant), explicit or ""}:
        if name.endswith(".json") and (index := files.find(name)) is not None:
            shards(index, files.source)
    inside = os.listdir(files.folder)
    safe = [name for name in inside if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickled = sorted(
        name for name in inside if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json"))
    )
    if pickled and not safe:  # beside safetensors no pickle is opened
        raise ValueError(
            f"{files.source} holds weights as {pickled[0]} only: pickled files can run code when they are read. Ask for "
            "safetensors files, or convert them where you trust their source."
        )


def shards(index: str, source: str) -> dict[str, str]:
    """``{tensor: file}`` of an index of shards.

    Raises:
        ValueError: a file that is no safetensors file beside the index.
    """
    values = read_json(index, f"{source}: {os.path.basename(index)}")
    found = values.get("weight_map") if isinstance(values, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(values.get("metadata", {}), Mapping):
        raise ValueError(f"{source}: the index of shards must hold a weight_map and metadata, got {values!r:.100}.")
    for name, file in found.items():
        if not isinstance(file, str) or not SHARD.fullmatch(file) or file.startswith("."):
            raise ValueError(
                f"{source}: the index of shards says that {name!r:.100} lies in {file!r:.200}, expected a safetensors file "
                "beside it."
            )
    return dict(found)


def stored_shapes(
    files: CheckpointFiles, variant: str | None = None, explicit: str | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all stored tensors by name, from the files' headers alone; None where the checkpoint has no weights here.

    Args:
        files: of the checkpoint.
        variant: as in `from_pretrained`.
        explicit: the configuration's `transformers_weights`.

    Raises:
        ValueError: a shard is missing, or a file is no safetensors file.
    """
    whole, index = of_variant(WEIGHTS, variant), of_variant(INDEX, variant)
    if explicit is not None:
        whole, index = (explicit, "") if explicit.endswith(".safetensors") else ("", explicit)
    path = files.find(whole) if whole else None
    if path is not None:
        return header_shapes(path)
    listed = files.find(index) if index else None
    if listed is None:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(shards(listed, files.source).values())):
        shard = files.find(name)
        if shard is None:
            raise ValueError(f"{files.source}: the shard {name} is missing.")
        found |= header_shapes(shard)
    return found


def header_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one safetensors file (ValueError for another file); no data is read.

    The header alone: 8 bytes with its length, then JSON (https://github.com/huggingface/safetensors#format).  Reading it by
    the library costs as much as all other checks of a load together, for one tensor at a time.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # The length is the file's own claim: it must fit into the file, and into the cap.
        text = file.read(length) if length <= min(size - 8, cap("MAX_CONFIG_BYTES")) else b""
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(map(operator.index, entry["shape"])) for name, entry in tensors.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({type(error).__name__}: {error!s:.100}).") from error
    if 8 + length + end != size:  # its length, the header and the data, and no byte more
        raise ValueError(f"{path} is no whole safetensors file: it has {size} bytes, expected {8 + length + end}.")
    return shapes


class Checked(NamedTuple):
    """A checkpoint whose files may be used.

    Args:
        files: where they lie.
        options: of `from_pretrained`, with which transformers finds the same files.
        composition: what `composition.json` says; None where there is none, as in checkpoints of other programs.
        shapes: of the stored tensors by name; None where the checkpoint has no weights of its own.
        sized: whether the model's tensors must have these very shapes.
    """

    files: CheckpointFiles
    options: dict[str, Any]
    composition: Composition | None
    shapes: dict[str, tuple[int, ...]] | None
    sized: bool


def checked_files(
    source: str | os.PathLike, options: Mapping[str, Any], verify: bool, asks_what_is_missing: bool = False
) -> Checked:
    """Find the valid files of a checkpoint, compare them with what was saved, and refuse what they must not say.

    Args:
        source: folder or repository id.
        options: of `from_pretrained`.
        verify: whether the hashes of all files are compared, and not only the sizes of weight files.
        asks_what_is_missing: whether the caller wants to be told what was loaded (`output_loading_info`): a weight file of
            another size, exchanged on purpose, is then a warning.

    Raises:
        FileNotFoundError: a file is missing.
        OSError: `source` is neither a folder nor the id of a repository.
        ValueError: a file is not what was saved; nothing to verify by; as `check_files`, `stored_shapes` raise.
    """
    options = dict(options)
    variant = options.get("variant")
    folder = os.path.join(source, options.get("subfolder") or "")
    if os.path.isdir(folder) and (valid := valid_folder(folder, CONFIG)) != folder:
        source, options["subfolder"] = valid, ""
    files = CheckpointFiles(source, options)
    values = check_files(files, variant)
    composition = checked_composition(files, variant, verify, asks_what_is_missing)
    explicit = first_weights(composition, variant) if composition is not None else None
    shapes = None
    # With references the shapes of all tensors are known only once the bases are read.
    if composition is None or not composition.references:
        shapes = stored_shapes(files, variant, explicit or values.get("transformers_weights"))
    # Quantized, renamed or mismatched weights have other names or shapes than the model that is built.
    others = (values.get("quantization_config"), options.get("quantization_config"), options.get("key_mapping"))
    return Checked(files, options, composition, shapes, not any(others) and not options.get("ignore_mismatched_sizes"))


def guarded(checked: Checked) -> Any:
    """Bound what is built within by what the checkpoint holds; see `build_bounds.build_guard`."""
    return build_guard(checked.shapes, sized=checked.sized)
