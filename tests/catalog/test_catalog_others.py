"""The catalogue's rows without images: each names a class, is stated to give something, builds small, and joins as it says."""

import catalog
import catalog_others
import pytest
import torch
from helpers import needs_5_24

# A few of each form; the whole table is run by the matrix.
SAMPLE = (
    "BertModel",
    "Wav2Vec2BertModel",
    "ParakeetEncoder",
    "WhisperEncoder",
    "PatchTSTModel",
    "Qwen2_5OmniAudioEncoder",
)
# Padded inputs that are no longer than the item for another reason than its neighbours, or whose mask is inverted.
FIXED = {"Qwen3ASREncoder", "Gemma3nAudioEncoder"}


@needs_5_24
def test_every_row_names_one_class_of_transformers():
    rows = {**catalog_others.CASES, **catalog_others.MORE}
    assert [name for name in rows if len(catalog.homes().get(name, [])) != 1] == []


def test_the_tables_are_whole_and_each_row_is_stated_to_give_features_or_not():
    assert len(catalog_others.CASES) == 79
    stated = [*catalog_others.FEATURES, *catalog_others.NO_FEATURES]
    assert sorted(stated) == sorted(catalog_others.CASES)
    assert set(catalog_others.MORE) & set(catalog_others.CASES) == set()


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_builds_small_and_gives_the_features_stated(name):
    model = catalog.build(name)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    with torch.no_grad():
        given = [model(**catalog.item(name, i)).last_hidden_state for i in (0, 1)]
    first, second, width = catalog_others.FEATURES[name]
    assert [x.numel() // x.shape[-1] for x in given] == [first, second]
    assert {x.shape[-1] for x in given} == {width}


def test_a_padded_batch_holds_each_item_and_its_mask_tells_the_length():
    names = [name for name, case in catalog_others.CASES.items() if case.join == "pad" and name not in FIXED]
    assert len(names) > 40
    for name in names:
        items = catalog.together(name)
        batch = catalog.joined(name, items)
        mask_name = next(key for key in batch if key.endswith("mask"))
        mask = batch[mask_name]
        for row, one in enumerate(items):
            length = int(mask[row].sum())
            assert length == one[mask_name].shape[1], name
            for key, value in one.items():
                alike = batch[key][row : row + 1]
                for axis in range(1, alike.ndim):
                    alike = alike.narrow(axis, 0, value.shape[axis])
                assert torch.equal(alike, value), (name, key)


def test_packed_items_lie_one_after_the_other():
    items = catalog.together("Qwen2_5OmniAudioEncoder")
    batch = catalog.joined("Qwen2_5OmniAudioEncoder", items)
    pieces = batch["input_features"].split(batch["feature_lens"].tolist(), dim=1)
    assert all(torch.equal(piece, one["input_features"]) for piece, one in zip(pieces, items, strict=True))
    assert len({len(piece[0]) for piece in pieces}) == 3


def test_masks_of_one_length_encoders_differ_from_item_to_item():
    masks = [catalog.item("AudioFlamingo3Encoder", i)["input_features_mask"].sum().item() for i in range(4)]
    assert masks == [32, 20, 27, 9]
