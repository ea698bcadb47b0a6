"""Rendering: where the last message goes on, in any field, as transformers ends it; errors that say where."""

import jinja2
import pytest
from helpers import needs_5_23
from transformers.utils.chat_template_utils import render_jinja_template

from cornstarch_hf.processing.rendering import ConversationError, render, told, tool_schemas

FIELDS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<end>{% endfor %}"
)
TRIMMED = "{% for m in messages %}{{ m.content | trim }}<end>{% endfor %}"
THINKING = FIELDS.replace("reasoning_content", "thinking")


def ended(message, template, field):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", **message}]
    theirs = render_jinja_template([messages], chat_template=template, continue_final_message=field)[0][0]
    assert render(messages, template, continue_final_message=field)[0] == theirs
    return theirs


@pytest.mark.parametrize(
    ("content", "template", "end"),
    [
        ("the ", FIELDS, "the "),
        ("the ", TRIMMED, "the"),
        (" the", TRIMMED, "<end>the"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b "}], FIELDS, "ab "),
    ],
)
def test_content_goes_on_where_transformers_ends_it(content, template, end):
    assert ended({"content": content}, template, True).endswith(end)
    assert ended({"content": content}, template, "content").endswith(end)


def test_another_field_goes_on():
    assert ended({"reasoning_content": "let me", "content": ""}, FIELDS, "reasoning_content").endswith("<t>let me")


@needs_5_23
@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("template", [FIELDS, THINKING])
def test_reasoning_goes_on_under_each_of_its_names(field, template):
    assert ended({field: "let me ", "content": ""}, template, field).endswith("<t>let me ")


@pytest.mark.parametrize(
    ("message", "template", "field", "match"),
    [
        ({"content": None}, FIELDS, True, "'content', got None"),
        ({"content": [{"type": "image"}]}, FIELDS, True, "string, or parts with text"),
        ({"content": "a"}, FIELDS, "reasoning_content", "'reasoning_content', got None"),
        ({"content": "a", "note": "b"}, FIELDS, "note", "does not write the last message's 'note' as it is"),
        ({"content": "<t>x</t>a"}, "{{ messages[-1].content.split('</t>')[-1] }}", True, "as it is"),
    ],
)
def test_what_cannot_go_on(message, template, field, match):
    with pytest.raises(ValueError, match=match):
        render([{"role": "assistant", **message}], template, continue_final_message=field)


@pytest.mark.parametrize(
    ("template", "error", "match"),
    [
        ("{{ raise_exception('no') }}", ConversationError, "sample 1: no"),
        ("{{ 1 // 0 }}", ConversationError, "sample 1: .*zero"),
        ("{{ messages[0].nothing.at.all }}", ConversationError, "sample 1: .*no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", TypeError, "sample 1: "),
    ],
)
def test_whatever_a_template_raises_is_a_value_or_type_error_that_says_where(template, error, match):
    assert issubclass(ConversationError, ValueError) and issubclass(ConversationError, jinja2.TemplateError)
    with pytest.raises(error, match=match), told("sample 1: "):
        render([{"role": "user"}], template)


def test_tools_are_schemas_or_functions():
    def area(r: int) -> int:
        """Area.

        Args:
            r: the radius
        """
        return r

    made = tool_schemas([{"name": "a"}, area])
    assert made[0] == {"name": "a"} and made[1]["function"]["name"] == "area" and tool_schemas(None) is None
    with pytest.raises(ValueError, match="JSON schema or a documented function, got 3"):
        tool_schemas([3])
