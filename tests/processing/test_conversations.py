"""Conversations: media taken out in order, templates of both sorts, assistant turns, typed placeholders."""

import json
import re

import numpy as np
import pytest
from templates import PARTS, STRINGS

from cornstarch_hf.processing.conversations import (
    ConversationReader,
    check_options,
    chosen_template,
    is_batch,
    refuse_typed,
    sorted_keywords,
)
from cornstarch_hf.processing.placeholder_text import mark_typed, occurrences, unmark
from cornstarch_hf.processing.rendering import DEFAULT_TEMPLATE, forms, render, writes_placeholder

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


FORMS = {
    "string": "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
    "parts": "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %};{% endfor %}",
    "part": "{% for m in messages %}{{ m.role }}:{{ m.content[0]['text'] }};{% endfor %}",
}  # fmt: skip
GIVEN = {"string": "be good", "parts": [{"type": "text", "text": "be "}, {"type": "text", "text": "good"}]}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("written", FORMS)
@pytest.mark.parametrize("given", GIVEN)
def test_every_role_says_the_same_in_whatever_form_the_template_wants(role, written, given):
    reader = ConversationReader(TOKENS, names_of, {"vision": "image", "audio": "audio"})
    template = FORMS[written]
    for others in FORMS:  # of the other roles
        mixed = f"{{% for m in messages %}}{{% if m.role == '{role}' %}}{template}{{% else %}}{FORMS[others]}{{% endif %}}{{% endfor %}}"
        mixed = (
            mixed.replace("{% for m in messages %}{{", "{{")
            .replace("{% endfor %}{% else", "{% else")
            .replace(";{% endfor %}{% endif", ";{% endif")
        )
        talk = [{"role": "user", "content": "hi"}, {"role": role, "content": GIVEN[given]}]
        assert render(reader.read(talk, mixed)[0], mixed)[0] == f"user:hi;{role}:be good;"


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_media_of_every_role_stand_where_they_were(role):
    reader = ConversationReader(TOKENS, names_of, {"vision": "image", "audio": "audio"})
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": ITEM}, {"type": "audio", "audio": ITEM}, "b"]
    for template in FORMS.values():
        messages, media = reader.read([{"role": "user", "content": "q"}, {"role": role, "content": content}], template)
        assert render(messages, template)[0].endswith(f"{role}:a<image><audio>b;") and media == {
            "vision": [ITEM],
            "audio": [ITEM],
        }


def typed(text, tokens=("<image>", "<audio>")):
    return sum(occurrences(text, list(tokens)).values()) == 0 and any(token in text for token in tokens)


def test_placeholders_in_tools_documents_variables_and_keys_are_text():
    reader = ConversationReader(TOKENS, names_of, {})
    template = "{{ tools | tojson }}|{{ documents }}|{{ note }}|{{ messages | tojson(ensure_ascii=true) }}"
    tool = {"name": "draw", "parameters": {"properties": {"<image>": {"description": "ü <audio>"}}}}
    variables = reader.variables(
        template,
        {"eos_token": "<image>"},
        tools=[tool],
        documents=[{"title": "t", "text": "<image>"}],
        note=["<audio>"],
    )
    assert variables["eos_token"] == "<image>", "the tokenizer's own"
    calls = [{"function": {"name": "f", "arguments": {"<image>": "é <audio>"}}}]
    messages, _ = reader.read([{"role": "user", "content": "<image>", "tool_calls": calls}], template)
    texts = render(messages, template, **variables)[0].split("|")
    assert len(texts) == 4 and all(map(typed, texts))
    assert unmark(texts[0]) == json.dumps([tool], ensure_ascii=False) and "\\u00e9 " in texts[3]
    assert tool["parameters"]["properties"] == {"<image>": {"description": "ü <audio>"}}


def test_texts_that_make_a_placeholder_together_stay_text():
    parts = [
        "see <im",
        {"type": "text", "text": "a"},
        {"type": "text", "text": "ge>"},
        {"type": "image", "image": ITEM},
        "<",
        "audio>",
    ]
    for template in (STRINGS, PARTS):
        messages, media = read(parts, template)
        text = render(messages, template)[0]
        assert occurrences(text, ["<image>", "<audio>"]) == {"<image>": 1, "<audio>": 0} and media == {"vision": [ITEM]}
        assert unmark(text) == "<user>see <image><image><audio>"


def test_a_template_that_cuts_a_marked_text_leaves_the_rest_readable():
    cut = "{% for m in messages %}{{ m.content.split('<ima')[0] }}{% for c in m.content.split('ge>') %}{{ c }}.{% endfor %}{% endfor %}<image>"
    text = render([{"role": "user", "content": read("a<image>b", STRINGS)[0][0]["content"]}], cut)[0]
    assert unmark(text) == "aa<ima.b.<image>" and occurrences(text, ["<image>"]) == {"<image>": 1}


PRIVATE = "glyphs \ue0c0 \ue0c1 \ue0c2 \U000f0000 \U000f0001 \U0010fffd \ufffe end"


@pytest.mark.parametrize("content", [PRIVATE, [{"type": "text", "text": PRIVATE}], f"<image>{PRIVATE}"])
def test_private_characters_are_the_users(content):
    for template in (STRINGS, PARTS):
        assert PRIVATE in unmark(render(read(content, template)[0], template)[0])


@pytest.mark.parametrize("mark", ["\ud800", "\udc80", "\udffd", "\udffe", "\udfff"])
def test_half_a_surrogate_pair_is_no_text(mark):
    reader = ConversationReader(TOKENS, names_of, {})
    for message in ({"content": f"ab{mark}"}, {"content": [f"ab{mark}"]}, {"content": "", "note": {f"ab{mark}": 1}}):
        with pytest.raises(
            ValueError, match=f"message 1: U.{ord(mark):04X} at character 2 is half of a surrogate pair"
        ):
            reader.read([{"role": "user", "content": "a"}, {"role": "user", **message}], STRINGS)
    with pytest.raises(ValueError, match="half of a surrogate"):
        reader.variables("{{ documents }}", {}, documents=[{"text": mark}])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": [{"name": "f"}]}, r"does not read \['tools'\]"),
        ({"documents": [{"text": "x"}]}, r"does not read \['documents'\]"),
        ({"thinking": None, "day": 1}, r"does not read \['day'\]"),
        ({"messages": []}, r"\['messages'\] cannot be variables"),
        ({"first": 1}, r"\['first'\] cannot be variables"),
    ],
)
def test_variables_that_would_vanish(given, message):
    reader = ConversationReader(TOKENS, names_of, {})
    assert reader.variables("{{ first }}", {}, tools=[], documents=None) == {"tools": [], "documents": None}
    with pytest.raises(ValueError, match=message):
        reader.variables("{{ messages }}{{ first }}", {}, **given)


@pytest.mark.parametrize(
    ("message", "error", "match"),
    [
        ({"content": "a"}, ValueError, "a string as its 'role', got None"),
        ({"role": "tool", "content": {"t": 22}}, TypeError, "string or a list of parts, got dict: write it as text, or JSON"),
        ({"role": "tool", "content": 22}, TypeError, "string or a list of parts, got int"),
        ({"role": "user", "content": b"a"}, TypeError, "string or a list of parts, got bytes"),
        ({"role": "assistant", "tool_calls": {"name": "f"}}, ValueError, "Each of 'tool_calls' must be like"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, ValueError, "Each of 'tool_calls' must be like"),
        ({"role": "assistant", "tool_calls": ["f()"]}, ValueError, "Each of 'tool_calls' must be like"),
    ],
)  # fmt: skip
def test_messages_that_are_none(message, error, match):
    reader = ConversationReader(TOKENS, names_of, {})
    with pytest.raises(error, match=f"message 1: .*{match}"):
        reader.read([{"role": "user", "content": "a"}, message], STRINGS)
    with pytest.raises(ValueError, match="conversation is empty"):
        reader.read([], STRINGS)


def test_keys_of_a_text_part_reach_the_template_but_not_the_gaps_of_a_table():
    part = {"type": "text", "text": "a", "tone": "<image>", "image": None, "audio": {"bytes": None}}
    assert read([part], PARTS)[0][0]["content"] == [
        {"type": "text", "text": "a", "tone": mark_typed("<image>", ["<image>"])}
    ]


OPTIONS = dict.fromkeys(
    ["add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenize", "return_tensors",
     "return_dict", "load_audio_from_video", "sanitize_control_tokens"], False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt begins a new message: choose one"),
        ({"continue_final_message": "thinking", "add_generation_prompt": True}, "choose one"),
        ({"continue_final_message": True, "return_assistant_tokens_mask": True, "tokenize": True, "return_dict": True}, "choose one"),
        ({"return_assistant_tokens_mask": True, "tokenize": True}, "needs tokenize=True and return_dict=True"),
        ({"return_tensors": "pt"}, "return_tensors='pt' needs tokenize=True"),
        ({"return_dict": True}, "needs tokenize=True"),
        ({"sanitize_control_tokens": True}, "needs tokenize=True"),
    ],
)  # fmt: skip
def test_options_that_contradict_or_do_nothing(given, match):
    check_options(OPTIONS | {"tokenize": True, "return_dict": True, "return_tensors": "pt"})
    with pytest.raises(ValueError, match=match):
        check_options(OPTIONS | given)


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"return_tensors", "continue_final_message"}))
@pytest.mark.parametrize("value", ["true", 1, [True]])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got {re.escape(repr(value))}"):
        check_options(OPTIONS | {"tokenize": True, "return_dict": True, name: value})


def test_keywords_are_the_templates_or_the_calls():
    template = "{{ day }}{{ padding }}{% set own = 1 %}{{ own }}"
    assert sorted_keywords(template, {"day": 1, "padding": 2, "own": 3}, {"x": 4}, True) == (
        {"day": 1, "padding": 2}, {"own": 3, "x": 4},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\['own'\] were given twice"):
        sorted_keywords(template, {"own": 3}, {"own": 3}, True)
    with pytest.raises(
        TypeError, match=r"\['own', 'x'\]: the chat template does not read them, and tokenize is not set"
    ):
        sorted_keywords(template, {"own": 3}, {"x": 4}, False)


def test_a_template_is_one_or_the_name_of_one():
    assert chosen_template({"default": STRINGS, "parts": PARTS}, "parts") == PARTS == chosen_template(STRINGS, PARTS)
    for own, chosen in (({"default": STRINGS}, "defualt"), (STRINGS, "rag")):
        with pytest.raises(ValueError, match=f"'{chosen}' is no template, nor the name of one of .'default'."):
            chosen_template(own, chosen)
    with pytest.raises(ValueError, match="no default chat template"):
        chosen_template({"parts": PARTS}, None)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([{"type": "smell"}], ValueError, "'smell' is no modality"),
        ([{"text": "x"}], TypeError, "a dict with a 'type', got {'text': 'x'}"),
        ([3], TypeError, "got 3"),
        ([{"type": "audio", "audio": 0.5}], TypeError, "audio, item 0: expected an item of a message, got 0.5"),
        (
            [{"type": "audio", "audio": ITEM}, {"type": "audio", "audio": np.float32(3)}],
            TypeError,
            "audio, item 1: expected an item of a message, got",
        ),
        ([{"type": "text", "text": None}], ValueError, "a string as its 'text', got None"),
        (
            [{"type": "text", "text": "a", "image": ITEM}],
            ValueError,
            r"an item as its \['image'\]: give it a part of its own",
        ),
    ],
)
def test_parts_that_are_none(content, error, message):
    with pytest.raises(error, match=message):
        read(content)


def test_a_batch_is_a_list_of_conversations():
    assert is_batch([TURNS]) and is_batch((tuple(TURNS),)) and not is_batch(TURNS)
    with pytest.raises(ValueError, match="conversation is empty"):
        is_batch([])
    for wrong in ("hi", {"role": "user"}, 3):
        with pytest.raises(TypeError, match="must be a list of messages, got"):
            is_batch(wrong)
