"""The collator: rows of every form, tables and streams, cutting and padding, errors that name the row."""

import copy
import io
import json
import pickle
import warnings

import pytest
import soundfile
import tiny
import torch
from datasets import Audio, Dataset, Features, Image, IterableDataset, Value
from helpers import compose_tiny
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer, Trainer, TrainingArguments

from cornstarch_hf import ModalEncoderModule, MultimodalCollator, MultimodalModel, MultimodalProcessor
from cornstarch_hf.training.collator import check_labels


def test_collator_labels_only_what_is_to_be_learnt(fresh_pair):
    _, processor = fresh_pair
    talk = [
        {
            "role": "user",
            "content": [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what is <image>?"}],
        },
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "five"},
    ]
    batch = MultimodalCollator(processor)(
        [
            {"messages": talk},
            {"prompt": "a <audio> b", "completion": " is it", "audio": [tiny.sound()]},
            {"text": "<image> and <audio>", "vision": [tiny.image(1)], "audio": [tiny.sound(1)]},
            {"text": "none"},
        ]
    )
    learnt = [processor.decode([i for i in row if i != -100]) for row in batch["labels"].tolist()]
    assert learnt == ["seven</s>five</s>", " is it", " and ", "none"]
    assert batch["pixel_values"].shape[0] == 2 and batch["input_features"].shape[0] == 2
    assert torch.equal(batch["attention_mask"].sum(-1) > 0, torch.ones(4).bool())
    assert torch.equal(batch["labels"][batch["attention_mask"] == 0].unique(), torch.tensor([-100]))
    assert (batch["attention_mask"][:, 0] == 1).all(), "padded on the right"


def test_collator_joins_sequences_of_different_lengths():
    model, processor = compose_tiny(["wav2vec2"])
    items = [{"text": "<audio> it", "audio": [tiny.sound(i, n)]} for i, n in enumerate((300, 500))]
    batch = MultimodalCollator(processor)(items)
    assert batch["audio_attention_mask"].sum(-1).tolist() == [300, 500]
    alone = [MultimodalCollator(processor)([item]) for item in items]
    with torch.no_grad():
        for row, one in enumerate(alone):
            length = one["input_ids"].shape[1]
            torch.testing.assert_close(
                model(**batch).logits[row, :length], model(**one).logits[0], atol=1e-5, rtol=1e-4
            )


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_whose_prompts_attend_both_ways_is_told_where_they_end(side):
    encoder = ModalEncoderModule(tiny.clip())
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama(), mask={"rule": "prefix"}).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    rows = [{"prompt": "what <image> is", "completion": " five", "images": tiny.image()}]
    rows += [{"prompt": "a", "completion": " fox and a dog"}, {"text": "<image> six", "images": tiny.image(1)}]
    batch = MultimodalCollator(processor, padding_side=side)(rows)
    for labels, types, mask in zip(batch["labels"], batch["token_type_ids"], batch["attention_mask"], strict=True):
        first = int((labels != -100).nonzero()[0])
        assert types.tolist() == [0] * first + mask[first:].tolist()
    assert torch.isfinite(model.train()(**batch).loss)
    plain = MultimodalCollator(compose_tiny(["clip"])[1])(rows)
    assert "token_type_ids" not in plain


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": []}, r"row 1: expected 'messages'"),
        ({"text": "x", "colour": 1}, r"row 1: unknown columns \['colour'\]"),
        ({"text": "<image>"}, "row 1: vision.*1 placeholders"),
        ({"text": "long " * 50}, "row 1: the row has .* tokens, max_length is 40"),
    ],
)
def test_collator_names_the_row(fresh_pair, row, message):
    with pytest.raises(ValueError, match=message):
        MultimodalCollator(fresh_pair[1], max_length=40)([{"text": "fine"}, row])
    with pytest.raises(ValueError, match="no rows"):
        MultimodalCollator(fresh_pair[1])([])


# ---- forms of rows


def learnt(processor, batch):
    return [processor.decode([i for i in row if i != -100]) for row in batch["labels"].tolist()]


def said(role, content):
    return {"role": role, "content": content}


def equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_prompt_and_completion_as_messages_label_the_completions_turns_alone(fresh_pair):
    _, processor = fresh_pair
    prompt = [
        said("user", [{"type": "image"}, {"type": "text", "text": "1?"}]),
        said("assistant", "one"),
        said("user", "2?"),
    ]
    completion = [said("assistant", "two"), said("user", [{"type": "audio"}]), said("assistant", "three")]
    row = {"images": [tiny.image()], "audio": [tiny.sound()]}
    split = MultimodalCollator(processor)([row | {"prompt": prompt, "completion": completion}])
    whole = MultimodalCollator(processor)([row | {"messages": prompt + completion}])
    assert learnt(processor, split) == ["two</s>three</s>"] and learnt(processor, whole) == ["one</s>two</s>three</s>"]
    assert torch.equal(split["input_ids"], whole["input_ids"])
    with pytest.raises(
        TypeError, match="row 0: expected 'completion' to be a string, or lists of messages for both, got list"
    ):
        MultimodalCollator(processor)([{"prompt": "x", "completion": completion}])


def test_several_items_per_turn_in_any_order_inside_and_in_columns(fresh_pair):
    _, processor = fresh_pair
    images, sounds = [tiny.image(i) for i in range(3)], [tiny.sound(i) for i in range(2)]
    kinds = ["audio", "image", "image", "text", "image", "audio"]

    def talk(inside):
        left = {"image": list(images), "audio": list(sounds)}
        parts = [{"type": k, k: left[k].pop(0) if k in inside else None} if k in left else {"type": k, k: "<image>"} for k in kinds]  # fmt: skip
        return [said("user", parts[:3]), said("assistant", "a"), said("user", parts[3:]), said("assistant", "b")]

    collate = MultimodalCollator(processor)
    inside = collate([{"messages": talk({"image", "audio"})}])
    equal(inside, collate([{"messages": talk({"image"}), "audio": sounds}]))
    equal(inside, collate([{"messages": talk(()), "images": images, "audio": sounds}]))
    mixed = talk(())
    mixed[0]["content"][1] = {"type": "image", "image": images[0]}
    equal(inside, collate([{"messages": mixed, "vision": images[1:], "audio": sounds, "images": None, "videos": []}]))
    assert inside["pixel_values"].shape[0] == 3 and inside["input_features"].shape[0] == 2
    with pytest.raises(
        ValueError, match=r"row 0: vision: 2 items were given for 3 parts without one.*typed in a string is text"
    ):
        collate([{"messages": talk(()), "images": images[1:], "audio": sounds}])
    with pytest.raises(ValueError, match=r"row 0: vision: 1 items were given for 0 parts"):
        collate([{"messages": [said("user", "<image> what?"), said("assistant", "b")], "images": images[:1]}])
    with pytest.raises(ValueError, match="row 0: vision: its items were given twice"):
        collate([{"text": "<image>", "images": images[:1], "vision": images[:1]}])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip


def test_tools_and_variables_of_the_template_come_from_columns(fresh_pair):
    _, processor = fresh_pair
    processor.chat_template = (
        "{{ (tools | tojson) if tools }}{{ mood }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content or (m.tool_calls | tojson) }}|{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "day": None}}, "id": None}
    talk = [
        said("user", "rain?"),
        said("assistant", None) | {"tool_calls": [call]},
        said("tool", "no"),
        said("assistant", "no"),
    ]
    rows = [{"messages": talk, "tools": tools, "chat_template_kwargs": {"mood": "calm", "other": None}} for tools in (TOOLS, json.dumps(TOOLS))]  # fmt: skip
    batch = MultimodalCollator(processor)([*rows, {"messages": talk, "tools": None}])
    written = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]|no|'
    assert learnt(processor, batch) == [written] * 3 and call["function"]["arguments"] == {"city": "Rome", "day": None}
    texts = [
        processor.decode(row[mask == 1]) for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert (
        texts[0] == texts[1] and texts[0].startswith(json.dumps(TOOLS) + "calm<user>") and texts[2].startswith("<user>")
    )
    with pytest.raises(ValueError, match=r"row 0: unknown columns \['tools'\]"):
        MultimodalCollator(processor)([{"text": "x", "tools": TOOLS}])


@pytest.mark.parametrize(
    "option", [{"audio_kwargs": {"truncation": True}}, {"do_rescale": False}, {"padding": "max_length"}]
)
def test_options_of_the_processor_are_no_variables_of_a_template(option):
    _, processor = compose_tiny(["clip"])
    talk = [said("user", "rain?"), said("assistant", "no")]
    with pytest.raises(
        ValueError, match=rf"row 0: chat_template_kwargs has \['{next(iter(option))}'\], which are the processor's"
    ):
        MultimodalCollator(processor)([{"messages": talk, "chat_template_kwargs": option}])


def test_what_a_tokenizer_was_built_with_neither_pads_nor_cuts_rows(tmp_path):
    model, _ = compose_tiny(["clip"])
    tiny.tokenizer().save_pretrained(tmp_path)
    batches = []
    for own in ({}, {"max_length": 4, "padding": "max_length", "truncation": True}):
        processor = MultimodalProcessor(AutoTokenizer.from_pretrained(tmp_path, **own), config=model.config)
        batches.append(MultimodalCollator(processor)([{"text": "the quick brown fox jumps"}]))
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])


def test_plain_text_that_begins_with_bos_gets_no_second_one(fresh_pair):
    _, processor = fresh_pair
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", processor.tokenizer.bos_token_id)]
    )
    rows = [{"text": "the fox"}, {"text": "<s>the fox"}, {"prompt": "<s>the", "completion": " fox</s>"}]
    batch = MultimodalCollator(processor)(rows)
    assert (batch["input_ids"] == processor.tokenizer.bos_token_id).sum(-1).tolist() == [1, 1, 1]
    assert learnt(processor, batch)[2] == " fox</s>"


def test_a_token_that_reaches_over_the_end_of_a_turn_is_split(fresh_pair):
    _, processor = fresh_pair
    processor.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [said("user", "the "), said("assistant", "fox"), said("user", " is five"), said("assistant", "\n")]
    for trimmed in (False, True):  # offsets without the spaces that tokens begin with
        processor.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
        batch = MultimodalCollator(processor)(
            [{"messages": talk}, {"prompt": "the ", "completion": "fox is\n\nfive \n"}]
        )
        assert learnt(processor, batch) == ["fox\n", "fox is\n\nfive \n"]
        assert processor.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == "the fox is five\n"


def test_a_tokenizer_without_offsets():
    model, _ = compose_tiny(["clip"], tiny.llama(vocab_size=400))
    processor = MultimodalProcessor(ByT5Tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    talk = [
        said("user", [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "où <image>?"}]),
        said("assistant", " là "),
    ]
    batch = MultimodalCollator(processor)(
        [{"messages": talk}, {"prompt": "<image>a", "completion": "b", "images": [tiny.image()]}]
    )
    assert learnt(processor, batch) == [" là</s>", "b"] and torch.isfinite(model(**batch).loss)
    assert (batch["input_ids"] == processor.image_token_id).sum(-1).tolist() == [5, 5]


# ---- tables


def wav(sound, rate=16_000):
    raw = io.BytesIO()
    soundfile.write(raw, sound, rate, format="wav", subtype="FLOAT")
    return raw.getvalue()


def png(image):
    raw = io.BytesIO()
    image.save(raw, "png")
    return raw.getvalue()


def table(count=4):
    """Rows of mixed modalities in which each column has missing cells, and each part has every key."""
    made = []
    for i in range(count):
        parts = [{"type": "text", "text": "what"}]
        parts += [{"type": "image"}] * (i % 3) + [{"type": "audio"}] * (i % 2)
        made.append({
            "messages": [said("user", parts), said("assistant", [{"type": "text", "text": f"it {i}"}])],
            "images": [tiny.image(i + k) for k in range(i % 3)] or None,
            "audio": {"bytes": wav(tiny.sound(i)), "path": None} if i % 2 else None,
        })  # fmt: skip
    return made


FEATURES = {
    "messages": [
        {"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string"), "image": Image()}]}
    ],
    "images": [Image()],
    "audio": {"bytes": Value("binary"), "path": Value("string")},
}


def tabled(rows, decode=True):
    made = Dataset.from_list(rows, features=Features(FEATURES | {"images": [Image(decode=decode)]}))
    return made.cast_column("audio", Audio(decode=False))


@pytest.mark.parametrize("decode", [True, False])
def test_tables_with_missing_cells_and_media_columns(fresh_pair, decode):
    _, processor = fresh_pair
    made = tabled(table(), decode)
    assert made[0]["messages"][0]["content"][0] == {"type": "text", "text": "what", "image": None}
    expected = MultimodalCollator(processor)(
        [row | {"audio": [tiny.sound(i)] if i % 2 else []} for i, row in enumerate(table())]
    )
    equal(MultimodalCollator(processor)([made[i] for i in range(4)]), expected)
    equal(MultimodalCollator(processor)(list(made.to_iterable_dataset())), expected)
    assert learnt(processor, expected) == [f"it {i}</s>" for i in range(4)]


def test_a_sound_at_another_rate_is_resampled_from_a_file_as_from_its_bytes(fresh_pair, tmp_path):
    _, processor = fresh_pair
    raw, path = wav(tiny.sound(0, 800), 8_000), tmp_path / "x.wav"
    path.write_bytes(raw)
    forms = [raw, str(path), path, {"bytes": raw, "path": "gone.wav"}, {"bytes": None, "path": str(path)}]
    batches = [MultimodalCollator(processor)([{"text": "<audio>a", "audio": form}]) for form in forms]
    for batch in batches[1:]:
        equal(batch, batches[0])
    with pytest.raises(ValueError, match=r"row 0: audio, item 0: .*8000 Hz, the encoder expects 16000 Hz.*cast_column"):
        MultimodalCollator(processor)([{"text": "a<audio>", "audio": {"array": tiny.sound(), "sampling_rate": 8_000}}])


def broken():
    whole = png(tiny.image(size=(64, 64)))
    return [
        ({"images": [b"no image"]}, r"vision, item 0: the image cannot be decoded from 8 bytes: UnidentifiedImageError"),
        ({"images": [tiny.image(), {"bytes": whole[:300], "path": None}]}, "vision, item 1: .*cannot be decoded.*(truncated|broken)"),
        ({"images": ["/gone/x.png"]}, "vision, item 0: the image cannot be decoded from '/gone/x.png': "),
        ({"audio": {"bytes": b"RIFFno sound", "path": None}}, "audio, item 0: the sound cannot be decoded from 12 bytes: "),
        ({"audio": ["/gone/x.wav"]}, "audio, item 0: the sound cannot be decoded from '/gone/x.wav': "),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(5))
def test_items_that_cannot_be_decoded_name_row_item_and_cause(fresh_pair, case):
    columns, message = broken()[case]
    parts = [{"type": "image"}] * len(columns.get("images", ())) + [{"type": "audio"}] * ("audio" in columns)
    row = {"messages": [said("user", parts), said("assistant", "x")]} | columns
    with pytest.raises(ValueError, match="row 1: " + message) as caught:
        MultimodalCollator(fresh_pair[1])([{"text": "fine"}, row])
    assert caught.value.__cause__.__cause__ is not None


def stream(count):
    yield from table(count)


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_rows_train(fresh_pair, tmp_path, workers):
    model, processor = fresh_pair
    arguments = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True,
                 "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False, "logging_steps": 1}  # fmt: skip
    arguments["accelerator_config"] = {"dispatch_batches": False}  # dispatching cuts every tensor to the number of rows
    found = []
    streams = [tabled(table(8)).to_iterable_dataset(num_shards=2)]
    if workers == 0:
        streams.append(IterableDataset.from_generator(stream, gen_kwargs={"count": 8}))
    for rows in streams:
        made = Trainer(
            model=copy.deepcopy(model),
            args=TrainingArguments(**arguments, dataloader_num_workers=workers),
            train_dataset=rows,
            data_collator=MultimodalCollator(processor),
        )
        made.train()
        found.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert len(found[0]) == 2 and all(torch.tensor(losses).isfinite().all() for losses in found)
    assert all(losses == found[0] for losses in found)


def test_a_collator_pickles(fresh_pair):
    collator = MultimodalCollator(fresh_pair[1], max_length=60, truncation="right")
    equal(pickle.loads(pickle.dumps(collator))(table()), collator(table()))


# ---- cutting and padding


def test_packed_items_are_cut_whole_and_told_once():
    _, processor = compose_tiny(["qwen2_vl"])
    sizes = [(16, 16), (40, 24), (24, 24)]
    images = [tiny.image(i, size) for i, size in enumerate(sizes)]
    row = {"prompt": "a<image><image>", "completion": "seven<image> five", "images": images}
    whole = MultimodalCollator(processor)([row])
    counts = (whole["image_grid_thw"].prod(-1) // 4).tolist()
    text = len(whole["input_ids"][0]) - sum(counts)
    collate = MultimodalCollator(processor, max_length=len(whole["input_ids"][0]) - counts[2], truncation="right")
    with pytest.warns(
        UserWarning, match=r"1 rows .*max_length=\d+ and cut on the right, by \d+ tokens; items dropped: 1 of 'vision'"
    ):
        cut = collate([{"text": "x y"}, row])
    assert torch.equal(cut["image_grid_thw"], whole["image_grid_thw"][:2]) and len(set(counts)) > 1
    assert torch.equal(cut["pixel_values"], whole["pixel_values"][: whole["image_grid_thw"][:2].prod(-1).sum()])
    assert learnt(processor, cut) == ["x y", "seven"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equal(collate([{"text": "x y"}, row]), cut)
    left = MultimodalCollator(processor, max_length=text + counts[2] + counts[1], truncation="left")
    with pytest.warns(UserWarning, match="cut on the left.*1 of 'vision'"):
        after = left([row])
    assert torch.equal(after["image_grid_thw"], whole["image_grid_thw"][1:]) and learnt(processor, after) == learnt(
        processor, whole
    )
    with pytest.raises(
        ValueError,
        match=r"row 1: the row has \d+ tokens, and of the 1 that are left by max_length=4 .* none has a label",
    ):
        MultimodalCollator(processor, max_length=4, truncation="right")([{"text": "x y"}, row])


def test_padding_on_the_left_moves_nothing_else(fresh_pair):
    _, processor = fresh_pair
    sides = {
        side: MultimodalCollator(processor, padding_side=side, pad_to_multiple_of=8)(table())
        for side in ("left", "right")
    }
    lengths = sides["right"]["attention_mask"].sum(-1).tolist()
    assert len(set(lengths)) > 1 and sides["left"]["input_ids"].shape[1] % 8 == 0
    for key in ("input_ids", "labels", "attention_mask"):
        for left, right, length in zip(sides["left"][key], sides["right"][key], lengths, strict=True):
            assert torch.equal(left[-length:], right[:length])
    assert (sides["left"]["labels"][sides["left"]["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_side": "both"}, "padding_side must be 'right' or 'left', got 'both'"),
        (
            {"truncation": "items", "max_length": 4},
            r"truncation must be one of \('raise', 'right', 'left'\), got 'items'",
        ),
        ({"truncation": "right"}, "needs max_length="),
        ({"max_length": 0}, "max_length must be a positive integer, got 0"),
    ],
)
def test_options_that_cannot_be(fresh_pair, options, message):
    with pytest.raises(ValueError, match=message):
        MultimodalCollator(fresh_pair[1], **options)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"messages": [said("user", "x")]}, ValueError, "row 0: there is no token to learn"),
        ({"prompt": "x", "completion": ""}, ValueError, "row 0: there is no token to learn"),
        ({"messages": []}, ValueError, r"row 0: expected a list of messages, got \[\]"),
        ({"text": 3}, TypeError, "row 0: expected 'text' to be a string, got int"),
        ("text", TypeError, "row 0: expected a dict of columns, got str"),
        ({"messages": [said("user", [{"type": "text", "text": None}])]}, ValueError, "row 0: .*string as its 'text', got None"),
        ({"messages": ["x"]}, TypeError, "row 0: message 0: A message must be a dict"),
        ({"messages": [said("user", "x")], "tools": "[{"}, ValueError, "row 0: .*column 3"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be(fresh_pair, row, error, message):
    with pytest.raises(error, match=message):
        MultimodalCollator(fresh_pair[1])([row])


def test_a_conversation_that_a_template_refuses_names_the_row(fresh_pair):
    _, processor = fresh_pair
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="row 0: roles must alternate"):
        MultimodalCollator(processor)([{"messages": [said("user", "x"), said("assistant", "y")]}])


@pytest.mark.parametrize(("position", "label"), [(0, 9), (1, 6), (2, 0), (1, 5)])
def test_labels_on_padding_placeholders_and_other_tokens_are_refused(position, label):
    batch = {"input_ids": torch.tensor([[9, 5, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    labels = torch.full((1, 3), -100)
    labels[0, position] = label
    if (position, label) == (1, 5):
        return check_labels(batch | {"labels": labels}, {"vision": 9})
    with pytest.raises(ValueError, match=f"row 0: the label at position {position} is {label}"):
        check_labels(batch | {"labels": labels}, {"vision": 9})


def test_every_batch_is_checked(fresh_pair):
    class Wrong(MultimodalCollator):
        def _batch(self, encoded):
            batch = super()._batch(encoded)
            batch["labels"][1, -1] = 7
            return batch

    with pytest.raises(ValueError, match=r"row 1: the label at position \d+ is 7"):
        Wrong(fresh_pair[1])([{"text": "the fox jumps over the lazy dog"}, {"text": "x y"}])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"max_length": 9, "truncation": "left"}])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(fresh_pair, side, options):
    model, processor = fresh_pair
    rows = [
        {"text": "the quick brown fox <image> jumps", "images": [tiny.image()]},
        {"text": "the lazy dog is <audio>", "audio": [tiny.sound()]},
        {"text": "what sum"},
    ]
    collate = MultimodalCollator(processor, padding_side=side, **options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, alone = collate(rows), [collate([row]) for row in rows]
        counts = torch.tensor([int((one["labels"][:, 1:] != -100).sum()) for one in alone])
        assert int((whole["labels"][:, 1:] != -100).sum()) == counts.sum()
        losses = torch.stack([model(**one).loss for one in alone])
        torch.testing.assert_close(model(**whole).loss, (losses * counts).sum() / counts.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"processor": tiny.tokenizer()}, TypeError, "takes the processor of a composed model, got .*: compose\\(\\) returns one"),
        ({"processor": tiny.clip_processor()}, TypeError, "takes the processor of a composed model, got CLIPImageProcessor"),
        ({"processor": tiny.llama()}, TypeError, "takes the processor of a composed model, got LlamaForCausalLM"),
        ({"processor": None}, TypeError, "takes the processor of a composed model, got NoneType"),
        ({"max_length": 0}, ValueError, "max_length must be a positive integer, got 0"),
        ({"max_length": "512"}, ValueError, "max_length must be a positive integer, got '512'"),
        ({"pad_to_multiple_of": -8}, ValueError, "pad_to_multiple_of must be a positive integer, got -8"),
        ({"sampling_rate": "16k"}, ValueError, "sampling_rate must be a positive integer, got '16k'"),
        ({"padding_side": "both"}, ValueError, "padding_side must be 'right' or 'left', got 'both'"),
        ({"truncation": True}, ValueError, "truncation must be one of .*, got True"),
    ],
)  # fmt: skip
def test_what_a_collator_is_made_of(fresh_pair, options, error, message):
    with pytest.raises(error, match=message):
        MultimodalCollator(**{"processor": fresh_pair[1]} | options)


def test_arguments_of_the_processors_call_reach_it():
    _, processor = compose_tiny(["clip", "whisper"])
    given = {"images_kwargs": {"do_normalize": False}, "audio_kwargs": {"return_attention_mask": True}}
    row = {"text": "<image> and <audio>", "images": [tiny.image()], "audio": [tiny.sound(0, 8_000)]}
    batch = MultimodalCollator(processor, processor_kwargs=given)([row, {"text": "none"}])
    call = {"text": row["text"], "images": tiny.image(), "audio": tiny.sound(0, 8_000), "sampling_rate": 16_000}
    expected = processor(**call, **given, return_tensors="pt")
    media = set(expected) - {"input_ids", "attention_mask"}
    assert "audio_attention_mask" in media and all(torch.equal(batch[key], expected[key]) for key in media)
    assert batch["input_ids"][0].tolist() == expected["input_ids"][0].tolist()
    assert not torch.equal(expected["pixel_values"], processor(**call, return_tensors="pt")["pixel_values"])
    assert given == {"images_kwargs": {"do_normalize": False}, "audio_kwargs": {"return_attention_mask": True}}
    with pytest.raises(TypeError, match="processor_kwargs: Unknown arguments .*pictures_kwargs"):
        MultimodalCollator(processor, processor_kwargs={"pictures_kwargs": {}})


@pytest.mark.parametrize("key", ["padding", "max_length", "truncation", "return_tensors", "text_kwargs", "sampling_rate", "images", "vision", "llm_inputs"])  # fmt: skip
def test_arguments_that_the_collator_gives_itself_are_refused(key):
    _, processor = compose_tiny(["clip"])
    with pytest.raises(
        ValueError, match=rf"processor_kwargs has \['{key}'\], which the collator gives the processor itself"
    ):
        MultimodalCollator(processor, processor_kwargs={key: None})


FOREIGN = {
    "llava": ({"id": 3, "image": 0, "conversations": [{"from": "human", "value": "<image>\nwhat"}]}, ["clip"]),
    "vqa": ({"image": 0, "question": "what", "answers": ["fox"]}, ["clip"]),
    "speech": ({"audio": 1, "sentence": "the fox"}, ["clip", "whisper"]),
    "captions": ({"vision": 0, "caption": "the fox"}, ["clip"]),
    "unknown media": ({"img": 0, "text": "the fox"}, ["clip"]),
}


@pytest.mark.parametrize("key", FOREIGN)
def test_columns_of_other_trainers_are_refused_with_those_that_are_read_and_what_to_do(key):
    row, encoders = FOREIGN[key]
    _, processor = compose_tiny(encoders)
    row = {
        k: {0: tiny.image(), 1: tiny.sound()}.get(v, v) if isinstance(v, int) and k != "id" else v
        for k, v in row.items()
    }
    with pytest.raises(ValueError) as caught:
        MultimodalCollator(processor)([row])
    told = str(caught.value)
    assert str(list(row)) in told and "row 0: " in told
    assert "'vision': ['vision', 'images', 'image']" in told
    assert ("'audio': ['audio']" in told) == ("whisper" in encoders)
    for remedy in ("dataset.rename_column", "dataset.map", "dataset.remove_columns", "messages"):
        assert remedy in told
    assert "text" in told


def test_names_of_columns_that_would_mean_several_encoders_are_not_told():
    _, processor = compose_tiny({"left": "clip", "right": "siglip"})
    with pytest.raises(ValueError, match=r"names \{'left': \['left'\], 'right': \['right'\]\}"):
        MultimodalCollator(processor)([{"question": "what"}])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (["x"], TypeError, "processor_kwargs must be a dict, by name, got list"),
        ("x", TypeError, "processor_kwargs must be a dict, by name, got str"),
        ({"do_rescail": False}, TypeError, r"processor_kwargs: Unknown arguments \['do_rescail'\], this processor takes"),
        ({"image_kwargs": {}}, TypeError, r"processor_kwargs: Unknown arguments \['image_kwargs'\]"),
        ({"images_kwargs": {"do_rescail": False}}, TypeError, r"processor_kwargs: vision: .* takes no option \['do_rescail'\]"),
        ({"images_kwargs": ["x"]}, TypeError, "processor_kwargs: images_kwargs must be a dict, by name, got list"),
        ({"videos_kwargs": {"fps": 1}}, TypeError, "processor_kwargs: videos_kwargs was given, but the model has no encoder"),
        ({"vision_kwargs": {"size": {"height": 8, "width": 8}, "do_resize": False}}, ValueError, "size= does nothing while do_resize"),
        ({"add_special_tokens": "yes"}, ValueError, "processor_kwargs: text: add_special_tokens"),
        ({1: 2}, TypeError, r"processor_kwargs must have names as its keys, got 1"),
    ],
)  # fmt: skip
def test_arguments_of_the_processor_are_checked_when_the_collator_is_built(given, error, match):
    _, processor = compose_tiny(["clip"])
    with pytest.raises(error, match=match):
        MultimodalCollator(processor, processor_kwargs=given)


def test_template_variables_of_a_row_are_a_dict():
    _, processor = compose_tiny(["clip"])
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(TypeError, match="row 0: chat_template_kwargs must be a dict, by name, got list"):
        MultimodalCollator(processor)([row | {"chat_template_kwargs": ["x"]}])


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({3: 4}, ValueError, r"row 0: unknown columns \[3\]"),
        (
            {"chat_template_kwargs": {"local_media": False}},
            ValueError,
            r"row 0: chat_template_kwargs has \['local_media'\]",
        ),
        ({"chat_template_kwargs": {1: 2}}, TypeError, "row 0: chat_template_kwargs must have names as its keys, got 1"),
        ({"tools": "3"}, TypeError, "row 0: expected a list of tools, or JSON of one, got 3"),
        ({"sampling_rate": 0, "text": "<audio>x"}, ValueError, "row 0: .*sampling_rate"),
    ],
)
def test_columns_of_wrong_kinds_name_the_row(row, error, match):
    _, processor = compose_tiny(["whisper"])
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = row | ({"audio": tiny.sound()} if "text" in row else {"messages": talk})
    with pytest.raises(error, match=match):
        MultimodalCollator(processor)([row])


@pytest.mark.parametrize("name", [["a"], None, 3])
def test_the_column_of_lengths_has_a_name(name):
    with pytest.raises(TypeError, match="length_column_name must be the name of a column"):
        MultimodalCollator(compose_tiny(["clip"])[1], length_column_name=name)
