"""All benchmarks in one command: ``python -m benchmarks.run`` (or ``make bench``).

Fresh processes come first, while this one is small; then both models are built for each vocabulary, proven equal, and
timed in turn.
"""

import argparse
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from .children import ROOT
from .results import Result
from .sizes import FULL, QUICK, Sizes

ALONE = ("import", "memory", "labels", "counting", "overhead", "waits", "collator", "graphs", "ladder")
WITH_MODELS = ("forward", "decode", "train", "chat", "processor", "storage")
GROUPS = ALONE + WITH_MODELS
MODULES = {"import": "imports"}  # where the module, and the function in it, have another name
ONCE = ("chat", "processor", "storage")  # at the first vocabulary alone


def without_models(wanted: set[str], sizes: Sizes) -> list[Result]:
    """What is measured in processes of its own, what needs no weights, and what builds models of other sizes."""
    results: list[Result] = []
    for name in ALONE:
        if name in wanted:  # imported when it is its turn, so that this process is small until then
            module = import_module(f"{__package__}.{MODULES.get(name, name)}")
            measure = getattr(module, MODULES.get(name, name))
            results += said(name, lambda measure=measure: measure(sizes))
    return results


def with_models(wanted: set[str], sizes: Sizes) -> list[Result]:
    """What is measured on the two models, one vocabulary after the other."""
    from .chat import chat
    from .models import build_pair
    from .processors import processor
    from .speed import decode, forward, generate, train
    from .storage import storage

    measures: dict[str, tuple[Callable, ...]] = {
        "forward": (forward,),
        "decode": (decode, generate),
        "train": (train,),
        "chat": (chat,),
        "processor": (processor,),
        "storage": (storage,),
    }
    results: list[Result] = []
    for place, vocabulary in enumerate(sizes.vocabularies):
        names = [name for name in measures if name in wanted and (place == 0 or name not in ONCE)]
        if not names:
            continue
        say(f"building both models, vocabulary {vocabulary:,}")
        pair = build_pair(sizes, vocabulary)
        for name in names:
            for measure in measures[name]:
                results += said(name, lambda measure=measure, pair=pair: measure(pair, sizes))
        del pair
    return results


def say(text: str) -> None:
    """Progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def said(name: str, measure: Callable[[], list[Result]]) -> list[Result]:
    """Run a measurement and say how long it took and what it gave."""
    say(name)
    start = time.perf_counter()
    results = measure()
    for result in results:
        say(f"  {result.name}: ours / native {result.ratio:.3f}")
    say(f"  took {time.perf_counter() - start:.0f} s")
    return results


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write results.md, results.json and results.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="measurements, all by default")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that all runs, its figures mean nothing"
    )
    parser.add_argument("--threads", type=int, help="threads of torch, by default as many as torch takes")
    parser.add_argument(
        "--output", type=Path, help="folder, by default benchmarks/results (outputs/benchmarks if not all)"
    )
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    wanted = set(options.only)
    partial = options.quick or wanted != set(GROUPS)
    folder = options.output or ROOT / ("outputs/benchmarks" if partial else "benchmarks/results")
    load, started = os.getloadavg()[0], time.perf_counter()
    if options.threads:  # the fresh processes follow too
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    results = without_models(wanted, sizes)
    from .report import environment, write

    about: dict[str, Any] = environment(load)
    say(f"{about['processor']}: {about['cores']} cores, {about['threads']} threads")
    checked = bool(wanted & {*WITH_MODELS, "overhead", "waits", "graphs", "labels", "collator"})
    results += with_models(wanted, sizes)
    about |= {
        "seconds": time.perf_counter() - started,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "checked": checked,
    }
    print("\n" + write(results, about, folder))
    print(f"written to {folder}: results.md, results.json, results.png")


if __name__ == "__main__":
    main()
