"""Wide matrices: every pair of encoders, items of random sizes through every processor, random compositions."""

import itertools

import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cornstarch_hf import MultimodalModel

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
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path)
    again, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)


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
