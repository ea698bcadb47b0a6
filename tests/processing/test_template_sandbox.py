"""Templates rendered within bounds give what transformers gives, to the character."""

import threading

import pytest
import templates
from transformers.utils.chat_template_utils import render_jinja_template

from cornstarch_hf.processing.rendering import DEFAULT_TEMPLATE
from cornstarch_hf.processing.rendering import render as render_template
from cornstarch_hf.processing.template_bounds import METHODS
from cornstarch_hf.processing.template_sandbox import REFUSED_FILTERS, BoundedEnvironment, plain, template_contents

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one < two & ümlaut\n"},
    {
        "role": "assistant",
        "content": " yes ",
        "reasoning": "so",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}],
    },
]
FEATURES = {
    "loop": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role | upper }}{% else %}none{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'user' %}{{ loop.length }}{{ m['content'] | trim }}{% endfor %}",
    "recursive loop": "{% for m in [[1, [2]], [3]] recursive %}{{ m if m is number else loop(m) }};{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[0].content[::-1] }}{{ 'abc'[-2:] }}{{ messages[-1]['role'] }}",
    "joins": "{{ 'a' ~ 1 ~ none ~ undefined_thing }}{{ messages | map(attribute='role') | join(',') }}{{ ['a'] + ['b'] }}",
    "formats": "{{ '%s-%03d' % ('a', 7) }}{{ '{}:{:>5}'.format('a', 2) }}{{ '%s' | format('x') }}{{ 'a'.center(9) }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 3 * 'ab' }}",
    "json": "{{ messages | tojson }}{{ messages[2].tool_calls | tojson(indent=2) }}{{ {'ä': [1, (2, 3)]} | tojson }}",
    "sets": "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + (m.content | length) %}{% endfor %}{{ ns.x }}{% set b %} block {{ ns.x }} {% endset %}{{ b | trim }}{{ dict(a=1) }}",
    "macros": "{% macro f(a, b=2) -%}[{{ a }}{{ b }}{{ caller() if caller else '' }}]{%- endmacro %}{{ f(1) }}{% call f(3) %}inner{% endcall %}",
    "tests": "{{ 1 is divisibleby(1) }}{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ messages is iterable }}{{ x is defined }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 1 < 2 <= 2 }}",
    "generation": "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{% for k, v in messages[2].items() %}{{ k }}{% endfor %}",
    "tools": "{% if tools %}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}",
    "named arguments": "{{ 'a\nb' | indent(width=2, first=true) }}{{ [1, 2, 3] | batch(linecount=2) | list }}{{ messages | join(attribute='role', d='+') }}{{ 'aa' | replace(old='a', new='b', count=1) }}",
    "what is read once": "{% set x = [1, 2] | map('string') %}{{ x is iterable }}{% for i in x %}{{ i }}{% endfor %}{{ range(3) | join('-') }}{{ messages[0].keys() | join }}",
    "filters": "{{ [3, 1, 2] | sort | first }}{{ 'a b' | title }}{{ 'x' | indent(2, true) }}{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1] | unique | list }}{{ [1, 2, 3] | batch(2) | list }}{{ '<b>' | e }}{{ 3.14159 | round(2) }}{{ [1, 2] | sum }}{{ 'a,b'.split(',') }}{{ none | default('d', true) }}",
}
KNOWN = {f"known {name}": value for name, value in vars(templates).items() if isinstance(value, str) and "{%" in value}


# A call of each method that is measured; jinja hands names of its own along where it stands in a loop or a block.
CALLS = {
    "center": "'a'.center(9)", "ljust": "'a'.ljust(9)", "rjust": "'a'.rjust(9)", "zfill": "'7'.zfill(3)",
    "expandtabs": "'a\tb'.expandtabs(4)", "to_bytes": "(7).to_bytes(2, 'big')", "format": "'{}-{x}'.format(1, x=2)",
    "format_map": "'{x}'.format_map({'x': 2})", "replace": "'aa'.replace('a', 'b', 1)", "join": "', '.join(['a', m.role])",
    "translate": "'abc'.translate({97: 'x'})", "index": "'abc'.index('c')", "count": "m.content.count('e')",
}  # fmt: skip
PLACES = {
    "loop": "{% for m in messages %}{{ CALL }}{% endfor %}",
    "block": "{% for m in messages %}{% block b scoped %}{{ CALL }}{% endblock %}{% endfor %}",
    "macro": "{% macro f(m) %}{{ CALL }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    "nowhere": "{% set m = messages[0] %}{{ CALL }}",
}


def tool(a: int) -> int:
    """Add.

    Args:
        a: a number
    """
    return a


@pytest.mark.parametrize("name", [*FEATURES, *KNOWN, "default"])
def test_the_text_and_the_spans_are_those_of_transformers(name):
    template = (FEATURES | KNOWN | {"default": DEFAULT_TEMPLATE})[name]
    options = {"tools": [tool], "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    marked = "generation" in template and "{% generation" in template.replace("{%-", "{%")
    texts, spans = render_jinja_template(
        [MESSAGES], chat_template=template, return_assistant_tokens_mask=marked, **options
    )
    assert render_template(MESSAGES, template, mark_assistant=marked, **options) == (
        texts[0],
        [tuple(s) for s in spans[0]] if marked else [],
    )


@pytest.mark.parametrize("content", ["go on ", [{"type": "text", "text": "go"}, {"type": "text", "text": "on"}]])
def test_the_last_message_goes_on(content):
    template = "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<end>{% endfor %}"
    messages = [*MESSAGES[:2], {"role": "assistant", "content": content}]
    texts, _ = render_jinja_template([messages], chat_template=template, continue_final_message=True)
    assert render_template(messages, template, continue_final_message=True)[0] == texts[0]
    with pytest.raises(ValueError, match="does not write the last message"):
        render_template(messages, "{{ messages[0].content }}", continue_final_message=True)


def test_nothing_of_the_callers_is_changed_or_handed_over():
    class Rich:
        def danger(self):
            raise AssertionError

    messages = [{"role": "user", "content": "a", "x": Rich()}]
    text, _ = render_template(
        messages, "{{ messages[0].x }}{{ messages[0].update(a=1) if false }}", continue_final_message=False
    )
    assert text == "<Rich>" and set(messages[0]) == {"role", "content", "x"}
    assert plain((1, [True, {"a": 2.5}])) == (1, [True, {"a": 2.5}])


def test_filters_are_those_of_transformers_but_for_the_refused_ones():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template("").environment
    mine = {name for name in BoundedEnvironment().filters if not name.startswith("_")}
    assert set(theirs.filters) - mine == set(REFUSED_FILTERS)
    assert set(theirs.tests) == set(BoundedEnvironment().tests)


def test_threads_mark_what_the_assistant_wrote_each_for_itself():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    found = []

    def render(content):
        found.append(render_template([{"role": "assistant", "content": content}], template, mark_assistant=True))

    blocks, spans = [], []
    with BoundedEnvironment().activate_tracker(blocks, spans):  # this thread is just rendering
        worker = threading.Thread(target=render, args=("yes",))
        worker.start()
        worker.join()
        assert (blocks, spans) == ([], [])
    assert found == [("yes", [(0, 3)])]


def test_every_method_that_is_measured_is_called():
    methods = {name for name in METHODS if any(hasattr(kind, name) for kind in (str, bytes, int, list, tuple))}
    assert set(CALLS) == methods


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", CALLS)
def test_methods_are_those_of_python_wherever_they_are_called(name, place):
    template = PLACES[place].replace("CALL", CALLS[name])
    expected = render_jinja_template(conversations=[MESSAGES], chat_template=template)[0][0]
    assert render_template(MESSAGES, template)[0] == expected != ""


LONE = "\udffd"


@pytest.mark.parametrize("value", [f"a{LONE}b", f"\\{LONE}", "\\udffd", "é🦊", [f"{LONE}é🦊\\udffd\\\\"]])
@pytest.mark.parametrize(
    "way",
    [
        "VALUE",
        "VALUE ~ ''",
        "VALUE | string",
        "VALUE | tojson",
        "VALUE | tojson(true)",
        "VALUE | tojson(indent=2, ensure_ascii=true)",
    ],
)
def test_halves_of_surrogate_pairs_are_written_as_they_are(way, value):
    """Where Python or JSON escapes them they would be lost as marks; anything else is written as transformers writes it."""
    template = "{{ " + way.replace("VALUE", "[messages[0].x]") + " }}"
    text = render_template([{"x": value}], template)[0]
    stands_for = (
        [item.replace(LONE, "MARK") for item in value] if isinstance(value, list) else value.replace(LONE, "MARK")
    )
    theirs = render_jinja_template([[{"x": stands_for}]], chat_template=template)[0][0]
    assert text.replace(LONE, "MARK") == theirs
    assert text.count(LONE) == "".join(value).count(LONE)


@pytest.mark.parametrize("name", [*FEATURES, *KNOWN])
def test_variables_and_own_text_of_a_template_are_those_that_transformers_finds(name):
    from transformers.utils.chat_template_utils import _get_template_literal_text, _get_template_variables

    template = (FEATURES | KNOWN)[name]
    variables, text = template_contents(template)
    assert variables == _get_template_variables(template)
    assert set(text.split("\0")) == set(_get_template_literal_text(template).split("\0"))
