"""The encoder without weights: features from elsewhere go to the projector as they are."""

import numpy as np
import pytest
import tiny
import torch
from helpers import run_python
from own_memory import own_memory, weights
from trainers import losses, trainer
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    PrecomputedFeatures,
    PrecomputedFeaturesConfig,
    PrecomputedFeaturesProcessor,
    compose,
)
from cornstarch_hf.encoders import counting as feature_counts

WIDTH = 6
LOAD = """
import sys, torch
from own_memory import own_memory, weights
from transformers import AutoModel, AutoProcessor
folder, code = sys.argv[1], sys.argv[2] == "code"
options = {"trust_remote_code": True} if code else {}
if not code:
    import cornstarch_hf
model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
processor = AutoProcessor.from_pretrained(folder, **options)
assert not any(info.values()) and code != ("cornstarch_hf" in sys.modules)
text, items = torch.load(folder + "/items.pt", weights_only=False)
inputs = processor(text=text, scene=items, padding=True, return_tensors="pt")
bits, model, inputs = weights(model), own_memory(model), own_memory(dict(inputs))
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
torch.save((bits, inputs, model(**inputs).logits, tokens), folder + "/found.pt")
"""


def vectors(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def made(**options):
    torch.manual_seed(0)
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))
    return compose(tiny.llama(), {"scene": encoder}, tokenizer=tiny.tokenizer(), **options)


def test_features_reach_the_projector_as_they_are_and_are_counted_without_a_run(monkeypatch):
    def refused(*args):
        raise AssertionError("a dry run")

    monkeypatch.setattr(feature_counts, "dry_run", refused)
    model, processor = made()
    assert not list(model.scene_encoder.module.parameters())
    items = [vectors(3), vectors(1, 1), vectors(7, 2)]
    inputs = processor(
        text=["<scene> a <scene>", "<scene>"], scene=[items[:2], items[2:]], padding=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.scene_modality["token_id"]).sum(-1).tolist() == [4, 7]
    assert inputs["features"].shape == (3, 7, WIDTH) and inputs["scene_attention_mask"].sum(-1).tolist() == [3, 1, 7]
    seen = []
    model.scene_encoder.projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    encoded = model.scene_encoder(features=inputs["features"], attention_mask=inputs["scene_attention_mask"])
    assert torch.equal(seen[0], inputs["features"])
    for item, found in zip(items, encoded.pooler_output, strict=True):
        assert found.shape == (len(item), 32)
        alone = model.scene_encoder(features=torch.tensor(item)[None]).pooler_output[0]
        torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
    model(**inputs)


@pytest.mark.slow
@pytest.mark.parametrize("code", [False, True], ids=["package", "code"])
def test_round_trip_in_a_fresh_process(tmp_path, code):
    model, processor = made(projector="mlp", freeze=["scene_encoder.module", "language_model"])
    model.save_pretrained(tmp_path, include_code=code)
    processor.save_pretrained(tmp_path, include_code=code)
    text, items = ["<scene> a", "<scene>"], [[vectors(2)], [vectors(5, 1)]]
    torch.save((text, items), tmp_path / "items.pt")
    run_python(LOAD, str(tmp_path), "code" if code else "package", cwd=tmp_path)
    bits, inputs, logits, tokens = torch.load(tmp_path / "found.pt", weights_only=False)
    expected = own_memory(dict(processor(text=text, scene=items, padding=True, return_tensors="pt")))
    assert bits == weights(own_memory(model))
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    assert torch.equal(model(**expected).logits, logits)
    assert torch.equal(model.generate(**expected, max_new_tokens=4, do_sample=False), tokens)


def test_the_projector_trains(tmp_path):
    model, processor = made(freeze=["language_model"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [{"prompt": "a <scene> ", "completion": f" is {i}", "scene": [vectors(1 + i, i)]} for i in range(4)]
    run = trainer(model, processor, tmp_path, rows, eval_strategy="no")
    run.train()
    assert all(np.isfinite(losses(run)))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("scene_encoder.projector")} and moved


def test_encoder_and_processor_alone_are_saved_and_found_by_the_auto_classes(tmp_path):
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))
    encoder.save_pretrained(tmp_path)
    PrecomputedFeaturesProcessor(feature_size=WIDTH).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).feature_size == WIDTH
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is PrecomputedFeatures and again.config.hidden_size == WIDTH and not any(info.values())
    assert AutoFeatureExtractor.from_pretrained(tmp_path).feature_size == WIDTH
    model, processor = compose(tiny.llama(), {"scene": str(tmp_path)}, tokenizer=tiny.tokenizer())
    model(**processor(text="<scene>", scene=vectors(2), return_tensors="pt"))
    assert model.scene_encoder.kind == "features"


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "6"])
def test_sizes(size):
    with pytest.raises(ValueError, match=f"feature_size must be a positive integer, got {size!r}"):
        PrecomputedFeaturesConfig(feature_size=size)
    with pytest.raises(ValueError, match="feature_size must be a positive integer"):
        PrecomputedFeaturesProcessor(feature_size=size)
    with pytest.raises(ValueError, match="needs the width of the features"):
        PrecomputedFeatures(PrecomputedFeaturesConfig())


def test_tensors_that_do_not_fit():
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))
    features = torch.zeros(2, 3, WIDTH)
    assert encoder(features, return_dict=False)[0] is features and encoder.dtype == torch.float32
    for wrong in (features[..., :2], features[0]):
        with pytest.raises(ValueError, match=rf"\(items, most features, 6\), got \({str(tuple(wrong.shape))[1:-1]}\)"):
            encoder(wrong)
    with pytest.raises(ValueError, match=r"must be \(2, 3\), got \(2, 2\)"):
        encoder(features, attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="zeros before ones"):
        encoder(features, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with pytest.raises(ValueError, match="projector.*in_features.*expected|width 6"):
        MultimodalModel({"scene": ModalEncoderModule(encoder, projector_of_width(5))}, tiny.llama())


def projector_of_width(width):
    from cornstarch_hf import MultimodalProjector, MultimodalProjectorConfig

    return MultimodalProjector(MultimodalProjectorConfig(in_features=width))


@pytest.mark.parametrize("name", ["audio", "image", "video", "scene"])
def test_an_encoder_of_the_name_of_a_kind_gives_its_features(name):
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))
    model, processor = compose(tiny.llama(), {name: encoder}, tokenizer=tiny.tokenizer())
    get = getattr(model, f"get_{name}_features", None)
    assert (get is None) == (name == "scene")
    if get is not None:
        inputs = processor(
            text=f"<{name}>", **{name if name == "audio" else f"{name}s": vectors(3)}, return_tensors="pt"
        )
        keywords = {key: inputs[key] for key in model.config.modality(name)["input_names"]}
        assert torch.equal(
            get(**keywords).pooler_output[0], model.encoders[name](features=inputs["features"]).pooler_output[0]
        )
