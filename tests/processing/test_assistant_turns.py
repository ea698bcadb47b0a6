"""The assistant's turns in templates of many families, with and without generation marks, and templates that cannot tell."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from templates import PARTS, STRINGS

from cornstarch_hf.processing import assistant_turns
from cornstarch_hf.processing.assistant_turns import assistant_spans
from cornstarch_hf.processing.conversations import ConversationReader
from cornstarch_hf.processing.rendering import DEFAULT_TEMPLATE, render

COUNTS = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
NO_PROMPT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REVERSED = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}{% elif m.role == 'tool' %}[RESULT]{{ m.content }}{% else %}"
    " {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' or messages[-1].role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% elif messages[-1].role == 'assistant' %}{{ messages[0].content }}{% endif %}"
)
UPPER = STRINGS.replace("m.content }}", "m.content | replace('a', 'A') | truncate(6, true, '', 0) }}")
TRAILER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}{{ '<|assistant|>' if add_generation_prompt else '<|over|>' }}"
SPECIALS = ["<|end|>", "<|im_end|>", "<|endoftext|>"]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def said(role):
    return lambda content: {"role": role, "content": content}


system, user, assistant, tool = said("system"), said("user"), said("assistant"), said("tool")
TALK = [user("5+2?"), assistant("seven"), user("and?"), assistant("five")]
TOOL_TALK = [
    user("weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    tool("rain 3mm"),
    assistant("It is sunny."),
    user("thanks"),
    assistant("welcome"),
]


def labelled(messages, template, **options):
    text, spans = assistant_spans(messages, template, **{"bos_token": "<s>", "eos_token": "</s>"} | options)
    assert text == render(messages, template, **{"bos_token": "<s>", "eos_token": "</s>"} | _variables(options))[0]
    return [text[a:b] for a, b in spans]


def _variables(options):
    return {key: value for key, value in options.items() if key not in ("first", "specials")}


@pytest.mark.parametrize("template", [STRINGS, PARTS, COUNTS, UPPER])
def test_turns_are_found_without_marks_even_where_earlier_text_changes(template):
    assert labelled(TALK, template) == ["seven", "five"]
    assert labelled([system("be brief"), *TALK], template) == ["seven", "five"]
    assert labelled([assistant("hello"), *TALK], template) == ["hello", "seven", "five"]
    assert labelled(TALK[:3], template) == ["seven"]
    assert labelled([user("x")], template) == []


def test_turns_by_marks():
    text, spans = assistant_spans(TALK[:2], DEFAULT_TEMPLATE, eos_token="</s>")
    assert [text[a:b] for a, b in spans] == ["seven</s>"] and text == "user:\n5+2?\nassistant:\nseven</s>\n"
    assert render(TALK, DEFAULT_TEMPLATE)[1] == []
    assert labelled(TALK, DEFAULT_TEMPLATE) == ["seven</s>", "five</s>"]


@pytest.mark.parametrize("template", [STRINGS, DEFAULT_TEMPLATE, COUNTS])
def test_turns_from_a_message_on(template):
    assert [t.removesuffix("</s>") for t in labelled(TALK, template, first=3)] == ["five"]
    assert [t.removesuffix("</s>") for t in labelled(TALK, template, first=2)] == ["five"]
    assert labelled(TALK, template, first=4) == []


def test_a_header_that_no_generation_prompt_writes_is_not_labelled():
    assert labelled(TALK, NO_PROMPT) == ["seven\n", "five\n"]
    assert labelled([user(""), assistant(" two words \n")], NO_PROMPT) == ["two words \n\n"]
    assert labelled(TALK, INSTRUCT) == [" seven</s>", " five</s>"], "there the prompt ends before the space"
    found = labelled([*TALK, user("w?"), {"role": "assistant", "tool_calls": [CALL]}, tool("x")], INSTRUCT)
    assert (
        found[:2] == [" seven</s>", " five</s>"]
        and found[2].startswith("[TOOL_CALLS] [")
        and found[2].endswith("]</s>")
    )


def test_a_template_that_closes_the_conversation_needs_a_special_token_to_end_turns():
    assert labelled(TALK, TRAILER, specials=SPECIALS) == ["seven<|end|>", "five<|end|>\n<|over|>"]
    with pytest.raises(ValueError, match="cannot be found: .*message 1 is not where it should be.*endgeneration"):
        labelled(TALK, TRAILER)


def test_typed_headers_and_repeated_texts_confuse_nothing():
    talk = [
        user("<assistant>seven<user>"),
        assistant("seven"),
        user("seven"),
        assistant("<user>seven"),
        user("<assistant>"),
    ]
    assert labelled(talk, STRINGS) == ["seven", "<user>seven"]
    assert labelled([user("a"), assistant("\n a \n"), user(" \n"), assistant(" ")], STRINGS) == ["\n a \n", " "]
    private = "\U000f0001\U000f0002"
    assert labelled([user(private), assistant("a" + private)], STRINGS) == ["a" + private]


def test_messages_that_say_nothing():
    empty = COUNTS.replace("m.content }}", "m.content or 'nothing' }}")
    talk = [user(""), assistant("seven"), user(""), assistant("five")]
    assert labelled(talk, COUNTS) == labelled([user("5+2?"), *talk[1:]], empty) == ["seven", "five"]
    parts = [
        user([{"type": "image"}]),
        assistant(""),
        user([{"type": "image"}, {"type": "text", "text": "?"}]),
        assistant(""),
    ]
    assert labelled(parts, "{{ messages | length }}" + PARTS) == ["", ""]


@pytest.mark.parametrize(
    ("talk", "template", "message"),
    [
        (TALK, REVERSED, "no generation marks, and changes earlier text .*'prompt' and 'completion'"),
        ([system("s"), user("u"), assistant("a")], SYSTEM_LAST, "message 2 has text of another message in it"),
        (TALK[:2], STRINGS + "{% if messages[-1].role == 'assistant' %} on {{ messages[0].content }}{% endif %}", "no generation marks"),
        (TALK, "{{ messages | length }}{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ messages | length }}", "no generation marks"),
        (TALK, STRINGS + "{% if messages | length < 3 %}{{ raise_exception('too short') }}{% endif %}", "too short"),
        (TOOL_TALK, STRINGS, "Message 1 calls a tool, but the chat template does not write that"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_told_apart(talk, template, message):
    with pytest.raises(ValueError, match=message):
        labelled(talk, template)


def test_marks_that_do_not_tell_where_a_completion_begins():
    talk = [user(""), assistant(""), user(""), assistant("x")]
    assert labelled(talk, DEFAULT_TEMPLATE, first=3) == ["x</s>"]
    empty = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '!' if m.content else 'nothing' }}"
        "{% endgeneration %}{% else %}{{ m.content + '?' if m.content else 'no' }}{% endif %}{% endfor %}"
    )
    assert labelled(TALK, empty, first=2) == ["five!"]
    with pytest.raises(ValueError, match="does not tell which turns are the completion's"):
        labelled(talk, empty, first=3)


BODIES = {
    "string": "{{ m.content }}",
    "parts": "{% for c in m.content %}{{ c.text }}{% endfor %}",
    "part": "{{ m.content[0]['text'] }}",
}
HEADS = {"prompt": "{% if add_generation_prompt %}[assistant]{% endif %}", "none": ""}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("mine", BODIES)
@pytest.mark.parametrize("theirs", BODIES)
def test_turns_are_the_same_words_in_whatever_form_each_role_is_written(theirs, mine, head):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}" + BODIES[mine] + "</s>{% else %}" + BODIES[theirs]
        + "{% endif %}{% endfor %}" + HEADS[head]
    )  # fmt: skip
    reader = ConversationReader({"vision": "<image>"}, lambda kind: ["vision"], {"vision": "image"})
    parts = [{"type": "text", "text": "see "}, {"type": "text", "text": "ven"}]
    for talk in (
        [system("be brief"), *TALK[:2], user(parts), assistant(parts)],
        [assistant("hello"), user([{"type": "image", "image": 1}]), assistant(""), user("<image>?"), assistant("five")],
    ):
        found = labelled(reader.read(talk, template)[0], template)
        said_ = [m["content"] if isinstance(m["content"], str) else "see ven" for m in talk if m["role"] == "assistant"]
        assert found == [f"{text}</s>" for text in said_]


# ---- templates of real models, as TRL ships them for its tests and trainers

FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"
READER = ConversationReader({}, lambda kind: [], {})
PLAIN_TALKS = {
    "two turns": [user("hi there"), assistant("hello you"), user("more?"), assistant("yes \n\nok")],
    "system": [system("be nice"), user("hi"), assistant("hello")],
    "user last": [user("q1"), assistant("answer"), user("q2")],
}


def template(name):
    return (FOLDER / f"{name}.jinja").read_text()


@pytest.mark.parametrize(
    "name", ["llama3", "gemma3", "qwen3_instruct_2507", "qwen3_vl", "qwen2_5_vl", "cohere2", "lfm2"]
)
@pytest.mark.parametrize("talk", PLAIN_TALKS)
def test_the_same_turns_as_generation_marks_tell(name, talk):
    found, marked = (labelled(PLAIN_TALKS[talk], template(n)) for n in (name, f"{name}_training"))
    assert found == marked and [t.strip()[:5] for t in found] == [
        m["content"][:5] for m in PLAIN_TALKS[talk] if m["role"] == "assistant"
    ]


CHATML = "<|im_end|>\n"
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", [WEATHER + CHATML, "It is sunny." + CHATML, "welcome" + CHATML]),
        ("qwen3", [WEATHER + CHATML, "It is sunny." + CHATML, "<think>\n\n</think>\n\nwelcome" + CHATML]),
        ("llama3_1", ['{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>', "It is sunny.<|eot_id|>", "welcome<|eot_id|>"]),
    ],
)  # fmt: skip
def test_tool_calls_are_the_assistants_and_results_are_not(name, expected):
    assert labelled(TOOL_TALK, template(name), tools=TOOLS) == expected
    assert labelled(TOOL_TALK, template(name), tools=TOOLS, first=3) == expected[1:]
    assert labelled(TOOL_TALK[:3], template(name), tools=TOOLS, first=1)[0].endswith(expected[0])


def test_reasoning_that_a_template_drops_from_earlier_turns():
    talk = [
        user("q1"),
        assistant("<think>\nhm\n</think>\n\nfirst"),
        user("q2"),
        assistant("<think>\nso\n</think>\n\nlast"),
    ]
    assert labelled(talk, template("qwen3")) == ["first" + CHATML, "<think>\nso\n</think>\n\nlast" + CHATML]
    assert labelled(talk[:2], template("qwen3"), enable_thinking=True)[0].startswith("<think>\nhm")
    with pytest.raises(ValueError, match="cannot be found"):  # the prompt closes the reasoning that the turn has
        labelled(talk, template("qwen3"), enable_thinking=False)
    opened = labelled(talk, template("qwen3_5_think"))  # its generation prompt opens the reasoning
    spaced = [user("q"), assistant(" a "), user("q"), assistant("b")]
    end = "<｜end▁of▁sentence｜>"  # noqa: RUF001
    assert labelled(spaced, template("deepseek_r1_distill")) == [f" a {end}", f"b{end}"]
    assert opened == ["first" + CHATML, "so\n</think>\n\nlast" + CHATML]
    assert labelled([user("hi"), assistant("hello")], template("phi3"), specials=SPECIALS) == ["hello<|end|>\n</s>"]
    assert labelled(TALK, template("phi3"), specials=SPECIALS)[0] == "seven<|end|>"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training")))
@pytest.mark.parametrize("talk", [*PLAIN_TALKS, "tools"])
def test_no_template_gets_a_users_words_labelled(name, talk):
    """Either the turns are found, with all that the assistant says and nothing that others say, or an error tells."""
    spoken = messages = PLAIN_TALKS.get(talk, TOOL_TALK)
    try:
        messages = READER.read(messages, template(name))[0]
        found = labelled(messages, template(name), specials=SPECIALS, tools=TOOLS if talk == "tools" else None)
    except Exception as error:
        assert isinstance(error, ValueError) or "jinja" in type(error).__module__ or isinstance(error, TypeError), error
        return
    said_by = {
        who: [m["content"] for m in spoken if (m["role"] == "assistant") == who and m["content"]]
        for who in (True, False)
    }
    assert all(any(words in turn for turn in found) for words in said_by[True])
    assert not any(turn.startswith(("<|im_start|>", "<start_of_turn>", "<|start_header_id|>")) for turn in found)
    assert not any(words in turn for turn in found for words in said_by[False] if len(words) > 2 and words != "more?")


# ---- long conversations


def long_talk(seed, turns=24):
    """A random talk: with a system's words or not, with tools, empty words, reasoning, words said often."""
    rng = random.Random(seed)
    words = ["a", "five", "and what?", "line\nline", " b ", "", "<assistant>", "seven seven"]
    found = [system("be brief")] if rng.random() < 0.5 else []
    for _ in range(turns):
        found.append(user(rng.choice(words) or "q"))
        if rng.random() < 0.15:
            found += [{"role": "assistant", "content": "", "tool_calls": [CALL]}, tool(rng.choice(words))]
        thought = "<think>\nhm\n</think>\n\n" if rng.random() < 0.15 else ""
        found.append(assistant(thought + rng.choice(words[:-1] if rng.random() < 0.2 else words[:5])))
    return found


def outcome(messages, template):
    try:
        return labelled(READER.read(messages, template)[0], template, specials=SPECIALS, tools=TOOLS)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
SHORT = ["qwen3", "llama3", "phi3", "gemma3"]
EVERY = [pytest.param(name, marks=[] if name in SHORT else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", [*EVERY, "STRINGS", "INSTRUCT", "TRAILER", "SYSTEM_LAST", "NO_PROMPT"])
def test_turns_of_long_talks_are_those_that_are_found_one_by_one(monkeypatch, name):
    given = globals()[name] if name.isupper() else template(name)
    talks = [long_talk(seed) for seed in range(2)]
    talks += [[one for one in talk if "tool_calls" not in one and one["role"] != "tool"] for talk in talks]
    found = [outcome(talk, given) for talk in talks]
    monkeypatch.setattr(assistant_turns, "_SURE", 10_000)
    assert found == [outcome(talk, given) for talk in talks]


NO_THINK = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if WHEN %}<think>

</think>

{% endif %}{% endif %}"""
HANGING = {  # templates of which something else than the roles decides where a turn begins or ends
    "the last message": NO_THINK.replace("WHEN", "'/no_think' in messages[-1].content"),
    "any message": NO_THINK.replace("WHEN", "'/no_think' in messages | map(attribute='content') | join"),
    "a switch": "{% set ns = namespace(on=false) %}" + NO_THINK.replace("WHEN", "ns.on").replace(
        "<|im_start|>{{ m.role }}", "{% if '/no_think' in m.content %}{% set ns.on = true %}{% endif %}<|im_start|>{{ m.role }}"),
    "the length": NO_THINK.replace("WHEN", "messages[-1].content | length > 4"),
    "the number": NO_THINK.replace("WHEN", "messages | length > 20"),
    "a macro": "{% macro p() %}{% if '/no_think' in messages[-1].content %}<think>\n\n</think>\n\n{% endif %}{% endmacro %}"
    + NO_THINK[: NO_THINK.index("{% if WHEN")] + "{{ p() }}{% endif %}",
    "an end": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or messages | length > 24 %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HANGING)
@pytest.mark.parametrize("late", [3, 9, 14])
def test_what_hangs_on_messages_is_looked_up_for_each(monkeypatch, name, late):
    talk = []
    for i in range(16):
        talk += [user(f"q{i}" + (" /no_think" if i >= late else "")), assistant(f"a{i}")]
    found = outcome(talk, HANGING[name])
    monkeypatch.setattr(assistant_turns, "_SURE", 10_000)
    assert found == outcome(talk, HANGING[name])


@pytest.mark.parametrize(
    ("template", "constant"),
    [
        (STRINGS, True), (COUNTS, True), (NO_PROMPT, True), (TRAILER, True), (INSTRUCT, True),
        *((HANGING[name], name in ("an end",)) for name in HANGING),
        ("{% if add_generation_prompt %}{{ bos_token }}{% if think is defined %}<think>{% endif %}{% endif %}", True),
        ("{% if messages %}{% if add_generation_prompt %}a{% endif %}{% endif %}", False),
        ("{% set a = add_generation_prompt %}{% if a %}b{% endif %}", False),
    ],
)  # fmt: skip
def test_whether_a_generation_prompt_is_the_same_behind_every_talk(template, constant):
    assert assistant_turns.writes_constant_prompt(template) is constant


def test_a_long_talk_takes_no_more_renderings_than_a_short_one(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return render(*args, **kwargs)

    monkeypatch.setattr(assistant_turns, "render", counted)
    numbers = []
    for turns in (16, 64, 256):
        calls.clear()
        found = labelled([make(f"{i} a") for i in range(turns) for make in (user, assistant)], STRINGS)
        assert [text.split()[0] for text in found] == [str(i) for i in range(turns)]
        numbers.append(len(calls))
    assert max(numbers) < 60, numbers


def short_talks(seed, number):
    """Talks of a table's rows: of two or three turns each, with or without a system's words, words said often."""
    rng = random.Random(seed)
    words = ["a", "five", "and what?", "line\nline", " b ", "/no_think", "seven seven", "longer than that"]
    talks = []
    for _ in range(number):
        talk = [system("be brief")] if rng.random() < 0.5 else []
        for _ in range(rng.choice((2, 3))):
            talk += [user(rng.choice(words)), assistant(rng.choice(words))]
        talks.append(talk)
    return talks


@pytest.mark.parametrize(
    "name", [*EVERY, *HANGING, "STRINGS", "INSTRUCT", "TRAILER", "SYSTEM_LAST", "NO_PROMPT", "COUNTS", "UPPER"]
)
def test_turns_of_many_talks_of_one_form_are_those_that_are_found_one_by_one(monkeypatch, name):
    given = HANGING.get(name) or (globals()[name] if name.isupper() else template(name))
    assistant_turns._places_of.cache_clear()
    talks = short_talks(0, 60)
    found = [outcome(talk, given) for talk in talks]
    monkeypatch.setattr(assistant_turns, "_SURE", 10_000)
    assert found == [outcome(talk, given) for talk in talks]


def test_what_is_known_of_a_form_is_not_rendered_again_and_looked_at_from_time_to_time(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return render(*args, **kwargs)

    assistant_turns._places_of.cache_clear()
    monkeypatch.setattr(assistant_turns, "render", counted)
    numbers = []
    for i in range(60):
        calls.clear()
        talk = [make(f"word {i} {k}") for k in range(3) for make in (user, assistant)]
        assert [text.split()[1] for text in labelled(talk, STRINGS)] == [str(i)] * 3
        numbers.append(len(calls))
    assert max(numbers[:8]) > 5 and sorted(numbers)[:40] == [min(numbers)] * 40 and min(numbers) <= 4, numbers
    assert max(numbers[16:]) > min(numbers)  # looked at again
    # Other variables are another form.
    calls.clear()
    labelled(talk, STRINGS, bos_token="<other>")
    assert len(calls) == numbers[0]


def test_a_form_in_which_places_differ_is_looked_up_for_each(monkeypatch):
    """The end of a turn hangs on what another message says, while all between two messages is the same."""
    hanging = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or WHEN %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    noting = "{% set ns = namespace(n=0) %}" + hanging.replace(
        "{{ m.content }}", "{{ m.content }}{% set ns.n = m.content | length %}"
    )
    first = [[user("short"), assistant(f"a{i}"), user("q"), assistant("b")] for i in range(12)]
    others = [[user("much longer"), assistant(f"a{i} a a a"), user("q"), assistant("b")] for i in range(70)]
    for given in (
        hanging.replace("WHEN", "messages[0].content | length < 9"),
        hanging.replace("WHEN", "(messages | first).content | length < 9"),
        hanging.replace("WHEN", "messages[1].content | length < 9"),
        noting.replace("WHEN", "ns.n < 9"),
    ):
        assistant_turns._places_of.cache_clear()
        monkeypatch.setattr(assistant_turns, "_SURE", 8)
        found = [outcome(talk, given) for talk in [*first, *others]]
        monkeypatch.setattr(assistant_turns, "_SURE", 10_000)
        assert found == [outcome(talk, given) for talk in [*first, *others]]


def test_a_contradiction_makes_a_form_unknown(monkeypatch):
    assistant_turns._places_of.cache_clear()
    monkeypatch.setattr(assistant_turns, "form_by", lambda template: False)  # as if it were not seen
    given = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last or messages[0].content | length < 9 %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talks = [
        [user("short" if i < 12 else "much longer"), assistant(f"a{i}"), user("q"), assistant("b")] for i in range(150)
    ]
    found = [outcome(talk, given) for talk in talks]
    monkeypatch.setattr(assistant_turns, "_SURE", 10_000)
    expected = [outcome(talk, given) for talk in talks]
    differ = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert all(12 <= i < 12 + 2 * assistant_turns._AGAIN for i in differ), differ


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (STRINGS, False), (TRAILER, False), (NO_PROMPT, False), (INSTRUCT, False), (COUNTS, None), (REVERSED, None),
        (SYSTEM_LAST, None), (NO_THINK.replace("WHEN", "'a' in messages[-1].content"), None),
        (NO_THINK.replace("WHEN", "messages[-1].role == 'user'"), False),
        (NO_THINK.replace("WHEN", "messages[0]['role'] == 'system'"), False),
        (NO_THINK.replace("WHEN", "messages[0]['content'] == 'a'"), True),
        (NO_THINK.replace("WHEN", "messages[1]['content'] == 'a'"), None),
        (NO_THINK.replace("WHEN", "messages"), None),
        (STRINGS + "{% for m in messages %}{{ loop.previtem.content }}{% endfor %}", None),
        (STRINGS + "{% for m in messages if m.content %}{% endfor %}", None),
    ],
)  # fmt: skip
def test_by_what_conversations_have_one_form(template, form):
    assert assistant_turns.form_by(template) is form
