"""The resampler: equal to Idefics2's connector, queries that are initialised whatever way it is built."""

import pytest
import tiny
import torch
from native_parts import projector, randomized
from transformers import Idefics2Config, MistralConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.projectors.resampler import QUERY_STD, PerceiverAttention, ResamplerProjection

SMALL = {"num_queries": 5, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LAYER = {
    "input_latents_norm": "query_norm", "input_context_norm": "context_norm", "post_attention_layernorm": "mlp_norm",
    "self_attn": "attention",
}  # fmt: skip


def weights_of(native):
    """An Idefics2 connector's weights by this package's names; there, values and gates are two layers."""
    weights = {
        "queries": native.perceiver_resampler.latents,
        "query_norm.weight": native.perceiver_resampler.norm.weight,
    }

    def mlp(source, target):
        both = [source.up_proj.weight, source.gate_proj.weight]
        return {f"{target}.linear_1.weight": torch.cat(both), f"{target}.linear_2.weight": source.down_proj.weight}

    weights |= mlp(native.modality_projection, "head")
    for i, layer in enumerate(native.perceiver_resampler.layers):
        weights |= mlp(layer.mlp, f"layers.{i}.mlp")
        for theirs, ours in LAYER.items():
            part = layer.get_submodule(theirs)
            weights |= {f"layers.{i}.{ours}.{key}": value for key, value in part.state_dict().items()}
    return weights


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_idefics2(attention):
    perceiver = {"hidden_size": 24, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
                 "num_key_value_heads": 2, "resampler_head_dim": 8}  # fmt: skip
    config = Idefics2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        text_config=MistralConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2).to_dict(),
        perceiver_config=perceiver,
    )
    config.perceiver_config._attn_implementation = attention
    native = randomized(Idefics2Connector(config))
    made = projector("resampler", 16, 24, activation="silu", hidden_size=40, weights=weights_of(native), **SMALL)
    x = torch.randn(3, 9, 16)
    with torch.no_grad():
        expected, found = native(x, torch.ones(3, 9, dtype=torch.long)), made(x)[0]
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5
    )  # two layers there are one here: sums round otherwise
    assert found.shape == (3, 5, 24) and expected.abs().max() > 0.1


def test_attention_by_hand():
    layer = PerceiverAttention(8, num_heads=4, num_kv_heads=2, head_dim=3)
    queries, context = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    seen = torch.cat([context, queries], 1)
    heads = []
    for head in range(4):
        rows, shared = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        q, k, v = (
            queries @ layer.q_proj.weight[rows].T,
            seen @ layer.k_proj.weight[shared].T,
            seen @ layer.v_proj.weight[shared].T,
        )
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 3**0.5, -1) @ v)
    torch.testing.assert_close(
        layer(queries, context), torch.cat(heads, -1) @ layer.o_proj.weight.T, rtol=1e-4, atol=1e-5
    )


def test_queries_of_another_width_are_projected():
    made = ResamplerProjection(16, 24, query_size=12, **SMALL)
    assert made.queries.shape == (5, 12) and made(torch.randn(2, 9, 16)).shape == (2, 5, 24)
    assert isinstance(ResamplerProjection(16, 24, query_size=24, **SMALL).output, torch.nn.Identity)


def composed(seed):
    torch.manual_seed(seed)
    config = MultimodalProjectorConfig(projection_type="resampler", **SMALL)
    encoder = ModalEncoderModule(tiny.clip(), MultimodalProjector(config))
    return MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())


def test_queries_are_random_and_the_same_under_one_seed(tmp_path):
    first, second, other = (composed(seed).vision_encoder.projector.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    queries = first["projection.queries"]
    assert not torch.equal(queries, other["projection.queries"]) and queries.unique(dim=0).shape == queries.shape
    assert 0.5 * QUERY_STD < queries.std() < 2 * QUERY_STD
    norms = [value for key, value in first.items() if "norm" in key]
    assert norms and all(value.eq(1).all() for value in norms)


def test_what_a_checkpoint_lacks_is_initialised(tmp_path):
    """Built on the meta device, as `from_pretrained` does, then filled: by weights or by the initialisation."""
    model = composed(0)
    state = model.state_dict()
    for key in (
        "vision_encoder.projector.projection.queries",
        "vision_encoder.projector.projection.head.linear_1.weight",
    ):
        del state[key]
    model.save_pretrained(tmp_path, state_dict=state)
    torch.manual_seed(5)
    again, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 2
    found = again.vision_encoder.projector.projection
    for made in (found.queries, found.head.linear_1.weight):
        assert 0.5 * QUERY_STD < made.std() < 2 * QUERY_STD
    fresh = MultimodalModel(model.config).vision_encoder.projector.projection
    assert 0.5 * QUERY_STD < fresh.queries.std() < 2 * QUERY_STD


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 0}, "num_queries must be an integer >= 1, got 0"),
        ({"depth": 1.5}, "depth must be an integer >= 1, got 1.5"),
        ({"query_size": 0}, "query_size must be an integer >= 1, got 0"),
        ({"num_heads": 6}, "num_kv_heads=4 must divide num_heads=6"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        ResamplerProjection(8, 8, **options)


def test_an_item_without_features():
    with pytest.raises(ValueError, match="cannot gather from an item without features"):
        ResamplerProjection(8, 8, **SMALL).feature_count(0)
