"""Run by tests, in a fresh process: a checkpoint with its own code gives the logits and tokens that were saved beside it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from own_memory import own_memory
from transformers import AutoModel

folder, expected = sys.argv[1:3]
inputs, logits, tokens = torch.load(expected, weights_only=False)
model = own_memory(AutoModel.from_pretrained(folder, trust_remote_code=True).eval())
with torch.no_grad():
    found = model(**own_memory(inputs)).logits[inputs["attention_mask"].bool()]
assert type(model).__module__.startswith("transformers_modules") and "cornstarch_hf" not in sys.modules
assert torch.equal(found, logits), float((found - logits).abs().max())
options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
options = options if inputs["input_ids"].shape[0] > 1 else {"max_new_tokens": 4, "do_sample": False}
assert torch.equal(model.generate(**own_memory(inputs), **options), tokens)
model.save_pretrained(folder + "-again", include_code=True)
