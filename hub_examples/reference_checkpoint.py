"""Store only what was trained: a reference checkpoint, its size, loading it, and making a whole checkpoint of it again.

    python hub_examples/reference_checkpoint.py --language-model HuggingFaceTB/SmolLM2-135M-Instruct \
        --vision google/siglip-base-patch16-224 --repo-id user/my-projector

A reference checkpoint names repositories of the Hub at a commit, so the parts must come from there, or from the Hub's cache
(HF_HUB_OFFLINE=1 works once they were downloaded).  Without ids the example makes small random models, shows what saving them
by reference says, and stores them whole.  With --repo-id the reference checkpoint is pushed too, with its card.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from tiny_models import make_language_model, make_vision_encoder
from transformers import AutoModelForImageTextToText

from cornstarch_hf import compose, push_to_hub


def train_a_little(model, processor, steps: int) -> None:
    """A few steps on one picture: the projector changes, and nothing else."""
    inputs = processor(text="<image> a red square", images=Image.new("RGB", (40, 24), "red"), return_tensors="pt")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def equal(model, other) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def store_by_reference(model, processor, whole: Path, options: argparse.Namespace, folder: Path) -> None:
    """Save without the bases, load at their commits with all hashes compared, and put everything into one folder again."""
    reference, again = folder / "reference", folder / "whole-again"
    model.save_pretrained(reference, embed=False)
    print(f"by reference: {size_of(reference):,} bytes in {sorted(path.name for path in reference.iterdir())}")
    loaded = AutoModelForImageTextToText.from_pretrained(reference, verify=True)
    print("loaded equal to the bit:", equal(model, loaded))
    loaded.save_pretrained(again)  # embed=True is the default: all weights, from here on without the bases
    print("whole again:", equal(model, AutoModelForImageTextToText.from_pretrained(again, verify=True)))
    print(f"sizes: {size_of(whole):,} bytes whole, {size_of(reference):,} by reference, {size_of(again):,} whole again")
    if options.repo_id:
        done = push_to_hub(model, processor, options.repo_id, embed=False, private=options.private)
        pushed = AutoModelForImageTextToText.from_pretrained(done.repo_url.repo_id, revision=done.oid, verify=True)
        print("pushed:", done.commit_url, "equal:", equal(model, pushed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", help="Hub id of a causal language model")
    parser.add_argument("--vision", help="Hub id of a vision encoder")
    parser.add_argument("--steps", type=int, default=3, help="training steps on one picture")
    parser.add_argument("--repo-id", help="user/name of a repository to push the reference checkpoint to")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--output", type=Path, help="where to save")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.output or Path(scratch)
        model, processor = compose(
            language_model=options.language_model or make_language_model(Path(scratch, "parts", "language")),
            encoders={"vision": options.vision or make_vision_encoder(Path(scratch, "parts", "vision"))},
            projector="mlp",
            freeze=["vision_encoder.module", "language_model"],
        )
        train_a_little(model, processor, options.steps)
        model.save_pretrained(folder / "whole")
        print(f"whole: {size_of(folder / 'whole'):,} bytes")
        if options.language_model and options.vision:
            store_by_reference(model, processor, folder / "whole", options, folder)
            return
        try:
            model.save_pretrained(folder / "reference", embed=False)
        except ValueError as error:
            print("not by reference:", error)
        whole = AutoModelForImageTextToText.from_pretrained(folder / "whole", verify=True)
        print("the whole one loaded equal to the bit:", equal(model, whole))


if __name__ == "__main__":
    main()
