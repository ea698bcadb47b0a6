"""save_ultravox(): the files of an Ultravox checkpoint, which vLLM and llama.cpp read, of Whisper and any language model.

transformers has no class of it: names of settings and tensors are those of https://github.com/fixie-ai/ultravox.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoints.finding import CONFIG
from ..checkpoints.folder_swap import replaced_atomically
from ..checkpoints.storage import sync_config
from ..encoders.building import modality_entry
from ..modeling_multimodal import MultimodalModel
from ..parts.adapters import is_wrapped
from ..processing_multimodal import MultimodalProcessor
from .keys import path_of
from .refusals import projector_options

_TYPE, _WEIGHTS, _PROCESSOR = "ultravox", "model", "processor_config.json"
# What its tower gives and its projector computes, as entries and options of ours.
_SELECTED = {
    "kind": "audio", "layer": -1, "output": None, "drop_prefix": 0, "additional_args": [], "layer_features": None,
    "merge": None, "marks": {},
}  # fmt: skip
_PROJECTED = {
    "projection_type": "frame_stack", "activation": "silu", "num_layers": 2, "gated": True, "bias": False, "norm": "rms_norm",
    "remainder": "pad",
}  # fmt: skip
# (norm_mid, norm_post) of ours -> projector_ln_mid: as since version 0.5, and as until 0.4.1
_NORMS = {("rms_norm", "none"): True, ("none", "rms_norm"): False}
_EPS = 1e-6
RECIPE = (
    "projector={'projection_type': 'frame_stack', 'stack_factor': 8, 'gated': True, 'activation': 'silu', 'norm': 'rms_norm', "
    "'norm_mid': 'rms_norm'}"
)


def save_ultravox(
    model: MultimodalModel, processor: Any, folder: str | os.PathLike, *, code: str | None = None
) -> None:
    """Write a composition of a Whisper encoder and a language model as an Ultravox checkpoint.

    Its projector stacks frames, ``rms_norm → linear → SwiGLU → rms_norm → linear`` without biases (norms as since version 0.5;
    ``norm_post`` instead of ``norm_mid`` is version 0.4's, which vLLM alone reads).  Features equal the composition's for
    windows that are full of sound: Ultravox does not attend to the rest of a window that sound does not fill, and Whisper does.

    Args:
        model: the composition.
        processor: its `MultimodalProcessor`, whose tokenizer and feature extractor are written; None for neither.
        folder: is made, and an Ultravox checkpoint in it is replaced.
        code: id of a repository on the Hub whose code processes sounds for those who load the folder with
            ``trust_remote_code=True``, e.g. that of any public Ultravox: vLLM needs it.  Nothing of it is loaded here.

    Raises:
        ValueError: a composition that Ultravox computes otherwise, with the reason and the remedy.
        TypeError: no composed model; `code` that is no text.
        OSError: as of other saves; what was in the folder is still there.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"save_ultravox takes a MultimodalModel, got {type(model).__name__}.")
    if code is not None and not isinstance(code, str):
        raise TypeError(f"code must be the id of a repository, got {code!r:.100}.")
    if not isinstance(processor, (MultimodalProcessor, type(None))):
        raise TypeError(f"processor must be a MultimodalProcessor or None, got {type(processor).__name__}.")
    name, options = _checked(model)
    written = {CONFIG, _PROCESSOR, "generation_config.json"}
    with replaced_atomically(folder, CONFIG, lambda file: file in written or file.startswith(f"{_WEIGHTS}.")) as place:
        _write_json(place, CONFIG, _config(model, name, options, code))
        tensors = {key: _alone(x) for key, x in _tensors(model, name).items()}
        save_torch_state_dict(tensors, place, filename_pattern=f"{_WEIGHTS}{{suffix}}.safetensors")
        if model.generation_config is not None:
            model.generation_config.save_pretrained(place)
        if processor is not None:
            processor.tokenizer.save_pretrained(place)
            processor.processors[name].save_pretrained(place)
            _write_json(place, _PROCESSOR, _processor_config(processor.processors[name], options, code))


def _checked(model: MultimodalModel) -> tuple[str, dict[str, Any]]:
    """The encoder's name and its projector's options, of a composition that Ultravox computes (else ValueError)."""
    if wrapped := [name for name, part in model._parts().items() if is_wrapped(part)]:
        raise ValueError(f"{wrapped} has adapters: merge them (merge_and_unload()), and write what is left.")
    sync_config(model, model.config, model.encoders, model.language_model)
    if len(model.encoders) != 1:
        raise ValueError(f"Ultravox has one encoder, this composition has {list(model.encoders)}: compose with one.")
    ((name, encoder),) = model.encoders.items()
    if type(encoder.module).__name__ != "WhisperEncoder":
        raise ValueError(
            f"{name}: Ultravox has a WhisperEncoder, got {type(encoder.module).__name__}: compose with one."
        )
    callbacks = [slot for slot, callback in encoder.callbacks.items() if callback is not None]
    rules = [key for key in ("positions", "mask") if getattr(model.config, key, None)]
    if callbacks or rules:
        raise ValueError(f"{name}: Ultravox has no {[*callbacks, *rules]}: compose without.")
    options = projector_options(encoder.projector.config)
    _demand(name, modality_entry(encoder), _SELECTED, "")
    _demand(name, options, _PROJECTED, "projector's ")
    if (norms := (options["norm_mid"], options["norm_post"])) not in _NORMS or options["norm_eps"] not in (None, _EPS):
        raise ValueError(
            f"{name}: its projector has norm_mid={norms[0]!r}, norm_post={norms[1]!r} and norm_eps={options['norm_eps']!r}; "
            f"one of the two is 'rms_norm' in Ultravox, with norm_eps={_EPS}: compose with {RECIPE}."
        )
    if model.config.modality(name)["token_id"] is None:
        raise ValueError(
            f"{name} has no id of placeholders: model.set_modality_token_ids({{{name!r}: id}}), or compose()."
        )
    dtypes = {str(x.dtype) for x in model.parameters() if x.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"Its parts have the dtypes {sorted(dtypes)}, and Ultravox is loaded in one: model.to(dtype).")
    return name, options


def _demand(name: str, found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """ValueError for the first value that is another one."""
    for key, want in expected.items():
        if found.get(key) != want:
            raise ValueError(
                f"{name}: its {what}{key} is {found.get(key)!r:.200}, Ultravox computes what it does with {want!r}: compose "
                f"with {RECIPE}, the last layer and every token."
            )


def _tensors(model: MultimodalModel, name: str) -> dict[str, Tensor]:
    """Its tensors by Ultravox's names."""
    encoder, text = model.encoders[name], model.language_model
    head = encoder.projector.projection.head
    projector = {"ln_pre": head.norm, "linear_1": head.linear_1, "linear_2": head.linear_2}
    projector |= {"ln_mid": head.norm_mid, "ln_post": head.norm_post}
    found = {f"audio_tower.{key}": x for key, x in encoder.module.state_dict().items()}
    for place, module in projector.items():
        found |= {f"multi_modal_projector.{place}.{key}": x for key, x in module.state_dict().items()}
    own = text.state_dict()
    if text.get_output_embeddings().weight is text.get_input_embeddings().weight:  # told by its configuration
        own.pop(f"{path_of(text, text.get_output_embeddings())}.weight")
    # By the names of its public checkpoints, and not those of transformers' modules (experts are joined in these).
    return found | {f"language_model.{key}": x for key, x in revert_weight_conversion(text, own).items()}


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without others in its memory, of which experts that are joined in a module's have some."""
    tensor = tensor.detach().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _config(model: MultimodalModel, name: str, options: dict[str, Any], code: str | None) -> dict[str, Any]:
    """Ultravox's configuration, as JSON values."""
    encoder, text = model.encoders[name], model.language_model
    audio, language = (copy.deepcopy(part.config) for part in (encoder.module, text))
    language.tie_word_embeddings = text.get_output_embeddings().weight is text.get_input_embeddings().weight
    audio.architectures, language.architectures = ["WhisperEncoder"], [type(text).__name__]
    kept = {"audio_config": audio.to_dict(), "text_config": language.to_dict()}
    remote = {"AutoConfig": "ultravox_config.UltravoxConfig", "AutoModel": "ultravox_model.UltravoxModel"}
    remote |= {"AutoProcessor": "ultravox_processing.UltravoxProcessor"}
    dtype = str(text.dtype).removeprefix("torch.")
    return {
        "architectures": ["UltravoxModel"], "model_type": _TYPE, **kept,
        "audio_model_id": None, "text_model_id": None,
        "audio_token_index": model.config.modality(name)["token_id"],
        "hidden_size": encoder.projector.projection.head.linear_1.out_features,  # values and gates
        "stack_factor": options["stack_factor"], "projector_act": "swiglu", "num_projector_layers": 0,
        "projector_ln_mid": _NORMS[options["norm_mid"], options["norm_post"]],
        "norm_init": 0.4, "ignore_index": -100, "vocab_size": language.vocab_size, "dtype": dtype, "torch_dtype": dtype,
        **({"auto_map": {key: f"{code}--{value}" for key, value in remote.items()}} if code else {}),
    }  # fmt: skip


def _processor_config(extractor: Any, options: dict[str, Any], code: str | None) -> dict[str, Any]:
    told = {"processor_class": "UltravoxProcessor", "stack_factor": options["stack_factor"]}
    told |= {"encoder_ds_factor": 2 * extractor.hop_length}  # samples of a frame, after a stride of 2
    remote = {"AutoProcessor": f"{code}--ultravox_processing.UltravoxProcessor"}
    return (
        told | {"audio_padding": "longest", "audio_placeholder": "<|audio|>"} | ({"auto_map": remote} if code else {})
    )


def _write_json(folder: str, name: str, values: dict[str, Any]) -> None:
    Path(folder, name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
