"""The head at labelled positions only, some at a time: the loss and gradients of all logits, for several language models."""

import copy
import functools
import gc
import json
import math
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.utils.prune
from helpers import compose_tiny, run_python
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import Bare
from trainers import losses, rows, trainer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from cornstarch_hf import MultimodalCollator, MultimodalConfig, MultimodalModel
from cornstarch_hf.language_model.label_loss import takes_positions

LANGUAGE_MODELS = {
    "llama": tiny.llama,
    "gpt2": lambda: tiny.gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gemma3": lambda: tiny.gemma3(final_logit_softcapping=0.5),
    "qwen3_moe": lambda: tiny.qwen3_moe(output_router_logits=True, router_aux_loss_coef=0.5),
}


def pair(key, dtype=torch.float32):
    """One model with all logits and an equal one with those at labels, and a batch for them."""
    whole, processor = compose_tiny(["clip", "whisper"], LANGUAGE_MODELS[key]())
    whole = whole.to(dtype)
    part = copy.deepcopy(whole)
    part.config.loss_at_labels = True
    return whole.train(), part.train(), MultimodalCollator(processor)(rows(4))


def gradients(model, batch, **options):
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        # That of a bias of keys is zero: what there is of it is the rounding of its weight's.
        scale = a[name.replace("k_proj.bias", "k_proj.weight")].norm()
        difference = (a[name] - b[name]).norm()
        # Products of other shapes; in float64 the gradients agree to 1e-9.
        assert difference <= 1e-5 * scale or difference == 0, name


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": torch.tensor(100)}], ids=["mean", "counted"])
@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_loss_and_gradients(key, counted):
    whole, part, batch = pair(key)
    heads = []
    part.get_output_embeddings().register_forward_hook(lambda _, __, out: heads.append(out.shape))
    full, expected = gradients(whole, batch, **counted)
    found, got = gradients(part, batch, **counted)
    assert found.logits is None and full.logits is not None
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)
    labelled = batch["labels"] != -100
    assert [tuple(shape) for shape in heads] == [(1, int(labelled.sum()), tiny.VOCABULARY)]


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_gradients_in_float64(key):
    whole, part, batch = pair(key, torch.float64)
    for model in (whole, part):
        model.set_experts_implementation("eager")  # the fused one knows no float64
    (_, expected), (_, got) = gradients(whole, batch), gradients(part, batch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_under_gradient_checkpointing(key):
    whole, part, batch = pair(key)
    _, expected = gradients(whole, batch)
    part.gradient_checkpointing_enable()
    assert_equal_gradients(expected, gradients(part.train(), batch)[1])


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[] if key == "llama" else pytest.mark.slow) for key in LANGUAGE_MODELS]
)
def test_accumulated_by_trainer(key, tmp_path):
    found = []
    for at_labels in (False, True):
        model, processor = compose_tiny(["clip", "whisper"], LANGUAGE_MODELS[key]())
        model.config.loss_at_labels = at_labels
        made = trainer(model, processor, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        made.train()
        found.append((losses(made), [p.detach() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


DISTRIBUTED = """
import copy, json, os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

def work(rank, folder):
    sys.path.insert(0, sys.argv[2])
    import test_label_loss as t
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store")
    results = {}
    for key in t.LANGUAGE_MODELS:
        whole, part, _ = t.pair(key)
        _, processor = t.compose_tiny(["clip", "whisper"])
        batch = t.MultimodalCollator(processor)(t.rows(8)[rank * 4 : rank * 4 + 4 - rank])
        found = []
        for model in (whole, part):
            model = DistributedDataParallel(model, find_unused_parameters=True)
            model(**batch).loss.backward()
            found.append({n: p.grad for n, p in model.module.named_parameters() if p.grad is not None})
        t.assert_equal_gradients(*found)
        results[key] = len(found[0])
        del model  # before the group: its last user would wait, with Python's lock held, for a thread that needs it
    if rank == 0:
        json.dump(results, open(f"{folder}/results.json", "w"))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_in_two_processes(tmp_path):
    (tmp_path / "work.py").write_text(DISTRIBUTED)
    run_python(tmp_path / "work.py", str(tmp_path), str(Path(__file__).parent))
    assert set(json.loads((tmp_path / "results.json").read_text())) == set(LANGUAGE_MODELS)


def test_labels_that_are_shifted_already():
    whole, part, batch = pair("llama")
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    full, expected = gradients(whole, batch, shift_labels=shifted)
    found, got = gradients(part, batch, shift_labels=shifted)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)


def test_no_label_at_all():
    whole, part, batch = pair("llama")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    counted = {"num_items_in_batch": torch.tensor(7)}
    assert part(**batch).loss.isnan() and whole(**batch).loss.isnan()
    found, got = gradients(part, batch, **counted)
    assert found.loss == 0 and found.logits is None and not any(g.any() for g in got.values())


def test_logits_are_there_outside_of_training_and_when_asked_for():
    whole, part, batch = pair("llama")
    assert torch.equal(part.eval()(**batch).logits, whole.eval()(**batch).logits)
    part.train()
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert part(**unlabelled).logits.shape[1] == batch["input_ids"].shape[1]
    assert len(part(**batch, return_dict=False)) == len(whole.train()(**batch, return_dict=False)) - 1


def test_a_language_model_without_these_means_runs_its_whole_head():
    whole, processor = compose_tiny(["clip"])
    batch = MultimodalCollator(processor)([r for r in rows(8) if "audio" not in r])
    expected = whole.train()(**batch).loss
    whole.config.loss_at_labels = True
    heads = []
    whole.get_output_embeddings().register_forward_hook(lambda _, __, out: heads.append(out.shape[:2]))
    whole.language_model.loss_function = lambda logits, labels, vocab_size, **_: torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert not takes_positions(whole.language_model) and not takes_positions(Bare())
    found = whole(**batch)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None and heads == [batch["input_ids"].shape]


def test_a_language_model_that_cannot_be_copied_takes_the_same_positions_in_all_rows():
    whole, part, batch = pair("gemma3")
    inner = part.language_model
    inner.forward = functools.partial(type(inner).forward, inner)  # as accelerate does, to move its inputs
    heads = []
    part.get_output_embeddings().register_forward_hook(lambda _, __, out: heads.append(out.shape[1]))
    (full, expected), (found, got) = gradients(whole, batch), gradients(part, batch)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)
    assert heads == [int((batch["labels"] != -100).any(0).sum()) + 2]


# ---- some positions at a time


def phi():
    config = PhiConfig(**tiny.TEXT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0})
    return PhiForCausalLM(config)


def scaled(cls, config, **options):
    return lambda: cls(config(**tiny.TEXT | options))


def with_lora(tied=False, **options):
    def made():
        model = get_peft_model(
            tiny.llama(tie_word_embeddings=tied), LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.0, **options)
        )
        return model.requires_grad_(True) if "modules_to_save" in options else model

    return made


HEADS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tie_word_embeddings=True),
    "soft cap": lambda: tiny.gemma3(final_logit_softcapping=0.5),
    "scale, Cohere": scaled(CohereForCausalLM, CohereConfig, logit_scale=0.25),
    "scale, Granite": scaled(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0),
    "bias": phi,
    "router": LANGUAGE_MODELS["qwen3_moe"],
    "nested backbone": scaled(OPTForCausalLM, OPTConfig, ffn_dim=32, word_embed_proj_dim=32, dropout=0.0),
    "adapter on the head": with_lora(target_modules=["q_proj", "lm_head"]),
    "tokens of a tied head": with_lora(tied=True, trainable_token_indices=[3, 4, 5, 9], target_modules=["q_proj"]),
    "head in an adapter": with_lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}
ROWS = 5  # logits at once


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr("cornstarch_hf.language_model.label_loss.LOGITS_AT_ONCE", ROWS * tiny.VOCABULARY)


def fully_labelled(key, count=4):
    """As `pair`, with a label on every token of a text."""
    torch.manual_seed(0)
    whole, processor = compose_tiny(["clip"], HEADS[key]())
    part = copy.deepcopy(whole)
    part.config.loss_at_labels = True
    batch = MultimodalCollator(processor)([row for row in rows(3 * count) if "audio" not in row][:count])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][batch["input_ids"] == processor.placeholder_ids["vision"]] = -100
    return whole.train(), part.train(), batch


def head_rows(model):
    found = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: found.append(out.shape[1]))
    return found


COUNTED = [{}, {"num_items_in_batch": torch.tensor(100)}, {"num_items_in_batch": torch.tensor([100])}]


@pytest.mark.parametrize("counted", COUNTED, ids=["mean", "counted", "counted for replicas"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize("key", HEADS)
def test_loss_and_gradients_in_parts(key, frozen, counted, few_at_once):
    whole, part, batch = fully_labelled(key)
    for model in (whole, part):
        model.language_model.requires_grad_(not frozen) if frozen or "adapter" not in key else None
    made = head_rows(part)
    (full, expected), (found, got) = gradients(whole, batch, **counted), gradients(part, batch, **counted)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert sum(made[-math.ceil(labelled / ROWS) :]) == labelled > 3 * ROWS and max(made) <= ROWS
    assert found.logits is None
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert expected.keys() == got.keys() and expected
    scale = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= 2e-7 * scale, name
    if "router" in key:
        torch.testing.assert_close(found.aux_loss, full.aux_loss, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["llama", "tied", "router"])
def test_parts_are_gone_through_again_for_a_second_backward_pass(key, few_at_once):
    _, part, batch = fully_labelled(key)
    loss = part(**batch).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in part.named_parameters() if p.grad is not None}
    (3 * loss).backward()
    for name in once:
        torch.testing.assert_close(part.get_parameter(name).grad, 4 * once[name])


def test_parts_of_a_loss_that_is_scaled(few_at_once):
    whole, part, batch = fully_labelled("llama")
    found = []
    for model in (whole, part):
        (model(**batch).loss / 8).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal_gradients(*found)


def test_parts_under_autocast(few_at_once):
    whole, part, batch = fully_labelled("llama")
    with torch.autocast("cpu", torch.bfloat16):
        (full, expected), (found, got) = gradients(whole, batch), gradients(part, batch)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-4, atol=0)
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= 0.02 * grad.norm(), name  # of several sums in bfloat16


def test_parts_are_not_taken_in_float16_whose_gradients_need_a_scaled_loss(few_at_once):
    _whole, part, batch = fully_labelled("llama")
    part = part.half()
    made = head_rows(part)
    gradients(part, batch)
    assert made == [int((batch["labels"][:, 1:] != -100).sum())]


def test_hooks_on_the_language_model_and_its_backbone_run_once(few_at_once):
    _, part, batch = fully_labelled("llama")
    calls = []
    for where in (part.language_model, part.language_model.model):
        where.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    part(**batch)
    assert calls == ["LlamaModel", "LlamaForCausalLM"]


def test_what_a_call_copies_leaves_the_language_model_as_it_is(few_at_once):
    _, part, batch = fully_labelled("llama")
    modules, names = list(part.modules()), dict(vars(part.language_model))
    part(**batch).loss.backward()
    assert list(part.modules()) == modules and vars(part.language_model) == names
    assert set(pickle.loads(pickle.dumps(part)).state_dict()) == set(part.state_dict())


def test_a_loss_with_more_in_it_is_taken_whole(few_at_once):
    whole, part, batch = fully_labelled("llama")

    def with_more(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
        found = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")
        return found / (num_items_in_batch or (targets != -100).sum()) + logits.logsumexp(-1).square().mean()

    part.language_model.loss_function = with_more
    made = head_rows(part)
    part(**batch)
    assert made == [batch["input_ids"].shape[1]]  # somebody's own loss, of which nothing is known
    made.clear()
    with_more.__module__ = "transformers.loss"
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    assert part(**batch).loss > whole(**batch).loss + 1 and made[-1] == labelled
    made.clear()
    part(**batch)
    assert made == [labelled]  # found out once


def doubled_at_all(model):
    for weight in (model.language_model.lm_head.weight, model.language_model.model.norm.weight):
        weight.register_hook(lambda grad: 2 * grad)


def pruned(model):
    torch.nn.utils.prune.l1_unstructured(model.language_model.lm_head, "weight", amount=0.5)


def patched(model):
    head = model.language_model.lm_head
    head.forward = lambda x: 3 * torch.nn.functional.linear(x, head.weight)


def compiled(model):
    model.language_model.compile(backend="eager")


ODD = [doubled_at_all, pruned, patched, compiled]


@pytest.mark.parametrize("at_once", [ROWS * tiny.VOCABULARY, 2**24], ids=["parts", "at once"])
@pytest.mark.parametrize("change", ODD)
def test_heads_that_compute_something_else(change, at_once, monkeypatch):
    monkeypatch.setattr("cornstarch_hf.language_model.label_loss.LOGITS_AT_ONCE", at_once)
    whole, part, batch = fully_labelled("llama")
    for model in (whole, part):
        change(model)
    (full, expected), (found, got) = gradients(whole, batch), gradients(part, batch)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)


def test_nothing_of_a_step_in_parts_stays(few_at_once):
    _, part, batch = fully_labelled("llama")
    gc.collect()
    gc.disable()
    try:
        loss = part(**batch).loss
        kept = weakref.ref(loss.grad_fn.next_functions[0][0].gradients[1])
        loss.backward()
        del loss
        assert kept() is None or kept() is part.language_model.lm_head.weight.grad
    finally:
        gc.enable()


def test_learnt_prompts_in_front_give_the_first_token_a_label():
    whole, part, batch = fully_labelled("llama")
    for model in (whole, part):
        torch.manual_seed(5)
        model.language_model = get_peft_model(
            model.language_model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        )
        assert not takes_positions(model.language_model)
    (full, expected), (found, got) = gradients(whole, batch), gradients(part, batch)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)


# ---- without logits


def test_reading_logits_beside_labels_says_what_to_set():
    _, part, batch = pair("llama")
    output = part(**batch)
    with pytest.warns(UserWarning, match=r"outputs.logits is None.*skip_logits=False.*config.loss_at_labels = False"):
        assert output.logits is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "logits" not in output and output.get("logits") is None and "logits=None" in repr(output)
        again = pickle.loads(pickle.dumps(output))
        assert type(again).__name__ == "CausalLMOutputWithPast" and torch.equal(again.loss, output.loss)
        assert isinstance(output, type(again)) and list(output) == list(again)
        assert copy.copy(output).image_outputs is output.image_outputs
        output.logits = output.loss
        assert output.logits is output.loss and output["logits"] is output.loss
        assert part(**batch, skip_logits=False).logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("key", LANGUAGE_MODELS)
def test_evaluation_without_logits(key):
    whole, _, batch = pair(key)
    made = head_rows(whole.eval())
    with torch.no_grad():
        full, found = whole(**batch), whole(**batch, skip_logits=True)
    assert "logits" in full and "logits" not in found
    assert made[1:] == [int((batch["labels"] != -100).sum())]
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)


def test_evaluation_in_parts(few_at_once):
    whole, _, batch = fully_labelled("soft cap")
    made = head_rows(whole.eval())
    with torch.no_grad():
        full, found = whole(**batch), whole(**batch, skip_logits=True)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert max(made[1:]) <= ROWS and not found.loss.requires_grad


def reading_logits(model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(**inputs).logits[:, -1].sum()


@pytest.mark.parametrize("mixed", [{}, {"bf16": True}], ids=["float32", "bfloat16"])
def test_a_trainer_that_reads_logits_beside_labels_is_told(mixed, tmp_path):
    model, processor = compose_tiny(["clip", "whisper"])
    model.config.loss_at_labels = True
    made = trainer(model, processor, tmp_path, **mixed)
    made.compute_loss = reading_logits
    with pytest.warns(UserWarning, match="config.loss_at_labels = False"), pytest.raises(TypeError, match="NoneType"):
        made.train()


def own_loss(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].float().logsumexp(-1).mean()


WAYS = {"metrics": {}, "smoothed": {"label_smoothing_factor": 0.1}, "own loss": {}}


@pytest.mark.parametrize("way", WAYS)
def test_trainer_gets_logits_where_it_needs_them(way, tmp_path):
    found = []
    for at_labels in (False, True):
        model, processor = compose_tiny(["clip", "whisper"])
        model.config.loss_at_labels, seen = at_labels, []
        made = trainer(model, processor, tmp_path, **WAYS[way])
        made.compute_metrics = lambda prediction, seen=seen: seen.append(prediction.predictions.shape) or {}
        made.compute_loss_func = own_loss if way == "own loss" else None
        made.train()
        loss = made.evaluate()["eval_loss"]
        assert [(shape[0], shape[-1]) for shape in seen] == [(2, tiny.VOCABULARY)]
        found.append([*losses(made), loss])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_no_logits_and_nothing_else():
    whole, _, batch = pair("llama")
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    with pytest.raises(ValueError, match="skip_logits=True needs labels"):
        whole(**unlabelled, skip_logits=True)
    with pytest.raises(ValueError, match="skip_logits=True says the opposite of logits_to_keep"):
        whole(**batch, skip_logits=True, logits_to_keep=1)


def test_the_setting_is_kept(tmp_path):
    model, _ = compose_tiny(["clip"])
    model.config.loss_at_labels = True
    model.save_pretrained(tmp_path)
    assert MultimodalModel.from_pretrained(tmp_path).config.loss_at_labels is True
    assert MultimodalConfig().loss_at_labels is False
    with pytest.raises(ValueError, match="loss_at_labels must be True or False, got 'yes'"):
        MultimodalConfig(loss_at_labels="yes")
