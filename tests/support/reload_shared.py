"""Load a checkpoint as its code or the package allows, in a fresh process, and report what it gives.

python reload_shared.py PACKAGE FOLDER INPUTS.pt RESULT.pt [SAVE_TO]   with PACKAGE: absent (by the environment), installed, or imported
"""
# ruff: noqa: E402

import importlib.util
import os
import sys
from pathlib import Path

package, folder, inputs_file, result_file, *save_to = sys.argv[1:]

assert (importlib.util.find_spec("cornstarch_hf") is None) == (package == "absent")
if package == "imported":
    import cornstarch_hf

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

sys.path.append(str(Path(__file__).parent))
from own_memory import own_memory, weights

sys.path.pop()  # nothing else of this folder shall be found
given = torch.load(inputs_file, weights_only=False)
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
inputs = dict(processor(**given["call"], return_tensors="pt"))
classes = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
found = {
    "logits": [],
    "weights": [],
    "inputs": inputs,
    "config": type(config).__module__,
    "processor": type(processor).__module__,
}
for auto_class in classes:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(info.values()), info
    found["same config class"] = type(model.config) is type(processor.config)
    found["weights"].append(weights(model))
    own_memory(model)
    with torch.no_grad():
        found["logits"].append(model(**own_memory(inputs)).logits)
found["tokens"] = model.generate(**own_memory(inputs), max_new_tokens=4, do_sample=False)
found["model"], found["package"] = type(model).__module__, "cornstarch_hf" in sys.modules
found["encoder"] = type(next(iter(model.encoders.values())).module).__module__
if save_to:
    model.save_pretrained(save_to[0])
    processor.save_pretrained(save_to[0])
    found["files"] = sorted(os.listdir(save_to[0]))
if package == "installed":  # what is imported later takes over
    import cornstarch_hf

    found["later"] = isinstance(AutoModel.from_pretrained(folder, **trust), cornstarch_hf.MultimodalModel)
torch.save(found, result_file)
