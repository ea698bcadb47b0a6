"""Makes items ready for their processors: puts in order, opens, orients, checks and converts what users hand over.

What a processor would clip or stretch without a word is refused.  Every picture goes one road, however it is handed over.
"""

import inspect
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import get_resize_output_image_size, get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from ..limits import cap, check_image, check_switch, is_count
from .opening import decoded, opened
from .placeholder_text import check_lengths

# At most 8 bits per channel, and Pillow converts them.
PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
FIRST, LAST = "channels_first", "channels_last"  # of the three axes of an image
_IMAGE_KEYS = ("image", "bytes", "url", "path", "base64")  # under which a dict holds an image
# How deep lists of numbers are nested that are one item.
LIST_DEPTHS = {"audio": 1, "time": 1, "features": 2, "image": 3, "video": 4}


@contextmanager
def of_item(name: str, i: int) -> Iterator[None]:
    """What is refused of one item of a modality alone says which one it is."""
    try:
        yield
    except ValueError as error:
        told = re.sub(rf"^{name}(, item 0)?\b", "", str(error))
        raise ValueError(f"{name}, item {i}{told}") from error


def held(item: Any, keys: Iterable[str], otherwise: Any = None) -> Any:
    """What a dict holds under the first of some keys that is not None; any other item as it is."""
    if not isinstance(item, Mapping):
        return item
    return next((item[key] for key in keys if item.get(key) is not None), otherwise)


def is_file(item: Any) -> bool:
    """Whether an item is a path, an address, text, bytes or an open file, which must be decoded."""
    plain = isinstance(item, (str, bytes, bytearray, memoryview))
    return plain or hasattr(item, "__fspath__") or callable(getattr(item, "read", None))


@dataclass(frozen=True)
class ImageForm:
    """What a processor takes for an image, and how the caller lays out arrays."""

    channels: Any = 3  # that the encoder takes
    rescaled: bool = False  # whether float values stay as they are (``do_rescale=False``)
    stated: str | None = None  # layout of arrays by the caller's word (``input_data_format``)
    wanted: str = LAST  # layout of the arrays that are handed on


def image_form(processor: Any, name: str, options: dict[str, Any], channels: Any) -> ImageForm:
    """How images are made ready for a processor by its settings and its call's `options`, whose layout is taken out."""
    stated = options.pop("input_data_format", None) or getattr(processor, "input_data_format", None)
    stated = getattr(stated, "value", stated)  # an enumeration's
    if stated not in (None, FIRST, LAST):
        raise ValueError(f"{name}: input_data_format must be {FIRST!r} or {LAST!r}, got {stated!r:.100}.")
    rescaled = options.get("do_rescale", getattr(processor, "do_rescale", True)) is False
    # Each backend takes PIL images and arrays of one layout side by side.
    wanted = FIRST if getattr(processor, "backend", None) == "torchvision" else LAST
    return ImageForm(channels, rescaled, stated, wanted)


def rated(item: Any) -> tuple[int, Any] | None:
    """A sound's sampling rate and its array, of a pair of both in either order; None for anything else."""
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        return None
    rates = [isinstance(x, (int, np.integer)) and not isinstance(x, bool) for x in item]
    arrays = [(isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim > 0) or _depth(x) > 0 for x in item]
    return next(((int(item[i]), item[1 - i]) for i in (0, 1) if rates[i] and arrays[1 - i]), None)


def flatten(items: Any, kind: str) -> tuple[list[Any], list[int] | None]:
    """Items in order, and how many each sample has when they were given as a list of lists.

    An array or a list of numbers is one item of the kinds ``"audio"`` and ``"time"``, an array with its rate one of
    ``"audio"``, a list of frames one of ``"video"``, a list of rows of numbers one of ``"features"``; a dict is always one.
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
    if kind == "audio" and rated(value) is not None:
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


def ready_image(item: Any, where: str, form: ImageForm) -> Any:
    """An image for an image processor: a PIL image of 1 or 3 channels, or an array of floats in the layout of the form.

    Files and PIL images are turned as their EXIF orientation says, as by transformers' `load_image` and by `datasets`.

    Args:
        item: PIL image, array, tensor, path, address (http, https, file, data), base64 text, bytes or open file, or a dict with
            one of those.
        where: modality and item, for messages.
    """
    item = held(item, _IMAGE_KEYS, otherwise=item)
    if is_file(item):
        item = decoded(lambda x: _open_image(x, where, _oriented), item, where, "image")
    elif isinstance(item, Image.Image):
        check_image(*item.size, where)
        # Pillow decodes when asked for pixels; what a package beside it has opened is that one's.
        if (
            getattr(item, "tile", None)
            and type(item).__module__.startswith("PIL.")
            and item.format not in [*_formats(), "MPO"]
        ):
            raise ValueError(
                f"{where}: the image is not loaded, and its format {item.format!r} is {_none_of_formats()}."
            )
        item = decoded(_oriented, item, where, "image")
    if isinstance(item, Image.Image):
        return _ready_pil(item, where, form.channels)
    if _depth(item) == LIST_DEPTHS["image"]:
        try:
            item = np.asarray(item)
        except ValueError as error:
            raise ValueError(f"{where}: the rows of the image differ in length ({error}).") from error
        # Whole numbers of 0..255 are what uint8 became in a table.
        whole = np.issubdtype(item.dtype, np.integer) and item.min() >= 0 and item.max() <= 255
        item = item.astype(np.uint8) if whole else item
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return _ready_array(item, where, form)
    raise TypeError(f"{where}: expected an image (PIL, array, tensor, path or URL), got {type(item).__name__}.")


def size_of_item(item: Any, where: str) -> tuple[int, int] | None:
    """``(height, width)`` that `ready_image` would give a PIL image, or one in a file by its header; None of anything else."""
    item = held(item, _IMAGE_KEYS, otherwise=item)
    if is_file(item):
        mode, size = decoded(lambda x: _open_image(x, where, _turned), item, where, "image")
    elif isinstance(item, Image.Image):
        check_image(*item.size, where)
        mode, size = decoded(_turned, item, where, "image")
    else:
        return None
    _check_pil(mode, size, where)
    return size[1], size[0]


def _turned(image: Image.Image) -> tuple[str, tuple[int, int]]:
    """Mode, and ``(width, height)`` as `_oriented` gives it, by an image's header where that tells."""
    if image.format not in (None, "JPEG", "PNG", "WEBP"):
        image.load()  # others have another size once they are decoded (TIFF is turned, ICO has several)
    quarter = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return image.mode, image.size[::-1] if quarter else image.size


def _open_image(item: Any, where: str, read: Callable[[Image.Image], Any]) -> Any:
    source = opened(item, where)
    try:
        opening = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats())
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"its format is {_none_of_formats()}") from error
    with opening as image:
        check_image(*image.size, where)  # the header is read, the pixels are not
        return read(image)


def _formats() -> list[str]:
    """Formats of pictures that are decoded, in Pillow's order: Pillow itself would hand EPS to Ghostscript."""
    Image.init()  # its order is known once all formats are
    wanted = {name.upper() for name in cap("IMAGE_FORMATS")}
    return [name for name in Image.ID if name in wanted]


def _none_of_formats() -> str:
    return f"none of {', '.join(_formats())}: save it as one of them, or add its name to limits.IMAGE_FORMATS"


def _oriented(image: Image.Image) -> Image.Image:
    image.load()  # PIL opens files lazily, and turns TIFF by itself
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image  # which would copy any other


def _check_pil(mode: str, size: tuple[int, int], where: str) -> None:
    if min(size) == 0:
        raise ValueError(f"{where}: the image is empty (width x height = {size[0]} x {size[1]}).")
    if mode not in PLAIN_MODES:
        raise ValueError(
            f"{where}: the image has mode {mode!r}, expected one of {PLAIN_MODES}: more than 8 bits per channel and "
            "floats are clipped without a word by image processors. Scale it to 0..255 and convert it to 'L' or 'RGB' first."
        )


def _ready_pil(image: Image.Image, where: str, channels: int) -> Image.Image:
    _check_pil(image.mode, image.size, where)
    wanted = {1: "L", 3: "RGB"}.get(channels, image.mode)
    return image if image.mode == wanted else image.convert(wanted)  # which would copy an image that is right already


def _ready_array(array: Any, where: str, form: ImageForm) -> Any:
    shape = tuple(array.shape)
    if len(shape) == 4:
        remedy = "give a list of images; for the frames of a video, compose the encoder with kind='video'."
        raise ValueError(f"{where}: expected one image, got {shape[0]} in one array of the shape {shape}: {remedy}")
    if 0 in shape or len(shape) not in (2, 3):
        raise ValueError(f"{where}: the image is empty or no image, its shape is {shape}.")
    kind = str(array.dtype).removeprefix("torch.")
    found = f"{where}: the image has {kind} values"
    if kind != "uint8" and not kind.startswith(("float", "bfloat")):
        raise ValueError(f"{found}, expected uint8 (0..255): scale it yourself, processors would clip it.")
    if kind != "uint8" and not form.rescaled:
        remedy = "pass uint8 (0..255), or images_kwargs={'do_rescale': False} if it is scaled already."
        raise ValueError(f"{found}, which the processor would divide by 255: {remedy}")
    layout = _layout(shape, where, form)
    height, width = shape[1:] if layout == FIRST else shape[:2]
    check_image(width, height, where)
    if kind != "uint8":
        if not bool((torch if isinstance(array, torch.Tensor) else np).isfinite(array).all()):
            raise ValueError(f"{where}: the image has values that are not finite.")
        return _moved(array, layout, form.wanted)
    values = _moved(array.cpu().numpy() if isinstance(array, torch.Tensor) else array, layout, LAST)
    if values.shape[-1] not in (1, 3, 4):
        raise ValueError(f"{where}: expected an image of 1, 3 or 4 channels, its shape is {shape}.")
    # PIL takes grey images without an axis for their channel.
    return _ready_pil(Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values), where, form.channels)


def _layout(shape: tuple[int, ...], where: str, form: ImageForm) -> str | None:
    """Where an image of that shape has its channels; None without an axis for them."""
    if len(shape) == 2:
        return None
    fits = [name for name, size in ((FIRST, shape[0]), (LAST, shape[2])) if size in (1, 3, 4, form.channels)]
    if form.stated is not None and form.stated not in fits:
        told = f"input_data_format={form.stated!r} says otherwise"
        raise ValueError(f"{where}: expected an image of 1, 3 or 4 channels, its shape is {shape}, {told}.")
    if not fits:
        raise ValueError(f"{where}: expected an image of 1, 3 or 4 channels, its shape is {shape}.")
    if form.stated is None and len(fits) == 2:
        remedy = f"say it by images_kwargs={{'input_data_format': {FIRST!r}}} or {LAST!r}."
        raise ValueError(f"{where}: either end of the shape {shape} may be the image's channels: {remedy}")
    return form.stated or fits[0]


def _moved(array: Any, layout: str | None, wanted: str) -> Any:
    """An image with its channels, or an axis for the only one, where they are wanted."""
    if layout is None:
        return array[None] if wanted == FIRST else array[..., None]
    if layout == wanted:
        return array
    order = (1, 2, 0) if wanted == LAST else (2, 0, 1)
    return array.permute(order) if isinstance(array, torch.Tensor) else array.transpose(order)


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image, of an array ``(..., height, width)``, or of one with its few channels last."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = tuple(image.shape)
    height, width = shape[:2] if len(shape) == 3 and shape[-1] <= 4 < shape[0] else shape[-2:]
    return int(height), int(width)


def resized_size(image: np.ndarray, size: Any) -> tuple[int, int] | None:
    """The ``(height, width)`` to which Pillow's backend resizes an image ``(..., height, width)``; None where it refuses."""
    found = tuple(image.shape[-2:])
    if size.shortest_edge and size.longest_edge:
        return get_size_with_aspect_ratio(found, size.shortest_edge, size.longest_edge)
    if size.shortest_edge:
        form: Any = {"default_to_square": False, "input_data_format": "channels_first"}
        return get_resize_output_image_size(image, size=size.shortest_edge, **form)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width(found, size.max_height, size.max_width)
    return (size.height, size.width) if size.height and size.width else None


def ready_tensors(given: Mapping[str, Any], name: str) -> dict[str, torch.Tensor]:
    """What a caller processed already, as tensors ``(items, ...)`` (TypeError, ValueError: no numbers that are finite)."""
    found = {}
    for key, value in given.items():
        try:
            found[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            told = f"expected a tensor, an array or a list of numbers, got {type(value).__name__}"
            raise TypeError(f"{name}: {key} in encoder_inputs: {told} ({error}).") from error
        if found[key].ndim == 0:
            raise ValueError(
                f"{name}: {key} in encoder_inputs: expected a row for each item, got {value!r:.100} alone."
            )
    check_finite(found, name)
    return found


def check_finite(tensors: Mapping[str, Any], where: str) -> None:
    """Refuse what a processor made of an item where it holds NaN or infinity (ValueError)."""
    for key, value in tensors.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        # A sum that is finite is of finite values alone, and takes no memory; one that is not may be too large.
        if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            raise ValueError(f"{where}: its processor gave {key} with values that are not finite (NaN or infinity).")


def layout_of_call(processor: Any, images: Iterable[Any], form: ImageForm) -> dict[str, Any]:
    """The argument that tells a processor the layout of images that were made ready; none where it needs none."""
    parameters = inspect.signature(getattr(processor, "preprocess", processor)).parameters
    by_first_image = "input_data_format" in parameters  # it takes for every image what the shape of the first one tells
    if by_first_image or any(not isinstance(image, Image.Image) for image in images):
        known = by_first_image or "input_data_format" in getattr(processor, "_valid_kwargs_names", ())
        return {"input_data_format": form.wanted} if known else {}
    # Of PIL images each backend knows it; one that was set for arrays must not speak of them.
    return {} if getattr(processor, "input_data_format", None) is None else {"input_data_format": None}


def check_kinds(processor: Any, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options of kinds that they do not have, and lengths that would be left aside (TypeError, ValueError)."""
    if not options:
        return
    defaults = {key: parameter.default for key, parameter in inspect.signature(processor).parameters.items()}
    for key in sorted(set(options) - {"padding", "truncation"}):  # some processors have words for these
        default = defaults.get(key, getattr(processor, key, None))
        if key.startswith(("do_", "return_")) or isinstance(default, bool):
            check_switch(options[key], f"{name}: {key}")
    resample, filters = options.get("resample"), {one.name: int(one) for one in Image.Resampling}
    known = isinstance(resample, Enum) or (is_count(resample, least=0) and resample in filters.values())
    if resample is not None and not known:
        raise ValueError(f"{name}: resample must be one of PIL.Image.Resampling, {filters}, got {resample!r:.100}.")
    most = options.get("max_length")
    # Feature extractors that are called with padding=True; what is no length at all is told where they are.
    if defaults.get("truncation") is False and (is_count(most) or isinstance(most, np.integer)):
        check_lengths({"padding": True, "truncation": False, **options}, options, name)
