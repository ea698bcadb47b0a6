"""The catalogue of encoders: every row names a class, builds it small, and the table is complete."""

import catalog
import catalog_vision
import catalog_vision_more
import pytest
import torch
from helpers import needs_5_24

# A few of each form, built and run; the whole table is run by the matrix.
SAMPLE = ("CLIPVisionModel", "Qwen3VLVisionModel", "MiniCPMV4_6VisionModel", "Siglip2VisionModel", "PixtralVisionModel")


@needs_5_24
def test_every_row_names_one_class_of_transformers():
    assert [name for name in catalog.cases() if len(catalog.homes().get(name, [])) != 1] == []


def test_rows_and_stated_features_are_of_the_same_classes():
    assert len(catalog_vision.CASES) == 120
    assert set(catalog_vision.FEATURES) == set(catalog_vision.CASES)
    assert set(catalog_vision_more.MORE_FEATURES) == set(catalog_vision_more.MORE)
    assert set(catalog_vision.CASES).isdisjoint(catalog_vision_more.MORE)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_builds_runs_and_joins(name):
    model = catalog.build(name)
    again = catalog.build(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert sum(p.numel() for p in model.parameters()) < 200_000
    items = catalog.together(name)
    batch = catalog.joined(name, items)
    with torch.no_grad():
        alone = [model(**one).last_hidden_state.flatten(0, -2) for one in items]
        together = model(**batch).last_hidden_state
    if len(together) == len(items):  # one row for each item, padded on the right
        pieces = [row[: len(one)] for row, one in zip(together, alone, strict=True)]
    else:
        pieces = list(together.flatten(0, -2).split([len(one) for one in alone]))
    torch.testing.assert_close(pieces, alone, atol=1e-5, rtol=1e-4)
    assert len(alone[0]) % catalog_vision.FEATURES[name][0] == 0


def test_items_are_drawn_again_the_same_and_differ_from_each_other():
    one, other = catalog.item("CLIPVisionModel", 0), catalog.item("CLIPVisionModel", 1)
    assert torch.equal(one["pixel_values"], catalog.item("CLIPVisionModel", 0)["pixel_values"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_padding_is_on_the_right_of_every_axis_and_by_name():
    case = catalog.Case(
        lambda i: {"x": torch.ones(1, i + 1, 2), "mask": torch.ones(1, i + 1)}, join="pad", padding={"x": 7}
    )
    batch = catalog.joined("none", [case.items(0), case.items(1)], case)
    assert batch["x"][:, :, 0].tolist() == [[1, 7], [1, 1]]
    assert batch["mask"].tolist() == [[1, 0], [1, 1]]


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(LookupError, match=r"NoSuchModel: expected one module.*found \[\]"):
        catalog.found_class("NoSuchModel")


def test_redrawn_weights_let_a_signal_through_and_are_the_same_each_time():
    name = "MobileNetV2Model"
    assert catalog.cases()[name].redraw
    first, again = (catalog.build(name) for _ in range(2))
    with torch.no_grad():
        one, other = (first(**catalog.item(name, i)).last_hidden_state for i in (0, 2))
        assert torch.equal(again(**catalog.item(name, 0)).last_hidden_state, one)
    assert (one - other).norm() > 0.1 * one.norm()
    assert not first.training
