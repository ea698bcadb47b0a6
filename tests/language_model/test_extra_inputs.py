"""Positions of padded rows: which language models are told, from where, and what the caller keeps."""

import catalog_llms
import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs

from cornstarch_hf.language_model.extra_inputs import (
    first_position,
    mask_positions,
    only_distances_count,
    with_positions,
)

MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
IDS = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
TOLD = [[0, 0, 0, 1], [0, 1, 2, 3]]


def told(model, past=0, **arguments):
    found = with_positions(model, {"input_ids": IDS, "attention_mask": MASK} | arguments, past)
    return found["position_ids"].tolist() if found.get("position_ids") is not None else None


def test_valid_tokens_are_numbered_from_the_first_position():
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert mask_positions(mask).tolist() == [[0, 0, 1, 0, 0], [0, 1, 2, 3, 4], [0] * 5]
    assert mask_positions(mask.bool(), 2).tolist() == [[2, 2, 3, 2, 2], [2, 3, 4, 5, 6], [2] * 5]


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("gpt2", 0), ("bert", 0), ("roberta", 2), ("camembert", 2), ("xlm-roberta-xl", 2), ("llama", 0)],
)
def test_the_first_position_is_behind_the_padding_where_the_table_has_it(model_type, expected):
    assert first_position(catalog_llms.build(model_type)) == expected


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llama", True), ("gemma3_text", True), ("gpt2", False), ("xglm", False), ("recurrent_gemma", False)],
)
def test_rotary_models_count_distances_alone(model_type, expected):
    model = catalog_llms.build(model_type)
    assert only_distances_count(model) is expected
    assert told(model) == (None if expected else TOLD)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"full_attention": {"rope_type": "longrope"}}]
)
def test_rotary_frequencies_that_follow_the_length_need_positions(rope):
    model = tiny.llama()
    model.config.rope_parameters = {"rope_theta": 1e4} | rope
    assert not only_distances_count(model) and told(model) == TOLD


def test_what_the_caller_gave_is_kept_and_nothing_is_added_without_need():
    model, given = tiny.gpt2(), torch.tensor([[9, 9, 9, 9]])
    arguments = {"input_ids": IDS, "attention_mask": MASK}
    assert with_positions(model, arguments, 0)["input_ids"] is IDS and set(arguments) == {"input_ids", "attention_mask"}
    assert told(model, position_ids=given) == given.tolist()
    assert told(model, attention_mask=torch.ones(2, 4)) is None and told(model, attention_mask=None) is None
    assert told(model, attention_mask=MASK[:, None, None]) is None  # a mask of one's own form
    assert told(catalog_llms.build("bloom")) is None  # takes no positions: it reads the mask
    assert told(model, past=3) is None  # a mask of the new tokens alone tells nothing of those before


def test_positions_go_on_behind_cached_tokens():
    mask = torch.cat([MASK, torch.ones(2, 1, dtype=torch.long)], 1)
    new = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": mask}
    assert told(tiny.gpt2(), past=4, **new) == [[2], [4]]
    roberta = catalog_llms.build("roberta")
    assert told(roberta, past=4, **new) == [[4], [6]]
    assert told(roberta, past=4, **new | {"attention_mask": None}) == [[6], [6]]


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "xglm"])
def test_a_padded_row_equals_the_same_row_alone(model_type):
    model, processor = compose_tiny(["clip"], catalog_llms.build(model_type))
    inputs = uneven_inputs(processor)
    with torch.no_grad():
        together = model(**inputs).logits
        hidden = model.base_model(**inputs).last_hidden_state
        for sample, images in enumerate(([0], [1, 2], [])):
            keep = inputs["attention_mask"][sample].bool()
            alone = {"input_ids": inputs["input_ids"][sample][keep][None]}
            if images:
                alone["pixel_values"] = inputs["pixel_values"][images]
            torch.testing.assert_close(together[sample][keep], model(**alone).logits[0], atol=2e-5, rtol=0)
            expected = model.base_model(**alone).last_hidden_state[0]
            torch.testing.assert_close(hidden[sample][keep], expected, atol=2e-5, rtol=0)
