"""Processors of this package: features computed elsewhere and time series, checked, padded, described."""

import json

import numpy as np
import pytest
import tiny
import torch
from own_memory import check_comes_back
from shrunk import built, shrunk
from trainers import losses, trainer
from transformers import (
    AutoModel,
    AutoProcessor,
    PatchTSMixerConfig,
    PatchTSMixerModel,
    PatchTSTConfig,
    PatchTSTModel,
    TimesFm2_5Config,
    TimesFm2_5Model,
    TimesFmConfig,
    TimesFmModel,
)

from cornstarch_hf import MultimodalCollator, PrecomputedFeaturesProcessor, TimeSeriesProcessor, compose
from cornstarch_hf.encoders import counting as feature_counts
from cornstarch_hf.processing.media import flatten
from cornstarch_hf.processing.own_processors import ItemProcessor, default_processor
from cornstarch_hf.processing.stored_processors import build_subprocessor, describe_subprocessor
from cornstarch_hf.processing.subprocessors import run_subprocessor

PATCH = 8
FIXED = {"context_length": 16, "patch_length": PATCH, "patch_stride": PATCH, "num_input_channels": 3}
ENCODERS = {
    "timesfm": lambda: built(TimesFmModel, shrunk(TimesFmConfig, patch_length=PATCH, context_length=64)),
    "timesfm2_5": lambda: built(
        TimesFm2_5Model, shrunk(TimesFm2_5Config, patch_length=PATCH, context_length=64, num_key_value_heads=4)
    ),
    "patchtst": lambda: built(PatchTSTModel, shrunk(PatchTSTConfig, **FIXED)),
    "patchtsmixer": lambda: built(PatchTSMixerModel, shrunk(PatchTSMixerConfig, **FIXED)),
}


def series(length, seed=0, channels=()):
    return np.random.default_rng(seed).standard_normal((length, *channels)).astype(np.float32)


def items_of(key):
    if key.startswith("timesfm"):
        return [series(10), series(24, 1), series(3, 2)], [2, 3, 1]
    return [series(16, i, (3,)) for i in range(3)], [6, 6, 6]


def made(key):
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    return compose(tiny.llama(), {"series": ENCODERS[key]()}, tokenizer=tokenizer)


@pytest.mark.parametrize("key", ENCODERS)
def test_series_are_counted_encoded_and_come_back(tmp_path, key):
    model, processor = made(key)
    items, counts = items_of(key)
    inputs = processor(
        text=["<series> a <series>", "<series>"], series=[items[:2], items[2:]], padding=True, return_tensors="pt"
    )
    token = model.config.series_modality["token_id"]
    assert (inputs["input_ids"] == token).sum(-1).tolist() == [sum(counts[:2]), counts[2]]
    names = model.config.series_modality["input_names"]
    with torch.no_grad():
        found = model.series_encoder(**{names[k]: v for k, v in inputs.items() if k in names}).pooler_output
        for item, features, count in zip(items, found, counts, strict=True):
            one = processor(text="<series>", series=item, return_tensors="pt")
            assert int((one["input_ids"] == token).sum()) == count == len(features)
            alone = model.series_encoder(**{names[k]: v for k, v in one.items() if k in names}).pooler_output[0]
            torch.testing.assert_close(features, alone, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert reader.processors["series"].to_dict() == processor.processors["series"].to_dict()
    check_comes_back(model, again, dict(inputs), max_new_tokens=4, do_sample=False)


def test_rows_of_uneven_series_are_batched_and_train(tmp_path):
    model, processor = made("timesfm2_5")
    rows = [{"prompt": "<series> ", "completion": "up", "series": series(n, n).tolist()} for n in (5, 20, 9, 24)]
    batch = MultimodalCollator(processor)(rows)
    assert batch["past_values_padding"].shape == (4, 24)
    assert (batch["past_values_padding"] == 0).sum(-1).tolist() == [5, 20, 9, 24]
    run = trainer(model, processor, tmp_path, rows, eval_strategy="no")
    run.train()
    assert all(np.isfinite(losses(run)))


@pytest.mark.parametrize("key", ["timesfm", "timesfm2_5"])
def test_patches_are_counted_by_a_rule_that_the_encoder_confirms(monkeypatch, key):
    model, processor = made(key)
    for length in (1, PATCH, PATCH + 1, 3 * PATCH):
        inputs = processor.processors["series"]([series(length), series(4 * PATCH)])
        item = {name: value[:1] for name, value in inputs.items()}
        with torch.no_grad():
            found = model.series_encoder.select(**item)
        lengths = found.lengths or [found.last_hidden_state.shape[1]]
        with monkeypatch.context() as patch:
            patch.setattr(feature_counts, "dry_run", None)
            assert processor.counter.count("series", item) == lengths[0] == -(-length // PATCH)


def test_series_are_filled_up_as_timesfm_does():
    found = TimeSeriesProcessor(patch_length=4, frequency=1)([[1.0, 2.0], series(9)])
    assert found["past_values"][0].tolist() == [0, 0, 1, 2] + [0] * 8
    assert found["past_values_padding"].tolist() == [[1, 1, 0, 0] + [1] * 8, [1] * 3 + [0] * 9]
    assert found["freq"].tolist() == [[1], [1]]
    whole = TimeSeriesProcessor(num_channels=1)([np.arange(3), np.arange(3.0)])
    assert whole["past_values"].tolist() == [[[0], [1], [2]]] * 2 and whole["past_values"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "items", "error", "message"),
    [
        ({}, [series(3), series(4)], ValueError, "s, item 1: the series has 4 values, item 0 has 3: .*one length"),
        (
            {"num_channels": 2},
            [series(3)],
            ValueError,
            r"s, item 0: expected a series of shape \(length, 2\), got \(3,\)",
        ),
        ({"num_channels": 2}, [series(3, 0, (3,))], ValueError, r"\(length, 2\), got \(3, 3\)"),
        ({}, [series(3, 0, (2,))], ValueError, r"shape \(length,\), got \(3, 2\)"),
        ({}, [series(0)], ValueError, r"shape \(length,\), got \(0,\)"),
        ({"context_length": 5}, [series(4)], ValueError, "has 4 values, the encoder takes 5: choose a window"),
        ({}, [np.array([1.0, np.nan])], ValueError, "s, item 0: .*not finite"),
        ({}, [np.array([1e300])], ValueError, "not finite"),
        ({}, [np.array(["a"])], TypeError, "s, item 0: expected numbers, got an array of <U1"),
        ({}, [np.array([True])], TypeError, "got an array of bool"),
        ({}, [torch.tensor([1j])], ValueError, "the values are complex64"),
        ({}, ["1,2"], TypeError, "expected numbers .*got str"),
        ({}, [[1.0, "a"]], ValueError, "does not hold rows of numbers"),
        ({}, [{"note": 1}], TypeError, "got NoneType"),
    ],
)
def test_series_that_cannot_be_used(options, items, error, message):
    with pytest.raises(error, match=message):
        TimeSeriesProcessor(**options)(items, name="s")


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x.astype(">f4"), lambda x: np.broadcast_to(x, (1, 3))])
def test_arrays_that_lie_in_memory_as_torch_takes_none(change):
    array = change(
        np.arange(3, dtype=np.float32)[None]
    )  # (1, 3): reversed along an axis of one entry, in another order of bytes
    (features,) = PrecomputedFeaturesProcessor(3)([array])["features"]
    assert features.tolist() == [[0.0, 1.0, 2.0]] and features.dtype is torch.float32
    with pytest.raises(TypeError, match="s, item 1: expected numbers, got an array of .*128: convert it to float32"):
        PrecomputedFeaturesProcessor(3)([array, array.astype(np.longdouble)], name="s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_length": 0}, "patch_length must be a positive integer, got 0"),
        ({"num_channels": True}, "num_channels must be a positive integer"),
        ({"patch_length": 4, "context_length": 8}, "leave the other sizes out"),
        ({"frequency": 3}, "frequency must be 0, 1 or 2, got 3"),
    ],
)
def test_settings_of_series(options, message):
    with pytest.raises(ValueError, match=message):
        TimeSeriesProcessor(**options)


def test_features_are_padded_and_keep_their_bits():
    processor = PrecomputedFeaturesProcessor(feature_size=2)
    half, brain = torch.randn(3, 2).half(), torch.randn(1, 2).bfloat16()
    found = processor([half, brain, series(2)])
    assert found["features"].shape == (3, 3, 2) and found["features"].dtype == torch.float32
    assert torch.equal(found["features"][0], half.float()) and torch.equal(found["features"][1, 0], brain[0].float())
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]] and not found["features"][1, 1:].any()
    assert processor([half])["features"].dtype == torch.float16
    forms = [[[0.5, 1.0]], np.array([[0.5, 1]], np.float32), {"features": [[0.5, 1.0]]}, np.array([0.5, 1], np.float32)]
    for form in forms:
        assert processor([form])["features"].tolist() == [[[0.5, 1.0]]]
    assert flatten([[0.5, 1.0]], "features") == ([[[0.5, 1.0]]], None)
    assert flatten([[[0.5, 1.0]], [[1.0, 1.0], [0.0, 1.0]]], "features")[1] is None


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (series(3, 0, (3,)), ValueError, r"f, item 1: expected features of shape \(n, 2\) with n >= 1, got \(3, 3\)"),
        (np.zeros((0, 2), np.float32), ValueError, r"got \(0, 2\)"),
        (np.zeros((1, 1, 2), np.float32), ValueError, r"got \(1, 1, 2\)"),
        (np.zeros((1, 2)), ValueError, r"the values are float64, expected float32.*astype\('float32'\)"),
        (np.zeros((1, 2), np.int64), ValueError, "the values are int64"),
        (torch.full((1, 2), float("inf")), ValueError, "not finite"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_features_that_cannot_be_used(item, error, message):
    with pytest.raises(error, match=message):
        PrecomputedFeaturesProcessor(feature_size=2)([np.zeros((1, 2), np.float32), item], name="f")


def test_descriptions_and_what_an_encoder_is_given_by_default():
    for processor in (PrecomputedFeaturesProcessor(feature_size=2), TimeSeriesProcessor(patch_length=4)):
        described = json.loads(json.dumps(describe_subprocessor(processor, "x")))
        again = build_subprocessor(described, "x")
        assert type(again) is type(processor) and again.to_dict() == processor.to_dict()
    with pytest.raises(ValueError, match="x: feature_size must be a positive integer|feature_size must be"):
        build_subprocessor({"feature_extractor_type": "PrecomputedFeaturesProcessor", "feature_size": "a"}, "x")
    found = default_processor("time", ENCODERS["patchtst"]().config)
    assert (found.num_channels, found.context_length, found.patch_length) == (3, 16, None)
    assert default_processor("time", ENCODERS["timesfm"]().config).patch_length == PATCH
    assert default_processor("image", tiny.clip().config) is None
    run = run_subprocessor(TimeSeriesProcessor(), "s", "time", [[1.0]], {}, None)
    assert run["past_values"].tolist() == [[1.0]]
    with pytest.raises(TypeError, match="ItemProcessor does not say how"):
        ItemProcessor()([])
