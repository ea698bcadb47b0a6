"""Placeholders in text: expanding, marks around what users typed, ids, masks and padding."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cornstarch_hf.processing.placeholder_text import (
    BREAK,
    MARK_END,
    MARK_START,
    encode,
    expand,
    mark_typed,
    occurrences,
    pad_rows,
    split_typed,
    token_mask,
    unmark,
)

TOKENS = ["<image>", "<im", "<audio>"]
TEXT = st.lists(st.sampled_from([*TOKENS, "age>", "the fox", " ", "\n", "é", "<"]), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": TOKENS})
    return made


@given(TEXT, TEXT)
def test_marks_hide_typed_placeholders_and_come_off_again(before, typed):
    marked = mark_typed(typed, TOKENS)
    assert unmark(marked) == typed and mark_typed(marked, TOKENS) == marked
    assert not any(occurrences(marked, TOKENS).values())
    assert occurrences(before + " " + marked, TOKENS) == occurrences(before, TOKENS)


def test_the_longest_token_wins():
    assert occurrences("<image><im <audio", TOKENS) == {"<image>": 1, "<im": 1, "<audio>": 0}
    assert occurrences("a[b] .*", ["[b]", ".*"]) == {"[b]": 1, ".*": 1} and occurrences("abc", []) == {}


@given(TEXT, st.data())
def test_each_placeholder_is_repeated_by_its_own_item(text, data):
    found = occurrences(text, TOKENS)
    lengths = {t: data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) for t, n in found.items()}
    taken = {}
    made = expand(text, {token: [token * n for n in own] for token, own in lengths.items()}, taken)
    assert made.counts == {token: sum(values) for token, values in lengths.items()}
    assert {t: taken.get(t, 0) for t in TOKENS} == found
    for start, end, new_start, new_end in made.spans:
        token = text[start:end]
        assert made.text[new_start:new_end] == token * ((new_end - new_start) // len(token))
    ends = [0, *(span[1] for span in made.spans), len(text)]
    assert made.moved(len(text)) == len(made.text) and [made.moved(e) for e in ends] == sorted(map(made.moved, ends))


def test_samples_take_items_in_turn_and_typed_ones_take_none():
    texts, taken = {"<image>": ["<image>" * n for n in (1, 3, 2)]}, {}
    typed = mark_typed("<image>", TOKENS)
    first, second = (expand(text, texts, taken) for text in (f"{typed}a<image>b", "<image>-<image>"))
    assert first.text == f"{typed}a<image>b" and second.text == "<image>" * 3 + "-" + "<image>" * 2
    assert first.moved(len(typed)) == len("<image>") and taken == {"<image>": 3}


def test_what_stands_for_an_item_may_be_any_text():
    made = expand("a<image>b<image>", {"<image>": ["[<image><image>|<image>]", ""]}, {})
    assert made.text == "a[<image><image>|<image>]b" and made.counts == {"<image>": 3}
    assert made.spans == [(1, 8, 1, 25), (9, 16, 26, 26)] and made.moved(8) == 25


def test_a_text_is_cut_at_what_was_typed():
    assert split_typed(f"a{mark_typed('<image>', TOKENS)}b") == ["a", "<image>", "b"] and split_typed("ab") == ["ab"]


@settings(deadline=None)
@given(before=TEXT, typed=TEXT, after=TEXT)
def test_typed_placeholders_become_plain_tokens(tokenizer, before, typed, after):
    ids = encode(tokenizer, [before + mark_typed(typed, TOKENS) + after])[0]["input_ids"]
    assert tokenizer.decode(ids) == before + typed + after
    special = tokenizer.convert_tokens_to_ids(TOKENS)
    real = sum(occurrences(before, TOKENS).values()) + sum(occurrences(after, TOKENS).values())
    assert sum(i in special for i in ids) == real


def test_plain_and_marked_rows_keep_their_order_and_offsets(tokenizer):
    marked = f"the {MARK_START}<image>{MARK_END} fox<image>"
    rows = encode(tokenizer, [marked, "the <image>"], return_offsets_mapping=True)
    assert rows[1]["input_ids"] == tokenizer("the <image>")["input_ids"]
    text = unmark(marked)
    pieces = [text[a:b] for a, b in rows[0]["offset_mapping"]]
    assert "".join(pieces) == text and pieces[-1] == "<image>" and "<image>" not in pieces[:-1]
    for side, kept in (("left", rows[0]["input_ids"][-4:]), ("right", rows[0]["input_ids"][:4])):
        tokenizer.truncation_side = side
        assert encode(tokenizer, [marked], truncation=True, max_length=4)[0]["input_ids"] == kept
    tokenizer.truncation_side = "right"


def test_masks_mark_tokens_that_lie_in_a_span():
    assert token_mask([(0, 0), (0, 2), (2, 5), (5, 6), (0, 0)], [(2, 6)]) == [0, 0, 1, 1, 0]
    assert token_mask([(0, 2)], [(2, 4)]) == [0] and token_mask([(0, 2)], []) == [0]
    assert token_mask([(0, 1), (0, 1), (0, 1)], [(0, 1)]) == [1, 1, 1], "bytes of one character"
    assert token_mask([(0, 2), (3, 3), (4, 5)], [(0, 5)]) == [1, 1, 1], "white space without offsets"


def mask_by_definition(offsets, spans):
    ends, mask, reached = {end for span in spans for end in span if end > 0}, [], 0
    for a, b in offsets:
        start = min(reached, a)
        if (a > reached and any(reached <= end <= a for end in ends)) or any(start < end < b for end in ends):
            return None
        mask.append(int(start < b and any(low <= start and b <= high for low, high in spans)))
        reached = max(reached, b)
    return mask


def test_masks_of_random_spans_are_those_of_the_definition():
    rng, masks = np.random.default_rng(0), 0
    for _ in range(2_000):
        cuts = sorted(rng.integers(0, 60, int(rng.integers(2, 30))).tolist())
        offsets = [(a, b) for a, b in pairwise(cuts) if rng.random() < 0.9]
        ends = sorted(rng.choice(cuts, 2 * int(rng.integers(0, 6))).tolist())
        if rng.random() < 0.3:  # elsewhere than at tokens
            ends = sorted(rng.integers(0, 60, len(ends)).tolist())
        spans = list(zip(ends[::2], ends[1::2], strict=True))
        found = token_mask(offsets, spans)
        assert found == mask_by_definition(offsets, spans), (offsets, spans)
        masks += found is not None
    assert 200 < masks < 1_900


@pytest.mark.parametrize("span", [(1, 3), (2, 6), (0, 3), (3, 4)])
def test_tokens_on_the_end_of_a_span_give_no_mask(span):
    assert token_mask([(0, 2), (2, 5), (6, 8)], [span]) is None, span


@settings(deadline=None)
@given(pieces=st.lists(TEXT, min_size=2, max_size=4), data=st.data())
def test_tokens_of_a_span_are_exactly_its_text(tokenizer, pieces, data):
    wanted = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    spans = [(end - len(p), end) for p, end, keep in zip(pieces, ends, wanted, strict=True) if keep and p]
    (row,) = encode(tokenizer, ["".join(pieces)], [spans])
    kept = [i for i, keep in zip(row["input_ids"], row["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(row["input_ids"]) == "".join(pieces)
    assert tokenizer.decode(kept) == "".join(p for p, keep in zip(pieces, wanted, strict=True) if keep)


def test_text_is_split_only_where_a_token_reaches_over_the_end(tokenizer):
    whole = tokenizer("the fox")["input_ids"]
    assert encode(tokenizer, ["the fox"], [[(3, 7)]])[0] == {
        "input_ids": whole,
        "assistant_masks": [0] + [1] * (len(whole) - 1),
    }
    (split,) = encode(tokenizer, ["the fox"], [[(4, 7)]], return_offsets_mapping=True)
    assert split["input_ids"] == [*tokenizer("the ")["input_ids"], *tokenizer("fox")["input_ids"]] != whole
    assert "".join("the fox"[a:b] for a, b in split["offset_mapping"]) == "the fox"


def test_a_tokenizer_without_offsets_and_one_with_spaces_in_front():
    slow = ByT5Tokenizer()
    (row,) = encode(slow, ["où <image>?"], [[(3, 10)]])
    kept = [i for i, keep in zip(row["input_ids"], row["assistant_masks"], strict=True) if keep]
    assert slow.decode(kept) == "<image>" and row["input_ids"][-1] == slow.eos_token_id
    assert row["input_ids"] == slow("où <image>?")["input_ids"]
    letters = {c: i for i, c in enumerate(["<unk>", "▁", "▁hi", "hi", "\n", ".", "x", "\n\n"])}
    inner = Tokenizer(models.Unigram([(c, -float(len(letters) - i)) for c, i in letters.items()], unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for text, span in (("hihi", (2, 4)), ("hi\nhi", (2, 5)), ("x hi", (1, 4))):
        (row,) = encode(made, [MARK_START + MARK_END + text], [[span]])
        tokens = made.convert_ids_to_tokens(row["input_ids"])
        assert "".join(tokens).replace("▁", " ").lstrip() == text, tokens


def test_types_of_tokens_are_those_of_a_text_in_one_piece():
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[A]": 3, "[B]": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(single="[A]:2 $A:1 [B]:3", special_tokens=[("[A]", 3), ("[B]", 4)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    for text, options in (("a b", {}), ("a b", {"add_special_tokens": False}), ("", {})):
        whole, cut = encode(made, [text, text + BREAK], return_token_type_ids=True, **options)
        assert cut == {key: whole[key] for key in cut} and cut.keys() >= {"input_ids", "token_type_ids"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_fills_every_column_on_one_side(tokenizer, side):
    rows, extra = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}], {"assistant_masks": [[1, 1, 1], [1]]}
    padded = pad_rows(tokenizer, rows, extra, {"padding": True, "padding_side": side, "pad_to_multiple_of": 4}, None)
    short = [0, 0, 0, 1] if side == "left" else [1, 0, 0, 0]
    assert padded["attention_mask"][1] == padded["assistant_masks"][1] == short
    assert sorted(padded["input_ids"][1]) == [0, 0, 0, 8] and len(padded["input_ids"][0]) == 4
    bare = pad_rows(tokenizer, [{"input_ids": [5]}], {"offset_mapping": [[(0, 1)]]}, {}, None)
    assert bare == {"input_ids": [[5]], "attention_mask": [[1]], "offset_mapping": [[(0, 1)]]}
