"""Compose a language model with features that were computed elsewhere: no encoder runs, only a projector is trained.

    python hub_examples/compose_features.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --features embeddings.npy

The file holds an array (n, width) in float32 or float16: n embeddings of one item by any program.

Without arguments it makes small random models and runs offline; a fresh projector knows nothing, so the answer is
noise until the model is trained (see finetune_with_trainer.py).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tiny_models import make_language_model
from transformers import AutoModelForMultimodalLM, AutoProcessor

from cornstarch_hf import PrecomputedFeatures, PrecomputedFeaturesConfig, compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--features", type=Path, help="a .npy file with the embeddings of one item")
    parser.add_argument("--output", type=Path, help="where to save the composed model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        features = np.load(options.features) if options.features else np.ones((5, 48), dtype=np.float32)
        encoder = PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=features.shape[1]))
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={"scene": encoder},
            projector="mlp",
            freeze=["language_model"],
        )
        model.describe()
        output = options.output or folder / "composed"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model = AutoModelForMultimodalLM.from_pretrained(output)
        processor = AutoProcessor.from_pretrained(output)
        question = [{"type": "scene", "features": features}, {"type": "text", "text": "What is it?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        print("features of each item:", (inputs["input_ids"] == model.config.scene_modality["token_id"]).sum().item())
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
