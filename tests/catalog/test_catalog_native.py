"""Every native multimodal type of the conversion table: taken apart, stored, put together again, equal to the bit."""

import catalog_llms
import convertible_models
import native_types
import pytest
import tiny
import torch
import transformers
from changed_settings import changed_models
from native_types import (
    TYPES,
    WITH_VIDEOS,
    check_bfloat16,
    check_gradients,
    check_there_and_back,
    check_videos,
    digests,
)

from cornstarch_hf import from_native, to_native
from cornstarch_hf.conversion.table import NATIVE

pytestmark = pytest.mark.catalog


def test_every_type_of_the_table_is_here():
    assert {*TYPES, *native_types.ALONE} == set(NATIVE) and len(NATIVE) >= 58


@pytest.mark.parametrize("model_type", TYPES)
def test_a_native_type_is_equal_there_and_back(model_type, tmp_path):
    native = native_types.build(model_type)
    check_there_and_back(native, tmp_path)
    check_bfloat16(native)
    check_gradients(native)
    if model_type in WITH_VIDEOS:
        check_videos(native, tmp_path)


# Settings that the native class itself cannot have beside the others: it takes features of a wrong number, or no whole ones.
CONTRADICTORY = (
    "word_embed_proj_dim", "text_config.hidden_size", "audio_config.hidden_size", "audio_config.intermediate_size",
)  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_changed_settings_are_followed_or_refused_by_name(model_type):
    followed = 0
    for path, value, native in changed_models(native_types.build(model_type), count=16):
        try:
            inputs = native_types.inputs_of(native)
            expected = native_types.logits_of(native, inputs)
        except Exception:  # natively impossible
            continue
        if path.endswith(CONTRADICTORY) or not torch.isfinite(expected).all():
            continue
        try:
            model, _ = from_native(native)
        except ValueError as error:
            assert path.rpartition(".")[2] in str(error), (path, value)
            continue
        assert torch.equal(native_types.logits_of(model, inputs), expected), (path, value)
        assert to_native(model).config.to_dict() == native.config.to_dict(), (path, value)
        followed += 1
    assert followed >= 4


# Texts with which LLaVA runs in every version: of the rest some have no table of embeddings by that name.
RUNNING = {
    "cohere", "gemma", "gemma2", "glm", "gpt_neox", "gpt_oss", "granite", "gptj", "llama", "minicpm3", "mistral", "mixtral",
    "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


@pytest.mark.parametrize("model_type", catalog_llms.TYPES)
def test_a_llava_of_any_text_type_is_equal_there_and_back(model_type, tmp_path):
    """Its head is a plain one, whatever the type's own class for causal language models does before, in or behind it."""
    try:
        vision, text = tiny.clip().config, catalog_llms.configuration(model_type)
        torch.manual_seed(0)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
        native = transformers.LlavaForConditionalGeneration(config).eval()
        ids = torch.tensor([[5, 6, *[3] * 4, 11, 12, 13], [7, *[3] * 4, 8, 9, 5, 14]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = convertible_models.noise(2, 3, 8, 8)
        expected = native_types.logits_of(native, inputs)
    except Exception as error:
        assert model_type not in RUNNING
        pytest.skip(f"no LLaVA runs with such a text: {type(error).__name__}: {error!s:.80}")
    if model_type in catalog_llms.REFUSED:
        with pytest.raises(ValueError, match=catalog_llms.REFUSED[model_type]):
            from_native(native)
        return
    model, _ = from_native(native)
    assert torch.equal(native_types.logits_of(model, inputs), expected)
    assert digests(to_native(model)) == digests(native)
    native.save_pretrained(tmp_path / "native")
    native_types.check_loaded(tmp_path / "native", native)


@pytest.mark.parametrize("model_type", native_types.ALONE)
def test_parts_of_a_native_type_give_what_they_give_alone(model_type):
    vision = dict.fromkeys(
        ("vision_output_dim", "projector_input_dim", "projector_output_dim", "intermediate_size"), 128
    )
    native = convertible_models.made(model_type, "Llama4ForConditionalGeneration", {"vision_config": vision})
    pixels = convertible_models.noise(3, 3, 32, 32)
    with torch.no_grad():
        features = native.multi_modal_projector(native.vision_model(pixels).last_hidden_state.flatten(0, 1))
        each = len(features) // 3
        inputs = convertible_models.batch(
            convertible_models.Media({"pixel_values": pixels}, {convertible_models.IMAGE: [each] * 3})
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        places = (ids == convertible_models.IMAGE)[..., None]
        merged = native.get_input_embeddings()(ids).masked_scatter(places, features)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = native.language_model(inputs_embeds=merged, attention_mask=mask, position_ids=positions).logits
        model, _ = from_native(native)
        got = model(**inputs, position_ids=positions).logits
    assert torch.equal(got[mask.bool()], expected[mask.bool()]) and digests(to_native(model)) == digests(native)
