"""Values of JSON files as they are: guards against a checkpoint say nothing where its own code runs."""

import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

POINTER = "cornstarch_saved_in"
SHARD = re.compile(r"[^/\\]+\.safetensors")


def check_values(values: Any, where: str, asked: Collection[str] = ()) -> None: ...
def check_kernels(values: Mapping[str, Any], where: str) -> None: ...
def check_quantization(values: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> None: ...
def check_auto_map(entries: Any, where: str, repo_id: str | None = None, here_only: bool = False) -> None: ...
def check_types(values: Mapping[str, Any], expected: Mapping[str, tuple[type, ...]], where: str) -> None: ...
def check_switches(
    values: Mapping[str, Any] | None, where: str, others: Mapping[str, tuple[type, ...]] | None = None
) -> None: ...
def check_pattern(pattern: Any, where: str) -> None: ...
def check_frozen_parts(stored: Any) -> None: ...
def check_part_dtypes(stored: Any) -> None: ...
def check_names(names: Any, where: str) -> None: ...


def check_number_of_values(text: str, what: str) -> None: ...


def read_text(path: str | os.PathLike, what: str) -> str:
    """The text of a file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def without_implementations(values: Any, families: Collection[str], above: str = "") -> Any:
    """The values themselves."""
    return values


def read_json(path: str | os.PathLike, what: str) -> Any:
    """A JSON file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def fingerprint(values: Mapping[str, Any]) -> str:
    """Nothing: what compares them stays behind."""
    return ""
