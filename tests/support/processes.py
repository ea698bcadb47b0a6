"""What each of several training processes does; run as a script, one process each, by `test_stand_ins` and `test_distributed`.

``python processes.py FOLDER RANK WORLD KIND ROWS OPTIONS``: of a model in FOLDER/model, three steps on this rank's rows, by KIND
(alone, ddp, fsdp, zero2, zero3); the weights go to FOLDER/KIND, as a checkpoint.
"""

import datetime
import json
import os
import sys
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from transformers import AutoModel, AutoProcessor

from cornstarch_hf import MultimodalCollator
from cornstarch_hf.language_model import label_loss

TEXTS = {"text": "a b c", "image": "<image> what", "audio": "hear <audio> now", "both": "<image> and <audio>"}


def batch(processor, kind, step):
    """A row of that kind, another one in each step."""
    media = {"images": tiny.image(seed=step)} if kind in ("image", "both") else {}
    media |= {"audio": tiny.sound(seed=step), "sampling_rate": 16_000} if kind in ("audio", "both") else {}
    inputs = processor(text=f"{TEXTS[kind]} {'x ' * step}", return_tensors="pt", **media)
    inputs["labels"] = inputs["input_ids"].clone()
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def prepared(folder, options):
    model = AutoModel.from_pretrained(folder / "model", dtype=torch.float64).train()
    for name in options.get("frozen", ()):
        getattr(model, name).module.requires_grad_(False)
    if "checkpointing" in options:
        model.gradient_checkpointing_enable({"use_reentrant": options["checkpointing"]})
    model.config.loss_at_labels = "at_once" in options
    label_loss.LOGITS_AT_ONCE = options.get("at_once", label_loss.LOGITS_AT_ONCE)
    return model


def optimizer(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def alone(folder, rows, options):
    """One process on the rows of all, whose mean loss is what several processes minimise."""
    model, processor = prepared(folder, options), AutoProcessor.from_pretrained(folder / "model")
    steps = optimizer(model)
    for step in range(3):
        steps.zero_grad(set_to_none=False)  # as with several: an encoder without an item has a gradient of zeros
        losses = [model(**batch(processor, kinds[step % len(kinds)], step)).loss for kinds in rows]
        (sum(losses) / len(losses)).backward()
        steps.step()
    model.save_pretrained(folder / "alone")


def ddp(folder, kinds, options, rank):
    model, processor = prepared(folder, options), AutoProcessor.from_pretrained(folder / "model")
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    steps = optimizer(model)
    for step in range(3):
        steps.zero_grad()
        wrapped(**batch(processor, kinds[step % len(kinds)], step)).loss.backward()
        steps.step()
    if rank == 0:
        model.save_pretrained(folder / "ddp")


def fsdp(folder, kinds, options, rank):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, processor = prepared(folder, options), AutoProcessor.from_pretrained(folder / "model")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for encoder in model.encoders.values():
        fully_shard(encoder, mesh=mesh)
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    steps = optimizer(model)
    for step in range(3):
        steps.zero_grad()
        model(**batch(processor, kinds[step % len(kinds)], step)).loss.backward()
        steps.step()
    model.eval()
    with torch.no_grad():  # ranks with other media, and none, answer together
        inputs = batch(processor, kinds[0], 0)
        inputs.pop("labels")
        model(**inputs)
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, synced_gpus=False)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "fsdp", state_dict=state)
    dist.barrier()


def zero(stage, folder, kinds, options, rank):
    import deepspeed

    model, processor = prepared(folder, options), AutoProcessor.from_pretrained(folder / "model")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    engine, *_ = deepspeed.initialize(model=model.float(), optimizer=optimizer(model), config=config)
    for step in range(3):
        inputs = {
            k: v.float() if v.is_floating_point() else v
            for k, v in batch(processor, kinds[step % len(kinds)], step).items()
        }
        engine.backward(engine(**inputs).loss)
        engine.step()
    state = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if rank == 0:
        model.save_pretrained(folder / f"zero{stage}", state_dict=state)
    dist.barrier()


def trainer(folder, rows, options, name):
    """transformers' Trainer, on rows of all processes in turn; a batch of one process has as many rows as there are others."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    def row(kind, step):
        media = {"images": [tiny.image(seed=step)]} if kind in ("image", "both") else {}
        media |= {"audio": [(tiny.sound(seed=step), 16_000)]} if kind in ("audio", "both") else {}
        return {"text": f"{TEXTS[kind]} {'x ' * step}", **media}

    model, processor = prepared(folder, options), AutoProcessor.from_pretrained(folder / "model")
    data = [row(kinds[step % len(kinds)], step) for step in range(3) for kinds in rows]
    arguments = TrainingArguments(
        str(folder / "out"), per_device_train_batch_size=len(rows) if name == "trainer_alone" else 1, max_steps=3, use_cpu=True,
        remove_unused_columns=False, report_to=[], save_strategy="no", learning_rate=0.1, lr_scheduler_type="constant",
        optim="sgd", ddp_backend="gloo" if "RANK" in os.environ else None, max_grad_norm=0, ddp_find_unused_parameters=False, disable_tqdm=True, weight_decay=0,
    )  # fmt: skip
    trained = InOrder(model, arguments, MultimodalCollator(processor), data)
    trained.train()
    assert trained.state.global_step == 3
    if int(os.environ.get("RANK", 0)) == 0:
        model.save_pretrained(folder / name)


def main(folder, rank, world, kind, rows, options):
    folder, rank, rows, options = Path(folder), int(rank), json.loads(rows), json.loads(options)
    torch.manual_seed(0)
    if kind == "alone":
        return alone(folder, rows, options)
    if kind.startswith("trainer"):
        return trainer(folder, rows, options, kind)
    timeout = datetime.timedelta(seconds=90)
    dist.init_process_group(
        "gloo", rank=rank, world_size=int(world), init_method=f"file://{folder}/store-{kind}", timeout=timeout
    )
    if kind.startswith("zero"):
        zero(int(kind[-1]), folder, rows[rank], options, rank)
    else:
        {"ddp": ddp, "fsdp": fsdp}[kind](folder, rows[rank], options, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
