"""Merging: masks, counts, labels and the scatter, on plain tensors."""

import pytest
import tiny
import torch
from helpers import compose_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cornstarch_hf.language_model.merging import (
    check_counts,
    check_labels,
    embedded_placeholder_mask,
    items_of_samples,
    mask_labels,
    scatter_features,
    shifted_left,
)

IDS = torch.tensor([[1, 9, 9, 2, 3], [9, 4, 5, 9, 9]])
MASK = IDS == 9


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_features_land_in_reading_order_and_nothing_else_changes(rows):
    mask, embeds = torch.tensor(rows), torch.randn(len(rows), 5, 3)
    before, features = embeds.clone(), torch.randn(int(mask.sum()), 3)
    merged = scatter_features(embeds, mask, features)
    assert torch.equal(merged[mask], features) and torch.equal(merged[~mask], embeds[~mask])
    assert torch.equal(embeds, before)


def test_features_of_another_number_or_dtype():
    with pytest.raises(ValueError, match=r"do not match: features \(4, 3\)"):
        scatter_features(torch.zeros(2, 5, 3), MASK, torch.ones(4, 3))
    merged = scatter_features(torch.zeros(2, 5, 3, dtype=torch.bfloat16), MASK, torch.ones(5, 3))
    assert merged.dtype is torch.bfloat16 and merged.sum() == 15


def test_ids_and_embeddings_give_the_same_mask():
    table = torch.randn(10, 4)
    assert torch.equal(embedded_placeholder_mask(table[IDS], table[9]), MASK)


@pytest.mark.parametrize("lengths", [[2, 3], [1, 1, 3], [2, 1, 1, 1], [2, 0, 3], [0, 2, 3]])
def test_counts_that_fit(lengths):
    check_counts("vision", "<image>", MASK.sum(-1).tolist(), lengths)
    items = torch.randn(5, 2).split(lengths)
    own = items_of_samples([len(item) for item in items], MASK.sum(-1).tolist())
    groups = [[items[i] for i in each] for each in own]
    assert [sum(map(len, group)) for group in groups] == [2, 3]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, 2], r"vision: the text has 5 .*<image>.*gave 4 features for 2 item\(s\) \[2, 2\].*\[2, 3\]"),
        ([], r"5 placeholder tokens.*0 features for 0 item\(s\) \[\]"),
        ([3, 2], r"vision, sample 0: 2 placeholder tokens .*items 0\.\.0 give 3 features \[3\]"),
        ([1, 2, 2], r"sample 0: 2 .*items 0\.\.1 give 3 features \[1, 2\].*cannot be split"),
        ([1] * 14, r"\[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, \.\.\.\]"),
    ],
)
def test_counts_that_do_not_fit(lengths, message):
    with pytest.raises(ValueError, match=message):
        check_counts("vision", "<image>", MASK.sum(-1).tolist(), lengths)


def test_labels_are_masked_in_a_copy():
    labels = IDS.clone()
    masked = mask_labels(MASK, labels)
    assert torch.equal(labels, IDS) and masked[MASK].eq(-100).all() and torch.equal(masked[~MASK], IDS[~MASK])
    short = labels[:, :3]
    assert mask_labels(MASK, None) is None and mask_labels(MASK, short) is short
    assert torch.equal(shifted_left(MASK)[:, :-1], MASK[:, 1:]) and not shifted_left(MASK)[:, -1].any()


def test_labelled_placeholders_that_were_counted_already():
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    check_labels(MASK, [9], IDS, None, counted=False)
    check_labels(MASK, [9], mask_labels(MASK, IDS), None, counted=True)
    check_labels(MASK, [9], None, mask_labels(shifted_left(MASK), shifted), counted=True)
    with pytest.raises(ValueError, match="5 of 5 placeholder tokens are labelled in labels"):
        check_labels(MASK, [9], IDS, None, counted=True)
    with pytest.raises(ValueError, match="4 of 4 placeholder tokens are labelled in shift_labels"):
        check_labels(MASK, [9], None, shifted, counted=False)


@pytest.mark.parametrize("kind", [None, "np"])
@pytest.mark.parametrize("method", ["__call__", "generate", "forward_headless"])
def test_inputs_that_are_no_tensors_say_what_the_processor_was_not_told(method, kind):
    model, processor = compose_tiny(["clip"])
    inputs = processor(text="<image> a", images=tiny.image(), return_tensors=kind)
    what = "list" if kind is None else "ndarray"
    with pytest.raises(TypeError, match=f"input_ids must be a tensor, got a {what}: .*return_tensors='pt'"):
        getattr(model, method)(**inputs)
