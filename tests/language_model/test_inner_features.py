"""Features for inner layers, added features and learnt tokens: at the right places, stored, and refused where nothing takes them."""

import copy

import native_models
import pytest
import tiny
import torch
from native_models import IMAGE
from own_memory import check_comes_back
from torch import nn

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalConfig,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    PrecomputedFeatures,
    PrecomputedFeaturesConfig,
)
from cornstarch_hf.language_model.inner_features import joined_levels

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
WIDTH, TOKEN = 32, 300
IDS = torch.tensor([[0, 5, TOKEN, TOKEN, 6], [7, TOKEN, 310, 311, 8]])
FEATURES = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(3))
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "features": FEATURES}


def ready(**options):
    """A model whose features come ready and are embeddings already."""
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(hidden_size=WIDTH))
    projector = MultimodalProjector(MultimodalProjectorConfig(), projection=nn.Identity())
    encoders = {"points": ModalEncoderModule(encoder, projector, **options)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultimodalModel(encoders=encoders, language_model=tiny.llama()).eval()
    model.set_modality_token_ids({"points": TOKEN})
    return model


def expected_logits(model, embeds):
    return model.language_model(inputs_embeds=embeds, attention_mask=INPUTS["attention_mask"]).logits


def test_levels_of_several_modalities_stand_in_reading_order():
    masks = [torch.tensor([[True, False, False, True]]), torch.tensor([[False, True, False, False]])]
    levels = [[torch.tensor([[1.0], [2.0]])], [torch.tensor([[9.0]])]]
    assert torch.equal(joined_levels(levels, masks)[0], torch.tensor([[1.0], [9.0], [2.0]]))
    assert joined_levels(levels[:1], masks[:1]) is levels[0]


def test_features_are_added_to_the_embeddings_of_their_placeholders():
    model = ready(merge="add")
    embeds = model.get_input_embeddings()(IDS)
    embeds[IDS == TOKEN] += FEATURES[:, 0]
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, expected_logits(model, embeds))
    assert not torch.equal(model(**INPUTS).logits, ready()(**INPUTS).logits)


def test_a_placeholder_without_an_embedding_has_nothing_to_add_to():
    model = ready(merge="add")
    with pytest.raises(
        ValueError, match=r"points: features are added to the embedding of token 320.*resize_token_embeddings\(321\)"
    ):
        model.set_modality_token_ids({"points": 320})


def test_learnt_tokens_stand_where_there_are_items():
    model = ready(marks={310: 1, 311: 0})
    table = model.points_encoder.mark_table.weight
    embeds = model.get_input_embeddings()(IDS)
    embeds[IDS == TOKEN], embeds[1, 2], embeds[1, 3] = FEATURES[:, 0], table[1], table[0]
    with torch.no_grad():
        assert torch.equal(model(**INPUTS).logits, expected_logits(model, embeds))
        text = {"input_ids": IDS[:, 2:].where(IDS[:, 2:] != TOKEN, 9)}  # without an item they are words
        assert torch.equal(model(**text).logits, model.language_model(**text).logits)
        given = model.get_input_embeddings()(IDS)
        by_embeds = {key: value for key, value in INPUTS.items() if key != "input_ids"} | {"inputs_embeds": given}
        assert torch.equal(model(**by_embeds).logits, expected_logits(model, embeds))
    model.train()(**INPUTS, labels=IDS.masked_fill(IDS == TOKEN, -100)).loss.backward()
    assert bool(model.points_encoder.mark_table.weight.grad.any())


def test_learnt_tokens_need_the_whole_prompt():
    model = ready(marks={310: 1, 311: 0})
    with pytest.raises(ValueError, match=r"points: its learnt tokens \(marks\) need the whole prompt"):
        model.generate(**INPUTS, **GREEDY, prefill_chunk_size=2)


class Mixture(nn.Module):
    """A projection that mixes the rows of its table of learnt tokens."""

    def __init__(self):
        super().__init__()
        self.mark_table = nn.Embedding(4, WIDTH)

    def forward(self, features):
        return features @ torch.eye(WIDTH)


def test_a_projection_may_hold_the_table():
    projector = MultimodalProjector(MultimodalProjectorConfig(), projection=Mixture())
    encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(hidden_size=WIDTH))
    encoders = {"points": ModalEncoderModule(encoder, projector, marks={310: 3})}
    model = MultimodalModel(encoders=encoders, language_model=tiny.llama()).eval()
    assert not hasattr(model.points_encoder, "mark_table")
    encoders = {"points": ModalEncoderModule(copy.deepcopy(encoder), copy.deepcopy(projector), marks={310: 4})}
    with pytest.raises(ValueError, match="points: marks name the row 4 of a table of 4 learnt tokens"):
        MultimodalModel(encoders=encoders, language_model=tiny.llama())


@pytest.mark.parametrize(
    "options", [{"merge": "add"}, {"marks": {310: 1, 311: 0}}, {"merge": "add", "marks": {310: 0}}]
)
def test_settings_come_back(options, tmp_path):
    model = ready(**options)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).eval()
    assert again.config.points_modality == model.config.points_modality
    check_comes_back(model, again, INPUTS, **GREEDY)
    assert torch.equal(again.generate(**INPUTS, **GREEDY, num_beams=2), model.generate(**INPUTS, **GREEDY, num_beams=2))


def test_wrong_settings_are_refused():
    for options, message in (
        ({"merge": "sum"}, "merge must be \"add\" or None, got 'sum'"),
        ({"marks": {"x": 1}}, "marks must be {token_id: row} of integers"),
        ({"marks": {5: -1}}, "marks must be {token_id: row} of integers"),
        ({"layer_features": 3}, "layer_features must name an output field, got 3"),
    ):
        with pytest.raises(ValueError) as caught:
            ready(**options)
        assert message in str(caught.value)
        values = {"encoders": ["points"], "points_config": {"model_type": "llama"}, "points_modality": options}
        with pytest.raises(ValueError, match=r"points|merge|marks|layer_features"):
            MultimodalConfig(text_config={"model_type": "llama"}, points_projector_config={}, **values)


def test_layer_features_need_a_language_model_that_takes_them():
    with pytest.raises(ValueError, match="points: layer_features needs a language model.*LlamaForCausalLM does not"):
        ready(layer_features="deepstack_features")


def test_layer_features_are_those_of_the_items():
    native = native_models.native("qwen3_vl")
    model, inputs = native_models.compose(native), native_models.image_inputs(native)
    media = {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}
    output = model.get_image_features(**media)
    expected = native.model.get_image_features(**media)
    assert [len(level) for level in output.deepstack_features] == [3, 3]
    assert all(
        torch.equal(torch.cat(found), torch.cat(list(level)))
        for found, level in zip(output.deepstack_features, expected.deepstack_features, strict=True)
    )
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    bare = type(output)(pooler_output=output.pooler_output, feature_grids=output.feature_grids)
    with pytest.raises(
        ValueError, match=r"image: the language model's layers need features of their own.*get_image_features\(\)"
    ):
        model(**text, mm_encoder_outputs={"image": bare})
    wrong = native_models.plain(copy.deepcopy(native.model.visual), kind="image", layer_features="none")
    model = MultimodalModel(encoders={"image": wrong}, language_model=native_models.head(native)).eval()
    model.set_modality_token_ids({"image": IMAGE})
    with pytest.raises(ValueError, match="image: layer_features='none' needs that field.*deepstack_features"):
        model(**{key: value for key, value in inputs.items() if key != "mm_token_type_ids"})
