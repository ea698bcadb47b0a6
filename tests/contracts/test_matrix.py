"""Wide matrices: every pair of encoders, items of random sizes through every processor, random compositions."""

import itertools

import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_memory import check_comes_back

from cornstarch_hf import MultimodalModel, MultimodalProjector, MultimodalProjectorConfig

pytestmark = pytest.mark.slow
PAIRS = list(itertools.combinations(tiny.ENCODERS, 2))
MODELS = itertools.cycle(tiny.LANGUAGE_MODELS)
SIZES = {
    "image": st.tuples(st.integers(1, 70), st.integers(1, 70)).filter(lambda s: max(s) <= 30 * min(s)),
    "sound": st.integers(60, 3000),
    "protein": st.integers(1, 40),
}


@pytest.mark.parametrize(("pair", "language_model"), list(zip(PAIRS, MODELS, strict=False)), ids=lambda x: "-".join(x) if isinstance(x, tuple) else x)  # fmt: skip
def test_every_pair_of_encoders(tmp_path, pair, language_model):
    named = {f"{tiny.ENCODERS[key][0]}{i}": key for i, key in enumerate(pair)}
    model, processor = compose_tiny(
        named, tiny.LANGUAGE_MODELS[language_model](), "mlp" if len(language_model) % 2 else "linear"
    )
    tokens, media = [processor.tokens[n] for n in named], {}
    for i, (name, key) in enumerate(named.items()):
        item = tiny.ENCODERS[key][3]
        media[name] = [[item(i)], [item(i + 3), item(i + 5)], []]
    rate = {"sampling_rate": 16_000} if any(n.startswith("audio") for n in named) else {}
    texts = [" a ".join(tokens), " b ".join(tokens + tokens), "none"]
    inputs = dict(processor(text=texts, padding=True, return_tensors="pt", **media, **rate))
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path)
    again, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    check_comes_back(model, again, inputs)


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_items_of_random_sizes_give_as_many_features_as_placeholders(key):
    model, processor = compose_tiny([key])
    name, _, _, item = tiny.ENCODERS[key]
    token, token_id = processor.tokens[name], model.config.modality(name)["token_id"]
    rate = {"sampling_rate": 16_000} if name == "audio" else {}

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(SIZES[item.__name__], min_size=1, max_size=3))
    def check(sizes):
        items = [item(i, size) for i, size in enumerate(sizes)]
        inputs = processor(text=[token * len(items)], **{name: [items]}, return_tensors="pt", **rate)
        with torch.no_grad():
            model(**inputs)
        alone = [processor(text=token, **{name: one}, return_tensors="pt", **rate)["input_ids"] for one in items]
        assert (inputs["input_ids"] == token_id).sum() == sum((ids == token_id).sum() for ids in alone)

    check()


REDUCTIONS = {
    "pixel_shuffle": {"remainder": "pad"},
    "frame_stack": {"stack_factor": 3},
    "avg_pool": {"pool_size": 3},
    "conv": {"kernel_size": 2, "num_convs": 2, "remainder": "pad"},
    "resampler": {"num_queries": 3, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
    "qformer": {
        "num_query_tokens": 3,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    },
}


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_reduced_items_of_random_sizes_give_as_many_features_as_placeholders(key, kind):
    name, _, _, item = tiny.ENCODERS[key]
    options = {"drop_prefix": 1} if key in ("clip", "dinov2") else {}
    options["projector"] = MultimodalProjector(MultimodalProjectorConfig(projection_type=kind, **REDUCTIONS[kind]))
    model, processor = compose_tiny([key], **{name: options})
    token, token_id = processor.tokens[name], model.config.modality(name)["token_id"]
    rate = {"sampling_rate": 16_000} if name == "audio" else {}
    if kind == "pixel_shuffle" and name != "vision":
        with pytest.raises(ValueError, match=f"{name}, item 0: .*not in a grid"):
            processor(text=token, **{name: item()}, **rate)
        return

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(SIZES[item.__name__], min_size=1, max_size=3))
    def check(sizes):
        items = [item(i, size) for i, size in enumerate(sizes)]
        inputs = processor(text=[token * len(items)], **{name: [items]}, return_tensors="pt", **rate)
        with torch.no_grad():
            together = model.encoders[name](**encoder_inputs(model, name, inputs)).pooler_output
            model(**inputs)
        for one, features in zip(items, together, strict=True):
            single = processor(text=token, **{name: one}, return_tensors="pt", **rate)
            assert (single["input_ids"] == token_id).sum() == len(features)
            with torch.no_grad():
                (alone,) = model.encoders[name](**encoder_inputs(model, name, single)).pooler_output
            torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-5)

    check()


def encoder_inputs(model, name, inputs):
    names = model.config.modality(name)["input_names"]
    return {names[key]: value for key, value in inputs.items() if key in names}


@pytest.mark.parametrize("language_model", tiny.LANGUAGE_MODELS)
def test_beams_of_uneven_batches_equal_their_singles(language_model):
    model, processor = compose_tiny(["clip"], tiny.LANGUAGE_MODELS[language_model]())
    model.generation_config.eos_token_id = None
    inputs = uneven_inputs(processor)
    options = {"num_beams": 3, "max_new_tokens": 3, "do_sample": False}
    together = model.generate(**inputs, **options)
    for sample, items in enumerate(([0], [1, 2], [])):
        keep = inputs["attention_mask"][sample].bool()
        single = {"input_ids": inputs["input_ids"][sample][keep][None]}
        if items:
            single["pixel_values"] = inputs["pixel_values"][items]
        assert torch.equal(together[sample, -3:], model.generate(**single, **options)[0, -3:])
