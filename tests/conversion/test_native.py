"""from_native and to_native: native models of each type to compositions and back, equal to the bit, media uneven."""

import copy
import json
import shutil
from dataclasses import replace

import convertible_models
import native_processors
import native_types
import pytest
import tiny
import torch
import transformers
from native_types import check_equal, check_gradients, check_there_and_back, check_videos, digests, files
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProjector,
    MultimodalProjectorConfig,
    compose,
    from_native,
    to_native,
)
from cornstarch_hf.parts.stored_modules import KeptTensors

# One of each way in which a projector, its features and the head are made.
TYPES = [
    "llava", "llava_next", "internvl", "idefics3", "mistral3", "janus", "aya_vision", "kimi_k25", "qwen2_audio", "voxtral",
]  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_native_model_and_its_composition_are_equal_there_and_back(model_type, tmp_path):
    check_there_and_back(native_types.build(model_type), tmp_path)


@pytest.mark.parametrize("model_type", ["llava", "internvl", "mistral3", "voxtral"])
def test_gradients_are_those_of_the_native_model(model_type):
    check_gradients(native_types.build(model_type))


@pytest.mark.parametrize("model_type", ["llava_onevision", "video_llava", "exaone4_5"])
def test_images_and_videos_of_one_row_are_equal_and_their_tower_is_stored_once(model_type, tmp_path):
    check_videos(native_types.build(model_type), tmp_path)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A native model and the folder in which it lies."""
    model, folder = convertible_models.build("llava"), tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder)
    return model, folder


def test_a_checkpoint_is_loaded_by_its_path_with_options_of_loading(llava):
    native, folder = llava
    model, _ = from_native(str(folder), dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (
        model.language_model.config._attn_implementation == model.config.vision_config._attn_implementation == "eager"
    )
    same = MultimodalModel.from_pretrained_multimodal_model(folder)
    assert digests(to_native(same)) == digests(native)
    assert digests(to_native(from_native((native, None))[0])) == digests(native)


def test_sources_that_are_none_are_refused(llava):
    native, _ = llava
    with pytest.raises(TypeError, match="from_native takes a Hub id, a path or a model of transformers, got 3"):
        from_native(3)
    with pytest.raises(TypeError, match=r"\['dtype'\] are for loading, but the model is live"):
        from_native(native, dtype=torch.float16)
    with pytest.raises(ValueError, match="takes the whole LlavaForConditionalGeneration, got LlavaModel"):
        from_native(native.model)
    with pytest.raises(TypeError, match="to_native takes a MultimodalModel, got LlavaForConditionalGeneration"):
        to_native(native)


def test_a_native_folder_is_no_composition_and_a_native_model_no_part_of_one(llava):
    native, folder = llava
    with pytest.raises(
        ValueError, match=r"holds a model of the type 'llava' \(config.json\), MultimodalModel loads .* from_native\('"
    ):
        MultimodalModel.from_pretrained(folder)
    encoders = {"audio": ModalEncoderModule(tiny.whisper())}
    with pytest.raises(
        ValueError, match=r"LlavaForConditionalGeneration is multimodal already .* by from_native\(model\)"
    ):
        MultimodalModel(encoders=encoders, language_model=native)
    with pytest.raises(ValueError, match=r"it is multimodal already: take it apart by from_native\('"):
        compose(str(folder), {"audio": tiny.whisper()}, tokenizer=tiny.tokenizer())


def test_tensors_without_a_part_are_kept_or_dropped_in_a_warning(tmp_path):
    native = convertible_models.build("janus")
    kept, _ = from_native(native)
    names = [name for name, _ in kept.native_rest.named_buffers()]
    assert names and all(name.startswith(("model.vqmodel", "model.generation")) for name in names)
    with pytest.warns(
        UserWarning, match=r"\d+ tensors of [\d,]+ bytes that no part uses were dropped.*model\.generation"
    ):
        dropped, _ = from_native(native, drop_rest=True)
    assert not hasattr(dropped, "native_rest")
    dropped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tensors that this composition does not .* without drop_rest=True"):
        to_native(MultimodalModel.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"expected \{dtype: \{name: shape\}\}, got"),
        ({"float32": 3}, r"expected \{dtype: \{name: shape\}\}, got"),
        ({"float33": {}}, "names the dtype 'float33', which torch does not have"),
        ({"float32": {"a.forward": [2]}}, "names a tensor 'a.forward', which no module can have"),
        ({"float32": {"a..b": [2]}}, "names a tensor 'a..b', which no module can have"),
        ({"float32": {"a.b": "2"}}, "a.b has the shape '2', expected sizes"),
        ({"float32": {"a.b": [-2]}}, r"a.b has the shape \[-2\], expected sizes"),
        ({"float32": {"a.b": [2**30, 2**30]}}, r"a.b has the shape \[1073741824, 1073741824\], expected sizes"),
    ],
)
def test_kept_tensors_of_a_strangers_file_are_looked_at(values, message):
    with pytest.raises(ValueError, match=message):
        KeptTensors(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": 3}, "config.native has the model_type 3, expected a name"),
        ({"model_type": "mllama"}, "'mllama' cannot be composed"),
        ({"config": 3}, "config.native must hold 'config'"),
        ({"config": {}}, "config.native must hold 'config'"),
        ({"config": {"text_config": {"vocab_size": 10**9}, "vision_config": {"dtype": None}}}, "must hold 'config'"),
        ({"parts": {}}, "config.native"),
        ({"parts": {"vision_config": "text_config", "text_config": "vision_config"}}, "config.native"),
        ({"parts": {"text_config": "texts"}}, r"parts names \['texts'\], this composition has"),
    ],
)
def test_what_a_strangers_file_says_of_a_native_model_is_looked_at(llava, change, message):
    model, _ = from_native(llava[0])
    model.config.native = model.config.native | change
    with pytest.raises(ValueError, match=message):
        to_native(model)


def test_files_without_a_tensor_of_the_native_class_are_refused(llava, tmp_path):
    _, folder = llava
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("linear_1.weight"))
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"have no tensors, or of another shape, for .*linear_1.weight'\] \(1\) of Llava"
    ):
        from_native(tmp_path / "x")
    values = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"projector_hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"image_token_id": -5, "image_token_index": -5}, "-5, expected the id of a token"),
    ):
        (tmp_path / "x" / "config.json").write_text(json.dumps(values | change))
        shutil.copy(folder / "model.safetensors", path)
        with pytest.raises(ValueError, match=message):
            from_native(tmp_path / "x")


CHANGES = {
    "tower": (lambda e: setattr(e, "module", other_tower(e.module)), "CLIPVisionModel is another model than the one"),
    "projector": (lambda e: setattr(e, "projector", other_projector()), "projector activation is 'relu'"),
    "layer of the projector": (
        lambda e: e.projector.projection.__setitem__(1, torch.nn.ReLU()), "projection is {'1': 'ReLU'}",
    ),
    "selection": (lambda e: setattr(e, "selection", replace(e.selection, layer=-1)), "its layer is -1"),
    "callback": (lambda e: setattr(e, "postprocess_projector_callback", lambda inputs, output: output), "not registered"),
}  # fmt: skip


def other_tower(tower):
    config = copy.deepcopy(tower.config)
    config.hidden_act = "relu"
    return type(tower)(config)


def other_projector():
    return MultimodalProjector(
        MultimodalProjectorConfig(projection_type="mlp", activation="relu", in_features=32, out_features=32)
    )


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_others_now_do_not_become_native(llava, change):
    model, _ = from_native(copy.deepcopy(llava[0]))
    do, message = CHANGES[change]
    do(model.vision_encoder)
    with pytest.raises(ValueError, match=message):
        to_native(model)


def test_another_language_model_does_not_become_native(llava):
    model, _ = from_native(copy.deepcopy(llava[0]))
    config = model.language_model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    text = transformers.GraniteConfig(**{name: getattr(config, name) for name in names}, pad_token_id=0)
    other = MultimodalModel(encoders=dict(model.encoders), language_model=transformers.GraniteForCausalLM(text))
    other.config.native = model.config.native
    with pytest.raises(ValueError, match="The language model is GraniteForCausalLM, and LlavaFor"):
        to_native(other)


def test_new_ids_of_placeholders_go_back(llava, tmp_path):
    native, _ = llava
    model, _ = from_native(native)
    inputs = convertible_models.batch(convertible_models.TYPES["llava"].media(native))
    model.set_modality_token_ids({"vision": 89})
    back = to_native(model)
    moved = inputs | {"input_ids": inputs["input_ids"].where(inputs["input_ids"] != convertible_models.IMAGE, 89)}
    with torch.no_grad():
        real = inputs["attention_mask"].bool()
        assert torch.equal(back(**moved).logits[real], model(**moved).logits[real])
    back.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).image_token_id == 89
    assert native.config.image_token_id == convertible_models.IMAGE


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True, "preserve_rng_state": False}])
def test_checkpointing_is_taken_over_in_both_directions(options):
    native = convertible_models.build("llava")
    native.gradient_checkpointing_enable(options)
    model, _ = from_native(native)
    assert model.is_gradient_checkpointing
    back = to_native(model)
    on = next(module for module in back.modules() if getattr(module, "gradient_checkpointing", False))
    assert on._gradient_checkpointing_func.keywords == options
    model.gradient_checkpointing_disable()
    assert not to_native(model).is_gradient_checkpointing and native.is_gradient_checkpointing


@pytest.mark.parametrize("part", ["language_model", "vision_encoder.module"])
def test_adapters_are_to_be_merged_first(llava, part):
    model, _ = from_native(copy.deepcopy(llava[0]))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    if part == "language_model":
        model.language_model = get_peft_model(model.language_model, config)
    else:
        model.vision_encoder.module = get_peft_model(model.vision_encoder.module, config)
    with pytest.raises(ValueError, match=r"has adapters, and native classes have none .*merge_and_unload\(\)"):
        to_native(model)
    if part == "language_model":
        model.language_model = model.language_model.merge_and_unload()
        assert digests(to_native(model)) != digests(llava[0])


def test_parts_share_memory_and_parameters_are_their_own(llava):
    native, _ = llava
    model, _ = from_native(native)
    mine, theirs = model.language_model.model.embed_tokens.weight, native.model.language_model.embed_tokens.weight
    assert mine is not theirs and mine.data_ptr() == theirs.data_ptr()
    model.freeze("language_model")
    assert all(p.requires_grad for p in native.parameters())


@pytest.mark.parametrize("outer", [False, True])
def test_the_outer_configuration_decides_whether_the_head_is_tied(outer, tmp_path):
    native = convertible_models.build(
        "internvl", tie_word_embeddings=outer, text_config={"tie_word_embeddings": not outer}
    )
    head, table = native.lm_head.weight, native.get_input_embeddings().weight
    assert (head is table) is outer
    model, _ = from_native(native)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is outer
    inputs = convertible_models.batch(convertible_models.TYPES["internvl"].media(native))
    check_equal(native, model, inputs)
    assert (native.lm_head.weight is native.get_input_embeddings().weight) is outer
    assert files(to_native(model), tmp_path / "again") == files(native, tmp_path / "native")
    model.save_pretrained(tmp_path / "composed")
    back = to_native(MultimodalModel.from_pretrained(tmp_path / "composed"))
    assert (back.lm_head.weight is back.get_input_embeddings().weight) is outer and digests(back) == digests(native)


def test_a_composition_that_never_was_native_is_refused():
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=tiny.llama())
    with pytest.raises(ValueError, match="This composition never was a native model"):
        to_native(model)
    with pytest.raises(ValueError, match="This composition was a 'llava', and cannot become a 'internvl'"):
        to_native(from_native(convertible_models.build("llava"))[0], model_type="internvl")


def test_what_a_composition_learns_comes_back_with_its_processor(llava):
    native, _ = llava
    model, _ = from_native(native)
    with torch.no_grad():
        model.vision_encoder.projector.projection[0].weight = torch.nn.Parameter(torch.ones(32, 32))
    given = native_processors.PROCESSORS["llava"](16)
    back, processor = to_native(model, given)
    assert processor is given and back.model.multi_modal_projector.linear_1.weight.eq(1).all()


SCALED = {
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 0.1, "head_dim": 8}),
    "llama": (transformers.LlamaConfig, {}),
}


@pytest.mark.parametrize("text", SCALED)
def test_heads_that_scale_or_cap_alone_are_bare_within_a_native_model(text):
    """Native multimodal models run a linear head over the text stack, whatever its ...ForCausalLM does to logits."""
    cls, options = SCALED[text]
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = transformers.CLIPVisionConfig(**layers, image_size=16, patch_size=4)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=cls(**layers, **ids, **options, vocab_size=99, num_key_value_heads=2),
        image_token_id=98,
    )
    native = transformers.LlavaForConditionalGeneration(config).eval()
    model, _ = from_native(native)
    assert (type(model.language_model).__name__ == "LlamaForCausalLM") == (text == "llama")
    inputs = {"input_ids": torch.tensor([[5] + [98] * 16 + [7, 8]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native(**inputs).logits)
    assert digests(to_native(model)) == digests(native)


def test_a_factor_that_the_native_class_applies_itself_is_kept():
    native = convertible_models.build("hyperclovax_vision_v2")
    native.config.text_config.logits_scaling = 0.5
    inputs = convertible_models.batch(convertible_models.TYPES["hyperclovax_vision_v2"].media(native))
    model, _ = from_native(native)
    check_equal(native, model, inputs)
    assert to_native(model).config.text_config.logits_scaling == 0.5


def test_a_composition_that_computes_something_else_does_not_become_native():
    def changed(change):
        model, _ = from_native(convertible_models.build("llava"))
        change(model)
        with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
            to_native(model)

    changed(lambda model: setattr(model.config, "mask", {"rule": "item_blocks"}))
    changed(lambda model: setattr(model.config.vision_projector_config, "activation", "relu"))


def test_a_strangers_configuration_is_looked_at_before_the_native_class_reads_it(llava, tmp_path):
    _, folder = llava
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"attn_implementation": "someone/kernel"}))
    with pytest.raises(ValueError, match=r"config.json.*someone/kernel"):
        from_native(tmp_path / "x")


def test_arguments_of_wrong_types_are_refused(llava):
    native, folder = llava
    with pytest.raises(TypeError, match="got 3 values"):
        from_native((native, None, None))
    with pytest.raises(TypeError, match="drop_rest must be True or False, got 'yes'"):
        from_native(native, drop_rest="yes")
    with pytest.raises(TypeError, match="returns no loading information"):
        from_native(folder, output_loading_info=True)
    with pytest.raises(ValueError, match="a composition already"):
        from_native(from_native(native)[0])
