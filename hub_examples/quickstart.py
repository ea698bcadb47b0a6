"""Teach a small multimodal model to add a handwritten digit to a telephone tone.

A vision encoder, an audio encoder and a language model are composed, trained by plain `transformers.Trainer` on real
handwritten digits (UCI, bundled with scikit-learn) and DTMF tones (ITU-T Q.23: two sine waves), saved, and reloaded
through the Auto classes in a fresh process, which answers questions about digits that were held out.

    python hub_examples/quickstart.py
    python hub_examples/quickstart.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --audio openai/whisper-tiny --steps 300 --batch-size 8
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from digits_and_tones import HELD_OUT, EncodedRows, answered, questions, small_parts
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

import cornstarch_hf
from cornstarch_hf import compose


def train(options: argparse.Namespace) -> None:
    """Compose, train, save; draw the loss curve."""
    torch.manual_seed(0)
    ids = [options.language_model, options.vision, options.audio]
    if any(ids) and not all(ids):
        raise SystemExit("Give all of --language-model, --vision and --audio, or none.")
    parts = small_parts() if not any(ids) else {
        "language_model": options.language_model, "encoders": {"vision": options.vision, "audio": options.audio},
    }  # fmt: skip
    model, processor = compose(**parts, projector="mlp")
    model.describe()
    rows = questions(processor, min(options.rows, options.steps * options.batch_size), held_out=False, seed=1)
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=0.05,
        warmup_steps=max(1, options.steps // 20),
        logging_steps=max(1, options.steps // 50),
        save_strategy="no",
        report_to="none",
        dataloader_num_workers=0,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=EncodedRows(processor, rows))
    started = time.perf_counter()
    trainer.train()
    print(f"trained {options.steps} steps of {options.batch_size} in {time.perf_counter() - started:.0f} s")
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.semilogy(*zip(*losses, strict=True))
    axes.set(xlabel="step", ylabel="loss", title="digit + tone")
    figure.tight_layout()
    figure.savefig(options.output / "loss.png", dpi=120)
    model.save_pretrained(options.output / "model")
    processor.save_pretrained(options.output / "model")


def evaluate(options: argparse.Namespace) -> None:
    """Reload through the Auto classes, generate on the held-out digits, print accuracy, draw a contact sheet."""
    model = AutoModel.from_pretrained(options.output / "model").eval()
    processor = AutoProcessor.from_pretrained(options.output / "model")
    processor.tokenizer.padding_side = "left"
    print(f"cornstarch_hf {cornstarch_hf.__version__}: reloaded {type(model).__name__} and {type(processor).__name__}")
    model.describe()
    rows = questions(processor, None, held_out=True, seed=2)[: options.questions]
    pairs = answered(model, processor, rows, options.batch_size)
    right = [answer == wanted for wanted, answer in pairs]
    for wanted, answer in pairs[:8]:
        print(f"  expected {wanted:12s} answered {answer}")
    print(f"accuracy on {len(right)} held-out digits: {100 * sum(right) / len(right):.1f} %")
    figure, panels = plt.subplots(4, 8, figsize=(12, 7))
    for panel, row, (_, answer), good in zip(panels.flat, rows, pairs, right, strict=False):
        panel.imshow(row["images"][0], cmap="gray")
        panel.set_title(answer, fontsize=9, color="green" if good else "red")
    for panel in panels.flat:
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(options.output / "answers.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a vision encoder")
    parser.add_argument("--audio", help="Hub id or path of an audio encoder")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=19_200, help="training rows to encode; they are used several times")
    parser.add_argument("--questions", type=int, default=HELD_OUT, help="held-out questions to answer")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--evaluate", action="store_true", help="only answer, with the model saved before")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.evaluate:
        evaluate(options)
        return
    train(options)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--evaluate"], check=True)
    print(f"see {options.output / 'loss.png'} and {options.output / 'answers.png'}")


if __name__ == "__main__":
    main()
