"""Conversations: media taken out in order, templates of both sorts, assistant turns, typed placeholders."""

import pytest
from templates import PARTS, STRINGS

from cornstarch_hf.processing.conversations import ConversationReader, is_batch, refuse_typed
from cornstarch_hf.processing.placeholder_text import occurrences
from cornstarch_hf.processing.rendering import DEFAULT_TEMPLATE, render
from cornstarch_hf.processing.template_probes import forms, writes_placeholder

STRICT = (
    "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text only') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
TOKENS = {"vision": "<image>", "audio": "<audio>"}
ITEM, TURNS = object(), [{"role": "user", "content": "5+2?"}, {"role": "assistant", "content": "seven"}]


def names_of(kind):
    found = {"image": ["vision"], "vision": ["vision"], "audio": ["audio"], "both": ["vision", "audio"]}
    if kind not in found:
        raise ValueError(f"{kind!r} is no modality")
    return found[kind]


def read(content, template=STRINGS):
    reader = ConversationReader(TOKENS, names_of, {"vision": "image", "audio": "audio"})
    return reader.read([{"role": "user", "content": content}], template)


def test_templates_of_both_sorts_are_told_apart():
    found = {
        t: (
            "parts" in forms(t, "user"),
            writes_placeholder(t, "user", "image", "<image>"),
            writes_placeholder(t, "user", "audio", "<audio>"),
        )
        for t in (STRINGS, PARTS)
    }
    assert found == {STRINGS: (False, False, False), PARTS: (True, True, False)}
    assert forms(DEFAULT_TEMPLATE, "user") == forms(STRICT, "user") == {"string"}
    assert forms("{{ nothing.at.all }}", "user") is None


@pytest.mark.parametrize("template", [STRINGS, PARTS, DEFAULT_TEMPLATE, STRICT])
def test_every_template_gives_the_placeholders_where_the_media_stood(template):
    content = [
        "a",
        {"type": "image", "image": ITEM},
        {"type": "text", "text": "b"},
        {"type": "audio", "audio": [0.5]},
        "c",
    ]
    messages, media = read(content, template)
    assert media == {"vision": [ITEM], "audio": [[0.5]]}
    assert "a<image>b<audio>c" in render(messages, template)[0]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "url": "x.png"}, ["x.png"]),
        ({"type": "image", "path": "x.png"}, ["x.png"]),
        ({"type": "image", "base64": "abc"}, ["abc"]),
        ({"type": "image_url", "image_url": {"url": "x.png"}}, ["x.png"]),
        ({"type": "image_url", "image_url": "x.png"}, ["x.png"]),
        ({"type": "vision", "vision": "x.png"}, ["x.png"]),
        ({"type": "vision", "image": "x.png"}, ["x.png"]),
        ({"type": "image", "image": {"bytes": b"x", "path": None}}, [{"bytes": b"x", "path": None}]),
        ({"type": "image", "bytes": b"x", "path": None}, [b"x"]),
        ({"type": "image", "image": None, "text": None, "audio": {"bytes": None}}, None),
        ({"type": "image", "image": {"bytes": None, "path": None}}, None),
        ({"type": "image"}, None),
    ],
)
def test_ways_of_writing_an_image(part, expected):
    messages, media = read([part])
    assert media.get("vision") == expected and messages[0]["content"] == "<image>"


def test_arrays_keep_their_sampling_rate_and_shared_items_reach_both():
    _, media = read(
        [
            {"type": "audio", "array": [0.5], "sampling_rate": 8000},
            {"type": "audio", "audio": "x.wav", "sampling_rate": 1},
        ]
    )
    assert media == {"audio": [{"array": [0.5], "sampling_rate": 8000}, "x.wav"]}
    messages, media = read([{"type": "both", "url": "x"}])
    assert messages[0]["content"] == "<image><audio>" and media == {"vision": ["x"], "audio": ["x"]}


def test_parts_without_an_item_are_filled_in_order():
    reader = ConversationReader(TOKENS, names_of, {"vision": "image", "audio": "audio"})
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "b"}, {"type": "both"}]}]
    assert reader.read(talk, STRINGS, {"vision": ["a", "c"], "audio": ["s"]})[1] == {
        "vision": ["a", "b", "c"],
        "audio": ["s"],
    }
    assert reader.read(talk, STRINGS)[1] == {"vision": ["b"]}
    with pytest.raises(
        ValueError, match=r"vision: 1 items were given for 2 parts without one: .*<image> typed in a string is text"
    ):
        reader.read(talk, STRINGS, {"vision": ["a"]})
    with pytest.raises(ValueError, match="audio: 2 items were given for 1 parts"):
        reader.read(talk, STRINGS, {"audio": ["s", "t"]})


def test_strings_become_parts_where_a_template_loses_strings():
    only = "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}"
    assert "string" not in forms(only, "user") and "parts" in forms(only, "user")
    assert "string" in forms(PARTS, "user") and "string" in forms(STRINGS, "user")
    assert render(read("hello", only)[0], only)[0] == "hello"
    assert read("hello", PARTS)[0][0]["content"] == read("hello", STRICT)[0][0]["content"] == "hello"


def test_a_turn_of_tool_calls_says_that_it_says_nothing():
    reader = ConversationReader(TOKENS, names_of, {})
    calls = [{"function": {"name": "f", "arguments": {}}}]
    talk = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "assistant", "content": None}]
    assert reader.read(talk, STRINGS)[0] == [talk[0], {"role": "assistant"}]


def test_what_users_typed_is_marked_everywhere():
    typed = {"role": "user <image>", "content": "see <image>", "calls": [{"name": "<audio>", "n": 1}], "none": None}
    reader = ConversationReader(TOKENS, names_of, {"vision": "image", "audio": "audio"})
    (message,), media = reader.read([typed], STRINGS)
    assert media == {} and message["calls"][0]["n"] == 1 and "none" not in message
    texts = [message["role"], message["content"], message["calls"][0]["name"]]
    assert not any(sum(occurrences(text, list(TOKENS.values())).values()) for text in texts)
    with pytest.raises(ValueError, match="tokenize=True"):
        refuse_typed(render([message], STRINGS)[0])
    assert refuse_typed("plain <image>") == "plain <image>" and typed["content"] == "see <image>"


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([{"type": "smell"}], ValueError, "'smell' is no modality"),
        ([{"text": "x"}], TypeError, "a dict with a 'type', got {'text': 'x'}"),
        ([3], TypeError, "got 3"),
        ([{"type": "text", "text": None}], ValueError, "a string as its 'text', got None"),
    ],
)
def test_parts_that_are_none(content, error, message):
    with pytest.raises(error, match=message):
        read(content)


def test_a_batch_is_a_list_of_conversations():
    assert is_batch([TURNS]) and is_batch((tuple(TURNS),)) and not is_batch(TURNS)
    with pytest.raises(ValueError, match="conversation is empty"):
        is_batch([])
