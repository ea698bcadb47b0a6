"""Makes items ready for their processors: loads, checks and puts in order what users hand over.

What a processor would clip or stretch without a word is refused; files, as paths, URLs or bytes, are decoded.
"""

import base64
import io
import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image

from ..limits import cap, check, check_image

# At most 8 bits per channel.
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa")
# How deep lists of numbers are nested that are one item.
LIST_DEPTHS = {"audio": 1, "time": 1, "features": 2, "image": 3, "video": 4}


def held(item: Any, keys: Iterable[str], otherwise: Any = None) -> Any:
    """What a dict holds under the first of some keys that is not None; any other item as it is."""
    if not isinstance(item, Mapping):
        return item
    return next((item[key] for key in keys if item.get(key) is not None), otherwise)


def is_file(item: Any) -> bool:
    """Whether an item is a path, an address, text or bytes that must be decoded."""
    return isinstance(item, (str, bytes)) or hasattr(item, "__fspath__")


def keeps_scale(processor: Any, options: Mapping[str, Any]) -> bool:
    """Whether a processor leaves the values of images as they are, by its setting or the call's (``do_rescale=False``)."""
    return options.get("do_rescale", getattr(processor, "do_rescale", True)) is False


def flatten(items: Any, kind: str) -> tuple[list[Any], list[int] | None]:
    """Items in order, and how many each sample has when they were given as a list of lists.

    An array or a list of numbers is one item of the kinds ``"audio"`` and ``"time"``, a list of frames one of ``"video"``, a
    list of rows of numbers one of ``"features"``; a dict is one item of any kind.
    """
    if not _is_list(items, kind):
        return [items], None
    # Given per sample: one entry is a list of items, or every entry is None.
    if any(_is_list(item, kind) for item in items) or (items and all(item is None for item in items)):
        samples = [[] if one is None else list(one) if _is_list(one, kind) else [one] for one in items]
        return [item for sample in samples for item in sample], [len(sample) for sample in samples]
    return list(items), None


def _is_list(value: Any, kind: str) -> bool:
    """Whether this is a list of items: no sound's numbers, image as (height, width, channels), or frames of a video."""
    if not isinstance(value, (list, tuple)) or _depth(value) == LIST_DEPTHS.get(kind, -1):
        return False
    frames = value if kind == "video" else []
    return not frames or not all(isinstance(x, Image.Image) or getattr(x, "ndim", None) in (2, 3) for x in frames)


def _depth(value: Any) -> int:
    """How deep a list of numbers is nested; 0 for anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return 0
    if all(isinstance(x, (int, float, np.number)) for x in value):
        return 1
    inner = _depth(value[0])  # the first entry stands for all: lists may be long
    return inner + 1 if inner else 0


def ready_image(item: Any, where: str, channels: int, rescaled: bool) -> Any:
    """An image for an image processor: a PIL image of 1 or 3 channels where the item is one, else the array.

    Args:
        item: PIL image, array, tensor, path, URL or base64 text, or a dict with one of those.
        where: modality and item, for messages.
        channels: how many the encoder takes.
        rescaled: whether float values are left as they are (``do_rescale=False``).
    """
    item = held(item, ("image", "bytes", "url", "path", "base64"), otherwise=item)
    if is_file(item):
        item = _decoded(lambda x: _load(x, where), item, where, "image")
    if isinstance(item, Image.Image):
        check_image(*item.size, where)
        _decoded(lambda x: x.load(), item, where, "image")  # PIL opens files lazily
        return _ready_pil(item, where, channels)
    if _depth(item) == LIST_DEPTHS["image"]:
        try:
            item = np.asarray(item)
        except ValueError as error:
            raise ValueError(f"{where}: the rows of the image differ in length ({error}).") from error
        # Whole numbers of 0..255 are what uint8 became in a table.
        whole = np.issubdtype(item.dtype, np.integer) and item.min() >= 0 and item.max() <= 255
        item = item.astype(np.uint8) if whole else item
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return _ready_array(item, where, channels, rescaled)
    raise TypeError(f"{where}: expected an image (PIL, array, tensor, path or URL), got {type(item).__name__}.")


def _load(item: Any, where: str) -> Image.Image:
    source = _source(item, where)
    if source is None:
        return load_image(str(item))  # no file, address or base64: transformers says so
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    check_image(*image.size, where)  # the header is read, the pixels are not
    return image if isinstance(item, bytes) else load_image(image)


def _source(item: Any, where: str) -> str | bytes | None:
    """The path of a file, or the bytes behind an address, a base64 text or bytes; None for any other text."""
    if isinstance(item, bytes):
        source: str | bytes | None = item
    elif str(item).startswith(("http://", "https://")):
        with urllib.request.urlopen(str(item), timeout=60) as answer:
            source = answer.read(cap("MAX_FILE_BYTES") + 1)  # one byte more than allowed shows that there are too many
    elif os.path.isfile(item):
        source = os.fspath(item)
    else:
        text = str(item)
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        try:
            source = base64.b64decode("".join(encoded.split()), validate=True) or None  # line breaks inside are usual
        except ValueError:
            source = None
    size = os.path.getsize(source) if isinstance(source, str) else len(source or b"")
    check(size, "MAX_FILE_BYTES", f"{where}: the number of bytes of the encoded item is at least")
    return source


def _decoded(decode: Callable[[Any], Any], item: Any, where: str, kind: str) -> Any:
    """What a decoder makes of an item; ValueError with its cause if it cannot."""
    try:
        return decode(item)
    except (ImportError, MemoryError):  # a package is missing
        raise
    except Image.DecompressionBombError as error:
        limit = f"cornstarch_hf.limits.MAX_IMAGE_PIXELS is {cap('MAX_IMAGE_PIXELS'):,}: send a smaller one."
        raise ValueError(f"{where}: the image has more pixels than Pillow decodes ({error}); {limit}") from error
    except Exception as error:  # of many sorts: OSError, SyntaxError, RuntimeError, ...
        if "cornstarch_hf.limits." in str(error):  # a cap of this package: its message says what to do
            raise
        what = f"{len(item)} bytes" if isinstance(item, bytes) else f"{_without_secrets(str(item))!r:.200}"
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: the {kind} cannot be decoded from {what}: {cause}") from error


def _without_secrets(source: str) -> str:
    """An address without user, password and query, which may hold a token; anything else as it is."""
    parts = urllib.parse.urlsplit(source) if source.startswith(("http://", "https://")) else None
    return source if parts is None else f"{parts.scheme}://{parts.hostname}{parts.path}"


def _ready_pil(image: Image.Image, where: str, channels: int) -> Image.Image:
    if min(image.size) == 0:
        raise ValueError(f"{where}: the image is empty (width x height = {image.size[0]} x {image.size[1]}).")
    if image.mode not in PLAIN_MODES:
        raise ValueError(
            f"{where}: the image has mode {image.mode!r} (more than 8 bits per channel or floating-point), which image "
            "processors clip without a word: scale it to 0..255 and convert it to 'L' or 'RGB' first."
        )
    wanted = {1: "L", 3: "RGB"}.get(channels, image.mode)
    return image if image.mode == wanted else image.convert(wanted)  # which would copy an image that is right already


def _ready_array(array: Any, where: str, channels: int, rescaled: bool) -> Any:
    shape = tuple(array.shape)
    if len(shape) == 4:
        remedy = "give a list of images; for the frames of a video, compose the encoder with kind='video'."
        raise ValueError(f"{where}: expected one image, got {shape[0]} in one array of the shape {shape}: {remedy}")
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(f"{where}: the image is empty or no image, its shape is {shape}.")
    height, width = sorted(shape)[-2:]  # the channels, wherever they stand, are fewer
    check_image(width, height, where)
    kind = str(array.dtype).removeprefix("torch.")
    if kind == "uint8":
        values = array.numpy() if isinstance(array, torch.Tensor) else array
        if values.ndim == 3 and values.shape[-1] not in (1, 3, 4):
            values = values.transpose(1, 2, 0)  # (height, width, channels), as PIL takes it
            if values.shape[-1] not in (1, 3, 4):
                raise ValueError(f"{where}: expected an image of 1, 3 or 4 channels, its shape is {shape}.")
        # PIL takes grey images without an axis for their channel.
        return _ready_pil(Image.fromarray(values.squeeze(-1) if values.shape[-1:] == (1,) else values), where, channels)
    found = f"{where}: the image has {kind} values"
    if not kind.startswith(("float", "bfloat")):
        raise ValueError(f"{found}, expected uint8 (0..255): scale it yourself, processors would clip it.")
    if not rescaled:
        remedy = "pass uint8 (0..255), or images_kwargs={'do_rescale': False} if it is scaled already."
        raise ValueError(f"{found}, which the processor would divide by 255: {remedy}")
    return array
