"""Share a composed model, its processor and a card in one call, load it by its repository, and ask it something.

    hf auth login
    python hub_examples/push_and_load.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --repo-id user/my-model --private

The token is the one that `hf auth login` stored (or HF_TOKEN).  Without --repo-id, and offline (HF_HUB_OFFLINE=1), nothing is
pushed: the checkpoint is saved into a folder and loaded from there.  Without ids of models it makes small random ones.
"""

import argparse
import tempfile
from pathlib import Path

from huggingface_hub import constants
from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from transformers import AutoModelForImageTextToText, AutoProcessor

from cornstarch_hf import compose, push_to_hub


def share(model, processor, options: argparse.Namespace, output: Path) -> tuple[str, dict[str, str]]:
    """Push or save; gives what `from_pretrained` takes: a repository or a folder, and the commit to load."""
    if options.repo_id and not constants.HF_HUB_OFFLINE:
        done = push_to_hub(
            model,
            processor,
            options.repo_id,
            private=options.private,
            embed=not options.reference,
            include_code=options.include_code,
        )
        print("pushed:", done.commit_url)
        return done.repo_url.repo_id, {"revision": done.oid}
    why = "the Hub may not be asked (HF_HUB_OFFLINE)" if options.repo_id else "no --repo-id was given"
    print(f"not pushed, since {why}: saved into", output)
    for part in (model, processor):
        part.save_pretrained(output, include_code=options.include_code)
    return str(output), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id or path of a causal language model")
    parser.add_argument("--vision", help="Hub id or path of a vision encoder")
    parser.add_argument("--repo-id", help="user/name of the repository to push to; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--reference", action="store_true", help="push what was trained only (embed=False)")
    parser.add_argument("--include-code", action="store_true", help="let the checkpoint carry the code that loads it")
    parser.add_argument("--output", type=Path, help="where to save if nothing is pushed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(folder / "language"),
            encoders={"vision": options.vision or make_vision_encoder(folder / "vision")},
            projector="mlp",
            freeze=["vision_encoder.module", "language_model"],
        )
        source, pin = share(model, processor, options, options.output or folder / "shared")

        # A commit always means the same files; without revision= the newest of the main branch are loaded.
        model = AutoModelForImageTextToText.from_pretrained(source, verify=True, **pin)
        processor = AutoProcessor.from_pretrained(source, **pin)
        question = [
            {"type": "image", "image": Image.new("RGB", (40, 24), "red")},
            {"type": "text", "text": "What is it?"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        print("loaded from:", source, *pin.values())
        print("answer:", processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
