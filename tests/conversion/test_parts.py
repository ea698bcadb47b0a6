"""Parts of native models in a composition: which tower is used, and that those of a checkpoint are the very ones it has."""

import copy
import json
import re

import convertible_models
import native_models
import native_types
import pytest
import tiny
import torch
import transformers
from hub_cache import commit_of, put_into_cache
from native_types import check_loaded, digests, settings_of
from own_memory import own_memory
from peft import LoraConfig, get_peft_model

from cornstarch_hf import ModalEncoderModule, MultimodalModel, compose, from_native, to_native
from cornstarch_hf.checkpoints.files import check_files
from cornstarch_hf.conversion import native as native_module
from cornstarch_hf.conversion.parts import native_selection


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A native model and the folder in which it lies."""
    model, folder = convertible_models.build("llava"), tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    "model_type", ["llava", "vipllava", "internvl", "llava_next", "idefics3", "qwen2_audio", "voxtral"]
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_tower_of_a_native_model_is_chosen_by_hand_or_as_the_model_uses_it(model_type, whole):
    native = convertible_models.build(model_type)
    name, encoder = next(iter(from_native(native)[0].encoders.items()))
    given = native if whole else native.model
    kind = "image" if name == "vision" else "audio"
    told = rf"{type(given).__name__} is a whole multimodal.*from_native.*'native'}}}}\); or .* model.get_encoder\('{kind}'\)"
    with pytest.raises(ValueError, match=told):
        ModalEncoderModule(given)
    processor = tiny.clip_processor() if name == "vision" else tiny.whisper_processor()
    spec = {"model": given, "select": "native", "processor": processor}
    model, _ = compose(tiny.llama(), {name: spec}, tokenizer=tiny.tokenizer())
    assert model.encoders[name].module in native.modules() and type(model.encoders[name].module) is type(encoder.module)
    got, expected = (model.encoders[name].selection, encoder.selection)
    assert (got.layer, got.drop_prefix, got.output) == (expected.layer, expected.drop_prefix, expected.output)
    with pytest.raises(ValueError, match=rf"{name}: select='native' takes .* leave out \['layer'\], or it"):
        compose(tiny.llama(), {name: spec | {"layer": -1}}, tokenizer=tiny.tokenizer())


def test_a_tower_is_selected_as_in_a_native_checkpoint_and_stored_so(llava, tmp_path):
    native, folder = llava
    tiny.clip_processor().save_pretrained(folder)
    spec = {"model": str(folder), "select": "native"}
    model, _ = compose(tiny.llama(), {"vision": spec}, tokenizer=tiny.tokenizer())
    pixels = convertible_models.noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = native.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        got = own_memory(model.vision_encoder).select(pixel_values=pixels).last_hidden_state
    assert torch.equal(got, expected)
    model.save_pretrained(tmp_path)
    assert MultimodalModel.from_pretrained(tmp_path).vision_encoder.selection == model.vision_encoder.selection
    with pytest.raises(ValueError, match="vision: select must be 'native', or left out, got 'all'"):
        compose(tiny.llama(), {"vision": spec | {"select": "all"}}, tokenizer=tiny.tokenizer())
    with pytest.raises(ValueError, match="vision: The native type 'clip_vision_model' is not known"):
        compose(tiny.llama(), {"vision": spec | {"model": tiny.clip()}}, tokenizer=tiny.tokenizer())
    both = convertible_models.build("video_llava")
    with pytest.raises(
        ValueError,
        match=r"vision: VideoLlavaForConditionalGeneration has towers for \['image', 'video'\]: choose one by kind=, got None",
    ):
        compose(tiny.llama(), {"vision": spec | {"model": both}}, tokenizer=tiny.tokenizer())


class OwnLlava(transformers.LlavaForConditionalGeneration):
    """A class of a user's."""


def test_towers_of_what_stands_around_a_native_model_are_its_own(llava):
    native, _ = llava
    for given in (
        OwnLlava(native.config),
        get_peft_model(copy.deepcopy(native), LoraConfig(target_modules=["q_proj"])),
    ):
        tower, options = native_selection(given)
        assert type(tower).__name__ == "CLIPVisionModel" and options["layer"] == -2
    with pytest.raises(ValueError, match="FuyuForCausalLM has no tower: its items are projected as they are"):
        native_selection(convertible_models.build("fuyu"))
    with pytest.raises(TypeError, match=r"kind must be a name, .* got \['image'\]"):
        native_selection(native, ["image"])
    classified = transformers.Gemma3ForSequenceClassification(native_models.configuration("gemma3"))
    with pytest.raises(
        ValueError, match="takes a Gemma3ForConditionalGeneration, .* got Gemma3ForSequenceClassification"
    ):
        native_selection(classified)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llava", "internvl", "kimi_k25"])
def test_parts_of_a_checkpoint_are_those_of_its_live_model_and_tied_as_it_is(model_type, tied, tmp_path):
    native = convertible_models.build(
        model_type, tie_word_embeddings=tied, text_config={"tie_word_embeddings": tied or model_type == "internvl"}
    )
    native.save_pretrained(tmp_path)
    model = check_loaded(tmp_path, native)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied


def test_nothing_is_drawn_and_no_layer_is_built_twice(llava):
    """Layers of the tower and of the text are made once, by the native class; one is that of the head's class."""
    made = []
    hook = torch.nn.modules.module.register_module_module_registration_hook(
        lambda *it: made.append(type(it[2]).__name__)
    )
    torch.manual_seed(0)
    state = torch.get_rng_state()
    try:
        model, _ = from_native(llava[1])
    finally:
        hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    texts, pictures = (x.num_hidden_layers for x in (model.config.text_config, model.config.vision_config))
    assert made.count("CLIPEncoderLayer") == pictures and made.count("LlamaDecoderLayer") == texts + 1
    assert not model.training and not any(module.training for module in model.modules())


def test_a_model_on_several_devices_is_refused(llava):
    spread = copy.deepcopy(llava[0])
    spread.hf_device_map = {"model": 0, "lm_head": "cpu"}  # as accelerate leaves it
    with pytest.raises(
        ValueError, match=r"LlavaForConditionalGeneration lies on several devices, \['0', 'cpu'\], .*: convert"
    ):
        from_native(spread)
    assert digests(from_native(llava[1], device_map="cpu")[0]) == digests(from_native(llava[1])[0])


@pytest.mark.parametrize("options", [{}, {"use_safetensors": True}, {"image_token_id": 7, "device_map": "cpu"}])
@pytest.mark.parametrize("model_type", ["glmga", "pp_chart2table", "llava"])
def test_a_checkpoint_keeps_its_type_whatever_options_it_is_loaded_with(model_type, options, tmp_path):
    convertible = native_types.build(model_type)  # the first two are of the class of another type
    convertible.save_pretrained(tmp_path)
    model, _ = from_native(tmp_path, **options)
    assert model.config.native["config"]["model_type"] == model_type == to_native(model).config.model_type
    if "image_token_id" in options:
        assert model.config.modality("vision")["token_id"] == 7 == to_native(model).config.image_token_id


def test_a_configuration_is_given_or_named(llava):
    model, folder = llava
    changed = copy.deepcopy(model.config)
    changed.vision_feature_layer = -1
    layers = [
        from_native(folder, config=x)[0].config.modality("vision")["layer"] for x in (folder, str(folder), changed)
    ]
    assert layers == [-2, -2, 2] and changed.vision_feature_layer == -1
    with pytest.raises(
        TypeError, match="config must be a configuration, or the id or path of one, got {'model_type': 'llava'}"
    ):
        from_native(folder, config={"model_type": "llava"})
    with pytest.raises(ValueError, match="config is of the type 'clip_vision_model', and .* holds a 'llava'"):
        from_native(folder, config=model.config.vision_config)


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"use_cache": False}, {"output_attentions": True, "attn_implementation": "eager"}],
)
@pytest.mark.parametrize("model_type", ["llava", "idefics3", "glmga"])
def test_options_of_loading_reach_what_they_reach_in_the_native_class(model_type, options, tmp_path):
    native = native_types.build(model_type)
    native.save_pretrained(tmp_path)
    try:
        expected = type(native).from_pretrained(tmp_path, **options)
    except TypeError as error:  # no setting of this type's
        with pytest.raises(ValueError, match=re.escape(str(error))):
            from_native(tmp_path, **options)
        return
    model, _ = from_native(tmp_path, **options)
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    again = to_native(model)
    assert {key: getattr(again.config, key) for key in options if key != "attn_implementation"} == {
        key: getattr(expected.config, key) for key in options if key != "attn_implementation"
    }


@pytest.mark.parametrize("options", [{}, {"revision": "main"}, {"use_safetensors": True}])
def test_all_of_a_repository_is_of_one_commit(llava, options, tmp_path, monkeypatch):
    commits = [commit_of(text) for text in ("first", "second")]
    changed = copy.deepcopy(llava[0])
    changed.config.vision_feature_layer = -1
    for tensor in changed.parameters():
        tensor.data.fill_(0.5)
    for model, commit in zip((llava[0], changed), commits, strict=True):
        model.save_pretrained(tmp_path / commit)
        put_into_cache(tmp_path / "hub", "user/llava", tmp_path / commit, commit)
    branch = tmp_path / "hub/models--user--llava/refs/main"
    branch.write_text(commits[0])

    def checked(*args):
        found = check_files(*args)
        branch.write_text(commits[1])  # somebody pushes
        return found

    monkeypatch.setattr(native_module, "check_files", checked)
    model, _ = from_native("user/llava", cache_dir=tmp_path / "hub", **options)
    assert model.config.modality("vision")["layer"] == -2 and digests(to_native(model)) == digests(llava[0])


def test_code_of_a_native_checkpoint_does_not_run(llava, tmp_path):
    llava[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "other.Other"}}))
    (tmp_path / "other.py").write_text("raise SystemExit('it ran')")
    for source, options in (
        (tmp_path, {}),
        (tmp_path, {"trust_remote_code": True}),
        (llava[1], {"trust_remote_code": True, "config": str(tmp_path)}),
    ):
        model, _ = from_native(source, **options)
        assert type(to_native(model).config) is transformers.LlavaConfig


def test_checkpointing_that_a_file_asks_for_is_that_of_every_part(llava, tmp_path):
    llava[0].save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gradient_checkpointing": True}))
    model, _ = from_native(tmp_path)
    found = [module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(found) >= 3 and all(found)


def test_a_model_is_the_callers_own_and_stays_as_it_is(llava):
    native, _ = llava
    before, parameters = settings_of(native), dict(native.named_parameters(remove_duplicate=False))
    model, _ = from_native(native)
    after = dict(native.named_parameters(remove_duplicate=False))
    assert settings_of(native) == before and all(after[name] is p for name, p in parameters.items())
    assert not {id(module) for module in model.modules()} & {id(module) for module in native.modules()}
