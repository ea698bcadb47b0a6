"""Small changes to the files of a checkpoint, each from its own seed, and what comes of loading it.  A plain module, no tests.

Run as a program it takes a folder with checkpoints and a list of changes, loads each changed checkpoint, and writes down what
became of it: ``python fuzz_files.py JOBS.json RESULTS.json``.
"""

import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 60  # of one load: far beyond any, so that only what never ends is met
KERNEL = "someone/repo"
REMOVE = "remove"
HEADER = "header of the weights"
# What each file is asked for: the model, or the processor.
MODEL_FILES = ("config.json", "generation_config.json", "composition.json", HEADER)
PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json")
# What a value can be instead, of any key.
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, -(2**31), 2**31, 2**63 - 1, 2**80, 0.5, -0.5, 1e308, -1e308, math.nan, math.inf),
    *("", "x", "auto", "x" * 5000, "../../etc/passwd", "/etc/passwd", "evil.Model", KERNEL, f"{KERNEL}--evil.Model"),
    *("flash_attention_2", "os.system", "float32", "forward", "<image>", "\u0000", "gelu"),
    *([], [1], [None], ["x"], [[1, 2], [3]], {}, {"x": 1}, {"": KERNEL}, {"__class__": 1}, {"model_type": "llama"}),
)
# Keys that are put where there are none: kernels, code, other classes and files.
ADDED: tuple[tuple[str, Any], ...] = (
    *((f"{u}attn_implementation{i}", KERNEL) for u in ("", "_") for i in ("", "_internal")),
    *(("attn_implementation", name) for name in ("flash_attention_2", "flash_attention_3", {"": KERNEL})),
    *(("experts_implementation", name) for name in (KERNEL, "deepgemm", {"": KERNEL})),
    *(("use_kernels", True), ("kernel_config", {"RMSNorm": f"{KERNEL}:RMSNorm"}), ("allow_all_kernels", True)),
    ("part_implementations", {"text_config": {"attn": KERNEL}}),
    *(("auto_map", {name: "evil.Model"}) for name in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer")),
    ("auto_map", {"AutoModel": "../evil.Model"}),
    ("auto_map", {"AutoModel": f"{KERNEL}--evil.Model"}),
    ("quantization_config", {"quant_method": "mxfp4"}),
    ("quantization_config", {"quant_method": "x"}),
    *((key, value) for key in ("transformers_weights", "_name_or_path", "base_model_name_or_path") for value in ("../x", KERNEL)),
    *(("__class__", "x"), ("to_dict", 1), ("dtype", "os"), ("torch_dtype", "float16"), ("architectures", ["LlamaForCausalLM"])),
    *(("custom_generate", "../evil.py"), ("tokenizer_file", "/etc/passwd"), ("vocab_file", "../x"), ("unknown_key", 1)),
    *(("chat_template", "{% for i in range(10**9) %}x{% endfor %}"), ("chat_template", 5), ("is_encoder_decoder", True)),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One change: `path` leads to the value within the file (for text and bytes it is empty), `kind` says what is done."""

    number: int
    checkpoint: str
    file: str
    kind: str
    path: tuple[str | int, ...]
    seed: int
    alone: bool  # whether the manifest is taken away, which would tell of weights of another size by itself

    def __str__(self) -> str:
        return f"{self.number}: {self.checkpoint} {self.file} {'.'.join(map(str, self.path))} {self.kind}"


def places(values: Any, above: tuple = ()) -> Iterator[tuple]:
    """The paths to all values within one."""
    inside = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inside:
        yield (*above, key)
        if not (isinstance(value, list) and len(value) > 8):  # of a long list one entry is like another
            yield from places(value, (*above, key))
        else:
            yield (*above, key, 0)


KINDS = (
    ("replace",) * 12 + (REMOVE,) * 3 + ("add",) * 4 + ("swap", "swap", "wrap", "rename", "number", "number", "number")
)
TEXT_KINDS = ("duplicate", "nest", "truncate", "bytes", "not an object", "empty")
HEADER_KINDS = (
    *(
        "shape",
        "dtype",
        "offsets",
        "offsets",
        "names",
        "drop",
        "extra",
        "length",
        "truncate",
        "bytes",
        "nest",
        "duplicate",
    ),
    *("metadata", "negative", "tail"),
)


def changes(seed: int, folders: dict[str, Path], counts: dict[str, int]) -> list[Change]:
    """So many changes of each file of each checkpoint."""
    chance, made = random.Random(seed), []
    for checkpoint, folder in folders.items():
        for file, count in counts.items():
            path = folder / file
            if file != HEADER and not path.exists():
                continue
            found = [] if file == HEADER else list(places(json.loads(path.read_text())))
            for _ in range(count):
                if file == HEADER:
                    kind, place = chance.choice(HEADER_KINDS), ()
                elif chance.random() < 0.06:
                    kind, place = chance.choice(TEXT_KINDS), ()
                else:
                    kind, place = chance.choice(KINDS), chance.choice(found)
                alone = file != "composition.json" and chance.random() < 0.5
                alone = alone and checkpoint != "reference"  # it is nothing without
                made.append(Change(len(made), checkpoint, file, kind, place, chance.getrandbits(32), alone))
    return made


def weights_of(folder: Path) -> Path:
    return next(folder / name for name in ("model.safetensors", "composition.safetensors") if (folder / name).exists())


def apply(change: Change, folder: Path) -> str:
    """Change a checkpoint's file (in place); returns what was done, in words."""
    chance = random.Random(change.seed)
    if change.alone:
        (folder / "composition.json").unlink()
    if change.file == HEADER:
        return change_header(weights_of(folder), change.kind, chance)
    path = folder / change.file
    if change.kind in TEXT_KINDS:
        path.write_bytes(changed_text(path.read_text(), change.kind, chance))
        return change.kind
    values = json.loads(path.read_text())
    told = change_value(values, change, chance)
    path.write_text(json.dumps(values))
    return told


def change_value(values: Any, change: Change, chance: random.Random) -> str:
    *above, key = change.path
    place = values
    for step in above:
        place = place[step]
    old = place[key]
    if change.kind == REMOVE:
        del place[key]
    elif change.kind == "add":
        target = old if isinstance(old, dict) else values
        name, value = chance.choice(ADDED)
        target[name] = value
        return f"add {name}={value!r:.60}"
    elif change.kind == "swap":
        others = [name for name in place if name != key] if isinstance(place, dict) else list(range(len(place)))
        other = chance.choice(others or [key])
        place[key], place[other] = place[other], place[key]
        return f"swap with {other}"
    elif change.kind == "wrap":
        place[key] = chance.choice([[old], {"x": old}, str(old)])
    elif change.kind == "rename" and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    elif change.kind == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
        place[key] = chance.choice([old + 1, old - 1, old * 2, -old, old * 1000, old / 2, float(old), 0, -1, 2**31])
    else:
        place[key] = chance.choice(WRONG)
    return f"{change.kind}: {place.get(key) if isinstance(place, dict) else place[min(key, len(place) - 1)] if place else None!r:.80}"


def changed_text(text: str, kind: str, chance: random.Random) -> bytes:
    if kind == "duplicate":
        first = next(iter(json.loads(text)))
        return ("{" + f'"{first}": 1,' + text.lstrip()[1:]).encode()
    if kind == "nest":
        depth = chance.choice([40, 5_000, 200_000])
        return ("{" + '"nested": ' + "[" * depth + "]" * depth + "," + text.lstrip()[1:]).encode()
    if kind == "truncate":
        return text.encode()[: chance.randrange(len(text.encode()))]
    if kind == "bytes":
        data = bytearray(text.encode())
        for _ in range(3):
            data[chance.randrange(len(data))] = chance.randrange(128, 256)
        return bytes(data)
    return {"empty": b"", "not an object": chance.choice([b"[]", b"3", b'"x"', b"null", b"NaN"])}[kind]


def change_header(path: Path, kind: str, chance: random.Random) -> str:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = sorted(name for name in header if name != "__metadata__")
    name = chance.choice(names)
    entry, other = header[name], header[chance.choice(names)]
    if kind in ("truncate", "tail", "bytes", "length"):
        cut = chance.randrange(len(data))
        wrong = chance.choice([0, 1, 2**63 - 1, 2**64 - 1, length + 1, length - 1, length * 2, 10**8 + 1])
        made = {"truncate": data[:cut], "tail": data + b"x" * 64, "length": struct.pack("<Q", wrong) + data[8:]}
        at = 8 + chance.randrange(length)
        path.write_bytes(made.get(kind) or data[:at] + bytes([chance.randrange(128, 256)]) + data[at + 1 :])
        return kind
    if kind == "shape":
        shape = entry["shape"]
        entry["shape"] = chance.choice(
            [shape[::-1], [*shape, 1], shape[1:], [], [0], [-1], [2**62, 4], ["x"], None, [1.5], [10**9]]
        )
    elif kind == "dtype":
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "I32", "I64", "BOOL", "X", "", None, 3, "F8_E4M3", "C64"])
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        wrong = [
            [end, begin],
            [begin, end + 4],
            [begin + 4, end],
            [0, end],
            [begin],
            [],
            None,
            [-4, end],
            [begin, 2**63],
        ]
        entry["data_offsets"] = chance.choice([*wrong, other["data_offsets"], [0, 0], ["0", "4"]])
    elif kind == "names":
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
        entry["shape"], other["shape"] = other["shape"], entry["shape"]
    elif kind == "drop":
        del header[name]
    elif kind == "extra":
        header[chance.choice(["x", "../x", "", "language_model.x", "__class__"])] = entry
    elif kind == "metadata":
        header["__metadata__"] = chance.choice(
            [{}, {"format": "tf"}, {"format": 3}, 3, None, {"format": "pt", "x": "y" * 10**6}]
        )
    elif kind == "negative":
        entry["shape"] = [-size for size in entry["shape"]]
    text = json.dumps(header)
    if kind == "duplicate":
        text = "{" + f'"{name}": {json.dumps(other)},' + text[1:]
    if kind == "nest":
        text = "{" + '"nested": ' + "[" * 100_000 + "]" * 100_000 + "," + text[1:]
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + body)
    return f"{kind} of {name}"


# ---- what comes of it, in a process of its own


class NeverEnds(BaseException):
    """A load did not end in `SECONDS`."""


ASKED: list[str] = []  # addresses that somebody wanted to reach


def refuse_connections() -> None:
    """Nobody reaches anything, and who tries is written down: this process is the fuzz's own."""

    def refuse(self, address, *args):
        ASKED.append(str(address))
        raise OSError(f"no connection to {address}")

    socket.socket.connect = socket.socket.connect_ex = refuse  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = lambda host, *args, **kwargs: refuse(None, host)  # type: ignore[assignment]


@contextlib.contextmanager
def ends() -> Iterator[None]:
    def stop(*args):
        raise NeverEnds

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


class Checkpoint:
    """An honest checkpoint, what it answers, and what changed ones answer."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        import torch
        from transformers import AutoProcessor

        self.folder, self.options, self.torch = folder, options, torch
        self.processor = AutoProcessor.from_pretrained(folder)
        self.batch = self.called(self.processor)
        self.model = self.loaded(folder)
        self.answer = self.answered(self.model)

    def loaded(self, folder: Path, own: bool = False, **options: Any) -> Any:
        from transformers import AutoModel

        from cornstarch_hf import MultimodalModel

        loaded = (MultimodalModel if own else AutoModel).from_pretrained(folder, **self.options, **options)
        return copy.deepcopy(loaded).eval()  # whose weights lie in memory as any other's

    def answered(self, model: Any) -> tuple:
        """Logits ``(1, length, vocabulary)`` and tokens for the honest inputs."""
        with self.torch.no_grad():
            logits = model(**self.batch).logits
            return logits, model.generate(**self.batch, max_new_tokens=2, do_sample=False)

    def called(self, processor: Any) -> dict[str, Any]:
        import tiny

        given: dict[str, Any] = {}
        for name in processor.config.encoders:
            given[name] = tiny.image() if name == "vision" else tiny.sound()
        rate = {"sampling_rate": 16_000} if "audio" in given else {}
        text = "what " + " ".join(self.tokens(processor)) + " is"
        return dict(processor(text=text, return_tensors="pt", **given, **rate))

    def tokens(self, processor: Any) -> list[str]:
        return list(processor.tokens.values())

    def same(self, a: Any, b: Any) -> bool:
        if isinstance(a, self.torch.Tensor):
            return isinstance(b, self.torch.Tensor) and a.dtype == b.dtype and self.torch.equal(a, b)
        return a == b

    def of_model(self, folder: Path, change: Change) -> str:
        model = self.loaded(folder, asks_class(change))
        self.stage = "called"
        logits, tokens = self.answered(model)
        if self.same(logits, self.answer[0]) and self.same(tokens, self.answer[1]):
            return "equal"
        if change.file == "generation_config.json":
            assert self.same(logits, self.answer[0]), "settings of generate changed the logits"
            assert model.generation_config.to_dict() != self.model.generation_config.to_dict(), "tokens changed untold"
            return "told"
        if change.file == "config.json":
            mine, other = (json.loads(json.dumps(m.config.to_dict(), default=str)) for m in (self.model, model))
            differ = {key for key in {*mine, *other} if mine.get(key) != other.get(key)}
            assert differ, "the outputs differ, and the loaded configuration says nothing of it"
            return "told"
        assert change.file == HEADER, "the outputs differ"
        return "other values"

    def of_processor(self, folder: Path, change: Change) -> str:
        from transformers import AutoProcessor

        from cornstarch_hf import MultimodalProcessor

        processor = (MultimodalProcessor if asks_class(change) else AutoProcessor).from_pretrained(folder)
        self.stage = "called"
        batch = self.called(processor)
        if batch.keys() == self.batch.keys() and all(self.same(v, batch[k]) for k, v in self.batch.items()):
            return "equal"
        mine, other = (
            json.dumps(
                [p.to_dict(), {k: str(v) for k, v in p.tokenizer.init_kwargs.items()}], default=str, sort_keys=True
            )
            for p in (self.processor, processor)
        )
        assert mine != other, "the tensors differ, and the loaded processor says nothing of it"
        return "told"


def asks_class(change: Change) -> bool:
    """Whether the class itself is asked to load, by every other change; what is no JSON object, or does not say whose it is,
    is read by the Auto classes alone, before any class of this package is known."""
    return change.number % 2 == 0 or not change.path or change.path[0] in ("auto_map", "model_type", "processor_class")


def run(jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """What becomes of each change: ``{"outcome", "error", "told", "done", "asked"}``."""
    import kernels  # a stand-in, which writes down what it is asked for

    import cornstarch_hf  # noqa: F401  # by which the Auto classes know the checkpoints

    refuse_connections()
    made, found = {}, []
    for values in jobs["changes"]:
        change = Change(**{**values, "path": tuple(values["path"])})
        if change.checkpoint not in made:
            made[change.checkpoint] = Checkpoint(
                Path(jobs["folders"][change.checkpoint]), jobs["options"][change.checkpoint]
            )
        honest = made[change.checkpoint]
        folder = Path(jobs["scratch"]) / f"case{change.number}"
        shutil.copytree(honest.folder, folder)
        result: dict[str, Any] = {
            "done": apply(change, folder),
            "error": "",
            "told": "",
            "verified": "",
            "folder": str(folder),
        }
        kernels.ASKED.clear(), ASKED.clear()
        honest.stage = "loaded"
        try:
            with ends():
                result["outcome"] = (honest.of_model if change.file in MODEL_FILES else honest.of_processor)(
                    folder, change
                )
        except (Exception, NeverEnds) as error:
            result |= {
                "outcome": "raised",
                "stage": honest.stage,
                "error": type(error).__name__,
                "told": str(error)[:3000],
            }
            result["clear"] = isinstance(error, (ValueError, TypeError, OSError))
            result["frames"] = frames_of(error)
        if change.file in MODEL_FILES and not change.alone and change.file != "composition.json":
            result["verified"] = verified(honest, folder)
        result["megabytes"] = peak()
        result["asked"] = [*kernels.ASKED, *ASKED]
        result["ran"] = os.path.exists(os.environ["FUZZ_EVIDENCE"])
        found.append(result)
        shutil.rmtree(folder)
    return found


def verified(honest: Checkpoint, folder: Path) -> str:
    """What verifying a changed checkpoint says; "" where it says nothing."""
    try:
        with ends():
            honest.loaded(folder, own=True, verify=True)
    except (Exception, NeverEnds) as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def peak() -> int:
    """The most memory that this program has had, in MB, by the kernel's own account."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024


def frames_of(error: BaseException) -> list[str]:
    """Where an error was raised, the last places first."""
    import traceback

    return [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[::-1][:6]]


if __name__ == "__main__":
    results = run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(results))
