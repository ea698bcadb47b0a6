"""Random conversations with media: labels are what the assistant writes, in templates of three families, marked and not."""

import json

import pytest
import tiny
from helpers import compose_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cornstarch_hf import MultimodalCollator

# [[ and ]] become generation marks, or nothing.
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '# Tools' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}[[
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls %}{{ '\\n<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}]]
{%- elif message.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif not (loop.first and tools and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HEADERS = """\
{{- bos_token }}
{%- if tools %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + (tools | tojson) + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}[[
{%- if message.tool_calls %}{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}
{%- else %}{{ message.content | trim }}{% endif %}{{ '<|eot_id|>' }}]]
{%- elif message.content is string %}{{ message.content | trim + '<|eot_id|>' }}
{%- else %}
{%- for part in message.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text | trim }}{% endif %}{% endfor %}
{{- '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
INSTRUCT = """\
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set seen = namespace(users=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{% set seen.users = seen.users + 1 %}
{%- if tools and seen.users == users %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'system' %}{{ '[SYSTEM]' + message.content + '[/SYSTEM]' }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.tool_calls %}[[{{ '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}]]
{%- else %}[[{{ ' ' + message.content | trim + eos_token }}]]{% endif %}
{%- endfor %}"""


def dumped(calls):
    return [json.dumps(call["function"], ensure_ascii=False) for call in calls]


# What the assistant writes for a text, and for tool calls without one.
FAMILIES = {
    "chatml": (CHATML, lambda text: text + "<|im_end|>\n", lambda calls: "".join(f"\n<tool_call>\n{c}\n</tool_call>" for c in dumped(calls)) + "<|im_end|>\n"),
    "headers": (HEADERS, lambda text: text.strip() + "<|eot_id|>", lambda calls: "".join(dumped(calls)) + "<|eot_id|>"),
    "instruct": (INSTRUCT, lambda text: " " + text.strip() + "</s>", lambda calls: "[TOOL_CALLS] [" + ", ".join(dumped(calls)) + "]</s>"),
}  # fmt: skip
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]"]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
IMAGES, SOUNDS = [tiny.image(i) for i in range(3)], [tiny.sound(i) for i in range(2)]

words = st.lists(
    st.sampled_from(["the fox", " ", "\n", "\n\n", "é🦊", "<image>", "<audio>", "assistant", "<|im_end|>", "[/INST]", ".", "7"]),
    max_size=5,
).map("".join)  # fmt: skip
text_part = words.map(lambda text: {"type": "text", "text": text})
image_part = st.sampled_from(IMAGES).map(lambda image: {"type": "image", "image": image})
sound_part = st.sampled_from(SOUNDS).map(lambda sound: {"type": "audio", "audio": sound})
user = st.one_of(words, st.lists(st.one_of(text_part, image_part, sound_part), min_size=1, max_size=4)).map(
    lambda content: {"role": "user", "content": content}
)
assistant = words.map(lambda text: {"role": "assistant", "content": text})
calls = st.lists(words, min_size=1, max_size=2).map(
    lambda cities: [{"type": "function", "function": {"name": "weather", "arguments": {"city": c}}} for c in cities]
)
round_of_tools = st.tuples(
    st.tuples(calls, st.sampled_from(["", None])).map(
        lambda c: {"role": "assistant", "content": c[1], "tool_calls": c[0]}
    ),
    words.map(lambda text: {"role": "tool", "content": "result " + text}),
).map(list)
exchange = st.tuples(user, st.one_of(st.just([]), round_of_tools), assistant).map(lambda x: [x[0], *x[1], x[2]])


@st.composite
def conversations(draw):
    messages = [m for part in draw(st.lists(exchange, min_size=1, max_size=3)) for m in part]
    if draw(st.booleans()):
        messages = [{"role": "system", "content": "be brief " + draw(words)}, *messages]
    return [*messages, draw(user)] if draw(st.booleans()) else messages


@pytest.fixture(scope="module")
def processor():
    made = compose_tiny(["clip", "whisper"])[1]
    made.tokenizer.add_tokens(SPECIALS, special_tokens=True)
    return made


def written(messages, family):
    _, says, does = FAMILIES[family]
    turns = [m for m in messages if m["role"] == "assistant"]
    return "".join(does(m["tool_calls"]) if m.get("tool_calls") else says(m["content"]) for m in turns)


def kept(labels):
    return [label for label in labels if label != -100]


def check(processor, family, marked, messages, tools, data):
    template = FAMILIES[family][0]
    marks = ("{%- generation %}", "{%- endgeneration %}") if marked else ("", "")
    processor.chat_template = template.replace("[[", marks[0]).replace("]]", marks[1])
    row = {"messages": messages, "tools": TOOLS if tools else None}
    batch = MultimodalCollator(processor)([row])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert processor.decode(kept(labels)) == written(messages, family)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    placeholders = {name: processor.config.modality(name)["token_id"] for name in processor.tokens}
    assert not set(kept(labels)) & set(placeholders.values())

    limit, side = data.draw(st.integers(1, len(ids)), label="limit"), data.draw(st.sampled_from(["right", "left"]))
    cut = MultimodalCollator(processor, max_length=limit, truncation=side)
    sizes = {"vision": ("pixel_values", 5), "audio": ("input_features", 6)}
    try:
        short = cut([row])
    except ValueError as error:
        assert "none has a label" in str(error)
        part = labels[:limit] if side == "right" else labels[-limit:]
        widest = 6  # what moving the cut out of an item may take away besides
        assert not kept(part[:-widest] if side == "right" else part[widest:])
        return
    length = short["input_ids"].shape[1]
    part = slice(length) if side == "right" else slice(len(ids) - length, None)
    assert (
        length <= limit and short["input_ids"][0].tolist() == ids[part] and short["labels"][0].tolist() == labels[part]
    )
    for name, (key, size) in sizes.items():
        items = len(short[key]) if key in short else 0
        assert ids[part].count(placeholders[name]) == size * items
        if items:
            assert (short[key] == (batch[key][:items] if side == "right" else batch[key][-items:])).all()


@pytest.mark.filterwarnings("ignore:.*were longer than max_length")
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), tools=st.booleans(), data=st.data())
def test_labels_are_what_the_assistant_writes(processor, family, marked, messages, tools, data):
    check(processor, family, marked, messages, tools, data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*were longer than max_length")
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), tools=st.booleans(), data=st.data())
def test_labels_are_what_the_assistant_writes_more(processor, family, marked, messages, tools, data):
    check(processor, family, marked, messages, tools, data)
