"""Projectors: the registry, wrapped modules bit for bit, lazy ones, the original's checkpoints."""

import copy
import json

import pytest
import tiny
import torch
import user_parts
from own_memory import own_memory, weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    register_projector,
)
from cornstarch_hf.projectors.projector import acts_on_single_features
from cornstarch_hf.projectors.reductions import FrameStackProjection, PixelShuffleProjection
from cornstarch_hf.projectors.resampler import ResamplerProjection
from cornstarch_hf.projectors.windows import AvgPoolProjection, ConvProjection


def composed(projector=None, **options):
    encoder = ModalEncoderModule(tiny.clip(), projector)
    return MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama(), **options)


def test_types():
    x = torch.randn(2, 5, 16)
    linear = MultimodalProjector(MultimodalProjectorConfig(in_features=16, out_features=32))
    assert torch.equal(linear(x).last_hidden_state, linear.projection(x)) and isinstance(linear.projection, nn.Linear)
    assert torch.equal(linear(x, return_dict=False)[0], linear.projection(x))
    mlp = MultimodalProjector(
        MultimodalProjectorConfig(in_features=16, out_features=32, projection_type="mlp", activation="silu")
    )
    first, activation, last = mlp.projection
    assert torch.equal(mlp(x)[0], last(nn.functional.silu(first(x)))) and activation is not None
    with pytest.raises(ValueError, match="width 16, got 17"):
        linear(torch.randn(1, 17))


def test_init_projector_type_and_activation():
    model = composed(init_projector_type="mlp", init_activation="relu")
    assert isinstance(model.vision_encoder.projector.projection[1], nn.ReLU)
    assert model.config.vision_projector_config.activation == "relu"


LINEAR = nn.Linear
# Options of `mlp`, and the layers that they make, of 16 features and for embeddings of 32.
MLPS = {
    "usual": ({}, [LINEAR(16, 32), nn.GELU(), LINEAR(32, 32)]),
    "depth": ({"num_layers": 3}, [LINEAR(16, 32), nn.GELU(), LINEAR(32, 32), nn.GELU(), LINEAR(32, 32)]),
    "one layer": ({"num_layers": 1}, [LINEAR(16, 32)]),
    "width": ({"hidden_size": 24}, [LINEAR(16, 24), nn.GELU(), LINEAR(24, 32)]),
    "layer norm": ({"norm": "layer_norm"}, [nn.LayerNorm(16), LINEAR(16, 32), nn.GELU(), LINEAR(32, 32)]),
    "rms norm": ({"norm": "rms_norm", "norm_eps": 0.1}, [nn.RMSNorm(16, 0.1), LINEAR(16, 32), nn.GELU(), LINEAR(32, 32)]),
    "no bias": ({"bias": False, "hidden_size": 8}, [LINEAR(16, 8, bias=False), nn.GELU(), LINEAR(8, 32, bias=False)]),
    "all": (
        {"num_layers": 3, "hidden_size": 24, "norm": "layer_norm", "norm_eps": 0.1, "activation": "relu"},
        [nn.LayerNorm(16, 0.1), LINEAR(16, 24), nn.ReLU(), LINEAR(24, 24), nn.ReLU(), LINEAR(24, 32)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "layers"), MLPS.values(), ids=MLPS)
def test_mlps_of_any_depth_width_and_norm(tmp_path, options, layers):
    """Equal to the layers written by hand, alone and in a composed model, and so again after a reload."""
    config = MultimodalProjectorConfig(projection_type="mlp", **options)
    model = composed(MultimodalProjector(config))
    projector, expected, x = model.vision_encoder.projector, nn.Sequential(*layers), torch.randn(2, 5, 16)
    assert [tuple(p.shape) for p in projector.parameters()] == [tuple(p.shape) for p in expected.parameters()]
    expected.load_state_dict(projector.projection.state_dict())
    assert torch.equal(projector(x)[0], expected(x))
    model.save_pretrained(tmp_path / "model")
    projector.save_pretrained(tmp_path / "projector")
    loaded = MultimodalModel.from_pretrained(tmp_path / "model").vision_encoder.projector
    for again in (loaded, MultimodalProjector.from_pretrained(tmp_path / "projector")):
        assert (
            again.config.projection_type == "mlp"
            and again.config.projection_kwargs == projector.config.projection_kwargs
        )
        assert weights(again) == weights(projector) and torch.equal(
            own_memory(again)(x)[0], own_memory(projector)(x)[0]
        )
    assert str(projector.projection) == str(loaded.projection)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"num_layers": "2"}, "num_layers must be a positive integer, got '2'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"num_layers": 1, "hidden_size": 8}, "hidden_size is the width between layers, and num_layers=1 has none"),
        ({"norm": "batch"}, r"norm='batch' is unknown, expected one of \['layer_norm', 'none', 'rms_norm'\]"),
        ({"norm_eps": 0.1}, "norm_eps is of a norm, and there is none: choose norm='layer_norm'"),
        ({"norm": "rms_norm", "norm_eps": -1.0}, "norm_eps must be a positive number, got -1.0"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"activation": "geluu"}, r"Unknown activation 'geluu', expected one of \['gelu', .*'silu'"),
        ({"activation": ["relu"]}, r"Unknown activation \['relu'\], expected one of"),
    ],
)
def test_options_of_mlps_are_checked_in_the_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        MultimodalProjectorConfig(projection_type="mlp", **options)


@pytest.mark.parametrize("given", [nn.Linear(16, 32), nn.Linear, MultimodalProjectorConfig(), lambda x: x, None])
@pytest.mark.parametrize(
    "make", [lambda x: composed(init_projector_type=x), lambda x: MultimodalProjectorConfig(projection_type=x)]
)
def test_a_type_is_a_name(given, make):
    with pytest.raises(
        TypeError, match=r"type must be a name, one of \['avg_pool'.*projection=module.*register_projector"
    ):
        make(given)


@pytest.mark.parametrize("given", [nn.Linear(16, 32), nn.Linear, "mlp", {"projection_type": "mlp"}])
def test_a_projector_is_made_of_its_configuration(given):
    with pytest.raises(TypeError, match="config must be a MultimodalProjectorConfig, got .*projection=module"):
        MultimodalProjector(given)


@pytest.mark.parametrize(
    "config", [MultimodalProjectorConfig(), MultimodalProjectorConfig(in_features=16, out_features=32)]
)
def test_a_wrapped_module_keeps_its_weights(tmp_path, config):
    projection = nn.Linear(16, 32)
    nn.init.constant_(projection.weight, 7.0)
    wrapped = MultimodalProjector(config, projection)
    assert wrapped.projection is projection and wrapped.config is not config
    model = composed(wrapped)
    assert model.vision_encoder.projector.projection is projection and float(projection.weight.min()) == 7.0
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).vision_encoder.projector
    assert torch.equal(again.projection.weight, projection.weight) and again.config.projection_type == "linear"


def test_a_registered_class_alone_and_by_name(tmp_path):
    projection = user_parts.GatedProjection(16, 32, gain=2.0)
    wrapped = MultimodalProjector(MultimodalProjectorConfig(), projection)
    assert wrapped.config.projection_type == "users_gated" and wrapped.config.projection_kwargs["gain"] == 2.0
    wrapped.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again.projection) is user_parts.GatedProjection and again.projection.gain == 2.0
    x = torch.randn(3, 16)
    assert torch.equal(own_memory(again)(x)[0], own_memory(wrapped)(x)[0]) and weights(again) == weights(wrapped)
    lazy = composed(init_projector_type="users_gated").vision_encoder.projector
    assert type(lazy.projection) is user_parts.GatedProjection and lazy.projection.gain == 1.0


def test_what_a_wrapped_module_tells_goes_before_its_configuration():
    says = {"projection_type": "users_gated", "in_features": 16, "out_features": 32}
    for stated, given in ((3.0, 2.0), (3.0, 1.0), (1.0, 2.0)):
        config = MultimodalProjectorConfig(**says, gain=stated)
        wrapped = MultimodalProjector(config, user_parts.GatedProjection(16, 32, gain=given))
        assert MultimodalProjector(wrapped.config).projection.gain == given and config.projection_kwargs == {
            "gain": stated
        }

    class Silent(user_parts.GatedProjection):
        def __init__(self, in_features, out_features, factor=1.0):
            super().__init__(in_features, out_features, gain=factor)

    register_projector("silent_for_test", Silent)  # it keeps `factor` under another name: the configuration is asked
    config = MultimodalProjectorConfig(**says | {"projection_type": "silent_for_test"}, factor=3.0)
    wrapped = MultimodalProjector(config, Silent(16, 32, factor=3.0))
    assert MultimodalProjector(wrapped.config).projection.gain == 3.0


def test_what_cannot_be_stored_composes_but_does_not_save(tmp_path):
    class Local(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.inner = nn.Linear(16, width)

        def forward(self, x):
            return self.inner(x)

    model = composed(MultimodalProjector(MultimodalProjectorConfig(), Local(32)))
    model.set_modality_token_ids({"vision": 9})
    model(input_ids=torch.tensor([[9] * 5]), pixel_values=torch.randn(1, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"vision_encoder.projector cannot be saved: .*Local is not registered.*register_projector"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    register_projector("local_for_test", Local)
    with pytest.raises(ValueError, match=r"keeps no attribute of that name: set self.width"):
        model.save_pretrained(tmp_path)


def test_registering_twice_and_wrong_things():
    register_projector("linear_again", nn.Linear)
    register_projector("linear_again", nn.Linear)
    with pytest.raises(ValueError, match="'linear_again' is registered already"):
        register_projector("linear_again", nn.Bilinear)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module class"):
        register_projector("broken", 3)
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        MultimodalProjector(MultimodalProjectorConfig(), projection=lambda x: x)


def test_lazy_when_a_size_is_missing():
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp", out_features=32))
    assert projector.projection is None
    with pytest.raises(ValueError, match="no projection yet"):
        projector(torch.randn(1, 16))
    model = composed(projector)
    assert model.vision_encoder.projector is projector and projector.projection[0].in_features == 16
    assert composed(None).vision_encoder.projector.config.in_features == 16


@pytest.mark.parametrize("form", ["projection", "in_proj"])
def test_projectors_of_the_original_cornstarch_load(tmp_path, form):
    """The layouts that the original wrote: `projection.{0,2}` later, `in_proj`/`out_proj` at first."""
    names = {"projection": ("projection.0", "projection.2"), "in_proj": ("in_proj", "out_proj")}[form]
    tensors = {}
    for name, shape in zip(names, ((32, 16), (32, 32)), strict=True):
        tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["MultimodalProjector"], "model_type": "multimodal-projector", "projection_type": "mlp",
        "activation": "gelu", "in_features": 16, "out_features": 32, "encoder_model_type": "clip_vision_model",
        "language_model_type": "llama", "torch_dtype": "float32", "transformers_version": "4.47.0",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for cls in (MultimodalProjector, AutoModel) if form == "projection" else (MultimodalProjector,):
        projector, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(projector.projection[0].weight, tensors[f"{names[0]}.weight"])
        assert torch.equal(projector.projection[2].bias, tensors[f"{names[1]}.bias"])
        assert composed(projector).vision_encoder.projector is projector


def test_gradient_checkpointing_of_a_projector():
    projector = MultimodalProjector(
        MultimodalProjectorConfig(in_features=4, out_features=4, projection_type="mlp")
    ).train()
    x = torch.randn(2, 4, requires_grad=True)
    projector(x)[0].sum().backward()
    plain, x.grad = x.grad.clone(), None
    projector.gradient_checkpointing_enable()
    projector(x)[0].sum().backward()
    assert torch.equal(x.grad, plain)


# ---- projections that leave fewer features

SMALL = {"num_queries": 3, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
REDUCING = {
    "pixel_shuffle": PixelShuffleProjection(16, 32, "silu", channel_order="channel", remainder="pad", norm="none"),
    "frame_stack": FrameStackProjection(16, 32, stack_factor=3, gated=True, norm_mid="rms_norm"),
    "avg_pool": AvgPoolProjection(16, 32, "relu", num_tokens=[2, 1], num_layers=2),
    "conv": ConvProjection(16, 32, num_convs=2, conv_sizes=[8, 12], dims=2, conv_bias=True),
    "resampler": ResamplerProjection(16, 32, query_size=12, **SMALL),
}
OTHERS = [MultimodalProjectorConfig(), MultimodalProjectorConfig(activation="tanh", in_features=16, out_features=32)]


@pytest.mark.parametrize("kind", REDUCING)
@pytest.mark.parametrize("other", [False, True])
def test_a_reduction_wrapped_by_hand_comes_back(tmp_path, kind, other):
    projection = REDUCING[kind]
    config = OTHERS[other]
    if other and kind != "avg_pool":  # a configuration that says otherwise gives way to what the module is
        config = MultimodalProjectorConfig(projection_type=kind, in_features=16, out_features=32)
    wrapped = MultimodalProjector(config, projection)
    assert wrapped.projection is projection and wrapped.config.projection_type == kind
    wrapped.save_pretrained(tmp_path)
    for again in (AutoModel.from_pretrained(tmp_path), MultimodalProjector.from_pretrained(tmp_path)):
        assert again.projection.extra_repr() == projection.extra_repr()
        x = torch.randn(2, 16, 16)
        assert torch.equal(own_memory(again)(x)[0], own_memory(wrapped)(x)[0]) and weights(again) == weights(wrapped)


def test_axes_follow_the_encoder_only_where_they_are_not_chosen():
    class Cube(user_parts.GatedProjection):
        def __init__(self, in_features, out_features, dims=3):
            super().__init__(in_features, out_features)
            self.dims = dims

    for build, kind, given, expected in (
        (tiny.clip, "conv", {}, 2),
        (tiny.whisper, "conv", {}, 1),
        (tiny.esm, "avg_pool", {}, 1),
        (tiny.clip, "avg_pool", {"dims": 1}, 1),
    ):
        projector = MultimodalProjector(MultimodalProjectorConfig(projection_type=kind, **given))
        encoder = ModalEncoderModule(build(), projector)
        MultimodalModel(encoders={"some": encoder}, language_model=tiny.llama())
        assert projector.projection.dims == projector.config.projection_kwargs["dims"] == expected
    register_projector("cube_for_test", Cube)
    assert composed(init_projector_type="cube_for_test").vision_encoder.projector.projection.dims == 3


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (2, 3, 4, 16), (2, 3, 4, 5, 16)])
def test_a_class_of_the_users_still_takes_any_leading_axes(shape):
    projection = user_parts.GatedProjection(16, 32)
    x = torch.randn(shape)
    found = MultimodalProjector(MultimodalProjectorConfig(), projection)(x)[0]
    assert found.shape == (*shape[:-1], 32) and torch.allclose(found, projection(x), atol=1e-6)


def test_one_item_maps_and_packs_are_the_same_items():
    made = composed(init_projector_type="avg_pool").vision_encoder.projector
    maps = torch.randn(2, 4, 6, 16)
    expected = made(maps)
    flat, packed = maps.flatten(1, 2), maps.flatten(0, 2)
    grids = [(4, 6)] * 2
    assert torch.equal(made(flat, grids=grids)[0], expected[0]) and expected[0].shape == (2, 6, 32)
    assert torch.equal(made(flat[1], grids=grids[:1])[0], made(flat[1:], grids=grids[:1])[0][0])
    output = made(packed, lengths=[24, 24], grids=grids)
    assert torch.equal(output[0], expected[0].flatten(0, 1)) and output.feature_lens.tolist() == [6, 6]
    assert torch.equal(made(flat, return_dict=False, grids=grids)[0], expected[0])
    other = made(flat, grids=[(4, 6), (1, 24)])  # different counts: packed
    assert other.feature_lens.tolist() == [6, 12] and other[0].shape == (18, 32)
    with pytest.raises(ValueError, match="24 features are no square"):
        made(flat)
    with pytest.raises(ValueError, match="1 grids for 2 items"):
        made(flat, grids=[(4, 6)])


@pytest.mark.parametrize("kind", REDUCING)
def test_gradients_checkpoints_and_dtypes_of_reductions(kind):
    made = MultimodalProjector(MultimodalProjectorConfig(), copy.deepcopy(REDUCING[kind])).train()
    x = torch.randn(2, 16, 16, requires_grad=True)

    def gradients():
        made.zero_grad()
        x.grad = None
        made(x)[0].pow(2).sum().backward()
        return [x.grad, *(p.grad for p in made.parameters())]

    plain = gradients()
    made.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert all(g is not None and g.isfinite().all() for g in plain)
    assert made.bfloat16()(x.bfloat16())[0].dtype is torch.bfloat16


@pytest.mark.parametrize("kind", REDUCING)
def test_reductions_compile_to_one_graph(kind):
    made = MultimodalProjector(MultimodalProjectorConfig(), copy.deepcopy(REDUCING[kind])).eval()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    x = torch.randn(2, 16, 16)
    assert torch.equal(compiled(x)[0], made(x)[0])
    torch._dynamo.reset()


def test_only_what_acts_on_single_features_is_projected_in_one_piece():
    lora = nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 24), nn.SiLU(), nn.Dropout(0.0), nn.RMSNorm(24), nn.Linear(24, 32)
    )
    assert acts_on_single_features(lora) and not MultimodalProjector(MultimodalProjectorConfig(), lora).reduces
    for mixing in (
        nn.LayerNorm([3, 16]),
        nn.Softmax(dim=1),
        nn.PReLU(3),
        nn.Conv1d(3, 3, 1),
        user_parts.Halving(16, 32),
    ):
        assert not acts_on_single_features(nn.Sequential(nn.Linear(16, 16), mixing))
    pooling = nn.Sequential(nn.Linear(16, 32), nn.AvgPool2d((2, 1)))
    made = MultimodalProjector(MultimodalProjectorConfig(out_features=32), pooling)
    x = torch.randn(10, 16)
    output = made(x, lengths=[4, 6])
    assert output.feature_lens.tolist() == [2, 3]
    assert torch.allclose(output[0], torch.cat([pooling(x[None, :4])[0], pooling(x[None, 4:])[0]]))
    assert made.feature_count(4) is None and composed().vision_encoder.projector.feature_count(4) == 4


@pytest.mark.parametrize("kind", REDUCING)
def test_peft_saves_a_reducing_projector(tmp_path, kind):
    def made():
        encoder = ModalEncoderModule(tiny.clip(), drop_prefix=1)
        model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama(), init_projector_type=kind)
        model.set_modality_token_ids({"vision": 9})
        return model

    model = made()
    count = model.vision_encoder.projector.feature_count(4, (2, 2))
    inputs = {"input_ids": torch.tensor([[1, *[9] * count, 4]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["projector"]))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        expected = own_memory(wrapped)(**inputs).logits
        wrapped.save_pretrained(tmp_path)
        # Trainable like the other: torch takes another product for a frozen weight where its input is a slice.
        again = own_memory(PeftModel.from_pretrained(made(), tmp_path, is_trainable=True))
        assert torch.equal(again(**inputs).logits, expected)
        with wrapped.disable_adapter():
            assert not torch.equal(wrapped(**inputs).logits, expected)
