"""Runs videos, checked as in `video`, through transformers' video processors, which need torchvision."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import ImageProcessingMixin
from transformers.video_utils import VideoMetadata

from ..parts.known_encoders import grid_of
from .media import image_form
from .video import SAMPLING, check_frame_count, joined_videos, opened_video, ready_frames, sampled_frames


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
        videos.append(_processed(processor, ready, where, metadata, options | {"input_data_format": form.wanted}))
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


def _processed(
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
        output = processor(videos=[video], return_tensors="pt", **told, **options)
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
