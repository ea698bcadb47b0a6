"""A projector in a dtype of its own: made so in a composition of another one, saved so, kept by loading until it is cast."""

import copy
import json

import pytest
import tiles
import tiny
import torch
import user_parts  # noqa: F401 (registers a projector)
from own_memory import own_memory, weights
from peft import LoraConfig, get_peft_model
from torch import nn

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    replace,
    to_native,
)

QFORMER = {"num_query_tokens": 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TYPES = {
    "linear": {},
    "mlp": {"norm": "rms_norm", "num_layers": 3},
    "pixel_shuffle": {"scale_factor": 2},
    "avg_pool": {},
    "conv": {},
    "resampler": {"num_queries": 3},
    "qformer": QFORMER | {"intermediate_size": 8},
    "users_gated": {"gain": 2.0},
}
LOW, HIGH = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    for name, parts in {
        "text": (tiny.llama(), tiny.tokenizer()),
        "vision": (tiny.clip(), tiny.clip_processor()),
    }.items():
        for part in parts:
            part.save_pretrained(path / name)
    return path


def low(part):
    return part.to(LOW)


def composed(whole, **options):
    """Of parts in bfloat16; what is said of all projectors, and of the encoder."""
    torch.manual_seed(0)
    vision = {"model": low(tiny.clip()), "processor": tiny.clip_processor(), "drop_prefix": 1}
    return compose(low(tiny.llama()), {"vision": vision | options}, whole, tokenizer=tiny.tokenizer())


def inputs_of(processor):
    return dict(processor(text=["<image> a", "b <image>"], images=[tiny.image(0), tiny.image(1)], return_tensors="pt", padding=True))  # fmt: skip


def dtypes(module):
    return {p.dtype for p in module.parameters()}


@pytest.mark.parametrize("where", ["all", "one", "configuration", "alias"])
def test_what_is_loaded_in_one_dtype_gets_projectors_of_another(folders, where):
    asked = {"dtype": "float32", "projection_type": "mlp"}
    config = MultimodalProjectorConfig(projection_type="mlp", dtype=torch.float32)
    said = {"one": {"projector": asked}, "configuration": {"projector": config}}.get(where, {})
    whole = {"all": asked, "alias": {"torch_dtype": "float32", "projection_type": "mlp"}}.get(where, "linear")
    vision = {"model": str(folders / "vision"), **said}
    model, processor = compose(str(folders / "text"), {"vision": vision}, whole, dtype="bfloat16")
    encoder = model.vision_encoder
    assert dtypes(encoder.projector) == {HIGH} and dtypes(encoder.module) == dtypes(model.language_model) == {LOW}
    assert model.dtype == LOW and encoder.projector.config.kept_dtype == "float32"
    # As a projector that somebody made by hand in float32.
    torch.manual_seed(5)
    hand = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp", in_features=16, out_features=32))
    encoder.projector.load_state_dict(hand.state_dict())
    inputs = own_memory(inputs_of(processor))
    by_hand = MultimodalModel(
        encoders={"vision": ModalEncoderModule(copy.deepcopy(encoder.module), hand)},
        language_model=copy.deepcopy(model.language_model),
    )
    by_hand.set_modality_token_ids({"vision": model.config.vision_modality["token_id"]})
    own_memory(model), own_memory(by_hand)
    features = encoder.module(pixel_values=inputs["pixel_values"].to(LOW)).last_hidden_state
    with torch.no_grad():
        found = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        assert torch.equal(torch.stack(found), hand(features.float()).last_hidden_state) and found[0].dtype == HIGH
        logits = model(**inputs).logits
        assert logits.dtype == LOW and torch.equal(logits, by_hand.eval()(**inputs).logits)


@pytest.mark.parametrize("projection_type", TYPES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_each_type_runs_trains_generates_and_comes_back(projection_type, dtype, tmp_path):
    model, processor = composed({"projection_type": projection_type, "dtype": dtype, **TYPES[projection_type]})
    wanted = getattr(torch, dtype)
    assert dtypes(model.vision_encoder.projector) == {wanted} and dtypes(model.language_model) == {LOW}
    inputs = inputs_of(processor)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {p.grad.dtype for p in model.vision_encoder.projector.parameters() if p.grad is not None}
    assert grads == {wanted}
    model.save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path)
    assert weights(loaded) == weights(model)
    model, loaded, inputs = own_memory(model.eval()), own_memory(loaded), own_memory(inputs)
    tokens = [each.generate(**inputs, max_new_tokens=4, do_sample=False) for each in (model, loaded)]
    assert torch.equal(*tokens)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


@pytest.mark.parametrize("asked", [None, "auto", LOW, torch.float16, HIGH, torch.float64])
def test_loading_keeps_what_is_stated_whatever_it_is_asked_for(asked, tmp_path):
    model, _ = composed({"projection_type": "mlp", "dtype": "float32"})
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    projector = stored["vision_projector_config"]
    assert projector["dtype"] == projector["kept_dtype"] == "float32" and stored["dtype"] == "bfloat16"
    loaded = MultimodalModel.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    rest = LOW if asked in (None, "auto") else asked
    assert dtypes(loaded.vision_encoder.projector) == {HIGH}
    assert dtypes(loaded.vision_encoder.module) == dtypes(loaded.language_model) == {loaded.dtype} == {rest}
    same = [each.vision_encoder.projector.state_dict() for each in (model, loaded)]
    assert all(torch.equal(x, same[1][name]) for name, x in same[0].items())
    loaded.save_pretrained(tmp_path / "again")
    again = MultimodalModel.from_pretrained(tmp_path / "again")
    assert weights(again) == weights(loaded) and again.vision_encoder.projector.config.kept_dtype == "float32"


def test_without_one_stated_another_dtype_is_meant_for_all(tmp_path):
    model, _ = composed("linear")
    assert model.vision_encoder.projector.config.own_dtype is None
    model.vision_encoder.projector.float()
    model.save_pretrained(tmp_path)
    assert "kept_dtype" not in json.loads((tmp_path / "config.json").read_text())["vision_projector_config"]
    assert dtypes(MultimodalModel.from_pretrained(tmp_path).vision_encoder.projector) == {HIGH}  # as it was saved
    assert dtypes(MultimodalModel.from_pretrained(tmp_path, dtype=torch.float16)) == {torch.float16}


@pytest.mark.parametrize("cast", [lambda model: model.half(), lambda model: model.to(LOW)])
def test_a_model_that_was_cast_as_a_whole_comes_back_as_it_is(cast, tmp_path):
    model, processor = composed({"dtype": "float32"})
    cast(model).save_pretrained(tmp_path)
    assert "kept_dtype" not in json.loads((tmp_path / "config.json").read_text())["vision_projector_config"]
    loaded = MultimodalModel.from_pretrained(tmp_path)
    assert len(dtypes(loaded)) == 1
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    loaded.generate(**inputs_of(processor), max_new_tokens=2)


def test_autocast_and_adapters(tmp_path):
    model, processor = composed({"projection_type": "mlp", "dtype": "float32"})
    inputs = inputs_of(processor)
    with torch.autocast("cpu", LOW):
        model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.vision_encoder.projector.projection[0].weight.grad.dtype == HIGH
    lora = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["vision_encoder.projector"])
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=False)
    assert {p.dtype for n, p in wrapped.named_parameters() if "projector" in n} == {HIGH}
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()


def test_a_projector_alone(tmp_path):
    config = MultimodalProjectorConfig(projection_type="mlp", in_features=6, out_features=4, dtype="float64")
    made = MultimodalProjector(config)
    assert dtypes(made) == {torch.float64}
    made.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.float16}):
        loaded = MultimodalProjector.from_pretrained(tmp_path, **options)
        assert weights(loaded) == weights(made)


def test_what_is_wrapped_stays_as_it_is():
    layer, config = nn.Linear(16, 32), MultimodalProjectorConfig(dtype="bfloat16")
    with pytest.raises(ValueError, match=r"weights of another dtype than torch.bfloat16: cast it first, projection.to"):
        MultimodalProjector(config, projection=layer)
    assert layer.weight.dtype == HIGH
    made = MultimodalProjector(config, projection=layer.to(LOW))
    assert made.projection is layer and made.config.own_dtype == LOW


@pytest.mark.parametrize("wrong", ["int8", "auto", "bf16", torch.int64, 16, "os", "float8_e4m3fn"])
def test_what_is_no_dtype_of_layers_is_refused(wrong):
    words = r"A projector's dtype must be None, one of \('float32', 'bfloat16', 'float16', 'float64'\), or such a torch.dtype"
    with pytest.raises(ValueError, match=words):
        MultimodalProjectorConfig(dtype=wrong)
    with pytest.raises(ValueError, match=f"vision: {words}"):
        composed("linear", projector={"dtype": wrong})
    with pytest.raises(ValueError, match=words):
        MultimodalProjectorConfig.from_dict({"kept_dtype": wrong})
    with pytest.raises(TypeError, match="vision: unknown keys"):
        composed("linear", projector_dtype="float32")


def test_configurations_keep_it_and_records_of_loading_are_no_wish():
    config = MultimodalProjectorConfig(dtype=torch.float32)
    for again in (copy.deepcopy(config), MultimodalProjectorConfig(**config.to_dict())):
        assert again.kept_dtype == "float32" and again.own_dtype == HIGH
    assert MultimodalProjectorConfig.from_dict(config.to_dict()).own_dtype == HIGH
    assert MultimodalProjectorConfig.from_dict({"dtype": "bfloat16"}).own_dtype is None  # how its weights were loaded
    assert MultimodalProjectorConfig().own_dtype is None is MultimodalProjectorConfig(dtype=None).own_dtype
    assert config != MultimodalProjectorConfig() and json.loads(config.to_json_string())["kept_dtype"] == "float32"


def test_parts_are_exchanged_around_it():
    model, processor = composed({"projection_type": "mlp", "dtype": "float32"})
    wide = {"model": low(tiny.llama(hidden_size=48)), "tokenizer": tiny.tokenizer()}
    made, _ = replace(model, processor, language_model=wide)
    assert dtypes(made.vision_encoder.projector) == {HIGH} and made.vision_encoder.projector.config.out_features == 48
    made, _ = replace(model, processor, vision={"projector": {"projection_type": "linear", "dtype": "float64"}})
    assert dtypes(made.vision_encoder.projector) == {torch.float64}
    with pytest.raises(ValueError, match=r"dtypes \['torch.bfloat16', 'torch.float32'\].*model.to\(dtype\)"):
        to_native(model, model_type="llava")


def test_joined_encoders_and_tiles_share_it():
    torch.manual_seed(0)
    towers = {
        "vision": {"model": low(tiny.siglip()), "processor": tiny.ENCODERS["siglip"][2]()},
        "dino": {"model": low(tiny.dinov2(hidden_size=12, image_size=8)), "processor": tiny.clip_processor(), "drop_prefix": 1},
    }  # fmt: skip
    group = {"encoders": list(towers), "join": "channels"}
    options = {"tokenizer": tiny.tokenizer(), "share_inputs": [group]}
    model, processor = compose(low(tiny.llama()), towers, {"projection_type": "mlp", "dtype": "float32"}, **options)
    assert dtypes(model.vision_encoder.projector) == {HIGH}
    model.generate(**processor(text="<image> a", images=tiny.image(0), return_tensors="pt"), max_new_tokens=2)


def test_a_learnt_vector_of_tiles_has_the_projectors_dtype(tmp_path):
    model, processor = tiles.composed("LlavaNext", "newline", projector={"dtype": "float64"})
    packing = model.vision_encoder.postprocess_projector_callback
    assert dtypes(packing) == dtypes(model.vision_encoder.projector) == {torch.float64}
    inputs = dict(processor(text="<image> a", images=tiny.image(0, (20, 30)), return_tensors="pt"))
    model.save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path)
    assert weights(loaded) == weights(model)
    tokens = [each.generate(**own_memory(inputs), max_new_tokens=2) for each in (own_memory(model), own_memory(loaded))]
    assert torch.equal(*tokens)
