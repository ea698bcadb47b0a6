"""What several test modules need: composing tiny parts, inputs for them, and a reload in a fresh process."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from own_memory import own_memory, weights
from packaging.version import Version

from cornstarch_hf import ModalEncoderModule, MultimodalModel, MultimodalProcessor
from cornstarch_hf.parts import versions

HERE = Path(__file__).parent
# For tests of what older versions of transformers do not have.
needs_5_23 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23")
# PEFT and transformers need each other in certain versions for `add_adapter` and `load_adapter`.
needs_attaching = pytest.mark.skipif(
    versions.peft_is_behind(), reason="transformers wants a newer PEFT to attach adapters"
)
needs_5_24 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="needs transformers 5.24")


def compose_tiny(encoders, language_model=None, projector="linear", **options):
    """A composed model and its processor from keys of `tiny.ENCODERS`, or ``{name: key}`` for chosen names."""
    named = encoders if isinstance(encoders, dict) else {tiny.ENCODERS[key][0]: key for key in encoders}
    modules = {
        name: ModalEncoderModule(tiny.ENCODERS[key][1](seed=i), **options.get(name, {}))
        for i, (name, key) in enumerate(named.items())
    }
    torch.manual_seed(3)
    model = MultimodalModel(
        encoders=modules, language_model=language_model or tiny.llama(), init_projector_type=projector
    ).eval()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    processors = {name: tiny.ENCODERS[key][2]() for name, key in named.items()}
    processor = MultimodalProcessor(tokenizer, processors, model=model)
    processor.items = {name: tiny.ENCODERS[key][3] for name, key in named.items()}
    return model, processor


def uneven_inputs(processor, return_tensors="pt"):
    """Three samples: one item of each modality; two in the other order; text alone."""
    names = list(processor.tokens)
    tokens = [processor.tokens[name] for name in names]
    texts = ["a " + " b ".join(tokens), " and ".join(tokens[::-1]) + " then " + tokens[0] + " what", "none at all"]
    media = {}
    for i, name in enumerate(names):
        item = processor.items[name]
        media[name] = [[item(i)], [item(i + 10)] + ([item(i + 20)] if i == 0 else []), []]
    if "audio" in names:
        media["sampling_rate"] = 16_000
    return dict(processor(text=texts, padding=True, return_tensors=return_tensors, **media))


def run_python(code_or_file, *arguments, cwd=None, timeout=300):
    """Run a file, or ``-c`` code, in a fresh process; AssertionError with its output if it fails."""
    command = [
        sys.executable,
        *(["-c", code_or_file] if "\n" in str(code_or_file) else [str(code_or_file)]),
        *arguments,
    ]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def reload_in_fresh_process(folder, jobs, *modules):
    """Save nothing, load ``folder/name`` for each ``(name, inputs)``, through all four Auto classes."""
    torch.save(jobs, folder / "inputs.pt")
    run_python(HERE / "reload.py", str(folder), str(folder / "inputs.pt"), str(folder / "result.pt"), *modules)
    return torch.load(folder / "result.pt", weights_only=False)


def check_round_trips(folder, made, *modules):
    """Save each ``name: (model, processor)`` and demand equal bits from a fresh process."""
    jobs, expected, kept = [], [], []
    for name, (model, processor) in made.items():
        inputs = own_memory(uneven_inputs(processor))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        own_memory(model)
        with torch.no_grad():
            logits = model(**inputs).logits
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        expected.append(
            (logits, model.generate(**inputs, max_new_tokens=4, do_sample=False), trainable, processor.tokens)
        )
        kept.append(weights(model))
        jobs.append((name, inputs))
    for (name, _), found, (logits, tokens, trainable, words), bits in zip(
        jobs, reload_in_fresh_process(folder, jobs, *modules), expected, kept, strict=True
    ):
        assert found["problems"] == {}, name
        assert len(found["weights"]) == 4 and all(x == bits for x in found["weights"]), name
        assert len(found["logits"]) == 4 and all(torch.equal(x, logits) for x in found["logits"]), name
        assert torch.equal(found["tokens"], tokens), name
        assert found["trainable"] == trainable, name
        assert found["processor_tokens"] == words


def site_without(place, names):
    """A folder that stands for the installed packages, those left out whose names hold one of the words."""
    if not place.exists():
        place.mkdir(parents=True)
        for path in map(Path, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
            for entry in path.iterdir():
                if not any(name in entry.name.lower() for name in names):
                    (place / entry.name).symlink_to(entry)
    return place
