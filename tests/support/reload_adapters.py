"""Load adapters on composed models in a fresh process, in the way each job names, and report what they give.

python reload_adapters.py JOBS.pt RESULT.pt
"""

import sys

import torch
from own_memory import own_memory
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModel

import cornstarch_hf


def with_adapter(base, folder):
    """As `model.load_adapter` of transformers does it."""
    base.load_adapter(str(folder), is_trainable=True)
    return base


def several(base, folder, names, active):
    """All adapters of a folder on one model."""
    first, *others = names
    model = PeftModel.from_pretrained(base, folder / first if first != "default" else folder, adapter_name=first)
    for name in others:
        model.load_adapter(folder / name, adapter_name=name, is_trainable=True)
    model.set_adapter(active)
    return model


WAYS = {
    "peft": lambda base, job: PeftModel.from_pretrained(base(), job["folder"], is_trainable=job.get("trainable", True)),
    "auto_peft": lambda base, job: AutoPeftModelForCausalLM.from_pretrained(job["folder"], is_trainable=True),
    "load_adapter": lambda base, job: with_adapter(base(), job["folder"]),
    "auto": lambda base, job: AutoModel.from_pretrained(job["folder"]),
    "several": lambda base, job: several(base(), job["folder"], job["names"], job["active"]),
}
results = []
for job in torch.load(sys.argv[1], weights_only=False):
    problems = {}

    def base(job=job, problems=problems):
        options = {"quantization_config": job["quantization"]} if job.get("quantization") else {}
        model, info = AutoModel.from_pretrained(job["base"], output_loading_info=True, **options)
        problems |= {key: sorted(map(str, value)) for key, value in info.items() if value}
        return model

    assert cornstarch_hf.MultimodalModel
    model = own_memory(WAYS[job["way"]](base, job).eval())
    with torch.no_grad():
        logits = model(**own_memory(job["inputs"])).logits
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    expected = torch.load(job["state"], weights_only=False)
    results.append(
        {
            "logits": logits,
            "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
            "problems": problems,
            "keys": sorted(state.keys() ^ expected.keys()),
            "different": [k for k in state.keys() & expected.keys() if not torch.equal(state[k], expected[k])],
            "active": list(model.active_adapters) if isinstance(model, PeftModel) else None,
        }
    )
torch.save(results, sys.argv[2])
