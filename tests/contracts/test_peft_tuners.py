"""Every adapter type of the installed PEFT, inside parts and around a composed model: equal to the bit again, or a clear error."""

import copy

import pytest
import tiny
import torch
import tuners
from helpers import compose_tiny, needs_attaching, uneven_inputs
from own_memory import check_comes_back, own_memory, weights
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModel
from tuners import moved

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from cornstarch_hf.parts import versions
from cornstarch_hf.parts.freezing import usually_trains

CAUSAL = {"task_type": "CAUSAL_LM"}


def trainable(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def composed(kind, part, **options):
    """A composed model with a type of adapter inside one part, and its processor."""
    if part == "vision":
        options |= (
            {"target_modules": ["position_embedding"], "token_indices": [3]} if kind == "TRAINABLE_TOKENS" else {}
        )
        encoder = moved(get_peft_model(tiny.clip(), tuners.config(kind, **options))).eval()
        model = MultimodalModel(encoders={"vision": ModalEncoderModule(encoder)}, language_model=tiny.llama()).eval()
        processor = MultimodalProcessor(tiny.tokenizer(), {"vision": tiny.clip_processor()}, model=model)
        processor.items = {"vision": tiny.image}
        return model, processor
    text = tiny.llama(attention_bias=True)
    return compose_tiny(["clip"], moved(get_peft_model(text, tuners.config(kind, **CAUSAL, **options))).eval())


# ---- the table

# What PEFT says of types that it does not put around language models of any kind, or calls with `input_ids` alone.
PEFTS_OWN = {
    "ADAPTION_PROMPT": (ValueError, "Unsupported model type"),
    "MULTITASK_PROMPT_TUNING": (ValueError, "task_ids cannot be None"),
    "POLY": (ValueError, "task_ids should not be None"),
    "SHADOW": (AttributeError, "Unable to automatically locate the transformer backbone"),
    "XLORA": (Exception, ""),
}
NEEDS = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2, "num_tasks": 1},
}


def test_types_that_are_not_for_composed_models_are_those_that_peft_refuses():
    assert set(PEFTS_OWN) == tuners.NOT_FOR_COMPOSED
    inputs = {"input_ids": torch.tensor([[3, 4, 3]])}
    for kind, (error, message) in PEFTS_OWN.items():
        if kind not in tuners.EVERY or kind == "XLORA":  # of adapters in folders
            continue
        options = {"target_modules": None} if kind == "SHADOW" else {}
        config = tuners.config(kind, **CAUSAL | NEEDS.get(kind, {}) | options)
        with pytest.raises(error, match=message):
            get_peft_model(compose_tiny(["clip"])[0], config)(**inputs)


# ---- inside a part

BEFORE_WEIGHTS = "PEFT cannot build adapters of type .* before the weights are there.*merge_and_unload.*get_peft_model"
NO_BUFFERS = (
    r"would not hold the buffers .*cannot make them again: {}merge_and_unload\(\) .*get_peft_model\(mllm, config\)"
)
REFUSED = dict.fromkeys(("ADAMSS", "FROD", "SHIRA"), BEFORE_WEIGHTS)
REFUSED |= dict.fromkeys(("OSF", "PSOFT"), NO_BUFFERS.format(""))
REFUSED |= {"UNILORA": NO_BUFFERS.format("use save_indices=True in the adapter configuration, or ")}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["text", "vision"])
@pytest.mark.parametrize("kind", tuners.INSIDE)
def test_an_adapter_inside_a_part_comes_back_or_is_refused(tmp_path, kind, part):
    model, processor = composed(kind, part)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert trainable(again) == trainable(model)
    check_comes_back(model, again, uneven_inputs(processor))


@pytest.mark.parametrize("kind", sorted(tuners.PROMPT_LEARNING))
def test_prompts_inside_a_part_are_refused(kind):
    with pytest.raises(ValueError, match=r"language_model: a checkpoint cannot hold .*get_peft_model\(mllm, config\)"):
        composed(kind, "text")


def test_indices_that_are_saved_come_back(tmp_path):
    model, processor = composed("UNILORA", "text", save_indices=True)
    model.save_pretrained(tmp_path)
    check_comes_back(model, AutoModel.from_pretrained(tmp_path), uneven_inputs(processor))


# ---- around the model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, processor = compose_tiny(["clip"])
    model.save_pretrained(folder)
    return folder, uneven_inputs(processor)


def logits(model, inputs):
    with torch.no_grad():
        return own_memory(copy.deepcopy(model).eval())(**own_memory(inputs)).logits


@pytest.mark.slow
@pytest.mark.parametrize("within", ["language_model", "vision_encoder.module"])
@pytest.mark.parametrize("kind", tuners.AROUND)
def test_an_adapter_around_the_model_comes_back_by_each_loader(tmp_path, base, kind, within):
    if within != "language_model" and kind in {*tuners.PROMPT_LEARNING, "TRAINABLE_TOKENS"}:
        return  # which have no layers, or those of words
    folder, inputs = base
    model = moved(get_peft_model(AutoModel.from_pretrained(folder), tuners.config(kind, within, **CAUSAL))).eval()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(AutoModel.from_pretrained(folder), tmp_path), inputs), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), inputs), expected)
    try:
        loaded = AutoModel.from_pretrained(tmp_path)
    except ValueError as error:
        for named in (str(tmp_path), "AutoPeftModelForCausalLM.from_pretrained", "PeftModel.from_pretrained"):
            assert named in str(error), "whose fault it is, and the remedy"
        return
    assert torch.equal(logits(loaded, inputs), expected)


@needs_attaching
@pytest.mark.parametrize(("kind", "options"), [("ADALORA", {}), ("LORA", {"use_dora": True}), ("VERA", {})])
def test_folders_of_adapters_that_transformers_does_not_know_well(tmp_path, base, kind, options):
    folder, inputs = base
    model = get_peft_model(AutoModel.from_pretrained(folder), tuners.config(kind, "language_model", **CAUSAL | options))
    moved(model).eval().save_pretrained(tmp_path)
    if kind == "ADALORA":
        assert torch.equal(logits(AutoModel.from_pretrained(tmp_path), inputs), logits(model, inputs))
        return
    named = rf"{tmp_path}: transformers does not .*AutoPeftModelForCausalLM.from_pretrained\('{tmp_path}'\)"
    with pytest.raises(ValueError, match=named):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.skipif(not versions.peft_is_behind(), reason="PEFT is as transformers wants it")
def test_the_remedy_where_transformers_wants_a_newer_peft(tmp_path, base):
    model = get_peft_model(AutoModel.from_pretrained(base[0]), tuners.config("LORA", **CAUSAL))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: load_adapter.*AutoPeftModelForCausalLM.from_pretrained\(folder\)"
    ):
        AutoModel.from_pretrained(tmp_path)


# ---- tied embeddings

TIED = {
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 7]},
    "targets": {"target_modules": ["embed_tokens", "q_proj"]},
    "both targets": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("ensure", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["ensured", ""])
@pytest.mark.parametrize("key", TIED)
def test_adapters_of_tied_embeddings_come_back(tmp_path, base, key, ensure):
    config = tuners.config("LORA", **CAUSAL, **TIED[key], ensure_weight_tying=ensure)
    text = get_peft_model(tiny.llama(tie_word_embeddings=True), copy.deepcopy(config))
    if key not in ("targets", "both targets"):
        text.add_adapter("second", copy.deepcopy(config))
    model, processor = compose_tiny(["clip"], moved(text).eval())
    inputs = uneven_inputs(processor)
    if ensure and "targets" in key:  # one side is a transposed view of the other
        with pytest.raises(ValueError, match=r"language_model: .*lora_\S+ are views of one.*ensure_weight_tying=False"):
            model.save_pretrained(tmp_path / "inside")
    else:
        model.save_pretrained(tmp_path / "inside")
        again = AutoModel.from_pretrained(tmp_path / "inside")
        assert trainable(again) == trainable(model)
        check_comes_back(model, again, inputs)

    plain, _ = compose_tiny(["clip"], tiny.llama(tie_word_embeddings=True))
    plain.save_pretrained(tmp_path / "base")
    outer = moved(get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config)).eval()
    outer.save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    assert torch.equal(logits(loaded, inputs), logits(outer, inputs))


# ---- what trains

STATES = {
    "as it is": {},
    "biases": {"bias": "all"},
    "tokens": {"trainable_token_indices": [3]},
    "saved": {"modules_to_save": ["lm_head"]},
}


def check_round_trip(model):
    names = trainable(model)
    for _ in range(2):
        assert not trainable(model.train(llm_mode=False))
        assert trainable(model.train(llm_mode=True)) == names
    text = {name for name in names if name.startswith("language_model.")}
    model.freeze("language_model")
    assert trainable(model.train(llm_mode=True)) >= text, "frozen by name"


@pytest.mark.parametrize("state", [s if s == "as it is" else pytest.param(s, marks=pytest.mark.slow) for s in STATES])
@pytest.mark.parametrize("kind", tuners.INSIDE)
def test_all_that_an_adapter_trains_trains_again(kind, state):
    options = STATES[state]
    if not set(options) <= set(type(tuners.config(kind)).__dataclass_fields__):
        pytest.skip("no option of this type")
    try:
        model, _ = composed(kind, "text", **options)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"PEFT: {error}"[:100])
    assert usually_trains(model.language_model) == trainable(model.language_model), "as PEFT leaves it"
    check_round_trip(model)


ADAPTERS = {
    "second": lambda text: text.set_adapter("second"),
    "both": lambda text: text.base_model.set_adapter(["default", "second"]),
    "off": lambda text: text.base_model.disable_adapter_layers(),
    "held by hand": lambda text: next(p for p in text.parameters() if p.requires_grad).requires_grad_(False),
    "base by hand": lambda text: text.base_model.model.model.norm.requires_grad_(True),
}


@pytest.mark.parametrize("state", ADAPTERS)
def test_what_is_active_and_what_was_set_by_hand_trains_again_after_a_reload_too(tmp_path, state):
    text = get_peft_model(tiny.llama(), tuners.config("LORA", trainable_token_indices=[3], **CAUSAL))
    text.add_adapter("second", tuners.config("LORA", modules_to_save=["lm_head"], **CAUSAL))
    ADAPTERS[state](text)
    model, _ = compose_tiny(["clip"], text)
    names = trainable(model)
    model.train(llm_mode=False).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert not trainable(again) and trainable(again.train(llm_mode=True)) == names
    assert trainable(model.train(llm_mode=True)) == names


def test_an_adapter_that_was_made_active_meanwhile_trains():
    text = get_peft_model(tiny.llama(), tuners.config("LORA", **CAUSAL))
    text.add_adapter("second", tuners.config("LORA", **CAUSAL))
    model, _ = compose_tiny(["clip"], text)
    model.train(llm_mode=False)
    text.base_model.set_adapter("second", inference_mode=True)
    text = {name for name in trainable(model.train(llm_mode=True)) if name.startswith("language_model")}
    assert text and all(".second." in name for name in text)


def test_unfreeze_trains_all_that_adapters_train():
    model, _ = composed("LORA", "text", trainable_token_indices=[3], bias="lora_only")
    names = trainable(model)
    assert trainable(model.freeze("language_model", "*.projector", "vision_encoder.module").unfreeze()) == names


# ---- merged


@pytest.mark.parametrize("where", ["inside", "around"])
def test_what_trains_after_merging_and_a_reload(tmp_path, base, where):
    if where == "inside":
        model, _ = composed("LORA", "text", bias="all", modules_to_save=["lm_head"], trainable_token_indices=[3])
        biases = {name for name in trainable(model) if name.endswith(".bias") and "language_model" in name}
        assert biases
        model.language_model = model.language_model.merge_and_unload()
        expected = {name for name in trainable(model) if not name.startswith("language_model")}  # as before
        assert len(expected) == len(list(model.vision_encoder.parameters()))
        plain = {name for name, _ in model.named_parameters() if name.startswith("language_model")}
        expected |= {name for name in plain if name.endswith((".bias", "lm_head.weight"))}
    else:
        config = tuners.config("LORA", "language_model", modules_to_save=["projector"], **CAUSAL)
        model = get_peft_model(AutoModel.from_pretrained(base[0]), config).merge_and_unload()
        expected = {f"vision_encoder.projector.projection.{key}" for key in ("weight", "bias")}
    assert trainable(model) == expected
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert trainable(again) == expected and weights(again) == weights(model)
    again.train(llm_mode=True)
    assert all(p.requires_grad for p in again.language_model.parameters())
    assert all(p.requires_grad for p in again.unfreeze().parameters())
