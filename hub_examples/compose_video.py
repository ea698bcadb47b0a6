"""Compose a video-language model from an image encoder, or a video encoder, and a language model; ask it about frames.

    python hub_examples/compose_video.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --video google/siglip-base-patch16-224 --num-frames 8 --frames frames/

An image encoder sees each frame alone, and the frames' features follow each other; a video encoder (VideoMAE, ViViT,
TimeSformer) sees them together. Decode a file by any tool into a folder of images, or an array.

Without arguments it makes small random models and runs offline; a fresh projector knows nothing, so the answer is
noise until the model is trained (see finetune_with_trainer.py).
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from transformers import AutoModelForMultimodalLM, AutoProcessor

import cornstarch_hf  # noqa: F401  (makes the Auto classes know composed models)
from cornstarch_hf import compose


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--video", help="Hub id or path of an image or video encoder")
    parser.add_argument("--frames", type=Path, help="a folder of images, one per frame, in the order of their names")
    parser.add_argument("--num-frames", type=int, default=4, help="how many frames to keep, evenly spaced")
    parser.add_argument("--output", type=Path, help="where to save the composed model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={"video": {"model": options.video or make_vision_encoder(folder / "vision"), "kind": "video"}},
            projector={"projection_type": "mlp"},
            freeze=["video_encoder.module", "language_model"],
        )
        processor.processors["video"].num_frames = options.num_frames  # a setting that is saved
        model.describe()
        output = options.output or folder / "composed"
        model.save_pretrained(output)
        processor.save_pretrained(output)

        model = AutoModelForMultimodalLM.from_pretrained(output)
        processor = AutoProcessor.from_pretrained(output)
        if options.frames:
            frames = [Image.open(path) for path in sorted(options.frames.iterdir())]
        else:
            frames = np.zeros((24, 40, 64, 3), dtype=np.uint8)
            frames[:, :, :, 0] = np.arange(24)[:, None, None] * 10  # one second that turns red
        question = [{"type": "video", "video": frames}, {"type": "text", "text": "What happens?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        print("features of each item:", (inputs["input_ids"] == model.config.video_modality["token_id"]).sum().item())
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
