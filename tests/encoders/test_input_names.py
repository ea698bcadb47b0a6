"""Input names: which keyword brings which input to which encoder."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from cornstarch_hf.encoders.building import assign_input_names
from cornstarch_hf.encoders.towers import OWN_INPUTS, keyword_for, named_inputs, transformers_keywords
from cornstarch_hf.parts.signatures import forward_parameters

KINDS = {"vision": "image", "clip": "video", "audio": "audio", "left": "image", "right": "image"}


def assign(parameters, language_model=("input_ids", "attention_mask")):
    return assign_input_names(parameters, KINDS, language_model)


def test_unique_names_stay():
    names = assign({"vision": ["pixel_values"], "audio": ["input_features"]})
    assert names == {"vision": {"pixel_values": "pixel_values"}, "audio": {"input_features": "input_features"}}


def test_two_encoders_that_want_one_name_both_get_their_prefix():
    names = assign({"left": ["pixel_values"], "right": ["pixel_values", "bool_masked_pos"]})
    assert names["left"] == {"left_pixel_values": "pixel_values"}
    assert names["right"] == {"right_pixel_values": "pixel_values", "bool_masked_pos": "bool_masked_pos"}


@pytest.mark.parametrize("name", ["attention_mask", "labels", "token_type_ids", "inputs", "cu_seq_lens_q", "alibi"])
def test_names_of_text_belong_to_the_language_model(name):
    names = assign({"audio": [name]}, language_model=["input_ids", "alibi"])
    assert names["audio"] == {f"audio_{name}": name}


def test_packed_towers_take_what_their_processors_emit():
    names = assign({"vision": ["hidden_states", "grid_thw"], "clip": ["hidden_states", "grid_thw"]})
    assert names["vision"] == {"pixel_values": "hidden_states", "image_grid_thw": "grid_thw"}
    assert names["clip"] == {"pixel_values_videos": "hidden_states", "video_grid_thw": "grid_thw"}


def test_a_prefixed_name_that_is_taken_too():
    with pytest.raises(ValueError, match="audio: its input 'mask' .*'audio_mask', which the language model uses"):
        assign({"audio": ["mask"]}, language_model=["mask", "audio_mask"])
    with pytest.raises(ValueError, match="'left_size', which the encoder 'right' uses"):
        assign({"right": ["left_size", "size"], "left": ["size"]})


@given(st.dictionaries(st.sampled_from(list(KINDS)), st.lists(st.sampled_from("abcdef"), unique=True), max_size=5))
def test_every_input_gets_one_keyword_and_no_keyword_two_inputs(parameters):
    names = assign(parameters, language_model=["a", "input_ids"])
    assert {name: list(found.values()) for name, found in names.items()} == parameters
    keywords = [keyword for found in names.values() for keyword in found]
    assert len(set(keywords)) == len(keywords) and "a" not in keywords


def test_keyword_for_prefers_the_prefixed_name():
    names = {"audio_attention_mask": "attention_mask", "input_features": "input_features"}
    assert keyword_for("attention_mask", "audio", names) == "audio_attention_mask"
    assert keyword_for("input_features", "audio", names) == "input_features"
    assert keyword_for("num_frames", "audio", names) is None


def test_the_language_models_own_inputs_are_never_an_encoders():
    parameters = {"audio": list(forward_parameters(tiny.llama()))}
    keywords = set(assign(parameters, forward_parameters(tiny.llama()))["audio"])
    assert not keywords & (set(OWN_INPUTS) | transformers_keywords())


def test_names_under_which_encoders_take_what_processors_emit_otherwise():
    names = {"pixel_values": "pixel_values", "pixel_position_ids": "pixel_position_ids"}
    assert keyword_for("image_position_ids", "vision", names) == "pixel_position_ids"
    assert keyword_for("image_position_ids", "vision", {"pixel_values": "pixel_values"}) is None
    # The encoder's own name goes first, and of two that could be one input the second stays out.
    mask = torch.tensor([[1, 1, 0]])
    both = {"padding_mask": mask * 0, "attention_mask": mask, "noise": mask}
    assert named_inputs(both, "audio", {"audio_attention_mask": "attention_mask"}) == {"audio_attention_mask": mask}


def test_a_mask_of_another_name_must_be_one_of_positions():
    mask, names = (
        torch.tensor([[1, 1, 0]]),
        {"input_features": "input_features", "audio_attention_mask": "attention_mask"},
    )
    for features, kept in ((torch.zeros(1, 3, 8), True), (torch.zeros(1, 8, 3), False)):
        emitted = {"input_features": features, "input_features_mask": mask, "padding_mask": mask}
        assert ("audio_attention_mask" in named_inputs(emitted, "audio", names)) is kept


def test_a_mask_that_is_true_on_padding_is_turned_round_once():
    mask, names = torch.tensor([[1, 1, 0]]), {"audio_mel": "audio_mel", "audio_mel_mask": "audio_mel_mask"}
    found = named_inputs({"input_features": mask, "input_features_mask": mask}, "audio", names)
    assert found["audio_mel"] is mask and found["audio_mel_mask"].tolist() == [[False, False, True]]
    assert named_inputs({"audio_mel_mask": mask}, "audio", names) == {"audio_mel_mask": mask}
