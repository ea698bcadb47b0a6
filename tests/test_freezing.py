"""Freezing: names, modes, what a reload restores."""

import copy
import logging

import pytest
import tiny
import torch
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, SwinConfig, SwinModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.fixture
def model():
    return compose_tiny(["clip", "whisper"])[0]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("vision_encoder.module", "language_model"), ("vision_encoder.projector", "audio_encoder")),
        (("*.projector",), ("vision_encoder.module", "audio_encoder.module", "language_model")),
        (("language_model.model.layers.0",), None),
        (("*.k_proj",), None),
    ],
)
def test_freeze_by_names_and_globs_survives_save_and_load(tmp_path, caplog, model, patterns, left):
    assert model.freeze(*patterns) is model
    names = trainable(model)
    assert 0 < len(names) < len(list(model.parameters()))
    if left is not None:
        fixed = {"audio_encoder.module.embed_positions.weight"}  # Whisper's own: sinusoids
        expected = {n for n, _ in model.named_parameters() if n.startswith(left)} - fixed
        assert set(names) == expected
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "cornstarch_hf.modeling_base"):
        again = MultimodalModel.from_pretrained(tmp_path)
    assert trainable(again) == names
    assert sum("frozen" in record.message for record in caplog.records) == 1
    assert len(MultimodalModel.from_pretrained(tmp_path).unfreeze().config.frozen or []) == 0


def test_requires_grad_set_by_hand_survives_too(tmp_path, model):
    model.language_model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    names = trainable(model)
    model.save_pretrained(tmp_path)
    assert trainable(MultimodalModel.from_pretrained(tmp_path)) == names


def test_names_that_are_not_there(model):
    with pytest.raises(ValueError, match=r"'visoin_encoder' names no part.*vision_encoder"):
        model.freeze("visoin_encoder")
    with pytest.raises(ValueError, match="needs names"):
        model.freeze()


def test_frozen_parts_keep_dropout_and_norm_statistics_off():
    model, _ = compose_tiny(["clip"], tiny.gpt2())
    model.vision_encoder.projector.projection.extra = nn.Dropout(0.5)
    model.freeze("language_model")
    assert model.train() is model
    assert model.training and model.vision_encoder.training and model.vision_encoder.module.training
    assert model.vision_encoder.projector.projection.extra.training
    dropouts = [m for m in model.language_model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)
    assert not any(m.training for m in model.language_model.modules() if "Attention" in type(m).__name__)
    assert all(p.requires_grad for p in model.vision_encoder.parameters())
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert model.eval() is model and not any(m.training for m in model.modules())
    model.unfreeze()
    model.train()
    assert all(m.training for m in model.modules())


def test_frozen_layers_that_drop_by_themselves_are_deterministic_under_checkpointing():
    config = OPTConfig(vocab_size=320, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=64, dropout=0.5, attention_dropout=0.5)  # fmt: skip
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=OPTForCausalLM(config))
    model.set_modality_token_ids({"vision": 9})
    ids = torch.tensor([[5, *[9] * 5, 30, 31]])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "labels": ids}
    expected = model.freeze("language_model").eval()(**batch).loss
    model.gradient_checkpointing_enable()
    model.train()
    counted = []
    layers = [m for m in model.language_model.modules() if getattr(m, "gradient_checkpointing", False)]
    layers[-1].fc1.register_forward_hook(lambda *_: counted.append(layers[-1].training))
    loss = model(**batch).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert counted == [False, False], "run once forward and once more for the gradients, without dropout"
    again = copy.deepcopy(model)
    assert torch.equal(again(**batch).loss, expected), "a copy's layers know themselves"
    assert all(layer.training for layer in layers if layer is not model.language_model.model)


def test_adapter_layers_of_a_frozen_base_follow_train():
    lora = get_peft_model(
        tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    )
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=lora).train()
    inside = [m for n, m in model.language_model.named_modules() if n.endswith("lora_dropout.default")]
    assert inside and all(m.training for m in inside)


def test_plain_train_and_eval_never_touch_requires_grad(model):
    model.freeze("audio_encoder.module")
    names = trainable(model)
    for mode in (True, False, True):
        model.train(mode)
    assert trainable(model.eval()) == names


def test_cornstarchs_form(model):
    assert model.train(encoders_mode={"vision": (False, True), "audio": (True, True)}, llm_mode=False) is model
    assert not any(p.requires_grad for p in model.vision_encoder.module.parameters())
    assert all(p.requires_grad for p in model.vision_encoder.projector.parameters())
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert not any(m.training for m in model.language_model.modules() if isinstance(m, nn.Dropout))
    model.train(llm_mode=True)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"\['non_existing'\].*\['vision', 'audio'\]"):
        model.train(encoders_mode={"non_existing": (True, True)})
    with pytest.raises(ValueError, match="encoder trains, projector trains"):
        model.train(encoders_mode={"vision": True})
    with pytest.raises(TypeError):
        model.train({"vision": (True, True)}, True)


def test_no_gradient_is_computed_for_frozen_parts(model):
    model.set_modality_token_ids({"vision": 9})
    model.freeze("vision_encoder.module", "language_model").train()
    ids = torch.tensor([[1, *[9] * 5, 30]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), labels=ids).loss.backward()
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == [f"vision_encoder.projector.projection.{k}" for k in ("weight", "bias")]


def saved_for_backward(model, batch):
    """Bytes of the tensors that a forward pass keeps for the backward pass, weights not counted: all of them, and those
    kept inside the encoder; and the loss."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, inside, encoding = {}, {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            for found in (kept, inside) if encoding else (kept,):
                found[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    module = model.vision_encoder.module
    hooks = [module.register_forward_pre_hook(lambda *_: encoding.append(1)), module.register_forward_hook(lambda *_: encoding.clear())]  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for hook in hooks:
        hook.remove()
    return sum(size for size, _ in kept.values()), sum(size for size, _ in inside.values()), loss


def model_and_batch(adapters=False):
    """A model of an encoder and a language model, with or without LoRA, and a batch of eight."""
    language_model = tiny.llama()
    if adapters:
        language_model = get_peft_model(language_model, LoraConfig(r=2, target_modules=["q_proj"]))
    model, _ = compose_tiny(["clip"], language_model)
    ids = torch.tensor([[1, *[300] * 5, 30]] * 8)
    model.set_modality_token_ids({"vision": 300})
    labels = ids.masked_fill(ids == 300, -100)
    return model, {"input_ids": ids, "pixel_values": torch.randn(8, 3, 8, 8), "labels": labels}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_activations_of_a_frozen_encoder_are_not_held(adapters):
    model, batch = model_and_batch(adapters)
    trained, inside, _ = saved_for_backward(model.train(), batch)
    assert inside > 3 * 8 * 5 * 16 * 4, "each of three layers keeps more than its input (8 x 5 x 16 floats)"
    features = []
    model.vision_encoder.module.register_forward_hook(lambda _, __, out: features.append(out.last_hidden_state))
    model.freeze("vision_encoder.module")
    frozen, inside, loss = saved_for_backward(model.train(), batch)
    assert inside == 0 and not features[0].requires_grad
    assert frozen < trained
    loss.backward()
    assert not any(p.grad is not None for p in model.vision_encoder.module.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_projectors_of_frozen_encoders_train_under_checkpointing(reentrant):
    model, batch = model_and_batch()
    model.freeze("vision_encoder.module", "language_model").train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train().zero_grad()
        model(**batch).loss.backward()
        found.append(model.vision_encoder.projector.projection.weight.grad.clone())
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["projector", "lora"])
def test_a_frozen_language_model_still_checkpoints(adapters):
    model, batch = model_and_batch(adapters)
    model.freeze("vision_encoder.module", *(() if adapters else ("language_model",))).train()
    plain, _, _ = saved_for_backward(model, batch)
    model.gradient_checkpointing_enable()
    runs = []
    for layer in model.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    checkpointed, _, loss = saved_for_backward(model.train(), batch)
    assert checkpointed < 0.5 * plain and len(runs) == 2
    loss.backward()
    assert len(runs) == 4, "each layer ran once more for the gradients"


@pytest.mark.parametrize("reentrant", [False, True])
def test_towers_whose_embeddings_give_several_tensors_train_under_checkpointing(reentrant):
    config = SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4)
    torch.manual_seed(0)
    encoder = ModalEncoderModule(SwinModel(config))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).train()
    model.set_modality_token_ids({"vision": 300})
    ids = torch.tensor([[5, *[300] * 16, 6, 7]])
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == 300, -100), "pixel_values": torch.randn(1, 3, 32, 32)}

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)  # of stochastic depth
        model(**inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
    model.disable_input_require_grads()
    assert not model.vision_encoder.module.get_input_embeddings()._forward_hooks


def test_layers_that_shorten_are_never_skipped_in_training():
    torch.manual_seed(0)
    module = tiny.wav2vec2(add_adapter=True, num_adapter_layers=2, layerdrop=1.0)
    encoder = ModalEncoderModule(module)
    model = MultimodalModel(encoders={"audio": encoder}, language_model=tiny.llama())
    sound = {"input_values": torch.randn(1, 900)}
    expected = [len(x) for x in model.eval().audio_encoder(**sound).pooler_output]
    model.train()
    assert [len(x) for x in model.audio_encoder(**sound).pooler_output] == expected
    assert not module.adapter.training and all(layer.training for layer in module.adapter.layers)
    assert module.encoder.training, "whole layers of the encoder may be skipped: they keep the length"
