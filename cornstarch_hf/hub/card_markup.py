"""Text of model cards: Markdown tables, a mermaid picture, and names that cannot break out of either."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..parts.classes import COMMIT, names_repository

HUB = "https://huggingface.co"
# What Markdown, HTML or a table's cell would read as markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&])")
# A flowchart shows what stands in quotes as it is, but for its own entities and HTML.
_ENTITIES = {'"': "#quot;", "#": "#35;", "<": "#lt;", ">": "#gt;", "&": "#amp;", "`": "#96;", "\\": "#92;"}


def plain(text: Any) -> str:
    """Text as Markdown shows it letter by letter, on one line."""
    return _MARKUP.sub(r"\\\1", _one_line(text))


def code(text: Any) -> str:
    """Text in a code span, on one line, safe in a table's cell."""
    text = _one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def repo_link(repo_id: str) -> str:
    """A link to a repository of the Hub."""
    return f"[{plain(repo_id)}]({HUB}/{repo_id})"


def commit_link(repo_id: str, revision: str | None) -> str:
    """A link to a commit, shown by its first seven digits; ``unknown`` where it is not known."""
    if revision is None:
        return "unknown"
    return f"[{revision[:7]}]({HUB}/{repo_id}/tree/{revision})"


def check_repo_id(value: Any, where: str) -> None:
    """Refuse what is no repository's name (ValueError)."""
    if not names_repository(value):
        raise ValueError(f"{where} must name a repository of the Hub, such as 'user/name', got {value!r:.100}.")


def check_origin(component: str, origin: Mapping[str, Any]) -> None:
    """Refuse an origin that names no repository of the Hub, or no commit where it names one (ValueError): its text goes
    into links."""
    repo_id, revision = origin.get("repo_id"), origin.get("revision")
    check_repo_id(repo_id, f"{component}: the origin")
    if revision is not None and not (isinstance(revision, str) and COMMIT.fullmatch(revision)):
        raise ValueError(
            f"{component}: the origin's revision must be a commit of 40 hexadecimal digits, got {revision!r:.100}."
        )


def flowchart(nodes: Mapping[str, Sequence[str]], edges: Sequence[tuple[str, str]]) -> str:
    """A mermaid flowchart from left to right.

    Args:
        nodes: the lines of each node's label, by a key of any text.
        edges: pairs of keys.
    """
    ids = {key: f"n{i}" for i, key in enumerate(nodes)}  # a name of the user's could be a word of mermaid ("end")
    lines = ["flowchart LR"]
    lines += [f'    {ids[key]}["{"<br/>".join(map(_label, label))}"]' for key, label in nodes.items()]
    lines += [f"    {ids[a]} --> {ids[b]}" for a, b in edges]
    return "\n".join(lines)


def _label(text: str) -> str:
    return "".join(_ENTITIES.get(letter, letter) for letter in _one_line(text))


def _one_line(text: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
