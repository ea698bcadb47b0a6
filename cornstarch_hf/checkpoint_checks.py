"""The files of a checkpoint, looked at before anything in them is used: which there are, what they name, what they hold.

`check_files` is called before a configuration is believed, `stored_shapes` gives `size_guard` what to compare with.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from .size_guard import build_guard
from .untrusted import SHARD, check_auto_map, check_values, read_json

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
READ = (CONFIG, "generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json",
        "adapter_config.json")  # fmt: skip
_HUB = ("cache_dir", "local_files_only", "proxies", "revision", "token")


class CheckpointFiles:
    """Files of a checkpoint by name, of a local folder or of a repository on the Hub (downloaded as they are asked for).

    Args:
        source: folder or repository id.
        subfolder: within it.
        **hub: `revision`, `token`, `cache_dir`, ... as in `from_pretrained`; others are left out.
    """

    def __init__(self, source: str | os.PathLike, subfolder: str = "", **hub: Any):
        self.source, self.subfolder = os.fspath(source), subfolder or ""
        self.local = os.path.isdir(self.source)
        self._hub = {key: value for key, value in hub.items() if key in _HUB and value is not None}

    def path(self, name: str) -> str | None:
        """Where a file lies on this machine, None where the checkpoint has none of that name."""
        if self.local:
            path = os.path.join(self.source, self.subfolder, name)
            return path if os.path.isfile(path) else None
        missing_is_none = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
            "_raise_exceptions_for_gated_repo": False,
        }
        return cached_file(self.source, name, subfolder=self.subfolder, **missing_is_none, **self._hub)


def check_files(files: CheckpointFiles, variant: str | None = None) -> None:
    """Refuse a checkpoint whose files name something outside of it, or hold pickled code.

    Args:
        files: of the checkpoint; of a repository only the configuration and the index of shards are fetched.
        variant: as in `from_pretrained`.

    Raises:
        ValueError: a path that leaves the folder, weights other than safetensors, an `auto_map` of elsewhere, a
            configuration that `check_values` refuses or that has a key twice.
    """
    if ".." in os.path.normpath(files.subfolder or ".").split(os.sep) or os.path.isabs(files.subfolder):
        raise ValueError(f"subfolder {files.subfolder!r} leaves {files.source}.")
    explicit = None
    for name in READ if files.local else (CONFIG,):
        if (path := files.path(name)) is not None:
            values = read_json(path, f"{files.source}: {name}")
            _check_description(values, files, name)
            explicit = values.get("transformers_weights") if name == CONFIG else explicit
    _check_weight_names(files, variant, explicit)


def _check_description(values: Any, files: CheckpointFiles, name: str) -> None:
    where = f"{files.source}: {name}"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold one JSON object, got {type(values).__name__}.")
    check_auto_map(values.get("auto_map"), where, None if files.local else files.source, here_only=True)
    if name != CONFIG:
        return
    check_values(values, where)
    explicit = values.get("transformers_weights")
    if explicit is not None and not (isinstance(explicit, str) and _is_weights(explicit)):
        raise ValueError(
            f"{where}: transformers_weights is {explicit!r:.200}, expected a safetensors file of this folder."
        )


def _is_weights(name: str) -> bool:
    bare = name.removesuffix(".index.json")
    return SHARD.fullmatch(bare) is not None and not name.startswith(".")


def _named(name: str, variant: str | None) -> str:
    if variant is None:
        return name
    if not variant.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"variant must be a plain word, got {variant!r}.")
    stem, _, rest = name.partition(".safetensors")
    return f"{stem}.safetensors.index.{variant}.json" if "index" in rest else f"{stem}.{variant}.safetensors"


def _check_weight_names(files: CheckpointFiles, variant: str | None, explicit: str | None) -> None:
    for name in {_named(INDEX, variant), explicit or ""}:
        if name.endswith(".json") and (index := files.path(name)) is not None:
            shards(index, files.source)
    if not files.local:
        return
    inside = os.listdir(os.path.join(files.source, files.subfolder))
    safe = [name for name in inside if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickled = sorted(
        name for name in inside if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json"))
    )
    if pickled and not safe:
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
    whole, index = _named(WEIGHTS, variant), _named(INDEX, variant)
    if explicit is not None:
        whole, index = (explicit, "") if explicit.endswith(".safetensors") else ("", explicit)
    path = files.path(whole) if whole else None
    if path is not None:
        return header_shapes(path)
    listed = files.path(index) if index else None
    if listed is None:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(shards(listed, files.source).values())):
        shard = files.path(name)
        if shard is None:
            raise ValueError(f"{files.source}: the shard {name} is missing.")
        found |= header_shapes(shard)
    return found


def header_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one safetensors file (ValueError for another file); no data is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}).") from error


@contextlib.contextmanager
def guarded_loading(source: str | os.PathLike | None, options: Mapping[str, Any]) -> Iterator[None]:
    """Check the files of a checkpoint, then bound what its configuration builds within by what they hold.

    Args:
        source: what `from_pretrained` was given; None (a state dict given by the caller) checks nothing.
        options: the keywords of `from_pretrained`.

    Raises:
        ValueError: as `check_files`, `stored_shapes` and `size_guard.build_guard` do.
    """
    if source is None or options.get("gguf_file") is not None:
        yield
        return
    hub = {key: value for key, value in options.items() if key != "subfolder"}
    files = CheckpointFiles(source, options.get("subfolder") or "", **hub)
    check_files(files, options.get("variant"))
    values = _configuration(files)
    if values is None and (adapters := files.path("adapter_config.json")) is not None:
        base = read_json(adapters, f"{files.source}: adapter_config.json").get("base_model_name_or_path")
        if isinstance(base, str) and base != files.source:  # transformers loads that one, and the adapters into it
            files = CheckpointFiles(base, **hub)
            check_files(files, options.get("variant"))
            values = _configuration(files)
    values = values or {}
    shapes = stored_shapes(files, options.get("variant"), values.get("transformers_weights"))
    other_form = (values.get("quantization_config"), options.get("quantization_config"), options.get("key_mapping"))
    with build_guard(shapes, sized=not any(other_form) and not options.get("ignore_mismatched_sizes")):
        yield


def _configuration(files: CheckpointFiles) -> Mapping[str, Any] | None:
    path = files.path(CONFIG)
    return None if path is None else read_json(path, f"{files.source}: {CONFIG}")


def check_loaded(info: Mapping[str, Any], source: Any) -> None:
    """Refuse a model some of whose tensors the checkpoint did not hold (ValueError): they are random now."""
    if missing := sorted(info.get("missing_keys") or ()):
        raise ValueError(
            f"{source} does not hold {len(missing)} tensors of the model that its configuration names ({missing[:3]}): they "
            "would be random. Load a whole checkpoint, or save this one again from the whole model."
        )
