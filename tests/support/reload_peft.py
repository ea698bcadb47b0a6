"""Load models with adapters in a fresh process and report what they give.

python reload_peft.py JOBS.pt RESULT.pt    with jobs of (kind, folder, adapters' folder, options, inputs)
"""

import sys

import torch
from own_memory import own_memory, weights
from peft import AutoPeftModelForCausalLM, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModel, AutoModelForCausalLM

import cornstarch_hf  # noqa: F401


def auto(folder, adapters, options):
    return AutoPeftModelForCausalLM.from_pretrained(adapters, **options)


def around(folder, adapters, options):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **options), adapters)


def to_train(folder, adapters, options):
    base = AutoModelForCausalLM.from_pretrained(folder, **options)
    if options:
        base = prepare_model_for_kbit_training(base)
    return PeftModel.from_pretrained(base, adapters, is_trainable=True)


def attached(folder, adapters, options):
    model = AutoModel.from_pretrained(folder, **options)
    model.load_adapter(adapters, is_trainable=True)
    return model


def from_adapter_folder(folder, adapters, options):
    return AutoModel.from_pretrained(adapters, **options)


def main():
    results = []
    for kind, folder, adapters, options, inputs in torch.load(sys.argv[1], weights_only=False):
        model = own_memory(globals()[kind](folder, adapters, options).eval())
        with torch.no_grad():
            logits = model(**own_memory(inputs)).logits
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        results.append((logits, trainable, weights(model)))
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
