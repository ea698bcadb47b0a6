"""TRL's trainers, unmodified, on composed models: SFT in all its forms, DPO, GRPO, and the numbers they compute."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from helpers import compose_tiny
from own_memory import own_memory
from peft import LoraConfig, get_peft_model
from trainers import losses, rows, trainer
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from cornstarch_hf import MultimodalCollator

COUNT = 4
LORA = LoraConfig(
    r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["projector", "lm_head"], task_type="CAUSAL_LM"
)


def composed(*parts):
    """As `compose()` makes them: in training without logits beside labels."""
    model, processor = compose_tiny(*parts)
    model.config.loss_at_labels = True
    return model, processor


def asked(part={"type": "image"}):  # noqa: B006
    return {"role": "user", "content": [part, {"type": "text", "text": "what"}]}


def answered(i):
    return {"role": "assistant", "content": [{"type": "text", "text": f"it is {i}"}]}


def images():
    return [[tiny.image(i)] for i in range(COUNT)]


COLUMNS = {
    "messages": lambda: {"messages": [[asked(), answered(i)] for i in range(COUNT)]},
    "strings": lambda: {"messages": [[{"role": "user", "content": "what"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(COUNT)]},
    "prompt/completion": lambda: {"prompt": ["<image> what "] * COUNT, "completion": [f"it is {i}" for i in range(COUNT)]},
    "conversational prompt/completion": lambda: {"prompt": [[asked()]] * COUNT, "completion": [[answered(i)] for i in range(COUNT)]},
    "text": lambda: {"text": [f"<image> it is {i}" for i in range(COUNT)]},
    "preference": lambda: {"prompt": [[asked()]] * COUNT, "chosen": [[answered(i)] for i in range(COUNT)], "rejected": [[answered(9 - i)] for i in range(COUNT)]},
}  # fmt: skip


def table(form):
    return Dataset.from_dict(COLUMNS[form]() | {"images": images()})


def settings(config, folder, **options):
    defaults = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
                "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    if config is not GRPOConfig:
        defaults["max_length"] = None
    return config(**(defaults | options))


def sft(model, processor, folder, form="messages", data=None, peft=None, **options):
    data = table(form) if data is None else data
    return SFTTrainer(
        model=model,
        args=settings(SFTConfig, folder, **options),
        train_dataset=data,
        processing_class=processor,
        peft_config=peft,
    )


def saved(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before, model):
    return {name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)}


# ---- SFT


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("messages", {}),
        pytest.param("messages", {"assistant_only_loss": True}, marks=pytest.mark.slow),
        pytest.param("strings", {}, marks=pytest.mark.slow),
        ("prompt/completion", {}),
        pytest.param("prompt/completion", {"completion_only_loss": False}, marks=pytest.mark.slow),
        pytest.param("conversational prompt/completion", {}, marks=pytest.mark.slow),
        ("messages", {"peft": LORA}),
        ("messages", {"gradient_checkpointing": False}),
        # by default this trainer drops that column beside images
        pytest.param("text", {"remove_unused_columns": False}, marks=pytest.mark.slow),
        pytest.param("messages", {"path": True}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "plain",
)
def test_sft_loss_falls(tmp_path, form, options):
    model, processor = composed(["clip"])
    if (options := dict(options)).pop("path", False):
        model, processor = saved(model, processor, tmp_path / "model"), None
    made = sft(model, processor, tmp_path, form, max_steps=30, **options)
    seen = []
    made.model.get_submodule("base_model.model" if "peft" in options else "").vision_encoder.register_forward_hook(
        lambda *_: seen.append(1)
    )
    before = weights(made.model)
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0] and len(seen) >= 30
    assert any("projector" in name for name in moved(before, made.model))


@pytest.mark.slow
def test_sft_single_image_column_and_rows_without_images(tmp_path):
    single = Dataset.from_dict(COLUMNS["messages"]() | {"image": [tiny.image(i) for i in range(COUNT)]})
    made = sft(*composed(["clip"]), tmp_path, data=single)
    made.train()
    several = sft(*composed(["clip"]), tmp_path)
    several.train()
    assert losses(made) == losses(several)
    mixed = {"prompt": ["<image> what ", "what "] * 2, "completion": [f"it is {i}" for i in range(COUNT)]}
    mixed["images"] = [item if i % 2 == 0 else [] for i, item in enumerate(images())]
    for size in (1, 2):  # batches without any image, batches with and without
        made = sft(
            *composed(["clip"]), tmp_path, data=Dataset.from_dict(mixed), per_device_train_batch_size=size, max_steps=4
        )
        made.train()
        assert all(torch.tensor(losses(made)).isfinite())


def test_sft_on_a_vision_and_audio_model_with_vision_rows_alone(tmp_path):
    model, processor = composed(["clip", "whisper"])
    ran = []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, n=name: ran.append(n))
    before = weights(model)
    made = sft(model, processor, tmp_path, max_steps=30)
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0] and set(ran) == {"vision"}
    assert not any(name.startswith("audio_encoder") for name in moved(before, model))


def test_sft_on_sounds_by_our_collator(tmp_path):
    """TRL knows no sounds; rows reach our collator whole when it neither prepares the data nor drops columns."""
    model, processor = composed(["clip", "whisper"])
    names, items = ("prompt", "completion", "images", "audio"), rows()
    data = Dataset.from_dict({"index": range(len(items))}).with_transform(
        lambda batch: {name: [items[i].get(name) for i in batch["index"]] for name in names}
    )
    ran = []
    model.audio_encoder.register_forward_hook(lambda *_: ran.append(1))
    args = settings(
        SFTConfig, tmp_path, max_steps=30, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    made = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=processor,
        data_collator=MultimodalCollator(processor),
    )
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0] and ran


# ---- the numbers are the same whichever way


@pytest.mark.parametrize(
    ("form", "options"), [("messages", {"assistant_only_loss": True}), ("prompt/completion", {}), ("text", {})]
)
def test_sft_computes_what_plain_trainer_with_our_collator_does(tmp_path, form, options):
    """The same ids, labels and pixels, and the same loss and gradients."""
    model, processor = composed(["clip"], tiny.llama(vocab_size=300))  # a head without the placeholder
    made = sft(copy.deepcopy(model), processor, tmp_path, form, gradient_checkpointing=False, **options)
    data = [
        dict(zip(table(form).column_names, values, strict=True))
        for values in zip(*table(form).to_dict().values(), strict=True)
    ]
    data = [row | {"images": tiny_images} for row, tiny_images in zip(data, images(), strict=True)]
    theirs, ours = made.data_collator(copy.deepcopy(data)), MultimodalCollator(processor)(data)
    assert set(theirs) == set(ours)
    for key in ours:
        assert torch.equal(theirs[key], ours[key]), key
    count = ours["labels"][:, 1:].ne(-100).sum()
    plain = trainer(model, processor, tmp_path)
    found = [
        (m, t.compute_loss(m, dict(b), num_items_in_batch=count))
        for m, t, b in ((made.model, made, theirs), (model, plain, ours))
    ]
    torch.testing.assert_close(found[0][1], found[1][1], atol=0, rtol=1e-6)
    for each in found:
        each[1].backward()
    for (name, a), b in zip(found[0][0].named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_sft_labels_no_placeholder(tmp_path):
    """By default every token of a conversation is labelled; ours leaves features out, before anything is counted."""
    model, processor = composed(["clip"], tiny.llama(vocab_size=300))
    made = sft(model, processor, tmp_path, max_steps=1)
    batch = made.data_collator([{"messages": [asked(), answered(0)], "images": [tiny.image()]}])
    silent = batch["input_ids"] == processor.image_token_id
    assert silent.sum() == 5 and torch.equal(batch["labels"] == -100, silent)
    made.train()
    assert all(torch.tensor(losses(made)).isfinite())


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_sft_and_plain_trainer_agree_on_every_language_model(tmp_path, name):
    model, processor = composed(["clip"], tiny.LANGUAGE_MODELS[name]())
    made = sft(copy.deepcopy(model), processor, tmp_path, router_aux_loss_coef=0.0 if "moe" in name else None)
    made.model.eval()
    data = [{"messages": [asked(), answered(i)], "images": [tiny.image(i)]} for i in range(COUNT)]
    batch = made.data_collator(data)
    with torch.no_grad():
        found = made.compute_loss(made.model, dict(batch), num_items_in_batch=batch["labels"][:, 1:].ne(-100).sum())
        torch.testing.assert_close(found, model(**batch).loss, atol=1e-6, rtol=1e-6)
    made.train()
    assert losses(made)[-1] < losses(made)[0]


# ---- what training leaves behind


def test_a_trained_model_generates_and_loads_back(tmp_path):
    """These trainers leave a `forward` of their own on the model, whose signature names no encoder."""
    model, processor = composed(["clip"])
    sft(model, processor, tmp_path, max_steps=1).train()
    model.eval()
    inputs = processor.apply_chat_template([asked({"type": "image", "image": tiny.image()})], tokenize=True, return_dict=True,
                                           return_tensors="pt", add_generation_prompt=True)  # fmt: skip
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    again = own_memory(AutoModelForCausalLM.from_pretrained(saved(model, processor, tmp_path / "model")))
    assert torch.equal(said, again.generate(**inputs, max_new_tokens=4, do_sample=False))
    with pytest.raises(ValueError, match=r"not used by the model: \['pixels'\]"):
        model.generate(**inputs, pixels=1, max_new_tokens=1)


def test_adapters_inside_the_language_model_train(tmp_path):
    inside = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model, processor = composed(["clip"], get_peft_model(tiny.llama(), inside))
    expected = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    before = weights(model)
    made = sft(model, processor, tmp_path, max_steps=30)
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0]
    assert {n.removeprefix("language_model.") for n in moved(before, model) if n.startswith("language")} == expected


def test_an_adapter_on_the_head_is_refused_where_it_would_never_train(tmp_path):
    inside = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model, processor = composed(["clip"], get_peft_model(tiny.llama(), inside))
    with pytest.raises(ValueError, match=r"head has an adapter that trains.*modules_to_save"):
        sft(model, processor, tmp_path, max_steps=1).train()


# ---- DPO


@pytest.mark.parametrize("reference", ["given", "path", pytest.param("loaded", marks=pytest.mark.slow), "adapters"])
def test_two_steps_of_dpo(tmp_path, reference):
    """Without a reference model TRL loads one from where the model came from, or switches the adapters off."""
    model, processor = composed(["clip"])
    given, peft = None, None
    if reference == "given":
        given = copy.deepcopy(model)
    elif reference == "adapters":
        peft = copy.deepcopy(LORA)
    else:
        model = saved(model, processor, tmp_path / "model")
        model = model if reference == "path" else AutoModelForCausalLM.from_pretrained(model)
    made = DPOTrainer(
        model=model,
        ref_model=given,
        args=settings(DPOConfig, tmp_path),
        train_dataset=table("preference"),
        processing_class=processor,
        peft_config=peft,
    )
    before = weights(made.model)
    made.train()
    found = losses(made)
    assert found[0] == pytest.approx(0.6931, abs=1e-3), "model and reference agree at first: log 2"
    assert len(found) == 2 and all(torch.tensor(found).isfinite())
    assert any("projector" in name for name in moved(before, made.model))


# ---- GRPO


def grpo(folder, encoders=("clip",), data=None, peft=None, **options):
    model, processor = composed(list(encoders))
    options = {"num_generations": 2, "max_completion_length": 4} | options
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=settings(GRPOConfig, folder, **options),
        train_dataset=data or Dataset.from_dict({"prompt": [[asked()]] * COUNT, "images": images()}),
        processing_class=processor,
        peft_config=peft,
    )


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "adapters"])
def test_two_steps_of_grpo(tmp_path, peft):
    made = grpo(tmp_path, peft=copy.deepcopy(peft))
    ran = []
    (made.model.base_model.model if peft else made.model).vision_encoder.register_forward_hook(lambda *_: ran.append(1))
    before = weights(made.model)
    made.train()
    assert len(losses(made)) == 2 and ran
    assert any("projector" in name for name in moved(before, made.model))


@pytest.mark.slow
@pytest.mark.parametrize("encoders", [("clip", "whisper"), ("qwen2_vl",), ("siglip",)])
def test_grpo_on_other_compositions_and_rows_without_images(tmp_path, encoders):
    grpo(tmp_path, encoders).train()
    prompts = [[asked()] if i % 2 else [answered(i) | {"role": "user"}] for i in range(COUNT)]
    pictures = [item if i % 2 else [] for i, item in enumerate(images())]
    mixed = Dataset.from_dict({"prompt": prompts, "images": pictures})
    grpo(tmp_path, encoders, data=mixed, per_device_train_batch_size=4).train()
