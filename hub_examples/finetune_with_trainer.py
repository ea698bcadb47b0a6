"""Fine-tune a composed model with plain Trainer: the projector trains, LoRA adapts the language model.

    python hub_examples/finetune_with_trainer.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --steps 200

The task is made here: name the colour of a square.  Conversations go through `MultimodalCollator`, which labels what
the assistant wrote and nothing else.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments

from cornstarch_hf import BatchMetrics, MultimodalCollator, compose

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def rows(count: int, seed: int) -> list[dict]:
    """Conversations about squares of noisy colours."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        name = str(generator.choice(list(COLOURS)))
        pixels = np.array(COLOURS[name]) + generator.normal(0, 25, (24, 24, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        question = [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
        answer = {"role": "assistant", "content": f"a {name} square"}
        made.append({"messages": [{"role": "user", "content": question}, answer]})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a vision encoder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", type=Path, help="where to save the trained model")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = options.language_model or make_language_model(folder / "language")
        adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if not options.language_model:  # random weights have to learn the words, too
            adapters = LoraConfig(r=16, target_modules="all-linear", modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        language_model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), adapters)
        model, processor = compose(
            language_model,
            {"vision": options.vision or make_vision_encoder(folder / "vision")},
            projector="mlp",
            tokenizer=AutoTokenizer.from_pretrained(source),
            freeze=["vision_encoder.module"],
        )
        model.describe()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder / "trainer"),
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=5e-3 if not options.language_model else 2e-4,
                logging_steps=max(1, options.steps // 5),
                remove_unused_columns=False,  # rows are raw conversations; the collator makes tensors of them
                report_to="none",
                save_strategy="no",
            ),
            train_dataset=rows(256, seed=1),
            data_collator=MultimodalCollator(processor),
        )
        BatchMetrics.add_to(trainer)  # tokens of each modality, padding and speed in every log entry
        trainer.train()
        output = options.output or folder / "trained"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model, processor = AutoModel.from_pretrained(output), AutoProcessor.from_pretrained(output)
        right = 0
        for row in (asked := rows(24, seed=2)):
            question, answer = row["messages"]
            inputs = processor.apply_chat_template(
                [question], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
            )
            tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            right += answer["content"] in said
        print(f"right answers: {right} of {len(asked)}")


if __name__ == "__main__":
    main()
