"""The usage snippet of a model card: Python that runs as it is copied, with inputs that it makes itself."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers.image_processing_base import ImageProcessingMixin

from ..parts.adapters import unwrapped
from ..parts.known_encoders import encoder_type
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, PROJECTORS
from ..processing.own_processors import PrecomputedFeaturesProcessor, TimeSeriesProcessor
from ..processing.subprocessors import sampling_rate_of

INSTALL = "pip install git+https://github.com/cornstarch-org/cornstarch_hf"
OWN_MODULES = ("cornstarch_hf", "transformers", "torch", "peft", "builtins", "functools")


class Item(NamedTuple):
    """How a snippet makes an item of a modality: the values of a content part, and the import that they need."""

    values: dict[str, str]
    imports: str = ""


def _image(processor: Any, config: Any) -> Item:
    return Item({"image": 'Image.new("RGB", (320, 240), "red")'}, "from PIL import Image")


def _audio(processor: Any, config: Any) -> Item:
    rate = sampling_rate_of(processor)
    samples = min(rate or 16_000, getattr(processor, "n_samples", None) or rate or 16_000)
    wave = {"audio": f"np.sin(np.arange({samples}, dtype=np.float32) / 10)"}
    return Item(wave | ({"sampling_rate": str(rate)} if rate else {}), "import numpy as np")


def _video(processor: Any, config: Any) -> Item:
    frames = getattr(config, "num_frames", None) or getattr(processor, "num_frames", None) or 8
    rate = {"fps": "24"} if getattr(processor, "fps", None) else {}
    return Item({"video": f"np.zeros(({frames}, 240, 320, 3), dtype=np.uint8)"} | rate, "import numpy as np")


def _series(processor: TimeSeriesProcessor, config: Any) -> Item:
    length = processor.context_length or 4 * (processor.patch_length or 16)
    shape = f"({length}, {processor.num_channels})" if processor.num_channels else f"({length},)"
    return Item({"time": f"np.ones({shape}, dtype=np.float32)"}, "import numpy as np")


def _features(processor: PrecomputedFeaturesProcessor, config: Any) -> Item:
    return Item({"features": f"np.ones((4, {processor.feature_size}), dtype=np.float32)"}, "import numpy as np")


def _text(processor: Any, config: Any) -> Item:
    return Item({"text": _quoted(encoder_type(config).example_text or "Some text of its own.")})


ITEMS: dict[str, Callable[[Any, Any], Item]] = {
    "image": _image,
    "audio": _audio,
    "video": _video,
    "text": _text,
    "time": _series,
    "features": _features,
}
# Kinds of which only these processors tell what an item looks like.
_OWN_PROCESSORS = {"time": TimeSeriesProcessor, "features": PrecomputedFeaturesProcessor}


def usage_snippet(model: Any, processor: Any, repo_id: str, include_code: bool) -> str:
    """Python that loads a composed model and, where there is a processor, answers about one item of each modality.

    Args:
        model: a composed model.
        processor: its processor, or None if none is shared with it.
        repo_id: what the snippet loads.
        include_code: whether the checkpoint carries its code.
    """
    source = _quoted(repo_id) + (", trust_remote_code=True" if include_code else "")
    first = [] if include_code else [f"import cornstarch_hf  # {INSTALL}", *_own_code(model)]
    load = f"model = AutoModelForMultimodalLM.from_pretrained({source})"
    if processor is None:
        return "\n".join([*first, "from transformers import AutoModelForMultimodalLM", "", load, "model.describe()"])
    items = _items(model, processor)
    imports = sorted({item.imports for _, item in items if item.imports}, reverse=True)
    content = [_part({"type": _quoted(kind)} | item.values) for kind, item in items]
    return "\n".join(
        [
            *first,
            *imports,
            "from transformers import AutoModelForMultimodalLM, AutoProcessor",
            "",
            load,
            f"processor = AutoProcessor.from_pretrained({source})",
            "content = [",
            *(f"    {part}," for part in [*content, '{"type": "text", "text": "What is this?"}']),
            "]",
            'messages = [{"role": "user", "content": content}]',
            "inputs = processor.apply_chat_template(",
            '    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
            "output = model.generate(**inputs, max_new_tokens=32)",
            'print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def _items(model: Any, processor: Any) -> list[tuple[str, Item]]:
    """Types of content parts, each with an item for it."""
    found = []
    for key, name in _askable(model, processor).items():
        make = ITEMS[model.config.modality(name)["kind"]]
        found.append((key, make(processor.processors[name], getattr(model.config, f"{name}_config"))))
    return found


def _part(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{_quoted(key)}: {value}" for key, value in values.items()) + "}"


def _askable(model: Any, processor: Any) -> dict[str, str]:
    """A modality for each type of content part: by kind where one, or a group that shares its items, has it."""
    config = model.config
    left_out = unaskable(model, processor)
    found: dict[str, str] = {}
    for name in config.encoders:
        kind = config.modality(name)["kind"]
        same = config.modalities_of_kind(kind)
        together = len(same) == 1 or any(set(same) <= set(group) for group in config.share_inputs)
        # A part of the type "text" is the message's own.
        by_kind = together and kind != "text" and not set(same) & set(left_out)
        if name not in left_out:
            found.setdefault(kind if by_kind else name, name)
    return found


def unaskable(model: Any, processor: Any) -> list[str]:
    """Modalities of which a snippet can make no item: no processor, arguments of their own, or an unknown kind."""
    return [name for name, encoder in model.encoders.items() if not _makes(encoder, processor.processors.get(name))]


def _makes(encoder: Any, processor: Any) -> bool:
    if processor is None or encoder.additional_args or encoder.kind not in ITEMS:
        return False
    if encoder.kind == "video" and isinstance(processor, ImageProcessingMixin):
        return not hasattr(processor, "merge_size")  # which packs patches of images, and none of videos
    return isinstance(processor, _OWN_PROCESSORS.get(encoder.kind, object))


def _own_code(model: Any) -> Iterator[str]:
    """Imports of the user's own files, without which a checkpoint that does not carry them cannot be built."""
    needed: dict[str, list[str]] = {}
    for what, thing in own_parts(model).items():
        needed.setdefault(thing.__module__, []).append(what)
    for module, parts in needed.items():
        remark = f"defines {', '.join(parts)}; not part of this repository"
        words = module.split(".")
        importable = all(word.isidentifier() for word in words) and words[0] not in ("__main__", "transformers_modules")
        yield f"import {module}  # {remark}" if importable else f"# First run the code that {remark}."


def own_parts(model: Any) -> dict[str, Any]:
    """Classes and functions of a composed model that neither this package nor transformers define, by what they are."""
    found: dict[str, Any] = {}
    for part in (model.language_model, *(encoder.module for encoder in model.encoders.values())):
        found[f"the class {type(unwrapped(part)).__name__}"] = type(unwrapped(part))
    for name, encoder in model.encoders.items():
        projection = encoder.projector.config.projection_type
        if projection in PROJECTORS:
            found[f"the projection {projection!r}"] = PROJECTORS[projection]
        for callback in filter(None, encoder.callbacks.values()):
            target = getattr(callback, "func", callback)
            target = target if CALLBACKS.name_of(target) else type(target)
            if registered := CALLBACKS.name_of(target):
                found[f"the callback {registered!r}"] = target
        for key in (name, str(unwrapped(encoder.module).config.model_type)):
            if key in FEATURE_COUNTS:
                found[f"the feature count of {key!r}"] = FEATURE_COUNTS[key]
    return {what: thing for what, thing in found.items() if thing.__module__.split(".")[0] not in OWN_MODULES}


def adapter_snippet(base_id: str, repo_id: str) -> str:
    """Python that loads adapters around a composed model that lies in another repository."""
    return "\n".join(
        [
            f"import cornstarch_hf  # {INSTALL}",
            "from peft import PeftModel  # pip install peft",
            "from transformers import AutoModelForMultimodalLM, AutoProcessor",
            "",
            f"model = AutoModelForMultimodalLM.from_pretrained({_quoted(base_id)})",
            f"model = PeftModel.from_pretrained(model, {_quoted(repo_id)})",
            f"processor = AutoProcessor.from_pretrained({_quoted(base_id)})",
        ]
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
