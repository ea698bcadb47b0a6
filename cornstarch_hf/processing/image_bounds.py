"""Bounds what processors make of small items: images that resizing or padding makes huge, crops and padding without end.

A processor of Pillow's backend runs as an instance of a class of its own, with its attributes, whose operations are measured
before they are done; one of torchvision's runs within a mode that measures every operation of this thread.  Nothing is changed.

Stored settings that make the same of every item are refused before there is one.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import ImageProcessingMixin

from ..limits import check
from ..parts.build_bounds import made_bytes
from ..parts.stored_values import check_values
from ..parts.threads import ThreadDispatchMode
from .media import image_size, resized_size

_BYTES_OF_PIXEL = 12  # three channels of float32
# Settings that say how many pieces of one size are made of an image, whether or not it has as many.
_PIECES = ("max_patches", "max_num_patches", "max_image_tiles", "max_num_tiles", "max_soft_tokens")
# Operations of torch that make no more elements than they are given: they need no measure.
_OF_ONE_SIZE = frozenset(f"aten::{name}" for name in ("clone", "round", "clamp", "detach", "view", "permute"))
_OPERATIONS = ("resize", "pad", "pad_to_square", "center_crop")

# Settings whose products say how much memory a processor takes, and the cap of each product.
_PRODUCTS = (
    (("height", "width"), "MAX_IMAGE_PIXELS"),
    (("chunk_length", "sampling_rate"), "MAX_AUDIO_SAMPLES"),
    (("n_fft", "feature_size"), "MAX_AUDIO_SAMPLES"),
    (("fft_length", "feature_size"), "MAX_AUDIO_SAMPLES"),
)
_EDGES = ("shortest_edge", "longest_edge", "height", "width", "max_height", "max_width")


class Pixels:
    """How many pixels one call of a processor has made, of so many images or frames."""

    def __init__(self, items: int, frames: int = 1) -> None:
        self.items, self.frames, self.made = max(items, 1), max(frames, 1), 0.0

    def add(self, made: tuple[int, int], given: tuple[int, int] | None, how: str, times: int = 1) -> None:
        """Count an image of ``(height, width)`` that an operation is about to make (ValueError: too large)."""
        size = (
            f"the image{'' if given is None else f' of {given[1]} x {given[0]} pixels'}, {how} to {made[1]} x {made[0]}"
        )
        check(made[0] * made[1], "MAX_IMAGE_PIXELS", f"crop or shrink it: {size}, has pixels:")
        self.made += made[0] * made[1] * times
        if self.frames > 1:
            told = (
                f"sample fewer frames by num_frames=: the video of {self.frames} frames, {how} to {made[1]} x {made[0]}"
            )
            check(made[0] * made[1] * self.frames, "MAX_VIDEO_PIXELS", f"{told}, has pixels:")
        else:
            each = int(self.made / self.items)
            check(each, "MAX_MADE_PIXELS", f"crop or shrink it: {size}, and all else that is made of it, has pixels:")

    def add_bytes(self, size: int) -> None:
        """Count what a tensor operation is about to make of all images or frames together (ValueError: too much)."""
        pixels = size // _BYTES_OF_PIXEL
        told = "resized or padded, it has pixels:"
        check(pixels // self.items, "MAX_IMAGE_PIXELS", f"crop or shrink it: {told}")
        if self.frames > 1:
            check(pixels, "MAX_VIDEO_PIXELS", f"sample fewer frames by num_frames=, or crop or shrink it: {told}")


class _BoundedTensors(ThreadDispatchMode):
    """Within this mode no operation makes more of an image than `Pixels` allows."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name not in _OF_ONE_SIZE and not name.endswith("_"):  # what works in place makes nothing
            self.pixels.add_bytes(made_bytes(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _BoundedArrays(PilBackend):
    """Behind a processor's own methods: what they hand on to these is measured."""

    _pixels: Pixels

    def resize(self, image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        given = image_size(image)
        if (made := resized_size(image, size)) is not None:
            self._pixels.add(made, given, "resized")
        return super().resize(image, size, *args, **kwargs)


def _before(pixels: Pixels, method: str, image: Any, size: Any) -> None:
    """Measure what one of `_OPERATIONS` makes, before the processor's own method runs."""
    sizes = _sizes(image)
    edges = size if isinstance(size, Mapping) else vars(size) if hasattr(size, "__dict__") else {}
    given = {key: value for key, value in edges.items() if isinstance(value, int) and value > 0}
    for one in sizes:
        if method == "pad_to_square":
            pixels.add((max(one), max(one)), one, "padded")
        elif method == "resize" and set(given) == {
            "shortest_edge"
        }:  # also where a method does not go on to the backend's
            short, long = sorted(one)
            edge = given["shortest_edge"]
            found = (edge, edge * long // max(short, 1))
            pixels.add(found if one[0] <= one[1] else found[::-1], one, "resized", times=0)
        elif method in ("pad", "center_crop") and {"height", "width"} <= set(given):
            pixels.add((given["height"], given["width"]), one, "padded", times=method == "pad")
    if method == "pad" and not given and len(sizes) > 1:  # to the highest and the widest of a batch
        pixels.add((max(h for h, _ in sizes), max(w for _, w in sizes)), None, "padded", times=len(sizes))


def _sizes(images: Any) -> list[tuple[int, int]]:
    """``(height, width)`` of an image, or of all in lists of them."""
    if isinstance(images, (list, tuple)):
        return [size for one in images for size in _sizes(one)]
    return [image_size(images)] if isinstance(images, Image.Image) or getattr(images, "ndim", 0) >= 2 else []


@functools.lru_cache(maxsize=256)
def _bounded_class(cls: Any) -> Any:
    """A subclass of a processor's class whose operations are measured."""

    def measured(method: str) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            image = kwargs.get("image", kwargs.get("images", args[0] if args else ()))
            size = next(
                (kwargs[key] for key in ("size", "pad_size") if key in kwargs), args[1] if len(args) > 1 else None
            )
            square = method == "pad" and cls.__name__.startswith("Owlv2")  # by this name too it pads to a square
            _before(self._pixels, "pad_to_square" if square else method, image, size)
            return getattr(super(made, self), method)(*args, **kwargs)

        return run

    bases = (cls, _BoundedArrays) if issubclass(cls, PilBackend) else (cls,)
    made: Any = type(cls.__name__, bases, {m: measured(m) for m in _OPERATIONS if hasattr(cls, m)})
    return made


def bounded_processor(processor: Any, options: Mapping[str, Any], items: int, frames: int = 1) -> tuple[Any, Any]:
    """An image processor that makes no more of `items` images, or of a video's frames, than the caps allow, with a context to
    run it in; any other processor as it is.  ValueError where it is set, or asked, to make pieces without end."""
    if not isinstance(processor, ImageProcessingMixin):
        return processor, contextlib.nullcontext()
    check_pieces(processor, options)
    pixels = Pixels(items, frames)
    if getattr(processor, "backend", None) == "torchvision":
        return processor, _BoundedTensors(pixels)
    cls: Any = type(processor)
    bounded = object.__new__(_bounded_class(cls))
    bounded.__dict__ = {**vars(processor), "_pixels": pixels}
    return bounded, contextlib.nullcontext()


def check_pieces(processor: Any, options: Mapping[str, Any]) -> None:
    """Refuse options, or settings, by which pieces without end are made of each image (ValueError)."""

    def value(key: str) -> Any:
        found = options.get(key)
        return getattr(processor, key, None) if found is None else found

    unit = _area(value("patch_size")) or _area(value("size")) or 1
    unit *= _area(value("pooling_kernel_size")) or 1
    for key in _PIECES:
        number = value(key)
        if isinstance(number, int):
            check(number * unit, "MAX_MADE_PIXELS", f"ask for fewer: {key}={number:,} pieces of {unit:,} pixels are")


def _area(size: Any) -> int:
    """Pixels of a piece whose edge, or whose edges by name, are given; 0 where none are."""
    if isinstance(size, int):
        return size * size
    edges = size if isinstance(size, Mapping) else vars(size) if hasattr(size, "__dict__") else {}
    known = [edges.get(key) for key in ("height", "width", "shortest_edge")]
    known = [edge for edge in known if isinstance(edge, int)]
    return known[0] * known[-1] if known else 0


def check_processor_settings(values: Mapping[str, Any], name: str) -> None:
    """Refuse stored settings by which a processor would make an endless image or window of any item (ValueError)."""
    check_values(values, f"{name}: its processor")
    counts_pixels = any(key in values for key in ("max_pixels", "merge_size"))  # there an edge is a number of pixels
    for group in (values, *(v for v in values.values() if isinstance(v, Mapping))):
        numbers = {k: v for k, v in group.items() if isinstance(v, int) and not isinstance(v, bool)}
        for key, value in numbers.items():
            edge = key in _EDGES and not counts_pixels
            limit, square = ("MAX_IMAGE_PIXELS", "square of the ") if edge else ("MAX_AUDIO_SAMPLES", "")
            check(value**2 if edge else value, limit, f"{name}: the {square}setting {key!r} of its processor is")
        for keys, limit in _PRODUCTS:
            if all(key in numbers for key in keys):
                check(numbers[keys[0]] * numbers[keys[1]], limit, f"{name}: {' x '.join(keys)} of its processor is")
