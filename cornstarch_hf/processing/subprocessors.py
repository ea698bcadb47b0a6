"""The processors of single modalities: recognised, called, written into a dictionary and built from one."""

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BatchFeature, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import ImageProcessingMixin

from ..limits import check, check_count, check_image
from .image_bounds import bounded_processor
from .media import check_finite, image_form, layout_of_call, ready_image, resized_size, size_of_item
from .placeholder_text import TEXT_OPTIONS
from .sounds import audio_options, run_extractor
from .texts import run_tokenizer
from .video import FRAME_MASK, SAMPLING, is_video_processor, run_on_frames, run_video_processor, video_of_size

# Arguments of encoders that say which sizes of items they take: for the count, and not for a modality's processor.
ENCODER_SETTINGS = ("interpolate_pos_encoding",)


class ItemProcessor(FeatureExtractionMixin):
    """Base of this package's processors of items."""

    def __call__(self, items: Sequence[Any], return_tensors: str = "pt", name: str = "items") -> BatchFeature:
        raise TypeError(f"{type(self).__name__} does not say how its items are processed: define __call__.")


TILERS: dict[str, Any] = {}  # what makes tiles of images, where an encoder takes them: of `processing/tiles`
ITEM_PROCESSORS: dict[str, type[ItemProcessor]] = {}  # by class name; `own_processors` adds the package's
_PARTS = {"image": ["image_processor"], "video": ["video_processor", "image_processor"], "audio": ["feature_extractor"]}
_OF_ALL_PARTS = {"return_tensors", "return_mm_token_type_ids", "return_offsets_mapping", "name"}
# Methods of image processors that read settings by name; what lands in their `**kwargs` is read by none.
_READERS = ["_preprocess", "preprocess", "process_image", "_prepare_image_like_inputs", "_preprocess_image_like_inputs"]
_READERS += ["_standardize_kwargs"]


def resolve_subprocessor(processor: Any, kind: str, name: str) -> Any:
    """The processor of one modality, taken out of one of several (TypeError: no processor, or no part for this kind)."""
    if isinstance(processor, ProcessorMixin):
        for attribute in _PARTS.get(kind, ["tokenizer"]):
            if (inner := getattr(processor, attribute, None)) is not None:
                return inner
        raise TypeError(f"{name}: {type(processor).__name__} has no part for the kind {kind!r}.")
    if isinstance(processor, type) or not callable(processor):
        expected = "an image processor, feature extractor or tokenizer instance"
        raise TypeError(f"{name}: expected {expected}, got {processor!r:.100}.")
    return processor


def sampling_rate_of(processor: Any) -> int | None:
    """The rate in Hz that a feature extractor expects, None for other processors."""
    return getattr(processor, "sampling_rate", None) if isinstance(processor, FeatureExtractionMixin) else None


def options_of(processor: Any, kind: str) -> frozenset[str] | None:
    """Names of the options that a modality's processor takes in a call; None for a callable that takes any."""
    if isinstance(processor, PreTrainedTokenizerBase):  # without a mask, padding would pass for text
        return TEXT_OPTIONS - _OF_ALL_PARTS - {"return_attention_mask"}
    sampling = set(SAMPLING) if kind == "video" or is_video_processor(processor) else set()
    if is_video_processor(processor):
        read = set(processor.valid_kwargs.__annotations__) - {"return_metadata"} | {
            "do_sample_frames",
            "video_metadata",
        }
    elif isinstance(processor, ImageProcessingMixin):
        cls: Any = type(processor)
        read = set(_read_by_images(cls))
    elif processor is None:
        return frozenset()
    else:
        parameters = list(inspect.signature(processor).parameters.values())
        if not isinstance(processor, FeatureExtractionMixin) and any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        read = {p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD}  # without the items
    return frozenset((read | sampling) - _OF_ALL_PARTS)


@lru_cache(maxsize=256)
def _read_by_images(cls: Any) -> frozenset[str]:
    methods = [getattr(cls, name) for name in _READERS if hasattr(cls, name)]
    named = {name for method in methods for name in inspect.signature(method).parameters}
    valid = getattr(getattr(cls, "valid_kwargs", None), "__annotations__", named - {"self", "images", "kwargs"})
    return frozenset(named & set(valid))


def image_channels(encoder_config: Any) -> int:
    """How many channels of an image an encoder of that configuration takes."""
    channels: Any = getattr(encoder_config, "num_channels", None) or getattr(encoder_config, "in_channels", 3)
    return channels


def run_subprocessor(
    processor: Any,
    name: str,
    kind: str,
    items: list[Any],
    options: Mapping[str, Any],
    encoder_config: Any,
    masked: bool = False,
    prepared: bool | str = False,
    maskless: bool = False,
) -> dict[str, Any]:
    """The tensors of one modality's items, by the names that its processor emits; refuses what cannot be used as it is.

    Args:
        options: further arguments of the processor's call; ``sampling_rate`` is the rate of bare audio arrays.
        masked: whether a mask tells the encoder which features are valid also where they are padded to a window.
        prepared: whether a callback prepares the encoder's inputs, so that images may be split into crops; ``"tiles"``: what
            packs those of `processing/tiles` follows the projector.
        maskless: whether the encoder takes no mask, so that sounds and texts of one call must have one length.
    """
    options = dict(options)
    # Image processors and feature extractors of transformers, this package's own, tokenizers; then somebody's callable.
    if isinstance(processor, ImageProcessingMixin):
        channels = image_channels(encoder_config)
        if is_video_processor(processor) or kind == "video":
            run = run_video_processor if is_video_processor(processor) else run_on_frames
            return run(processor, name, items, options, encoder_config, channels)
        form = image_form(processor, name, options, channels)
        items = [ready_image(x, f"{name}, item {i}", form) for i, x in enumerate(items)]
        options |= layout_of_call(processor, items, form)
        return _run_on_images(processor, name, items, options, prepared)
    if isinstance(processor, ItemProcessor):
        return _tensors(processor(items, name=name, **options), name)
    if isinstance(processor, FeatureExtractionMixin):
        rate, calls = sampling_rate_of(processor), (called, _refuse_uneven)
        return run_extractor(processor, name, items, options, rate, masked, maskless, calls)
    if isinstance(processor, PreTrainedTokenizerBase):
        output = run_tokenizer(processor, name, items, options, encoder_config)
        if maskless and (mask := output.get("attention_mask")) is not None:
            _refuse_uneven(processor, name, mask.sum(-1).tolist())
        return _tensors(output, name)
    # A callable of somebody's own checks nothing: the number of frames at least is bounded.
    for i, item in enumerate(items) if kind == "video" else ():
        frames = len(item) if hasattr(item, "__len__") and not isinstance(item, (str, bytes)) else 0
        check(frames, "MAX_VIDEO_FRAMES", f"{name}, item {i}: the number of frames is")
    keyword = {"image": "images", "video": "videos"}.get(kind, "")
    if keyword in inspect.signature(processor.__call__).parameters:
        return _tensors(processor(**{keyword: items}, return_tensors="pt", **options), name)
    return _tensors(processor(items, return_tensors="pt", **options), name)


def _run_on_images(processor: Any, name: str, items: list, options: Mapping, prepared: bool | str) -> dict[str, Any]:
    """Tensors with one row per image, also from processors that put all images of a call into one row."""
    if prepared == "tiles":
        return TILERS[prepared](processor, name, items, options)
    found = called(processor, name, items, options)
    rank = getattr(found.get("pixel_values"), "ndim", 0)
    if prepared or rank not in (5, 6):
        return found
    # All images are in one row: (1, images, channels, height, width), or (1, images, tiles, channels, height, width).
    alone = [found] if len(items) == 1 else [called(processor, name, [item], options) for item in items]
    for i, one in enumerate(alone):  # each in a row of its own
        if (crops := one["pixel_values"].shape[1]) != 1:
            told = f"{type(processor).__name__} splits the image into {crops} crops, expected 1 per item"
            settings = "do_image_splitting=False, crop_to_patches=False, split_image=False"
            raise ValueError(f"{name}, item {i}: {told}: choose tiles= of its encoder, or turn that off ({settings}).")
    shapes = [tuple(one["pixel_values"].shape[2:]) for one in alone]
    if len(set(shapes)) > 1:
        raise ValueError(_uneven(processor, name, shapes))
    together = {key: torch.cat([one[key] for one in alone]) for key in found}
    if rank == 6:  # towers that take tiles have an axis for the images of a row
        return together
    # (items, 1, channels, height, width) -> (items, channels, height, width)
    return {k: v.flatten(0, 1) if v.ndim >= 4 and v.shape[1] == 1 else v for k, v in together.items()}


def _refuse_uneven(processor: Any, name: str, sizes: list[Any]) -> None:
    """Refuse items of several sizes (ValueError) where nothing would tell the encoder what they were filled up with."""
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        told = f"{type(processor).__name__} gives sizes of {sizes[0]} for item 0 and {sizes[other]} for item {other}"
        reason = "no mask would tell its encoder what is padding"
        raise ValueError(
            f"{name}, item {other}: {told}, and {reason}: pass items of one length, or each in a call alone."
        )


def check_padding(output: Mapping[str, Any], used: Mapping[str, Any], processor: Any, name: str) -> None:
    """Refuse images that a processor padded to one size where the encoder takes no mask that tells of it (ValueError)."""
    mask = output.get("pixel_mask")
    if not isinstance(mask, torch.Tensor) or any(key.endswith("pixel_mask") for key in used) or bool(mask.bool().all()):
        return
    row = next(i for i, one in enumerate(mask) if not bool(one.bool().all()))
    # (items, height, width): rows and columns with a valid pixel
    valid = tuple(int(mask[row].bool().any(axis).sum()) for axis in (1, 0))
    raise ValueError(
        f"{name}, item {row}: {type(processor).__name__} padded it from {valid[0]} x {valid[1]} to {mask.shape[1]} x "
        f"{mask.shape[2]}, and its encoder takes no pixel_mask: give the processor a fixed size (size={{'height': ..., "
        "'width': ...}), or pass items of one size."
    )


def _uneven(processor: Any, name: str, shapes: list[Any]) -> str:
    first, other = next((i, j) for i in range(len(shapes)) for j in range(i) if shapes[i] != shapes[j])
    return (
        f"{name}: {type(processor).__name__} gives tensors of different shapes, {shapes[other]} for item {other} and "
        f"{shapes[first]} for item {first}, which cannot go in one batch: give it a fixed size "
        "(size={'height': ..., 'width': ...}), or pass items of one size."
    )


def called(processor: Any, name: str, items: list, options: Mapping[str, Any], first: int = 0) -> dict[str, Any]:
    """The tensors that a processor makes of items; its own errors say which, counted from `first`, it could not do."""

    def tensors(some: list[Any]) -> dict[str, Any]:
        # What is small may become large: resized, padded, in crops.
        bounded, within = bounded_processor(processor, options, len(some))
        with within:
            output = bounded(some, **{**options, "return_tensors": "pt"})
        return _tensors({processor.model_input_names[0]: output} if isinstance(output, torch.Tensor) else output, name)

    try:
        return tensors(items)
    except (MemoryError, torch.OutOfMemoryError, ImportError):  # of the machine, not of an item
        raise
    except Exception as error:
        shapes = []
        for i, item in enumerate(items):  # one by one: which of them fails, or comes out in another shape?
            try:
                one = tensors([item])
            except Exception as cause:
                kind = TypeError if isinstance(cause, TypeError) else ValueError
                size = tuple(item.shape) if hasattr(item, "shape") else getattr(item, "size", None)
                size = " x ".join(map(str, size)) if isinstance(size, tuple) and len(size) == 2 else size
                failure = f"{type(processor).__name__} cannot process it, its size is {size}"
                told = f"({type(cause).__name__}: {cause!s:.300}); its options are {options!r:.300}"
                raise kind(f"{name}, item {first + i}: {failure} {told}.") from cause
            shapes.append(tuple(next(iter(one.values())).shape[1:]))
        if len(set(shapes)) > 1:
            raise ValueError(_uneven(processor, name, shapes)) from error
        raise  # each item alone is fine: the error is the whole call's


class _Sized(PilBackend):
    """Behind a processor's own methods: images and resized ones have a shape, and no memory for their pixels."""

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.moveaxis(image, -1, 0)  # (channels, height, width)

    def resize(self, image: np.ndarray, size: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        found = resized_size(image, size) or tuple(image.shape[-2:])
        check_image(found[1], found[0], "crop or shrink it: resized")
        return np.broadcast_to(np.zeros((), image.dtype), (*image.shape[:-2], *found))


def tensors_of_size(
    processor: Any, name: str, size: Sequence[int], options: Mapping[str, Any], channels: int, prepared: bool | str
) -> dict[str, Any]:
    """What an image processor makes of an image ``(height, width)``, or of a video ``(frames, height, width)``, of no content.

    By the processor's own code on Pillow's backend, in which only the reading and resizing of pixels are left out; one without
    that backend runs whole.  ValueError for more pixels than `limits.MAX_IMAGE_PIXELS`.
    """
    *frames, height, width = size
    check_image(width, height, name)
    image = np.broadcast_to(np.zeros((), np.uint8), (height, width, channels))
    cls = (
        type(processor)
        if isinstance(processor, PilBackend)
        else getattr(transformers, f"{type(processor).__name__}Pil", None)
    )
    if cls is not None:
        processor = type(cls.__name__, (cls, _Sized), {}).from_dict(processor.to_dict())
    options = {**options, "input_data_format": "channels_last"}
    if frames:
        return video_of_size(processor, name, image, frames[0], options)
    return _run_on_images(processor, name, [image], options, prepared)


def tells_by_size(processor: Any) -> bool:
    """Whether `tensors_of_size` gives the sizes that an image processor gives: one of transformers, which read no content."""
    return isinstance(processor, ImageProcessingMixin) and type(processor).__module__.startswith("transformers.")


def tensor_names(processor: Any, kind: str, masked: bool) -> list[str]:
    """Names of the tensors that `run_subprocessor` gives, as the processor states them; none where it does not."""
    names = list(getattr(processor, "model_input_names", ()))
    if isinstance(processor, FeatureExtractionMixin) and not isinstance(processor, ItemProcessor):
        asked = audio_options(processor, "", [], {}, masked, None).get("return_attention_mask")
        names += ["attention_mask"] if asked else []
    return [*names, FRAME_MASK] if kind == "video" and isinstance(processor, ImageProcessingMixin) else names


def _tensors(output: Mapping[str, Any], name: str) -> dict[str, Any]:
    tensors = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
    tensors |= {key: torch.tensor(output[key]) for key in ("rows", "cols") if isinstance(output.get(key), list)}
    if not tensors:
        raise ValueError(f"{name}: its processor gave no tensors, but {sorted(output)}.")
    # A mask of floats (Pix2Struct) would be cast with the features, and its values are needed where shapes are counted.
    return {k: v.long() if k.endswith("mask") and v.is_floating_point() else v for k, v in tensors.items()}


class ItemCounts(ProcessorMixin):
    """How many features items give that are not there: of a composed processor, by their sizes."""

    config: Any
    processors: dict[Any, Any]
    counter: Any
    _counted: Any
    _tensors: Any
    _used: Any

    def _counted_by_size(self, name: str, items: list[Any], options: dict[str, Any]) -> list[int] | None:
        """Features of each item by its size, without its pixels; None where only the processor itself tells them."""
        kind = self.config.modality(name)["kind"]
        if kind != "image" or name in self.config.joined.values() or not tells_by_size(self.processors.get(name)):
            return None
        sizes = [size_of_item(item, f"{name}, item {i}") for i, item in enumerate(items)]
        if None in sizes:
            return None
        try:
            return [self._count_of_size(name, kind, i, size, options)[0] for i, size in enumerate(sizes)]
        except (ValueError, TypeError):  # which the processor says better, with the items themselves
            return None

    def features_of_sound(self, name: str, samples: int, options: dict[str, Any]) -> int:
        """How many features a modality gives of any sound of that length (ValueError: none)."""
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, samples)  # silence and tones are NaN to some that normalise
        sound = {"array": noise, "sampling_rate": sampling_rate_of(self.processors.get(name))}
        used, split = self._tensors(name, [sound], options)
        check_finite(used, name)
        return self._counted(name, split, {})[0]

    def _count_of_size(self, name: str, kind: str, i: int, size: Any, options: dict[str, Any]) -> tuple[int, int]:
        """Features of the i-th item, of a size, and its rows of pixels: patches where its processor packs them, else 1."""
        if (native := getattr(self, "native", None)) is not None:
            return native.count_of_size(self, name, size, options)
        processor, where = self.processors.get(name), f"{name}, item {i}"
        settings = {key: options[key] for key in ENCODER_SETTINGS if key in options}
        options = {key: value for key, value in options.items() if key not in settings}
        axes = {"image": ["height", "width"], "video": ["frames", "height", "width"]}.get(kind, [])
        if axes and (not isinstance(size, Sequence) or len(size) != len(axes)):
            raise ValueError(f"{where}: expected its size as ({', '.join(axes)}), got {size!r:.100}.")
        for what, number in zip(axes or ["number of samples"], size if axes else [size], strict=True):
            check_count(number, f"{where}: its {what}")
        if name in self.config.joined.values() and kind == "image":  # several processors tell what they make of one
            used, split = self._tensors(name, [np.zeros((*size, 3), np.uint8)], options)
        elif isinstance(processor, ImageProcessingMixin) and not is_video_processor(processor):
            channels = image_channels(getattr(self.config, f"{name}_config"))
            output = tensors_of_size(processor, name, size, options, channels, self.counter.has_preprocessing(name))
            used, split = self._used(name, output, 1)
        elif kind == "audio":
            return self.features_of_sound(name, size, options), 1
        else:
            told = f"{type(processor).__name__} does not tell by its size what it makes of an item"
            raise ValueError(f"{name}: {told}: call the processor with one of that size.")
        return self._counted(name, split, settings)[0], len(next(iter(used.values())))
