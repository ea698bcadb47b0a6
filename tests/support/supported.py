"""The page about what is supported, written from the reports of the tests over every class.  A plain module, no tests."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import catalog_llms
import catalog_others
import catalog_processors
import catalog_vision
import native_types

from cornstarch_hf.conversion.refusals import OUTSIDE
from cornstarch_hf.conversion.table import NATIVE
from cornstarch_hf.parts.known_encoders import ENCODER_TYPES

PAGE = "docs/supported.md"
NATIVE_TESTS = ("::test_a_native_type_is_equal", "::test_parts_of_a_native_type")
CLASS_TEST = "test_encoder_catalog.py::test_a_class_composes"  # the test of each encoder
HEAD = """# What is supported

Written by `make supported` from the run of the tests over every class (`make test-catalog`), with tiny random models of
transformers {version}. A class that is not here was not tried; it may work all the same.

"""
ENCODERS = """## Encoders

Each composes with a tiny Llama; features of an item alone, in a batch of several sizes, and the number that the processor would
expand are the same; it generates, is saved and comes back through `AutoModel` [equal to the bit](sharing.md#equal-to-the-bit), and trains.
Where no formula stands under "counted by", a dry run without weights counts, once per shape of an item. The
formulas count the features of one item before `drop_prefix` and the projector; names in them are the configuration's.

| class | model type | kind | counted by |
| --- | --- | --- | --- |
"""
NO_ENCODERS = """
These are refused when they are composed:

| class | why |
| --- | --- |
"""
LANGUAGE_MODELS = """
## Language models

Each composes with a vision and an audio encoder: decoding with a cache as without, left-padded rows as single ones, greedy tokens as by
embedding and merging by hand, saved and loaded [equal to the bit](sharing.md#equal-to-the-bit).

| model type | class |
| --- | --- |
"""
NO_LANGUAGE_MODELS = """
These are refused when they are composed, or cannot be built by transformers itself:

| model type | class | why |
| --- | --- | --- |
"""
PROCESSORS = """
## Processors

Items of odd sizes and lengths, single and in batches, several in a row: as many placeholders as features.

| processor | encoder |
| --- | --- |
"""
NO_PROCESSORS = """
These are refused with their tiny encoder:

| processor | the error says |
| --- | --- |
"""
NATIVE_MODELS = """
## Native multimodal models

Each is taken apart by `from_native` and put together again by `to_native`, and both are compared: logits at attended positions of a
left-padded batch with uneven media, in float32 and bfloat16, greedy tokens, the stored composition, and tensors and configurations on
the way back, equal to the bit. Llama 4 is compared by its parts, since its own `forward` fails in this version.

| model type | class | encoders | image and video in one row |
| --- | --- | --- | --- |
"""
NO_NATIVE_MODELS = """
These cannot be compositions:

| model type | why |
| --- | --- |
"""


def page(reports: Iterable[Any], version: str) -> str:
    """The page.

    Args:
        reports: of pytest, of the tests over every class.
        version: of transformers.

    Raises:
        ValueError: a test failed, or a class of the catalogue was not run.
    """
    reports = list(reports)
    if failed := sorted(report.nodeid for report in reports if report.outcome != "passed"):
        raise ValueError(f"The page would tell what is not so: {failed[:5]} ({len(failed)}) did not pass.")
    by_class = {_case(r): dict(r.user_properties) for r in reports if CLASS_TEST in r.nodeid}
    encoders = {name: values for name, values in by_class.items() if "count" in values}
    check_names("encoders", encoders, expected_encoders())
    return (
        HEAD.format(version=version)
        + ENCODERS
        + _table(
            (f"`{n}`", v["type"], v["kind"], rule_text(v["type"], v["count"])) for n, v in sorted(encoders.items())
        )
        + fixed_parts(reports)
    )


def fixed_parts(reports: Iterable[Any] | None = None) -> str:
    """What the catalogue itself tells; with reports, only if all of it was run."""
    supported = {t: c for t, c, state in catalog_llms.rows() if state == "yes"}
    if reports is not None:
        nodes = [report.nodeid for report in reports]
        check_names("language models", {_name(n) for n in nodes if "::test_composes[" in n}, set(supported))
        pairs = {_name(n) for n in nodes if "::test_an_item_has_as_many" in n}
        check_names("processors", pairs, set(catalog_processors.PAIRS))
        native = {_name(n) for n in nodes if NATIVE_TESTS[0] in n or NATIVE_TESTS[1] in n}
        check_names("native types", native, set(NATIVE))
    return (
        NO_ENCODERS
        + _table((f"`{name}`", why) for name, why in sorted(catalog_others.NO_FEATURES.items()))
        + LANGUAGE_MODELS
        + _table((t, f"`{c}`") for t, c in sorted(supported.items()))
        + NO_LANGUAGE_MODELS
        + _table((t, f"`{c}`", why) for t, c, why in sorted(catalog_llms.rows()) if why != "yes")
        + PROCESSORS
        + _table((f"`{name}`", f"`{pair.encoder}`") for name, pair in sorted(catalog_processors.PAIRS.items()))
        + NO_PROCESSORS
        + _table((f"`{name}`", _words(why)) for name, (_, why) in sorted(catalog_processors.REFUSED.items()))
        + NATIVE_MODELS
        + _table(native_rows())
        + NO_NATIVE_MODELS
        + _table(sorted(OUTSIDE.items()))
    )


def native_rows() -> Iterable[tuple[str, ...]]:
    """Type, class, encoders, and whether images and videos of one row are compared."""
    for model_type, entry in sorted(NATIVE.items()):
        videos = "equal" if model_type in native_types.WITH_VIDEOS else "-"
        yield model_type, f"`{entry.architecture}`", ", ".join(entry.parts), videos


def rule_text(model_type: str, count: str) -> str:
    """What stands under "counted by"; `count` is "rule" where no run was needed."""
    return str(ENCODER_TYPES[model_type].count.__doc__) if count == "rule" else count


def expected_encoders() -> set[str]:
    """Classes of the catalogue that give features."""
    return (set(catalog_vision.CASES) | set(catalog_others.CASES)) - set(catalog_others.NO_FEATURES)


def version_of(text: str) -> str:
    """The version of transformers that a page tells of."""
    return re.findall(r"^transformers (\S+)\. A class", text, re.M)[0]


def encoder_rows(text: str) -> dict[str, tuple[str, str, str]]:
    """Model type, kind and count of each encoder that a page tells of."""
    part = text[text.index("## Encoders") : text.index(NO_ENCODERS)]
    return {n: (t, k, c) for n, t, k, c in re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| ([^|]+) \|$", part, re.M)}


def check_names(what: str, found: Iterable[str] | Mapping, expected: set[str]) -> None:
    """ValueError unless two sets of names are one."""
    if differing := sorted(set(found) ^ expected):
        raise ValueError(
            f"Of the {what} of the catalogue, {differing[:5]} ({len(differing)}) were not run: run all of it."
        )


def _words(pattern: str) -> str:
    """A pattern as text."""
    return re.sub(r"\.\*", " … ", pattern).replace("\\", "").replace("  ", " ").strip()


def _case(report: Any) -> str:
    return _name(report.nodeid)


def _name(node: str) -> str:
    return node.partition("[")[2].rpartition("]")[0]


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)
