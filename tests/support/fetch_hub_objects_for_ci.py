"""Stands for the module of that name in transformers' repository, which its sdist lacks: files made here, for addresses there."""

import atexit
import shutil
import tempfile
import wave
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(tempfile.mkdtemp(prefix="transformers-tests-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def url_to_local_path(url):
    """A file of the kind that the address names; an address of a video as it is, since nothing here decodes videos."""
    name = url.rpartition("/")[2]
    path, numbers = FOLDER / name, np.random.default_rng(len(name))
    if path.suffix in (".png", ".jpg"):
        Image.fromarray(numbers.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    elif path.suffix in (".mp3", ".wav"):  # what it is, not its name, tells a decoder
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes(numbers.integers(-3000, 3000, 8000, dtype=np.int16).tobytes())
    else:
        return url
    return str(path)
