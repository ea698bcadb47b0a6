"""transformers' own tests of processors, for composed ones: its mixin, and what stands for the class of a processor.

The mixin is of the sdist, which `make` unpacks beside the packages of the environment (`FILE`); nothing of it is copied here.
"""

import importlib.util
import inspect
import sys
import unittest
from pathlib import Path
from typing import Any

import transformers
from helpers import compose_tiny

from cornstarch_hf import MultimodalProcessor

FILE = Path(sys.prefix, f"transformers-{transformers.__version__}", "tests", "test_processing_common.py")
NAMES = {"image_processor": "vision", "feature_extractor": "audio"}  # transformers' name of a part -> the modality's
ARGUMENTS = {"vision": "images", "audio": "audio"}


def mixin():
    """transformers' `ProcessorTesterMixin`."""
    spec = importlib.util.spec_from_file_location("transformers_test_processing_common", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ProcessorTesterMixin


def names_of_tests(base):
    """Names of its tests, without those that are there only as the names of several with numbers behind them."""
    names = [name for name in dir(base) if name.startswith("test_") and getattr(base, name) is not None]
    return [name for name in names if not any(other.startswith(f"{name}_0") for other in names)]


def told(modalities):
    """A processor whose calls say what the mixin does not: the rate of sounds, and by their signature which kinds there are.

    That is transformers' own contract: `__call__` names, with a type, what it takes, and the mixin's options for sampling frames
    are none of a processor's without videos, so they are left out.
    """

    class ToldProcessor(MultimodalProcessor):
        def __call__(self, *args, **kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k not in ("num_frames", "fps")}
            if kwargs.get("audio") is not None and "sampling_rate" not in kwargs.get("audio_kwargs", {}):
                kwargs["sampling_rate"] = 16_000
            return super().__call__(*args, **kwargs)

    kept = {"text", "kwargs", *(ARGUMENTS[name] for name in modalities)}
    signature = inspect.signature(MultimodalProcessor.__call__)
    parameters = [p.replace(annotation=Any) for name, p in signature.parameters.items() if name in kept | {"self"}]
    ToldProcessor.__call__.__signature__ = signature.replace(parameters=parameters)
    return ToldProcessor


class ProcessorClass:
    """Stands for a processor's class: makes processors of one composition from parts under transformers' names."""

    def __init__(self, cls, modalities):
        self.cls, self.modalities, self.model_config = cls, modalities, None
        # The mixin looks at the signatures of the class, whose instance this is for Python.
        self.__dict__ |= {name: getattr(cls, name) for name in ("__init__", "__call__", "__name__", "__mro__")}

    def __call__(self, tokenizer, chat_template=None, **parts):
        processors = {NAMES[name]: part for name, part in parts.items()}
        return self.cls(tokenizer, processors, config=self.model_config, chat_template=chat_template)

    def get_attributes(self):
        return ["tokenizer", *(part for part, name in NAMES.items() if name in self.modalities)]

    def __getattr__(self, name):
        return getattr(self.cls, name)

    def __repr__(self):
        return f"a processor of {self.modalities}"


def case_of(base, encoders, is_told):
    """The mixin as a test case for a composition: with the bare processor, or one that is `told` what the mixin leaves out."""
    _, processor = compose_tiny(encoders)
    modalities = list(processor.processors)

    class Case(base, unittest.TestCase):
        processor_class = ProcessorClass(told(modalities) if is_told else MultimodalProcessor, modalities)

        @classmethod
        def _setup_from_components(cls):
            return processor

        @classmethod
        def setUpClass(cls):
            super().setUpClass()
            cls.processor_class.model_config = MultimodalProcessor.from_pretrained(cls.tmpdirname).config

    return Case
