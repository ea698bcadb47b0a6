"""PEFT inside parts and around composed models: what a fresh process gets back from a checkpoint, to the bit."""

import copy

import pytest
import tiny
import torch
from helpers import HERE, check_round_trips, compose_tiny, needs_attaching, run_python, uneven_inputs
from own_memory import check_comes_back, own_memory
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from trainers import losses, rows, trainer
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from tuners import moved

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor

TARGETS = ["q_proj", "v_proj"]
LORA = {"r": 2, "target_modules": TARGETS}


def lora(model=None, **options):
    return moved(get_peft_model(model or tiny.llama(), LoraConfig(**LORA | options)))


def two(active):
    model = lora()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down_proj", "q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    moved(model)
    model.base_model.set_adapter(active)
    return model


def composed(language_model, change=None):
    model, processor = compose_tiny(["clip"], language_model)
    if change:
        change(model)
    return model.eval(), processor


def with_encoder(encoder, language_model):
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=language_model).eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    processor.items = {"vision": tiny.image}
    return model, processor


def unloaded(model):
    model.language_model = model.language_model.merge_and_unload()


def late(model):
    model.language_model.add_adapter("late", LoraConfig(r=2, target_modules=["o_proj"]))
    model.language_model.set_adapter("late")
    moved(model.language_model, "late")


TUNERS = {
    "lora": LoraConfig(**LORA),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(**LORA),
    "lokr": LoKrConfig(**LORA),
    "adalora": AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=TARGETS),
    "dora": LoraConfig(**LORA, use_dora=True),
    "bias": LoraConfig(**LORA, bias="all", use_rslora=True),
    "saved": LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[3, 5]),
    "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    "hra": HRAConfig(**LORA),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "all_linear": LoraConfig(r=2, target_modules="all-linear"),
}
STATES = {
    "first": lambda: composed(two("default")),
    "second": lambda: composed(two("second")),
    "both": lambda: composed(two(["default", "second"])),
    "late": lambda: composed(lora(), late),
    "switched": lambda: composed(two("default"), lambda m: m.language_model.set_adapter("second")),
    "merged": lambda: composed(lora(), lambda m: m.language_model.merge_adapter()),
    "one_of_two_merged": lambda: composed(two("second"), lambda m: m.language_model.merge_adapter(["second"])),
    "unloaded": lambda: composed(lora().merge_and_unload()),
    "unloaded_later": lambda: composed(lora(), unloaded),
    "disabled": lambda: composed(lora(), lambda m: m.language_model.base_model.disable_adapter_layers()),
    "frozen": lambda: composed(lora(), lambda m: m.freeze("language_model")),
    "encoder": lambda: with_encoder(lora(tiny.clip()), tiny.llama()),
    "both_parts": lambda: with_encoder(
        moved(get_peft_model(tiny.clip(), IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]))),
        two(["default", "second"]),
    ),
    "experts": lambda: composed(lora(tiny.qwen3_moe(), target_parameters=["mlp.experts.gate_up_proj"])),
    "tied": lambda: composed(lora(tiny.llama(tie_word_embeddings=True))),
}


@pytest.mark.slow
def test_tuner_types_and_states_inside_parts(tmp_path):
    made = {
        key: (lambda c=config: composed(moved(get_peft_model(tiny.llama(), c))))() for key, config in TUNERS.items()
    }
    check_round_trips(tmp_path, made | {key: build() for key, build in STATES.items()})


def test_active_merged_and_disabled_adapters_are_those_of_before(tmp_path):
    for key in ("second", "both", "late", "merged", "one_of_two_merged", "disabled"):
        model, processor = STATES[key]()
        model.save_pretrained(tmp_path / key)
        again = MultimodalModel.from_pretrained(tmp_path / key)
        a, b = model.language_model, again.language_model
        assert a.active_adapters == b.active_adapters and list(a.peft_config) == list(b.peft_config), key
        assert a.get_model_status() == b.get_model_status(), key
        if key == "merged":
            for one in (model, again):
                own_memory(one).language_model.unmerge_adapter()  # which subtracts a product
            check_comes_back(model, again, uneven_inputs(processor))


def test_rows_of_single_tokens_can_be_unmerged_after_a_reload(tmp_path):
    model, _ = composed(moved(get_peft_model(tiny.llama(), TUNERS["tokens"])))
    before = model.language_model.base_model.model.model.embed_tokens.token_adapter.base_layer.weight.clone()
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    again.language_model.merge_adapter()
    layer = again.language_model.base_model.model.model.embed_tokens.token_adapter
    assert not torch.equal(layer.base_layer.weight, before)
    again.language_model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


# ---- around the model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a composed model, and inputs for it."""
    folder = tmp_path_factory.mktemp("base")
    model, processor = compose_tiny(["clip", "whisper"])
    model.save_pretrained(folder)
    return folder, uneven_inputs(processor), processor


def fresh(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def fresh_process(tmp_path, jobs):
    torch.save(jobs, tmp_path / "jobs.pt")
    run_python(HERE / "reload_adapters.py", str(tmp_path / "jobs.pt"), str(tmp_path / "results.pt"))
    return torch.load(tmp_path / "results.pt", weights_only=False)


def check_adapters(tmp_path, made):
    """Demand equal bits, keys and trainable names of each ``(model, job)`` from a fresh process."""
    expected = []
    for i, (model, job) in enumerate(made):
        job["state"] = tmp_path / f"state{i}.pt"
        torch.save({k: v for k, v in model.eval().state_dict().items() if isinstance(v, torch.Tensor)}, job["state"])
        own_memory(model)
        with torch.no_grad():
            logits = model(**own_memory(job["inputs"])).logits
        expected.append((logits, [name for name, p in model.named_parameters() if p.requires_grad]))
    results = fresh_process(tmp_path, [job for _, job in made])
    for (_, job), found, (logits, trainable) in zip(made, results, expected, strict=True):
        where = f"{job['way']} {job['folder'].name}"
        assert found["problems"] == {} and found["keys"] == [] and found["different"] == [], where
        assert torch.equal(found["logits"], logits), where
        assert found["trainable"] == (trainable if job.get("trainable", True) else []), where
    return results


AROUND = {
    "targets": LoraConfig(**LORA, task_type="CAUSAL_LM"),
    "all_linear": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "projectors": LoraConfig(**LORA, modules_to_save=["projector"], task_type="CAUSAL_LM"),
    "one_projector": LoraConfig(**LORA, modules_to_save=["vision_encoder.projector"], task_type="CAUSAL_LM"),
    "both": LoraConfig(r=2, target_modules="all-linear", modules_to_save=["projector"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(**LORA, task_type="CAUSAL_LM"),
    "bias": LoraConfig(**LORA, bias="all", task_type="CAUSAL_LM"),
}


def test_adapters_around_a_composed_model(tmp_path, base):
    folder, inputs, _ = base
    made = []
    for key, config in AROUND.items():
        model = moved(get_peft_model(fresh(folder), copy.deepcopy(config)))
        model.save_pretrained(tmp_path / key)
        for way in ("peft", "auto_peft"):
            made.append((model, {"way": way, "base": folder, "folder": tmp_path / key, "inputs": inputs}))
    check_adapters(tmp_path, made)


def test_merged_and_unloaded_models_are_plain_composed_ones(tmp_path, base):
    folder, inputs, _ = base
    made = []
    for key, config in AROUND.items():
        model = moved(get_peft_model(fresh(folder), copy.deepcopy(config))).eval()
        wrapped = model(**inputs).logits
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(**inputs).logits, wrapped, atol=1e-4, rtol=1e-4)
        assert type(plain) is MultimodalModel
        plain.save_pretrained(tmp_path / key)
        made.append((plain, {"way": "auto", "base": folder, "folder": tmp_path / key, "inputs": inputs}))
    check_adapters(tmp_path, made)


def test_several_adapters_around_a_composed_model(tmp_path, base):
    folder, inputs, _ = base
    model = moved(get_peft_model(fresh(folder), LoraConfig(**LORA, modules_to_save=["projector"])))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down_proj"], modules_to_save=["projector"]))
    model.set_adapter("second")
    moved(model)
    model.save_pretrained(tmp_path / "adapters")
    job = {"way": "several", "base": folder, "folder": tmp_path / "adapters", "inputs": inputs,
           "names": ["default", "second"], "active": "second"}  # fmt: skip
    (found,) = check_adapters(tmp_path, [(model, job)])
    assert found["active"] == ["second"]


@needs_attaching
def test_adapters_attached_by_transformers(tmp_path, base):
    folder, inputs, _ = base
    model = fresh(folder)
    model.add_adapter(LoraConfig(**LORA, modules_to_save=["projector"]))
    moved(model)
    model.save_pretrained(tmp_path / "attached")
    assert not (tmp_path / "attached" / "model.safetensors").exists()
    jobs = [{"way": "load_adapter", "base": folder, "folder": tmp_path / "attached", "inputs": inputs}]
    check_adapters(tmp_path, [(model, job) for job in jobs])
    loaded = AutoModel.from_pretrained(tmp_path / "attached").eval()
    check_comes_back(model.eval(), loaded, inputs)
    own = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert all("modules_to_save" in name for name in own), "as in transformers: adapters are loaded for inference"
    with torch.no_grad():
        model.disable_adapters()
        projected = [name for name, _ in model.named_parameters() if "original_module" in name]
        plain = own_memory(fresh(folder)).eval()
        assert projected and torch.equal(model(**inputs).logits, plain(**inputs).logits)
        model.enable_adapters()
    model.add_adapter(LoraConfig(r=3, target_modules=["down_proj"], modules_to_save=["projector"]), "second")
    model.set_adapter("second")
    assert model.active_adapters() == ["second"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompts_in_front_of_text_and_media(tmp_path, base, kind):
    folder, inputs, _ = base
    options = {"encoder_hidden_size": 8} if kind is PromptEncoderConfig else {}
    config = kind(num_virtual_tokens=3, task_type="CAUSAL_LM", **options)
    model = moved(get_peft_model(fresh(folder), config))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] > 299, -100)
    model(**inputs, labels=labels).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    greedy = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    tokens = model.eval().generate(**inputs, **greedy)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3
    assert kind is PrefixTuningConfig or torch.equal(tokens, model.generate(**inputs, **greedy, use_cache=False))
    model.save_pretrained(tmp_path / "prompt")
    job = {"way": "peft", "base": folder, "folder": tmp_path / "prompt", "inputs": inputs, "trainable": False}
    model.zero_grad()
    torch.save(dict(model.state_dict()), tmp_path / "state.pt")
    (found,) = fresh_process(tmp_path, [job | {"state": tmp_path / "state.pt"}])
    inputs = own_memory(inputs)
    with torch.no_grad():
        assert torch.equal(found["logits"], own_memory(model)(**inputs).logits)
    # PEFT loads prompts for inference alone; to go on training, their weights go into a new wrapper.
    again = get_peft_model(fresh(folder), copy.deepcopy(config)).eval()
    if kind is not PromptEncoderConfig:  # of which PEFT keeps the prompts and not the network that made them
        set_peft_model_state_dict(again, load_file(tmp_path / "prompt" / "adapter_model.safetensors"))
        assert torch.equal(own_memory(again)(**inputs).logits, model(**inputs).logits)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_wrapped_part_under_adapters_around_the_model_is_refused(way):
    model, _ = compose_tiny(["clip"], lora())
    with pytest.raises(ValueError, match=r"\['language_model'\] of this MultimodalModel are wrapped.*merge_and_unload"):
        if way == "add_adapter":
            model.add_adapter(LoraConfig(**LORA))
        else:
            get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("way", [pytest.param("add_adapter", marks=needs_attaching), "inject"])
def test_adapters_attached_to_a_part_without_a_wrapper_are_refused(tmp_path, way):
    part = tiny.llama()
    part.add_adapter(LoraConfig(**LORA)) if way == "add_adapter" else inject_adapter_in_model(LoraConfig(**LORA), part)
    model, processor = compose_tiny(["clip"], part)
    assert model(**uneven_inputs(processor)).logits.isfinite().all(), "it composes and runs"
    with pytest.raises(
        ValueError, match="language_model has adapters injected without a wrapper.*instead of add_adapter"
    ):
        model.save_pretrained(tmp_path)


def test_adapters_in_another_dtype_than_their_part(tmp_path):
    part = get_peft_model(tiny.llama().bfloat16(), LoraConfig(**LORA))
    model, _ = compose_tiny(["clip"], part)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert len({dtypes[name] for name in dtypes if "language_model" in name}) == 2, "PEFT keeps adapters in float32"
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert {name: p.dtype for name, p in again.named_parameters()} == dtypes


def test_a_projector_that_trains_beside_adapters_is_never_lost(tmp_path, base):
    folder, _, processor = base
    model = get_peft_model(fresh(folder), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    model.train()
    model.get_base_model().vision_encoder.projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 parameters train \(vision_encoder.projector\S+ first\).*modules_to_save"):
        trainer(model, processor, tmp_path).train()


# ---- quantized

WIDE = {"hidden_size": 64, "intermediate_size": 128}
BITS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    parts = {"encoders": {"vision": ModalEncoderModule(tiny.clip(**WIDE))}, "language_model": tiny.llama(**WIDE)}
    model = MultimodalModel(**parts, init_projector_type="mlp").eval()
    processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
    processor.items = {"vision": tiny.image}
    model.save_pretrained(folder)
    return folder, processor, uneven_inputs(processor)


def linears(model):
    """Kinds of linear layers by part."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            part = next(p for p in ("projector", "lm_head", "language_model", "vision_encoder") if p in name)
            found.setdefault(part, set()).add((type(module).__name__, module.weight.dtype))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_low_rank_adapters_on_a_quantized_model(tmp_path, wide, bits):
    folder, processor, inputs = wide
    model = AutoModel.from_pretrained(folder, quantization_config=BITS[bits])
    kind = {"4bit": ("Linear4bit", torch.uint8), "8bit": ("Linear8bitLt", torch.int8)}[bits]
    plain = {("Linear", torch.float32)}
    assert linears(model) == {
        "projector": plain, "lm_head": plain, "language_model": {kind}, "vision_encoder": {kind},
    }  # fmt: skip
    config = LoraConfig(**LORA, modules_to_save=["projector"], task_type="CAUSAL_LM")
    model = get_peft_model(prepare_model_for_kbit_training(model), config)
    made = trainer(model, processor, tmp_path / "run", [r for r in rows(8) if "audio" not in r], max_steps=4)
    made.train()
    assert losses(made)[-1] < losses(made)[0]
    model.save_pretrained(tmp_path / "adapters")
    job = {"way": "peft", "base": folder, "folder": tmp_path / "adapters", "inputs": inputs}
    with torch.no_grad():
        logits = own_memory(model.eval())(**own_memory(inputs)).logits
    torch.save({}, tmp_path / "state.pt")
    (found,) = fresh_process(tmp_path, [job | {"quantization": BITS[bits], "state": tmp_path / "state.pt"}])
    assert torch.equal(found["logits"], logits) and found["problems"] == {}
    assert found["trainable"] == [name for name, p in model.named_parameters() if p.requires_grad]
    again = dict(load_file(tmp_path / "adapters" / "adapter_model.safetensors"))
    assert any("projector" in key for key in again) and all(value.is_floating_point() for value in again.values())


@pytest.mark.parametrize("bits", BITS)
def test_a_quantized_model_is_saved_as_it_is(tmp_path, wide, bits):
    folder, _, inputs = wide
    model = AutoModel.from_pretrained(folder, quantization_config=BITS[bits])
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and linears(again) == linears(model)
    check_comes_back(model, again, inputs)


def test_weights_in_a_form_that_saving_would_change_are_refused(tmp_path, wide):
    folder, _, _ = wide
    model = AutoModel.from_pretrained(folder, quantization_config=BITS["4bit"])
    weight = next(p for p in model.parameters() if hasattr(p, "quant_state"))
    weight.quant_state.packing_format_for_cpu = True  # what bitsandbytes sets when it has run on a CPU with bf16
    with pytest.raises(ValueError, match="4-bit weights in the form that bitsandbytes made for inference"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("bits", BITS)
def test_parts_quantized_before_composing(tmp_path, bits):
    tiny.llama(**WIDE).save_pretrained(tmp_path / "llama")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=BITS[bits])
    part = get_peft_model(prepare_model_for_kbit_training(quantized), LoraConfig(**LORA))
    with pytest.warns(UserWarning, match=r"\['language_model'\] were quantized before composing.*quantization_config="):
        model, processor = compose_tiny(["clip"], part)
    batch = uneven_inputs(processor)
    model.freeze("vision_encoder.module").train()
    model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] > 299, -100)).loss.backward()
    assert part.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.any()
    assert model.vision_encoder.projector.projection.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"language_model\S* was quantized before composing.*quantization_config="):
        model.save_pretrained(tmp_path / "model")
