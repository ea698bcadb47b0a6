"""Items as users hand them over: order, images, sounds, and processors' outputs divided among them."""

import io
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
import torch
from PIL import Image

from cornstarch_hf.processing import sounds
from cornstarch_hf.processing.media import flatten, ready_image
from cornstarch_hf.processing.sounds import check_sampling_rate, ready_audio

WAVE = np.linspace(-1, 1, 8, dtype=np.float32)


@pytest.mark.parametrize(
    ("items", "kind", "expected"),
    [
        ("a", "image", (["a"], None)),
        (["a", "b"], "image", (["a", "b"], None)),
        ([["a", "b"], [], ["c"]], "image", (["a", "b", "c"], [2, 0, 1])),
        ([["a"], None, "b"], "image", (["a", "b"], [1, 0, 1])),
        ([None, None], "image", ([], [0, 0])),
        ([0.1, 0.2], "audio", ([[0.1, 0.2]], None)),
        ([[0.1, 0.2], [0.3]], "audio", ([[0.1, 0.2], [0.3]], None)),
        ([[[0.1, 0.2]], []], "audio", ([[0.1, 0.2]], [1, 0])),
        (list(WAVE[:2]), "audio", ([[-1.0, WAVE[1]]], None)),
        ({"array": [1.0]}, "audio", ([{"array": [1.0]}], None)),
        ([], "image", ([], None)),
    ],
)
def test_items_in_order_and_how_many_each_sample_has(items, kind, expected):
    assert flatten(items, kind) == expected


def test_an_image_in_any_wrapping_is_the_same(tmp_path):
    image, raw = tiny.image(), io.BytesIO()
    image.save(raw, "png")
    (tmp_path / "x.png").write_bytes(raw.getvalue())
    forms = [image, raw.getvalue(), tmp_path / "x.png", str(tmp_path / "x.png"), np.asarray(image)]
    forms += [torch.tensor(np.asarray(image)).permute(2, 0, 1), {"bytes": raw.getvalue(), "path": "not here.png"}]
    forms += [{"image": image}, {"url": str(tmp_path / "x.png")}, image.convert("RGBA")]
    for form in forms:
        found = ready_image(form, "vision, item 0", 3, False)
        assert found.mode == "RGB" and found.tobytes() == image.tobytes()
    assert ready_image(image, "vision", 1, False).mode == "L"
    assert ready_image(np.asarray(image)[..., :1], "vision", 3, False).mode == "RGB"
    assert ready_image(image.convert("CMYK"), "vision", 4, False).mode == "CMYK"
    floats = np.zeros((4, 4, 3), np.float32)
    assert ready_image(floats, "vision", 3, rescaled=True) is floats


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (Image.new("RGB", (0, 3)), ValueError, r"vision, item 2: the image is empty \(.* = 0 x 3\)"),
        (Image.new("I;16", (4, 4)), ValueError, "mode 'I;16'"),
        (np.zeros((2, 2, 2, 3), np.uint8), ValueError, r"expected one image, got 2 in one array.*kind='video'"),
        (np.zeros(3, np.uint8), ValueError, r"no image, its shape is \(3,\)"),
        (np.zeros((5, 6, 2), np.uint8), ValueError, r"1, 3 or 4 channels, its shape is \(5, 6, 2\)"),
        (np.zeros((4, 4), np.int64), ValueError, "int64 values, expected uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), ValueError, "bfloat16 values.*do_rescale"),
        (None, TypeError, "expected an image .*got NoneType"),
        ({"caption": "x"}, TypeError, "expected an image .*got dict"),
    ],
)
def test_images_that_a_processor_would_spoil(item, error, message):
    with pytest.raises(error, match=message):
        ready_image(item, "vision, item 2", 3, False)


def test_a_waveform_in_any_wrapping_is_the_same():
    forms = [WAVE, WAVE[None], WAVE[:, None], WAVE.tolist(), torch.tensor(WAVE), WAVE.astype(np.float64)]
    for form in [*forms, torch.tensor(WAVE, requires_grad=True), {"array": WAVE, "sampling_rate": 16_000}]:
        found = ready_audio(form, "audio", 16_000, 16_000)
        assert found.dtype == np.float32 and np.array_equal(found, WAVE)
    assert np.array_equal(ready_audio({"array": WAVE, "sampling_rate": 8}, "audio", 8, 16_000), WAVE)
    check_sampling_rate("audio", None, None)


@pytest.mark.parametrize(
    ("item", "rate", "error", "message"),
    [
        (WAVE, None, ValueError, "pass sampling_rate= .*expects 16000"),
        (WAVE, 8_000, ValueError, "is 8000 Hz, the encoder expects 16000 Hz"),
        ({"array": WAVE, "sampling_rate": 44_100}, 16_000, ValueError, "is 44100 Hz"),
        (np.zeros((2, 8)), 16_000, ValueError, r"shape \(2, 8\): mix the channels"),
        (np.zeros(0), 16_000, ValueError, r"shape \(0,\)"),
        (np.zeros(8, np.int16), 16_000, ValueError, "int16 values"),
        ([1, 2, 3], 16_000, ValueError, "int64 values"),
        (np.array([0.0, np.inf]), 16_000, ValueError, "not finite"),
        (3.5, 16_000, TypeError, "expected a waveform .*got float"),
    ],
)
def test_sounds_that_a_processor_would_spoil(item, rate, error, message):
    with pytest.raises(error, match=f"audio, item 1: .*{message}"):
        ready_audio(item, "audio, item 1", 16_000, rate)


class Decoder:
    """What `datasets.Audio` gives with torchcodec: decodes when it is asked."""

    def __init__(self, data, sample_rate):
        self.samples = SimpleNamespace(data=data, sample_rate=sample_rate)

    def get_all_samples(self):
        if self.samples.sample_rate == 0:
            raise RuntimeError("corrupt stream")
        return self.samples


def test_files_bytes_and_decoders_give_the_same_sound(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    soundfile.write(path, WAVE, 16_000, subtype="FLOAT")
    forms = [path, str(path), path.read_bytes(), {"bytes": path.read_bytes(), "path": None, "sampling_rate": None}]
    forms += [{"path": str(path), "bytes": None}, Decoder(torch.tensor(WAVE)[None], 16_000)]
    for form in forms:
        assert np.array_equal(ready_audio(form, "audio", 16_000, None), WAVE)
    stereo = np.stack([WAVE, -WAVE], axis=1)
    soundfile.write(path, np.repeat(stereo, 100, axis=0), 8_000, subtype="FLOAT")
    found = [ready_audio(form, "audio", 16_000, None) for form in (path, path.read_bytes())]
    assert np.array_equal(*found) and found[0].shape == (1600,) and not found[0].any(), "mixed and resampled alike"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    for form, cause in ((b"no sound", "from 8 bytes: "), ("gone.wav", "from 'gone.wav': "), (Decoder(None, 0), "RuntimeError: corrupt stream")):  # fmt: skip
        with pytest.raises(ValueError, match=f"audio, item 1: the sound cannot be decoded .*{cause}") as caught:
            ready_audio(form, "audio, item 1", 16_000, None)
        assert caught.value.__cause__ is not None
    assert set(tmp_path.iterdir()) == before, "no temporary file stays"


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (Decoder(torch.zeros(1, 8), 48_000), "48000 Hz, the encoder expects 16000 Hz.*cast_column.*16000"),
        (Decoder(torch.zeros(2, 8), 16_000), r"shape \(2, 8\): mix the channels.*num_channels=1"),
    ],
)
def test_decoders_are_neither_resampled_nor_mixed(decoder, message):
    with pytest.raises(ValueError, match=f"audio, item 0: .*{message}"):
        ready_audio(decoder, "audio, item 0", 16_000, None)


def test_an_image_as_a_table_lists_it():
    rows = np.asarray(tiny.image()).tolist()
    assert flatten(rows, "image") == ([rows], None) and flatten([[rows, rows], [rows]], "image")[1] == [2, 1]
    assert ready_image(rows, "vision", 3, False).tobytes() == tiny.image().tobytes()
    with pytest.raises(ValueError, match="vision, item 0: the image has int64 values"):
        ready_image([[[256, 0, 0]]], "vision, item 0", 3, False)
    with pytest.raises(ValueError, match="vision, item 0: the rows of the image differ in length"):
        ready_image([[[1, 0, 0]], [[1, 0]]], "vision, item 0", 3, False)


def test_images_that_cannot_be_decoded(tmp_path):
    raw = io.BytesIO()
    tiny.image(size=(64, 64)).save(raw, "png")
    (tmp_path / "cut.png").write_bytes(raw.getvalue()[:300])
    for form in (b"no image", tmp_path / "cut.png", Image.open(tmp_path / "cut.png"), str(tmp_path / "gone.png")):
        with pytest.raises(ValueError, match="vision, item 3: the image cannot be decoded from .*Error: ") as caught:
            ready_image(form, "vision, item 3", 3, False)
        assert isinstance(caught.value.__cause__, (OSError, ValueError))


@pytest.mark.parametrize(
    "form", [lambda path: path, str, lambda path: path.read_bytes(), lambda path: {"path": str(path)}]
)
def test_without_a_decoder_of_sounds_this_packages_extra_is_named(tmp_path, monkeypatch, form):
    path = tmp_path / "x.wav"
    soundfile.write(path, WAVE, 16_000)

    def load_audio(source, sampling_rate):
        raise ImportError("load_audio requires soundfile and soxr: `pip install transformers[audio]`")

    monkeypatch.setattr(sounds, "load_audio", load_audio)
    with pytest.raises(ImportError, match=r"audio, item 0: .*extra 'audio'.* pip install \"./cornstarch_hf\[audio\]\""):
        ready_audio(form(path), "audio, item 0", 16_000, None)
