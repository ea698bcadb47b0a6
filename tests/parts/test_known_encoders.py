"""Rows of encoder types: users add theirs, checkpoints name them; encoders that draw give the same features each time."""

import dataclasses
import json
from types import SimpleNamespace

import catalog
import pytest
import tiny
import torch
import typed_parts
import user_parts
from transformers import AutoModel, AutoProcessor, BertConfig, InformerConfig, InformerModel

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    register_encoder_type,
    register_feature_count,
)
from cornstarch_hf.encoders.building import width_is_configured
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.encoders.towers import infer_kind
from cornstarch_hf.hub.card_facts import _item
from cornstarch_hf.parts.known_encoders import (
    ENCODER_TYPES,
    OWN_TYPES,
    EncoderType,
    check_facts_registered,
    deterministic_inputs,
    encoder_type,
)
from cornstarch_hf.parts.registries import FEATURE_COUNTS
from cornstarch_hf.processing.texts import position_limit
from cornstarch_hf.processing.video import check_frame_count

CASES = {"vit_mae": "ViTMAEModel"}


def test_every_row_has_its_case():
    assert CASES.keys() == {name for name in OWN_TYPES if ENCODER_TYPES[name].random_input}


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_an_item_gives_the_same_features_each_time_in_their_order(size):
    encoder = ModalEncoderModule(catalog.build("ViTMAEModel"))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    pixels = {"pixel_values": torch.randn(2, 3, *size), "interpolate_pos_encoding": True}
    patches = (size[0] // 8) * (size[1] // 8)
    with torch.no_grad():
        first = encoder(**pixels).pooler_output
        second = encoder(**pixels).pooler_output
        shuffled = torch.arange(patches).flip(0).float().expand(2, -1)
        backwards = encoder(**pixels, noise=shuffled).last_hidden_state
        plain = encoder.module(**pixels, noise=shuffled.flip(1)).last_hidden_state
    assert [len(x) for x in first] == [patches + 1] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(encoder(**pixels).last_hidden_state, plain), "patches in their order"
    assert not torch.equal(backwards, plain), "noise that is given wins"
    assert (
        FeatureCounter(model.config).count(
            "vision", {k: v[:1] if k == "pixel_values" else v for k, v in pixels.items()}
        )
        == patches + 1
    )


def test_an_encoder_that_leaves_out_a_part_by_chance_is_refused_unless_it_is_given_the_noise():
    module = catalog.build("ViTMAEModel")
    module.config.mask_ratio = 0.75
    with pytest.raises(
        ValueError, match=r"ViTMAEModel leaves out 75% .*drawn at random.*config\.mask_ratio = 0, or pass `noise`"
    ):
        ModalEncoderModule(module)
    encoder = ModalEncoderModule(module, additional_args=["noise"])
    assert "noise" in encoder.parameter_names


def test_others_get_nothing():
    assert deterministic_inputs({"pixel_values": torch.zeros(1, 3, 8, 8)}, tiny.clip().config) == {}


def test_an_encoder_that_drops_values_at_random_is_refused():
    case = catalog.cases()["SpeechT5DecoderWithSpeechPrenet"]
    module = catalog.build("SpeechT5DecoderWithSpeechPrenet", case)
    ModalEncoderModule(module)
    module.config.speech_decoder_prenet_dropout = 0.5
    with pytest.raises(ValueError, match=r"drops 50% .* set its config.speech_decoder_prenet_dropout = 0"):
        ModalEncoderModule(module)


def test_attention_to_keys_drawn_at_random_is_refused():
    sizes = {
        "prediction_length": 4,
        "context_length": 8,
        "d_model": 16,
        "lags_sequence": [1],
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    with pytest.raises(
        ValueError, match=r"Informer\w+ attends to keys that are drawn at random.*attention_type='full'"
    ):
        ModalEncoderModule(InformerModel(InformerConfig(**sizes)))
    whole = ModalEncoderModule(InformerModel(InformerConfig(**sizes, attention_type="full"))).eval()
    inputs = {"inputs_embeds": torch.randn(1, 8, whole.module.config.feature_size)}
    assert torch.equal(whole.select(**inputs).last_hidden_state, whole.select(**inputs).last_hidden_state)


# ---- rows that users add

TYPE = "users_strip_encoder"
CALL = (
    rf"register_encoder_type\('{TYPE}', count=\.\.\., width_layers=\.\.\., kind=\.\.\., any_number_of_frames=\.\.\.\)"
)


@pytest.fixture
def registered(monkeypatch):
    for registry in (ENCODER_TYPES, FEATURE_COUNTS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def strip_model():
    encoder = ModalEncoderModule(typed_parts.StripEncoder(typed_parts.StripConfig()))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    return model, MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS["clip"][2]()}, model=model)


def test_the_facts_of_a_users_type_are_used(registered):
    model, processor = strip_model()
    assert model.vision_encoder.kind == "image", "its class says something else"
    inputs = processor(text="a <image> b", images=tiny.ENCODERS["clip"][3](0), return_tensors="pt")
    (features,) = model.vision_encoder(pixel_values=inputs["pixel_values"]).pooler_output
    assert len(features) == inputs["pixel_values"].shape[-1] // 4 == model.config.vision_config.patch // 2
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]
    register_feature_count(TYPE, lambda inputs, config: 77)
    assert FeatureCounter(model.config).count("vision", {"pixel_values": torch.randn(1, 3, 8, 8)}) == 77


@pytest.mark.parametrize("answer", [-1, 2.5, True])
def test_the_count_of_a_users_type_is_a_natural_number(registered, answer):
    register_encoder_type("users_patch_encoder", count=lambda inputs, config: answer)
    encoder = ModalEncoderModule(user_parts.PatchEncoder(user_parts.PatchConfig()))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    with pytest.raises(ValueError, match=r"vision: the count of 'users_patch_encoder' must be an integer >= 0, got"):
        FeatureCounter(model.config).count("vision", {"pixel_values": torch.randn(1, 3, 8, 8)})


def test_each_fact_has_its_effect(registered):
    config = BertConfig(max_position_embeddings=64, pad_token_id=3)
    config.model_type, config.num_frames = "users_all", 4
    assert not width_is_configured(config, -1) and position_limit(tiny.tokenizer(), config) == 64
    with pytest.raises(ValueError, match="3 frames are left, but the encoder takes 4"):
        check_frame_count(3, config, "film", 0)
    facts = {
        "width_layers": "last",
        "padding_changes_features": True,
        "positions_after_padding": True,
        "example_text": "MKV",
    }
    noise = {
        "random_input": "noise",
        "fixed_input": lambda inputs, config: torch.zeros(2),
        "random_loss": lambda config: "forgets: x",
    }
    register_encoder_type("users_all", any_number_of_frames=True, **facts, **noise)
    assert width_is_configured(config, -1) and not width_is_configured(config, -2)
    assert position_limit(tiny.tokenizer(), config) == 60
    check_frame_count(3, config, "film", 0)
    encoder = SimpleNamespace(kind="text", module=SimpleNamespace(config=config), additional_args=())
    assert _item(encoder, object()) == {"text": '"MKV"'}
    assert deterministic_inputs({}, config)["noise"].tolist() == [0, 0]
    module = tiny.esm()
    module.config.model_type = "users_all"
    with pytest.raises(ValueError, match=r"EsmModel forgets: x\."):
        ModalEncoderModule(module)
    ModalEncoderModule(module, additional_args=["noise"])
    register_encoder_type("users_codes", no_features="codes: take another")
    module.config.model_type = "users_codes"
    with pytest.raises(ValueError, match="EsmModel gives no features but codes: take another"):
        ModalEncoderModule(module)
    register_encoder_type("users_kind", kind="protein")
    module.config.model_type = "users_kind"
    assert infer_kind(module) == "protein"


def test_items_of_a_type_that_reads_padding_are_encoded_by_length(registered):
    def lengths_seen():
        case, seen = catalog.cases()["Wav2Vec2BertModel"], []
        module = catalog.build("Wav2Vec2BertModel", case)
        module.config.model_type = "users_sounds"
        hook = module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(len(kwargs["input_features"])), with_kwargs=True
        )
        items = catalog.together("Wav2Vec2BertModel")
        with torch.no_grad():
            ModalEncoderModule(module).select(**catalog.joined("Wav2Vec2BertModel", items))
        hook.remove()
        return seen

    assert lengths_seen() == [3]
    register_encoder_type("users_sounds", padding_changes_features=True)
    assert lengths_seen() == [1, 1, 1]


def test_a_row_may_be_defined_again_but_not_changed(registered):
    source = "def fn(inputs, config):\n    return 1\n"

    def run():  # as a notebook's cell: a new function of the same name
        names = {"__name__": "notebook"}
        exec(source, names)
        return names["fn"]

    register_encoder_type("mine", count=run(), count_layers="all")
    register_encoder_type("mine", count=run(), count_layers="all")
    with pytest.raises(
        ValueError, match=r"'mine' is registered already.*another count is stated by register_feature_count"
    ):
        register_encoder_type("mine", count=run())
    with pytest.raises(ValueError, match="'bert' is registered already"):
        register_encoder_type("bert", kind="text")
    assert ENCODER_TYPES["mine"].facts == ["count", "count_layers"] and ENCODER_TYPES["bert"].kind is None


@pytest.mark.parametrize(
    ("facts", "error", "message"),
    [
        ({"count": 3}, TypeError, "count of an encoder type must be a function, got 3"),
        ({"count_layers": "first"}, TypeError, r"count_layers .* must be one of \('last', 'all'\), got 'first'"),
        ({"width_layers": -1}, TypeError, r"width_layers .* must be one of \(None, 'last', 'all'\), got -1"),
        ({"padding_changes_features": 1}, TypeError, "must be True or False, got 1"),
        ({"kind": ["image"]}, TypeError, "kind of an encoder type must be a text"),
        ({"random_loss": "all"}, TypeError, "must be a function, got 'all'"),
        ({"rule": len}, TypeError, r"does not take \['rule'\], expected some of \['count', "),
        ({"random_input": "noise"}, ValueError, "give both or neither"),
        ({}, ValueError, "states nothing, expected some of"),
        ({"kind": None}, ValueError, "states nothing"),
    ],
)
def test_what_is_no_fact_is_refused(registered, facts, error, message):
    with pytest.raises(error, match=rf"register_encoder_type\('mine', .*{message}"):
        register_encoder_type("mine", **facts)
    assert "mine" not in ENCODER_TYPES
    with pytest.raises(TypeError, match="name of an encoder type must be a non-empty string, got 3"):
        register_encoder_type(3, kind="image")


def test_a_type_of_which_nothing_is_known_has_the_defaults():
    row = encoder_type(BertConfig.from_dict({}), "SomebodysModel")
    assert row is ENCODER_TYPES["bert"] and encoder_type(tiny.llama().config) == EncoderType()
    assert EncoderType().facts == [] and all(row.facts for row in map(ENCODER_TYPES.__getitem__, ENCODER_TYPES))
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.kind = "image"


def test_a_checkpoint_names_the_facts_and_is_refused_without_them(registered, tmp_path):
    for part in strip_model():
        part.save_pretrained(tmp_path)
    facts = {TYPE: ["count", "width_layers", "kind", "any_number_of_frames"]}
    assert json.loads((tmp_path / "config.json").read_text())["encoder_types"] == facts
    assert json.loads((tmp_path / "processor_config.json").read_text())["model_config"]["encoder_types"] == facts
    assert AutoModel.from_pretrained(tmp_path).config.encoder_types == facts
    assert AutoProcessor.from_pretrained(tmp_path).config.encoder_types == facts
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    entries = dict(ENCODER_TYPES._entries)
    del ENCODER_TYPES._entries[TYPE]
    for part in (model, processor):  # saving would leave out what is not known here
        with pytest.raises(ValueError, match=rf"relies on .* of its encoder type '{TYPE}'"):
            part.save_pretrained(tmp_path / "again")
    for auto in (AutoModel, AutoProcessor):
        with pytest.raises(
            ValueError, match=rf"relies on \['count', .*\] of its encoder type '{TYPE}'.*{CALL} before you load"
        ):
            auto.from_pretrained(tmp_path)
    register_encoder_type(TYPE, count=entries[TYPE].count, width_layers="all")
    with pytest.raises(ValueError, match=rf"relies on \['kind', 'any_number_of_frames'\] of its encoder type '{TYPE}'"):
        AutoModel.from_pretrained(tmp_path)
    ENCODER_TYPES._entries.update(entries)
    AutoModel.from_pretrained(tmp_path)


def test_a_type_registered_after_composing_is_named_when_it_is_saved(registered, tmp_path):
    row = ENCODER_TYPES._entries.pop(TYPE)
    encoder = ModalEncoderModule(typed_parts.StripEncoder(typed_parts.StripConfig()), kind="image")
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.ENCODERS["clip"][2]()}, model=model)
    assert model.config.encoder_types is None and "encoder_types" not in model.config.to_dict()
    ENCODER_TYPES._entries[TYPE] = row
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["encoder_types"]) == {TYPE}
    assert set(json.loads((tmp_path / "processor_config.json").read_text())["model_config"]["encoder_types"]) == {TYPE}


@pytest.mark.parametrize("stored", [{"x": 3}, {"x": "count"}, {"x": [3]}, {"x": {"count": 1}}])
def test_what_is_no_list_of_facts_is_refused(stored):
    with pytest.raises(ValueError, match=r"encoder_types\['x'\] must be a list of names"):
        check_facts_registered(stored)


def test_own_types_are_not_named():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    assert model.config.encoder_types is None


def test_packed_items_of_a_type_whose_count_is_known_are_encoded_together(monkeypatch):
    module, seen = catalog.build("Qwen3ASREncoder"), []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_features"])), with_kwargs=True
    )
    frames = 2 * module.config.n_window
    sounds = torch.randn(3, module.config.num_mel_bins, 3 * frames)
    mask = (torch.arange(3 * frames) < torch.tensor([[3 * frames], [frames + 7], [3]])).long()
    encoder = ModalEncoderModule(module)
    with torch.no_grad():
        together = encoder.select(input_features=sounds, input_features_mask=mask)
        assert seen.pop() == 3 and not seen, "one call"
        alone = [module(input_features=sounds[i : i + 1], input_features_mask=mask[i : i + 1])[0] for i in range(3)]
        whole = module(input_features=sounds, input_features_mask=mask).last_hidden_state
        assert torch.equal(together.last_hidden_state, whole)
        assert together.lengths == [len(x) for x in alone]
        entries = {key: value for key, value in ENCODER_TYPES._entries.items() if key != "qwen3_asr_encoder"}
        monkeypatch.setattr(ENCODER_TYPES, "_entries", entries)
        seen.clear()
        encoder.select(input_features=sounds, input_features_mask=mask)
        assert seen[-3:] == [1, 1, 1], "of which nothing is known: one by one"
