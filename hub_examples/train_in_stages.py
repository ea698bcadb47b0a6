"""Train a composed model in stages: align the projectors, adapt the language model, then train everything.

1. align: encoders and language model are frozen, the projectors train
2. adapt: LoRA on the language model, the projectors go on training
3. full: the adapters are merged, everything trains, each part at its own learning rate

Every stage is a plain `transformers.Trainer`.  Run the same command again after an interruption: finished stages are
skipped, a stage that was interrupted goes on from its last checkpoint and gives the weights of an uninterrupted run.
The task is that of `quickstart.py`: add a handwritten digit to a telephone tone.

    python hub_examples/train_in_stages.py
    python hub_examples/train_in_stages.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --audio openai/whisper-tiny --steps 200 200 100 --batch-size 8

Without ids the example makes small parts and first teaches each its own trade: the encoders to tell digits and tones,
the language model to add written digits.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digits_and_tones import HELD_OUT, EncodedRows, answered, digits, jittered, questions, small_parts, tone
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments, set_seed

from cornstarch_hf import compose
from cornstarch_hf.training.optimizer_groups import parameter_groups


@dataclass
class Stage:
    """One stage: what it does to the model of the stage before, and the learning rate of each part that trains."""

    name: str
    prepare: Callable
    small: dict[str, float]  # learning rates for the small models made here ...
    pretrained: dict[str, float]  # ... and for models of the Hub


def align(model, processor):
    """Train the projectors alone."""
    model.freeze("*_encoder.module", "language_model")
    return model, processor


def adapt(model, processor):
    """LoRA on the language model, whatever its layers are called; the composed checkpoint holds the adapters."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return with_language_model(model, processor, get_peft_model(model.language_model, lora))


def full(model, processor):
    """Merge the adapters and train everything."""
    model, processor = with_language_model(model, processor, model.language_model.merge_and_unload())
    return model.unfreeze(), processor


STAGES = [
    Stage("align", align, {"projector": 2e-3}, {"projector": 1e-3}),
    Stage("adapt", adapt, {"projector": 1e-3, "language_model": 2e-3}, {"projector": 2e-4, "language_model": 2e-4}),
    Stage(
        "full",
        full,
        {"*_encoder.module": 5e-4, "projector": 5e-4, "language_model": 5e-4},
        {"*_encoder.module": 2e-6, "projector": 2e-5, "language_model": 2e-5},
    ),
]


def with_language_model(model, processor, language_model):
    """Compose the same encoders, projectors and tokens with another language model."""
    encoders = {
        name: {"model": encoder, "processor": processor.processors[name]} for name, encoder in model.encoders.items()
    }
    return compose(
        language_model,
        encoders,
        tokens=processor.tokens,
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
    )


def save(folder: Path, *parts) -> None:
    """Save models and processors in one folder, which appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    for part in parts:
        part.save_pretrained(partial)
    partial.rename(folder)


# ---- small parts that know their own trade


def fit(name: str, model: torch.nn.Module, loss_of: Callable, steps: int, rate: float) -> None:
    """Minimise `loss_of(step)` over the model's parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{name}: loss {loss.item():.2f} after {steps} steps", flush=True)


def classifier_loss(logits_of: Callable, items: torch.Tensor, labels) -> Callable:
    """Cross entropy on random batches of 64."""
    labels = torch.as_tensor(labels)

    def loss_of(_: int) -> torch.Tensor:
        chosen = torch.randint(len(items), (64,))
        return torch.nn.functional.cross_entropy(logits_of(items[chosen]), labels[chosen])

    return loss_of


def written_sums(tokenizer, generator: np.random.Generator, count: int = 64) -> dict[str, torch.Tensor]:
    """Sums like "777 + 55 = 7 + 5 = 12": an item may take several tokens, as an image or a sound does."""
    prompts, answers = [], []
    for a, b in generator.integers(10, size=(count, 2)):
        prompts.append(f"{str(a) * generator.integers(1, 20)} + {str(b) * generator.integers(1, 28)} =")
        answers.append(f" {a} + {b} = {a + b}{tokenizer.eos_token}")
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)
    learnt = [len(tokenizer(a)["input_ids"]) for a in answers]
    length = batch["input_ids"].shape[1]
    asked = torch.arange(length) < length - torch.tensor(learnt)[:, None]
    return dict(batch) | {"labels": batch["input_ids"].masked_fill(asked, -100)}


def teach(parts: dict, steps: int) -> None:
    """Teach the encoders to tell digits and tones, and the language model to add written digits."""
    generator = np.random.default_rng(4)
    vision, audio = parts["encoders"]["vision"], parts["encoders"]["audio"]
    images, values = digits(held_out=False)
    images = [jittered(image, generator).convert("RGB") for image in images]
    pixels = vision["processor"](images, return_tensors="pt")["pixel_values"]
    keys = generator.integers(10, size=len(images))
    sounds, rate = [tone(int(key), generator) for key in keys], audio["processor"].sampling_rate
    spectra = audio["processor"](sounds, sampling_rate=rate, return_tensors="pt")["input_features"]
    vit, ear, writer, tokenizer = vision["model"], audio["model"].encoder, parts["language_model"], parts["tokenizer"]
    digit, key = torch.nn.Linear(vit.config.hidden_size, 10), torch.nn.Linear(ear.config.hidden_size, 10)
    seen = classifier_loss(lambda x: digit(vit(x).last_hidden_state[:, 0]), pixels, values)
    heard = classifier_loss(lambda x: key(ear(x).last_hidden_state.mean(1)), spectra, keys)
    fit("vision encoder", torch.nn.ModuleList([vit, digit]), seen, steps, 1e-3)
    fit("audio encoder", torch.nn.ModuleList([ear, key]), heard, steps, 1e-3)
    fit("language model", writer, lambda _: writer(**written_sums(tokenizer, generator)).loss, 3 * steps, 2e-3)


def make_parts(folder: Path, steps: int) -> dict[str, str]:
    """Make, teach and save small parts; returns where each lies, as if they were ids."""
    where = {"language_model": "language", "vision": "vision", "audio": "audio"}
    if not folder.exists():
        parts = small_parts()
        teach(parts, steps)
        partial = folder.with_name(folder.name + ".partial")
        save(partial / "language", parts["language_model"], parts["tokenizer"])
        for name, encoder in parts["encoders"].items():
            save(partial / name, *encoder.values())
        partial.rename(folder)
    return {part: str(folder / name) for part, name in where.items()}


# ---- stages


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint: Trainer writes its state after everything that must be there to go on."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def train_stage(stage: Stage, steps: int, before: Path, folder: Path, data: Callable, options) -> None:
    """Train one stage from the model of the stage before, or from this stage's last checkpoint."""
    set_seed(0)
    model = AutoModel.from_pretrained(before)
    model, processor = stage.prepare(model, AutoProcessor.from_pretrained(before))
    model.describe()
    rates = stage.pretrained if options.language_model else stage.small
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 10),
        save_steps=options.save_steps,
        save_total_limit=1,
        report_to="none",
        dataloader_num_workers=0,
        seed=0,
    )
    # Trainer makes the schedule of these learning rates, and puts optimizer, schedule, random numbers and the place in
    # the data back when it resumes.
    optimizer = torch.optim.AdamW(parameter_groups(model, rates, weight_decay=0.05))
    trainer = Trainer(model=model, args=arguments, train_dataset=data(), optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    save(folder / "model", model, processor)


def accuracy(folder: Path, options) -> float:
    """Share of held-out questions that a saved model answers to the letter; kept beside the model."""
    kept = folder / "accuracy.json"
    if not kept.exists():
        model = AutoModel.from_pretrained(folder / "model").eval()
        processor = AutoProcessor.from_pretrained(folder / "model")
        rows = questions(processor, None, held_out=True, seed=2)[: options.questions]
        pairs = answered(model, processor, rows, options.batch_size)
        kept.write_text(json.dumps({"accuracy": sum(a == b for a, b in pairs) / len(pairs), "questions": len(pairs)}))
    return json.loads(kept.read_text())["accuracy"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a vision encoder")
    parser.add_argument("--audio", help="Hub id or path of an audio encoder")
    parser.add_argument("--steps", type=int, nargs=3, default=[200, 200, 400], metavar=("ALIGN", "ADAPT", "FULL"))
    parser.add_argument("--part-steps", type=int, default=200, help="steps in which small parts learn their own trade")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints inside a stage")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=6_400, help="training rows to encode; they are used several times")
    parser.add_argument("--questions", type=int, default=HELD_OUT, help="held-out questions to answer after each stage")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/stages"), help="a folder per stage goes there")
    options = parser.parse_args(arguments)
    ids = [options.language_model, options.vision, options.audio]
    if any(ids) and not all(ids):
        parser.error("give all of --language-model, --vision and --audio, or none")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    start = options.output_dir / "0-composed"
    if not (start / "model").exists():
        ids = {"language_model": options.language_model, "vision": options.vision, "audio": options.audio}
        if not options.language_model:
            ids = make_parts(options.output_dir / "parts", options.part_steps)
        set_seed(0)
        start.mkdir(exist_ok=True)
        encoders = {name: ids[name] for name in ("vision", "audio")}
        save(start / "model", *compose(ids["language_model"], encoders, projector="mlp"))
    encoded: list[EncodedRows] = []

    def data() -> EncodedRows:
        """The rows, encoded when a stage first needs them: all stages feed the encoders the same."""
        if not encoded:
            processor = AutoProcessor.from_pretrained(start / "model")
            encoded.append(EncodedRows(processor, questions(processor, options.rows, held_out=False, seed=1)))
        return encoded[0]

    print(f"composed: {100 * accuracy(start, options):.1f} % of the held-out questions")
    before = start / "model"
    for number, (stage, steps) in enumerate(zip(STAGES, options.steps, strict=True), start=1):
        folder = options.output_dir / f"{number}-{stage.name}"
        if not (folder / "model").exists():
            train_stage(stage, steps, before, folder, data, options)
        print(f"stage {number}, {stage.name}: {100 * accuracy(folder, options):.1f} % of the held-out questions")
        before = folder / "model"


if __name__ == "__main__":
    main()
