"""Loads while another process saves into the same folder: each is one save's, whole, and none fails."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers import HERE
from saving_again import models
from transformers import AutoModel, AutoProcessor

from cornstarch_hf import MultimodalModel


def whose(model, expected):
    """The name of the model whose configuration and tensors were loaded, all of them."""
    state = model.state_dict()
    for name, (other, _) in expected.items():
        same = other.config.text_config.num_hidden_layers == model.config.text_config.num_hidden_layers
        tensors = other.state_dict()
        if same and state.keys() == tensors.keys() and all(torch.equal(t, state[key]) for key, t in tensors.items()):
            return name
    return "mixed"


@pytest.mark.parametrize("loads", [5, pytest.param(300, marks=pytest.mark.slow)])
def test_every_load_is_of_one_save(tmp_path, loads):
    folder, expected, found = tmp_path / "m", models(), Counter()
    for part in expected["one"]:
        part.save_pretrained(folder)
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    writer = subprocess.Popen([sys.executable, HERE / "saving_again.py", folder], env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    try:
        while not list(folder.glob("*.index.json")):  # the first of its saves
            assert writer.poll() is None
        for load in range(loads):
            model_class = AutoModel if load % 2 else MultimodalModel
            found[whose(model_class.from_pretrained(folder), expected)] += 1
            length = AutoProcessor.from_pretrained(folder).tokenizer.model_max_length
            assert length in {processor.tokenizer.model_max_length for _, processor in expected.values()}
    finally:
        (tmp_path / "stop").touch()
        saves, _ = writer.communicate(timeout=120)
    assert int(saves) > 1 and not found["mixed"] and found.total() == loads, (found, saves)
