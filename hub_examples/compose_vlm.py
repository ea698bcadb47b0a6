"""Compose a vision-language model from two checkpoints, ask it something, save it, load it with AutoModel.

    python hub_examples/compose_vlm.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --image photo.jpg

Without arguments it makes small random models and runs offline; a fresh projector knows nothing, so the answer is
noise until the model is trained (see finetune_with_trainer.py).
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from transformers import AutoModelForImageTextToText, AutoProcessor

import cornstarch_hf  # noqa: F401  (makes the Auto classes know composed models)
from cornstarch_hf import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a vision encoder")
    parser.add_argument("--layer", type=int, default=-2, help="hidden state of the encoder to project")
    parser.add_argument("--image", type=Path, help="an image file")
    parser.add_argument("--output", type=Path, help="where to save the composed model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={
                "vision": {"model": options.vision or make_vision_encoder(folder / "vision"), "layer": options.layer}
            },
            projector="mlp",
            freeze=["vision_encoder.module", "language_model"],
        )
        model.describe()
        output = options.output or folder / "composed"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model = AutoModelForImageTextToText.from_pretrained(output)
        processor = AutoProcessor.from_pretrained(output)
        image = Image.open(options.image) if options.image else Image.new("RGB", (40, 24), "red")
        question = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
