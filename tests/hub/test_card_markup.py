"""Markdown and mermaid of model cards: what a name holds is shown, and breaks nothing."""

import re

import pytest
from flowcharts import read_flowchart
from jinja2 import UndefinedError

from cornstarch_hf.hub.card import ENVIRONMENT, check_origin, code, commit_link, flowchart, plain, repo_link

ODD = [
    'a"b',
    "a#b;c",
    "<|image|>",
    "a`b",
    "a\nb",
    "[x](y)",
    "a & b",
    "end",
    "*_~$",
    "\\",
    "{x} (y)",
    "<br/>",
    "%%x",
    "-->",
]


def test_flowchart_shows_every_letter_of_a_label():
    nodes, edges = read_flowchart(flowchart({key: [key, "x"] for key in ODD}, [(ODD[0], "end"), ("end", "<br/>")]))
    assert list(nodes.values()) == [[" ".join(key.split()), "x"] for key in ODD]
    assert edges == [("n0", "n7"), ("n7", "n11")]


def test_the_grammar_of_these_tests_refuses_what_mermaid_refuses():
    for text in (
        'flowchart LR\n    n0["a"b"]',
        "flowchart LR\n    end --> n1",
        'graph\n    n0["a"]',
        'flowchart LR\n    n0["a#b"]',
    ):
        with pytest.raises(AssertionError):
            read_flowchart(text)


def test_cells_stay_one_cell():
    source = "| a | b |\n| --- | --- |\n{% for odd in all %}\n| {{ odd }} | {{ odd|code }} |\n{% endfor %}"
    text = ENVIRONMENT.from_string(source).render(all=ODD).removesuffix("\n")
    lines = text.split("\n")
    assert lines[:2] == ["| a | b |", "| --- | --- |"] and len(lines) == len(ODD) + 2
    assert all(len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) == 3 for line in lines)


@pytest.mark.parametrize(
    ("text", "shown"), [("<image>", "`<image>`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("<|x|>", "`<\\|x\\|>`")]
)
def test_code_spans(text, shown):
    assert code(text) == shown


def test_plain_text_is_no_markup():
    assert plain("<b>_x_</b>\n# y") == r"\<b\>\_x\_\</b\> \# y"


def test_what_no_filter_made_markup_of_is_shown_as_it_is():
    show = ENVIRONMENT.from_string(
        "{% macro twice(x) %}{{ x }} {{ x }}{% endmacro %}{{ twice(odd) }} {{ odd|quoted }} {{ 7 }}"
    )
    assert show.render(odd="_<a>") == '\\_\\<a\\> \\_\\<a\\> "_<a>" 7'
    with pytest.raises(UndefinedError, match="'unknown' is undefined"):
        ENVIRONMENT.from_string("{{ unknown }}").render()


def test_links():
    assert repo_link("user/tiny_clip") == r"[user/tiny\_clip](https://huggingface.co/user/tiny_clip)"
    assert commit_link("user/x", "0a" * 20) == f"[0a0a0a0](https://huggingface.co/user/x/tree/{'0a' * 20})"


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"repo_id": "../x", "revision": "0" * 40}, "vision_encoder: the origin must name a repository"),
        ({"repo_id": "a/b](http://c)", "revision": "0" * 40}, "vision_encoder: the origin must name a repository"),
        ({"revision": "0" * 40}, "vision_encoder: the origin must name a repository"),
        ({"repo_id": "a/b", "revision": "main"}, "a commit of 40 hexadecimal digits, got 'main'"),
        ({"repo_id": "a/b", "revision": 7}, "a commit of 40 hexadecimal digits, got 7"),
    ],
)
def test_origins_that_are_no_repository_are_refused(origin, message):
    check_origin("vision_encoder", {"repo_id": "a/b", "revision": "0" * 40})
    check_origin("vision_encoder", {"repo_id": "a/b"})  # a model that was loaded does not tell its commit
    assert commit_link("a/b", None) == "unknown"
    with pytest.raises(ValueError, match=message):
        check_origin("vision_encoder", origin)
