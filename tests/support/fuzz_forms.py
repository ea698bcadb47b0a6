"""The forms in which users hand over one item, all of the same content, and items that nobody can use.  A plain module, no tests."""

import base64
import functools
import io
import random
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RATE = 16_000
ORIENTATION = 0x0112  # the EXIF tag
# Where the pixels of an oriented picture come from: each number's inverse, by which a picture is stored.
STORED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
}


def _png(image: Image.Image, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = orientation
    image = image.transpose(STORED[orientation]) if orientation != 1 else image
    image.save(file, "PNG", **({"exif": exif} if orientation != 1 else {}))
    return file.getvalue()


def _tiff(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "TIFF")
    return file.getvalue()


def _text(data: bytes, kind: str, chance: random.Random) -> str:
    encoded = base64.b64encode(data).decode()
    return chance.choice([encoded, f"data:{kind};base64,{encoded}"])


def _path(data: bytes, folder: Path, ending: str, chance: random.Random) -> Any:
    path = folder / f"{chance.getrandbits(40):x}.{ending}"
    path.write_bytes(data)
    return chance.choice([path, str(path)])


def _filed(data: bytes, kind: str, ending: str, folder: Path, chance: random.Random) -> Any:
    """A file's content as bytes, path, base64 text, or as an undecoded column of `datasets` has it."""
    path = _path(data, folder, ending, chance)
    forms = [data, path, _text(data, kind, chance), {"bytes": data, "path": None}, {"path": str(path), "bytes": None}]
    return chance.choice(forms)


LAYOUTS = {  # of the forms that are arrays
    "channels_last": ("array", "read-only", "tensor", "reversed", "list"),
    "channels_first": ("channels first", "tensor, channels first", "list, channels first"),
}


def image_form(item: np.ndarray, chance: random.Random, folder: Path, layout: str | None = None) -> tuple[str, Any]:
    """An image ``(height, width, 3)`` in another form, and the name of that; arrays in a layout where one is stated."""
    image = Image.fromarray(item)
    forms: dict[str, Callable[[], Any]] = {
        "PIL": lambda: image,
        "array": lambda: item,
        "read-only": lambda: _read_only(item),
        "channels first": lambda: item.transpose(2, 0, 1),
        "tensor": lambda: torch.from_numpy(item.copy()),
        "tensor, channels first": lambda: torch.from_numpy(item.copy()).permute(2, 0, 1),
        "reversed": lambda: item[::-1].copy()[::-1],
        "list": lambda: item.tolist(),
        "list, channels first": lambda: item.transpose(2, 0, 1).tolist(),
        "dict": lambda: {"image": image},
        "CMYK": lambda: image.convert("CMYK"),
        "CMYK file": lambda: _filed(_tiff(image.convert("CMYK")), "image/tiff", "tiff", folder, chance),
        "RGBA": lambda: Image.merge("RGBA", [*image.split(), Image.new("L", image.size, 255)]),
        "file": lambda: _filed(_png(image), "image/png", "png", folder, chance),
        "EXIF": lambda: _filed(_png(image, chance.choice(list(STORED))), "image/png", "png", folder, chance),
        "palette": lambda: _palette(item),
    }
    # Nobody can tell where the channels of an array stand one of whose sides may be channels too.
    unclear = {item.shape[0], item.shape[1]} & {1, 3, 4} and layout is None
    others = {key: names for key, names in LAYOUTS.items() if unclear or layout not in (None, key)}
    for name in (name for names in others.values() for name in names):
        del forms[name]
    name = chance.choice(list(forms))
    return name, forms[name]()


def _palette(item: np.ndarray) -> Any:
    image = Image.fromarray(item)
    colours = image.getcolors(256)
    return image if colours is None else image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)


def _read_only(item: np.ndarray) -> np.ndarray:
    item = item.copy()
    item.flags.writeable = False
    return item


def _wav(item: np.ndarray) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, len(item), "NONE", ""))
        out.writeframes((item * 32768).astype("<i2").tobytes())
    return file.getvalue()


def sound_form(item: np.ndarray, chance: random.Random, folder: Path) -> tuple[str, Any]:
    """A sound ``(samples,)`` in another form."""
    forms: dict[str, Callable[[], Any]] = {
        "array": lambda: item,
        "float64": lambda: item.astype(np.float64),
        "read-only": lambda: _read_only(item),
        "row": lambda: item[None],
        "column": lambda: item[:, None],
        "tensor": lambda: torch.from_numpy(item.copy()),
        "list": lambda: item.tolist(),
        "tuple": lambda: tuple(item.tolist()),
        "dict": lambda: {"array": item, "sampling_rate": RATE},
        "dict of a list": lambda: {"array": item.tolist(), "sampling_rate": RATE, "path": "x.wav"},
        "file": lambda: _filed(_wav(item), "audio/wav", "wav", folder, chance),
    }
    name = chance.choice(list(forms))
    return name, forms[name]()


def film_form(item: np.ndarray, chance: random.Random, folder: Path) -> tuple[str, Any]:
    """A video ``(frames, height, width, 3)`` in another form."""
    forms: dict[str, Callable[[], Any]] = {
        "array": lambda: item,
        "channels first": lambda: item.transpose(0, 3, 1, 2),
        "tensor": lambda: torch.from_numpy(item.copy()).permute(0, 3, 1, 2),
        "list of images": lambda: [Image.fromarray(frame) for frame in item],
        "tuple of arrays": lambda: tuple(item),
        "list of files": lambda: [_png(Image.fromarray(frame)) for frame in item],
        "list of numbers": lambda: item.tolist(),
        "dict": lambda: {"video": item, "fps": 2.0},
    }
    name = chance.choice(list(forms))
    return name, forms[name]()


def numbers_form(item: np.ndarray, chance: random.Random, folder: Path, lists: bool = True) -> tuple[str, Any]:
    """Features or a series in another form."""
    forms: dict[str, Callable[[], Any]] = {
        "array": lambda: item,
        "read-only": lambda: _read_only(item),
        "tensor": lambda: torch.from_numpy(item.copy()),
        "list": lambda: item.tolist(),
        "dict": lambda: {"array": item},
        "reversed": lambda: item[::-1].copy()[::-1],
    }
    name = chance.choice([name for name in forms if lists or name != "list"])
    return name, forms[name]()


FORMS: dict[str, Callable[[Any, random.Random, Path], tuple[str, Any]]] = {
    "image": image_form,
    "audio": sound_form,
    "video": film_form,
    "features": numbers_form,
    "time": numbers_form,
    "vectors": functools.partial(numbers_form, lists=False),  # where a list of lists is a list of sounds
    "text": lambda item, chance, folder: ("text", item),
}
DOT = np.zeros((4, 5, 3), np.uint8)
# Items that must be refused by name, by kind.
UNUSABLE: dict[str, dict[str, Callable[[], Any]]] = {
    "image": {
        "empty": lambda: np.zeros((0, 5, 3), np.uint8),
        "no pixels": lambda: Image.new("RGB", (0, 3)),
        "floats": lambda: DOT / 255,
        "bools": lambda: DOT > 0,
        "16 bits": lambda: DOT.astype(np.uint16),
        "integers": lambda: DOT.astype(np.int64),
        "float list": lambda: (DOT + 0.5).tolist(),
        "channels anywhere": lambda: np.zeros((3, 9, 3), np.uint8),
        "two channels": lambda: np.zeros((6, 8, 2), np.uint8),
        "one axis": lambda: np.zeros(12, np.uint8),
        "four axes": lambda: DOT[None],
        "five axes": lambda: DOT[None, None],
        "mode I": lambda: Image.new("I", (4, 4)),
        "mode F": lambda: Image.new("F", (4, 4)),
        "mode I;16": lambda: Image.new("I;16", (4, 4)),
        "16-bit file": lambda: _png(Image.new("I;16", (4, 4))),
        "garbage": lambda: b"\x89PNG\r\n\x1a\nno",
        "no bytes": lambda: b"",
        "nowhere": lambda: "/nowhere/at/all.png",
        "file URL": lambda: "file:///nowhere/at/all.png",
        "empty text": lambda: "",
        "NUL in a path": lambda: "a\0b.png",
        "long text": lambda: "x" * 5000,
        "number": lambda: 5,
        "object": object,
        "dict of nothing": dict,
        "dict of gaps": lambda: {"bytes": None, "path": None},
        "ragged list": lambda: [[[1, 2, 3], [4, 5, 6]], [[1, 2, 3]]],
        "strings": lambda: np.array([["a", "b"]]),
        "objects": lambda: np.array([[None, None]]),
        "folder": lambda: Path("/"),
        "class": lambda: Image.Image,
    },
    "audio": {
        "empty": lambda: np.zeros(0, np.float32),
        "integers": lambda: np.arange(2000, dtype=np.int16),
        "bools": lambda: np.ones(2000, bool),
        "NaN": lambda: np.full(2000, np.nan, np.float32),
        "infinite": lambda: np.full(2000, np.inf),
        "stereo": lambda: np.zeros((2, 2000), np.float32),
        "three axes": lambda: np.zeros((1, 1, 2000), np.float32),
        "no axis": lambda: np.array(0.5, np.float32),
        "no axis, tensor": lambda: torch.tensor(0.5),
        "complex": lambda: np.zeros(2000, np.complex64),
        "strings": lambda: np.array(["a", "b"]),
        "objects": lambda: np.array([0.5, None]),
        "garbage": lambda: b"RIFFxxxxWAVEno",
        "no bytes": lambda: b"",
        "nowhere": lambda: "/nowhere/at/all.wav",
        "empty text": lambda: "",
        "NUL in a path": lambda: "a\0b.wav",
        "number": lambda: 5,
        "float": lambda: {"array": 0.5, "sampling_rate": RATE},  # in a list, one alone is a sound of one sample
        "object": object,
        "dict of nothing": dict,
        "another rate": lambda: {"array": np.zeros(2000, np.float32), "sampling_rate": 8000},
        "rate in words": lambda: {"array": np.zeros(2000, np.float32), "sampling_rate": "fast"},
        "rate of zero": lambda: {"array": np.zeros(2000, np.float32), "sampling_rate": 0},
        "gap": lambda: {"array": None, "sampling_rate": RATE},
        "folder": lambda: Path("/"),
    },
    "video": {
        "no frames": lambda: np.zeros((0, 5, 5, 3), np.uint8),
        "floats": lambda: DOT[None] / 255,
        "two sizes": lambda: [DOT, DOT.transpose(1, 0, 2)],
        "text": lambda: "film.mp4",
        "bytes": lambda: b"film",
        "number": lambda: 5,
        "dict of nothing": dict,
        "gap": lambda: {"video": None},
        "gap in frames": lambda: {"video": [Image.new("RGB", (5, 5)), None]},
        "five axes": lambda: DOT[None, None],
        "no axis": lambda: np.array(5, np.uint8),
    },
    "features": {
        "empty": lambda: np.zeros((0, 6), np.float32),
        "width": lambda: np.zeros((2, 5), np.float32),
        "three axes": lambda: np.zeros((2, 2, 6), np.float32),
        "no axis": lambda: np.array(0.5, np.float32),
        "no axis, tensor": lambda: torch.tensor(0.5),
        "NaN": lambda: np.full((2, 6), np.nan, np.float32),
        "integers": lambda: np.zeros((2, 6), np.int64),
        "bools": lambda: np.zeros((2, 6), bool),
        "complex": lambda: torch.zeros(2, 6, dtype=torch.complex64),
        "strings": lambda: np.array([["a"] * 6]),
        "text": lambda: "features",
        "bytes": lambda: b"features",
        "number": lambda: 5,
        "ragged": lambda: {"array": [[0.5] * 6, [0.5] * 5]},
        "dict of nothing": dict,
        "gap in a row": lambda: {"array": [[0.5] * 5 + [None]]},
    },
    "time": {
        "empty": lambda: np.zeros(0, np.float32),
        "channels": lambda: np.zeros((4, 2), np.float32),
        "no axis": lambda: np.array(0.5, np.float32),
        "NaN": lambda: np.full(4, np.nan, np.float32),
        "too large": lambda: np.full(4, 1e300),
        "strings": lambda: np.array(["a"]),
        "text": lambda: "series",
        "bools": lambda: np.ones(4, bool),
        "number": lambda: {"array": 5},  # in a list, one alone is a series of one value
        "dict of nothing": dict,
        "objects": lambda: np.array([1.0, None]),
    },
    "text": {
        "empty": lambda: "",
        "number": lambda: 5,
        "bytes": lambda: b"LAG",
        "object": object,
        "dict": lambda: {"text": "LAG"},
        "surrogate": lambda: "LAG\ud800",
    },
}  # fmt: skip
