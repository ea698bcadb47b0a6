"""PEFT in and around composed models: adapters, names, what is active and what trains come back in a fresh process."""

import os

import pytest
import tiny
import torch
from helpers import HERE, check_round_trips, needs_attaching, run_python, uneven_inputs
from own_memory import check_comes_back, own_memory, weights
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
)
from trainers import losses, trainer
from transformers import AutoModel, BitsAndBytesConfig, LlamaForCausalLM
from tuners import moved

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel, MultimodalProcessor

pytestmark = pytest.mark.slow
QV = ["q_proj", "v_proj"]
CAUSAL = {"task_type": "CAUSAL_LM"}


def lora(**options):
    return LoraConfig(**({"r": 2, "target_modules": QV} | CAUSAL | options))


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def composed(vision=None, text=None, build=tiny.llama, edit=None, projector="linear", **sizes):
    """A composed model and its processor; parts are wrapped, then `edit`ed, before composing."""
    encoder, language_model = tiny.clip(**sizes), build(**sizes)
    encoder = get_peft_model(encoder, vision) if vision else encoder
    language_model = get_peft_model(language_model, text) if text else language_model
    if edit:
        edit(encoder, language_model)
    torch.manual_seed(3)
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(encoder)}, language_model=language_model, init_projector_type=projector
    )
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    processor = MultimodalProcessor(tokenizer, {"vision": tiny.clip_processor()}, model=model)
    processor.items = {"vision": tiny.image}
    return moved(model).eval(), processor


def logits(model, inputs):
    """From memory of their own, so that they can be compared across a reload."""
    with torch.no_grad():
        return own_memory(model)(**own_memory(inputs)).logits


# ---- inside: parts wrapped before composing


def tied():
    return tiny.llama(tie_word_embeddings=True)


INSIDE = {
    "encoder": {"vision": LoraConfig(r=2, target_modules=QV)},
    "both": {"vision": LoraConfig(r=2, target_modules=QV), "text": lora(r=3)},
    "ia3": {
        "vision": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        "text": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
    },
    "oft": {"text": OFTConfig(oft_block_size=4, r=0, target_modules=QV, **CAUSAL)},
    "vera": {"text": VeraConfig(r=4, target_modules=QV, **CAUSAL)},
    "tied": {"text": lora(modules_to_save=["embed_tokens"]), "build": tied},
}
INSIDE_WIDE = {
    "language_model": {"text": lora()},
    "all-linear": {"vision": LoraConfig(r=2, target_modules="all-linear"), "text": lora(target_modules="all-linear")},
    "bias_all": {"vision": LoraConfig(r=2, target_modules=QV, bias="all"), "text": lora(bias="all")},
    "lora_bias": {"text": lora(lora_bias=True)},
    "pissa": {"text": lora(init_lora_weights="pissa")},
    "modules_to_save": {"text": lora(modules_to_save=["lm_head", "embed_tokens"])},
    "tied_embedding": {"text": lora(target_modules=["embed_tokens"]), "build": tied},
    "tokens": {"text": lora(trainable_token_indices=[3, 7])},
    "tied_tokens": {"text": lora(trainable_token_indices=[3, 7]), "build": tied},
    "token_tuner": {"text": TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"], **CAUSAL)},
    "experts": {
        "text": lora(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        "build": tiny.qwen3_moe,
    },
    "dora": {"vision": LoraConfig(r=2, target_modules=QV, use_dora=True), "text": lora(use_dora=True)},
    "boft": {"text": BOFTConfig(boft_block_size=4, target_modules=QV, **CAUSAL)},
    "loha": {"vision": LoHaConfig(r=2, target_modules=QV), "text": LoHaConfig(r=2, target_modules=QV, **CAUSAL)},
    "lokr": {"text": LoKrConfig(r=2, target_modules=QV, **CAUSAL)},
    "adalora": {"text": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=QV, **CAUSAL)},
    "norms": {"text": LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL)},
    "fourier": {"text": FourierFTConfig(n_frequency=8, target_modules=QV, **CAUSAL)},
    "hra": {"text": HRAConfig(r=2, target_modules=QV, **CAUSAL)},
    "vblora": {
        "text": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["q_proj", "o_proj"], **CAUSAL)
    },
    "randlora": {"text": RandLoraConfig(r=2, target_modules=QV, **CAUSAL)},
}


def test_wrapped_parts_come_back_in_a_fresh_process(tmp_path):
    check_round_trips(tmp_path, {name: composed(**parts) for name, parts in INSIDE.items()})


def test_wrapped_parts_of_every_kind_come_back_in_a_fresh_process(tmp_path):
    check_round_trips(tmp_path, {name: composed(**parts) for name, parts in INSIDE_WIDE.items()})


def test_tables_of_adapters_come_back_for_unmerging(tmp_path):
    model, processor = composed(text=lora(trainable_token_indices=[3, 7]))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    again.language_model.merge_adapter()
    again.language_model.unmerge_adapter()
    inputs = uneven_inputs(processor)
    torch.testing.assert_close(logits(again, inputs), logits(model, inputs))


def second(encoder, language_model):
    language_model.add_adapter("second", lora(r=3, modules_to_save=["lm_head"]))


STATES = {
    "first": lambda lm: lm.set_adapter("default"),
    "second": lambda lm: lm.set_adapter("second"),
    "both": lambda lm: lm.base_model.set_adapter(["default", "second"]),
    "off": lambda lm: lm.base_model.disable_adapter_layers(),
    "deleted": lambda lm: (lm.set_adapter("second"), lm.delete_adapter("default")),
    "unmerged": lambda lm: (lm.merge_adapter(), lm.unmerge_adapter()),
}


def in_state(state, late):
    model, processor = composed(text=lora(), edit=None if late else second)
    if late:
        second(None, model.language_model)
    STATES[state](model.language_model)
    return moved(model).eval(), processor


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_several_adapters_and_which_are_active(tmp_path, late):
    made = {state: in_state(state, late) for state in STATES}
    check_round_trips(tmp_path, made)
    for state, (model, _) in made.items():
        again = AutoModel.from_pretrained(tmp_path / state)
        assert again.language_model.active_adapters == model.language_model.active_adapters, state
        assert list(again.language_model.peft_config) == list(model.language_model.peft_config), state


def test_merged_parts_are_plain_parts(tmp_path):
    model, processor = composed(vision=LoraConfig(r=2, target_modules=QV), text=lora())
    inputs = uneven_inputs(processor)
    wrapped = logits(model, inputs)
    model.language_model = model.language_model.merge_and_unload()
    model.vision_encoder.module = model.vision_encoder.module.merge_and_unload()
    torch.testing.assert_close(logits(model, inputs), wrapped)
    check_round_trips(tmp_path, {"merged": (model, processor)})
    assert model.config.adapters is None


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path):
    model, _ = composed(text=VeraConfig(r=4, target_modules=["o_proj"], save_projection=False, **CAUSAL))
    with pytest.raises(ValueError, match=r"buffers \['language_model.*vera_A.*save_projection=True"):
        model.save_pretrained(tmp_path / "vera")
    model, _ = composed(text=ShiraConfig(r=2, target_modules=QV, **CAUSAL))
    with pytest.raises(ValueError, match=r"language_model: PEFT cannot build adapters of type \['SHIRA'\]"):
        model.save_pretrained(tmp_path / "shira")
    with pytest.raises(ValueError, match=r"language_model: a checkpoint cannot hold layer_replication"):
        composed(text=lora(layer_replication=[(0, 2), (1, 2)]))
    plain = inject_adapter_in_model(lora(), tiny.llama())
    with pytest.raises(ValueError, match="language_model has adapters injected without a wrapper"):
        MultimodalModel(encoders={}, language_model=plain).save_pretrained(tmp_path / "injected")
    assert not os.listdir(tmp_path)


def test_training_goes_on_after_a_reload(tmp_path):
    def steps(model, count):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if (tmp_path / "optimizer.pt").exists():
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        for _ in range(count):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    model, processor = composed(vision=LoraConfig(r=2, target_modules=QV), text=lora(modules_to_save=["lm_head"]))
    inputs = uneven_inputs(processor)
    state = steps(model.train(), 2).state_dict()
    model.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "optimizer.pt")
    again = AutoModel.from_pretrained(tmp_path).train()
    steps(model, 2)
    steps(again, 2)
    assert torch.equal(logits(again.eval(), inputs), logits(model.eval(), inputs))


# ---- outside: adapters around the whole model

OUTSIDE = {
    "projector": lora(modules_to_save=["projector"]),
    "all-linear": lora(target_modules="all-linear"),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
}
OUTSIDE_WIDE = {
    "explicit": lora(),
    "dotted": lora(modules_to_save=["vision_encoder.projector"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["projector"], **CAUSAL),
    "oft": OFTConfig(oft_block_size=4, r=0, target_modules=QV, modules_to_save=["projector"], **CAUSAL),
    "dora": lora(use_dora=True),
    "vera": VeraConfig(r=4, target_modules=["o_proj"], **CAUSAL),
    "tokens": lora(trainable_token_indices=[3, 7]),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
}  # fmt: skip


def saved_base(folder, **parts):
    model, processor = composed(**parts)
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder), uneven_inputs(processor), processor


def reload(folder, jobs):
    torch.save(jobs, folder / "jobs.pt")
    run_python(HERE / "reload_peft.py", str(folder / "jobs.pt"), str(folder / "result.pt"))
    return torch.load(folder / "result.pt", weights_only=False)


def check_outside(folder, configs):
    jobs, expected = [], []
    for name, config in configs.items():
        base, inputs, _ = saved_base(folder / "base")
        model = moved(get_peft_model(base, config)).eval()
        model.save_pretrained(folder / name)
        assert "model.safetensors" not in os.listdir(folder / name)
        # PEFT itself does not load prompts to train them.
        for kind in ["auto", "around"] + ([] if config.is_prompt_learning else ["to_train"]):
            jobs.append((kind, str(folder / "base"), str(folder / name), {}, inputs))
            expected.append((name, kind, logits(model, inputs), trainable(model), weights(model)))
    for (found, names, bits), (name, kind, wanted, trains, kept) in zip(reload(folder, jobs), expected, strict=True):
        assert torch.equal(found, wanted), (name, kind)
        # Of these PEFT keeps the prompts alone, and not the network that made them.
        assert bits == kept or isinstance(configs[name], PromptEncoderConfig), (name, kind)
        assert kind != "to_train" or names == trains, name


def test_adapters_around_the_whole_come_back_in_a_fresh_process(tmp_path):
    check_outside(tmp_path, OUTSIDE)


def test_adapters_of_every_kind_around_the_whole_come_back_in_a_fresh_process(tmp_path):
    check_outside(tmp_path, OUTSIDE_WIDE)


def test_prompts_go_before_media_in_training_and_generation(tmp_path):
    base, inputs, _ = saved_base(tmp_path)
    plain = logits(base, inputs)
    model = moved(get_peft_model(base, OUTSIDE["prompt"])).eval()
    found = logits(model, inputs)
    assert found.shape[1] == plain.shape[1] + 3
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == trainable(model)
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(first, found[:, -1].argmax(-1))
    images = inputs["pixel_values"][:-1]
    with pytest.raises(ValueError, match=r"vision.*15.*10"):
        model(**inputs | {"pixel_values": images})


def test_merged_whole_is_a_plain_model(tmp_path):
    base, inputs, processor = saved_base(tmp_path / "base")
    model = moved(get_peft_model(base, lora(modules_to_save=["projector"]))).eval()
    wrapped = logits(model, inputs)
    merged = model.merge_and_unload()
    assert type(merged) is MultimodalModel
    torch.testing.assert_close(logits(merged, inputs), wrapped)
    check_round_trips(tmp_path, {"merged": (merged, processor)})


@needs_attaching
def test_adapters_attached_by_transformers(tmp_path):
    model, inputs, _ = saved_base(tmp_path / "base")
    plain = logits(model, inputs)
    model.add_adapter(lora(init_lora_weights=False, modules_to_save=["projector"]), "one")
    model.add_adapter(lora(r=3, init_lora_weights=False, modules_to_save=["projector"]), "two")
    given = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        given[name] = logits(model.eval(), inputs)
        model.save_pretrained(tmp_path / name)
        assert {f for f in os.listdir(tmp_path / name) if "safetensors" in f} == {"adapter_model.safetensors"}
    assert not torch.equal(given["one"], given["two"])
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), plain)
    model.enable_adapters()
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model, inputs), given["two"])
    kinds = ("attached", "from_adapter_folder")
    jobs = [(kind, str(tmp_path / "base"), str(tmp_path / n), {}, inputs) for n in given for kind in kinds]
    for (found, *_), job in zip(reload(tmp_path, jobs), jobs, strict=True):
        assert torch.equal(found, given[os.path.basename(job[2])]), job[:3]


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "load_adapter"])
def test_adapters_around_a_wrapped_part_are_refused(tmp_path, how):
    model, _ = composed(text=lora())
    calls = {
        "get_peft_model": lambda: get_peft_model(model, lora()),
        "add_adapter": lambda: model.add_adapter(lora()),
        "load_adapter": lambda: model.load_adapter(str(tmp_path)),
    }
    with pytest.raises(ValueError, match=r"\['language_model'\].*wrapped by PEFT already.*merge_and_unload\(\)"):
        calls[how]()


def test_after_merging_the_part_the_whole_can_be_wrapped():
    model, processor = composed(text=lora())
    inputs = uneven_inputs(processor)
    model.language_model = model.language_model.merge_and_unload()
    expected = logits(model, inputs)
    whole = get_peft_model(model, lora()).eval()
    assert torch.equal(logits(whole, inputs), expected)
    assert trainable(whole) and all("lora_" in name for name in trainable(whole))


def test_trainer_saves_adapters_alone_and_resumes(tmp_path):
    items = [{"prompt": "a <image> ", "completion": f" is {i}", "images": [tiny.image(i)]} for i in range(4)]
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}

    def made(folder, steps):
        base, _, processor = saved_base(tmp_path / "base")
        model = get_peft_model(base, lora(modules_to_save=["projector"]))
        return trainer(model, processor, tmp_path / folder, items, max_steps=steps, **options)

    whole = made("whole", 4)
    whole.train()
    files = os.listdir(tmp_path / "whole" / "checkpoint-2")
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = made("resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- quantized by bitsandbytes

WIDE = {"hidden_size": 64, "intermediate_size": 128}
QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    model, processor = composed(projector="mlp", **WIDE)
    model.save_pretrained(folder / "base")
    return folder / "base", processor


def quantized(folder, key, **options):
    return AutoModel.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**QUANTIZED[key], **options))


@pytest.mark.parametrize("key", QUANTIZED)
def test_projectors_and_head_stay_in_full_precision(wide, key, tmp_path):
    for options in ({}, {"llm_int8_skip_modules": ["lm_head"]}):
        model = quantized(wide[0], key, **options)
        linear = {n: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        full = {name for name, cls in linear.items() if cls is torch.nn.Linear}
        assert full == {"language_model.lm_head", *(f"vision_encoder.projector.projection.{i}" for i in (0, 2))}
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    inputs = uneven_inputs(wide[1])
    check_comes_back(model, again, inputs)
    assert trainable(again) == trainable(model)


def test_half_precision_keeps_the_projectors_dtype(wide):
    model = AutoModel.from_pretrained(wide[0], dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_qlora_trains_with_media_and_comes_back_in_a_fresh_process(wide, tmp_path):
    inputs = uneven_inputs(wide[1])
    items = [{"prompt": "a <image> ", "completion": f" is {i}", "images": [tiny.image(i)]} for i in range(4)]
    jobs, expected = [], []
    for key, values in QUANTIZED.items():
        base = prepare_model_for_kbit_training(quantized(wide[0], key))
        config = lora(target_modules=r"language_model.*\.(q_proj|v_proj)", modules_to_save=["projector"])
        model = get_peft_model(base, config)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trainer(model, wide[1], tmp_path / "run", items).train()
        still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
        assert before and not still, f"{key}: every adapter and the projector train"
        expected.append((logits(model.eval(), inputs), trainable(model)))
        model.save_pretrained(tmp_path / key)
        jobs.append(
            (
                "to_train",
                str(wide[0]),
                str(tmp_path / key),
                {"quantization_config": BitsAndBytesConfig(**values)},
                inputs,
            )
        )
    for key, (found, names, _), (wanted, trains) in zip(QUANTIZED, reload(tmp_path, jobs), expected, strict=True):
        assert torch.equal(found, wanted), key
        assert names == trains, key


def test_parts_quantized_before_composing_run_and_are_not_saved(wide, tmp_path):
    tiny.llama(**WIDE).save_pretrained(tmp_path / "llama")
    part = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    model = MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip(**WIDE))}, language_model=part)
    model.set_modality_token_ids({"vision": MultimodalConfig.from_pretrained(wide[0]).vision_token_id})
    whole = get_peft_model(model, lora(modules_to_save=["projector"]))
    inputs = uneven_inputs(wide[1])
    whole(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [n for n, p in whole.named_parameters() if p.grad is not None] == trainable(whole)
    with pytest.raises(ValueError, match=r"language_model\S* was quantized before composing.*quantization_config"):
        whole.unload().save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists() and isinstance(whole, PeftModel)
