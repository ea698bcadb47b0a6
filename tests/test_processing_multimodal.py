"""The processor: three ways in, exact expansion, chats, saving, and input that it refuses."""

import json

import numpy as np
import pytest
import tiny
import torch
from helpers import compose_tiny, run_python, uneven_inputs
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor, compose


def equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_counts_are_the_encoders_for_every_kind(key):
    model, processor = compose_tiny([key])
    tiny.ENCODERS[key][0]
    inputs = uneven_inputs(processor)
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("key", ["wav2vec2", "esm", "qwen2_vl"])
def test_counts_of_items_of_many_sizes_alone_and_together(key):
    model, processor = compose_tiny([key])
    name = tiny.ENCODERS[key][0]
    sizes = {"wav2vec2": [90, 400, 401, 1777], "esm": [1, 3, 8, 20], "qwen2_vl": [(8, 8), (33, 20), (9, 64), (17, 17)]}[
        key
    ]
    items = [processor.items[name](i, size) for i, size in enumerate(sizes)]
    extra = {"sampling_rate": 16_000} if name == "audio" else {}
    token, token_id = processor.tokens[name], model.config.modality(name)["token_id"]
    together = processor(text=[token * 4], **{name: [items]}, return_tensors="pt", **extra)
    alone = [processor(text=token, **{name: item}, return_tensors="pt", **extra) for item in items]
    counts = [(x["input_ids"] == token_id).sum().item() for x in alone]
    assert (together["input_ids"] == token_id).sum() == sum(counts) and len(set(counts)) > 1
    model(**together)
    for one in alone:
        model(**one)


def test_the_three_ways_of_handing_items_over_are_one(pair):
    _, processor = pair
    image, sound, text = tiny.image(), tiny.sound(), "<image> and <audio>"
    by_kind = processor(images=image, audio=sound, text=text, sampling_rate=16_000, return_tensors="pt")
    by_name = processor(text=[text], vision=[image], audio=[[sound]], sampling_rate=16_000, return_tensors="pt")
    cornstarch = processor(
        encoder_inputs={"vision": {"images": image}, "audio": {"raw_speech": sound, "sampling_rate": 16_000}},
        llm_inputs={"text": text},
        return_tensors="pt",
    )
    equal(by_kind, by_name)
    equal(by_kind, cornstarch)
    ready = processor(
        encoder_inputs={
            "vision": {"pixel_values": by_kind["pixel_values"]},
            "audio": {"input_features": by_kind["input_features"]},
        },
        text=text,
        return_tensors="pt",
    )
    equal(by_kind, ready)


def test_several_items_in_any_order_flat_or_nested(pair):
    _, processor = pair
    images = [tiny.image(i) for i in range(3)]
    texts = ["<image> x <image>", "y <image>"]
    flat = processor(text=texts, images=images, padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[images[:2], images[2:]], padding=True, return_tensors="pt")
    equal(flat, nested)


def test_arrays_where_arrays_are_asked_for(pair):
    _, processor = pair
    call = {"text": [processor.image_token + processor.audio_token], "images": tiny.image(), "audio": np.zeros(160)}
    arrays = processor(**call, sampling_rate=16_000, return_tensors="np")
    tensors = processor(**call, sampling_rate=16_000, return_tensors="pt")
    assert arrays.keys() == tensors.keys() and all(type(value) is np.ndarray for value in arrays.values())
    assert all(np.array_equal(arrays[key], tensors[key].numpy()) for key in tensors)


def test_batch_feature_casts_only_floats(pair):
    _, processor = pair
    batch = processor(text="<image>", images=tiny.image(), return_tensors="pt").to(torch.bfloat16)
    assert batch["pixel_values"].dtype is torch.bfloat16 and batch["input_ids"].dtype is torch.long


def test_canonical_attributes(pair):
    model, processor = pair
    assert processor.image_processor is processor.processors["vision"]
    assert processor.feature_extractor is processor.processors["audio"]
    assert (processor.image_token, processor.audio_token) == ("<image>", "<audio>")
    assert (
        processor.image_token_id == model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>")
    )
    assert not hasattr(processor, "video_token") and not hasattr(processor, "video_processor")
    assert {"input_ids", "pixel_values", "input_features"} <= set(processor.model_input_names)
    ids = processor.tokenizer("the fox")["input_ids"]
    assert processor.decode(ids) == "the fox" and processor.batch_decode([ids]) == ["the fox"]


def test_the_callers_tokenizer_is_copied_and_its_special_tokens_stay():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<mine>", "<image>"]})
    before = (len(tokenizer), list(tokenizer.all_special_tokens))
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(tiny.clip()), "audio": ModalEncoderModule(tiny.whisper())},
        language_model=tiny.llama(),
    )
    processor = MultimodalProcessor(
        tokenizer, {"vision": tiny.clip_processor(), "audio": tiny.whisper_processor()}, model=model
    )
    assert (len(tokenizer), list(tokenizer.all_special_tokens)) == before
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert set(before[1]) <= set(processor.tokenizer.all_special_tokens)
    other = MultimodalProcessor(tiny.tokenizer(), {}, model=model)
    assert other.image_token_id == 300, "no count or token leaks from one processor into another"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"vision": "<x>", "audio": "<x>"}, "stands for another modality"),
        ({"vision": "</s>"}, "eos token"),
        ({"vision": " "}, "without spaces"),
        ({"video": "<v>"}, r"tokens names \['video'\]"),
    ],
)
def test_placeholder_tokens_that_collide(pair, tokens, message):
    model, _ = compose_tiny(["clip", "whisper"])
    with pytest.raises(ValueError, match=message):
        MultimodalProcessor(tiny.tokenizer(), model=model, tokens=tokens)


# ---- saving


def test_saved_processor_works_without_weights_in_a_fresh_process(tmp_path, pair):
    _model, processor = compose_tiny(["clip", "wav2vec2", "esm"])
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    inputs = uneven_inputs(processor)
    torch.save(inputs, tmp_path / "expected.pt")
    run_python(
        "import sys, torch, tiny\nimport cornstarch_hf\nfrom helpers import uneven_inputs\n"
        "from transformers import AutoProcessor\n"
        "p = AutoProcessor.from_pretrained(sys.argv[1])\n"
        "p.items = {'vision': tiny.image, 'audio': tiny.sound, 'protein': tiny.protein}\n"
        "found, expected = uneven_inputs(p), torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert found.keys() == expected.keys()\n"
        "assert all(torch.equal(found[k], expected[k]) for k in found)\n",
        str(tmp_path),
    )


def test_saving_in_either_order_keeps_both_and_foreign_files(tmp_path):
    model, processor = compose_tiny(["clip"])
    for folder, order in ((tmp_path / "a", (model, processor)), (tmp_path / "b", (processor, model))):
        folder.mkdir()
        (folder / "notes.md").write_text("mine")
        (folder / "adapter.safetensors").write_bytes(b"mine")
        for part in order:
            part.save_pretrained(folder)
        assert (folder / "notes.md").read_text() == "mine" and (folder / "adapter.safetensors").read_bytes() == b"mine"
        AutoProcessor.from_pretrained(folder)
        MultimodalModel.from_pretrained(folder)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())


def test_processor_config_holds_json_only(tmp_path, pair):
    _, processor = pair
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    assert values["processor_class"] == "MultimodalProcessor" and values["processors"] == {}
    assert {"image_processor", "feature_extractor"} <= set(values)
    assert str(tmp_path) not in (tmp_path / "processor_config.json").read_text()


# ---- wrong input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": "<image>"}, r"vision.*1 placeholders.*0 items"),
        ({"text": "<image> <image>", "images": [tiny.image()]}, r"2 placeholders <image> \[2\], but 1 items"),
        ({"text": "x", "images": [tiny.image()]}, r"0 placeholders.*1 items"),
        ({"text": ["<image>", "x"], "images": [[], [tiny.image()]]}, r"vision, sample 0: the text has 1 .*0 items"),
        ({"text": ["<image>"], "images": [[tiny.image()], []]}, "2 samples, but there are 1 texts"),
        ({"text": "<audio>", "audio": tiny.sound()}, "pass sampling_rate= .*16000"),
        ({"text": "<audio>", "audio": tiny.sound(), "sampling_rate": 8_000}, "8000 Hz.*16000 Hz"),
        ({"text": "<audio>", "audio": np.zeros(0, np.float32), "sampling_rate": 16_000}, "one mono waveform"),
        ({"text": "<audio>", "audio": np.zeros((2, 50), np.float32), "sampling_rate": 16_000}, r"\(2, 50\)"),
        ({"text": "<audio>", "audio": np.zeros(50, np.int16), "sampling_rate": 16_000}, "int16"),
        ({"text": "<audio>", "audio": np.full(50, np.nan, np.float32), "sampling_rate": 16_000}, "not finite"),
        ({"text": "<image>", "images": Image.new("RGB", (0, 4))}, "empty"),
        ({"text": "<image>", "images": np.zeros((0, 4, 3), np.uint8)}, "empty"),
        ({"text": "<image>", "images": Image.new("I;16", (4, 4))}, "I;16"),
        ({"text": "<image>", "images": Image.new("F", (4, 4))}, "'F'"),
        ({"text": "<image>", "images": np.zeros((4, 4, 3), np.uint16)}, "uint16"),
        ({"text": "<image>", "images": np.zeros((4, 4, 3), np.float32)}, "do_rescale"),
        ({"text": "<image>", "images": np.zeros((5, 5, 7), np.uint8)}, "channels"),
        ({"text": "<image>" * 2, "images": [tiny.image(), tiny.image()], "truncation": True, "max_length": 7}, r"10 features.*but 7 are left"),
    ],
)  # fmt: skip
def test_wrong_input(pair, call, message):
    _, processor = pair
    with pytest.raises(ValueError, match=message):
        processor(**call)


def test_unknown_arguments_and_wrong_types(pair):
    _, processor = pair
    with pytest.raises(TypeError, match=r"\['image'\]"):
        processor(text="<image>", image=tiny.image())
    with pytest.raises(TypeError, match="expected an image"):
        processor(text="<image>", images=3.5)
    with pytest.raises(ValueError, match="given twice"):
        processor(text="<image>", images=tiny.image(), vision=tiny.image())
    with pytest.raises(ValueError, match="needs model="):
        MultimodalProcessor(tiny.tokenizer())
    with pytest.raises(TypeError, match="tokenizer must be"):
        MultimodalProcessor("gpt2", model=pair[0])
    with pytest.raises(ValueError, match=r"processors names \['video'\]"):
        MultimodalProcessor(tiny.tokenizer(), {"video": tiny.clip_processor()}, model=pair[0])


def test_modes_of_images_just_work(pair):
    _, processor = pair
    rgb = tiny.image(5)
    expected = processor(text="<image>", images=rgb, return_tensors="pt")["pixel_values"]
    for same in (rgb.convert("RGBA"), np.asarray(rgb), torch.tensor(np.asarray(rgb)).permute(2, 0, 1)):
        assert torch.equal(processor(text="<image>", images=same, return_tensors="pt")["pixel_values"], expected)
    grey = processor(text="<image>", images=rgb.convert("L").convert("RGB"), return_tensors="pt")["pixel_values"]
    for same in (rgb.convert("L"), np.asarray(rgb.convert("L")), rgb.convert("L").convert("P")):
        assert torch.equal(processor(text="<image>", images=same, return_tensors="pt")["pixel_values"], grey)
    scaled = np.asarray(rgb, dtype=np.float32) / 255
    floats = processor(text="<image>", images=scaled, images_kwargs={"do_rescale": False}, return_tensors="pt")
    assert floats["pixel_values"].shape == expected.shape


def test_two_encoders_of_one_kind_need_names_or_shared_inputs():
    _, processor = compose_tiny({"left": "clip", "right": "siglip"})
    assert processor.tokens == {"left": "<left>", "right": "<right>"}
    with pytest.raises(ValueError, match=r"\['left', 'right'\].*share_inputs"):
        processor(text="<left><right>", images=tiny.image())
    with pytest.raises(ValueError, match=r"\['left', 'right'\]"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    encoders = {
        name: {"model": tiny.ENCODERS[k][1](), "processor": tiny.ENCODERS[k][2]()}
        for name, k in (("left", "clip"), ("right", "siglip"))
    }
    model, shared = compose(tiny.llama(), encoders, tokenizer=tiny.tokenizer(), share_inputs=[["left", "right"]])
    inputs = shared(text="<left><right>", images=tiny.image(), return_tensors="pt")
    assert inputs["left_pixel_values"].shape == inputs["right_pixel_values"].shape
    message = [{"role": "user", "content": [{"type": "image", "image": tiny.image()}]}]
    assert "<left><right>" in shared.apply_chat_template(message)
    model(**shared.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt"))


# ---- conversations

TEMPLATES = {
    "default": None,
    "strings": "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}",
    "parts": "{% for m in messages %}[{{ m['role'] }}]\n{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}",
}  # fmt: skip


def talk(typed="what?"):
    user = [
        {"type": "image", "image": tiny.image()},
        {"type": "text", "text": typed},
        {"type": "audio", "audio": tiny.sound()},
    ]
    return [{"role": "user", "content": user}, {"role": "assistant", "content": "seven"}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats(template):
    model, processor = compose_tiny(["clip", "whisper"])
    processor.chat_template = TEMPLATES[template] or processor.chat_template
    text = processor.apply_chat_template(talk()[:1], add_generation_prompt=True)
    assert text.index("<image>") < text.index("what?") < text.index("<audio>") < text.index("assistant")
    inputs = processor.apply_chat_template(
        talk()[:1],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        sampling_rate=16_000,
    )
    equal(
        inputs, processor(text=text, images=tiny.image(), audio=tiny.sound(), sampling_rate=16_000, return_tensors="pt")
    )
    model.generate(**inputs, max_new_tokens=2)
    by_name = [
        {"role": "user", "content": [{"type": "vision", "image": tiny.image()}, {"type": "text", "text": "what?"}]}
    ]
    assert "<image>what?" in processor.apply_chat_template(by_name)
    batch = processor.apply_chat_template(
        [talk(), talk()[:1]], tokenize=True, return_dict=True, padding=True, return_tensors="pt", sampling_rate=16_000
    )
    assert batch["input_ids"].shape[0] == 2 and batch["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("template", TEMPLATES)
def test_placeholders_typed_by_a_user_stay_text(template):
    _, processor = compose_tiny(["clip", "whisper"])
    processor.chat_template = TEMPLATES[template] or processor.chat_template
    conversation = talk("is <image> or <audio> here?")
    inputs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", sampling_rate=16_000
    )
    ids = inputs["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 5 and (ids == processor.audio_token_id).sum() == 6
    special = [processor.image_token_id, processor.audio_token_id]
    plain = processor.decode([i for i in ids.tolist() if i not in special])
    assert "is <image> or <audio> here?" in plain
    with pytest.raises(ValueError, match="tokenize=True"):
        processor.apply_chat_template(conversation)


@pytest.mark.parametrize("template", TEMPLATES)
def test_assistant_masks_cover_exactly_what_the_assistant_wrote(template):
    _, processor = compose_tiny(["clip", "whisper"])
    processor.chat_template = TEMPLATES[template] or processor.chat_template
    conversation = [*talk("see <image>"), {"role": "user", "content": "and?"}, {"role": "assistant", "content": "five"}]
    out = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, sampling_rate=16_000
    )
    wanted = [i for i, keep in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if keep]
    end = "</s>" if template == "default" else ""
    assert processor.decode(wanted).replace("\n", "") == f"seven{end}five{end}"


def test_bad_conversations(pair):
    _, processor = pair
    for bad, error, message in (
        ([{"role": "user", "content": [{"type": "smell"}]}], ValueError, "'smell' is no modality"),
        ([{"role": "user", "content": [{"text": "x"}]}], TypeError, "'type'"),
        (["hello"], TypeError, "'role'"),
        ([], ValueError, "empty"),
    ):
        with pytest.raises(error, match=message):
            processor.apply_chat_template(bad)
    with pytest.raises(ValueError, match="1 placeholders <image>.*0 items"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)


def test_items_in_messages_and_by_name_at_once(pair):
    with pytest.raises(ValueError, match="vision: its items were given twice, in the messages and by name"):
        pair[1].apply_chat_template(talk(), tokenize=True, vision=[tiny.image()], sampling_rate=16_000)


def test_default_template_where_the_tokenizer_has_none(pair):
    _, processor = pair
    assert AutoTokenizer is not None
    text = processor.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    assert text == "user:\nhi\nassistant:\nyo</s>\n"
