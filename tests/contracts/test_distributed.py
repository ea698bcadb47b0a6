"""Processes that train together, with other media in each: no hang, and the weights of one process that has all rows."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import compose_tiny
from transformers import AutoModel

SCRIPT = Path(__file__).parents[1] / "support" / "processes.py"
ROWS = {
    "one rank text only": [["image"], ["text"]],
    "other media per rank": [["image"], ["audio"]],
    "changing": [["text", "both", "text"], ["image", "text", "text"]],
}
OPTIONS = {
    "whole": {},
    "frozen encoder": {"frozen": ["vision_encoder"]},
    "checkpointing": {"checkpointing": False},
    "reentrant checkpointing": {"checkpointing": True},
    "loss at labels": {"at_once": 2**24},
    "loss in parts": {"at_once": 2 * tiny.VOCABULARY},
}
CASES = [(rows, "whole") for rows in ROWS] + [("other media per rank", option) for option in list(OPTIONS)[1:]]
KINDS = ["ddp", "trainer", "fsdp", "zero1", "zero2", "zero3"]


def start(folder, kind, rows, options, rank=0, world=1, port=0):
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    if world > 1:
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= numbers | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = [str(folder), str(rank), str(world), kind, json.dumps(rows), json.dumps(options)]
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes):
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders by case, with the model and what one process makes of it."""
    made = {}

    def folder(rows, option):
        if (rows, option) not in made:
            place = made[rows, option] = tmp_path_factory.mktemp("model")
            model, processor = compose_tiny(["qwen2_vl", "whisper"])
            model.save_pretrained(place / "model")
            processor.save_pretrained(place / "model")
            finish([start(place, kind, ROWS[rows], OPTIONS[option]) for kind in ("alone", "trainer_alone")])
        return made[rows, option]

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "option"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_together_are_one_process(kind, rows, option, folders):
    if kind.startswith("zero") and not importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is no requirement of the tests: it is built where it is installed")
    folder = folders(rows, option)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    finish([start(folder, kind, ROWS[rows], OPTIONS[option], rank, 2, port) for rank in range(2)])
    alone = "trainer_alone" if kind == "trainer" else "alone"
    before, one, many = (AutoModel.from_pretrained(folder / name).state_dict() for name in ("model", alone, kind))
    assert one.keys() == many.keys()
    tolerance = 1e-6 if not kind.startswith("zero") else 2e-5  # ZeRO keeps 32 bits
    for name, weight in one.items():
        torch.testing.assert_close(many[name].double(), weight.double(), atol=tolerance, rtol=0)
    assert any(not torch.equal(before[name], one[name].to(before[name])) for name in one)
