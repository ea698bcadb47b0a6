"""The head at labelled positions only: the same loss and gradients as with all logits, for several language models."""

import copy
import json
from pathlib import Path

import pytest
import tiny
import torch
from helpers import compose_tiny, run_python
from tiny import Bare
from trainers import losses, rows, trainer

from cornstarch_hf import MultimodalCollator, MultimodalConfig, MultimodalModel
from cornstarch_hf.language_model.calling import _names_used, takes_positions

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
    rows_apart = "slice_logits_to_keep" in _names_used(
        part.language_model
    )  # before transformers 5.23 rows share positions
    expected = (int(labelled.sum()),) if rows_apart else (len(labelled), int(labelled.any(0).sum()))
    assert [tuple(shape) for shape in heads] == [(*expected, tiny.VOCABULARY)]


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
    import test_loss_at_labels as t
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


def test_language_models_that_take_the_same_positions_in_all_rows(monkeypatch):
    monkeypatch.setattr("cornstarch_hf.language_model.calling._names_used", lambda _: ("loss_function",))
    whole, part, batch = pair("gemma3")
    heads = []
    part.get_output_embeddings().register_forward_hook(lambda _, __, out: heads.append(out.shape[1]))
    (full, expected), (found, got) = gradients(whole, batch), gradients(part, batch)
    torch.testing.assert_close(found.loss, full.loss, rtol=1e-6, atol=0)
    assert_equal_gradients(expected, got)
    assert heads == [int((batch["labels"] != -100).any(0).sum())]


def test_the_setting_is_kept(tmp_path):
    model, _ = compose_tiny(["clip"])
    model.config.loss_at_labels = True
    model.save_pretrained(tmp_path)
    assert MultimodalModel.from_pretrained(tmp_path).config.loss_at_labels is True
    assert MultimodalConfig().loss_at_labels is False
    with pytest.raises(ValueError, match="loss_at_labels must be True or False, got 'yes'"):
        MultimodalConfig(loss_at_labels="yes")
