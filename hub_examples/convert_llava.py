"""A LLaVA in, a training step on its projector, and a LLaVA out again.

`from_native` takes a native multimodal model apart into named encoders, projectors and a language model that compute the
same, to the bit; what is trained, adapted or exchanged there goes back by `to_native`, as a checkpoint of the native class.

    python hub_examples/convert_llava.py --llava llava-hf/llava-1.5-7b-hf --output trained-llava
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tiny_models import make_llava
from transformers import AutoModelForImageTextToText, AutoProcessor

from cornstarch_hf import MultimodalModel, from_native, to_native


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llava", help="Hub id or path of a LLaVA")
    parser.add_argument("--output", type=Path, help="folder for the trained LLaVA")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = options.llava or make_llava(Path(scratch, "llava"))
        output = options.output or Path(scratch, "trained")
        model, processor = from_native(source)
        model.describe()
        sample = {
            "text": "USER: <image>\nwhat is it? ASSISTANT: a red square",
            "images": Image.new("RGB", (40, 30), "red"),
        }
        inputs = processor(**sample, return_tensors="pt")
        before = step(model, inputs)
        after = step(model, inputs, learning_rate=0.0)
        print(f"loss before {before:.4f}, after {after:.4f}")

        for part in to_native(model, processor):
            part.save_pretrained(output)
        loaded = AutoModelForImageTextToText.from_pretrained(output).eval()
        natively = AutoProcessor.from_pretrained(output)(**sample, return_tensors="pt")
        with torch.no_grad():
            same = torch.equal(loaded(**natively).logits, model.eval()(**inputs).logits)
        print(f"{type(loaded).__name__}, equal logits: {same}")


def step(model: MultimodalModel, inputs, learning_rate: float = 1e-3) -> float:
    """One step that trains the projector alone; returns the loss before it."""
    model.train(encoders_mode={"vision": (False, True)}, llm_mode=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
