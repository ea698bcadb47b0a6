"""`transformers serve`, unmodified, in a process of its own, asked by the client of OpenAI: it answers as `generate` does.

One server runs one request after the other and loads a checkpoint by the package, the other one batches continuously and
loads a checkpoint by the code that it carries, where the package is missing.
"""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny
from helpers import compose_tiny
from PIL import Image

ROOT = Path(__file__).parents[2]
TOKENS = 12
START = """
import sys
if "hidden" in sys.argv:
    sys.argv.remove("hidden")
    sys.modules["cornstarch_hf"] = None  # as where it is not installed
from transformers.cli.transformers import main
main()
"""
SERVERS = {"one by one": ("package", []), "continuous batching": ("code", ["--continuous-batching", "hidden"])}
# Messages: a role with parts, each a text or (kind, seed).
CHATS = {
    "text": [("user", ["the quick fox"])],
    "turns": [("system", ["be brief"]), ("user", ["what"]), ("assistant", ["dog"]), ("user", ["the lazy"])],
    "image": [("user", [("image", 1), "what is"])],
    "images": [("user", [("image", 1), "and", ("image", 2)])],
    "sound": [("user", [("audio", 1), "what is"])],
    "both": [("user", [("image", 3), ("audio", 4), "sum"])],
    "turns with media": [("user", [("image", 5), "a"]), ("assistant", ["b"]), ("user", ["c", ("audio", 6), ("image", 7)])],
}  # fmt: skip


def image(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def sound(seed):
    samples = (np.random.default_rng(seed).normal(size=1600) * 3000).astype("<i2")
    with wave.open(buffer := io.BytesIO(), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", None))
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def asked(part):
    """A part of a message as OpenAI's interface has it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind, seed = part
    data = base64.b64encode({"image": image, "audio": sound}[kind](seed)).decode()
    if kind == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


def local(part):
    """The same part as transformers' chat templates have it."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind, seed = part
    if kind == "image":
        return {"type": "image", "image": Image.open(io.BytesIO(image(seed)))}
    samples = np.frombuffer(sound(seed)[44:], "<i2") / 32768
    return {"type": "audio", "audio": samples.astype(np.float32)}


def messages(chat, part):
    return [{"role": role, "content": [part(one) for one in parts]} for role, parts in chat]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Model, processor, and folders of both by how they are loaded; answers are of printable ASCII."""
    model, processor = compose_tiny(["clip", "whisper"], tiny.llama(vocab_size=300, initializer_range=0.3))
    tokenizer, size = processor.tokenizer, model.config.text_config.vocab_size
    texts = [tokenizer.decode([i]) for i in range(size)]
    plain = [bool(text) and text.isascii() and text.isprintable() and not text.startswith("<") for text in texts]
    model.generation_config.suppress_tokens = [i for i in range(size) if not plain[i]]
    folders = {how: str(tmp_path_factory.mktemp(how)) for how in ("package", "code")}
    for how, folder in folders.items():
        for part in (model, processor):
            part.save_pretrained(folder, include_code=how == "code")
    return model, processor, folders


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(url, process, log):
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
                assert json.load(answer) == {"status": "ok"}
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer: {log.read_text()}")


class Server:
    """A running server, asked for one of its checkpoints."""

    def __init__(self, url, checkpoint, tokenizer, log):
        self.url, self.checkpoint, self.tokenizer, self.log = url, checkpoint, tokenizer, log
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)

    def ask(self, chat, **options):
        sent = messages(chat, asked)
        options = {"max_tokens": TOKENS, "temperature": 0} | options
        return self.client.chat.completions.create(model=self.checkpoint, messages=sent, **options)

    def logs(self, text):
        """Whether this stands in the log, or does within seconds: the cause is written after the answer."""
        return any(text in self.log.read_text() or time.sleep(0.1) for _ in range(100))

    def text(self, chat, **options):
        return self.ask(chat, **options).choices[0].message.content


@pytest.fixture(scope="module", params=SERVERS)
def server(request, checkpoints, tmp_path_factory):
    how, options = SERVERS[request.param]
    log = tmp_path_factory.mktemp("log") / "log"
    url, port = f"http://127.0.0.1:{(port := free_port())}", str(port)
    command = [sys.executable, "-c", START, "serve", "--trust-remote-code", "--device", "cpu", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", port], stdout=output, stderr=output, cwd=log.parent,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(log.parent)},
        )  # fmt: skip
    try:
        wait_for(url, process, log)
        yield Server(url, checkpoints[2][how], checkpoints[1].tokenizer, log)
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def generated(checkpoints):
    """A function that gives what `generate` answers, and the number of tokens that it was asked."""
    model, processor, _ = checkpoints

    def answer(chat, **options):
        inputs = processor.apply_chat_template(
            messages(chat, local), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
            processor_kwargs={"sampling_rate": 16_000} if "audio" in str(chat) else None,
        )  # fmt: skip
        asked_for = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": TOKENS, "do_sample": False} | options
        tokens = model.generate(**inputs, **options)[0, asked_for:]
        return processor.decode(tokens, skip_special_tokens=True), asked_for

    return answer


def test_each_question_has_an_answer_of_its_own(generated):
    answers = {name: generated(chat)[0] for name, chat in CHATS.items()}
    assert len(set(answers.values())) == len(CHATS), answers
    assert all(len(text) >= TOKENS and text.isascii() for text in answers.values())


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_generate_streamed_or_not(name, server, generated):
    text, asked_for = generated(CHATS[name])
    answer = server.ask(CHATS[name])
    assert answer.choices[0].message.content == text
    assert (answer.choices[0].finish_reason, answer.usage.prompt_tokens) == ("length", asked_for)
    chunks = [chunk for chunk in server.ask(CHATS[name], stream=True) if chunk.choices]
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == text and len(pieces) > 1
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == TOKENS


def test_sixteen_at_once_answer_as_each_alone(server, generated):
    chats = [list(CHATS.values())[i % len(CHATS)] for i in range(16)]
    expected = [generated(chat)[0] for chat in chats]
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(server.text, chats)) == expected


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        ({"frequency_penalty": 0.5}, {"repetition_penalty": 1.5}),
        ({"logit_bias": {"70": 90.5}}, {"sequence_bias": {(70,): 90.5}}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"extra_body": {"generation_config": '{"no_repeat_ngram_size": 1}'}}, {"no_repeat_ngram_size": 1}),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_a_request_are_those_of_generate(sent, options, server, generated):
    text, _ = generated(CHATS["both"], **options)
    assert server.text(CHATS["both"], **sent) == text != generated(CHATS["both"])[0]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer(stream, server, generated):
    text, _ = generated(CHATS["both"])
    stop = text[4:6]
    answer = server.ask(CHATS["both"], stop=[stop], stream=stream)
    answers = [chunk for chunk in answer if chunk.choices] if stream else [answer]
    said = [one.choices[0].delta.content or "" if stream else one.choices[0].message.content for one in answers]
    expected = generated(CHATS["both"], stop_strings=[stop], tokenizer=server.tokenizer)[0]
    assert "".join(said) == expected and stop in expected != text
    assert answers[-1].choices[0].finish_reason == "stop"


def test_prompts_without_media_complete_as_generate_does(server, checkpoints):
    model, processor, _ = checkpoints
    ids = processor.tokenizer("the quick", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids["input_ids"].shape[1] :]
    options = {"model": server.checkpoint, "prompt": "the quick", "max_tokens": TOKENS, "temperature": 0}
    done = server.client.completions.create(**options)
    assert done.choices[0].text == processor.decode(tokens, skip_special_tokens=True)


def test_an_interrupted_stream_leaves_the_server_free(server, generated):
    stream = server.ask(CHATS["image"], stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    assert server.text(CHATS["image"]) == generated(CHATS["image"])[0]


FILM = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "film.mp4"}}]}]


@pytest.mark.parametrize(
    ("path", "body", "cause"),
    [
        ("chat/completions", {"messages": FILM}, "'video' is no modality of this model, expected one of"),
        ("completions", {"prompt": "<image>"}, "vision: the text has 1 placeholder tokens (<image>) but there is no input"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_an_error_whose_cause_the_log_names(path, body, cause, server):
    with pytest.raises(openai.InternalServerError):  # a client of its own: the server closes the connection
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).post(
            f"/{path}", body={"model": server.checkpoint, **body}, cast_to=object
        )
    assert server.logs(cause), server.log.read_text()[-2000:]


def test_requests_that_cannot_be_batched_continuously_run_one_by_one_and_the_log_says_so(server, generated):
    assert server.text(CHATS["both"]) == generated(CHATS["both"])[0]
    fell_back = "MultimodalModel does not support continuous batching. Falling back" in server.log.read_text()
    assert fell_back == ("code" in server.checkpoint)


def test_the_client_of_the_page_about_serving_runs(server, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = re.search(r"^```py\n(.*?)^```", page, re.M | re.S)[1]
    for said, here in (("http://localhost:8000", server.url), ("./my-model", server.checkpoint)):
        assert said in code
        code = code.replace(said, here)
    (tmp_path / "photo.png").write_bytes(image(1))
    (tmp_path / "question.wav").write_bytes(sound(1))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "serving.md", "exec"), {})
    assert len(capsys.readouterr().out) > TOKENS
