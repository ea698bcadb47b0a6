"""PEFT-wrapped parts: see through the wrapper and its layers, and refuse what would not be saved with them.

peft is looked up and never imported: who has not imported it has no adapters.  `stored_adapters` describes and rebuilds them.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .names import modules_by_name, parameters_by_name
from .versions import check_peft

# Layers that hold adapters beside what they wrap, and what PEFT wraps whole models in.
ADAPTER_LAYERS, ADAPTER_CONTAINERS = ("BaseTunerLayer", "AuxiliaryTrainingWrapper"), ("BaseTuner", "PeftModel")


def peft_classes(*names: str) -> tuple[type, ...]:
    """Those of some classes of peft that are there; none, of which nothing is an instance, while peft is not imported."""
    # Another thread may be importing peft at the moment, and importing a part of it then would break both.
    modules = [sys.modules.get(file) for file in ("peft.peft_model", "peft.tuners.tuners_utils", "peft.utils.other")]
    return tuple(getattr(module, name) for name in names for module in modules if hasattr(module, name))


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model is a `peft.PeftModel`."""
    known: Any = sys.modules.get("peft.peft_model")  # asked at each step, of several parts: so not by `peft_classes`
    return isinstance(model, getattr(known, "PeftModel", ()))


def unwrapped(model: Any) -> PreTrainedModel:
    """The model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if is_wrapped(model) else model


def is_adapted(layer: nn.Module | None) -> bool:
    """Whether a layer computes with adapters, so that its `weight` is not all of it."""
    return isinstance(layer, peft_classes("BaseTunerLayer"))


def tuner_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that hold adapters."""
    return [module for module in model.modules() if is_adapted(module)]


def base_children(layer: nn.Module) -> list[nn.Module]:
    """Those children of an adapter layer that are, or hold, the module that it wraps."""
    wrapped = _wrapped_module(layer)
    return [child for child in layer.children() if any(module is wrapped for module in child.modules())]


def check_all_kept(model: nn.Module) -> None:
    """Refuse to train, under adapters around the whole model (if it has any), what would not be saved with them (ValueError).

    PEFT saves the adapters, and modules in `modules_to_save`; whatever else trains would be lost, a projector above all.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or "peft" not in sys.modules:
        return
    # Inside an adapter layer is what PEFT saves, but for the weights that it stands in front of.
    layers = [module for module in model.modules() if isinstance(module, peft_classes(*ADAPTER_LAYERS))]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    inside -= {id(p) for layer in layers for p in _wrapped_module(layer).parameters()}
    biases = any(getattr(config, "bias", "none") != "none" for config in configs.values())  # PEFT saves these then
    trains = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in inside]
    if lost := [name for name in trains if not (biases and name.endswith("bias"))]:
        raise ValueError(
            f"{len(lost)} parameters train ({lost[0]} first) that are not saved with the adapters around this model: name "
            'their modules in the adapter configuration, e.g. modules_to_save=["projector"], or freeze them before wrapping: '
            'model.freeze("vision_encoder.module", ...).'
        )


def _wrapped_module(layer: Any) -> nn.Module:
    """The module that an adapter layer wraps; inside of it there may be another such layer."""
    inner = getattr(layer, "original_module", None)
    inner = layer.get_base_layer() if inner is None and hasattr(layer, "get_base_layer") else inner
    return inner if isinstance(inner, nn.Module) else nn.Module()


def adapter_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that PEFT trains in a wrapped part as it is now: of the active adapters, unless they are off,
    with tokens, copies kept by `modules_to_save` and biases of the part itself."""
    if not is_wrapped(model):
        return set()
    tuner: Any = model.base_model
    off = any(layer.disable_adapters for layer in tuner_layers(model))
    before = [(p, p.requires_grad) for p in model.parameters()]
    # Each type of adapter has its own rule: PEFT itself marks what trains, as when it wraps, which is read off and put back.
    try:
        model.requires_grad_(False)
        tuner._mark_only_adapters_as_trainable(tuner.model)
        if not off:  # afterwards, as when it wraps: some types mark copies in `modules_to_save` as frozen
            tuner.set_requires_grad(tuner.active_adapters)
        return {name for name, p in parameters_by_name(model) if p.requires_grad}
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)


# ---- tensors that adapters bring along or stand in front of: names, ties, buffers that no checkpoint holds

_TOKEN_ROWS = "trainable_tokens_original"
_WRAPPED_AS = ("original_module", "token_adapter", "base_layer")  # where PEFT keeps what an adapter stands in front of


def current_name(model: nn.Module, name: str) -> str:
    """The present name of a weight that was called `name` before adapters were put in front of its module."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return name
    # "head.weight" is "head.base_layer.weight" behind LoRA, and one level deeper behind each further wrapper.
    while module._parameters.get(key) is None:
        inner = next((w for w in _WRAPPED_AS if module._modules.get(w) is not None), None)
        if inner is None:
            return name
        module, path = module.get_submodule(inner), f"{path}.{inner}"
    return f"{path}.{key}"


def shared_by_adapters(model: nn.Module) -> dict[str, str]:
    """Tensors that several layers of wrapped parts share (VeRA's projections, tied layers): ``{name: first name}``."""
    shared: dict[str, str] = {}
    kinds = peft_classes("PeftModel")
    for prefix, part in [(name, module) for name, module in modules_by_name(model) if isinstance(module, kinds)]:
        first: dict[int, str] = {}
        # The tensors themselves and no views of them: they are told apart by identity.
        for name, tensor in part.state_dict(prefix=f"{prefix}." if prefix else "", keep_vars=True).items():
            if first.setdefault(id(tensor), name) != name:
                shared[name] = first[id(tensor)]
    return shared


def adapter_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of adapters that no checkpoint holds: tables and projections made when the adapter is."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in model.named_modules():
        if is_wrapped(part):
            saved = part.state_dict().keys()
            lost = [(name, buffer) for name, buffer in part.named_buffers() if name not in saved]
            found |= {f"{prefix}.{name}": buffer for name, buffer in lost if _of_an_adapter(part, name)}
    return found


def _of_an_adapter(part: Any, name: str) -> bool:
    # PEFT keeps an adapter's tensors under its name: `lora_A.default.weight`.
    owner, *_ = name.rpartition(".")
    return is_adapted(part.get_submodule(owner)) or not set(part.peft_config).isdisjoint(name.split("."))


def check_buffers_restorable(made: nn.Module) -> None:
    """Refuse adapters of a model built without weights whose unsaved buffers cannot be made again (VeRA; ValueError)."""
    # A buffer that is real was computed while its adapter was made, as loading will; `restore_token_rows` fills the rest.
    if lost := [n for n, b in adapter_buffers(made).items() if b.is_meta and _TOKEN_ROWS not in n.split(".")]:
        configs = [config for part in made.modules() if is_wrapped(part) for config in part.peft_config.values()]
        # Some types have an option that saves what they drew.
        options = sorted(
            {key for config in configs for key in vars(config) if key in ("save_projection", "save_indices")}
        )
        option = f"use {options[0]}=True in the adapter configuration, or " if options else ""
        raise ValueError(
            f"A checkpoint would not hold the buffers {lost[:2]} ({len(lost)}) that adapters need, and loading cannot make "
            f"them again: {option}merge_and_unload() the part before saving, or wrap the composed model: "
            "get_peft_model(mllm, config)."
        )


def restore_token_rows(model: nn.Module) -> None:
    """Fill the rows that adapters of single tokens keep of the embeddings, to unmerge them (in place)."""
    for layer in tuner_layers(model):
        for name, rows in getattr(layer, _TOKEN_ROWS, {}).items():
            if name not in layer.merged_adapters:
                rows.copy_(layer.get_base_layer().weight.data[layer.token_indices[name]])


def _written_by_peft(model: nn.Module, name: str) -> set[str]:
    """Names of the tensors that PEFT writes for an adapter of a model, whatever it calls them in its file."""
    peft: Any = sys.modules["peft"]  # imported by now: transformers has put the adapter on
    state = model.state_dict()
    written = {
        id(value) for value in peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=name).values()
    }
    return {key for key, value in state.items() if id(value) in written}


class WholeAdaptersMixin(PreTrainedModel):
    """Adapters around a whole composed model, beside none around its parts."""

    # `get_peft_model` sets `peft_config`, and PEFT and Trainer take `hasattr(model, "peft_config")` for "has adapters":
    # hence a property that checks when it is set, and does not exist before.
    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations of adapters around the whole model, by name; there is none before one is added."""
        if "_whole_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["_whole_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        self._check_no_wrapped_part()
        self.__dict__["_whole_peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_whole_peft_config", None)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; ValueError where a part has adapters of its own, or PEFT is too old for transformers."""
        self._check_no_wrapped_part()
        check_peft("add_adapter")
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which `AutoModel.from_pretrained` calls for a folder of adapters; ValueError where a part has
        adapters of its own, PEFT is too old for transformers, or transformers would not load all of them as they were saved."""
        self._check_no_wrapped_part()
        name = kwargs.get("adapter_name") or (args[0] if args else None) or "default"
        where = f"{peft_model_id}: " if peft_model_id is not None else ""
        check_peft(f"{where}load_adapter")
        remedy = (
            f"Remedy: PEFT's own loader, AutoPeftModelForCausalLM.from_pretrained({str(peft_model_id or '...')!r}), or "
            "PeftModel.from_pretrained(model, folder)."
        )
        known = name in self.__dict__.get("_whole_peft_config", ())
        try:
            loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        except ValueError as error:
            if known:  # nothing is wrong with the adapters
                raise
            raise ValueError(f"{where}transformers does not load these adapters: {error} {remedy}") from error
        missing = set(getattr(loaded, "missing_keys", None) or ())
        if lost := sorted(missing & _written_by_peft(self, name)):
            raise ValueError(
                f"{where}transformers does not find {len(lost)} tensors of these adapters in their file ({lost[:2]}), where "
                f"PEFT writes them by other names, and they would be random. {remedy}"
            )
        if missing:  # made with the adapters, and never in a file: AdaLoRA's `ranknum`
            loaded.missing_keys -= missing
        return loaded

    def _check_no_wrapped_part(self) -> None:
        # PEFT would leave trainable what its adapters around the whole do not hold, those around a part too.
        if wrapped := sorted(name for name, part in self._parts().items() if is_wrapped(part)):
            raise ValueError(
                f"{wrapped} of this {type(self).__name__} are wrapped by PEFT already, and adapters around the whole would "
                "leave the rest trainable without saving it. Build the model again, and either add an adapter to a part, "
                "model.language_model.add_adapter(name, config), or merge the parts first, "
                "model.language_model = model.language_model.merge_and_unload()."
            )
