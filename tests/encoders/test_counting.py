"""Feature counts: every rule and every probe against the encoder itself, and counts that users state."""

import dataclasses
import functools

import catalog
import pytest
import tiny
import torch
import user_parts
from helpers import compose_tiny
from shrunk import built, shrunk
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    TimesFm2_5Config,
    TimesFm2_5Model,
    TimesFmConfig,
    TimesFmModel,
    TimesformerConfig,
    TimesformerModel,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
from transformers.models.minicpmv4_6.configuration_minicpmv4_6 import MiniCPMV4_6VisionConfig
from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from cornstarch_hf import (
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    PrecomputedFeatures,
    PrecomputedFeaturesConfig,
    register_callback,
    register_feature_count,
)
from cornstarch_hf.checkpoints.storage import sync_config
from cornstarch_hf.encoders import counting as feature_counts
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.encoders.item_sizes import typical_item
from cornstarch_hf.encoders.module import ModalEncoderModule
from cornstarch_hf.parts.known_encoders import ALL, ENCODER_TYPES, OWN_TYPES
from cornstarch_hf.parts.registries import CALLBACKS, FEATURE_COUNTS

VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4}


def vit(**changes):
    return ViTModel(ViTConfig(**VIT | {"image_size": 8} | changes)).eval()


def pixels(*size):
    return {"pixel_values": torch.randn(1, 3, *size)}


def images(*sizes):
    return [pixels(*size) | {"interpolate_pos_encoding": True} for size in sizes]


def waves(*lengths):
    return [{"input_values": torch.randn(1, n)} for n in lengths]


def mels(frames, *valid):
    """Sounds of so many frames: whole, then with a mask of so many valid ones each."""
    masks = [{"attention_mask": (torch.arange(frames) < n)[None].long()} for n in valid]
    return [{"input_features": torch.randn(1, 8, frames)} | mask for mask in ({}, *masks)]


def grids(*shapes):
    grid = [torch.tensor([shape]) for shape in shapes]
    return [{"hidden_states": torch.randn(int(g.prod()), 96), "grid_thw": g} for g in grid]


def tokens(*lengths):
    return [{"input_ids": torch.randint(4, 24, (1, n))} for n in lengths]


def series(*lengths):
    return [{"past_values": torch.randn(1, n), "past_values_padding": torch.zeros(1, n).long()} for n in lengths]


def timesfm(model_class, config_class, **changes):
    return built(model_class, shrunk(config_class, patch_length=8, context_length=64, **changes))


def windowed(encoder, *valid):
    """Sounds of three windows of frames, of which so many are valid."""
    frames = 6 * encoder.config.n_window
    sound = torch.randn(1, encoder.config.num_mel_bins, frames)
    return [{"input_features": sound, "input_features_mask": (torch.arange(frames) < n)[None].long()} for n in valid]


def pooled(*sides, most=4):
    """Patches of images of some sides, in squares that become one feature, padded to the most of them."""
    items = []
    for height, width in sides:
        places = torch.full((1, most * 9, 2), -1)
        grid = torch.meshgrid(torch.arange(3 * width), torch.arange(3 * height), indexing="ij")
        places[0, : 9 * height * width] = torch.stack(grid, -1).flatten(0, 1)
        items.append({"pixel_values": torch.randn(1, most * 9, 48), "pixel_position_ids": places})
    return items


def gemma4():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return built(Gemma4VisionModel, Gemma4VisionConfig(**sizes, num_key_value_heads=2, head_dim=16, patch_size=4))


SIZES = [(8, 8), (12, 16), (9, 23)]
# rule -> encoders and the items on which it must be right
CASES = {
    "clip_vision_model": [(tiny.clip(), images(*SIZES)), (tiny.clip(image_size=12, patch_size=3), images((12, 12)))],
    "siglip_vision_model": [(tiny.siglip(), images(*SIZES))],
    "dinov2": [(tiny.dinov2(), [pixels(*size) for size in SIZES])],
    "vit": [(vit(), images(*SIZES)), (vit(image_size=[8, 12], patch_size=[4, 2]), [pixels(8, 12)])],
    "whisper": [(tiny.whisper(max_source_positions=n), mels(2 * n)) for n in (6, 9)],
    "wav2vec2": [(tiny.wav2vec2(), waves(20, 91, 400, 1777)), (tiny.wav2vec2(conv_kernel=(8, 4)), waves(99, 400))],
    "precomputed_features": [
        (
            PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=6)),
            [{"features": torch.randn(1, n, 6)} for n in (1, 9)],
        )
    ],
    "timesfm": [
        (timesfm(TimesFmModel, TimesFmConfig), [x | {"freq": torch.zeros(1, 1).long()} for x in series(8, 40)])
    ],
    "timesfm2_5": [(timesfm(TimesFm2_5Model, TimesFm2_5Config, num_key_value_heads=4), series(8, 40))],
    **{
        config.model_type: [(built(AutoModel.from_config, shrunk(config, pad_token_id=1)), tokens(1, 5, 20))]
        for config in (BertConfig, DebertaV2Config, DistilBertConfig, ModernBertConfig, MPNetConfig, XLMRobertaConfig)
    },
    "esm": [(tiny.esm(), tokens(1, 5, 20))],
    "gemma4_vision": [(gemma4(), pooled((2, 2), (1, 2), (1, 1)))],
    "qwen3_asr_encoder": [
        (catalog.build("Qwen3ASREncoder"), windowed(catalog.build("Qwen3ASREncoder"), 1, 7, 9, 40, 48))
    ],
    "qwen2_vl_vision": [(tiny.qwen2_vl(), grids((1, 4, 4), (1, 2, 8), (3, 4, 6)))],
}


def projected(encoder, inputs):
    with torch.no_grad():
        return sum(len(item) for item in encoder(**inputs).pooler_output)


def counts(model, name, items, live=False):
    """What a counter says, and what the encoder gives."""
    counter = FeatureCounter(model.config, model.encoders if live else None)
    return [counter.count(name, x) for x in items], [projected(model.encoders[name], x) for x in items]


@pytest.fixture
def registered(monkeypatch):
    for registry in (CALLBACKS, FEATURE_COUNTS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def test_every_rule_has_its_cases():
    assert CASES.keys() == {name for name in OWN_TYPES if ENCODER_TYPES[name].count}


@pytest.mark.parametrize("rule", CASES)
def test_rules_are_what_the_encoder_gives(rule):
    for module, items in CASES[rule]:
        encoder = ModalEncoderModule(module)
        for inputs in items:
            raw = module(**inputs)
            given = raw.pooler_output if rule == "qwen2_vl_vision" else raw.last_hidden_state
            assert module.config.model_type == rule
            assert ENCODER_TYPES[rule].count(inputs, module.config) == given.shape[:-1].numel(), encoder.kind


@pytest.mark.parametrize("layer", [0, -1])
def test_valid_frames_of_a_window_are_counted_without_a_run(layer, monkeypatch):
    model = MultimodalModel({"audio": ModalEncoderModule(tiny.whisper(), layer=layer)}, tiny.llama()).eval()
    of_samples = {
        "input_features": torch.randn(1, 8, 12),
        "attention_mask": torch.ones(1, 1600).long(),
    }  # says nothing here
    items = [*mels(12, *range(1, 13)), of_samples]
    real = [projected(model.audio_encoder, x) for x in items]
    monkeypatch.setattr("cornstarch_hf.encoders.counting.dry_run", None)
    assert (
        [FeatureCounter(model.config).count("audio", x) for x in items]
        == real
        == [6, *[(n + 1) // 2 for n in range(1, 13)], 6]
    )


@pytest.mark.parametrize("layer", [0, -2, [1, -1]])
@pytest.mark.parametrize("rule", sorted(name for name in OWN_TYPES if ENCODER_TYPES[name].count_layers == ALL))
def test_rules_hold_at_every_layer_and_cost_no_run(rule, layer, monkeypatch):
    for module, items in CASES[rule]:
        encoder = ModalEncoderModule(module, layer=layer, drop_prefix=int(rule == "clip_vision_model"))
        model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama()).eval()
        real = [projected(model.media_encoder, x) for x in items]
        with monkeypatch.context() as context:
            context.setattr("cornstarch_hf.encoders.counting.dry_run", None)
            counter = FeatureCounter(model.config)
            assert [counter.count("media", x) for x in items] == real
        assert all(shallow for _, shallow in counter._probes), "one layer is enough"


@pytest.mark.parametrize(("layer", "depth"), [(-1, 1), (-2, 2), ([1, -1], 2), (0, 1), (4, 5), (5, 5), ([-6, 2], 5)])
def test_a_run_needs_few_layers(layer, depth):
    config = shrunk(Dinov2WithRegistersConfig, num_hidden_layers=5, num_register_tokens=3, patch_size=4)
    module = built(Dinov2WithRegistersModel, config)
    encoder = ModalEncoderModule(module, layer=layer, drop_prefix=2)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    counter, items = FeatureCounter(model.config), images(*SIZES)
    assert [counter.count("vision", x) for x in items] == [projected(model.vision_encoder, x) for x in items]
    assert {key: probe.module.config.num_hidden_layers for key, probe in counter._probes.items()} == {
        ("vision", True): depth
    }


def test_a_rule_that_does_not_hold_is_replaced_by_a_run():
    module = tiny.wav2vec2(add_adapter=True, num_adapter_layers=1, output_hidden_size=16)
    (inputs,) = waves(1777)
    assert ENCODER_TYPES["wav2vec2"].count(inputs, module.config) is None
    model = MultimodalModel(encoders={"audio": ModalEncoderModule(module)}, language_model=tiny.llama()).eval()
    predicted, real = counts(model, "audio", waves(91, 400, 1777))
    assert predicted == real


PROBED = {
    "convnext": ({}, [pixels(64, 64), pixels(96, 64)]),
    "esm": ({}, [{"input_ids": torch.randint(4, 24, (1, n))} for n in (1, 5, 20)]),
    "qwen2_vl": ({}, grids((1, 4, 4), (2, 4, 6))),
    "clip": ({"layer": -2, "drop_prefix": 1}, images(*SIZES)),
    "dinov2": ({"output": "pooler_output"}, [pixels(8, 8), pixels(12, 8)]),
    "wav2vec2": ({"layer": (0, 1)}, waves(91, 400)),
    "whisper": ({"layer": 0}, [{"input_features": torch.randn(1, 8, 12)}]),
}


@pytest.mark.parametrize("key", PROBED)
@pytest.mark.parametrize("live", [False, True])
def test_a_run_on_shapes_is_what_the_encoder_gives(key, live):
    options, items = PROBED[key]
    name = tiny.ENCODERS[key][0]
    model, _ = compose_tiny([key], **{name: options})
    predicted, real = counts(model, name, items, live)
    assert predicted == real


def test_rules_respect_the_prefix_and_undeclared_callbacks_are_run():
    def halve(inputs, output):
        output.last_hidden_state = output[0][:, ::2]
        return output

    model, _ = compose_tiny(["clip"], vision={"drop_prefix": 1})
    assert counts(model, "vision", images(*SIZES)) == ([4, 12, 10], [4, 12, 10])
    model, _ = compose_tiny(["clip"], vision={"postprocess_projector_callback": halve})
    assert counts(model, "vision", images(*SIZES), live=True) == ([3, 7, 6], [3, 7, 6])


def test_a_name_counts_before_an_encoder_type(registered):
    model, _ = compose_tiny({"left": "clip", "right": "clip"})
    register_feature_count("clip_vision_model", lambda inputs, config: config.hidden_size)
    assert [FeatureCounter(model.config).count(n, images((8, 8))[0]) for n in ("left", "right")] == [16, 16]
    register_feature_count("left", lambda inputs, config: inputs["pixel_values"].shape[-1])
    assert [FeatureCounter(model.config).count(n, images((8, 8))[0]) for n in ("left", "right")] == [8, 16]


@pytest.mark.parametrize("answer", [-1, 2.0, None, True, torch.tensor(3)])
def test_counts_are_natural_numbers(registered, answer):
    model, _ = compose_tiny(["clip"])
    register_feature_count("vision", lambda inputs, config: answer)
    with pytest.raises(ValueError, match=r"vision: the registered feature count must be an integer >= 0, got"):
        FeatureCounter(model.config).count("vision", images((8, 8))[0])


def test_declared_counts_of_callbacks_are_used_without_running_them(registered):
    def repeat(inputs, output, times=2):
        assert not output[0].is_meta, "declared, so never run on shapes"
        output.last_hidden_state = output[0].repeat(1, times, 1)
        return output

    register_callback("repeat", repeat, feature_count=lambda inputs, n, times=2: n * times)
    for callback in (repeat, functools.partial(repeat, times=3)):
        model, _ = compose_tiny(["clip"], vision={"postprocess_projector_callback": callback})
        predicted, real = counts(model, "vision", images(*SIZES), live=True)
        assert predicted == real and predicted[0] == 5 * (2 if callback is repeat else 3)
    model, _ = compose_tiny(["convnext"], vision={"postprocess_projector_callback": repeat})
    assert counts(model, "vision", [pixels(64, 96)], live=True) == ([12], [12])


def test_declared_counts_of_several_callbacks_apply_once_each_in_their_order(registered):
    def double(inputs, output):
        output.last_hidden_state = output[0].repeat(1, 2, 1)
        return output

    def append(inputs, output):
        output.last_hidden_state = torch.cat([output[0], output[0][:, :1]], 1)
        return output

    def narrow(inputs):
        return inputs | {"pixel_values": inputs["pixel_values"][..., :64]}

    register_callback("double", double, feature_count=lambda inputs, n: n * 2)
    register_callback("append", append, feature_count=lambda inputs, n: n + 1)
    register_callback("narrow", narrow)
    both = {"postprocess_module_callback": double, "postprocess_projector_callback": append}
    for key, options, items in (
        ("clip", both, images(*SIZES)),
        ("clip", both | {"drop_prefix": 1}, images(*SIZES)),
        ("convnext", both, [pixels(64, 96)]),
        ("convnext", both | {"preprocess_callback": narrow}, [pixels(64, 128)]),
    ):
        model, _ = compose_tiny([key], vision=options)
        sync_config(model, model.config, model.encoders, model.language_model)  # as a checkpoint has it
        for live in (False, True):
            predicted, real = counts(model, "vision", items, live)
            assert predicted == real


def test_a_callback_that_reads_values_must_state_its_count():
    def largest(inputs, output):
        output.last_hidden_state = output[0][:, : int(output[0].max()) + 1]
        return output

    model, _ = compose_tiny(["clip"], vision={"postprocess_projector_callback": largest})
    message = r"vision: .*\(1, 3, 8, 8\).*CLIPVisionModel.*register_feature_count\('vision', fn\)"
    with pytest.raises(ValueError, match=message):
        FeatureCounter(model.config, model.encoders).count("vision", images((8, 8))[0])


def test_counting_needs_no_weights_and_is_remembered():
    model, _ = compose_tiny(["convnext"])
    counter, before = FeatureCounter(model.config), model.config.to_dict()
    item = pixels(64, 64)
    assert counter.count("vision", item) == counter.count("vision", {"pixel_values": item["pixel_values"] + 1}) == 4
    assert len(counter._cache) == 1 and model.config.to_dict() == before
    (probe,) = counter._probes.values()
    assert all(p.is_meta for p in probe.parameters())


def test_typical_items_have_the_shape_that_the_configuration_fixes():
    shapes = {k: typical_item(tiny.ENCODERS[k][1]().config, "image") for k in ("clip", "whisper", "esm")}
    assert shapes["clip"]["pixel_values"].shape == (1, 3, 8, 8) and shapes["esm"] is None
    assert shapes["whisper"]["input_features"].shape == (1, 8, 12) and shapes["clip"]["pixel_values"].is_meta


# ---- token reduction

RESAMPLER = {"num_queries": 3, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
REDUCTIONS = [
    {"projection_type": "pixel_shuffle", "remainder": "pad"},
    {"projection_type": "frame_stack", "stack_factor": 3},
    {"projection_type": "avg_pool"},
    {"projection_type": "conv"},
    {"projection_type": "resampler", **RESAMPLER},
    {"projection_type": "users_halving"},
    {"projection_type": "users_rows"},
]
ITEMS = {
    "clip": ({"drop_prefix": 1}, images(*SIZES)),
    "siglip": ({}, images(*SIZES)),
    "dinov2": ({"drop_prefix": 1}, [pixels(*size) for size in SIZES]),
    "convnext": ({}, [pixels(64, 64), pixels(96, 160)]),
    "qwen2_vl": ({}, grids((1, 4, 4), (1, 2, 8), (3, 4, 6))),
    "whisper": ({}, [{"input_features": torch.randn(1, 8, 12)}]),
    "wav2vec2": ({}, waves(20, 91, 400, 1777)),
    "esm": ({}, [{"input_ids": torch.randint(4, 24, (1, n))} for n in (2, 5, 20)]),
}
PLANE = ("pixel_shuffle", "users_rows")


def reducing(key, fields, **options):
    name = tiny.ENCODERS[key][0]
    projector = MultimodalProjector(MultimodalProjectorConfig(**fields))
    encoder = ModalEncoderModule(tiny.ENCODERS[key][1](), projector, **ITEMS[key][0] | options)
    return MultimodalModel(encoders={name: encoder}, language_model=tiny.llama()).eval(), name


def test_every_encoder_has_its_items():
    assert ITEMS.keys() == tiny.ENCODERS.keys()


@pytest.mark.parametrize("fields", REDUCTIONS, ids=lambda f: f["projection_type"])
@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_reductions_of_every_encoder(key, fields):
    model, name = reducing(key, fields)
    items = ITEMS[key][1]
    if fields["projection_type"] in PLANE and tiny.ENCODERS[key][0] != "vision":
        for fails in (FeatureCounter(model.config).count, lambda name, item: projected(model.encoders[name], item)):
            with pytest.raises(
                ValueError, match=rf"{name}: the projector \({fields['projection_type']}\).*not in a grid"
            ):
                fails(name, items[0])
        return
    for live in (False, True):
        predicted, real = counts(model, name, items, live)
        assert predicted == real and sum(real) > 0
    plain, _ = counts(compose_tiny([key], **{name: ITEMS[key][0]})[0], name, items)
    if fields["projection_type"] != "resampler":
        assert all(a < b or b == 1 for a, b in zip(predicted, plain, strict=True))


@pytest.mark.parametrize("fields", REDUCTIONS[:5], ids=lambda f: f["projection_type"])
@pytest.mark.parametrize("key", ["clip", "qwen2_vl", "wav2vec2"])
def test_reductions_are_counted_by_rule_where_there_is_one(monkeypatch, key, fields):
    if fields["projection_type"] in PLANE and key == "wav2vec2":
        fields = REDUCTIONS[1]
    model, name = reducing(key, fields)
    expected = [projected(model.encoders[name], item) for item in ITEMS[key][1]]
    monkeypatch.setattr(feature_counts, "dry_run", lambda *_: pytest.fail("an encoder was run on shapes"))
    for live in (None, model.encoders):
        counter = FeatureCounter(model.config, live)
        assert [counter.count(name, item) for item in ITEMS[key][1]] == expected


@pytest.mark.parametrize("fields", REDUCTIONS, ids=lambda f: f["projection_type"])
def test_callbacks_count_before_and_after_the_reduction(registered, fields):
    register_callback("counted_drop", without_first, feature_count=lambda inputs, n: n - 1)
    register_callback("counted_end", with_an_end, feature_count=lambda inputs, n: n + 1)
    both = {"postprocess_module_callback": without_first, "postprocess_projector_callback": with_an_end}
    model, name = reducing("clip", fields, **both, drop_prefix=0)
    sync_config(model, model.config, model.encoders, model.language_model)
    for live in (False, True):
        predicted, real = counts(model, name, images(*SIZES), live)
        assert predicted == real
    alone, _ = counts(reducing("clip", fields)[0], name, images(*SIZES))
    assert predicted == [count + 1 for count in alone]


def without_first(inputs, output):
    output.last_hidden_state = output[0][:, 1:]
    return output


def with_an_end(inputs, output):
    output.last_hidden_state = torch.cat([output[0], output[0][:, -1:]], 1)
    return output


def test_a_registered_count_includes_the_reduction(registered):
    register_feature_count("vision", lambda inputs, config: 77)
    model, name = reducing("clip", REDUCTIONS[0])
    assert FeatureCounter(model.config).count(name, ITEMS["clip"][1][0]) == 77


def test_an_item_that_does_not_fit_is_refused_with_both_numbers():
    model, name = reducing("clip", {"projection_type": "pixel_shuffle"})
    with pytest.raises(
        ValueError, match=r"vision: scale_factor=2 does not divide 3 features along an axis \(1 would be left\)"
    ):
        FeatureCounter(model.config).count(name, images((12, 16))[0])
    model, name = reducing("clip", {"projection_type": "pixel_shuffle"}, drop_prefix=0)
    with pytest.raises(
        ValueError, match=r"vision: .*5 features do not fill the grid of 2 x 2 = 4 patches, 1 too many.*drop_prefix=1"
    ):
        FeatureCounter(model.config).count(name, images((8, 8))[0])


def test_a_projection_that_reads_values_must_state_its_count(registered):
    class Largest(user_parts.Halving):
        def forward(self, x):
            return self.linear(x[:, : int(x.abs().max()) + 1])

    class Counted(Largest):
        def feature_count(self, length, grid):
            return 1

    encoder = ModalEncoderModule(tiny.clip(), MultimodalProjector(MultimodalProjectorConfig(), Largest(16, 32)))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    message = r"vision: what Largest leaves of 5 features .*method feature_count\(length, grid\).*register_feature_count\('vision', fn\)"
    with pytest.raises(ValueError, match=message):
        FeatureCounter(model.config, model.encoders).count("vision", images((8, 8))[0])
    encoder = ModalEncoderModule(tiny.clip(), MultimodalProjector(MultimodalProjectorConfig(), Counted(16, 32)))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    assert FeatureCounter(model.config, model.encoders).count("vision", images((8, 8))[0]) == 1


def counted(encoder, inputs):
    """Features by the counter and by the encoder, of each item alone."""
    model = MultimodalModel(encoders={"media": encoder}, language_model=tiny.llama()).eval()
    counter = FeatureCounter(model.config)
    with torch.no_grad():
        alone = [model.media_encoder(**one).pooler_output for one in inputs]
    return [counter.count("media", one) for one in inputs], [[len(x) for x in features] for features in alone]


def test_a_window_with_a_mask_counts_what_is_sound():
    frames = torch.arange(12)[None]
    inputs = [{"input_features": torch.randn(1, 8, 12), "attention_mask": (frames < n).long()} for n in (12, 7)]
    assert counted(ModalEncoderModule(tiny.whisper()), inputs) == ([6, 4], [[6], [4]])


def test_videos_whose_frames_are_rows_of_their_own_are_one_item_each():
    config = TimesformerConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                               patch_size=4, num_frames=3, attention_type="space_only")  # fmt: skip
    encoder = ModalEncoderModule(TimesformerModel(config).eval(), drop_prefix=1)
    videos = torch.randn(2, 3, 3, 8, 8)
    assert counted(encoder, [{"pixel_values": x[None]} for x in videos]) == ([12, 12], [[12], [12]])
    with torch.no_grad():
        features = encoder(pixel_values=videos).pooler_output
        rows = encoder.projector(encoder.module(videos).last_hidden_state[:, 1:], return_dict=True).last_hidden_state
    assert torch.equal(torch.cat(features), rows.flatten(0, 1))


def test_packed_features_have_no_prefix_to_drop():
    encoder = ModalEncoderModule(tiny.qwen2_vl(), drop_prefix=1)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    item = {"hidden_states": torch.randn(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(ValueError, match="drop_prefix=1 needs features of shape"):
        FeatureCounter(model.config).count("vision", item)


@pytest.mark.parametrize(("layer", "features"), [(0, 4), (1, 4), (5, 16)])
def test_layers_that_are_told_apart_by_their_number_are_not_left_out(layer, features):
    config = MiniCPMV4_6VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32,
                                     patch_size=8, insert_layer_id=layer)  # fmt: skip
    encoder = ModalEncoderModule(MiniCPMV4_6VisionModel(config).eval())
    item = {"pixel_values": torch.randn(1, 3, 8, 128), "target_sizes": torch.tensor([[4, 4]])}
    assert counted(encoder, [item]) == ([features], [[features]])


def test_few_layers_do_where_single_ones_make_no_difference():
    config = Qwen2_5_VLVisionConfig(hidden_size=16, intermediate_size=16, depth=4, num_heads=2, out_hidden_size=8, patch_size=4,
                                    window_size=16, fullatt_block_indexes=[3])  # fmt: skip
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(Qwen2_5_VisionTransformerPretrainedModel(config))},
                            language_model=tiny.llama())  # fmt: skip
    counter = FeatureCounter(model.config)
    for rows in (4, 8):
        item = {"hidden_states": torch.randn(4 * rows, 96), "grid_thw": torch.tensor([[1, rows, 4]])}
        assert counter.count("vision", item) == rows
    assert counter._few_layers == {"vision": True}


def test_an_adapter_that_masks_its_own_features_is_counted_and_batches_are_as_alone():
    case = catalog.cases()["Wav2Vec2BertModel"]
    changes = {**case.changes, "add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 24}
    encoder = ModalEncoderModule(catalog.build("Wav2Vec2BertModel", dataclasses.replace(case, changes=changes)))
    items = catalog.together("Wav2Vec2BertModel")
    counts, lengths = counted(encoder, items)
    assert counts == [n for (n,) in lengths] and len(set(counts)) == 3
    with torch.no_grad():
        together = encoder(**catalog.joined("Wav2Vec2BertModel", items)).pooler_output
        for one, item in zip(together, items, strict=True):
            torch.testing.assert_close(one, encoder(**item).pooler_output[0], atol=1e-5, rtol=1e-4)


def test_more_is_dropped_than_there_is():
    _, processor = compose_tiny(["clip"], vision={"drop_prefix": 99})
    with pytest.raises(ValueError, match="vision, item 0: drop_prefix=99 needs items of more tokens than that, got 5"):
        processor(text="<image>", images=tiny.image())


@pytest.mark.parametrize("change", [{"image_size": -1}, {"patch_size": 0}])
def test_settings_with_which_nothing_can_be_counted(change):
    _, processor = compose_tiny(["clip"])
    vars(processor.config.vision_config).update(change)
    processor.counter = FeatureCounter(processor.config)
    with pytest.raises(ValueError, match=r"vision.*(features cannot be counted by vision_config|cannot be built)"):
        processor(text="<image>", images=tiny.image())


def test_a_missing_input_by_which_a_rule_counts_is_named():
    _, processor = compose_tiny(["whisper"])
    with pytest.raises(ValueError, match=r"audio: features cannot be counted .* inputs in audio_modality \(KeyError"):
        processor.counter.count("audio", {"features": torch.zeros(1, 8, 12)})
