"""Times of saving a model and of loading it again."""

import os
import tempfile
from pathlib import Path

from transformers import AutoModel, LlavaForConditionalGeneration

from .models import Pair, check_logits, check_weights
from .results import Result, in_turn
from .sizes import Sizes
from .speed import seconds


def save_seconds(model, folder: Path) -> float:
    """Time of `save_pretrained`, with nothing left to be written by what came before."""
    os.sync()
    return seconds(lambda: model.save_pretrained(folder))


def storage(pair: Pair, sizes: Sizes) -> list[Result]:
    """Saving and loading, the two models in turn; what was loaded is what was saved.

    Raises:
        ValueError: weights or logits of the loaded models differ.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        native, ours = Path(folder, "native"), Path(folder, "ours")
        saved = in_turn(
            lambda: save_seconds(pair.native, native), lambda: save_seconds(pair.ours, ours), sizes.pairs["save"]
        )
        loaded = in_turn(
            lambda: seconds(lambda: LlavaForConditionalGeneration.from_pretrained(native)),
            lambda: seconds(lambda: AutoModel.from_pretrained(ours)),
            sizes.pairs["load"],
        )
        again = LlavaForConditionalGeneration.from_pretrained(native), AutoModel.from_pretrained(ours)
        check_weights(*again)
        check_logits(*again, pair.inputs)
        size = {"file_mib": sum(path.stat().st_size for path in ours.iterdir()) / 2**20}
    name = f"vocabulary {pair.vocabulary:,}"
    return [
        Result("save", f"save, {name}", "s", *saved, notes=size),
        Result("load", f"load, {name}", "s", *loaded, notes=size),
    ]
