"""Frozen parts in training: nothing of them drops, and their layers checkpoint where gradients flow through them."""

import copy
import functools
import json
import pickle

import catalog
import catalog_llms
import pytest
import tiny
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from dropping import LayerRuns, drop_everywhere
from helpers import compose_tiny
from peft import LoHaConfig, LoraConfig, PromptTuningConfig, get_peft_model
from shrunk import built
from torch import nn
from torch.utils.checkpoint import checkpoint
from trainers import losses, rows, trainer
from transformers import OPTConfig, OPTForCausalLM, SwinConfig, SwinModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.parts.frozen_modes import checkpoint_frozen_layers, keep_frozen_in_eval

# One of each way to drop: skipped layers and masked sounds, functional dropout, paths, norm statistics, attention.
ENCODERS = ["Wav2Vec2Model", "Data2VecAudioModel", "WhisperEncoder", "SwinModel", "ResNetModel", "BertModel"]
# The same of language models: skipped layers, functional dropout, routers that draw (one a linear layer), running states.
LANGUAGE_MODELS = ["opt", "biogpt", "xglm", "phimoe", "mixtral", "dbrx", "bloom", "mamba2", "zamba2"]
# In which order a model is told to train, to checkpoint and what is frozen.
ORDERS = {
    "freeze, checkpoint, train": lambda m, f: (f(m), m.gradient_checkpointing_enable(), m.train()),
    "freeze, train, checkpoint": lambda m, f: (f(m), m.train(), m.gradient_checkpointing_enable()),
    "checkpoint, train, freeze": lambda m, f: (m.gradient_checkpointing_enable(), m.train(), f(m)),
    "checkpoint, freeze, eval, train": lambda m, f: (m.gradient_checkpointing_enable(), f(m), m.eval(), m.train()),
    "a part checkpoints, train": lambda m, f: (f(m), m.language_model.gradient_checkpointing_enable(), m.train()),
    "twice": lambda m, f: [(m.gradient_checkpointing_enable(), f(m), m.train()) for _ in range(2)],
    "reentrant before": lambda m, f: (m.gradient_checkpointing_enable({"use_reentrant": True}), f(m), m.train(),
                                      m.gradient_checkpointing_enable({"use_reentrant": False})),
}  # fmt: skip


def opt(**changes):
    """OPT, which drops in its layers by functions and skips whole ones."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=320, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    drop_everywhere(config, 0.5)
    for key, value in changes.items():
        setattr(config, key, value)
    return OPTForCausalLM(config)


def dropping(language_model=None):
    """A model of CLIP and a language model that drops, and a batch."""
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=language_model or opt()
    )
    model.set_modality_token_ids({"vision": 9})
    ids = torch.tensor([[5, *[9] * 5, 30, 31]])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 8, 8, generator=generator)
    return model, {"input_ids": ids, "pixel_values": images, "labels": ids.masked_fill(ids == 9, -100)}


def freeze_language_model(model):
    model.freeze("language_model")


def recomputed(model, batch):
    """The loss, and the language model's layers that compute again for its gradients."""
    with LayerRuns(model.language_model) as runs:
        loss = model(**batch).loss
        again = runs.again(loss.backward)
    return loss, again


def layers_of(model):
    return {name for name, m in model.language_model.named_modules() if isinstance(m, GradientCheckpointingLayer)}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "not reentrant", "reentrant"])
@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_encoders_give_what_they_give_in_evaluation(name, checkpointing):
    case = catalog.cases()[name]
    torch.manual_seed(0)
    module = built(catalog.found_class(name, case.folder), drop_everywhere(catalog.config_of(name)), **case.options)
    encoder = ModalEncoderModule(module, kind=case.kind, **case.module_kwargs)
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama())
    inputs = catalog.joined(name, catalog.together(name))
    run = lambda: torch.cat(list(model.media_encoder(**inputs).pooler_output))  # noqa: E731
    torch.manual_seed(0)
    assert not torch.equal(model.train() and run(), model.eval() and run()), "this class drops where it trains"
    expected = model.freeze("media_encoder.module").eval() and run()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    buffers = [b.clone() for b in module.buffers()]
    model.train()
    for _ in range(3):
        assert torch.equal(run(), expected)
    assert all(map(torch.equal, module.buffers(), buffers)), "norm statistics stay"


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_frozen_language_models_give_what_they_give_in_evaluation(model_type):
    language_model = built(
        catalog_llms.model_class(model_type), drop_everywhere(catalog_llms.configuration(model_type))
    )
    model, batch = dropping(language_model)
    model.freeze("language_model")
    expected = model.eval()(**batch, use_cache=False).loss
    assert torch.equal(model.train()(**batch, use_cache=False).loss, expected)
    model.gradient_checkpointing_enable()
    loss, again = recomputed(model.train(), batch)
    assert torch.equal(loss, expected) and again == layers_of(model)
    with torch.no_grad():
        without = model.eval()(**batch, use_cache=False).loss
        assert torch.equal(model.train()(**batch, use_cache=False).loss, without), (
            "without gradients nothing drops either"
        )


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_calls_does_not_matter(order):
    model, batch = dropping()
    expected = model.eval()(**batch).loss
    ORDERS[order](model, freeze_language_model)
    loss, again = recomputed(model, batch)
    assert torch.equal(loss, expected) and again == layers_of(model)
    model.gradient_checkpointing_disable()
    loss, again = recomputed(model, batch)
    assert torch.equal(loss, expected) and not again
    model.gradient_checkpointing_enable()
    model.unfreeze()
    assert all(m.training for m in model.language_model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    torch.manual_seed(0)
    assert not torch.equal(model(**batch).loss, expected), "what trains drops"
    model.freeze("language_model")
    assert torch.equal(model(**batch).loss, expected)
    model.eval()
    assert not any("forward" in m.__dict__ or m.training for m in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_copies_checkpoint_their_own_layers(copied, reentrant):
    model, batch = dropping()
    expected = model.eval()(**batch).loss
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    freeze_language_model(model.train())
    again = copied(model)
    with LayerRuns(model.language_model) as runs:
        loss, layers = recomputed(again, batch)
        assert not runs.calls, "the original does nothing"
    assert torch.equal(loss, expected) and layers == layers_of(model)


def test_a_checkpoint_holds_the_rates_that_the_parts_came_with(tmp_path):
    model, _ = dropping(opt(layerdrop=0.25, dropout=0.125))
    keys = set(model.state_dict())
    freeze_language_model(model)
    model.gradient_checkpointing_enable()
    model.train().save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert (text["layerdrop"], text["dropout"], text["attention_dropout"]) == (0.25, 0.125, 0.5)
    assert set(model.state_dict()) == keys and model.language_model.model.decoder.layerdrop == 0.25


def test_what_has_been_compiled_stays_valid_from_step_to_step():
    model, _ = dropping()
    freeze_language_model(model)
    model.gradient_checkpointing_enable()
    before = [m.__dict__.get("forward") for m in model.train().modules()]
    assert sum(forward is not None for forward in before) == 2
    assert all(
        a is b for a, b in zip(before, [m.__dict__.get("forward") for m in model.train().modules()], strict=True)
    )


@pytest.mark.parametrize("every", [1, 2])
def test_every_nth_layer_may_checkpoint(every):
    model, batch = dropping()
    freeze_language_model(model)
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False), every_n_layers=every)
    _, again = recomputed(model.train(), batch)
    # The layers of the vision encoder are counted first: they are three.
    assert again == {name for name in layers_of(model) if every == 1 or name.endswith("1")}


# ---- what is frozen in part


def test_a_list_of_layers_some_of_which_are_frozen_skips_none():
    model, batch = dropping(opt(dropout=0.0, attention_dropout=0.0))
    expected = model.eval()(**batch).loss
    model.freeze("language_model.model.decoder.layers.0").gradient_checkpointing_enable()
    decoder = model.train().language_model.model.decoder
    assert not decoder.training and not decoder.layers[0].training and decoder.layers[1].training
    for _ in range(3):
        loss, again = recomputed(model, batch)
        assert torch.equal(loss, expected) and again == layers_of(model)
    assert decoder.layers[1].fc1.weight.grad.any() and decoder.layers[0].fc1.weight.grad is None


def test_layers_stay_frozen_where_the_embeddings_around_them_train():
    model, batch = dropping()
    model.freeze("language_model").unfreeze("language_model.model.decoder.embed_tokens").gradient_checkpointing_enable()
    expected = model.eval()(**batch).loss
    loss, again = recomputed(model.train(), batch)
    assert torch.equal(loss, expected) and again == layers_of(model)
    assert model.get_input_embeddings().weight.grad.any()


def adapted(config, whole=False):
    """A dropping model with adapters in or around its language model, and a batch."""
    if whole:
        model, batch = dropping()
        return model, get_peft_model(model, config), batch
    model, batch = dropping(get_peft_model(opt(), config))
    return model, model, batch


@pytest.mark.parametrize("whole", [False, True], ids=["part", "whole"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "not reentrant", "reentrant"])
def test_adapters_follow_train_and_what_they_wrap_does_not(whole, checkpointing):
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["projector"] if whole else None)
    model, outer, batch = adapted(config, whole)
    outer.eval()
    expected = model(**batch).loss
    if checkpointing is not None:
        outer.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    outer.train()
    loss, again = recomputed(outer, batch) if not whole else recomputed(model, batch)
    assert torch.equal(loss, expected), "adapters add nothing at first"
    assert bool(again) == (checkpointing is not None)
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n and "language_model" in n]
    assert adapters and all(p.grad.any() for p in adapters)
    decoder = model.get_decoder()
    assert not any(m.training for m in (decoder, *decoder.layers, decoder.layers[0].self_attn))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "fc1"], lora_dropout=0.5, init_lora_weights=False),
        LoraConfig(r=2, target_modules=["fc1"], lora_dropout=0.5, use_dora=True, init_lora_weights=False),
        LoHaConfig(r=2, target_modules=["fc1"], rank_dropout=0.5, init_weights=False),
    ],
    ids=["lora", "dora", "loha"],
)
def test_what_adapters_drop_is_dropped(config):
    model, _, batch = adapted(config)
    expected = model.eval()(**batch).loss
    torch.manual_seed(0)
    assert not torch.equal(model.train()(**batch).loss, expected)
    model.freeze("language_model")
    assert torch.equal(model(**batch).loss, expected), "adapters that are frozen drop nothing"


def test_a_copy_kept_by_an_adapter_configuration_trains():
    model, _, batch = adapted(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["fc1"]))
    model.gradient_checkpointing_enable()
    _, again = recomputed(model.train(), batch)
    wrapper = model.get_decoder().layers[0].fc1
    assert wrapper.modules_to_save["default"].training and not wrapper.original_module.training
    assert wrapper.modules_to_save["default"].weight.grad.any() and again == layers_of(model)


def test_prompts_train_before_a_frozen_language_model():
    model, batch = dropping()
    outer = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32, num_layers=2, num_attention_heads=4))  # fmt: skip
    expected = outer.eval()(**batch).loss
    model.gradient_checkpointing_enable()
    outer.train()
    with LayerRuns(model.language_model) as runs:
        loss = outer(**batch).loss
        assert runs.again(loss.backward) == layers_of(model)
    assert torch.equal(loss, expected)
    assert all(p.grad.any() for p in outer.prompt_encoder.parameters())


# ---- what comes before, and what is around


class Before(nn.Module):
    """A callback that learns, with dropout of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        return inputs | {"pixel_values": self.dropout(inputs["pixel_values"] * self.scale)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_encoder_checkpoints_where_something_before_it_trains(reentrant):
    encoder = ModalEncoderModule(tiny.clip(), preprocess_callback=Before())
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    model.freeze("vision_encoder.module").gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.train().vision_encoder.preprocess_callback.dropout.training
    images = torch.randn(2, 3, 8, 8)
    with LayerRuns(encoder.module) as runs:
        found = torch.cat(list(encoder(pixel_values=images).pooler_output))
        assert len(runs.again(found.square().sum().backward)) == 3
    assert encoder.preprocess_callback.scale.grad.any()
    model.freeze("vision_encoder.preprocess_callback")
    assert not model.vision_encoder.preprocess_callback.dropout.training
    with LayerRuns(encoder.module) as runs:
        found = torch.cat(list(encoder(pixel_values=images).pooler_output))
        assert not runs.again(found.square().sum().backward), "no gradient flows back through it"


def test_caches():
    model, batch = dropping()
    freeze_language_model(model)
    assert model.train()(**batch).past_key_values is not None
    model.gradient_checkpointing_enable()
    assert model(**batch).past_key_values is None and model.base_model(**batch).past_key_values is None
    assert model(**batch, use_cache=True).past_key_values is None
    with torch.no_grad():
        cache = model(**batch).past_key_values
    assert cache.get_seq_length() == 8
    step = {"input_ids": torch.tensor([[6]]), "labels": torch.tensor([[6]]), "attention_mask": torch.ones(1, 9)}
    expected = model.eval()(**step, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    with LayerRuns(model.language_model) as runs:
        output = model.train()(**step, past_key_values=cache, use_cache=True)
    assert torch.equal(output.logits, expected) and cache.get_seq_length() == 9, (
        "a cache that is given is read and written"
    )
    assert set(runs.calls.values()) == {1}
    tokens = [m.generate(batch["input_ids"], pixel_values=batch["pixel_values"], max_new_tokens=4, do_sample=False)
              for m in (model.eval(), model.train())]  # fmt: skip
    assert torch.equal(*tokens)


class Plain(nn.Module):
    """A layer that knows nothing of checkpointing, and drops by itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states, scale=None):
        return (nn.functional.dropout(self.linear(hidden_states), 0.5, self.training) * scale,)


class Looping(nn.Module):
    """Layers in a loop that checkpoints and skips by itself, as models from outside transformers do."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(Plain() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            if self.training and torch.rand(()) < 0.5:
                continue
            if self.gradient_checkpointing and self.training:
                (x,) = self._gradient_checkpointing_func(layer.__call__, x, x)
            else:
                (x,) = layer(x, scale=x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_in_a_loop_that_checkpoints_by_itself_do_so_in_evaluation_mode(reentrant):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4), Looping())
    looping = whole[1].requires_grad_(False)
    looping.gradient_checkpointing = True
    looping._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    x, runs, found = torch.randn(3, 4), [], []
    looping.layers[0].linear.register_forward_hook(lambda *_: runs.append(1))
    for mode in (False, True):
        whole.train(mode).zero_grad()
        if mode:
            keep_frozen_in_eval({"part": whole})
        checkpoint_frozen_layers(whole)
        output = whole(x)
        output.sum().backward()
        found.append((output, whole[0].weight.grad.clone()))
    assert len(runs) == 1 + 2 and not looping.training
    assert all(map(torch.equal, *found))


def test_a_forward_that_a_layer_had_already_is_kept():
    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    seen = []
    model, batch = dropping()
    freeze_language_model(model)
    expected = model.eval()(**batch).loss
    layer = model.language_model.model.decoder.layers[0]
    add_hook_to_module(layer, Counting())
    hooked = layer.__dict__["forward"]
    model.gradient_checkpointing_enable()
    loss, again = recomputed(model.train(), batch)
    assert torch.equal(loss, expected) and again == layers_of(model) and len(seen) == 2
    assert model.eval() and layer.__dict__["forward"] is hooked
    remove_hook_from_module(layer)
    assert torch.equal(model.train()(**batch).loss, expected)


def test_quantized_linear_layers_keep_their_mode():
    part = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    part[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    keep_frozen_in_eval({"part": part.train()})
    assert [m.training for m in part] == [False, True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_meets_a_frozen_language_model_without_dropout(checkpointing, tmp_path):
    found = []
    for seed in (1, 2):
        model, processor = compose_tiny(["clip", "whisper"], opt())
        model.freeze("language_model", "vision_encoder.module")
        made = trainer(
            model, processor, tmp_path, rows(4), gradient_checkpointing=checkpointing, seed=seed, data_seed=7
        )
        made.train()
        found.append(losses(made))
    assert found[0] == found[1] and len(found[0]) == 2


# ---- memory and gradients


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
