"""Probes: in which form a template writes each role, where it places media, how it writes tool calls."""

from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
from templates import PARTS, STRINGS

from cornstarch_hf.processing import rendering
from cornstarch_hf.processing.rendering import (
    DEFAULT_TEMPLATE,
    bookends,
    call_with_bookend,
    check_written,
    forms,
    render,
    said,
    silent_content,
    writes_placeholder,
)

ROLES = ["system", "developer", "user", "assistant", "tool"]
BODY = {
    "string": "{{ m.content }}",
    "parts": "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}",
    "part": "{{ m.content[0].text }}",
    "nothing": "",
}
CALL = {"type": "function", "function": {"name": "area", "arguments": {"r": 1}}}
FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"


def by_role(role, body, others="string", around=""):
    return (
        f"{around}{{% for m in messages %}}[{{{{ m.role }}}}]{{% if m.role == '{role}' %}}{BODY[body]}{{% else %}}"
        f"{BODY[others]}{{% endif %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(("role", "body", "others"), product(ROLES, BODY, ["string", "parts"]))
def test_each_role_is_asked_for_by_itself(role, body, others):
    template = by_role(role, body, others)
    known = {"string": {"string"}, "parts": {"parts", "part"}, "part": {"part"}, "nothing": set()}
    for asked in ROLES:
        assert forms(template, asked) == known[body if asked == role else others], asked
    assert said(template, role, "a") == ([{"type": "text", "text": "a"}] if "part" in known[body] else "a")
    assert writes_placeholder(template, role, "image", "<image>") == (body == "parts")


@pytest.mark.parametrize(
    "refusal",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}",
        "{% if messages[-1].role not in ('user', 'tool') %}{{ raise_exception('users end') }}{% endif %}",
        "{% for m in messages %}{% if m.role == 'tool' and not (messages[loop.index0 - 1].tool_calls and m.tool_call_id) %}"
        "{{ raise_exception('no call') }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}{{ raise_exception('alternate') }}{% endif %}{% endfor %}",
    ],
)
@pytest.mark.parametrize(("role", "body"), product(["system", "user", "assistant", "tool"], ["string", "parts"]))
def test_templates_that_refuse_some_conversations_are_asked_in_others(refusal, role, body):
    known = {"string": {"string"}, "parts": {"parts", "part"}}
    assert forms(by_role(role, body, around=refusal), role) == known[body]


def test_a_template_that_needs_a_variable_is_asked_with_it():
    needs = "{% if not day %}{{ raise_exception('which day?') }}{% endif %}"
    template = by_role("user", "parts", around=needs)
    assert forms(template, "user") is None and writes_placeholder(template, "user", "image", "<image>") is None
    assert "parts" in forms(template, "user", variables={"day": 1})
    assert writes_placeholder(template, "user", "image", "<image>", variables={"day": 1})


@pytest.mark.parametrize(
    ("name", "system", "user", "tool"),
    [
        ("qwen2_5", {"string"}, {"string"}, {"string"}),
        ("qwen3_vl", {"string", "parts", "part"}, {"string", "parts", "part"}, {"string", "parts", "part"}),
        ("llava_next", {"part"}, {"parts", "part"}, None),
        ("smolvlm", {"parts", "part"}, {"parts", "part"}, {"parts", "part"}),
        ("glm4moe", {"string", "parts", "part"}, {"string", "parts", "part"}, {"string"}),
        ("deepseekv3", {"string"}, {"string"}, {"string"}),
        ("phi3", {"string"}, {"string"}, set()),
    ],
)
def test_templates_of_real_models(name, system, user, tool):
    template = (FOLDER / f"{name}.jinja").read_text()
    assert [forms(template, role) for role in ("system", "user", "tool")] == [system, user, tool]


def test_text_in_the_template_that_looks_like_a_printed_part_is_none():
    assert "parts" in forms('{"type": "text", "text": "..."}' + PARTS, "user")
    assert forms("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "user") == {"string"}


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}", {}),
        ("{% for m in messages %}{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}", {}),
        ("{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% else %}{{ '' + m.content }}{% endif %}{% endfor %}", {"content": None}),
        ("{% for m in messages %}{{ '' + m.content + (m.tool_calls[0].function.name if m.tool_calls else '') }}{% endfor %}", {"content": ""}),
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name + '(' + c.function.arguments + ')' }}{% endfor %}{% endfor %}", {}),
        (STRINGS, None), (PARTS, None), (DEFAULT_TEMPLATE, None),
    ],
)  # fmt: skip
def test_a_turn_of_tool_calls_says_nothing_in_the_way_that_the_template_knows(template, content):
    assert silent_content(template) == content


@pytest.mark.parametrize("call", [CALL, CALL["function"]])
def test_a_call_is_written_or_refused(call):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    end = bookends(1)[1]
    assert call_with_bookend(talk[0], end) == talk[0]
    marked = call_with_bookend(talk[1], end)["tool_calls"][-1]
    assert (marked.get("function") or marked)["name"] == "area" + end and talk[1]["tool_calls"] == [call]
    check_written(talk, "{{ messages | tojson(ensure_ascii=true) }}", {})
    with pytest.raises(ValueError, match="Message 1 calls a tool, but the chat template does not write that"):
        check_written(talk, STRINGS, {})


@pytest.mark.parametrize("role", ROLES)
def test_a_role_that_is_not_written_is_refused_unless_something_else_in_the_conversation_makes_it(role):
    template = by_role(role, "nothing")
    talk = [{"role": "user", "content": "q"}, {"role": role, "content": "x"}]
    with pytest.raises(
        ValueError, match=rf"Message {0 if role == 'user' else 1} is of the role '{role}', but the chat"
    ):
        check_written(talk, template, {})
    check_written(talk, "{% if x or messages | length > 9 %}" + STRINGS + "{% endif %}", {"x": 1})
    check_written([{"role": role, "content": ""}], template, {})


ASIDE = {"role": "assistant", "content": "let me look", "tool_calls": [CALL]}
CALLS_ALONE = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
LAST_CALL = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[-1].function.name if m.tool_calls }}{% endfor %}"
FIRST_SYSTEM = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message", "what"),
    [
        (CALLS_ALONE, ASIDE, "has text beside the tools that it calls"),
        (LAST_CALL, ASIDE | {"tool_calls": [CALL, CALL]}, "calls a tool"),
        (FIRST_SYSTEM, {"role": "system", "content": "be rude"}, "is of the role 'system'"),
        (
            "{{ messages[0].content }}",
            {"role": "user", "content": [{"type": "text", "text": "b"}]},
            "is of the role 'user'",
        ),
    ],
)
def test_what_a_template_leaves_out_of_a_message_is_refused(template, message, what):
    user = {"role": "user", "content": "q"}
    with pytest.raises(ValueError, match=f"Message 1 {what}, but the chat template does not write that"):
        check_written([user, message], template, {})
    check_written([message | {"content": "b"}] if template == FIRST_SYSTEM else [user], template, {})


@pytest.mark.parametrize(
    "written", ["{{ messages }}", "{{ messages | tojson }}", "{{ messages | tojson(ensure_ascii=true) }}"]
)
def test_what_is_printed_within_a_list_is_written(written):
    check_written([{"role": "user", "content": "q"}, ASIDE | {"tool_calls": [CALL, CALL]}], written, {})


def test_a_text_that_shows_what_was_said_is_not_rendered_again(monkeypatch):
    talk = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": " a fox \n"}]
    text = render(talk, STRINGS)[0]
    calls = []
    monkeypatch.setattr(rendering, "render", lambda *args, **kwargs: calls.append(args) or render(*args, **kwargs))
    check_written(talk, STRINGS, {"bos_token": "<s>", "tools": None}, text)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}, talk[1]]
    check_written(parts, PARTS, {}, render(parts, PARTS)[0])
    assert calls == []
    # Where somebody else may have written it, or it is not there as it is, the conversation is rendered with bookends.
    for others in (
        [*talk, talk[0]],
        [{"role": "user", "content": "fox"}, talk[1]],
        [{"role": "user", "content": "user"}],
    ):
        calls.clear()
        check_written(others, STRINGS, {}, render(others, STRINGS)[0])
        assert len(calls) == 1
    for variables in ({"tools": [1]}, {"note": "what is it?"}):
        calls.clear()
        check_written(talk, STRINGS, variables, text)
        assert len(calls) == 1


@pytest.mark.parametrize(
    "said", ["be rude", "user", "q", "what", "system", "<user>\nq", "q\n", "role", "content", "a q a", "no"]
)
@pytest.mark.parametrize("variables", [{}, {"note": "be rude"}])
def test_what_is_left_out_is_refused_also_where_the_text_has_its_words(said, variables):
    template = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>\n{{ m.content }}\n{% endif %}{% endfor %}{{ note }}"
    talk = [
        {"role": "user", "content": "q and what"},
        {"role": "system", "content": said},
        {"role": "user", "content": "a q a"},
    ]
    for messages in (talk, talk[1:], talk[:2], talk[::-1]):
        for extra in ({}, {"reasoning": said}):
            given = [m | extra for m in messages]
            with pytest.raises(ValueError, match="is of the role 'system', but the chat template does not write that"):
                check_written(given, template, variables, render(given, template, **variables)[0])


def test_bookends_are_distinct_and_no_text_has_them():
    made = [bookend for index in (0, 1, 255, 256, 60_000) for bookend in bookends(index)]
    assert len(set(made)) == len(made)
    for bookend in made:
        assert len(bookend) == 2 and render([{"content": bookend}], "{{ messages[0].content | trim }}")[0] == bookend
        with pytest.raises(UnicodeEncodeError):
            bookend.encode()
