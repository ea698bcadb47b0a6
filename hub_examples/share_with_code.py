"""Share a model whose callback is defined in a file of yours: the checkpoint carries the file and the package's code.

    python hub_examples/share_with_code.py --output shared

Makes small random models, saves them with include_code=True, and loads them in a process that never imports the package.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_models import make_language_model, make_vision_encoder

from cornstarch_hf import compose

PARTS = '''"""A callback of one's own."""

from cornstarch_hf import register_callback


def every_other(inputs, output):
    output.last_hidden_state = output[0][:, ::2]
    return output


register_callback("every_other", every_other)
'''
READER = """
import sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
from PIL import Image
inputs = processor(text="<image> what is it?", images=Image.new("RGB", (16, 16), "red"), return_tensors="pt")
print("features:", processor.counter.count("vision", {"pixel_values": inputs["pixel_values"]}))
print("logits:", tuple(model(**inputs).logits.shape), "package imported:", "cornstarch_hf" in sys.modules)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to save the checkpoint")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "my_parts.py").write_text(PARTS)
        sys.path.insert(0, scratch)
        from my_parts import every_other

        vision = {"model": make_vision_encoder(folder / "vision"), "postprocess_module_callback": every_other}
        model, processor = compose(
            language_model=make_language_model(folder / "language"), encoders={"vision": vision}, projector="mlp"
        )
        output = options.output or folder / "shared"
        for part in (model, processor):
            part.save_pretrained(output, include_code=True)
        print("carries:", *sorted(p.name for p in output.glob("*.py") if p.stem in ("my_parts", "multimodal_code")))
        environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
        subprocess.run([sys.executable, "-c", READER, str(output)], check=True, env=environment)


if __name__ == "__main__":
    main()
