"""A native processor inside of ours: typed text, chats, what the assistant wrote, collating, and what is refused.

That ids and tensors are the native ones, `conversion/test_processors` holds for every type.
"""

import copy
import json
import pickle

import native_processors
import numpy as np
import pytest
import tiny
import torch
import transformers
from own_memory import own_memory
from transformers import AutoModel, AutoProcessor

from cornstarch_hf import MultimodalCollator, MultimodalProcessor, from_native
from cornstarch_hf.processing.native_call import NativeCall
from cornstarch_hf.processing.placeholder_text import MarkedText, mark_typed

TEMPLATE = """{% for message in messages %}<s>{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}\
{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}TOKEN{% elif part['type'] == 'audio' %}TOKEN\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"""
TYPES = ["llava", "idefics2", "idefics3", "gemma3", "qianfan_ocr", "aya_vision", "qwen2_audio"]


@pytest.fixture(scope="module")
def made():
    return native_processors.compositions(TEMPLATE)


def item(model_type, seed=0):
    return tiny.sound(seed, 9000) if model_type in native_processors.SOUNDS else tiny.image(seed, (40 + 9 * seed, 30))


def media(model_type, items):
    if model_type in native_processors.SOUNDS:
        return {"audio": items, "sampling_rate": 16_000}
    return {"images": items}


@pytest.mark.parametrize("model_type", TYPES)
def test_what_a_user_typed_stays_text(made, model_type):
    _, _, _, ours = made(model_type)
    token = next(iter(ours.tokens.values()))
    typed = mark_typed(f"is {token} a word", [token])
    text = MarkedText(f"see {token} {typed}")
    out = ours(llm_inputs={"text": [text]}, **media(model_type, [item(model_type)]), return_tensors="pt")
    plain = ours(text=[f"see {token} "], **media(model_type, [item(model_type)]), return_tensors="pt")
    number = next(iter(ours.placeholder_ids.values()))
    assert (out["input_ids"] == number).sum() == (plain["input_ids"] == number).sum() > 0
    assert f"is {token} a word" in ours.tokenizer.decode(out["input_ids"][0])
    for key in set(plain) - {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}:
        assert torch.equal(out[key], plain[key])


@pytest.mark.parametrize("model_type", TYPES)
def test_chats_are_the_native_ones(made, model_type):
    _, processor, _, ours = made(model_type)
    kind = "audio" if model_type in native_processors.SOUNDS else "image"
    part = {"type": kind, kind: item(model_type)}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "a fox"},
        {"role": "user", "content": "and then"},
    ]
    call = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    rate = {"sampling_rate": 16_000} if kind == "audio" else {}
    expected = processor(text=[text], **media(model_type, [part[kind]]), return_tensors="pt", add_special_tokens=False)
    found = ours.apply_chat_template(messages, processor_kwargs=rate, **call)
    assert {*found} == {*expected}
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    # What a user types is not what a template writes.
    token = next(iter(ours.tokens.values()))
    messages[-1] = {"role": "user", "content": f"and {token}"}
    typed = ours.apply_chat_template(messages, processor_kwargs=rate, **call)
    number = next(iter(ours.placeholder_ids.values()))
    assert (typed["input_ids"] == number).sum() == (found["input_ids"] == number).sum()
    assert f"and {token}" in ours.tokenizer.decode(typed["input_ids"][0])


@pytest.mark.parametrize("model_type", TYPES)
def test_what_the_assistant_wrote_is_told_behind_any_expansion(made, model_type):
    _, _, _, ours = made(model_type)
    kind = "audio" if model_type in native_processors.SOUNDS else "image"
    messages = [
        {"role": "user", "content": [{"type": kind, kind: item(model_type)}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "seven plus five"},
    ]
    rate = {"sampling_rate": 16_000} if kind == "audio" else {}
    out = ours.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs=rate,
    )
    ids, mask = out["input_ids"][0], torch.as_tensor(out["assistant_masks"]).reshape(-1).bool()
    assert ours.tokenizer.decode(ids[mask]).strip() in ("seven plus five</s>", "seven plus five")
    plain = ours.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=rate
    )
    number = next(iter(ours.placeholder_ids.values()))
    assert (ids == number).sum() == (plain["input_ids"] == number).sum()


@pytest.mark.parametrize("model_type", TYPES)
def test_a_collator_makes_batches_on_which_the_composition_trains(made, model_type):
    _, _, model, ours = made(model_type)
    kind = "audio" if model_type in native_processors.SOUNDS else "image"

    def row(seed, items):
        parts = [{"type": kind, kind: item(model_type, seed + i)} for i in range(items)]
        content = [*parts, {"type": "text", "text": "what is it"}]
        return {
            "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "five " * (seed + 1)}]
        }

    rate = {"sampling_rate": 16_000} if kind == "audio" else {}
    collator = MultimodalCollator(ours, **rate)
    rows = [row(0, 1), row(1, 0), row(2, 2)]
    batch = collator(rows)
    number = next(iter(ours.placeholder_ids.values()))
    alone = [int((collator([one])["input_ids"] == number).sum()) for one in rows]
    assert (batch["input_ids"] == number).sum(-1).tolist() == alone and alone[0] > 0 == alone[1]
    assert (batch["labels"][batch["input_ids"] == number] == -100).all()
    assert collator.lengths(rows) == [int(collator([one])["attention_mask"].sum()) for one in rows]
    trained = copy.deepcopy(model).train()
    loss = trained(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None and p.grad.any() for p in trained.parameters())


# Of sizes that native processors keep, fill up in one call or cut into tiles; sounds of several windows.
UNEVEN = ["idefics2", "idefics3", "lighton_ocr", "llava_next", "mistral3", "paddleocr_vl", "qwen3_asr"]
FILMS = ["llava_onevision", "qwen2_vl", "qwen3_vl"]


def there(names):
    return [name for name in names if name in native_processors.PROCESSORS]  # others need torchvision


def check_rows(model, collator, rows):
    model, together = own_memory(model), collator(rows)
    with torch.no_grad():
        logits = model(**together).logits
        for i, row in enumerate(rows):
            alone = collator([row])
            found = logits[i][together["attention_mask"][i].bool()]
            torch.testing.assert_close(found, model(**alone).logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", there(UNEVEN))
def test_a_batch_of_the_collator_computes_what_its_rows_do(made, model_type):
    _, processor, model, ours = made(model_type)
    token = native_processors.written_by(model_type, processor)
    if model_type in native_processors.SOUNDS:
        items = [[tiny.sound(i, length)] for i, length in enumerate((30_000, 8_000))]
    else:
        items = [
            [tiny.image(0, (40, 30))],
            [tiny.image(1, (30, 60)), tiny.image(2, (90, 40))],
            [tiny.image(3, (20, 90))],
        ]
    kind, rate = ("audio", {"sampling_rate": 16_000}) if model_type in native_processors.SOUNDS else ("images", {})
    rows = [{"prompt": f"a {token} " * len(own), "completion": " b c", kind: own} for own in items]
    check_rows(model, MultimodalCollator(ours, **rate), rows)


@pytest.mark.skipif(not there(FILMS), reason="processors of videos need torchvision")
@pytest.mark.parametrize("model_type", there(FILMS) or [None])
def test_videos_of_several_lengths_are_collated(made, model_type):
    _, _, model, ours = made(model_type)
    film = {n: np.stack([np.asarray(tiny.image(n + i, (24, 30))) for i in range(n)]) for n in (2, 4, 8)}
    video, image = ours.tokens["video"], ours.tokens["vision"]
    rows = [{"text": f"see {video} x", "videos": [film[n]]} for n in film]
    rows += [{"text": f"{image} {video}", "videos": [film[4]], "images": [tiny.image(0, (40, 30))]}, {"text": "a fox"}]
    check_rows(model, MultimodalCollator(ours), rows)


@pytest.mark.skipif(not there(["internvl"]), reason="its processor needs torchvision")
def test_videos_of_internvl_are_its_frames_as_images(made):
    _, processor, _, ours = made("internvl")
    film = [tiny.image(i, (24, 30)) for i in range(3)]
    expected = processor(
        text=["see <video> x"], videos=[np.stack([np.asarray(one) for one in film])], return_tensors="pt"
    )
    frames = "\n".join(f"Frame{i}: {ours.tokens['vision']}" for i in (1, 2, 3))
    found = ours(text=[f"see {frames} x"], images=[film], return_tensors="pt")
    assert {*found} == {*expected} and all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ValueError, match="'video' is no modality of this model.*pass frames as images"):
        ours(text=["see <video> x"], videos=[film])


# ---- PaliGemma, which takes what is learnt apart, and whose prompts attend both ways


def test_completions_of_paligemma_are_its_suffixes(made):
    native, processor, model, ours = made("paligemma")
    prompts, answers = ["<image>what is it", "<image><image>describe  the"], ["five six", "a quick brown fox"]
    images = [[tiny.image(0, (40, 30))], [tiny.image(1, (30, 60)), tiny.image(2)]]
    expected = processor(
        images=images, text=prompts, suffix=answers, padding=True, padding_side="right", return_tensors="pt"
    )
    rows = [
        {"prompt": text, "completion": answer, "images": own}
        for text, answer, own in zip(prompts, answers, images, strict=True)
    ]
    for end in ("", ours.tokenizer.eos_token):  # which the class writes, whether or not it is there
        found = MultimodalCollator(ours)([row | {"completion": row["completion"] + end} for row in rows])
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    found = own_memory(dict(found))
    native, model = own_memory(copy.deepcopy(native).train()), own_memory(copy.deepcopy(model).train())
    assert torch.equal(native(**own_memory(dict(expected))).loss, model(**found).loss)


def test_chats_of_paligemma_are_learnt_from_the_first_answer_on(made):
    _, _, model, ours = made("paligemma")
    content = [{"type": "image", "image": tiny.image(0)}, {"type": "text", "text": "what is it"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a fox"}]
    messages += [{"role": "user", "content": "and then"}, {"role": "assistant", "content": "dog"}]
    batch = MultimodalCollator(ours)([{"messages": messages}])
    ids, labels, types = (batch[key][0] for key in ("input_ids", "labels", "token_type_ids"))
    assert ours.tokenizer.decode(labels[labels != -100]) == "a fox</s>dog</s>"
    assert types.tolist() == sorted(types.tolist())
    front, behind = (ours.tokenizer.decode(ids[types == i]).replace("<image>", "") for i in (0, 1))
    assert front == "<s>user: <s>what is it</s><s>assistant: \n"
    assert behind == "a fox</s><s>user: and then</s><s>assistant: dog</s>"
    assert torch.isfinite(copy.deepcopy(model).train()(**batch).loss)


def test_no_answer_of_paligemma_is_seen_before_it_is_learnt(made):
    _, _, model, ours = made("paligemma")
    model, rows = own_memory(model), []
    for kind, other in (("completion", {"prompt": "<image>what "}), ("text", {})):
        rows.append(
            [
                {kind: f"{'' if other else '<image>'}fox {end}", "images": [tiny.image(0)]} | other
                for end in ("dog", "sum")
            ]
        )
    for pair in rows:
        one, two = (MultimodalCollator(ours)([row]) for row in pair)
        length = min(one["input_ids"].shape[1], two["input_ids"].shape[1])
        equal = one["input_ids"][:, :length] == two["input_ids"][:, :length]
        same = int(equal.long().cumprod(-1).sum())  # up to where they begin to differ
        assert (one["labels"][0, :same] != -100).any()
        with torch.no_grad():
            torch.testing.assert_close(
                model(**one).logits[:, :same], model(**two).logits[:, :same], atol=1e-5, rtol=1e-4
            )


def test_items_behind_an_answer_of_paligemma_are_refused(made):
    _, _, _, ours = made("paligemma")
    part = {"type": "image", "image": tiny.image(0)}
    turns = [[part], "a fox", [part], "dog"]
    messages = [
        {"role": role, "content": content} for role, content in zip(["user", "assistant"] * 2, turns, strict=True)
    ]
    with pytest.raises(
        ValueError, match="row 0: sample 0: 1 placeholders <image> stand behind .*into the first prompt"
    ):
        MultimodalCollator(ours)([{"messages": messages}])


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "idefics3", "gemma3", "aya_vision"])
def test_tokens_of_sizes_are_the_native_ones(made, model_type):
    _, processor, _, ours = made(model_type)
    sizes = [(40, 30), (9, 120), (32, 32)]
    expected, found = (one._get_num_multimodal_tokens(image_sizes=sizes) for one in (processor, ours))
    assert expected.num_image_tokens == found.num_image_tokens and expected.num_image_patches == found.num_image_patches


def test_a_native_processor_that_tells_nothing_by_sizes_says_so(made):
    with pytest.raises(ValueError, match="audio: Qwen2AudioProcessor does not tell by its size"):
        made("qwen2_audio")[3]._get_num_multimodal_tokens(audio_lengths=[9000])


@pytest.mark.parametrize("model_type", ["gemma3", "qianfan_ocr", "aya_vision"])
def test_the_token_that_is_repeated_stays_text_where_a_user_types_it(made, model_type):
    _, _, _, ours = made(model_type)
    token = ours.tokenizer.convert_ids_to_tokens(ours.placeholder_ids["vision"])
    messages = [{"role": "user", "content": [{"type": "text", "text": f"what is {token}"}]}]
    out = ours.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert token not in ours.tokens.values()
    assert not (out["input_ids"] == ours.placeholder_ids["vision"]).any()
    assert f"what is {token}" in ours.tokenizer.decode(out["input_ids"][0])


@pytest.mark.parametrize("model_type", ["paligemma", "ovis2", "moss_transcribe_diarize"])
def test_rows_of_text_are_collated_whatever_tensors_the_class_makes(made, model_type):
    native, processor = native_processors.pair(model_type)
    model, ours = from_native((native, processor))
    kind = "audio" if model_type in native_processors.SOUNDS else "images"
    token = next(iter(ours.tokens.values()))
    rate = {"sampling_rate": 16_000} if kind == "audio" else {}
    row = {"prompt": f"{token} what ", "completion": "five", kind: [item(model_type)]}
    batch = MultimodalCollator(ours, **rate)([row, row])
    assert torch.isfinite(copy.deepcopy(model).train()(**batch).loss)


# ---- what is refused


@pytest.mark.parametrize("model_type", ["audioflamingo3", "glmasr", "qwen2_audio"])
def test_a_sound_of_no_feature_is_refused(model_type):
    _, ours = from_native(native_processors.pair(model_type))
    token = ours.tokens["audio"]
    sounds = [tiny.sound(0, 9000), tiny.sound(0, 10)]
    with pytest.raises(ValueError, match="audio, item 1: .*Processor makes no feature of it: it is too short"):
        ours(
            text=[f"a {token}", f"b {token}"],
            audio=[sounds[:1], sounds[1:]],
            sampling_rate=16_000,
            text_kwargs={"padding": True},
        )


def test_placeholders_and_items_that_differ_are_refused(made):
    _, _, _, ours = made("llava")
    with pytest.raises(
        ValueError, match="vision, sample 0: the text has 2 placeholders <image>, but 1 items were given"
    ):
        ours(text=["<image><image>"], images=[[item("llava")]])
    with pytest.raises(ValueError, match="the texts have 1 placeholders"):
        ours(text=["<image>"])


def test_settings_that_do_not_fit_the_model_are_refused(made):
    native, processor, _, _ = made("llava")
    wrong = copy.deepcopy(processor)
    wrong.patch_size = 16
    _, ours = from_native((native, wrong))
    with pytest.raises(
        ValueError, match="LlavaProcessor writes 4 placeholder tokens for 1 items, whose encoder gives 16 features"
    ):
        ours(text=["<image>"], images=[item("llava")], return_tensors="pt")
    with pytest.raises(ValueError, match=r"placeholder tokens for 1 items.*or text was cut|refuses the call"):
        made("llava")[3](
            text=["<image> a b"], images=[item("llava")], truncation=True, max_length=8, return_tensors="pt"
        )


def test_tensors_without_items_are_refused(made):
    _, _, _, ours = made("llava")
    with pytest.raises(ValueError, match="vision: LlavaProcessor makes text of items.*give the items"):
        ours(text=["<image>"], encoder_inputs={"vision": {"pixel_values": torch.zeros(1, 3, 32, 32)}})


def test_unusable_items_and_options_are_named(made):
    _, _, _, ours = made("llava")
    with pytest.raises(TypeError, match="vision, item 1: expected an image"):
        ours(text=["<image><image>"], images=[item("llava"), 3])
    with pytest.raises(TypeError, match="Unknown arguments|takes no option|no part takes"):
        ours(text=["<image>"], images=[item("llava")], not_an_option=1)
    _, _, _, sounds = made("qwen2_audio")
    with pytest.raises(
        ValueError, match=r"audio, item 0: the sound has 2\.5 s, of which Qwen2AudioProcessor keeps 1 s: split it"
    ):
        sounds(text=["<|AUDIO|>"], audio=[tiny.sound(0, 40_000)], sampling_rate=16_000)
    with pytest.raises(ValueError, match="sampling_rate"):
        sounds(text=["<|AUDIO|>"], audio=[tiny.sound(0, 4_000)])


def test_what_the_native_processor_refuses_is_said_by_its_name(made):
    _, _, _, ours = made("llava")
    with pytest.raises(ValueError, match="LlavaProcessor refuses the call"):
        ours(text=["<image>", "a"], images=[item("llava")], return_tensors="pt")  # of two lengths


@pytest.mark.parametrize(
    "model_type, reason", [("blip-2", "no placeholder of the kind 'image'"), ("instructblip", "qformer_tokenizer")]
)
def test_processors_that_cannot_be_held_are_refused(model_type, reason):
    tokenizer, images = native_processors.tokenizer("<image>"), native_processors.images("Blip")
    if model_type == "blip-2":
        processor = transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)
    else:
        processor = transformers.InstructBlipProcessor(
            images, tokenizer, native_processors.tokenizer(), num_query_tokens=4
        )
    with pytest.raises(ValueError, match=reason):
        NativeCall(processor, {"vision": "image"})


# ---- storing


def test_it_is_copied_and_pickled(made):
    _, _, _, ours = made("idefics3")
    given = {"text": ["<image> a"], "images": [item("idefics3")], "return_tensors": "pt"}
    expected = ours(**given)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        found = again(**given)
        assert {*found} == {*expected} and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"processor_class": "os"}, "names the processor 'os', which is none of transformers"),
        ({"processor_class": "AutoProcessor"}, "which is none of transformers"),
        ({"arguments": {"no_such": 1}}, "no_such"),
        ({"arguments": 3}, "native: LlavaNextProcessor takes the arguments"),
        ({"parts": {"video_processor": {"video_processor_type": "os"}}}, "there is no processor class 'os'"),
    ],
)
def test_changed_files_are_refused(made, tmp_path, change, told):
    _, _, _, ours = made("llava_next")
    ours.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"native": values["native"] | change}))
    with pytest.raises((ValueError, TypeError), match=told):
        AutoProcessor.from_pretrained(tmp_path)


def test_settings_of_its_parts_are_kept_as_they_are_now(made, tmp_path):
    native, processor, model, _ = made("llava_next")
    _, ours = from_native((native, copy.deepcopy(processor)))
    ours.processors["vision"].image_mean = [0.1, 0.2, 0.3]
    ours.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MultimodalProcessor) and list(again.processors["vision"].image_mean) == [0.1, 0.2, 0.3]
    given = {"text": ["<image> a"], "images": [item("llava_next")], "return_tensors": "pt"}
    inputs = again(**given)
    assert torch.equal(inputs["pixel_values"], ours(**given)["pixel_values"])
    assert not np.array_equal(inputs["pixel_values"], processor(**given)["pixel_values"])
    out = AutoModel.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, inputs["input_ids"].shape[1] + 2)
