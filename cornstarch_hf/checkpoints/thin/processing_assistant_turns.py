"""Where the assistant's turns are, by the marks of the template; the package finds them without marks too."""

from collections.abc import Sequence
from typing import Any

from ...checkpoints.code_folder import needs_package
from ...processing.conversations import GENERATION, check_tool_calls, render


def assistant_spans(
    messages: list[dict], template: str, *, first: int = 0, specials: Sequence[str] = (), **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans that the assistant wrote, as `generation` blocks say."""
    if first or not GENERATION.search(template):
        raise needs_package("What finds the assistant's turns where a chat template does not mark them")
    variables = variables | {"add_generation_prompt": False}
    found = render(messages, template, mark_assistant=True, **variables)
    check_tool_calls(messages, template, variables)
    return found
