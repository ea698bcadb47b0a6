"""Compose a protein-language model: an encoder of amino acids with its own tokenizer, and a causal language model.

    python hub_examples/compose_protein.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --protein facebook/esm2_t6_8M_UR50D --sequence MKTAYIAKQR

Any encoder of texts is composed in this way (BERT, ModernBERT, ESM C).

Without arguments it makes small random models and runs offline; a fresh projector knows nothing, so the answer is
noise until the model is trained (see finetune_with_trainer.py).
"""

import argparse
import tempfile
from pathlib import Path

from tiny_models import make_language_model, make_protein_encoder
from transformers import AutoModelForMultimodalLM, AutoProcessor

import cornstarch_hf  # noqa: F401  (makes the Auto classes know composed models)
from cornstarch_hf import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--protein", help="Hub id or path of a protein encoder")
    parser.add_argument("--sequence", default="MKTAYIAKQRQISFVKSHFSRQ", help="amino acids by their letters")
    parser.add_argument("--output", type=Path, help="where to save the composed model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={"protein": options.protein or make_protein_encoder(folder / "protein")},
            projector="mlp",
            freeze=["protein_encoder.module", "language_model"],
        )
        model.describe()
        output = options.output or folder / "composed"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model = AutoModelForMultimodalLM.from_pretrained(output)
        processor = AutoProcessor.from_pretrained(output)
        question = [{"type": "protein", "text": options.sequence}, {"type": "text", "text": "What does it do?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        print("features of each item:", (inputs["input_ids"] == model.config.protein_modality["token_id"]).sum().item())
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
