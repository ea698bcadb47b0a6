"""Videos as decoded frames: checked, sampled by a stated formula, run through image processors or video processors."""

import copy
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.image_processing_base import ImageProcessingMixin
from transformers.video_utils import VideoMetadata

from ..limits import check, check_count
from ..parts.known_encoders import PATCH_GRIDS, encoder_type, grid_of
from .image_bounds import bounded_processor
from .media import ImageForm, held, image_form, image_size, is_file, layout_of_call, ready_image

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
    height, width = image_size(ready[0])
    told = f"{where}: sample fewer by num_frames=; {len(ready)} frames of {width} x {height}"
    check(len(ready) * height * width, "MAX_VIDEO_PIXELS", f"{told} have pixels:")
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
        bounded, within = bounded_processor(processor, options, len(frames), len(frames))
        with within:
            output = bounded([frames] if whole else frames, return_tensors="pt", **options)
    except Exception as error:
        failure = f"{type(processor).__name__} cannot process its {len(frames)} frames"
        told = f"({type(error).__name__}: {error!s:.300}); its options are {options!r:.300}"
        raise ValueError(f"{where}: {failure} {told}.") from error
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


# ---- video processors of transformers, which need torchvision


def is_video_processor(processor: Any) -> bool:
    """Whether this is a video processor of transformers, whose base class cannot be imported without torchvision."""
    return isinstance(processor, ImageProcessingMixin) and hasattr(processor, "get_video_processor_dict")


def run_video_processor(
    processor: Any, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any, channels: int
) -> dict[str, torch.Tensor]:
    """Process videos by a video processor of transformers, into tensors as `video.run_on_frames` gives them.

    Of a processor that packs patches they are those of all videos ``(patches, values)`` and their grids ``(videos, 3)``.
    Options are `num_frames`, `fps`, `source_fps`, `do_sample_frames`, `video_metadata` (one for each item) and further
    arguments of the processor's call; TypeError for what it does not take.
    """
    options = dict(options)
    wanted = {key: options.pop(key, None) for key in (*SAMPLING, "do_sample_frames")}
    given = options.pop("video_metadata", None)
    given = [{}] * len(items) if given is None else given
    groups = given if isinstance(given, (list, tuple)) else [given]  # one list, or a list per sample
    stated = [one for group in groups for one in (group if isinstance(group, (list, tuple)) else [group])]
    if len(stated) != len(items) or not all(isinstance(one, Mapping) for one in stated):
        expected = f"video_metadata of {len(items)} videos, a dict or VideoMetadata for each"
        raise ValueError(f"{name}: expected {expected}, got {given!r:.200}.")
    if unknown := sorted(set(options) - (set(processor.valid_kwargs.__annotations__) - {"return_metadata"})):
        raise TypeError(f"{name}: {type(processor).__name__} takes no argument {unknown} here.")
    form, videos = image_form(processor, name, options, channels), []
    for i, item in enumerate(items):
        where = f"{name}, item {i}"
        frames, rate = opened_video(item, where, wanted["source_fps"])
        metadata = _metadata(stated[i], len(frames), rate, where)
        kept = _kept(processor, where, wanted, metadata, options, len(frames))
        ready = ready_frames(frames, kept, where, form)
        check_frame_count(len(ready), encoder_config, name, i)
        videos.append(
            _by_video_processor(processor, ready, where, metadata, options | {"input_data_format": form.wanted})
        )
    if grid_of(videos[0]) is not None:  # packed patches (patches, values) and grids (1, 3) of each video
        return {key: torch.cat([video[key] for video in videos]) for key in videos[0]}
    return joined_videos(videos, name)


def _metadata(given: Mapping[str, Any], count: int, rate: float | None, where: str) -> VideoMetadata:
    """Metadata of a video of `count` frames (ValueError: what is given is of another video)."""
    values = {"total_num_frames": count, **{k: v for k, v in dict(given).items() if v is not None}}
    numbers = values.get("frames_indices")  # of the frames that are given, among those of the whole video
    if len(numbers) != count if numbers is not None else values["total_num_frames"] != count:
        told = values["total_num_frames"] if numbers is None else len(numbers)
        remedy = "say which of them these are (frames_indices), or leave it out."
        raise ValueError(f"{where}: its video_metadata tells of {told} frames, but {count} were given: {remedy}")
    if rate is not None and values.setdefault("fps", rate) != rate:
        raise ValueError(f"{where}: its video_metadata says {values['fps']} frames per second, the call says {rate}.")
    if values.get("fps"):
        values.setdefault("duration", values["total_num_frames"] / values["fps"])
    try:
        return VideoMetadata(**values)
    except TypeError as error:
        raise ValueError(f"{where}: its video_metadata has unknown entries ({error}).") from error


def _kept(
    processor: Any, where: str, wanted: Mapping, metadata: VideoMetadata, options: Mapping, count: int
) -> list[int]:
    """Numbers of the frames that are kept: all, unless the call or the processor's `do_sample_frames` asks for sampling."""
    num_frames, fps, sampling = (wanted[key] for key in ("num_frames", "fps", "do_sample_frames"))
    explicit = num_frames is not None or fps is not None
    if sampling is False and explicit:
        raise ValueError(f"{where}: {num_frames=}, {fps=} ask for samples and do_sample_frames=False for none.")
    if not (explicit or (getattr(processor, "do_sample_frames", False) if sampling is None else sampling)):
        return list(range(count))
    if metadata.frames_indices is not None:
        remedy = "pass do_sample_frames=False, or leave that out."
        raise ValueError(f"{where}: its video_metadata says its frames are samples already (frames_indices): {remedy}")
    asked = num_frames or (None if fps else getattr(processor, "num_frames", None))
    check(asked or 0, "MAX_VIDEO_FRAMES", f"{where}: sample fewer by num_frames=; the number of frames is")
    chosen = copy.copy(processor)  # whose attributes stand in for what is not given
    if explicit:
        sampled_frames(count, where, num_frames, fps, metadata.fps)  # for its refusals alone
        chosen.num_frames, chosen.fps = num_frames, fps  # one is None: the processor's own must not stand beside it
    indices = _by_own_rule(chosen, metadata, where, options)
    if num_frames is not None and len(indices) != num_frames:
        found = f"{type(processor).__name__} samples {len(indices)}: ask for as many, or sample yourself."
        raise ValueError(f"{where}: {num_frames=} was asked for, but {found}")
    metadata.frames_indices = indices  # some processors make time stamps of them
    return indices


def _by_own_rule(processor: Any, metadata: VideoMetadata, where: str, options: Mapping[str, Any]) -> list[int]:
    """Which frames a processor samples; what it would only assume (24 frames per second) is refused."""
    remedy = "tell the video's rate (source_fps=, {'video': frames, 'fps': rate}), or pass do_sample_frames=False."
    sampler = f"{where}: {type(processor).__name__}"
    if metadata.fps is None and processor.num_frames is None and processor.fps is not None:
        raise ValueError(f"{sampler} samples {processor.fps} frames per second: {remedy}")
    told, count = copy.copy(metadata), metadata.total_num_frames  # a processor writes its assumptions into `told`
    names = set(processor.valid_kwargs.__annotations__) - {"video_metadata", "metadata"}
    settings = {key: getattr(processor, key, None) for key in names} | dict(options)
    try:
        indices = [int(i) for i in processor.sample_frames(metadata=told, **settings)]
    except Exception as error:
        cause = f"{type(error).__name__}: {error!s:.300}"
        raise ValueError(f"{sampler} cannot sample its {count} frames ({cause}).") from error
    if told.fps != metadata.fps:
        raise ValueError(f"{sampler} takes {told.fps} frames per second for granted: {remedy}")
    if not indices or not all(0 <= i < count for i in indices):
        raise ValueError(f"{sampler} samples the frames {indices} of {count}.")
    return indices


def _by_video_processor(
    processor: Any, frames: list[Any], where: str, metadata: VideoMetadata, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of one video: packed patches with their grid, or ``(frames, ...)`` each."""
    options = dict(options)
    if all(isinstance(frame, Image.Image) for frame in frames):
        video: Any = np.stack([np.asarray(frame) for frame in frames])  # (frames, height, width[, channels])
        if video.ndim == 3:
            video = video[..., None]  # grey frames as (frames, height, width, 1)
            options.setdefault("do_convert_rgb", False)
        options["input_data_format"] = "channels_last"
    else:
        video = torch.stack([torch.as_tensor(frame) for frame in frames])  # laid out as the frames are
    told = {"do_sample_frames": False, "video_metadata": [metadata]}  # these frames are the samples
    try:
        bounded, within = bounded_processor(processor, options, len(frames), len(frames))
        with within:
            output = bounded(videos=[video], return_tensors="pt", **told, **options)
    except Exception as error:
        frame, cause = tuple(video.shape[1:]), f"{type(error).__name__}: {error!s:.300}"
        failure = f"{type(processor).__name__} cannot process its {len(frames)} frames of {frame} ({cause})."
        raise ValueError(f"{where}: {failure}") from error
    tensors = {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}
    if grid_of(tensors) is not None:
        return tensors
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if len({shape[:2] for shape in shapes.values()}) != 1 or any(len(s) < 2 or s[0] != 1 for s in shapes.values()):
        found = f"{type(processor).__name__} gave {shapes} for one video, expected (1, frames, ...)"
        raise ValueError(f"{where}: {found}: process the videos yourself and pass the tensors in encoder_inputs=.")
    return {key: value[0] for key, value in tensors.items()}
