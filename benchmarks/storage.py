"""Times of saving a model and of loading it again, and the memory that both take: also the program of that process."""

import argparse
import copy
import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, LlavaForConditionalGeneration

from cornstarch_hf import MultimodalModel, from_native

from .children import run_module
from .memory import SIDES, peak_mib
from .models import Pair, check_logits, check_weights
from .results import Result, Target, in_turn
from .sizes import Sizes
from .timing import seconds


class Converted:
    """A native checkpoint as a composition."""

    @staticmethod
    def from_pretrained(folder: Path, **options) -> MultimodalModel:
        return from_native(folder, **options)[0]


LOADERS = {"native": LlavaForConditionalGeneration, "ours": AutoModel, "converted": Converted}


def save_seconds(model, folder: Path) -> float:
    """Time of `save_pretrained`, with nothing left to be written by what came before."""
    os.sync()
    return seconds(lambda: model.save_pretrained(folder))


def save_hash_and_sync(model, folder: Path) -> None:
    """What our save does besides writing: every file hashed and synced, then the folder."""
    model.save_pretrained(folder)
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def hashed_seconds(model, folder: Path) -> float:
    """Time of a native save with hashing and syncing added to it."""
    os.sync()
    return seconds(lambda: save_hash_and_sync(model, folder))


def load_seconds(side: str, folder: Path, times: int) -> float:
    """Time of loading: the least of several, for it takes milliseconds, and whatever disturbs it adds to them."""
    return min(seconds(lambda: LOADERS[side].from_pretrained(folder)) for _ in range(times))


def load_and_read(side: str, folder: Path, times: int = 1, **options) -> float:
    """Time of loading and of reading each weight once, the least of several: loading alone maps the file, and reads nothing."""

    def load() -> None:
        model = LOADERS[side].from_pretrained(folder, **options)
        for parameter in model.parameters():
            parameter.detach().sum()

    return min(seconds(load) for _ in range(times))


def storage(pair: Pair, sizes: Sizes) -> list[Result]:
    """Saving and loading, the two models in turn; what was loaded is what was saved.

    Raises:
        ValueError: weights or logits of the loaded models differ.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as root:
        native, ours = Path(root, "native"), Path(root, "ours")
        results = _saving(pair, sizes, native, ours, Path(root, "hashed"))
        results += _loading(pair, sizes, native, ours)
        again = LOADERS["native"].from_pretrained(native), LOADERS["ours"].from_pretrained(ours)
        check_weights(*again)
        again = copy.deepcopy(again)  # memory of their own: the files hold weights elsewhere
        check_logits(*again, pair.inputs)
        check_logits(again[0], copy.deepcopy(LOADERS["converted"].from_pretrained(native)), pair.inputs)
        return results + _resident(native, ours, sizes)


def _saving(pair: Pair, sizes: Sizes, native: Path, ours: Path, hashed: Path) -> list[Result]:
    pairs, name = sizes.pairs["save"], f"vocabulary {pair.vocabulary:,}"
    mine = lambda: save_seconds(pair.ours, ours)  # noqa: E731
    saved = in_turn(lambda: save_seconds(pair.native, native), mine, pairs)
    explained = in_turn(lambda: hashed_seconds(pair.native, hashed), mine, pairs)
    size = {"file_mib": sum(path.stat().st_size for path in ours.iterdir()) / 2**20}
    return [
        Result("save", f"save, {name}", "s", *saved, notes=size),
        Result("save", f"save, hashing and syncing added to native, {name}", "s", *explained, notes=size),
    ]


def _loading(pair: Pair, sizes: Sizes, native: Path, ours: Path) -> list[Result]:
    target = Target(at_most=1.05) if sizes.judged else None
    pairs, name = sizes.pairs["load"], f"vocabulary {pair.vocabulary:,}"
    loaded = in_turn(
        lambda: load_seconds("native", native, sizes.loads), lambda: load_seconds("ours", ours, sizes.loads), pairs
    )
    theirs = lambda: load_and_read("native", native)  # noqa: E731
    read = in_turn(theirs, lambda: load_and_read("ours", ours), pairs)
    converted = in_turn(
        lambda: load_and_read("native", native, sizes.loads),
        lambda: load_and_read("converted", native, sizes.loads),
        pairs,
    )
    verified = in_turn(theirs, lambda: load_and_read("ours", ours, verify=True), sizes.pairs["save"])
    return [
        Result("load", f"load, {name}", "s", *loaded, target),
        Result("load", f"load and read each weight, {name}", "s", *read, target),
        Result(
            "load",
            f"from_native of a native checkpoint, each weight read, {name}",
            "s",
            *converted,
            Target(at_most=1.10) if sizes.judged else None,
        ),
        Result("load", f"load with verify=True and read each weight, {name}", "s", *verified),
    ]


def _resident(native: Path, ours: Path, sizes: Sizes) -> list[Result]:
    """Peak memory of loading and of saving again, each model in a fresh process of its own."""
    found = {}
    for side, folder in (("native", native), ("ours", ours), ("converted", native)):
        answer = run_module("benchmarks.storage", side, str(folder))
        found[side] = json.loads(answer.splitlines()[-1])
    results = []
    for group, what, before, after in (
        ("load", "loading and reading", "imported", "loaded"),
        ("save", "saving", "loaded", "saved"),
    ):
        peaks = {side: [found[side][after]] for side in SIDES}
        notes = {side: {"before": found[side][before], "peak": found[side][after]} for side in SIDES}
        name = f"peak memory after {what}"
        results.append(Result(group, name, "MiB", peaks["native"], peaks["ours"], notes=notes))
    peaks = {side: [found[side]["loaded"]] for side in ("native", "converted")}
    target = Target(at_most=1.05) if sizes.judged else None
    name = "peak memory after from_native of a native checkpoint and reading"
    return [*results, Result("load", name, "MiB", peaks["native"], peaks["converted"], target)]


def measure(side: str, folder: Path) -> dict[str, float]:
    """Load in this process, read each weight, save: the peaks on the way."""
    peaks = {"imported": peak_mib()}
    model = LOADERS[side].from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    peaks["loaded"] = peak_mib()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as again:
        model.save_pretrained(again)
        return peaks | {"saved": peak_mib()}


def main() -> None:
    """One model: print what was measured as a line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("side", choices=tuple(LOADERS))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(json.dumps(measure(options.side, options.folder)))


if __name__ == "__main__":
    main()
