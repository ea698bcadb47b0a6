"""Compose a time-series-language model from TimesFM, PatchTST or PatchTSMixer and a language model; ask it about numbers.

    python hub_examples/compose_time_series.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --series google/timesfm-2.0-500m-pytorch --values 3.1 2.9 3.4 3.8

These encoders come without a processor; `TimeSeriesProcessor` is made from their configuration.

Without arguments it makes small random models and runs offline; a fresh projector knows nothing, so the answer is
noise until the model is trained (see finetune_with_trainer.py).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tiny_models import make_language_model, make_time_series_encoder
from transformers import AutoModelForMultimodalLM, AutoProcessor

import cornstarch_hf  # noqa: F401  (makes the Auto classes know composed models)
from cornstarch_hf import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--series", help="Hub id or path of an encoder of time series")
    parser.add_argument("--values", type=float, nargs="+", help="the series")
    parser.add_argument("--output", type=Path, help="where to save the composed model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={"series": options.series or make_time_series_encoder(folder / "series")},
            projector="mlp",
            freeze=["series_encoder.module", "language_model"],
        )
        model.describe()
        output = options.output or folder / "composed"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model = AutoModelForMultimodalLM.from_pretrained(output)
        processor = AutoProcessor.from_pretrained(output)
        values = options.values or np.sin(np.arange(60) / 5).tolist()
        question = [{"type": "series", "series": values}, {"type": "text", "text": "What comes next?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        print("features of each item:", (inputs["input_ids"] == model.config.series_modality["token_id"]).sum().item())
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
