"""The Q-Former projector: equal to BLIP-2's to the bit, and a projector like any other around that."""

import copy
import json

import pytest
import tiny
import torch
from native_parts import projector, randomized
from own_memory import check_comes_back, own_memory
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    from_native,
)
from cornstarch_hf.projectors.qformer import QFormerProjection

SMALL = {
    "num_query_tokens": 5,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
CALL = {"text": "<image> a b", "images": tiny.ENCODERS["clip"][3](0)}


def composed(key="clip", options=SMALL, **encoder):
    name, build, processor, _ = tiny.ENCODERS[key]
    spec = {"model": build(), "processor": processor(), **encoder}
    return compose(tiny.llama(), {name: spec}, {"projection_type": "qformer", **options}, tokenizer=tiny.tokenizer())


def inputs_of(processor):
    return dict(processor(**CALL, return_tensors="pt"))


# ---- equal to BLIP-2


def blip2(**qformer):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 32, "vocab_size": 320, "max_position_embeddings": 128}  # fmt: skip
    former = {key: value for key, value in SMALL.items() if key != "num_query_tokens"} | qformer
    config = Blip2Config(
        vision_config={**sizes, "image_size": 8, "patch_size": 4}, qformer_config=former, text_config=text,
        num_query_tokens=5, image_token_index=300,
    )  # fmt: skip
    return randomized(Blip2ForConditionalGeneration(config))


def qformer_weights(native):
    parts = ("query_tokens", "qformer.", "language_projection.")
    return {key: value.clone() for key, value in native.state_dict().items() if key.startswith(parts)}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"cross_attention_frequency": 1}, {"cross_attention_frequency": 1}),
        (
            {"hidden_act": "silu", "layer_norm_eps": 1e-5, "num_attention_heads": 3},
            {"activation": "silu", "layer_norm_eps": 1e-5, "num_attention_heads": 3},
        ),
    ],
)
def test_features_and_logits_are_those_of_blip2(theirs, ours):
    native = blip2(**theirs)
    config = MultimodalProjectorConfig(projection_type="qformer", in_features=16, out_features=32, **SMALL | ours)
    made = MultimodalProjector(config)
    made.projection.load_state_dict(qformer_weights(native))
    encoder = ModalEncoderModule(copy.deepcopy(native.vision_model), made)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=copy.deepcopy(native.language_model)).eval()
    model.set_modality_token_ids({"vision": 300})
    inputs = {
        "input_ids": torch.tensor([[300] * 5 + [7, 8, 9], [2, *[300] * 5, 4, 5]]),
        "pixel_values": torch.randn(2, 3, 8, 8),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    native, model = own_memory(native), own_memory(model)
    with torch.no_grad():
        expected = native.get_image_features(inputs["pixel_values"])
        found = model.get_image_features(inputs["pixel_values"])
        assert torch.equal(torch.stack(list(found.pooler_output)), expected.pooler_output)
        assert expected.pooler_output.std() > 0.05
        assert torch.equal(model(**inputs).logits, native(**inputs).logits)


def test_weights_have_the_names_of_the_converted_projector(tmp_path):
    native = blip2()
    native.save_pretrained(tmp_path)
    converted = from_native(native)[0]
    (name,) = converted.encoders
    state = converted.encoders[name].projector.projection.module.state_dict()
    made = projector("qformer", 16, 32, weights=state, **SMALL)
    features = torch.randn(2, 7, 16)
    with torch.no_grad():
        there = own_memory(converted.encoders[name].projector)(features)[0]
        assert torch.equal(own_memory(made)(features)[0], there)


# ---- options and fresh weights


def test_options_are_stored_and_build_the_same_module(tmp_path):
    options = {**SMALL, "cross_attention_frequency": 1, "activation": "relu", "layer_norm_eps": 1e-6,
               "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.2, "initializer_range": 0.5}  # fmt: skip
    made = projector("qformer", 16, 32, **options)
    config = made.projection.qformer.config
    assert (config.encoder_hidden_size, config.hidden_act, config.cross_attention_frequency) == (16, "relu", 1)
    assert (config.layer_norm_eps, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (1e-6, 0.0, 0.2)
    made.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["projection_kwargs"]["num_query_tokens"] == 5 and stored["activation"] == "relu"
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.projection_kwargs == made.config.projection_kwargs
    x = torch.randn(2, 7, 16)
    assert torch.equal(own_memory(again)(x)[0], own_memory(made)(x)[0])


def test_a_module_wrapped_by_hand_comes_back(tmp_path):
    wrapped = MultimodalProjector(MultimodalProjectorConfig(), QFormerProjection(16, 32, "silu", **SMALL)).eval()
    assert (wrapped.config.projection_type, wrapped.config.activation) == ("qformer", "silu")
    wrapped.save_pretrained(tmp_path)
    again, x = AutoModel.from_pretrained(tmp_path), torch.randn(2, 7, 16)
    assert again.projection.qformer.config.hidden_act == "silu"
    assert torch.equal(own_memory(again)(x)[0], own_memory(wrapped)(x)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_query_tokens": 0}, ValueError, "num_query_tokens .*0"),
        ({"num_hidden_layers": 1.5}, ValueError, "num_hidden_layers .*1.5"),
        ({"hidden_size": 10, "num_attention_heads": 3}, ValueError, "num_attention_heads=3 must divide hidden_size=10"),
        ({"hidden_dropout_prob": 1.0}, ValueError, "hidden_dropout_prob must be a number from 0 up to.*1.0"),
        ({"layer_norm_eps": 0}, ValueError, "layer_norm_eps must be a number above 0 and below 1, got 0"),
        ({"initializer_range": True}, ValueError, "initializer_range must be a number above 0"),
        ({"num_queries": 4}, TypeError, r"'qformer' projector takes no \['num_queries'\]"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        MultimodalProjectorConfig(projection_type="qformer", **options)


def test_fresh_queries_differ_and_layers_are_as_their_class_fills_them(tmp_path):
    torch.manual_seed(0)
    model, _ = composed(options=SMALL | {"initializer_range": 0.1, "hidden_size": 64, "intermediate_size": 96})
    state = model.state_dict()
    start = "vision_encoder.projector.projection."
    lost = [f"{start}query_tokens", f"{start}qformer.encoder.layer.0.attention.attention.query.weight"]
    lost = [key for key in state if key in lost or key.endswith("layer.1.attention.attention.query.weight")]
    assert len(lost) >= 2
    queries = state[f"{start}query_tokens"][0]
    assert queries.unique(dim=0).shape == queries.shape
    model.save_pretrained(tmp_path, state_dict={key: value for key, value in state.items() if key not in lost})
    again, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost)
    for found in (again.state_dict(), MultimodalModel(model.config).state_dict(), state):
        assert all(0.07 < found[key].std() < 0.13 for key in lost)  # initializer_range=0.1
        norms = [value for key, value in found.items() if key.startswith(start) and key.endswith("LayerNorm.weight")]
        assert norms and all(value.eq(1).all() for value in norms)


# ---- counts and items


def test_counts_are_the_queries_whatever_the_item():
    model, processor = composed()
    inputs = inputs_of(processor)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 5
    made = projector("qformer", 8, 12, **SMALL)
    assert [made.feature_count(n) for n in (1, 7, 300)] == [5, 5, 5]
    for fails in (lambda: made.feature_count(0), lambda: made(torch.zeros(2, 0, 8))):
        with pytest.raises(ValueError, match="Q-Former cannot gather from an item without features"):
            fails()


def test_items_of_different_lengths_see_no_padding():
    made = randomized(projector("qformer", 8, 12, **SMALL))
    each = [torch.randn(n, 8) for n in (3, 6, 3, 1)]
    padded = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=float("nan"))
    with torch.no_grad():
        found = made(padded, lengths=[3, 6, 3, 1])
        assert found.feature_lens.tolist() == [5] * 4 and found[0].isfinite().all()
        alone = torch.cat([made(x[None])[0][0] for x in each])
        torch.testing.assert_close(found[0], alone, rtol=1e-5, atol=1e-5)
        pairs = made(torch.stack([each[0], each[2]]))[0]  # as they are grouped, equal to the bit
        assert torch.equal(found[0].unflatten(0, (4, 5))[[0, 2]], pairs)


def test_sounds_of_different_lengths(tmp_path):
    model, processor = composed("wav2vec2")
    sounds = [tiny.ENCODERS["wav2vec2"][3](i)[: 900 - 200 * i] for i in range(2)]
    both = processor(
        text=["<audio> a", "<audio> b"], audio=sounds, sampling_rate=16_000, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        together = model(**both).audio_outputs.pooler_output
        for i, sound in enumerate(sounds):
            alone = processor(text="<audio>", audio=sound, sampling_rate=16_000, return_tensors="pt")
            torch.testing.assert_close(together[i], model(**alone).audio_outputs.pooler_output[0], rtol=1e-4, atol=1e-5)


# ---- a projector like any other


def test_it_comes_back_by_auto_classes(tmp_path):
    torch.manual_seed(0)
    model, processor = composed()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(inputs["input_ids"], inputs_of(processor)["input_ids"])
    check_comes_back(model, AutoModelForCausalLM.from_pretrained(tmp_path), inputs, max_new_tokens=3, do_sample=False)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_queries_and_tower_and_are_equal_when_checkpointed():
    torch.manual_seed(0)
    model, processor = composed(options=SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    inputs = inputs_of(processor)
    model.train()
    plain = gradients(own_memory(model), inputs)
    model.gradient_checkpointing_enable()
    again = gradients(own_memory(model), inputs)
    assert plain.keys() == again.keys() and all(torch.equal(plain[key], again[key]) for key in plain)
    projected = [key for key in plain if ".projector.projection.q" in key]
    assert len(projected) > 20 and all(plain[key].abs().sum() > 0 for key in projected if "key.bias" not in key)
    assert any(".module." in key for key in plain)
    model.freeze("vision_encoder.projector")
    assert not [key for key in gradients(model, inputs) if ".projector." in key]


def test_in_another_dtype():
    model, processor = composed()
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = inputs_of(processor)
    with torch.no_grad():
        logits, expected = half(**inputs).logits, model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)


def test_lora_inside_the_qformer_trains_and_nothing_else(tmp_path):
    model, processor = composed()
    lora = LoraConfig(target_modules=r".*projector\.projection\.qformer.*\.(query|value)", r=2)
    model = get_peft_model(model, lora)
    found = gradients(model.train(), inputs_of(processor))
    assert found and all("lora_" in key and ".qformer." in key for key in found)


def test_a_step_of_trainer_moves_the_queries(tmp_path):
    model, processor = composed()
    inputs = inputs_of(processor)
    ids = inputs["input_ids"][0]
    row = {key: value[0] for key, value in inputs.items()}
    row["labels"] = ids.masked_fill(ids == model.config.image_token_id, -100)
    queries = model.vision_encoder.projector.projection.query_tokens
    before = queries.detach().clone()
    options = {"max_steps": 1, "report_to": [], "use_cpu": True, "remove_unused_columns": False, "learning_rate": 0.1}
    Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=[row]).train()
    assert not torch.equal(queries.detach(), before)
