"""Marks stay where a template prints lists and the like, in a checkpoint's own code as in the package."""

import pytest

from cornstarch_hf.checkpoints.thin import processing_template_sandbox as thin
from cornstarch_hf.processing import template_sandbox as whole
from cornstarch_hf.processing.placeholder_text import MARK_END, MARK_START, mark_typed

TYPED = mark_typed("see <image>", ["<image>"])
TOOLS = [{"name": "f", "description": TYPED, "of": (TYPED, [TYPED])}]
PRINTS = [
    "{{ tools }}",
    "{{ tools ~ '' }}",
    "{{ tools | string }}",
    "{{ tools | tojson }}",
    "{{ tools | tojson(ensure_ascii=true, indent=1) }}",
    "{{ tools[0].items() }}",
    "{% set kept = [tools, 'x'] %}{{ kept }}",
    "{% macro write(x) %}{{ x }}{% endmacro %}{{ write(tools) }}",
    "{% for tool in tools %}{{ tool }}{% endfor %}",
]


def render(module, template, **variables):
    return module.render_template([{"role": "user", "content": TYPED}], template, **variables)


@pytest.mark.parametrize("module", [thin, whole], ids=["thin", "whole"])
@pytest.mark.parametrize("template", PRINTS)
def test_marks_stay_in_what_is_printed(template, module):
    text, _ = render(module, template, tools=TOOLS)
    assert text.count(f"{MARK_START}<image>{MARK_END}") == text.count("<image>") == 3


@pytest.mark.parametrize("module", [thin, whole], ids=["thin", "whole"])
def test_escapes_that_a_user_typed_stay_text(module):
    typed = r"\udffd<image>\udffe \\udffd"
    assert render(module, "{{ tools }}", tools=[typed])[0] == str([typed])
    assert render(module, "{{ tools[0] }}", tools=[typed])[0] == typed


@pytest.mark.parametrize("module", [thin, whole], ids=["thin", "whole"])
def test_assistant_spans(module):
    template = "{% for m in messages %}{{ m.role }}{% generation %}{{ [m.content] }}{% endgeneration %}{% endfor %}"
    text, spans = render(module, template, mark_assistant=True)
    assert [text[start:end] for start, end in spans] == [f"['{TYPED}']"]
    assert render(module, template) == (text, [])
