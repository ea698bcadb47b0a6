"""Steps in which an encoder has no item: it runs where that is needed, and nothing else can tell."""

import copy

import catalog_llms
import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import ResNetConfig, ResNetModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.encoders import stand_ins

CHECKPOINTING = {"none": None, "not reentrant": False, "reentrant": True}


def resnet():
    torch.manual_seed(0)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3))


def with_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model


def build(key, llm="llama", **options):
    if key == "resnet":
        model = MultimodalModel(
            encoders={"vision": ModalEncoderModule(resnet())}, language_model=catalog_llms.build(llm)
        )
        model.set_modality_token_ids({"vision": 5})
    else:
        model, _ = compose_tiny([key], catalog_llms.build(llm), **options)
    return with_dropout(model.train())


def step(model, checkpointing=None):
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    ids = torch.tensor([[6, 7, 8, 9], [9, 8, 7, 6]])
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output, torch.rand(2)


def needed(monkeypatch):
    monkeypatch.setattr(stand_ins, "together", lambda: True)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("key", [*tiny.ENCODERS, "resnet"])
def test_nothing_else_can_tell(key, checkpointing, monkeypatch):
    alone = build(key)
    beside = copy.deepcopy(alone)
    modes = [module.training for module in beside.modules()]
    before = {name: buffer.clone() for name, buffer in beside.named_buffers()}
    expected, drawn = step(alone, checkpointing)
    needed(monkeypatch)
    output, then = step(beside, checkpointing)
    assert torch.equal(output.loss, expected.loss) and torch.equal(then, drawn)
    if expected.logits is not None:
        assert torch.equal(output.logits, expected.logits)
    found = dict(beside.named_parameters())
    for name, parameter in alone.named_parameters():
        if name.startswith("language_model."):
            assert torch.equal(found[name].grad, parameter.grad), name
        else:
            assert parameter.grad is None and (found[name].grad is None or not found[name].grad.any()), name
    assert all(p.grad is not None for p in next(iter(beside.encoders.values())).projector.parameters())
    assert any(p.grad is not None for p in next(iter(beside.encoders.values())).module.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in beside.named_buffers())
    assert [module.training for module in beside.modules()] == modes


@pytest.mark.parametrize("llm", ["llama", "opt", "gemma3n_text", "bloom", "gpt2", "mamba2"])
def test_language_models_get_embeddings_that_are_equal(llm, monkeypatch):
    alone = build("clip", llm)
    beside = copy.deepcopy(alone)
    expected, _ = step(alone)
    needed(monkeypatch)
    output, _ = step(beside)
    assert torch.equal(output.loss, expected.loss)


def test_projectors_alone_train_on_text():
    model = build("clip")
    model.requires_grad_(False)
    model.vision_encoder.projector.requires_grad_(True)
    calls = []
    model.vision_encoder.register_forward_hook(lambda *args: calls.append(1))
    step(model)
    assert len(calls) == 1 and all(not p.grad.any() for p in model.vision_encoder.projector.parameters())
    model.eval()
    assert not model(input_ids=torch.tensor([[6, 7]])).logits.requires_grad and len(calls) == 1  # as ever


def test_off_where_it_is_not_needed():
    model = build("clip")
    calls = []
    model.vision_encoder.register_forward_hook(lambda *args: calls.append(1))
    step(model)  # the language model trains
    assert not calls
    embeds = torch.randn(1, 3, model.config.text_config.hidden_size, requires_grad=True)
    model.language_model.requires_grad_(False)
    model(inputs_embeds=embeds).logits.sum().backward()  # its gradient comes from elsewhere
    assert not calls and embeds.grad is not None


def test_an_encoder_with_an_item_needs_no_stand_in_and_others_do(monkeypatch):
    model, processor = compose_tiny(["clip", "whisper"])
    inputs = processor(text="<image> a", images=tiny.image(), return_tensors="pt")
    expected = model(**inputs).logits
    needed(monkeypatch)
    calls = []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *args, name=name: calls.append(name))
    assert torch.equal(model.train()(**inputs).logits, expected) and calls == ["vision", "audio"]
    calls.clear()
    with torch.no_grad():
        model(**inputs)
    assert calls == ["vision"]


@pytest.mark.parametrize("projector", ["pixel_shuffle", "resampler", "avg_pool", "conv", "frame_stack", "mlp"])
def test_projectors_that_reduce(projector, monkeypatch):
    key = "whisper" if projector == "frame_stack" else "siglip"
    model, _ = compose_tiny([key], projector=projector)
    needed(monkeypatch)
    step(model.train())
    encoder = next(iter(model.encoders.values()))
    assert all(p.grad is not None and not p.grad.any() for p in encoder.projector.parameters())


def needs_more(inputs):
    return {key: value * inputs["scale"].sum() if key == "pixel_values" else value for key, value in inputs.items()}


def test_callbacks_with_inputs_of_their_own_are_told_what_to_do(monkeypatch):
    encoder = ModalEncoderModule(tiny.clip(), additional_args=["scale"], preprocess_callback=needs_more)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).train()
    model.set_modality_token_ids({"vision": 5})
    needed(monkeypatch)
    with pytest.raises(
        ValueError, match=r"vision: there is no item for it in this step.*model.vision_encoder.stand_in"
    ):
        step(model)
    model.vision_encoder.stand_in = {"pixel_values": torch.zeros(1, 3, 8, 8), "scale": torch.ones(1)}
    step(model)
    assert not model.vision_encoder.projector.projection.weight.grad.any()


def test_batch_norms_of_several_processes_are_refused(monkeypatch):
    model = build("resnet")
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    needed(monkeypatch)
    with pytest.raises(ValueError, match="vision: its batch norms would count what stands in"):
        step(model)


def test_gradients_that_are_not_finite_do_not_come_back():
    embeddings = torch.ones(2, requires_grad=True)
    features = torch.full((2,), float("inf"), requires_grad=True)
    from cornstarch_hf.language_model.merging import with_unused

    joined = with_unused(embeddings, [features, torch.ones(3)])
    assert torch.equal(joined, embeddings)
    (joined * 2).sum().backward()
    assert torch.equal(features.grad, torch.zeros(2)) and torch.equal(embeddings.grad, torch.full((2,), 2.0))
