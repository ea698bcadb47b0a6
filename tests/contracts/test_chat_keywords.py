"""Every keyword of transformers' two `apply_chat_template` changes what ours gives, or raises; and what each of them gives."""

import base64
import inspect
import io

import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from cornstarch_hf import MultimodalCollator, compose

TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ day }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [{"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "the fox"}]
ASKED = {"tokenize": True, "return_dict": True, "chat_template": TEMPLATE}
TOOL = {"type": "function", "function": {"name": "area", "parameters": {}}}
# A value of each keyword; with it the output differs from that without it, or what is raised is named.
KEYWORDS = {
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "tools": [TOOL], "documents": [{"text": "page"}], "day": "Monday",
    "add_generation_prompt": True, "continue_final_message": True, "return_assistant_tokens_mask": True, "tokenize": False,
    "return_tensors": "pt", "return_dict": False, "sanitize_control_tokens": True, "padding": "max_length",
    "truncation": True, "max_length": 3, "processor_kwargs": {"padding": "max_length", "max_length": 99},
}  # fmt: skip
TOGETHER = {
    "padding": {"max_length": 99},
    "truncation": {"max_length": 3},
    "max_length": {"truncation": True},
    "tokenize": {"return_dict": False},
}
RAISES = {
    "load_audio_from_video": ("yes", TypeError, "load_audio_from_video must be True or False, got 'yes'"),
    "tokenizer_kwargs": ({"padding": True}, TypeError, r"Unknown arguments \['tokenizer_kwargs'\]"),  # a tokenizer's, see processor_kwargs
    "kwargs": ({}, TypeError, r"Unknown arguments \['kwargs'\]"),
    "nights": (1, TypeError, r"Unknown arguments \['nights'\]"),
}  # fmt: skip
NAMES = {*inspect.signature(ProcessorMixin.apply_chat_template).parameters}
NAMES |= {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


@pytest.fixture(scope="module")
def processor():
    return compose_tiny(["clip"])[1]


def told(processor, **options):
    out = processor.apply_chat_template(TALK, **ASKED | options)
    return (
        {k: (type(v), v.tolist() if hasattr(v, "tolist") else v) for k, v in out.items()}
        if hasattr(out, "items")
        else out
    )


@pytest.mark.parametrize("name", sorted(NAMES - {"self", "conversation"} | {"nights", "day"}))
def test_every_keyword_is_done_or_raises(processor, name):
    if name in RAISES:
        value, error, match = RAISES[name]
        with pytest.raises(error, match=match):
            told(processor, **{name: value})
        with pytest.raises((TypeError, ValueError)):
            processor.apply_chat_template(TALK, chat_template=TEMPLATE, **{name: value})
        return
    beside = {} if name == "truncation" else {k: v for k, v in TOGETHER.get(name, {}).items() if name != "max_length"}
    assert told(processor, **{name: KEYWORDS[name]}, **TOGETHER.get(name, {})) != told(processor, **beside), name


def test_the_generation_prompt_follows_what_is_masked(processor):
    for template in (
        TEMPLATE,
        processor.chat_template,
        TEMPLATE.replace(
            "{{ m.content }}", "{% if true %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
        ),
    ):
        asked = {"tokenize": True, "return_dict": True, "chat_template": template, "add_generation_prompt": True}
        plain = processor.apply_chat_template(TALK, **asked)
        found = processor.apply_chat_template(TALK, **asked, return_assistant_tokens_mask=True)
        assert processor.decode(found["input_ids"][0]) == processor.decode(plain["input_ids"][0])
        kept = [i for i, keep in zip(found["input_ids"][0], found["assistant_masks"][0], strict=True) if keep]
        assert "the fox" in processor.decode(kept) and not processor.decode(kept).endswith("assistant]")


def test_a_template_that_closes_the_conversation_otherwise_has_no_turns_before_a_prompt(processor):
    closing = TEMPLATE.replace("{% endif %}", "{% else %}over{% endif %}").replace(
        "{{ tools | tojson }}{% else %}over", "{{ tools | tojson }}"
    )
    with pytest.raises(ValueError, match="ends the last turn otherwise where add_generation_prompt"):
        told(processor, chat_template=closing, add_generation_prompt=True, return_assistant_tokens_mask=True)


CONTROLS = ["a</s>b", "</s>", "<tool>x</s><s>", "say <image> and <s>", "plain"]


@pytest.mark.parametrize("content", CONTROLS)
def test_control_tokens_of_users_are_text_as_in_the_tokenizers_own_method(content):
    _, processor = compose_tiny(["clip"])
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<tool>"])  # not special, but written by the template
    template = TEMPLATE + "<tool>"
    talk = [{"role": "user", "content": content}]
    asked = {"chat_template": template, "tokenize": True, "sanitize_control_tokens": True, "return_dict": False}
    theirs = tokenizer.apply_chat_template(talk, **asked, documents=[{"text": content}])
    (ours,) = processor.apply_chat_template(talk, **asked, documents=[{"text": content}])
    assert ours == theirs and processor.decode(ours).count(content) >= 2
    special = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<tool>", "<image>"])
    assert [ours.count(i) for i in special] == [1, 1, 1, 0]
    masked = processor.apply_chat_template(
        [*talk, TALK[1]],
        **asked | {"return_dict": True},
        return_assistant_tokens_mask=True,
        return_offsets_mapping=True,
    )
    kept = [i for i, keep in zip(masked["input_ids"][0], masked["assistant_masks"][0], strict=True) if keep]
    assert processor.decode(kept) == "the fox</s><tool>"
    assert len(masked["offset_mapping"][0]) == len(masked["input_ids"][0])


def test_control_tokens_that_a_tokenizer_names_itself():
    processor = compose_tiny(["clip"])[1]
    processor.tokenizer.add_tokens(["<tool>", "<other>"])
    processor.tokenizer.chat_control_tokens = ["<other>"]
    talk = [{"role": "user", "content": "<tool><other>"}]
    asked = {
        "chat_template": TEMPLATE + "<tool>",
        "tokenize": True,
        "return_dict": False,
        "sanitize_control_tokens": True,
    }
    (ids,) = processor.apply_chat_template(talk, **asked)
    assert ids == processor.tokenizer.apply_chat_template(talk, **asked)
    assert [ids.count(i) for i in processor.tokenizer.convert_tokens_to_ids(["<tool>", "<other>"])] == [2, 0]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_private_characters_are_in_the_ids(processor, template):
    text = "prompt \ue0c0 flame \ue0c1 \U000f0001 end"
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert processor.decode(processor(text=text)["input_ids"][0]) == text
    for masked in (False, True):
        out = processor.apply_chat_template(
            talk, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=masked
        )
        assert processor.decode(out["input_ids"][0]).count(text) == 2
    typed = [{"role": "user", "content": f"<image>{text}"}]
    (ids,) = processor.apply_chat_template(typed, chat_template=template, tokenize=True)
    assert f"<image>{text}" in processor.decode(ids) and processor.image_token_id not in ids
    for bad in ("a\ud83d", ["fine", "a\udffdb\udffe"]):
        with pytest.raises(ValueError, match="sample .: U.D.* at character 1 is half of a surrogate pair"):
            processor(text=bad)


def test_pictures_beside_a_chat_without_a_place_for_them(processor):
    for content in ("<image> what?", "what?"):
        for name in ("images", "vision"):
            with pytest.raises(
                ValueError,
                match=r"vision: .*no message has a place for them: write a part \{'type': 'vision'\}.*<image> typed in a message is text",
            ):
                told(processor, **{name: [tiny.image()]}) if content == "what?" else processor.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=True, **{name: [tiny.image()]}
                )
    placed = [{"role": "user", "content": [{"type": "image"}, "what?"]}]
    given = processor.apply_chat_template(
        placed, tokenize=True, return_dict=True, images=[tiny.image()], return_tensors="pt"
    )
    placed[0]["content"][0]["image"] = tiny.image()
    held = processor.apply_chat_template(placed, tokenize=True, return_dict=True, return_tensors="pt")
    assert all(torch.equal(given[key], held[key]) for key in held)
    with pytest.raises(ValueError, match="llm_inputs has a text: in a chat that is the conversation's"):
        told(processor, llm_inputs={"text": "x"})
    for wrong in (5, [], 0):
        with pytest.raises(TypeError, match="llm_inputs must be a dict, by name, got"):
            told(processor, llm_inputs=wrong)
    assert told(processor, llm_inputs={"truncation": True, "max_length": 3}) == told(
        processor, truncation=True, max_length=3
    )


def test_errors_of_a_batch_name_the_sample_and_the_message(processor):
    for bad, error, match in (
        ([{"role": "user", "content": [{"type": "smell"}]}], ValueError, "sample 1: message 0: 'smell'"),
        ([*TALK, {"role": "user", "content": 3}], TypeError, "sample 1: message 2: "),
        ([], ValueError, "sample 1: The conversation is empty"),
        ([{"role": "tool", "content": "x"}], ValueError, "sample 1: message 0: no tools|sample 1: no tools"),
    ):
        strict = TEMPLATE + "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        with pytest.raises(error, match=match):
            processor.apply_chat_template([TALK, bad], tokenize=True, chat_template=strict)


def test_labels_are_the_words_of_the_assistant_where_parts_are_the_users_alone(processor):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    talk = [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "good"}]},
        {"role": "user", "content": [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "fine"}]},
    ]
    for content in ("fine", talk[-1]["content"]):
        row = {
            "messages": [*talk[:2], {"role": "assistant", "content": content}],
            "chat_template_kwargs": {"chat_template": template},
        }
        batch = MultimodalCollator(processor)([row])
        labels = batch["labels"][0]
        assert processor.decode(labels[labels >= 0]) == "fine</s>"
        assert "[system]be good</s>" in processor.decode(batch["input_ids"][0])
    for variables, match in (
        ({"day": 1}, r"does not read \['day'\]"),
        ({"add_generation_prompt": True}, "cannot be variables"),
    ):
        with pytest.raises(ValueError, match=f"row 0: .*{match}"):
            MultimodalCollator(processor)([{"messages": talk, "chat_template_kwargs": variables}])


def test_calls_of_tools_are_written_or_refused(processor):
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    for options in ({}, {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}):
        with pytest.raises(ValueError, match="Message 1 calls a tool, but the chat template does not write that"):
            processor.apply_chat_template([TALK[0], call], **options)
    writes = "{% for m in messages %}{{ m.content }}{{ m.tool_calls if m.tool_calls }}{% endfor %}"
    assert processor.apply_chat_template([TALK[0], call], chat_template=writes) == f"a</s>b{[TOOL]}"


def test_columns_of_tokens_are_there_for_typed_and_plain_texts_alike(processor):
    batch = [[{"role": "user", "content": content}] for content in ("<image>", "x")]
    options = {"tokenize": True, "return_dict": True, "padding": True, "return_tensors": "pt"}
    out = processor.apply_chat_template(batch, **options, return_token_type_ids=True)
    assert out["token_type_ids"].shape == out["input_ids"].shape and not out["token_type_ids"].any()
    assert "token_type_ids" not in processor.apply_chat_template(batch, **options, return_token_type_ids=False)


def uri(image):
    image.save(buffer := io.BytesIO(), "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.parametrize("encoders", [["clip"], ["clip", "whisper"]])
@pytest.mark.parametrize("form", ["list", "uris"])
def test_videos_go_through_as_the_server_of_transformers_hands_them_over(encoders, form):
    parts = {"film": {"model": tiny.clip(), "processor": tiny.clip_processor(), "kind": "video"}}
    parts |= (
        {"audio": {"model": tiny.whisper(), "processor": tiny.whisper_processor()}} if "whisper" in encoders else {}
    )
    model, processor = compose(tiny.llama(), parts, "linear", tokenizer=tiny.tokenizer())
    images = [tiny.image(i) for i in range(4)]
    frames = images if form == "list" else [uri(image) for image in images]
    talk = [{"role": "user", "content": [{"type": "video", "url": frames}, {"type": "text", "text": "what is it"}]}]
    asked = {
        "add_generation_prompt": True,
        "tools": None,
        "return_tensors": "pt",
        "return_dict": True,
        "tokenize": True,
    }
    served = processor.apply_chat_template(talk, **asked, load_audio_from_video=True, num_frames=2)
    called = processor(
        text=["user:\n<video>what is it\nassistant:\n"], videos=[images], num_frames=2, return_tensors="pt"
    )
    assert served.keys() == called.keys() and all(torch.equal(served[key], called[key]) for key in called)
    model.generate(**served, max_new_tokens=2)
    film = [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]
    with pytest.raises(TypeError, match="film, item 0: expected the frames of a video, got a file: decode it"):
        processor.apply_chat_template(film, **asked, load_audio_from_video=True, num_frames=2)
