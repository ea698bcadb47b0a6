"""Features of each item where the shape of an encoder's output does not tell."""

from types import SimpleNamespace

import pytest
import torch

from cornstarch_hf.encoders.items import ItemLengthsUnknown, Padded, feature_lengths
from cornstarch_hf.encoders.selection import rows_of_items

GRID = torch.tensor([[1, 4, 4], [1, 4, 8]])


def module(**config):
    return SimpleNamespace(config=SimpleNamespace(**config))


def packed(count, arguments, **config):
    return feature_lengths(torch.zeros(count, 4), arguments, {}, module(**config), None)


def test_packed_features_are_divided_by_their_patches_where_these_are_merged_alike():
    patches = {"hidden_states": torch.zeros(48, 3), "grid_thw": GRID}
    assert packed(48, patches) == packed(48, patches, spatial_merge_size=2) == [16, 32]
    assert packed(12, patches, spatial_merge_size=2) == [4, 8]
    assert packed(24, patches, merge_kernel_size=[1, 2]) == [8, 16]
    assert packed(18, patches | {"merge_sizes": torch.tensor([1, 4])}) == [16, 2]
    sizes = {"pixel_values": torch.zeros(2, 3, 8, 12), "image_sizes": torch.tensor([[8, 8], [4, 12]])}
    assert packed(7, sizes, patch_size=4) == [4, 3]


@pytest.mark.parametrize("count", [3, 11, 24, 47])
def test_other_numbers_are_not_guessed(count):
    with pytest.raises(ItemLengthsUnknown):
        packed(count, {"hidden_states": torch.zeros(48, 3), "grid_thw": GRID}, spatial_merge_size=2)


def test_all_features_of_one_item_are_its_own_and_one_vector_each_is_told_by_the_rows():
    assert packed(11, {"hidden_states": torch.zeros(16, 3), "grid_thw": GRID[:1]}) == [11]
    assert packed(3, {"input_values": torch.zeros(3, 9), "ids": torch.zeros(3, 2)}) == [1, 1, 1]
    with pytest.raises(ItemLengthsUnknown):
        packed(6, {"input_values": torch.zeros(3, 9)})


def padded(features, lengths, size, raw=None, arguments=None, made=None):
    shape = Padded("attention_mask", size, lengths)
    return feature_lengths(torch.zeros(features), arguments or {}, raw or {}, made or module(), shape)


def test_valid_rows_are_those_of_the_outputs_mask_then_of_the_inputs_then_of_the_encoders_own_count():
    valid = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert padded((2, 3, 4), [5, 9], 9, {"attention_mask": valid}) == [2, 3]
    assert padded((2, 3, 4), [5, 9], 9, {"output_mask": valid.bool()}) == [2, 3]
    assert padded((2, 3, 4), [5, 9], 9, {"audio_mel_mask": 1 - valid}) == [2, 3]
    assert padded((2, 3, 4), [5, 9], 9, {"attention_mask": torch.ones(2, 3)}) is None
    assert padded((2, 9, 4), [5, 9], 9) == [5, 9] and padded((2, 9, 4), [9, 9], 9) is None
    assert padded((2, 9, 4), [9, 9], 9, arguments={"pixel_attention_mask": torch.ones(2, 9)}) is None
    counting = module()
    counting._get_feat_extract_output_lengths = lambda lengths: (lengths + 1) // 2
    assert padded((2, 5, 4), [5, 9], 9, made=counting) == [3, 5]
    assert padded((2, 3, 4), [9, 9], 9) is None
    with pytest.raises(ItemLengthsUnknown):
        padded((2, 3, 4), [5, 9], 9)


def test_rows_that_hold_several_items():
    assert rows_of_items(torch.zeros(1, 5, 4), 2).shape == (5, 4)
    assert rows_of_items(torch.zeros(1, 5, 4), 1).ndim == 3 and rows_of_items(torch.zeros(2, 5, 4), 2).ndim == 3
    assert rows_of_items(torch.zeros(5, 4), 2).shape == (5, 4)


def test_lengths_are_told_of_all_tokens_and_given_without_the_prefix():
    mask = {"pixel_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert feature_lengths(torch.zeros(2, 3, 4), mask, {}, module(), None, dropped=1) == [2, 3]
    with pytest.raises(ValueError, match=r"drop_prefix=3 needs items of more tokens than that, got \[3, 4\]"):
        feature_lengths(torch.zeros(2, 1, 4), mask, {}, module(), None, dropped=3)
