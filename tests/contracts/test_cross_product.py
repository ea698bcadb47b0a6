"""Random triples of an encoder, a language model and a projector: what composes alone composes together."""

import random

import catalog
import catalog_llms
import catalog_others
import catalog_vision
import pytest
import torch
from own_memory import check_comes_back
from transformers import AutoModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.encoders.counting import FeatureCounter

pytestmark = pytest.mark.catalog
ENCODERS = {**catalog_vision.CASES, **catalog_others.CASES}
# For any number of features in a sequence.
PROJECTORS = (
    {"projection_type": "linear"},
    {"projection_type": "mlp", "activation": "silu"},
    {"projection_type": "avg_pool", "dims": 1, "pool_size": 2},
    {"projection_type": "frame_stack", "stack_factor": 3},
    {"projection_type": "resampler", "num_queries": 5, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
)
SEED, COUNT = 20261121, 200
TOKEN = 319


def triples():
    """The triples; every encoder and every language model is in one at least."""
    draw = random.Random(SEED)  # printed with each triple
    encoders = sorted(set(ENCODERS) - set(catalog_others.NO_FEATURES))
    language_models = list(catalog_llms.SUPPORTED)
    draw.shuffle(encoders)
    draw.shuffle(language_models)
    return [
        (encoders[i % len(encoders)], language_models[i % len(language_models)], draw.randrange(len(PROJECTORS)))
        for i in range(max(COUNT, len(encoders), len(language_models)))
    ]


@pytest.mark.parametrize(("encoder", "language_model", "projector"), triples())
def test_a_triple_composes_generates_and_comes_back(encoder, language_model, projector, tmp_path):
    print(f"seed {SEED}: {encoder} x {language_model} x {PROJECTORS[projector]}")
    case = ENCODERS[encoder]
    made = ModalEncoderModule(
        catalog.build(encoder),
        MultimodalProjector(MultimodalProjectorConfig(**PROJECTORS[projector])),
        kind=case.kind,
        **case.module_kwargs,
    )
    torch.manual_seed(SEED)
    model = MultimodalModel(encoders={"media": made}, language_model=catalog_llms.build(language_model)).eval()
    model.set_modality_token_ids({"media": TOKEN})
    item = catalog.item(encoder, 0)
    names = model.config.modality("media")["input_names"]
    count = FeatureCounter(model.config).count("media", item)
    ids = torch.tensor([[5, *[TOKEN] * count, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {name: item[key] for name, key in names.items() if key in item}
    with torch.no_grad():
        assert len(model.media_encoder(**item).pooler_output[0]) == count
        model(**inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    check_comes_back(model, loaded, inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
