"""Videos as decoded frames: checked, sampled by a stated formula, run through image processors; see `video_processors`."""

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from ..limits import check, check_count
from ..parts.known_encoders import PATCH_GRIDS, encoder_type
from .media import ImageForm, held, image_form, is_file, layout_of_call, ready_image

FRAME_MASK = "frame_mask"
SAMPLING = ("num_frames", "fps", "source_fps")


def sampled_frames(
    total: int, where: str, num_frames: int | None = None, fps: float | None = None, source_fps: float | None = None
) -> list[int]:
    """Which frames of a video are kept: of `total` frames the ``floor(i * total / n)``-th, for ``i`` from 0 to ``n - 1``.

    `n` is `num_frames`, or ``max(1, floor(total * fps / source_fps))`` with rates in frames per second, or `total`.  These
    are the first frames of `n` stretches of equal length, as the video processors of transformers sample by default.

    >>> sampled_frames(10, "film", num_frames=4)
    [0, 2, 5, 7]
    """
    if num_frames is not None and fps is not None:
        raise ValueError(f"{where}: {num_frames=} and {fps=} are two ways of sampling, give one.")
    count = total if num_frames is None else check_count(num_frames, f"{where}: num_frames")
    if fps is not None:
        if source_fps is None:
            remedy = "pass source_fps=, or the item as {'video': frames, 'fps': rate}."
            raise ValueError(f"{where}: {fps=} needs the video's own rate: {remedy}")
        if not all(isinstance(rate, Real) and math.isfinite(rate) and rate > 0 for rate in (fps, source_fps)):
            raise ValueError(f"{where}: frames per second must be positive, got {fps=}, {source_fps=}.")
        count = max(1, math.floor(total * fps / source_fps))
    if count > total:
        remedy = "ask for fewer, or repeat frames yourself."
        raise ValueError(f"{where}: {count} frames were asked for, but the video has {total}: {remedy}")
    return [i * total // count for i in range(count)]


def ready_video(item: Any, where: str, form: ImageForm, sampling: Mapping | None = None) -> list[Any]:
    """The frames of an `opened_video`, sampled as in `sampled_frames`, each as `ready_frames` makes it."""
    options = dict(sampling or {})
    frames, options["source_fps"] = opened_video(item, where, options.get("source_fps"))
    return ready_frames(frames, sampled_frames(len(frames), where, **options), where, form)


def opened_video(item: Any, where: str, source_fps: float | None = None) -> tuple[Sequence[Any], float | None]:
    """A video's frames and its frames per second: those that the item tells, else `source_fps`.

    It may be an array or tensor ``(frames, height, width, 3)`` or ``(frames, 3, height, width)``, a list of frames (PIL
    images, arrays, tensors, of one size), or a dict with those under ``"video"`` and the frames per second as ``"fps"``.
    """
    source_fps = held(item, ("fps",), otherwise=source_fps) if isinstance(item, Mapping) else source_fps
    item = held(item, ("video", "frames", "videos", "array"))
    if is_file(item):
        remedy = "decode it first, for instance by transformers.video_utils.load_video, and pass the array of frames."
        raise TypeError(f"{where}: expected the frames of a video, got a file: {remedy}")
    rank = 3 if isinstance(item, Image.Image) else getattr(item, "ndim", None)
    if rank not in (None, 4):
        shape = item.size if isinstance(item, Image.Image) else tuple(item.shape)
        one = rank in (2, 3)
        got = f"got {'one image of' if one else 'the'} shape {shape}"
        remedy = "pass [image] for a video of one frame" if one else "pass several videos as a list"
        expected = "(frames, height, width, 3) or (frames, 3, height, width)"
        raise ValueError(f"{where}: expected {expected}, {got}: {remedy}.")
    if rank is None and not isinstance(item, (list, tuple)):
        raise TypeError(f"{where}: expected the frames of a video (array, tensor, list), got {type(item).__name__}.")
    if len(item) == 0:
        raise ValueError(f"{where}: the video has 0 frames, expected at least one.")
    return item, source_fps


def ready_frames(frames: Sequence[Any], kept: Sequence[int], where: str, form: ImageForm) -> list[Any]:
    """The frames with the numbers `kept`, each as `media.ready_image` makes it (ValueError: too many, or of several sizes)."""
    check(len(kept), "MAX_VIDEO_FRAMES", f"{where}: sample fewer by num_frames=; the number of frames is")
    # Only the frames that are kept are converted.
    ready = [ready_image(frames[i], f"{where}, frame {i}", form) for i in kept]
    sizes = [(one.height, one.width) if isinstance(one, Image.Image) else tuple(one.shape) for one in ready]
    for i, size in zip(kept, sizes, strict=True):
        if size != sizes[0]:
            remedy = "the frames of a video have one size, resize them first."
            raise ValueError(f"{where}: frame {i} has the size {size}, frame {kept[0]} has {sizes[0]}: {remedy}")
    return ready


def run_on_frames(
    processor: Any, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any, channels: int
) -> dict[str, torch.Tensor]:
    """Process videos, see `opened_video`, by an image processor, frame by frame.

    Options are `num_frames`, `fps`, `source_fps`, by default as the processor is set, and arguments of the processor's call.
    Each tensor of the processor is given as ``(videos, most frames, ...)``, shorter videos filled up with zeros, and
    `frame_mask` ``(videos, most frames)``, True where a frame is one.
    """
    sampling, options = _sampling(processor, options)
    form, videos = image_form(processor, name, options, channels), []
    for i, item in enumerate(items):
        frames = ready_video(item, f"{name}, item {i}", form, sampling)
        check_frame_count(len(frames), encoder_config, name, i)
        videos.append(
            _processed(processor, f"{name}, item {i}", frames, options | layout_of_call(processor, frames, form))
        )
    return joined_videos(videos, name)


def video_of_size(
    processor: Any, name: str, image: Any, count: int, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """What `run_on_frames` gives for one video of `count` frames that are all one image, ready for the processor."""
    sampling, options = _sampling(processor, options)
    kept = sampled_frames(count, name, **sampling)
    check(len(kept), "MAX_VIDEO_FRAMES", f"{name}: sample fewer by num_frames=; the number of frames is")
    return joined_videos([_processed(processor, name, [image] * len(kept), options)], name)


def _sampling(processor: Any, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How frames are chosen, by the call or the processor's settings, and the other options."""
    sampling = {key: options.get(key) for key in SAMPLING}
    if sampling["num_frames"] is None and sampling["fps"] is None:
        sampling |= {key: getattr(processor, key, None) for key in ("num_frames", "fps")}
    return sampling, {key: value for key, value in options.items() if key not in SAMPLING}


def check_frame_count(count: int, config: Any, name: str, i: int) -> None:
    """Refuse another number of frames than the encoder of a configuration takes (ValueError with both numbers)."""
    expected = None if encoder_type(config).any_number_of_frames else getattr(config, "num_frames", None)
    if isinstance(expected, int) and 0 < expected != count:
        remedy = (
            f"pass {name}_kwargs={{'num_frames': {expected}}}, or set its processor so; repeat frames of short videos."
        )
        raise ValueError(f"{name}, item {i}: {count} frames are left, but the encoder takes {expected}: {remedy}")


def _processed(processor: Any, where: str, frames: list[Any], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One video's tensors, ``(frames, ...)`` each."""
    # Some image processors take lists of frames as videos and give (1, frames, ...).
    whole = "videos" in inspect.signature(processor.preprocess).parameters
    try:
        output = processor([frames] if whole else frames, return_tensors="pt", **options)
    except Exception as error:
        failure = f"{type(processor).__name__} cannot process its {len(frames)} frames"
        raise ValueError(f"{where}: {failure} ({type(error).__name__}: {error!s:.300}).") from error
    if packed := [key for key in output if key.endswith(PATCH_GRIDS)]:
        packs = f"{type(processor).__name__} packs the patches of images ({packed[0]}) and cannot make those of a video"
        remedy = "give the encoder's video processor (it needs torchvision: pip install torchvision)."
        raise ValueError(f"{where}: {packs}: {remedy}")
    # (1, frames, ...) -> (frames, ...)
    tensors = {k: v[0] if whole else v for k, v in output.items() if isinstance(v, torch.Tensor)}
    if not tensors or any(len(value) != len(frames) for value in tensors.values()):
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        raise ValueError(f"{where}: {type(processor).__name__} gave {shapes} for {len(frames)} frames.")
    return tensors


def joined_videos(videos: list[dict[str, torch.Tensor]], name: str) -> dict[str, torch.Tensor]:
    """Tensors of single videos, ``(frames, ...)`` each, as `run_on_frames` returns them (ValueError: of several sizes)."""
    counts = [len(next(iter(video.values()))) for video in videos]
    found = {}
    for key in videos[0]:
        rows = [video[key] for video in videos]
        for i, row in enumerate(rows):
            if row.shape[1:] != rows[0].shape[1:]:
                sizes = f"the frames of item {i} become {tuple(row.shape[1:])} and those of item 0 {tuple(rows[0].shape[1:])}"
                raise ValueError(f"{name}: {sizes}: videos of one call must come out of their processor in one size.")
        found[key] = pad_sequence(rows, batch_first=True)  # (videos, most frames, ...)
    mask = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]  # (videos, most frames)
    return found | {FRAME_MASK: mask}


def named_for_encoder(output: Mapping[str, Any], name: str, keyword: Callable[[str], str | None]) -> dict[str, Any]:
    """A video's tensors under the names that its encoder takes; `keyword` gives the one for an input of a name, or None."""
    found = dict(output)
    # Processors and encoders of videos do not agree on one of two names.
    for emitted, taken in (("pixel_values", "pixel_values_videos"), ("pixel_values_videos", "pixel_values")):
        if emitted in found and keyword(emitted) is None and keyword(taken):
            found[taken] = found.pop(emitted)
            break  # once: the second pair would turn it back
    if FRAME_MASK in found and keyword(FRAME_MASK) is None:
        counts = found.pop(FRAME_MASK).sum(-1).tolist()
        if len(set(counts)) > 1:
            taken = f"one number of frames in a call: pass {name}_kwargs={{'num_frames': ...}}."
            raise ValueError(f"{name}: the videos have {counts} frames, but this encoder takes {taken}")
    return found


def video_processor_missing(source: str | os.PathLike, error: Exception) -> ValueError:
    """What to say where the only processor beside an encoder is a video processor that cannot be loaded."""
    cause = " ".join(str(error).split())
    remedy = "pass an image processor, which is run frame by frame: {'model': ..., 'processor': image_processor}."
    return ValueError(
        f"The video processor of {source} cannot be loaded ({cause:.200}). Video processors of transformers need torchvision "
        f"(pip install torchvision); or {remedy}"
    )
