"""Encoders: selection, callbacks, towers, lengths, gradients."""

import catalog
import pytest
import tiny
import torch
from helpers import needs_5_23
from transformers import (
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.vit.modeling_vit import ViTPreTrainedModel
from transformers.utils import ModelOutput

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProjector, MultimodalProjectorConfig
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.projectors.projector import per_item


def encoder(model=None, width=16, **options):
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=width, out_features=8))
    return ModalEncoderModule(model or tiny.clip(), projector, **options).eval()


PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("layer", "drop"), [(-1, 0), (-2, 1), (0, 0), (2, 3)])
def test_layer_and_prefix(layer, drop):
    made = encoder(layer=layer, drop_prefix=drop)
    raw = made.module(PIXELS, output_hidden_states=True)
    chosen = raw.last_hidden_state if layer == -1 else raw.hidden_states[layer]
    expected = made.projector(chosen[:, drop:]).last_hidden_state
    output = made(pixel_values=PIXELS)
    assert torch.equal(torch.stack(output.pooler_output), expected)
    assert torch.equal(output.last_hidden_state, raw.last_hidden_state)


def test_several_layers_are_concatenated():
    made = encoder(width=32, layer=[-2, 1])
    states = made.module(PIXELS, output_hidden_states=True).hidden_states
    expected = made.projector(torch.cat([states[-2], states[1]], -1)).last_hidden_state
    assert torch.equal(torch.stack(made(pixel_values=PIXELS).pooler_output), expected)


def test_output_field():
    made = encoder(output="pooler_output")
    assert [tuple(x.shape) for x in made(pixel_values=PIXELS).pooler_output] == [(1, 8)] * 2
    with pytest.raises(ValueError, match=r"no tensor 'logits'.*last_hidden_state"):
        encoder(output="logits")(pixel_values=PIXELS)


def test_maps_are_flattened_and_packs_are_split():
    pixels = torch.randn(2, 3, 64, 64)
    made = encoder(tiny.convnext(), width=20)
    raw = made.module(pixels).last_hidden_state
    expected = made.projector(raw.flatten(2).transpose(1, 2)).last_hidden_state
    assert torch.equal(torch.stack(made(pixel_values=pixels).pooler_output), expected)
    packed, grid = torch.randn(4 * 4 + 4 * 8, 96), torch.tensor([[1, 4, 4], [1, 4, 8]])
    made = encoder(tiny.qwen2_vl(), width=24)
    merged = made.module(packed, grid_thw=grid).pooler_output
    output = made(hidden_states=packed, grid_thw=grid).pooler_output
    assert [len(x) for x in output] == [4, 8]
    assert torch.equal(torch.cat(output), made.projector(merged).last_hidden_state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": -9}, "layer -9 does not exist.*4 hidden states"),
        ({"layer": -2, "drop_prefix": 5}, "drop_prefix=5.*5"),
    ],
)
def test_selections_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)(pixel_values=PIXELS)


def test_an_encoder_whose_width_is_another_than_the_projectors():
    with pytest.raises(ValueError, match="width 12, the encoder gave 16"):
        encoder(width=12)(pixel_values=PIXELS)


@pytest.mark.parametrize("key", ["wav2vec2", "esm"])
def test_padded_items_give_what_they_give_alone(key):
    if key == "wav2vec2":
        made, name = encoder(tiny.wav2vec2()), "input_values"
        items = [torch.randn(n) for n in (400, 231, 400, 90)]
    else:
        made, name = encoder(tiny.esm()), "input_ids"
        items = [torch.randint(4, 24, (n,)) for n in (9, 4, 9, 2)]
    batch = torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=1)
    mask = torch.stack([(torch.arange(batch.shape[1]) < len(x)).long() for x in items])
    together = made(**{name: batch, "attention_mask": mask}).pooler_output
    for item, features in zip(items, together, strict=True):
        alone = made(**{name: item[None]}).pooler_output[0]
        assert features.shape == alone.shape
        torch.testing.assert_close(features, alone, atol=1e-6, rtol=1e-5)


def test_left_padding_of_items_is_refused():
    with pytest.raises(ValueError, match="padded on the right"):
        encoder(tiny.esm())(
            input_ids=torch.ones(2, 4).long(), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        )


# One of each way in which items lie in a batch: beside each other in one row, padded and reading it, in frames, merged otherwise,
# a stack of layers, channels first, maps with channels last, text whose neighbours matter.
FORMS = ("PixtralVisionModel", "Speech2TextEncoder", "Qwen2_5OmniAudioEncoder", "HunYuanVLVisionTransformer", "BridgeTowerVisionModel",
         pytest.param("MimiEncoderModel", marks=needs_5_23), "Sam2VisionModel", "CanineModel", "Kimi_K25VisionModel", "Gemma3nAudioEncoder")  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_items_in_a_batch_give_what_they_give_alone_however_they_lie_in_it(name):
    case = catalog.cases()[name]
    made = ModalEncoderModule(catalog.build(name), kind=case.kind, **case.module_kwargs)
    model = MultimodalModel(encoders={"media": made}, language_model=tiny.llama()).eval()
    items = catalog.together(name)
    with torch.no_grad():
        alone = [model.media_encoder(**item).pooler_output for item in items]
        together = model.media_encoder(**catalog.joined(name, items)).pooler_output
    assert [len(one) for one in alone] == [1] * len(items) and len(together) == len(items)
    for got, (expected,) in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert [FeatureCounter(model.config).count("media", item) for item in items] == [len(one[0]) for one in alone]


def test_a_data_format_of_ones_own_is_kept_and_a_wrong_one_refused():
    made = ModalEncoderModule(tiny.convnext(), data_format="channels_first")
    model = MultimodalModel(encoders={"vision": made}, language_model=tiny.llama())
    assert model.config.vision_modality["data_format"] == "channels_first"
    assert MultimodalModel(model.config).vision_encoder.selection.data_format == "channels_first"
    with pytest.raises(ValueError, match="data_format must be one of .*'layers_first'.* or None, got 'first'"):
        ModalEncoderModule(tiny.convnext(), data_format="first")


# ---- callbacks


def test_callbacks_run_in_order_on_what_the_document_says():
    seen = []

    def before(inputs):
        assert isinstance(inputs, dict)
        seen.append(("preprocess", sorted(inputs)))
        return inputs | {"pixel_values": inputs["pixel_values"] * 2}

    def after_module(inputs, output):
        assert isinstance(output, ModelOutput) and output[0] is output.last_hidden_state
        assert torch.equal(inputs["pixel_values"], PIXELS * 2) and inputs["speaker"] == 7
        seen.append(("module", tuple(output[0].shape)))
        output.last_hidden_state = output[0][:, 1:]
        return output

    def after_projector(inputs, output):
        seen.append(("projector", tuple(output[0].shape)))
        return output

    made = encoder(
        additional_args=["speaker"],
        preprocess_callback=before,
        postprocess_module_callback=after_module,
        postprocess_projector_callback=after_projector,
    )
    output = made(pixel_values=PIXELS, speaker=7)
    assert seen == [("preprocess", ["pixel_values", "speaker"]), ("module", (2, 5, 16)), ("projector", (2, 4, 8))]
    expected = made.projector(made.module(PIXELS * 2).last_hidden_state[:, 1:]).last_hidden_state
    assert torch.equal(torch.stack(output.pooler_output), expected)


def test_the_second_name_of_the_module_callback():
    def cut(inputs, output):
        output.last_hidden_state = output[0][:, :2]
        return output

    assert len(encoder(postprocess_encoder_callback=cut)(pixel_values=PIXELS).pooler_output[0]) == 2
    with pytest.raises(ValueError, match="two names of one argument"):
        encoder(postprocess_encoder_callback=cut, postprocess_module_callback=cut)


def test_callbacks_get_tuples_where_the_encoder_returns_tuples():
    def cut(inputs, output):
        assert isinstance(output, tuple)
        return (output[0][:, :3], *output[1:])

    clip = tiny.clip()
    clip.config.return_dict = False
    made = encoder(
        clip, postprocess_module_callback=cut, postprocess_projector_callback=lambda i, o: ([o[0][0], o[0][1][:1]],)
    )
    assert [len(x) for x in made(pixel_values=PIXELS).pooler_output] == [3, 1]


def test_concatenated_features_need_their_lengths():
    def pack(inputs, output, lengths=None):
        output.last_hidden_state = torch.cat([output[0][0], output[0][1][:2]])
        if lengths:
            output["feature_lens"] = torch.tensor(lengths)
        return output

    with pytest.raises(ValueError, match="feature_lens"):
        encoder(postprocess_projector_callback=pack)(pixel_values=PIXELS)
    made = encoder(postprocess_projector_callback=lambda i, o: pack(i, o, [5, 2]))
    assert [len(x) for x in made(pixel_values=PIXELS).pooler_output] == [5, 2]
    wrong = encoder(postprocess_projector_callback=lambda i, o: pack(i, o, [5, 3]))
    with pytest.raises(ValueError, match=r"\[5, 3\]"):
        wrong(pixel_values=PIXELS)


@pytest.mark.parametrize(("projection_type", "side"), [("linear", 2), ("pixel_shuffle", 1), ("avg_pool", 1)])
def test_a_module_callback_may_write_into_what_it_is_given(projection_type, side):
    def without_cls(inputs, output):
        output.last_hidden_state = output[0][:, 1:]
        return output

    clip, config = (
        tiny.clip(),
        MultimodalProjectorConfig(projection_type=projection_type, in_features=16, out_features=8),
    )
    projector = MultimodalProjector(config)
    ways = {"postprocess_module_callback": without_cls}, {"drop_prefix": 1}
    written, dropped = (
        ModalEncoderModule(clip, projector, **way).eval()(say=("grids",), pixel_values=PIXELS) for way in ways
    )
    assert written.feature_grids.tolist() == dropped.feature_grids.tolist() == [[side, side]] * 2
    assert all(map(torch.equal, written.pooler_output, dropped.pooler_output))


@pytest.mark.parametrize("field", ["last_hidden_state", "pooler_output"])
def test_a_projector_callback_gives_features_in_the_first_field(field):
    made = encoder()
    before = made(pixel_values=PIXELS).pooler_output
    made.postprocess_projector_callback = lambda inputs, output: type(output)(**{field: output[0] * 2})
    assert all(torch.equal(2 * a, b) for a, b in zip(before, made(pixel_values=PIXELS).pooler_output, strict=True))


@pytest.mark.parametrize(
    "slot", ["preprocess_callback", "postprocess_module_callback", "postprocess_projector_callback"]
)
def test_callbacks_that_return_nothing_or_are_none(slot):
    made = encoder(**{slot: lambda *_: None})
    with pytest.raises(TypeError, match=f"{slot} must return"):
        made(pixel_values=PIXELS)
    with pytest.raises(TypeError, match=f"{slot} must be callable"):
        encoder(**{slot: 3})


# ---- towers and kinds


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_kinds(key):
    kind = {"vision": "image", "audio": "audio", "protein": "text"}[tiny.ENCODERS[key][0]]
    assert ModalEncoderModule(tiny.ENCODERS[key][1]()).kind == kind
    assert ModalEncoderModule(tiny.ENCODERS[key][1](), kind="video").kind == "video"


def test_towers_of_composite_and_headed_models():
    config = tiny.whisper().config
    for cls in (WhisperModel, WhisperForConditionalGeneration):
        whole = cls(config)
        assert ModalEncoderModule(whole).module is whole.get_encoder()
    headed = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    assert ModalEncoderModule(module=headed).module is headed.vit
    ctc = Wav2Vec2ForCTC(
        Wav2Vec2Config(**{k: v for k, v in tiny.wav2vec2().config.to_dict().items() if k != "vocab_size"})
    )
    assert ModalEncoderModule(ctc).module is ctc.wav2vec2
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    whole = CLIPModel(CLIPModel.config_class(text_config=text, vision_config=tiny.clip().config.to_dict()))
    assert ModalEncoderModule(whole).module is whole.vision_model


def test_what_is_no_encoder():
    with pytest.raises(TypeError, match="the class ViTModel"):
        ModalEncoderModule(ViTModel)
    with pytest.raises(TypeError, match="ViTPreTrainedModel is abstract.*ViTModel"):
        ModalEncoderModule(ViTPreTrainedModel(ViTConfig()))
    for nothing in (None, torch.nn.Linear(2, 2), "openai/clip"):
        with pytest.raises(TypeError, match="PreTrainedModel as the encoder"):
            ModalEncoderModule(nothing)
    with pytest.raises(ValueError, match="model= and module="):
        ModalEncoderModule(tiny.clip(), module=tiny.clip())
    with pytest.raises(TypeError, match=r"MultimodalProjector\(MultimodalProjectorConfig\(\), projection=module\)"):
        ModalEncoderModule(tiny.clip(), torch.nn.Linear(16, 8))


# ---- gradients and dtypes


def test_a_frozen_encoder_runs_without_gradients():
    made = encoder()
    made.module.requires_grad_(False)
    modes = []
    made.module.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    made(pixel_values=PIXELS).pooler_output[0].sum().backward()
    assert modes == [False] and made.projector.projection.weight.grad is not None
    made.module.embeddings.requires_grad_(True)
    made(pixel_values=PIXELS)
    asked = PIXELS.clone().requires_grad_(True)
    made.module.requires_grad_(False)
    made(pixel_values=asked).pooler_output[0].sum().backward()
    assert modes == [False, True, True] and asked.grad is not None


@pytest.mark.parametrize("key", ["whisper", "clip", "wav2vec2"])
def test_float32_inputs_for_a_bfloat16_encoder(key):
    shapes = {
        "whisper": ("input_features", (1, 8, 12)),
        "clip": ("pixel_values", (1, 3, 8, 8)),
        "wav2vec2": ("input_values", (1, 400)),
    }
    made = encoder(tiny.ENCODERS[key][1]()).bfloat16()
    name, shape = shapes[key]
    assert made(**{name: torch.randn(shape)}).pooler_output[0].dtype is torch.bfloat16


def test_layers_before_pooling_keep_all_that_is_sound():
    module = catalog.build("AudioFlamingo3Encoder")
    item = catalog.item("AudioFlamingo3Encoder", 1)
    assert item["input_features_mask"].sum() == 20
    with torch.no_grad():
        states = module(**item, output_hidden_states=True).hidden_states
        for layer, valid in ((-1, 5), (-2, 10)):
            output = ModalEncoderModule(module, layer=layer).select(**item)
            assert output.lengths == [valid] and (layer == -1 or torch.equal(output[0], states[-2]))


def test_a_mask_of_ones_is_not_left_out():
    module, item = catalog.build("MoonshineStreamingEncoder"), catalog.item("MoonshineStreamingEncoder", 0)
    with torch.no_grad():
        windowed = module(**item).last_hidden_state
        assert not torch.allclose(windowed, module(input_values=item["input_values"]).last_hidden_state)
        assert torch.equal(ModalEncoderModule(module).select(**item)[0], windowed)


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "ParakeetEncoder", "Gemma3nAudioEncoder"])
def test_a_prefix_is_dropped_of_padded_items_as_of_each_alone(name):
    encoder = ModalEncoderModule(catalog.build(name), drop_prefix=1)
    items = catalog.together(name)
    with torch.no_grad():
        output = encoder.select(**catalog.joined(name, items))
        together = per_item(output[0], output.lengths, name)
        for one, item in zip(together, items, strict=True):
            (alone,) = encoder.select(**item)[0]
            torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-4)
    assert len({len(one) for one in together}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"additional_args": "speaker"}, "additional_args must be a list of names of arguments, got 'speaker'"),
        ({"additional_args": [1]}, r"additional_args must be a list of names of arguments, got \[1\]"),
        ({"trim": "no"}, "trim must be True or False, got 'no'"),
        ({"trim": 1}, "trim must be True or False, got 1"),
    ],
)
def test_options_of_other_types_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        ModalEncoderModule(tiny.whisper(), **options)
