"""Selection: outputs in every form, layers, prefixes, maps, and features of each item."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from cornstarch_hf.encoders.selection import (
    EncoderOutput,
    Selection,
    as_output,
    rows_of_items,
    select_features,
    with_features,
)
from cornstarch_hf.projectors.projector import per_item

STATES = tuple(torch.randn(2, 5, 4) for _ in range(3))


def output(**changes):
    return EncoderOutput(**{"last_hidden_state": torch.randn(2, 5, 4), "hidden_states": STATES} | changes)


def select(made, width=None, **options):
    return select_features(made, Selection(**options), "vision", width)[0]


def test_every_form_of_output_becomes_one():
    x, lens = torch.randn(2, 3, 4), torch.tensor([1, 2])
    for raw in (x, (x, 1), BaseModelOutput(last_hidden_state=x), {"mask": lens, "image_embeds": x}):
        assert as_output(raw).last_hidden_state is x
    made = as_output(BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x[:, 0]))
    assert torch.equal(made.pooler_output, x[:, 0]) and as_output(made) is made
    assert as_output({"last_hidden_state": x, "feature_lens": lens}).lengths == [1, 2]
    for wrong in (None, 3, ()):
        with pytest.raises(TypeError, match=f"a tuple or a tensor, got {type(wrong).__name__}"):
            as_output(wrong)


def test_with_features_copies_and_puts_them_first():
    made, features = ModelOutput(extra=torch.ones(1), last_hidden_state=torch.zeros(1)), torch.ones(2, 4)
    copied = with_features(made, features, [1, 1], more=7)
    assert copied[0] is features and copied.lengths == [1, 1] and copied["extra"] is made["extra"]
    assert copied["more"] == 7 and made["last_hidden_state"].eq(0).all() and "more" not in made


def test_layers_fields_and_prefixes():
    made = output(pooler_output=torch.randn(2, 4))
    assert select(made) is made.last_hidden_state and select(made, layer=0) is STATES[0]
    assert torch.equal(select(made, layer=(-1, 0)), torch.cat([STATES[-1], STATES[0]], -1))
    assert select(made, output="pooler_output") is made.pooler_output
    assert torch.equal(select(made, drop_prefix=2), made.last_hidden_state[:, 2:])
    assert [Selection(layer=n).needs_hidden_states for n in (-1, -2, (-1, 0))] == [False, True, True]
    packed = output(last_hidden_state=torch.randn(8, 4), pooler_output=torch.randn(2, 16))
    assert select(packed) is packed.pooler_output


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"layer": 3}, "vision: layer 3 does not exist, the encoder gives 3 hidden states"),
        ({}, {"layer": (0, -4)}, "layer -4 does not exist"),
        ({"hidden_states": None}, {"layer": -2}, "layer=-2 needs hidden states"),
        ({}, {"output": "logits"}, r"no tensor 'logits', it has \['last_hidden_state'\]"),
        ({"last_hidden_state": None}, {}, r"no features, it has \['hidden_states'\]"),
        ({}, {"drop_prefix": 5}, r"drop_prefix=5 .*\(2, 5, 4\)"),
        ({"last_hidden_state": torch.zeros(5, 4)}, {"drop_prefix": 1}, r"drop_prefix=1 .*\(5, 4\)"),
        ({"last_hidden_state": torch.zeros(1, 2, 3, 4, 5)}, {}, r"\(1, 2, 3, 4, 5\), expected"),
    ],
)
def test_selections_that_cannot_be_made(changes, options, message):
    with pytest.raises(ValueError, match=message):
        select(output(**changes), **options)


def test_maps_are_read_row_by_row_whichever_axis_holds_the_channels():
    tokens = torch.randn(2, 6, 4)
    last = tokens.unflatten(1, (2, 3))
    first = last.permute(0, 3, 1, 2)
    assert torch.equal(select(output(last_hidden_state=last), width=4), tokens)
    for width in (None, 4):
        assert torch.equal(select(output(last_hidden_state=first), width=width), tokens)


def test_one_tensor_for_each_item():
    x = torch.randn(2, 3, 4)
    for features, lengths, expected in (
        (x, None, [x[0], x[1]]),
        (x, [3, 1], [x[0], x[1, :1]]),
        (x.flatten(0, 1), [1, 5], [x[0, :1], x.flatten(0, 1)[1:]]),
        ([x, x[0]], None, [x.flatten(0, 1), x[0]]),
    ):
        found = per_item(features, lengths, "vision")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for features, lengths, message in (
        (x, [3], r"lengths \[3\] do not fit features of shape \(2, 3, 4\)"),
        (x, [3, 4], r"lengths \[3, 4\] do not fit"),
        (x[0], None, r"\(3, 4\) cannot be split into items by lengths None.*feature_lens"),
        (x[0], [1, 1], r"\(3, 4\) cannot be split into items by lengths \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            per_item(features, lengths, "vision")


def test_layers_that_cannot_be_joined_are_refused():
    uneven = output(hidden_states=(torch.randn(2, 9, 4), torch.randn(2, 5, 4), (STATES[0],)))
    assert select(uneven, layer=0).shape == (2, 9, 4)
    with pytest.raises(
        ValueError, match=r"different sizes cannot be joined, layer=\(0, 1\) .*\(2, 9, 4\), \(2, 5, 4\)"
    ):
        select(uneven, layer=(0, 1))
    with pytest.raises(ValueError, match="hidden state -1 is a tuple and no tensor"):
        select(uneven, layer=(-1, 0))


def test_several_rows_of_an_item_become_one():
    x = torch.randn(6, 5, 4)
    assert torch.equal(rows_of_items(x, 2)[1], x[3:].flatten(0, 1))
    for rows, items in ((x, 6), (x, 4), (x, 7), (x[0], 1)):
        assert rows_of_items(rows, items) is rows
