"""Threads that count, process, generate and save, while others build models of their own: all as if each were alone."""

import copy
import os
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from helpers import compose_tiny
from process_state import changes, process_state
from transformers import AutoProcessor
from transformers import initialization as init

from cornstarch_hf import ModalEncoderModule, MultimodalModel

SECONDS = float(os.environ.get("STRESS_SECONDS", "60"))
TEXT = "a <image> and <audio> what"


def inputs_of(processor, i):
    sound = tiny.sound(i, length=1_600 + 16 * i)
    return dict(processor(text=TEXT, images=tiny.image(i, (8 + i, 12)), audio=sound, sampling_rate=16_000, return_tensors="pt"))  # fmt: skip


def life(i, model, shared, folder, target):
    """First counts of a processor just loaded, a call of one that threads share, generation, saving."""
    own = AutoProcessor.from_pretrained(folder)
    inputs, same = inputs_of(own, i), inputs_of(shared, i)
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)
    tokens = model.generate(**same, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.save_pretrained(target)
    own.save_pretrained(target)
    return tokens.tolist(), (target / "model.safetensors").read_bytes(), (target / "config.json").read_text()


def build(i):
    """A model, an adapted model or a composition of somebody else; whether any of it is on meta."""
    model = tiny.llama(seed=i)
    if i % 3 == 1:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if i % 3 == 2:
        encoders = {"vision": ModalEncoderModule(tiny.siglip()), "sound": ModalEncoderModule(tiny.whisper())}
        model = MultimodalModel(encoders=encoders, language_model=model)
    return any(p.is_meta for p in model.parameters())


@pytest.fixture
def initializers_as_they_were():
    """transformers replaces functions of `torch.nn.init` for the whole process while it builds a model: threads that build
    models at a time, without this package, leave its own there (which do the same)."""
    yield
    for name in init.TORCH_MODULES_TO_PATCH:
        module = __import__(name, fromlist=["x"])
        for key, function in init.TORCH_INIT_FUNCTIONS.items():
            if hasattr(module, key):
                setattr(module, key, function)


@pytest.mark.slow
def test_threads_do_what_they_do_alone_while_others_build_models(tmp_path, initializers_as_they_were):
    model, processor = compose_tiny(["clip", "wav2vec2"])
    del processor.items
    processor.save_pretrained(tmp_path / "saved")
    shared, models = AutoProcessor.from_pretrained(tmp_path / "saved"), [copy.deepcopy(model) for _ in range(8)]
    expected = [life(i, models[i], processor, tmp_path / "saved", tmp_path / f"alone{i}") for i in range(8)]
    before, until, failed, built, rounds = process_state(), time.monotonic() + SECONDS, [], [], [0] * 8

    def repeat(work, i):
        try:
            while time.monotonic() < until and not failed:
                work(i)
        except BaseException as error:
            failed.append(error)
            raise

    def live(i):
        assert life(i, models[i], shared, tmp_path / "saved", Path(tmp_path / f"thread{i}")) == expected[i]
        rounds[i] += 1

    threads = [threading.Thread(target=repeat, args=(live, i)) for i in range(8)]
    threads += [threading.Thread(target=repeat, args=(lambda i: built.append(build(i)), i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and min(rounds) > 0 and built and not any(built)
    assert [
        name for name in changes(before, process_state()) if not name.startswith(tuple(init.TORCH_MODULES_TO_PATCH))
    ] == []
