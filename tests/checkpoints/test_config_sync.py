"""Saving: what a folder keeps, what goes, and models that could not come back."""

import copy
import dataclasses
import json

import catalog
import pytest
import tiny
import torch
from helpers import compose_tiny, needs_attaching
from own_memory import check_comes_back, weights
from peft import LoraConfig, get_peft_model
from transformers import ResNetConfig, ResNetModel, Swinv2Config, Swinv2Model, ViTConfig, ViTModel

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
)

CONFORMER = catalog.cases()["Wav2Vec2ConformerModel"]
ROTARY = dataclasses.replace(CONFORMER, changes={**CONFORMER.changes, "position_embeddings_type": "rotary"})


@pytest.fixture
def model():
    return compose_tiny(["clip"])[0]


def files(folder):
    return {p.name for p in folder.iterdir()}


def test_stale_weights_go_either_way(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = files(tmp_path)
    assert "model.safetensors.index.json" in shards and "model.safetensors" not in shards
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == {
        "model.safetensors", "config.json", "generation_config.json", "composition.json", "load_with_cornstarch_hf.py"}  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert files(tmp_path) == shards
    again = MultimodalModel.from_pretrained(tmp_path)
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_foreign_files_stay(tmp_path, model):
    (tmp_path / "adapters").mkdir()
    for name in ("notes.md", "other.safetensors", "model.onnx", "adapters/model.safetensors", "optimizer.pt"):
        (tmp_path / name).write_text("mine")
    model.save_pretrained(tmp_path)
    for name in ("notes.md", "other.safetensors", "model.onnx", "adapters/model.safetensors", "optimizer.pt"):
        assert (tmp_path / name).read_text() == "mine"


def test_constructor_arguments_that_no_config_holds(tmp_path):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    for options in ({}, {"add_pooling_layer": False}, {"add_pooling_layer": False, "use_mask_token": True}):
        encoder = ViTModel(config, **options)
        model = MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=tiny.llama())
        assert model.config.modality("vision")["encoder_kwargs"] == options
        model.save_pretrained(tmp_path)
        _, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), options


def test_a_changed_part_is_refused_with_the_names_of_its_weights(tmp_path, model):
    model.vision_encoder.module.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Only in the model: \['vision_encoder.module.extra.bias'"):
        model.save_pretrained(tmp_path)
    del model.vision_encoder.module.extra
    model.language_model.lm_head = torch.nn.Linear(32, 7, bias=False)
    with pytest.raises(ValueError, match=r"lm_head.weight', \(7, 32\), \(320, 32\)"):
        model.save_pretrained(tmp_path)
    assert not files(tmp_path)


def test_resized_embeddings_come_back(tmp_path, model):
    model.resize_token_embeddings(330)
    assert model.config.text_config.vocab_size == 330
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_only_safetensors(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="safetensors only"):
        MultimodalModel.from_pretrained(tmp_path, use_safetensors=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin only"):
        MultimodalModel.from_pretrained(tmp_path)


def test_no_path_of_this_machine_is_written(tmp_path, model):
    loaded_from = tmp_path / "first"
    model.save_pretrained(loaded_from)
    again = MultimodalModel.from_pretrained(loaded_from)
    again.save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()
    tiny.clip().save_pretrained(tmp_path / "clip")
    tiny.clip_processor().save_pretrained(tmp_path / "clip")
    model, processor = compose(tiny.llama(), {"vision": tmp_path / "clip"}, tokenizer=tiny.tokenizer())
    for part in (model, processor):
        part.save_pretrained(tmp_path / "third")
    for file in (tmp_path / "third").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file.name
    assert json.loads((tmp_path / "second" / "config.json").read_text())["cornstarch_format"] == 1


def test_a_split_over_cpu_and_disk_is_exact(tmp_path, model):
    model.set_modality_token_ids({"vision": 9})
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.tensor([[1, *[9] * 5, 30]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    parts = {"vision_encoder": "cpu", "language_model": "disk"}
    split = MultimodalModel.from_pretrained(tmp_path, device_map=parts, offload_folder=str(tmp_path / "offload"))
    whole = MultimodalModel.from_pretrained(tmp_path)  # its weights lie in the file too, at the same places
    assert weights(whole) == weights(model)
    with torch.no_grad():
        assert torch.equal(split(**inputs).logits, whole(**inputs).logits)


@needs_attaching
def test_adapters_are_not_saved_without_the_model_below_them(tmp_path, model):
    ids = torch.tensor([[5, 6, 7]])
    never_saved = copy.deepcopy(model)
    never_saved.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"was never saved.*call save_pretrained before add_adapter"):
        never_saved.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model.save_pretrained(tmp_path / "model")
    loaded = MultimodalModel.from_pretrained(tmp_path / "model")
    for base in (model, loaded):
        base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        base.eval().save_pretrained(tmp_path / "adapter")
        assert "model.safetensors" not in files(tmp_path / "adapter")
        again = MultimodalModel.from_pretrained(tmp_path / "model")
        again.load_adapter(str(tmp_path / "adapter"))
        check_comes_back(base, again.eval(), {"input_ids": ids})


def test_saving_and_counting_draw_no_random_numbers(tmp_path):
    vit = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                             patch_size=4), add_pooling_layer=False)  # fmt: skip
    projector = MultimodalProjector(MultimodalProjectorConfig(in_features=16, out_features=32))
    language_model = tiny.llama()
    before = torch.get_rng_state()
    encoder = ModalEncoderModule(vit, projector=projector, layer=-2)
    model = MultimodalModel(encoders={"vision": encoder}, language_model=language_model)
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    assert processor(text=processor.image_token, images=tiny.image(), return_tensors="pt")["input_ids"].shape == (1, 5)
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def media_model(encoder, language_model):
    torch.manual_seed(3)
    model = MultimodalModel(encoders={"media": ModalEncoderModule(encoder)}, language_model=language_model).eval()
    model.set_modality_token_ids({"media": tiny.VOCABULARY - 1})
    return model


def test_buffers_of_integers_beside_cast_ones_come_back_as_integers(tmp_path):
    config = Swinv2Config(
        embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4, hidden_size=16
    )
    model = media_model(Swinv2Model(config).eval().bfloat16(), tiny.llama().bfloat16())
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert {torch.int64, torch.bfloat16} <= set(dtypes.values())
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).eval()
    assert {name: buffer.dtype for name, buffer in again.named_buffers()} == dtypes
    inputs = {
        "input_ids": torch.tensor([[5, *[tiny.VOCABULARY - 1] * 16, 6]]),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    check_comes_back(model, again, inputs)


def test_saved_integers_of_a_part_in_another_dtype_come_back_as_integers(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    model = media_model(ResNetModel(config).eval().bfloat16(), tiny.llama())
    model.save_pretrained(tmp_path)
    state, again = model.state_dict(), MultimodalModel.from_pretrained(tmp_path).state_dict()
    assert sum(t.dtype == torch.int64 for t in state.values()) > 4
    assert {name: t.dtype for name, t in again.items()} == {name: t.dtype for name, t in state.items()}


def test_saved_buffers_that_loading_makes_in_float32_come_back_as_they_were(tmp_path):
    model = media_model(catalog.build("Wav2Vec2ConformerModel", ROTARY).bfloat16(), tiny.llama().bfloat16())
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert dtypes["media_encoder.module.encoder.embed_positions.inv_freq"] == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).eval()
    assert {name: buffer.dtype for name, buffer in again.named_buffers()} == dtypes


def test_statistics_of_norms_that_a_class_keeps_in_float32_stay_beside_their_weights(tmp_path):
    model = media_model(catalog.build("GraniteSpeech5Encoder").bfloat16(), tiny.llama().bfloat16())
    model.save_pretrained(tmp_path)
    norm = MultimodalModel.from_pretrained(tmp_path).media_encoder.module.layers[0].conv.norm
    assert {norm.weight.dtype, norm.running_mean.dtype, norm.running_var.dtype} == {torch.float32}


def put(path, make):
    """A change that puts another module in the place of one of a model."""

    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, make())

    return change


ELSE = {
    "of another class": put("language_model", tiny.qwen3),
    "of other settings": put("language_model", lambda: tiny.llama(rms_norm_eps=1e-2)),  # of equal names and shapes
    "another encoder": put("vision_encoder", lambda: ModalEncoderModule(tiny.siglip())),
    "another module": put("vision_encoder.module", lambda: tiny.clip(layer_norm_eps=1e-2)),
}


@pytest.mark.parametrize("change", ELSE.values(), ids=ELSE)
def test_another_part_in_the_place_of_one_is_refused(tmp_path, model, change):
    """Its configuration would describe the first one; what the composed model has itself is refused when it is put there."""
    before = dict(model.named_modules())
    with pytest.raises(
        ValueError, match="is another model than the one that was composed.*compose anew, MultimodalModel"
    ):
        change(model)
        assert model.vision_encoder.module.config.layer_norm_eps == 1e-2
        model.save_pretrained(tmp_path)
    assert change is ELSE["another module"] or dict(model.named_modules()) == before


def test_a_part_may_be_wrapped_or_given_back(model):
    inner = model.language_model
    model.language_model = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj"]))
    model.language_model = model.language_model.merge_and_unload()
    model.language_model = torch.compile(inner)
    model.language_model = inner
    anew = MultimodalModel(encoders=model.encoders, language_model=tiny.qwen3())  # what the error says
    assert anew.vision_encoder is model.vision_encoder


def test_another_projector_is_saved_as_what_it_is(tmp_path, model):
    config = MultimodalProjectorConfig(projection_type="mlp", activation="relu", in_features=16, out_features=32)
    projector = model.vision_encoder.projector = MultimodalProjector(config)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).vision_encoder.projector
    assert str(again) == str(projector) and weights(again) == weights(projector)
