"""Save checkpoints over older ones in processes that are killed at every step, and load what is left.

python killed_saves.py FOLDER MAX_SHARD_SIZE POINTS: prints how often the old and the new checkpoint were left.

A process is killed when it opens, renames, links, removes or makes a file for the n-th time below FOLDER; the points are
drawn at random from all there are, the last ones always among them.  Then as many are killed after random times.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from helpers import compose_tiny
from transformers.utils import logging

from cornstarch_hf import MultimodalModel

# A progress bar holds a lock that all forked processes share: one that is killed with it would stop the others.
logging.disable_progress_bar()
EVENTS = {
    "open",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.scandir",
    "shutil.rmtree",
    "tempfile.mkdtemp",
}


def watched(folder, kill_at, counted):
    """An audit hook that counts steps below a folder, and kills the process at one of them."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and any(isinstance(a, (str, os.PathLike)) and str(a).startswith(folder) for a in arguments):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if counted is not None:
                os.pwrite(counted, str(seen).encode(), 0)

    sys.addaudithook(hook)


def save_in_child(model, target, root, shard_size, kill_at=None, counted=None, after=None):
    """Save in a forked process; returns whether it came to its end.

    Args:
        kill_at: the step at which it is killed.
        after: seconds after which it is killed, wherever it is, in Python or not.
    """
    pid = os.fork()
    if pid == 0:
        watched(str(root), kill_at, counted)
        if after is not None:  # nobody handles SIGALRM: its default ends the process at once
            signal.setitimer(signal.ITIMER_REAL, after)
        model.save_pretrained(target, max_shard_size=shard_size)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0


def which(folder, models):
    """Which of the models a folder holds, all of its tensors taken together."""
    loaded = MultimodalModel.from_pretrained(folder).state_dict()
    for name, model in models.items():
        if all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items()):
            return name
    return "mixed"


def changed(model, by):
    other = MultimodalModel(model.config.__class__.from_dict(model.config.to_dict()))
    other.load_state_dict({k: t + by if t.is_floating_point() else t for k, t in model.state_dict().items()})
    return other


def main(root, shard_size, points):
    root = Path(root)
    model = compose_tiny(["clip"])[0]
    models = {"old": model, "new": changed(model, 1.0)}
    old, target = root / "kept", root / "saved" / "checkpoint"
    model.save_pretrained(old, max_shard_size=shard_size)
    (old / "notes.md").write_text("mine")
    with open(root / "count", "w+") as file:
        shutil.copytree(old, target)
        assert save_in_child(models["new"], target, root / "saved", shard_size, counted=file.fileno())
        total = int(file.read())
    assert which(target, models) == "new"
    chosen = sorted({*random.Random(0).sample(range(1, total + 1), min(points, total)), total, total - 1})
    outcomes: Counter = Counter()
    for point in chosen:
        shutil.rmtree(root / "saved")
        shutil.copytree(old, target)
        finished = save_in_child(models["new"], target, root / "saved", shard_size, kill_at=point)
        assert not finished, point
        outcomes[which(target, models)] += 1
        assert (target / "notes.md").read_text() == "mine"
        # Whatever was left over, the next save makes it good.
        assert save_in_child(models["new"], target, root / "saved", shard_size)
        assert which(target, models) == "new", point
        left = [p.name for p in [*(root / "saved").iterdir(), *target.iterdir()] if p.name.startswith(".")]
        assert not left, (point, left)
    print("steps", dict(outcomes), len(chosen), "of", total)
    print("times", dict(killed_at_times(models, old, target, shard_size, min(points, 20))))


def killed_at_times(models, old, target, shard_size, points):
    start = time.monotonic()
    assert save_in_child(models["new"], target, target.parent, shard_size)
    usual = time.monotonic() - start
    outcomes: Counter = Counter()
    while sum(outcomes.values()) < points:
        shutil.rmtree(target.parent)
        shutil.copytree(old, target)
        share = random.Random(sum(outcomes.values())).random()
        save_in_child(models["new"], target, target.parent, shard_size, after=max(0.001, share * usual))
        outcomes[which(target, models)] += 1
        assert (target / "notes.md").read_text() == "mine"
    return outcomes


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
