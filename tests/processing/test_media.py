"""Items as users hand them over: order, files of every form on one road, images, sounds."""

import base64
import contextlib
import functools
import io
import os
import tempfile
import threading
import urllib.parse
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import tiny
import torch
from PIL import EpsImagePlugin, Image
from transformers.image_utils import load_image

from cornstarch_hf import limits
from cornstarch_hf.processing import sounds
from cornstarch_hf.processing.media import FIRST, LAST, PLAIN_MODES, ImageForm, flatten, ready_image
from cornstarch_hf.processing.opening import opened
from cornstarch_hf.processing.sounds import check_sampling_rate, check_sound, fewest_samples, ready_audio
from cornstarch_hf.processing.video import ready_video

RGB, GREY = ImageForm(3), ImageForm(1)
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
        found = ready_image(form, "vision, item 0", RGB)
        assert found.mode == "RGB" and found.tobytes() == image.tobytes()
    assert ready_image(image, "vision", GREY).mode == "L"
    assert ready_image(np.asarray(image)[..., :1], "vision", RGB).mode == "RGB"
    assert ready_image(image.convert("CMYK"), "vision", ImageForm(4)).mode == "CMYK"
    floats = np.zeros((5, 6, 3), np.float32)
    assert ready_image(floats, "vision", ImageForm(3, rescaled=True)) is floats


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
        ready_image(item, "vision, item 2", RGB)


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
        (np.zeros(0), 16_000, ValueError, r"shape \(0,\): give the samples"),
        (np.zeros(8, np.int16), 16_000, ValueError, "int16 values"),
        ([1, 2, 3], 16_000, ValueError, "int64 values"),
        (np.array([0.0, np.inf]), 16_000, ValueError, "not finite"),
        (3.5, 16_000, TypeError, "expected a waveform .*got float"),
        (np.array(0.5), 16_000, ValueError, r"shape \(\): give the samples"),
        (torch.tensor(0.5), 16_000, ValueError, r"shape \(\)"),
        (
            {"array": [[0.5], [0.5, 0.5]], "sampling_rate": 16_000},
            None,
            ValueError,
            "the waveform cannot be decoded from .*inhomogeneous",
        ),
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
    assert ready_image(rows, "vision", RGB).tobytes() == tiny.image().tobytes()
    with pytest.raises(ValueError, match="vision, item 0: the image has int64 values"):
        ready_image([[[256, 0, 0]]], "vision, item 0", RGB)
    with pytest.raises(ValueError, match="vision, item 0: the rows of the image differ in length"):
        ready_image([[[1, 0, 0]], [[1, 0]]], "vision, item 0", RGB)


def test_images_that_cannot_be_decoded(tmp_path):
    raw = io.BytesIO()
    tiny.image(size=(64, 64)).save(raw, "png")
    (tmp_path / "cut.png").write_bytes(raw.getvalue()[:300])
    for form in (b"no image", tmp_path / "cut.png", Image.open(tmp_path / "cut.png"), str(tmp_path / "gone.png")):
        with pytest.raises(ValueError, match="vision, item 3: the image cannot be decoded from .*Error: ") as caught:
            ready_image(form, "vision, item 3", RGB)
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


# ---- formats: of pictures and sounds that are decoded in this process

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n"
DOS_EPS = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(EPS).to_bytes(4, "little") + bytes(18) + EPS
SPELT = {"jpg": "JPEG", "jp2": "JPEG2000", "tif": "TIFF"}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A file that tells which other programs were started, of those that decoders know."""
    told, folder = tmp_path / "started", tmp_path / "bin"
    told.write_text("")
    folder.mkdir()
    for name in ("gs", "gswin64c", "gswin32c", "djpeg", "cjpeg", "ffmpeg", "avconv", "madplay", "sox"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {told}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # What Pillow has found out about Ghostscript, it keeps.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return told


@pytest.mark.parametrize("content", [EPS, DOS_EPS])
def test_no_picture_starts_another_program(programs, served, content):
    path = served[0] / "x.png"  # whatever its name says
    path.write_bytes(content)
    given = forms(path, served[1])
    for name, form in {**given, "lazy": Image.open(path)}.items():
        with pytest.raises(ValueError, match="vision, item 0: .*none of (?=.*JPEG)(?=.*PNG).*limits.IMAGE_FORMATS"):
            ready_image(form, "vision, item 0", RGB)
            raise AssertionError(name)
        with pytest.raises(ValueError, match="film, item 0, frame 0: .*none of "):
            ready_video([form], "film, item 0", RGB)
    assert programs.read_text() == "", "nothing was started"


@pytest.mark.parametrize(
    "suffix",
    ["png", "jpg", "webp", "gif", "bmp", "tif", "ico", "ppm", "jp2", "tga", "dds", "pcx", "sgi", "avif", "icns", "qoi"],
)
def test_common_formats_are_decoded(suffix):
    name, raw, picture = SPELT.get(suffix, suffix.upper()), io.BytesIO(), tiny.image(size=(64, 64))
    if name not in Image.SAVE and Image.init() and name not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {name}")
    picture.save(raw, name)
    expected = Image.open(io.BytesIO(raw.getvalue())).convert("RGB")
    assert ready_image(raw.getvalue(), "vision, item 0", RGB).tobytes() == expected.tobytes()


def test_a_format_that_the_user_adds_is_decoded(monkeypatch):
    raw = io.BytesIO()
    tiny.image().save(raw, "IM")
    with pytest.raises(ValueError, match="none of .*limits.IMAGE_FORMATS"):
        ready_image(raw.getvalue(), "vision, item 0", RGB)
    monkeypatch.setattr(limits, "IMAGE_FORMATS", [*limits.IMAGE_FORMATS, "im", "HEIF"])  # HEIF: of no plugin here
    assert ready_image(raw.getvalue(), "vision, item 0", RGB).size == tiny.image().size


def test_several_pictures_in_one_jpeg():
    raw = io.BytesIO()
    tiny.image().save(raw, "MPO", save_all=True, append_images=[tiny.image(1)])
    assert Image.open(raw).format == "MPO"
    for form in (raw.getvalue(), Image.open(raw)):
        assert ready_image(form, "vision, item 0", RGB).size == tiny.image().size


SOUNDS = {
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "list": b"ffconcat version 1.0\nfile /etc/passwd\n", "text": b"v=0\n",
    "broken": b"fLaC" + bytes(60),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUNDS)
def test_no_sound_starts_another_program(programs, served, name):
    path = served[0] / f"{name}.wav"
    path.write_bytes(SOUNDS[name])
    for form in forms(path, served[1]).values():
        if isinstance(form, dict) and "image" in form:
            form = {"audio": form["image"]}
        with pytest.raises(ValueError, match="audio, item 0: the sound cannot be decoded"):
            ready_audio(form, "audio, item 0", 16_000, None)
    assert programs.read_text() == "", "nothing was started"


def test_a_sound_that_breaks_off_behind_its_header_starts_no_program(programs, tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 80_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    for form in (path, path.read_bytes()):
        with contextlib.suppress(ValueError):
            ready_audio(form, "audio, item 0", 16_000, None)
    assert programs.read_text() == ""


# ---- one road


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and its address."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def forms(path, address):
    """A file as everything that a user may hand over for it."""
    raw = path.read_bytes()
    text = base64.b64encode(raw).decode()
    handle = io.BytesIO(raw)
    handle.seek(7)  # reading begins at the start wherever it stands
    return {
        "path": str(path), "path object": path, "file address": path.as_uri(), "FILE": f"FILE://localhost{path.as_posix()}",
        "http": f"{address}/{path.name}", "base64": text, "lines of base64": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "data": f"data:image/x;base64,{text}", "escaped base64": f"data:;base64,{urllib.parse.quote(text, safe='')}",
        "escaped bytes": f"data:image/x,{urllib.parse.quote_from_bytes(raw)}", "bytes": raw, "bytearray": bytearray(raw),
        "memoryview": memoryview(raw), "undecoded column": {"bytes": raw, "path": "gone"}, "column of paths": {"bytes": None, "path": str(path)},
        "open file": handle, "dict": {"image": raw}, "url in a dict": {"url": path.as_uri()},
    }  # fmt: skip


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_picture_is_turned_alike_on_every_road(served, orientation):
    path, picture = served[0] / f"{orientation}.jpg", tiny.image(0, (16, 24))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, "JPEG", exif=exif)
    expected = load_image(str(path))
    assert expected.size == ((16, 24) if orientation > 4 else (24, 16))
    given = forms(path, served[1])
    for name, form in {**given, "PIL": Image.open(path)}.items():
        found = ready_image(form, "vision, item 0", RGB)
        assert (found.mode, found.size, found.tobytes()) == ("RGB", expected.size, expected.tobytes()), name
    assert given["open file"].tell() == 7, "what is given is left as it was"
    kept = Image.open(path)
    ready_image(kept, "vision, item 0", RGB)
    assert kept.getexif()[0x0112] == orientation and kept.size == (24, 16)


def palette(transparent):
    found = tiny.image().convert("P")
    found.info |= {"transparency": 3} if transparent else {}
    return found


SAVED = {
    "grey": ("png", tiny.image().convert("L")), "grey and alpha": ("png", tiny.image().convert("LA")), "bits": ("png", tiny.image().convert("1")),
    "alpha": ("png", Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 4), np.uint8), "RGBA")),
    "palette": ("png", palette(False)), "transparent palette": ("gif", palette(True)), "CMYK": ("jpeg", tiny.image().convert("CMYK")),
}  # fmt: skip
DEEP = {
    "16 bits": ("png", Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500), "I;16"),
    "16 bits of TIFF": ("tiff", Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500), "I;16"),
    "32 bits": ("tiff", Image.fromarray(np.arange(120, dtype=np.int32).reshape(12, 10)), "I"),
    "floats": ("tiff", Image.fromarray(np.ones((12, 10), np.float32)), "F"),
}


@pytest.mark.parametrize("mode", SAVED)
def test_pictures_of_any_plain_mode_are_what_transformers_loads(served, mode):
    extension, picture = SAVED[mode]
    path = served[0] / f"{mode}.{extension}"
    picture.save(path)
    expected = load_image(str(path))
    for name, form in {**forms(path, served[1]), "PIL": Image.open(path)}.items():
        found = ready_image(form, "vision, item 0", RGB)
        assert (found.mode, found.tobytes()) == ("RGB", expected.tobytes()), name


@pytest.mark.parametrize("mode", DEEP)
def test_pictures_of_deeper_modes_are_refused_on_every_road(served, mode):
    extension, picture, pillows = DEEP[mode]
    path = served[0] / f"{mode}.{extension}"
    picture.save(path)
    for name, form in {**forms(path, served[1]), "PIL": picture}.items():
        with pytest.raises(
            ValueError, match=f"vision, item 4: the image has mode '{pillows}', expected one of"
        ) as caught:
            ready_image(form, "vision, item 4", RGB)
        assert "Scale it to 0..255" in str(caught.value), name


@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("form", [RGB, GREY], ids=["RGB", "L"])
def test_every_plain_mode_is_converted(mode, form):
    assert ready_image(Image.new(mode, (4, 5)), "vision", form).mode == {3: "RGB", 1: "L"}[form.channels]


@pytest.mark.parametrize("item", ["gone.png", "file:///gone.png", "file://elsewhere/x.png", "data:image/png;base64,", "ftp://x/y.png", io.StringIO("text")])  # fmt: skip
def test_what_is_no_file_is_named(item):
    for kind, ready in (("image", functools.partial(ready_image, form=RGB)), ("sound", functools.partial(ready_audio, expected=16_000, given=None))):  # fmt: skip
        with pytest.raises(ValueError, match=rf"m, item 2: the {kind} cannot be decoded from .*: "):
            ready(item, "m, item 2")


def test_a_sound_is_the_same_on_every_road(served):
    path = served[0] / "sound.wav"
    soundfile.write(path, WAVE, 16_000, subtype="FLOAT")
    for name, form in forms(path, served[1]).items():
        if name not in ("dict", "url in a dict"):
            assert np.array_equal(ready_audio(form, "audio", 16_000, None), WAVE), name


# ---- where the channels are


def picture_of(shape, kind):
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    return {"uint8": values, "tensor": torch.tensor(values), "float": values / np.float32(255), "float tensor": torch.tensor(values / np.float32(255))}[kind]  # fmt: skip


@pytest.mark.parametrize("wanted", [FIRST, LAST])
@pytest.mark.parametrize("kind", ["uint8", "tensor", "float", "float tensor"])
@pytest.mark.parametrize(("stated", "shape"), [(FIRST, (3, 50, 3)), (LAST, (3, 50, 3)), (FIRST, (1, 4, 3)), (LAST, (4, 4, 1)), (None, (3, 5, 6)), (None, (5, 6, 3)), (None, (5, 6))])  # fmt: skip
def test_the_stated_layout_of_an_array_is_obeyed(stated, shape, kind, wanted):
    image = picture_of(shape, kind)
    first = stated == FIRST or (stated is None and shape[0] == 3)
    last = np.asarray(image).transpose(1, 2, 0) if first else np.asarray(image)
    last = last[..., None] if last.ndim == 2 else last  # (height, width, channels)
    found = ready_image(image, "vision", ImageForm(3, True, stated, wanted))
    if "float" in kind:
        assert type(found) is type(image)
        assert np.array_equal(np.asarray(found), last if wanted == LAST else last.transpose(2, 0, 1))
    else:
        expected = Image.fromarray(last.squeeze(-1) if last.shape[-1] == 1 else last).convert("RGB")
        assert found.size == expected.size and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["uint8", "tensor", "float", "float tensor"])
@pytest.mark.parametrize(
    ("stated", "shape", "message"),
    [
        (None, (3, 50, 3), r"either end of the shape \(3, 50, 3\) may be the image's channels: .*input_data_format"),
        (None, (1, 50, 4), "either end of the shape"),
        (None, (4, 50, 1), "either end of the shape"),
        (FIRST, (50, 40, 3), "input_data_format='channels_first' says otherwise"),
        (LAST, (3, 40, 50), "input_data_format='channels_last' says otherwise"),
        (None, (5, 6, 2), r"1, 3 or 4 channels, its shape is \(5, 6, 2\)"),
    ],
)
def test_an_ambiguous_or_wrong_layout_is_refused(stated, shape, message, kind):
    with pytest.raises(ValueError, match=f"vision, item 1: .*{message}"):
        ready_image(picture_of(shape, kind), "vision, item 1", ImageForm(3, True, stated))


def test_a_list_of_rows_and_frames_of_files_follow_the_same_rules(tmp_path):
    with pytest.raises(ValueError, match="vision: either end of the shape"):
        ready_image(np.zeros((1, 5, 3), int).tolist(), "vision", RGB)
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="vision: the image has values that are not finite"):
            ready_image(np.full((5, 6, 3), value), "vision", ImageForm(3, rescaled=True))


# ---- sounds


@pytest.mark.parametrize("order", ["gradio", "soundfile"])
@pytest.mark.parametrize("wrap", [np.asarray, torch.tensor, list])
def test_a_sound_with_its_rate_is_one_item(order, wrap):
    pair = (16_000, wrap(WAVE)) if order == "gradio" else (wrap(WAVE), 16_000)
    assert flatten(pair, "audio") == ([pair], None) and flatten([[pair, pair], [pair]], "audio")[1] == [2, 1]
    assert np.array_equal(ready_audio(pair, "audio", 16_000, None), WAVE)
    with pytest.raises(ValueError, match="audio, item 0: the sampling rate is 16000 Hz, the encoder expects 8000"):
        ready_audio(pair, "audio, item 0", 8_000, 8_000)
    with pytest.raises(ValueError, match="int16 values, expected floats .*divide it by 32768"):
        ready_audio((16_000, (WAVE * 32_767).astype(np.int16)), "audio", 16_000, None)  # what gradio's microphone gives


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("peak", [11.0, -11.0, 32_767.0, np.inf, -np.inf, np.nan])
def test_waveforms_of_another_range_are_refused(kind, peak):
    wave = np.append(WAVE, kind(peak)).astype(kind)
    message = r"up to \d+.*expected floats in \[-1, 1\]" if np.isfinite(wave).all() else "not finite"
    with pytest.raises(ValueError, match=f"audio, item 1: the waveform has values .*{message}"):
        ready_audio(wave, "audio, item 1", 16_000, 16_000)
    assert ready_audio(WAVE * 9.9, "audio", 16_000, 16_000).max() > 9.8  # mixes and decoders go beyond 1


def test_huge_values_and_rates_beside_the_expected_one_are_refused():
    with pytest.raises(ValueError, match="values up to 1e"):
        ready_audio(np.array([1e300, 0.0]), "audio", 16_000, 16_000)  # whose float32 would be infinite
    with pytest.raises(ValueError, match="16000.5 Hz"):
        ready_audio(WAVE, "audio", 16_000, 16_000.5)


@pytest.mark.parametrize(("least", "most", "fewest"), [(1, 9, 1), (2, 9, 2), (400, 1000, 400), (513, 1024, 513), (513, 1000, None)])  # fmt: skip
def test_the_fewest_samples_that_give_a_feature(least, most, fewest):
    asked = []
    assert fewest_samples(lambda n: asked.append(n) or n // least, most) == fewest
    assert len(asked) <= 22


class Raw(io.RawIOBase):
    """A file that gives less than was asked for."""

    def __init__(self, content):
        self.rest = content

    def read(self, size=-1):
        piece, self.rest = self.rest[: min(size, 1000)], self.rest[min(size, 1000) :]
        return piece


def test_raw_files_are_read_to_their_end():
    content = bytes(range(256)) * 40
    assert opened(Raw(content), "image, item 0") == content


@pytest.mark.parametrize("address", ["http://[::1", "http://127.0.0.1:99999/x.png"])
def test_addresses_that_are_none_name_the_item(address):
    with pytest.raises(ValueError, match="vision, item 0: the image cannot be decoded"):
        ready_image(address, "vision, item 0", ImageForm(3))


def test_sounds_count_channels_and_what_resampling_makes():
    check_sound(50_000_000, 2, 48_000, 16_000, "x")
    with pytest.raises(ValueError, match="150,000,000"):
        check_sound(50_000_000, 3, 48_000, 16_000, "x")
    with pytest.raises(ValueError, match="resampled from 8000 to 32000 Hz, has samples 160,000,000"):
        check_sound(40_000_000, 1, 8_000, 32_000, "x")
