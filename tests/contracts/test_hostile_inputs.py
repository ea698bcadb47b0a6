"""Inputs that attack who processes them: images, sounds, chat templates and typed placeholders, within caps that users can change."""

import base64
import io
import struct
import threading
import wave
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import tiny
import torch
from bounded import refusals
from helpers import compose_tiny
from PIL import Image

from cornstarch_hf import MultimodalProcessor, limits, register_feature_count
from cornstarch_hf.processing.template_sandbox import TemplateLimit, template_contents


def png(width, height):
    """A valid PNG of one colour: a few hundred bytes per megapixel, 8 bits of grey."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    line, data = bytes(width + 1), b""
    for _ in range(height):
        data += rows.compress(line)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data + rows.flush()) + chunk(b"IEND", b"")


def wav(frames, channels=1, rate=16_000):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, 2, rate, frames, "NONE", ""))
        out.writeframes(bytes(2 * frames * channels))
    return file.getvalue()


def flac_header(frames, rate=16_000):
    """The head of a FLAC file that claims so many frames, and holds none (https://www.rfc-editor.org/rfc/rfc9639, 8.2)."""
    bits = (rate << 44) | (0 << 41) | (15 << 36) | frames
    return b"fLaC\x80\x00\x00\x22" + struct.pack(">HH", 4096, 4096) + bytes(6) + bits.to_bytes(8, "big") + bytes(16)


def test_an_image_of_many_pixels_is_refused_from_its_header(pair, tmp_path):
    _, processor = pair
    data = png(12_000, 10_000)
    assert len(data) < 200_000
    (tmp_path / "bomb.png").write_bytes(data)
    match = "vision, item 0: the image of 12000 x 10000 pixels has 120,000,000, more than cornstarch_hf.limits.MAX_IMAGE_PIXELS = 64,000,000"
    lazy = Image.open(io.BytesIO(data))
    encoded = "data:image/png;base64," + base64.b64encode(data).decode()
    for item in (data, tmp_path / "bomb.png", str(tmp_path / "bomb.png"), lazy, {"bytes": data}, encoded):
        with pytest.raises(ValueError, match=match):
            processor(text="<image>", images=item)
    message = [{"role": "user", "content": [{"type": "image", "image": data}]}]
    with pytest.raises(ValueError, match=match):
        processor.apply_chat_template(message, tokenize=True, return_dict=True)


def test_an_image_beyond_what_pillow_opens_names_the_cap_too(pair):
    _, processor = pair
    head = png(1, 1)
    size = struct.pack(">II", 60_000, 60_000)
    kind = b"IHDR" + size + head[24:29]
    data = head[:12] + kind + struct.pack(">I", zlib.crc32(kind)) + head[33:]
    with pytest.raises(ValueError, match="more pixels than Pillow decodes .*cornstarch_hf.limits.MAX_IMAGE_PIXELS"):
        processor(text="<image>", images=data)
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3


def test_an_image_as_an_array_and_a_cap_that_a_user_sets(pair, monkeypatch):
    _, processor = pair
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 99)
    for item in (np.zeros((10, 10, 3), np.uint8), tiny.image(size=(10, 10)), torch.zeros(3, 10, 10, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS = 99"):
            processor(text="<image>", images=item)
    monkeypatch.setattr(limits, "MAX_IMAGE_PIXELS", 100)
    processor(text="<image>", images=np.zeros((10, 10, 3), np.uint8))


@pytest.mark.parametrize("frames", [2**36 - 1, 0])
def test_a_sound_that_claims_to_be_endless(pair, frames):
    _, processor = pair
    with pytest.raises(
        ValueError, match="audio, item 0: the sound .* more than cornstarch_hf.limits.MAX_AUDIO_SAMPLES = 100,000,000"
    ):
        processor(text="<audio>", audio=flac_header(frames))


def test_sounds_above_the_cap_in_every_form(pair, monkeypatch, tmp_path):
    _, processor = pair
    monkeypatch.setattr(limits, "MAX_AUDIO_SAMPLES", 1000)
    (tmp_path / "long.wav").write_bytes(wav(600, 2))
    array = np.zeros(1001, np.float32)
    for item in (
        wav(1001),
        tmp_path / "long.wav",
        {"path": str(tmp_path / "long.wav")},
        base64.b64encode(wav(1001)).decode(),
        array,
        array.tolist(),
        torch.zeros(1001),
        {"array": array, "sampling_rate": 16_000},
    ):
        with pytest.raises(ValueError, match="audio, item 0: the sound .*MAX_AUDIO_SAMPLES = 1,000"):
            processor(text="<audio>", audio=[item], sampling_rate=16_000)


def test_a_sound_of_a_rate_that_resampling_makes_long(pair):
    _, processor = pair
    with pytest.raises(ValueError, match="resampled from 1 to 16000 Hz, has samples 160,000,000"):
        processor(text="<audio>", audio=wav(10_000, rate=1))


def test_a_decoder_is_asked_for_its_header_before_it_decodes(pair):
    _, processor = pair

    class Header:
        duration_seconds, sample_rate, num_channels = float("inf"), 48_000, 2

    class Decoder:
        metadata = Header()

        def get_all_samples(self):
            raise AssertionError("decoded")

    with pytest.raises(ValueError, match="MAX_AUDIO_SAMPLES"):
        processor(text="<audio>", audio=[Decoder()])


def test_an_address_that_never_ends(pair, monkeypatch):
    _, processor = pair

    class Endless(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(10_000))
            except OSError:
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100_000)
    server = HTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for keyword, token in (("images", "<image>"), ("audio", "<audio>")):
            with pytest.raises(ValueError, match="MAX_FILE_BYTES = 100,000"):
                processor(text=token, **{keyword: f"http://127.0.0.1:{server.server_port}/x"})
    finally:
        server.shutdown()
        server.server_close()


def test_an_item_that_would_be_a_billion_features(monkeypatch):
    _, processor = compose_tiny(["clip"])
    register_feature_count("bombed", lambda inputs, config: 10**9)
    _, again = compose_tiny({"bombed": "clip"})
    with pytest.raises(
        ValueError,
        match="bombed, item 0: the number of features of one item is 1,000,000,000, more than cornstarch_hf.limits.MAX_ITEM_FEATURES",
    ):
        again(text="<image>", images=tiny.image())
    monkeypatch.setattr(limits, "MAX_ITEM_FEATURES", 4)
    with pytest.raises(ValueError, match="vision, item 0: .* is 5, more than .*MAX_ITEM_FEATURES = 4"):
        processor(text="<image>", images=tiny.image())
    monkeypatch.setattr(limits, "MAX_ITEM_FEATURES", 5)
    assert len(processor(text="<image>", images=tiny.image())["input_ids"][0]) >= 5
    monkeypatch.setattr(limits, "MAX_ITEM_FEATURES", 4)  # a count that is remembered meets the cap of the moment
    with pytest.raises(ValueError, match="vision, item 0: .* is 5, more than .*MAX_ITEM_FEATURES = 4"):
        processor(text="<image>", images=tiny.image())


@pytest.mark.slow
def test_media_bombs_within_time_and_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(12_000, 10_000))
    (tmp_path / "bomb.flac").write_bytes(flac_header(2**36 - 1))
    found = refusals(f"""
import tiny, functools
from helpers import compose_tiny
model, processor = compose_tiny(["clip", "whisper"])
folder = {str(tmp_path)!r}
attempts = {{
    "image": lambda: processor(text="<image>", images=folder + "/bomb.png"),
    "sound": lambda: processor(text="<audio>", audio=folder + "/bomb.flac"),
}}
""")
    assert {name: kind for name, (kind, _) in found.items()} == {"image": "ValueError", "sound": "ValueError"}, found


@pytest.mark.slow
def test_small_items_that_would_become_large_within_time_and_memory():
    found = refusals("""
import functools, io, cornstarch_hf, numpy as np, tiny, transformers
from PIL import Image
from cornstarch_hf.processing.subprocessors import run_subprocessor
from helpers import compose_tiny
file = io.BytesIO()
Image.new("L", (10_000, 1)).save(file, "PNG")
model, processor = compose_tiny(["clip", "wav2vec2"])
processor.processors["vision"] = transformers.CLIPImageProcessorPil()
names = ["CLIP", "Levit", "TextNet", "Owlv2", "Llava", "Siglip2", "LlavaNext", "Idefics3"]
frames = np.zeros((4_000, 20, 100, 3), np.uint8)
config = tiny.clip().config
def image(name, **options):
    made = getattr(transformers, name + "ImageProcessorPil")()
    return run_subprocessor(made, "vision", "image", [file.getvalue()], options, config, prepared=True)
call = functools.partial
attempts = {name: call(image, name) for name in ("CLIP", "Levit", "TextNet", "Owlv2")} | {
    "llava": call(image, "Llava", do_pad=True), "siglip2": call(image, "Siglip2", max_num_patches=10**8),
    "edge": call(image, "ViT", size={"height": 30_000, "width": 30_000}), "pixels": call(image, "Qwen2VL", min_pixels=10**9, max_pixels=10**10),
    "composed": call(processor, text="<image>", images=file.getvalue()),
    "counted": call(processor._get_num_multimodal_tokens, image_sizes=[(1, 10_000)]),
    "frames": call(run_subprocessor, transformers.CLIPImageProcessorPil(), "film", "video", [frames], {}, config),
    "sound": call(processor, text="<audio>", audio=np.zeros(9_000, np.float32), sampling_rate=16_000, audio_kwargs={"padding": "max_length", "max_length": 10**9}),
    "text": call(processor, text="a", padding="max_length", max_length=10**9),
}
""")
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(found, "ValueError"), found
    assert len(found) == 13 and all(
        "cornstarch_hf.limits.MAX_" in told or name == "pixels" for name, (_, told) in found.items()
    ), found


# ---- chat templates

BOMBS = {
    "power": "{{ 9 ** (9 ** 7) }}",
    "power not reached": "{% if messages %}{{ 7 ** 7 ** 7 ** 7 ** 7 }}{% endif %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(100) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "repeat": "{{ 'a' * 10 ** 8 }}",
    "repeat a list": "{{ ['a' * 1000000] * 100000 }}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "nested loops of one list": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "nested loops over text": "{% set r = 'a' * 100000 %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by blocks": "{% set a %}aaaaaaaa{% endset %}" + "{% set a %}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{{ a }}{% endset %}" * 20,
    "doubling by lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == 1 }}",
    "doubling by macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "center method": "{{ 'a'.center(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format computed width": "{{ '{0:{1}}'.format(1, 1000000000) }}",
    "indent": "{{ 'a' | indent(1000000000, true) }}",
    "indent text": "{{ ('\\n' * 100000) | indent('a' * 100000) }}",
    "indent json": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ (['a' * 100000] * 1000) | join('b' * 1000000) }}",
    "join method": "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(10000) }}",
    "round": "{{ 1 | round(1000000000) }}",
    "bytes": "{{ (1).to_bytes(1000000000) }}",
    "slices": "{% set n = namespace(l=[]) %}{% set b = 'a' * 1000000 %}{% for i in range(100000) %}{% set n.l = n.l + [b[1:]] %}{% endfor %}",
    "batch": "{{ [1, 2] | batch(1000000000, 'x') | list }}",
    "range": "{{ range(1000000000) | list }}",
    "join a range": "{{ range(100000) | join('b' * 1000000) }}",
    "join keys": "{{ {'a': 1, 'b': 2, 'c': 3, 'd': 4}.keys() | join('b' * 100000000) }}",
    "shared lists as text": "{% set n = namespace(x=[['a' * 1000] * 10000]) %}{% for i in range(14) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | upper }}",
    "sum of lists": "{% set n = namespace(x=[['a'] * 1000]) %}{% for i in range(15) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x | sum(start=[]) }}",
    "sorted shared lists": "{% set n = namespace(x=['a' * 1000] * 10000) %}{% set m = namespace(x=[n.x]) %}{% for i in range(15) %}{% set m.x = m.x + m.x %}{% endfor %}{{ [m.x, m.x[1:]] | sort }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if a %}" * 200 + "{% endif %}" * 200,
    "length": "a" * 1_000_001,
    "output": "{% for i in range(60000) %}" + "a" * 1000 + "{% endfor %}",
}  # fmt: skip


# Each may compute for a second, and all of one process for twenty.
@pytest.mark.slow
@pytest.mark.parametrize("third", range(3))
def test_templates_that_are_bombs(third):
    bombs = dict(list(BOMBS.items())[third::3])
    found = refusals(f"""
import functools
from cornstarch_hf import limits
from cornstarch_hf.processing.template_sandbox import render_template
limits.MAX_TEMPLATE_SECONDS = 1.0
limits.MAX_TEMPLATE_STEPS = 300_000
attempts = {{n: functools.partial(render_template, [{{"role": "user", "content": "hi"}}], t) for n, t in {bombs!r}.items()}}
""")
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(bombs, "ValueError"), found
    said = {"doubling by ~": "MAX_TEMPLATE_WORK", "nested loops": "MAX_TEMPLATE_STEPS"}
    assert all(said[name] in found[name][1] for name in said.keys() & found.keys())


SETS = "".join(f"{{% set a{i} = 1 %}}" for i in range(3000))
# What takes long, or much, to compile: beyond a cap, and right below all of them.
SOURCES = {
    "outputs": "{{ x }}" * 140_000, "lists": "{{ [" + "1," * 400_000 + "] }}", "chains": "{{ x" + "|e" * 400_000 + " }}",
    "sums": "{{ " + "x+" * 400_000 + "x }}", "blocks": "{% if x %}a{% endif %}" * 40_000, "brackets": "{{ " + "[" * 9_000 + "]" * 9_000 + " }}",
    "braces": "{" * 1_000_000, "names": "{{ " + "a" * 900_000 + " }}", "names in blocks": SETS + "{% if x %}a{% endif %}" * 2_500,
    "names in files": SETS + "{% include 'x' %}" * 4_500, "digits": "{{ " + "9" * 900_000 + " }}", "hexadecimal": "{{ 0x" + "f" * 900_000 + " }}",
    "outputs below": "{{ x }}" * 13_300, "filters below": "{{ x|e|e|e|e }}" * 3_600, "loops below": "{% for i in x %}a{% endfor %}" * 3_900,
    "comparisons below": "{{ " + "x<" * 19_000 + "x }}", "comments below": "{##}" * 250_000, "macros below": "{% macro a() %}{% endmacro %}" * 4_400,
    "texts below": "{{ '" + "\\\\" * 400_000 + "' }}", "constants below": "{{ 'a' * 10 ** 9 }}{{ 9 ** 9 ** 9 }}{{ range(10 ** 9) | list }}",
}  # fmt: skip


@pytest.mark.parametrize("part", range(4))
@pytest.mark.slow
def test_templates_that_are_bombs_before_they_run(part):
    """A quarter of them in a process: each template has seconds of its own, and a process has 20."""
    sources = dict(list(SOURCES.items())[part::4])
    found = refusals(f"""
import functools
from cornstarch_hf.processing.template_sandbox import template_contents
attempts = {{name: functools.partial(template_contents, source) for name, source in {sources!r}.items()}}
""")
    expected = {name: "accepted" if "below" in name else "ValueError" for name in sources}
    assert {name: kind for name, (kind, _) in found.items()} == expected, found


@pytest.mark.parametrize("name", [name for name in SOURCES if "below" not in name])
def test_what_compiling_a_template_takes_is_bounded_by_counts(name):
    limit = {
        "names": "MAX_TEMPLATE_CODE",
        "names in blocks": "MAX_TEMPLATE_CODE",
        "names in files": "MAX_TEMPLATE_CODE",
    }
    nested, numbers = ("brackets", "braces"), ("digits", "hexadecimal")
    match = (
        "too deeply"
        if name in nested
        else "cannot be compiled"
        if name in numbers
        else limit.get(name, "MAX_TEMPLATE_TOKENS")
    )
    with pytest.raises(TemplateLimit, match=match):
        template_contents(SOURCES[name])


def test_a_limit_of_time_holds_while_a_template_is_compiled(monkeypatch):
    monkeypatch.setattr(limits, "MAX_TEMPLATE_SECONDS", 0.0)
    with pytest.raises(TemplateLimit, match="seconds that compiling the chat template takes .*MAX_TEMPLATE_SECONDS"):
        template_contents("{{ never_seen_before }}")


def test_the_largest_templates_that_there_are_stay_far_below_the_bounds(monkeypatch):
    """60,000 characters, as dense as those of tool calls are: no piece of white space, and no text that is long."""
    block = (
        "{%- if messages[N].role == 'assistant' and messages[N].tool_calls is defined %}{%- for call in messages[N].tool_calls %}"
        "{%- set args = call.function.arguments if call.function is mapping else call.arguments %}{{- '<tool_call>' ~ call.name }}"
        "{%- for key, value in args|items %}{{- key ~ '=' ~ (value|tojson if value is not string else value) }}{%- endfor %}"
        "{%- endfor %}{%- elif loop is defined and not loop.last %}{{- messages[N].content|trim }}{%- endif %}"
    )
    template = "".join(block.replace("N", str(i)) for i in range(130))
    assert len(template) > 60_000
    for cap in ("MAX_TEMPLATE_TOKENS", "MAX_TEMPLATE_CODE"):
        monkeypatch.setattr(limits, cap, int(getattr(limits, cap) * 0.6))
    assert "messages" in template_contents(template)[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ lipsum(10) }}",
        "{{ 'x' | pprint }}",
    ],
)
def test_templates_that_reach_out(template):
    import jinja2

    from cornstarch_hf.processing.template_sandbox import render_template

    with pytest.raises(jinja2.TemplateError):
        render_template([{"role": "user", "content": "hi"}], template)


def test_a_bomb_as_the_template_of_a_processor(pair):
    _, processor = pair
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="MAX_TEMPLATE"):
            processor.apply_chat_template(
                [{"role": "user", "content": "hi"}], chat_template=BOMBS["repeat"], tokenize=tokenize
            )


# ---- placeholders


def test_a_typed_placeholder_stays_text(pair):
    _, processor = pair
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "see <image> and <audio>"}], tokenize=True, return_dict=True
    )
    ids = [processor.config.modality(name)["token_id"] for name in ("vision", "audio")]
    assert not set(ids) & set(inputs["input_ids"][0]) and "<image>" in processor.tokenizer.decode(
        inputs["input_ids"][0]
    )


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ({"vision": "<s>"}, "is the tokenizer's bos token"),
        ({"vision": "</s>"}, "is the tokenizer's eos token"),
        ({"vision": "<pad>"}, "is the tokenizer's pad token"),
        ({"vision": "<x>", "audio": "<x>"}, "stands for another modality already"),
        ({"vision": " <x>"}, "without spaces"),
        ({"vision": 5}, "must be text"),
        ({"other": "<x>"}, "tokens names \\['other'\\]"),
    ],
)  # fmt: skip
def test_placeholders_that_collide(pair, tokens, match):
    model, processor = pair
    with pytest.raises(ValueError, match=match):
        MultimodalProcessor(tiny.tokenizer(), processor.processors, config=model.config, tokens=tokens)


# ---- secrets, videos


def test_an_address_is_told_without_what_may_be_secret(pair):
    _, processor = pair
    with pytest.raises(ValueError, match="cannot be decoded from 'http://127.0.0.1/x.png'") as caught:
        processor(text="<image>", images="http://me:hf_secret@127.0.0.1:1/x.png?token=hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_a_video_of_too_many_frames():
    from cornstarch_hf.processing.subprocessors import run_subprocessor

    with pytest.raises(ValueError, match="clip, item 1: the number of frames is 4,097, more than .*MAX_VIDEO_FRAMES"):
        run_subprocessor(lambda items, **_: None, "clip", "video", [[0], [0] * 4097], {}, None)
