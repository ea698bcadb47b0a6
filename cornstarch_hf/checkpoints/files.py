"""The files of a checkpoint, looked at before anything in them is used: which there are, what they name, what they hold.

`check_files` is called before a configuration is believed, `stored_shapes` gives `build_bounds` what to compare with.
"""

import json
import math
import operator
import os
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from ..limits import cap, is_count
from ..parts.build_bounds import build_guard
from ..parts.stored_errors import make_config
from ..parts.stored_values import (
    SHARD,
    check_auto_map,
    check_number_of_values,
    check_quantization,
    check_types,
    check_values,
    read_json,
)
from .finding import CONFIG, DESCRIPTIONS, GENERATION, INDEX, WEIGHTS, CheckpointFiles, Options
from .manifest import LoadPlan, checked_composition, first_weights, valid_place


def of_variant(name: str, variant: str | None) -> str:
    """The name of a weight file, or of an index of shards, of a variant (ValueError: the variant is no plain word)."""
    if variant is None:
        return name
    if not variant.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"variant must be a plain word, got {variant!r}.")
    stem, _, rest = name.partition(".safetensors")
    # transformers puts the variant behind "index" in an index's name, and before the ending of a weight file.
    return f"{stem}.safetensors.index.{variant}.json" if "index" in rest else f"{stem}.{variant}.safetensors"


def check_files(
    files: CheckpointFiles, variant: str | None = None, options: Options | None = None
) -> Mapping[str, Any]:
    """Refuse a checkpoint whose files name something outside of it, or hold pickled code; returns its configuration's values.

    Of a repository only the configurations of model and generation, and the index of shards, are fetched.

    Raises:
        ValueError: a path that leaves the folder, weights other than safetensors, an `auto_map` of elsewhere, quantization by
            kernels that the `options` of loading do not allow, a JSON file that has a key twice (its values are the
            configuration class's to check).
    """
    if ".." in os.path.normpath(files.subfolder or ".").split(os.sep) or os.path.isabs(files.subfolder):
        raise ValueError(f"subfolder {files.subfolder!r} leaves {files.source}.")
    config: Mapping[str, Any] = {}
    for name in DESCRIPTIONS if files.is_local else (CONFIG, GENERATION):
        if (path := files.find(name)) is not None:
            where = f"{files.source}: {name}"
            values = read_json(path, where)
            if not isinstance(values, Mapping):
                raise ValueError(f"{where} must hold one JSON object, got {type(values).__name__}.")
            check_auto_map(values.get("auto_map"), where, None if files.is_local else files.source, here_only=True)
            config = values if name == CONFIG else config
            if name == GENERATION:
                _check_generation(values, where)
    check_quantization(config, f"{files.source}: {CONFIG}", options or {})
    explicit = config.get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and _is_weights(explicit.removesuffix(".index.json"))):
        raise ValueError(
            f"{files.source}: {CONFIG}: transformers_weights is {explicit!r:.200}, expected a safetensors file of this folder."
        )
    if not files.is_local:
        return config
    for name in {of_variant(INDEX, variant), explicit or ""}:
        if name.endswith(".json") and (index := files.find(name)) is not None:
            shards(index, files.source)
    inside = os.listdir(files.folder)
    pickles = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
    pickled = sorted(name for name in inside if name.endswith(pickles))
    # Beside safetensors no pickle is opened.
    if pickled and not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in inside):
        raise ValueError(
            f"{files.source} holds weights as {pickled[0]} only: pickled files can run code when they are read. Ask for "
            "safetensors files, or convert them where you trust their source."
        )
    return config


# Of `generate`: what it compares and counts with, beyond what `GenerationConfig` looks at itself.
_NUMBERS = (
    *(
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "guidance_scale",
        "length_penalty",
        "max_time",
        "min_p",
    ),
    *("repetition_penalty", "temperature", "top_h", "top_p", "typical_p"),
)
_COUNTS = (
    *(
        "encoder_no_repeat_ngram_size",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "no_repeat_ngram_size",
    ),
    *("num_beam_groups", "num_beams", "num_return_sequences", "prefill_chunk_size", "top_k"),
)
_SWITCHES = (
    *("disable_compile", "do_sample", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
    *("remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "use_cache"),
)
_TOKENS = (
    *("begin_suppress_tokens", "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "pad_token_id", "suppress_tokens"),
)
_GENERATION: dict[str, tuple[type, ...]] = dict.fromkeys(_NUMBERS, (int, float)) | dict.fromkeys(_COUNTS, (int,))
_GENERATION |= dict.fromkeys(_SWITCHES, (bool,)) | dict.fromkeys(_TOKENS, (int, list))


def _check_generation(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings of `generate` that it does not take (ValueError)."""
    check_values(values, where)
    check_types(values, _GENERATION, where)
    for key in _TOKENS:
        listed = values[key] if isinstance(values.get(key), list) else []
        # Files of some Whisper models suppress -1, which is no token and means none.
        if wrong := [each for each in listed if each != -1 and not is_count(each, least=0)]:
            raise ValueError(f"{where}: {key} has {wrong[0]!r:.100}, expected ids of tokens.")
    make_config(GenerationConfig.from_dict, values, where)


def _is_weights(name: Any) -> bool:
    """Whether this is the name of a safetensors file, without a folder."""
    return isinstance(name, str) and SHARD.fullmatch(name) is not None and not name.startswith(".")


def shards(index: str, source: str) -> dict[str, str]:
    """``{tensor: file}`` of an index of shards (ValueError for a file that is no safetensors file beside the index)."""
    values = read_json(index, f"{source}: {os.path.basename(index)}")
    found = values.get("weight_map") if isinstance(values, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(values.get("metadata", {}), Mapping):
        raise ValueError(f"{source}: the index of shards must hold a weight_map and metadata, got {values!r:.100}.")
    for name, file in found.items():
        if not _is_weights(file):
            raise ValueError(
                f"{source}: the index of shards says that {name!r:.100} lies in {file!r:.200}, expected a safetensors file "
                "beside it."
            )
    return dict(found)


def stored_shapes(
    files: CheckpointFiles, variant: str | None = None, explicit: str | None = None
) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all stored tensors by name, from the files' headers alone; None where the checkpoint has no weights here.
    ValueError where a shard is missing or no safetensors file; `explicit` is the configuration's `transformers_weights`."""
    names = (of_variant(WEIGHTS, variant), of_variant(INDEX, variant)) if explicit is None else (explicit,)
    path = next((path for path in map(files.find, names) if path is not None), None)
    if path is None or path.endswith(".safetensors"):
        return header_shapes(path) if path is not None else None
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(shards(path, files.source).values())):
        if (shard := files.find(name)) is None:
            raise ValueError(f"{files.source}: the shard {name} is missing.")
        found |= header_shapes(shard)
    return found


# Bytes of an element by the names that safetensors has for data types.
_BYTES = dict.fromkeys(("BOOL", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8"), 1.0)
_BYTES |= dict.fromkeys(("BF16", "F16", "I16", "U16"), 2.0) | dict.fromkeys(("F32", "I32", "U32"), 4.0)
_BYTES |= dict.fromkeys(("C64", "F64", "I64", "U64"), 8.0) | {"F4": 0.5, "F6_E2M3": 0.75, "F6_E3M2": 0.75}


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
    check_number_of_values(text.decode("latin-1"), f"The header of {path}")
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        offsets = {name: tuple(map(operator.index, entry["data_offsets"])) for name, entry in tensors.items()}
        places = [(begin, after, name) for name, (begin, after) in offsets.items()]
        shapes = {name: tuple(map(operator.index, entry["shape"])) for name, entry in tensors.items()}
        dtypes = {name: _BYTES[entry["dtype"]] for name, entry in tensors.items()}
        texts = header.get("__metadata__", {})
        if not all(isinstance(value, str) for value in texts.values()):
            raise TypeError(f"its metadata {texts!r:.80} are no texts")
    except (ValueError, RecursionError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no whole safetensors file ({type(error).__name__}: {error!s:.100}).") from error
    end = 0
    for begin, after, name in sorted(places):
        wanted = math.prod(shapes[name]) * dtypes[name]
        if (
            begin != end or (after - begin) != wanted or min(shapes[name], default=0) < 0
        ):  # one behind the other, each whole
            raise ValueError(
                f"{path} is no whole safetensors file: {name!r:.200} of shape {shapes[name]} and {tensors[name]['dtype']} lies "
                f"in the bytes {begin} to {after}, expected {end} to {end + wanted}."
            )
        end = after
    if 8 + length + end != size:  # its length, the header and the data, and no byte more
        raise ValueError(f"{path} is no whole safetensors file: it has {size} bytes, expected {8 + length + end}.")
    return shapes


def checked_files(source: str | os.PathLike, options: Options, verify: bool, wants_info: bool = False) -> LoadPlan:
    """Find the valid files of a checkpoint, compare them with what was saved, and refuse what they must not say; raises as
    `CheckpointFiles`, `check_files`, `checked_composition` and `stored_shapes` do."""
    source, options = valid_place(source, options, CONFIG)
    files, variant = CheckpointFiles(source, options), options.get("variant")
    values = check_files(files, variant, options)
    composition = checked_composition(files, variant, verify, wants_info)
    explicit = first_weights(composition, variant) if composition is not None else None
    shapes = None
    # With references the shapes of all tensors are known only once the bases are read.
    if composition is None or not composition.references:
        shapes = stored_shapes(files, variant, explicit or values.get("transformers_weights"))
    # Quantized, renamed or mismatched weights have other names or shapes than the model that is built.
    others = (values.get("quantization_config"), options.get("quantization_config"), options.get("key_mapping"))
    sized = not any(others) and not options.get("ignore_mismatched_sizes")
    guard = build_guard(shapes, sized, f"{files.source}: {CONFIG}")
    return LoadPlan(files.source, options, files, guard, composition)
