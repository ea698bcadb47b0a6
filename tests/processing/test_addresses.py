"""What lies at addresses: in bounded time and size, and nothing of this machine where strangers wrote them."""

import base64
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
from helpers import compose_tiny

from cornstarch_hf import MultimodalCollator, limits
from cornstarch_hf.processing import addresses
from cornstarch_hf.processing.addresses import fetch, is_public
from cornstarch_hf.processing.media import ImageForm
from cornstarch_hf.processing.opening import Foreign, foreign
from cornstarch_hf.processing.video import ready_video


def png():
    raw = io.BytesIO()
    tiny.image().save(raw, "png")
    return raw.getvalue()


@pytest.fixture(scope="module")
def server():
    """An address that redirects, drips, and gives a picture."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.path = self.path.partition("?")[0]
            asked.append((self.path, self.headers["Host"]))
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", base64.urlsafe_b64decode(self.path[4:]).decode())
                self.end_headers()
            elif self.path == "/header":  # never ends, byte by byte
                self.drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000)
            elif self.path == "/gone":
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                if self.path == "/body":
                    self.drip(bytes(10_000))
                else:
                    self.wfile.write(bytes(300_000) if self.path == "/big" else png())

        def drip(self, content):
            try:
                for i in range(len(content)):
                    self.wfile.write(content[i : i + 1])
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked = True, asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def redirect(server, target):
    return f"{server.url}/to/{base64.urlsafe_b64encode(target.encode()).decode()}"


@pytest.fixture(scope="module")
def processor():
    return compose_tiny(["clip", "whisper"])[1]


def talk(part):
    return [{"role": "user", "content": [part, {"type": "text", "text": "what"}]}]


def ask(processor, part, **options):
    return processor.apply_chat_template(talk(part), tokenize=True, return_dict=True, return_tensors="pt", **options)


# ---- time and size


@pytest.mark.parametrize("path", ["/body", "/header"])
def test_a_server_that_drips_ends_in_a_timeout_that_names_the_item(server, processor, monkeypatch, path):
    monkeypatch.setattr(limits, "MAX_FETCH_SECONDS", 0.3)
    for keyword, token, name in (("images", "<image>", "vision"), ("audio", "<audio>", "audio")):
        with pytest.raises(TimeoutError, match=rf"{name}, item 0: .*http://127.0.0.1{path}.*MAX_FETCH_SECONDS = 0.3"):
            processor(text=token, **{keyword: f"{server.url}{path}?token=secret"})
    with pytest.raises(TimeoutError, match=r"row 0: vision, item 0"):
        MultimodalCollator(processor)([{"text": "<image>", "images": [f"{server.url}{path}"]}])
    with pytest.raises(TimeoutError, match="vision, item 0") as caught:
        ask(processor, {"type": "image", "url": f"{server.url}{path}?token=secret"})
    assert "secret" not in str(caught.value)


def test_size_status_and_scheme(server, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FILE_BYTES", 100_000)
    assert len(fetch(f"{server.url}/big", public=False)) == 100_001, "one byte more shows that there are too many"
    with pytest.raises(OSError, match="the server answers 404"):
        fetch(f"{server.url}/gone", public=False)
    assert fetch(redirect(server, f"{server.url}/x"), public=False) == png()
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://127.0.0.1:1/x"):
        with pytest.raises((OSError, ValueError)):
            fetch(redirect(server, target), public=False)


def test_it_works_inside_of_a_running_loop(server):
    import asyncio

    async def called():
        return fetch(f"{server.url}/x", public=False)

    assert asyncio.run(called()) == png()


# ---- addresses of this machine and its networks

PRIVATE = [
    "127.0.0.1", "127.8.9.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "224.0.1.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "fec0::1", "ff02::1",
    "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:db8::1",
    "2001:0:7f00:1::", "::ffff:169.254.169.254", "fe80::1%lo",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


def test_which_addresses_are_public():
    assert [number for number in PRIVATE if is_public(number)] == []
    assert [number for number in PUBLIC if not is_public(number)] == []


HOSTS = [
    "127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0", "0x7f.1", "localhost", "LOCALHOST", "localhost.", "[::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::]", "user@127.0.0.1", "10.0.0.1", "169.254.169.254", "\uff11\uff12\uff17.0.0.1", "[64:ff9b::7f00:1]",
]  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_forms_of_addresses_of_this_machine(server, processor, host):
    count = len(server.asked)
    address = f"http://{host}:{server.server_port}/x"
    parts = [
        {"type": "image", "url": address},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "audio", "audio": address},
    ]
    for part in parts:
        with pytest.raises(ValueError, match="(vision|audio), item 0: ") as caught:
            ask(processor, part, local_media=False)
        assert "is no image" not in str(caught.value)
    assert len(server.asked) == count, "nothing was connected to"


def test_redirects_are_looked_at_one_by_one_and_the_address_that_was_looked_at_is_connected_to(server, monkeypatch):
    """A name that is public at the first look and of this machine at the second one: there is one look, and it counts."""
    monkeypatch.setattr(addresses, "is_public", lambda number: number == "127.0.0.1")  # as if it were public
    looks, real = [], socket.getaddrinfo

    def look(host, port, *args, **kwargs):
        looks.append(host)
        told = {
            "rebind.example": "127.0.0.1" if looks.count("rebind.example") == 1 else "127.0.0.2",
            "inside.example": "127.0.0.2",
        }
        return real(told.get(host, host), port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look)
    port = server.server_port
    assert fetch(f"http://rebind.example:{port}/x", public=True) == png()
    assert looks.count("rebind.example") == 1 and server.asked[-1] == ("/x", f"rebind.example:{port}")
    with pytest.raises(ValueError, match="leads to 'rebind.example'"):
        fetch(f"http://rebind.example:{port}/x", public=True)
    assert fetch(redirect(server, f"http://127.0.0.1:{port}/x"), public=True) == png()
    count = len(server.asked)
    for target in (f"http://inside.example:{port}/x", f"http://[::1]:{port}/x", f"//127.0.0.2:{port}/x"):
        with pytest.raises(ValueError, match="is not public, which local_media=False"):
            fetch(redirect(server, target), public=True)
        with pytest.raises(ValueError, match="is not public"):
            fetch(redirect(server, redirect(server, target)), public=True)
    assert not any(path == "/x" for path, _ in server.asked[count:])


def test_proxies_do_not_hide_where_an_address_leads(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url)
    count = len(server.asked)
    with pytest.raises(ValueError, match="is not public"):
        fetch("http://10.0.0.1/x", public=True)
    assert len(server.asked) == count


# ---- files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "x.png").write_bytes(png())
    soundfile.write(folder / "x.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16_000)
    return folder


def parts(kind, path):
    """A message's part that names a file, in every form."""
    texts = [str(path), path.as_uri(), f"FILE://localhost{path}", path]
    forms = [{kind: text} for text in texts] + [{"url": texts[1]}, {"path": texts[0]}]
    forms += [{kind: {"path": texts[0], "bytes": None}}, {kind: {"url": texts[1]}}, {"base64": texts[0]}]
    return [{"type": kind, **form} for form in forms]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_files_in_messages_and_rows(processor, files, kind, monkeypatch):
    path = files / {"image": "x.png", "audio": "x.wav"}[kind]
    refused = pytest.raises(ValueError, match="item 0: .*local_media=False")
    collator = MultimodalCollator(processor, local_media=False)
    answer = [{"role": "assistant", "content": "yes"}]
    for part in parts(kind, path):
        ask(processor, part)
        with refused:
            ask(processor, part, local_media=False)
        with refused:
            collator([{"messages": talk(part) + answer}])
        MultimodalCollator(processor)([{"messages": talk(part) + answer}])
        monkeypatch.setattr(limits, "LOCAL_MEDIA", False)
        with refused:
            ask(processor, part)
        with refused:
            MultimodalCollator(processor)([{"messages": talk(part) + answer}])
        ask(processor, part, local_media=True)
        MultimodalCollator(processor, local_media=True)([{"messages": talk(part) + answer}])
        monkeypatch.setattr(limits, "LOCAL_MEDIA", True)
    token, column = {"image": ("<image>", "images"), "audio": ("<audio>", "audio")}[kind]
    for cell in ([str(path)], str(path), [{"path": str(path), "bytes": None}]):
        MultimodalCollator(processor)([{"text": f"{token} seen", column: cell}])
        with refused:
            collator([{"text": f"{token} seen", column: cell}])
        with refused:
            collator([{"messages": talk({"type": kind}) + answer, column: cell}])
    monkeypatch.setattr(limits, "LOCAL_MEDIA", False)
    processor(text=token, **{column: str(path)})  # an argument is the programmer's own
    processor.apply_chat_template(talk({"type": kind}), tokenize=True, processor_kwargs={column: str(path)})


def test_a_server_of_transformers_goes_by_the_limit(processor, files, server, monkeypatch):
    utils = pytest.importorskip("transformers.cli.serving.utils")
    for url in (str(files / "x.png"), (files / "x.png").as_uri(), f"{server.url}/x"):
        sent = [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}],
            }
        ]
        messages = utils.BaseHandler.get_processor_inputs_from_messages(sent, utils.Modality.MULTIMODAL)
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, "tokenize": True}
        monkeypatch.setattr(limits, "LOCAL_MEDIA", True)
        processor.apply_chat_template(messages, **options)
        monkeypatch.setattr(limits, "LOCAL_MEDIA", False)
        with pytest.raises(ValueError, match="vision, item 0: .*local_media=False"):
            processor.apply_chat_template(messages, **options)


def test_what_is_no_file_stays_as_it_is(processor, files):
    raw = (files / "x.png").read_bytes()
    text = base64.b64encode(raw).decode()
    for item in (
        text,
        f"data:image/png;base64,{text}",
        raw,
        tiny.image(),
        {"bytes": raw, "path": "gone"},
        np.asarray(tiny.image()).tolist(),
    ):
        part = {"type": "image", "image": item}
        a, b = ask(processor, part), ask(processor, part, local_media=False)
        assert all((a[key] == b[key]).all() for key in a)


def test_a_file_is_not_even_looked_for(processor):
    messages = []
    for path in ("/etc/passwd", "/etc/there-is-none"):
        with pytest.raises(ValueError) as caught:
            ask(processor, {"type": "image", "image": path}, local_media=False)
        messages.append(str(caught.value).replace(path, ""))
    assert messages[0] == messages[1]


def test_marks_reach_every_depth_and_leave_the_rest():
    given = {"video": [{"path": Path("/a")}, ["b", 1.5, None]], "fps": 2}
    found = foreign(given)
    assert found == {"video": [{"path": "/a"}, ["b", 1.5, None]], "fps": 2}
    assert isinstance(found["video"][0]["path"], Foreign) and isinstance(found["video"][1][0], Foreign)
    array = np.zeros(3)
    assert foreign((array, 16_000))[0] is array and isinstance(given["video"][0]["path"], Path)


def test_frames_of_a_video(files):
    film = [str(files / "x.png")] * 2
    assert len(ready_video(film, "film, item 0", ImageForm(3))) == 2
    with pytest.raises(ValueError, match="film, item 0, frame 0: .*local_media=False"):
        ready_video(foreign({"video": film, "fps": 2}), "film, item 0", ImageForm(3))


@pytest.mark.parametrize("value", ["no", 1, 0, []])
def test_the_switch_is_a_bool(processor, value):
    with pytest.raises(ValueError, match="local_media must be True or False"):
        ask(processor, {"type": "image", "image": tiny.image()}, local_media=value)
    with pytest.raises(ValueError, match="local_media must be True or False"):
        MultimodalCollator(processor, local_media=value)
