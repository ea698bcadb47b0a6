"""Tiny encoders of every kind with their processors, composed at random, and random items for them.  A plain module, no tests."""

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import films
import numpy as np
import tiny
import torch
from catalog_processors import IMAGES, IN_TRANSFORMERS, SOUNDS, build_encoder, build_processor
from shrunk import built, shrunk
from transformers import TimesFm2_5Config, TimesFm2_5Model

from cornstarch_hf import PrecomputedFeatures, PrecomputedFeaturesConfig, compose

WIDTH = 6  # of precomputed features
TEMPLATES = {
    "default": None,
    "strings": "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "parts": (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
        "{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}</{{ m.role }}>{% endfor %}"
    ),
    "both": (
        "{% for m in messages %}{{ m.role }}|{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}|{% endfor %}"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """An encoder, as an entry of `compose`, and what its items are like.

    Attributes:
        kind: of the modality.
        build: makes the entry.
        call: arguments of the processor's call that this processor needs.
        form: kind of the forms of its items, by default the modality's.
        item: makes an item from a source of chance, in its canonical form; the bool asks for one of a degenerate size.
    """

    kind: str
    build: Callable[[], dict[str, Any]]
    item: Callable[[random.Random, bool], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    form: str | None = None


def pixels(chance: random.Random, *shape: int) -> np.ndarray:
    return np.random.default_rng(chance.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)


def picture(chance: random.Random, degenerate: bool, pair: Any = None) -> np.ndarray:
    """An image ``(height, width, 3)``: of sizes that the pair's processor takes, or a dot or strip."""
    least, most, ratio = (5, 60, 20) if pair is None else (pair.smallest, min(pair.largest, 60), pair.ratio)
    if pair is not None and pair.one_size:
        return pixels(chance, 16, 24, 3)
    if degenerate:
        return pixels(
            chance, *chance.choice([(1, 1), (1, 7), (9, 1), (2, 2), (3, 3), (3, 200), (4, 4), (1, 3), (3, 1)]), 3
        )
    while True:
        size = (chance.randint(max(least, 5), most), chance.randint(max(least, 5), most))
        if max(size) < ratio * min(size):
            return pixels(chance, *size, 3)


def waveform(chance: random.Random, degenerate: bool, shortest: int = 1000, longest: int = 6000) -> np.ndarray:
    """A sound ``(samples,)`` of 16-bit steps, so that files hold it exactly; some too short for encoders."""
    length = chance.choice([1, 2, 9, 17, 160, 399]) if degenerate else chance.randint(shortest, longest)
    steps = np.random.default_rng(chance.getrandbits(32)).integers(-9000, 9000, length)
    return (steps / 32768).astype(np.float32)


def film(chance: random.Random, degenerate: bool, frames: int | None = None) -> np.ndarray:
    """A video ``(frames, height, width, 3)``."""
    count = frames or (1 if degenerate else chance.randint(1, 4))
    return pixels(chance, count, chance.randint(5, 20), chance.randint(5, 20), 3)


def vectors(chance: random.Random, degenerate: bool) -> np.ndarray:
    count = 1 if degenerate else chance.randint(1, 6)
    return np.random.default_rng(chance.getrandbits(32)).standard_normal((count, WIDTH)).astype(np.float32)


def series(chance: random.Random, degenerate: bool) -> np.ndarray:
    length = 1 if degenerate else chance.randint(1, 24)
    return np.random.default_rng(chance.getrandbits(32)).standard_normal(length).astype(np.float32)


def protein(chance: random.Random, degenerate: bool) -> str:
    return "".join(chance.choices("LAGVSERTIDPKQNFYMHWC", k=1 if degenerate else chance.randint(1, 20)))


def _tiny(key: str, item: Callable, **options: Any) -> Part:
    name, build, processor, _ = tiny.ENCODERS[key]
    kind = options.get("kind") or {"vision": "image", "protein": "text"}.get(name, name)
    return Part(kind, lambda: {"model": build(), "processor": processor(), **options}, item)


def _paired(name: str, pair: Any) -> Part:
    def build() -> dict[str, Any]:
        return {"model": build_encoder(pair), "processor": build_processor(name, pair), **pair.module}

    kind = "audio" if name in SOUNDS else "image"
    bounds = {"shortest": pair.shortest, "longest": pair.longest} if name in SOUNDS else {"pair": pair}
    return Part(kind, build, functools.partial(waveform if name in SOUNDS else picture, **bounds), pair.call)


def _timesfm() -> dict[str, Any]:
    config = shrunk(TimesFm2_5Config, patch_length=4, context_length=64, num_key_value_heads=4)
    return {"model": built(TimesFm2_5Model, config)}


PARTS: dict[str, Part] = {
    "clip": _tiny("clip", picture),
    "clip without prefix": _tiny("clip", picture, drop_prefix=1, layer=-2),
    "siglip": _tiny("siglip", picture),
    "convnext": _tiny("convnext", picture),
    "qwen2_vl": _tiny("qwen2_vl", picture),
    "whisper": _tiny("whisper", waveform),
    "wav2vec2": _tiny("wav2vec2", waveform),
    "esm": _tiny("esm", protein),
    "film": _tiny("clip", film, kind="video"),
    "film of frames": _tiny("siglip", film, kind="video"),
    "videomae": Part(
        "video",
        lambda: {"model": films.WHOLE["videomae"](), "processor": tiny.clip_processor(), "kind": "video"},
        functools.partial(film, frames=4),
    ),
    "features": Part(
        "features", lambda: {"model": PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH))}, vectors
    ),
    "features as sounds": Part(
        "audio",
        lambda: {"model": PrecomputedFeatures(PrecomputedFeaturesConfig(feature_size=WIDTH)), "kind": "audio"},
        vectors,
        form="vectors",
    ),
    "timesfm": Part("time", _timesfm, series),
}
# Pairs of the catalogue whose classes this version of transformers and this machine have.
PARTS |= {name: _paired(name, pair) for name, pair in {**IMAGES, **SOUNDS}.items() if name in IN_TRANSFORMERS}
NAMES = {"image": "vision", "audio": "audio", "video": "film", "text": "protein", "features": "scene", "time": "series"}


@dataclass
class Composed:
    """A composed model, its processor, and the part of each modality."""

    model: Any
    processor: Any
    parts: dict[str, Part]
    template: str
    keys: dict[str, str]  # of `PARTS`


@functools.lru_cache(maxsize=4)
def composed(seed: int) -> Composed:
    """One to three encoders, the same for the same seed; of two of a kind some see the same items."""
    chance = random.Random(f"composition {seed}")
    plain, paired = [k for k in PARTS if not k.endswith(("Pil", "Extractor"))], list(PARTS)
    parts: dict[str, Part] = {}
    keys = {}
    for _ in range(chance.choice([1, 1, 2, 2, 3])):
        key = chance.choice(plain if chance.random() < 0.6 else paired)
        name = NAMES[PARTS[key].kind]
        name = name if name not in parts else f"{name}_{len(parts)}"
        parts[name], keys[name] = PARTS[key], key
    kinds = [part.kind for part in parts.values()]
    twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
    shared = twice in ("image", "audio") and chance.random() < 0.5
    group = [name for name, part in parts.items() if part.kind == twice]
    template = chance.choice(list(TEMPLATES))
    torch.manual_seed(seed)
    language_model = chance.choice([tiny.llama, tiny.qwen3, functools.partial(tiny.gpt2, n_positions=2048)])
    model, processor = compose(
        language_model(), {name: part.build() for name, part in parts.items()},
        chance.choice(["linear", "mlp"]), tokenizer=tiny.tokenizer(), share_inputs=[group] if shared else None,
        chat_template=TEMPLATES[template],
    )  # fmt: skip
    return Composed(model, processor, parts, template, keys)
