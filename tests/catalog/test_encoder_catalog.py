"""Every measured encoder class of transformers, tiny: composes, counts, encodes, generates, trains and comes back the same."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import Mock

import catalog
import catalog_others
import catalog_vision
import pytest
import tiny
import torch
from datasets.fingerprint import Hasher
from own_memory import check_comes_back
from shrunk import built
from transformers import AutoModel

from cornstarch_hf import ModalEncoderModule, MultimodalCollator, MultimodalModel, MultimodalProcessor
from cornstarch_hf.encoders import counting as feature_counts
from cornstarch_hf.encoders.counting import FeatureCounter

CASES = {**catalog_vision.CASES, **catalog_others.CASES}
# Classes whose configuration lists the layers of each stage.
STAGED = (
    *(
        "BitModel",
        "ClapAudioModel",
        "ConvNextModel",
        "ConvNextV2Model",
        "DINOv3ConvNextModel",
        "DonutSwinModel",
        "GLPNModel",
    ),
    *(
        "GroupViTVisionModel",
        "HieraModel",
        "LevitModel",
        "MaskFormerSwinModel",
        "PoolFormerModel",
        "PvtModel",
        "PvtV2Model",
    ),
    *("ResNetModel", "SegformerModel", "SwiftFormerModel", "SwinModel", "Swin2SRModel", "Swinv2Model"),
)
TOKEN = tiny.VOCABULARY - 1
pytestmark = pytest.mark.catalog


def composed(name):
    case = CASES[name]
    encoder = ModalEncoderModule(catalog.build(name), kind=case.kind, **case.module_kwargs)
    torch.manual_seed(3)
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama()).eval()
    model.set_modality_token_ids({"media": TOKEN})
    return model


def wired(model, inputs):
    """Inputs by the names of the whole model's `forward`."""
    names = model.config.modality("media")["input_names"]
    return {name: inputs[key] for name, key in names.items() if key in inputs}


def text(counts):
    """One row of ids per item, padded on the left."""
    length = max(counts) + 3
    ids = torch.zeros(len(counts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(counts):
        ids[row, length - count - 3 :] = torch.tensor([5, *[TOKEN] * count, 6, 7])
        mask[row, length - count - 3 :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def test_the_catalogue_has_every_measured_class():
    assert len(CASES) == 199 and len(catalog_others.NO_FEATURES) <= 6


@pytest.mark.parametrize("name", catalog.here(set(CASES) - set(catalog_others.NO_FEATURES)))
def test_a_class_composes_counts_encodes_generates_trains_and_comes_back(name, tmp_path, record_property, monkeypatch):
    model = composed(name)
    run = Mock(side_effect=feature_counts.dry_run)
    monkeypatch.setattr(feature_counts, "dry_run", run)
    model_type = model.config.media_config.model_type
    record_property("type", model_type)
    record_property("kind", model.media_encoder.kind)
    items = catalog.together(name)
    counter = FeatureCounter(model.config)
    with torch.no_grad():
        alone = [model.media_encoder(**item).pooler_output for item in items]
        together = model.media_encoder(**catalog.joined(name, items)).pooler_output
    assert [len(features) for features in alone] == [1] * len(items)
    counts = [len(features[0]) for features in alone]
    assert [counter.count("media", item) for item in items] == counts
    odd = catalog.item(name, 1)
    with torch.no_grad():
        assert counter.count("media", odd) == len(model.media_encoder(**odd).pooler_output[0])
    record_property("count", "dry run" if run.called else "rule")
    assert [len(features) for features in together] == counts
    for one, (expected,) in zip(together, alone, strict=True):
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-3)
    inputs = text(counts) | wired(model, catalog.joined(name, items))
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert tokens.shape == (len(items), inputs["input_ids"].shape[1] + 2)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    check_comes_back(model, loaded, inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels.masked_fill(labels == TOKEN, -100)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.media_encoder.projector.parameters())


@pytest.fixture(scope="module")
def other_process():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def called(pickled, item):
    """What the processor of a pickled collator counts for an item, and makes of a text."""
    processor = pickle.loads(pickled).processor
    return processor.counter.count("media", item), processor(text="a b")["input_ids"]


@pytest.mark.parametrize("name", catalog.here(set(CASES) - set(catalog_others.NO_FEATURES)))
def test_a_collator_carries_no_weights_and_works_in_another_process(name, other_process):
    processor = MultimodalProcessor(tiny.tokenizer(), {}, model=composed(name))
    pickled, item = pickle.dumps(MultimodalCollator(processor)), catalog.item(name, 0)
    before = Hasher.hash(processor)
    assert len(pickled) < 200_000
    expected = processor.counter.count("media", item), processor(text="a b")["input_ids"]
    assert other_process.submit(called, pickled, item).result() == expected and Hasher.hash(processor) == before
    assert len(pickle.dumps(MultimodalCollator(processor))) < 200_000


@pytest.mark.parametrize("name", STAGED)
def test_one_layer_of_each_stage_counts_as_all_of_them(name):
    case, config = CASES[name], copy.deepcopy(catalog.build(name).config)
    config.depths = type(config.depths)(2 + i for i in range(len(config.depths)))
    encoder = ModalEncoderModule(built(type(catalog.build(name)), config), kind=case.kind, **case.module_kwargs)
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama()).eval()
    counter = FeatureCounter(model.config)
    for item in catalog.together(name):
        with torch.no_grad():
            assert counter.count("media", item) == len(model.media_encoder(**item).pooler_output[0])
    probed = {key: tuple(probe.module.config.depths) for key, probe in counter._probes.items()}
    assert probed == {("media", True): (1,) * len(config.depths)}


@pytest.mark.parametrize("name", catalog.here(catalog_others.NO_FEATURES))
def test_a_class_without_features_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name} gives no features but (codes|sounds).*: take "):
        composed(name)
