"""Sounds as users hand them over, made ready for a feature extractor: files are mixed to one channel and resampled.

What `media` is for images; `refuse_short` finds the shortest sound that an encoder takes.
"""

import base64
import contextlib
import inspect
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import audio_utils
from transformers.audio_utils import get_audio_filetype, load_audio
from transformers.utils import is_soundfile_available

from ..limits import check
from .media import held, is_file, rated
from .opening import decoded, opened
from .placeholder_text import check_values

# Decoded files and mixes go a little beyond 1; integers written as floats far beyond.
LOUDEST = 10.0


_MIX = "mix the channels, in a table by cast_column(..., Audio(num_channels=1))."


def check_sound(frames: int, channels: int, rate: float | None, wanted: float | None, where: str) -> None:
    """Refuse a sound of more than `MAX_AUDIO_SAMPLES`, stored or resampled from `rate` to `wanted` Hz (ValueError)."""
    check(int(frames) * int(channels), "MAX_AUDIO_SAMPLES", f"{where}: the sound ({channels} channels) has samples")
    if rate and wanted:
        resampled = int(frames * wanted / rate)
        check(resampled, "MAX_AUDIO_SAMPLES", f"{where}: the sound, resampled from {rate} to {wanted} Hz, has samples")


def ready_audio(item: Any, where: str, expected: int | None, given: int | None) -> np.ndarray:
    """A mono waveform as float32 ``(samples,)``; refuses what a feature extractor would misread.

    Args:
        item: array, tensor or list of floats; a file in any form (mixed and resampled on loading); dict with `array` and
            `sampling_rate`, or with `bytes` or `path`; an array with its rate, in either order, as gradio, soundfile and
            torchaudio give it; a decoder as `datasets.Audio` gives it.
        where: modality and item, for messages.
        expected, given: the sampling rates of the feature extractor, and of bare arrays as the caller says, in Hz.
    """
    if (pair := rated(item)) is not None:
        given, item = pair
    if isinstance(item, Mapping):
        given = held(item, ("sampling_rate",), otherwise=given)
        item = held(item, ("array", "audio", "raw", "bytes", "path", "url", "base64"))
    if is_file(item):
        # Decoding resamples, so the sound comes out at the expected rate.
        item, given = decoded(lambda x: _load_sound(x, expected or 16_000, where), item, where, "sound"), expected
    elif hasattr(item, "get_all_samples"):
        # Too long a sound is refused by what its file's header says, before it is decoded.
        header = getattr(item, "metadata", None)
        seconds, rate = getattr(header, "duration_seconds", None), getattr(header, "sample_rate", None)
        if seconds is not None and rate:
            claimed = int(min(seconds * rate, 2**62))  # a header may claim an endless sound, which is no integer
            check_sound(claimed, getattr(header, "num_channels", None) or 1, rate, expected, where)
        samples = decoded(lambda x: x.get_all_samples(), item, where, "sound")
        item, given = samples.data, int(samples.sample_rate)
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu().float().numpy() if item.is_floating_point() else item.cpu().numpy()
    if not isinstance(item, (np.ndarray, list, tuple)):
        raise TypeError(f"{where}: expected a waveform (array, tensor, path or URL), got {type(item).__name__}.")
    check_sound(getattr(item, "size", 0) or len(item), 1, None, None, where)  # before a long list becomes an array
    wave = decoded(np.asarray, item, where, "waveform")
    check_sound(wave.size, 1, None, None, where)  # with all channels
    if wave.ndim == 2 and 1 in wave.shape:
        wave = wave.reshape(-1)  # (1, samples) or (samples, 1): one channel
    if wave.ndim != 1 or wave.size == 0:
        remedy = _MIX if wave.ndim > 1 else "give the samples of a sound."
        raise ValueError(f"{where}: expected one mono waveform (samples,), got the shape {wave.shape}: {remedy}")
    if not np.issubdtype(wave.dtype, np.floating):
        by = np.iinfo(wave.dtype).max + 1 if wave.dtype.kind == "i" else "its range"
        expected_values = f"floats in [-1, 1]: divide it by {by}"
        raise ValueError(f"{where}: the waveform has {wave.dtype} values, expected {expected_values}.")
    if not np.isfinite(wave).all():
        raise ValueError(f"{where}: the waveform has values that are not finite.")
    if (peak := float(np.abs(wave).max())) > LOUDEST:
        remedy = "divide it by its range, 32768 where it was made of 16-bit integers."
        raise ValueError(f"{where}: the waveform has values up to {peak:g}, expected floats in [-1, 1]: {remedy}")
    check_sampling_rate(where, expected, given)
    return wave.astype(np.float32, copy=False)


def _load_sound(item: Any, rate: int, where: str) -> np.ndarray:
    source = opened(item, where)
    if not _has_header(source, rate, where):
        # Another backend may read it, by what it is: lists of files and the like would send FFmpeg elsewhere.
        get_audio_filetype(source if isinstance(source, bytes) else _head(source))
    # librosa, of transformers 5.20, hands a file that soundfile fails on to other programs, but no bytes.
    if isinstance(source, str) and hasattr(audio_utils, "librosa"):
        with open(source, "rb") as file:
            source = file.read()
    try:
        return load_audio(source if isinstance(source, str) else base64.b64encode(source).decode(), sampling_rate=rate)
    except ImportError as error:  # transformers names its own extra, which knows nothing of this package's versions
        raise ImportError(
            f"{where}: sound files are decoded by soundfile and soxr, this package's extra 'audio', which is not installed: "
            'pip install "./cornstarch_hf[audio]" (a clone of it), or soundfile and soxr; with transformers 5.20 also librosa.'
        ) from error


def _has_header(source: str | bytes, rate: int, where: str) -> bool:
    """Whether soundfile knows the header of a sound, which is refused by it if it is too long (ValueError)."""
    header = None
    if is_soundfile_available():
        import soundfile

        with contextlib.suppress(soundfile.LibsndfileError):
            header = soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else source)
            check_sound(header.frames, header.channels, header.samplerate, rate, where)
    return header is not None


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(4096)


def check_sampling_rate(where: str, expected: int | None, given: int | None) -> None:
    """Refuse a bare array without, or with another, sampling rate (ValueError with both rates)."""
    if expected is None:
        return
    if given is None:
        raise ValueError(f"{where}: pass sampling_rate= (Hz) with bare audio arrays; the encoder expects {expected}.")
    if isinstance(given, str):
        raise TypeError(f"{where}: sampling_rate must be a number in Hz, got {given!r:.100}.")
    if given != expected:
        remedy = f"resample it first, in a table by cast_column(..., Audio(sampling_rate={expected}))."
        raise ValueError(f"{where}: the sampling rate is {given} Hz, the encoder expects {expected} Hz: {remedy}")


def check_padding_of_sounds(processor: Any, options: Mapping[str, Any], name: str) -> None:
    """Refuse a length, of the call or of the extractor, to which sounds would be filled up without end (ValueError)."""
    # Some fill up the sound's samples, and tell their window's; others rows of features.
    bins = getattr(processor, "num_mel_bins", None) or getattr(processor, "feature_size", None)
    row = bins if isinstance(bins, int) and getattr(processor, "n_samples", None) is None else 1
    lengths = {key: options.get(key) for key in ("max_length", "pad_to_multiple_of")}
    if lengths["max_length"] is None and options.get("padding", getattr(processor, "padding", None)) == "max_length":
        lengths["max_length"] = getattr(processor, "max_length", None)
    for key, length in lengths.items():
        if isinstance(length, int):
            told = f"{name}: ask for less: {key}={length:,} rows of {row} values, to which a sound is filled up, are"
            check(length * row, "MAX_AUDIO_SAMPLES", told)


def fewest_samples(features: Callable[[int], int], most: int) -> int | None:
    """The length of the shortest sound that gives a feature, None above `most`; `features` counts those of a length.

    >>> fewest_samples(lambda samples: (samples - 400) // 320 + 1 if samples >= 400 else 0, most=16_000)
    400
    """
    short, enough = 0, 1
    while not features(enough):
        short, enough = enough, 2 * enough
        if enough > most:
            return None
    while enough - short > 1:  # between the two it lies
        middle = (short + enough) // 2
        short, enough = (short, middle) if features(middle) else (middle, enough)
    return enough


def refuse_short(
    items: list[Any], name: str, expected: int | None, given: int | None, features: Callable[[int], int]
) -> None:
    """Refuse sounds shorter than the shortest that gives a feature, with both numbers (ValueError).

    Says nothing of sounds that cannot be read.  `expected` and `given` are rates as of `ready_audio`; `features` counts those
    of a sound of a length, ValueError where there are none.
    """
    if expected is None:
        return
    wheres = [f"{name}, item {i}" for i in range(len(items))]
    try:
        lengths = [len(ready_audio(item, where, expected, given)) for item, where in zip(items, wheres, strict=True)]
    except (ValueError, TypeError, TimeoutError):  # which its caller has met before
        return

    def counted(samples: int) -> int:
        try:
            return features(samples)
        except ValueError:
            return 0

    fewest = fewest_samples(counted, most=2 * expected) if min(lengths) < 2 * expected else None
    for where, length in zip(wheres, lengths, strict=True):
        if fewest is not None and length < fewest:
            told = f"the sound has {length} samples, and its encoder makes no feature of less than {fewest}"
            raise ValueError(f"{where}: {told}: pad it with silence, or leave it out.")


def audio_options(
    processor: Any, name: str, items: list, options: Mapping, masked: bool, rate: int | None
) -> dict[str, Any]:
    """Arguments of a feature extractor's call; ValueError for sounds that it would cut without being asked for truncation."""
    parameters = inspect.signature(processor.__call__).parameters
    cut = options.get("truncation")
    if not isinstance(cut, (bool, type(None))) and isinstance(
        parameters["truncation"].default, bool
    ):  # some have words for it
        raise ValueError(f"{name}: truncation must be True or False, got {cut!r:.100}.")
    same = ("max_length", "pad_to_multiple_of", "return_attention_mask")  # everywhere
    check_values({key: options[key] for key in same if key in options}, name)
    cuts = "truncation" in parameters and parameters["truncation"].default is True and "truncation" not in options
    check_padding_of_sounds(processor, options, name)
    # In samples: what the call or the extractor's window (30 seconds of Whisper) keeps.
    limit = options.get("max_length") or getattr(processor, "n_samples", None)
    for i, item in enumerate(items) if cuts and limit is not None else ():
        if len(item) > limit:
            told = f"the waveform has {len(item)} samples, but {type(processor).__name__} keeps {limit}"
            remedy = f"split it, or pass {name}_kwargs={{'truncation': True}} to drop the rest."
            raise ValueError(f"{name}, item {i}: {told}: {remedy}")
    found: dict[str, Any] = {} if rate is None else {"sampling_rate": rate}
    padded = "padding" in parameters and parameters["padding"].default != "max_length"
    if padded:  # sounds of different lengths go padded together, with the mask that tells where each ends
        found["padding"] = True
    masked = masked or getattr(
        processor, "return_attention_mask", False
    )  # also where it is set, and its call forgets it
    if "return_attention_mask" in parameters and (padded or masked):
        found["return_attention_mask"] = True
    return found


def run_extractor(
    processor: Any,
    name: str,
    items: list,
    options: dict[str, Any],
    rate: int | None,
    masked: bool,
    maskless: bool,
    calls: tuple[Callable, Callable],
) -> dict[str, torch.Tensor]:
    """The tensors that a feature extractor makes of sounds; `options` as of its call, `rate` its own, in Hz.

    `masked` and `maskless` as of `subprocessors.run_subprocessor`, whose `calls` run it on one sound, and refuse sounds of
    several sizes where no mask would tell the encoder where each ends.
    """
    call, refuse_uneven = calls
    options = dict(options)
    given = options.pop("sampling_rate", None)
    items = [ready_audio(x, f"{name}, item {i}", rate, given) for i, x in enumerate(items)]
    options = audio_options(processor, name, items, options, masked, rate) | options
    # In a batch some extractors of transformers take what follows a sound for sound, or round otherwise.
    alone = [call(processor, name, [item], options, first=i) for i, item in enumerate(items)]
    if maskless or options.get("padding") is False or not any(key.endswith("mask") for key in alone[0]):
        refuse_uneven(processor, name, [tuple(next(iter(one.values())).shape[1:]) for one in alone])
    return _together(alone, getattr(processor, "padding_value", 0.0))


def _together(alone: list[dict[str, torch.Tensor]], blank: float) -> dict[str, torch.Tensor]:
    """Tensors of sounds, each with a row of its own, filled up on the right to one size, masks with 0."""
    found = {}
    for key in alone[0]:
        rows = [one[key] for one in alone]
        size = [max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True)]
        # As `pad` wants it: (before, behind) of each axis, the last one first.
        behind = [
            [n for most, own in zip(size, row.shape[1:], strict=True) for n in (most - own, 0)][::-1] for row in rows
        ]
        value = 0 if key.endswith("mask") else blank
        found[key] = torch.cat([pad(row, around, value=value) for row, around in zip(rows, behind, strict=True)])
    return found
