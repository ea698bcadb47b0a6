"""Load a checkpoint in a fresh process that knows transformers and cornstarch_hf alone, and report what it gives.

python reload.py FOLDER INPUTS.pt RESULT.pt [MODULE_TO_IMPORT ...]
"""

import importlib
import sys

import torch
from own_memory import own_memory, weights
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

import cornstarch_hf

folder, inputs_file, result_file, *modules = sys.argv[1:]
for module in modules:
    importlib.import_module(module)
jobs = torch.load(inputs_file, weights_only=False)
results = []
for name, inputs in jobs:
    classes = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    found, inputs = {"logits": [], "weights": [], "trainable": None}, own_memory(inputs)
    for auto_class in classes:
        model, info = auto_class.from_pretrained(f"{folder}/{name}", output_loading_info=True)
        assert isinstance(model, cornstarch_hf.MultimodalModel)
        found["problems"] = {k: sorted(map(str, v)) for k, v in info.items() if v}
        found["weights"].append(weights(model))
        own_memory(model)
        with torch.no_grad():
            found["logits"].append(model(**inputs).logits)
    found["trainable"] = [n for n, p in model.named_parameters() if p.requires_grad]
    found["tokens"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    if folder_has_processor := __import__("os").path.exists(f"{folder}/{name}/processor_config.json"):
        processor = cornstarch_hf.MultimodalProcessor.from_pretrained(f"{folder}/{name}")
        found["processor_tokens"] = processor.tokens
    results.append(found)
torch.save(results, result_file)
