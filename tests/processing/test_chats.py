"""Templates in a checkpoint: other programs render of messages with media what the processor makes of them."""

from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest
import tiny
from helpers import compose_tiny
from templates import PARTS, STRINGS
from transformers import AutoProcessor, AutoTokenizer, pipeline

from cornstarch_hf import MultimodalProcessor, compose, limits
from cornstarch_hf.processing.chats import as_given, with_media
from cornstarch_hf.processing.rendering import DEFAULT_TEMPLATE

FOLDER = Path(find_spec("trl").origin).parent / "chat_templates"
TEXT_ONLY_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
FIRST_PART = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text }}{% endfor %}"
MIXED = (
    "{% for m in messages %}{% if m.role == 'user' %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
TEMPLATES = {
    "default": DEFAULT_TEMPLATE,
    "strings": STRINGS,
    "parts": PARTS,
    "parts of text": TEXT_ONLY_PARTS,
    "first part": FIRST_PART,
    "mixed": MIXED,
    "white space": f"\n  {STRINGS}\n",
    "indented": f"  {{% if true %}}\n{PARTS}\n  {{% endif %}}",
    "macro": "{% macro all() %}{% for m in messages %}{{ m.content }}|{% endfor %}{% endmacro %}{{ all() }}{{ messages | length }}",
}
PART = {"type": "image", "image": tiny.image()}
TALKS = {
    "text": [{"role": "user", "content": "hi"}],
    "image": [{"role": "user", "content": [PART, {"type": "text", "text": "hi"}]}],
    "only image": [{"role": "user", "content": [PART]}],
    "OpenAI": [{"role": "user", "content": [{"type": "text", "text": "a"}, PART | {"type": "image_url"}]}],
    "by name": [
        {"role": "user", "content": [{"type": "vision", "image": PART["image"]}, {"type": "text", "text": "b"}]}
    ],
    "turns": [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": " brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, PART, PART, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [PART]},
    ],
}


def for_openai(talk):
    """Media as the client of OpenAI writes it."""
    return [
        message
        | {"content": [{"type": "image_url", "image_url": {"url": "u"}} if p["type"] == "image_url" else p for p in c]}
        if isinstance(c := message["content"], list)
        else message
        for message in talk
    ]


@pytest.fixture(scope="module")
def pair():
    return compose_tiny(["clip"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_tokenizer_renders_what_the_processor_renders(name, pair, tmp_path):
    model, own = pair
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=TEMPLATES[name])
    processor.save_pretrained(tmp_path)
    again, tokenizer = AutoProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == again.tokenizer.chat_template == TEMPLATES[name]
    for talk in TALKS.values():
        expected = processor.apply_chat_template(
            [m | {"content": [p | {"type": "image"} if p["type"] == "image_url" else p for p in m["content"]]} if isinstance(m["content"], list) else m for m in talk],
            tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        assert expected == again.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template(for_openai(talk), tokenize=False, add_generation_prompt=True)
        assert told == expected
    first = (tmp_path / "chat_template.jinja").read_bytes()
    again.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_bytes() == first


BY_ROLE = (
    "{% for m in messages %}{% if m.role == 'developer' %}<d>{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
)
IN_LIST = (
    "{% for m in messages %}{% if m.role in ['developer', 'critic'] %}({{ m.content }}){% else %}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "content", ["be brief", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], [PART]]
)
@pytest.mark.parametrize("role", ["developer", "critic", "function", "user", "tool"])
@pytest.mark.parametrize("template", [MIXED, BY_ROLE, IN_LIST, STRINGS, PARTS])
def test_every_role_is_written_as_the_processor_writes_it(template, role, content, pair, tmp_path):
    model, own = pair
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=template)
    processor.save_pretrained(tmp_path)
    talk = [{"role": "user", "content": "q"}, {"role": role, "content": content}]
    expected = processor.apply_chat_template(talk, tokenize=False)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(talk, tokenize=False) == expected


def test_parts_that_are_no_items_and_variables_stay_the_templates_own(pair, tmp_path):
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'thinking' %}[{{ c.thinking }}]"
        "{% elif 'text' in c %}{{ c.text }}{{ '!' if c.bold }}{% else %}<image>{% endif %}{% endfor %}{% endfor %}"
        "{{ tokens }}{{ given }}"
    )
    model, own = pair
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=template)
    processor.save_pretrained(tmp_path)
    bold = {"type": "text", "text": "x", "bold": True}
    parts = [{"type": "thinking", "thinking": "T"}, bold, {"text": "y"}, {"vision": "z"}]
    talk = [{"role": "user", "content": parts}]
    assert (
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(talk, tokenize=False, tokens=5) == "[T]x!y<image>5"
    )


@pytest.mark.parametrize("token", ["<TOKENS>", "<FORMS>", "<MEDIA>", '<"q">', "{{x}}", "%}"])
def test_placeholders_may_be_any_text(token, pair, tmp_path):
    model, own = pair
    given = {"tokens": {"vision": token}, "chat_template": STRINGS}
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, **given)
    processor.save_pretrained(tmp_path)
    text = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALKS["image"], tokenize=False)
    assert text == processor.apply_chat_template(TALKS["image"], tokenize=False) and token in text


def test_a_processor_of_a_stored_tokenizer_has_the_template_alone(pair, tmp_path):
    model, processor = pair
    processor.save_pretrained(tmp_path)
    again = MultimodalProcessor(AutoTokenizer.from_pretrained(tmp_path), processor.processors, config=model.config)
    assert again.chat_template == again.tokenizer.chat_template == processor.chat_template


def test_a_template_that_meets_a_bound_is_stored_as_it_is(pair, tmp_path, monkeypatch):
    model, own = pair
    endless = "{% for i in range(99999) %}{% endfor %}" + STRINGS
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=endless)
    monkeypatch.setattr(limits, "MAX_TEMPLATE_STEPS", 1_000)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == endless


@pytest.mark.parametrize("name", ["default", "strings", "parts", "parts of text", "first part"])
def test_the_text_pipeline_tells_of_images_it_does_not_see(name, pair, tmp_path):
    model, own = pair
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=TEMPLATES[name])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), max_new_tokens=2, do_sample=False)
    assert write(TALKS["text"])[0]["generated_text"][-1]["role"] == "assistant"
    with pytest.raises(
        ValueError, match=r"vision: the text has 1 placeholder tokens \(<image>\) but there is no input"
    ):
        write(TALKS["image"])


def test_every_encoder_has_its_placeholder_and_others_are_refused(tmp_path):
    _, processor = compose_tiny({"left": "clip", "right": "siglip", "ear": "whisper"})
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    parts = [{"type": name} for name in ("right", "left", "audio")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert "".join(processor.tokens[name] for name in ("right", "left", "ear")) in text
    for part in (
        {"type": "image"},
        {"type": "video"},
        {"type": "image_url"},
        {},
        {"type": "text", "text": None},
    ):  # of two, or of none
        with pytest.raises(
            jinja2.TemplateError, match="A part of the type .* has no place here, expected text or one of "
        ):
            tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)


def test_encoders_that_share_items_have_a_placeholder_each(tmp_path):
    encoders = {
        name: {"model": tiny.ENCODERS[name][1](), "processor": tiny.ENCODERS[name][2]()} for name in ("clip", "siglip")
    }
    _, processor = compose(tiny.llama(), encoders, tokenizer=tiny.tokenizer(), share_inputs=[list(encoders)])
    processor.save_pretrained(tmp_path)
    talk = [{"role": "user", "content": [PART]}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template(talk, tokenize=False) == processor.apply_chat_template(talk, tokenize=False)


def test_named_templates(pair, tmp_path):
    model, own = pair
    named = {"default": STRINGS, "short": FIRST_PART}
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=named)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).chat_template == named
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name in named:
        told, expected = (
            one.apply_chat_template(TALKS["image"], chat_template=name, tokenize=False)
            for one in (tokenizer, processor)
        )
        assert told == expected


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_templates_of_known_models(path, pair, tmp_path):
    model, own = pair
    template = path.read_text()
    processor = MultimodalProcessor(own.tokenizer, own.processors, config=model.config, chat_template=template)
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for talk in (TALKS["text"], TALKS["image"], TALKS["turns"]):
        try:
            expected = processor.apply_chat_template(talk, tokenize=False)
        except (jinja2.TemplateError, ValueError):  # roles that the template refuses
            continue
        assert tokenizer.apply_chat_template(talk, tokenize=False) == expected


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_template_that_was_edited_by_hand_is_kept(ends, pair, tmp_path):
    _, processor = pair
    processor.save_pretrained(tmp_path)
    path = tmp_path / "chat_template.jinja"
    front, end, _ = path.read_text().rpartition("{#- The chat template. #}")
    path.write_bytes(f"{front}{end}\n<{{{{ messages[0].content }}}}>".replace("\n", ends).encode())
    talk = [{"role": "user", "content": "hi"}]
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(talk, tokenize=False) == "<hi>"
    path.write_bytes(
        f"{front}\n<{{{{ messages[0].content }}}}>".replace("\n", ends).encode()
    )  # the second comment is gone
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(talk, tokenize=False).strip() == "<hi>"


def test_a_template_that_takes_no_users_stays():
    refuses = "{{ raise_exception('no') }}"
    assert with_media(refuses, {"vision": "<image>"}, lambda kind: ["vision"], {"vision": "image"}) == refuses
    assert as_given(refuses) == refuses and as_given(None) is None
