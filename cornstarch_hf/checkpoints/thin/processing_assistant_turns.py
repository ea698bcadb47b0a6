"""Where the assistant's turns are, by the marks of the template; the package finds them without marks too."""

from collections.abc import Sequence
from typing import Any

from ...checkpoints.code_folder import needs_package
from ...processing.rendering import GENERATION, check_written, render


def assistant_spans(
    messages: list[dict],
    template: str,
    *,
    first: int = 0,
    specials: Sequence[str] = (),
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans that the assistant wrote, as `generation` blocks say."""
    if first or not GENERATION.search(template):
        raise needs_package("What finds the assistant's turns where a chat template does not mark them")
    check_written(messages, template, variables)
    return render(messages, template, mark_assistant=True, add_generation_prompt=add_generation_prompt, **variables)
