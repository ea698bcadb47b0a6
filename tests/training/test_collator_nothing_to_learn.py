"""Rows that a loss would learn nothing from are refused in every form, and no others, by an oracle of its own."""

import warnings
from dataclasses import dataclass

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cornstarch_hf import MultimodalCollator, compose
from cornstarch_hf.training.collator import learnable

FEATURES = 5  # of each image
IMAGE = tiny.image()
MARKED = (
    "{% for m in messages %}{{ m.role + ' ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ ' ' }}{% endfor %}"
)
ENDED = (
    "{% for m in messages %}{{ m.role + ' ' + m.content }}{{ ' end ' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def pair():
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "user", "assistant", "end", "a", "b"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=MARKED
    )
    part = {"model": tiny.clip(), "processor": tiny.clip_processor()}
    model, processor = compose(tiny.llama(), {"vision": part}, tokenizer=tokenizer)
    return model.eval(), processor


@dataclass
class Row:
    """A row, and whether each of its tokens has a label (None: a feature of an image, which are `FEATURES` each)."""

    columns: dict
    labels: list


def piece(word, learnt):
    return [None] * FEATURES if word == "<image>" else [learnt]


pieces = st.lists(st.sampled_from(["a", "b", "<image>"]), max_size=3)
words = st.lists(st.sampled_from(["a", "b"]), max_size=2)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words), min_size=1, max_size=4)


def text_row(written):
    columns = {"text": " ".join(written), "images": [IMAGE] * written.count("<image>")}
    return Row(columns, [label for word in written for label in piece(word, True)])


def completed_row(parts):
    prompt, completion = parts
    # A token of white space alone there is none: the strings meet anywhere.
    columns = {"prompt": " ".join([*prompt, ""]), "completion": " ".join(completion)}
    columns["images"] = [IMAGE] * (prompt + completion).count("<image>")
    labels = [label for word in prompt for label in piece(word, False)]
    return Row(columns, labels + [label for word in completion for label in piece(word, True)])


def chat_row(drawn):
    said, first = drawn
    first = min(first, len(said))
    messages = [{"role": role, "content": " ".join(content)} for role, content in said]
    labels = []
    for index, (role, content) in enumerate(said):
        labels += [False] + [role == "assistant" and index >= first] * len(content)
    if not 0 < first < len(said) or any(not content for _, content in said):
        return Row({"messages": messages}, chat_labels(said))
    return Row({"prompt": messages[:first], "completion": messages[first:]}, labels)


def chat_labels(said):
    return [label for role, content in said for label in [False] + [role == "assistant"] * len(content)]


rows = st.one_of(
    pieces.map(text_row),
    st.tuples(pieces, pieces).map(completed_row),
    st.tuples(turns, st.integers(0, 3)).map(chat_row),
)


def kept(labels, limit, side):
    """The longest part of a row, from the other side, that is short enough and cuts no image: tried one by one."""
    whole = len(labels)
    if limit is None or whole <= limit:
        return labels
    for size in range(limit, -1, -1):
        cut = size if side == "right" else whole - size
        run = 0  # features in front of the cut, without a break
        while cut - run > 0 and labels[cut - run - 1] is None:
            run += 1
        if run % FEATURES == 0:
            return labels[:size] if side == "right" else labels[cut:]
    raise AssertionError("an empty part cuts nothing")


@settings(deadline=None, derandomize=True, max_examples=250)
@given(row=rows, limit=st.none() | st.integers(1, 14), side=st.sampled_from(["right", "left"]), data=st.data())
def test_a_row_is_refused_where_its_loss_counts_no_label(pair, row, limit, side, data):
    model, processor = pair
    options = {} if limit is None else {"max_length": limit, "truncation": side}
    options |= {"padding_side": data.draw(st.sampled_from(["right", "left"]))}
    options |= {"pad_to_multiple_of": data.draw(st.sampled_from([None, 8]))}
    collate = MultimodalCollator(processor, **options)
    others = [] if limit == 1 else [{"text": "a b"}]  # which has one label to learn
    counted = sum(label is True for label in kept(row.labels, limit, side)[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cuts
        if counted == 0:
            with pytest.raises(ValueError, match=f"row {len(others)}: .*(there is no token to learn|none has a label)"):
                collate([*others, row.columns])
            with pytest.raises(ValueError, match="row 0: .*(there is no token to learn|none has a label)"):
                collate.lengths([row.columns])
            return
        batch = collate([*others, row.columns])
        assert collate.lengths([*others, row.columns]) == batch["attention_mask"].sum(-1).tolist()
    assert int((batch["labels"][len(others) :, 1:] != -100).sum()) == counted
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ""}, "expected text in 'text'"),
        ({"text": "<image>", "images": [IMAGE]}, "expected text in 'text', there is none beside placeholders"),
        ({"text": "a"}, "the only label is that of the row's first token.*Put text in front of it"),
        ({"text": "a <image>", "images": [IMAGE]}, "the only label is that of the row's first token"),
        ({"prompt": "", "completion": "b"}, "the only label is that of the row's first token"),
        ({"prompt": "a b", "completion": ""}, "expected a turn of the assistant, or a completion, with text in it"),
        ({"prompt": "a b", "completion": " "}, "expected a turn of the assistant, or a completion, with text in it"),
        ({"prompt": "a", "completion": "<image>", "images": [IMAGE]}, "expected a turn of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "expected a turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "expected a turn of the assistant"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}, ".*generation marks"),
    ],
)  # fmt: skip
def test_the_message_tells_what_the_row_lacks(pair, columns, message):
    for side in ("right", "left"):
        with pytest.raises(ValueError, match=f"row 2: there is no token to learn: {message}"):
            MultimodalCollator(pair[1], padding_side=side)([{"text": "a b"}, {"text": "a b a"}, columns])


def test_an_empty_turn_that_a_template_ends_is_learnt(pair):
    _, processor = pair
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    own, processor.chat_template = processor.chat_template, ENDED
    try:
        batch = MultimodalCollator(processor)([{"messages": talk}])
    finally:
        processor.chat_template = own
    assert processor.decode([i for i in batch["labels"][0].tolist() if i != -100]) == "end"


@pytest.mark.parametrize(
    ("row", "side", "limit", "left"),
    [
        ({"prompt": "a a a", "completion": " b"}, "right", 3, 3),
        ({"prompt": "a a <image>", "completion": " b", "images": [IMAGE]}, "right", 5, 2),  # the image goes as a whole
        ({"prompt": "a", "completion": " b <image> a", "images": [IMAGE]}, "left", 3, 1),
        ({"prompt": "a a a", "completion": " b"}, "left", 1, 1),
        ({"text": "a b a"}, "right", 1, 1),
        ({"text": "a b a"}, "left", 1, 1),
    ],
)
def test_a_cut_that_leaves_nothing_to_learn_tells_both_lengths(pair, row, side, limit, left):
    collate = MultimodalCollator(pair[1], max_length=limit, truncation=side)
    others = [{"text": "a b"}] * (limit > 1)
    told = rf"row {len(others)}: the row has \d+ tokens, and of the {left} that are left by max_length={limit} .*none has a label"
    with pytest.raises(ValueError, match=told):
        collate([*others, row])


def test_a_model_takes_rows_without_labels_as_native_ones_do(pair):
    model, _ = pair
    ids = torch.tensor([[3, 6, 7, 6], [4, 7, 6, 7]])
    labels = torch.stack([torch.full((4,), -100), ids[1]])
    for given_labels in (labels, torch.full((2, 4), -100)):
        for options in ({}, {"num_items_in_batch": torch.tensor(3)}):
            ours = model(input_ids=ids, labels=given_labels, **options).loss
            theirs = model.language_model(input_ids=ids, labels=given_labels, **options).loss
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("labels", "expected"), [([], False), ([5], False), ([5, -100], False), ([-100, 5], True), ([-100] * 3, False)]
)
def test_a_label_counts_behind_the_first_token(labels, expected):
    assert learnable(labels) is expected
