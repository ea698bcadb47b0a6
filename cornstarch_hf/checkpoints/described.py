"""Whether live parts are what the configuration describes: others would be saved under it, and loaded as something else.

`storage` asks before it saves, and the composed model where a part is put in the place of one.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..parts.classes import language_model_class

# What a configuration says of how a model was loaded or runs, and not of what it is.
_RUNS = frozenset([
    "_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "transformers_version",
    "transformers_weights", "use_cache",
])  # fmt: skip
# What an entry of the configuration holds, as attributes of encoders.
_SETTINGS = ("kind", "selection", "trim", "additional_args", "merging")


def same_settings(config: Any, other: Any) -> bool:
    """Whether two configurations describe one model, wherever it was loaded from and however it is quantized."""
    return config is other or (type(config) is type(other) and _what_it_is(config) == _what_it_is(other))


def _what_it_is(config: Any) -> Any:
    values = config if isinstance(config, dict) else config.to_dict()
    return {k: _what_it_is(v) if isinstance(v, dict) else v for k, v in values.items() if k not in _RUNS}


def check_replaced(config: Any, parts: Mapping[str, Any]) -> None:
    """ValueError where a part, by its attribute's name, is another model than the configuration of the whole describes, and
    TypeError where it is no encoder.

    The same model may be wrapped, merged, quantized or compiled, and one of its class and settings may be there; the latter's
    configuration takes the place of the one described.
    """
    for name, part in parts.items():
        key, cls, inner = "text_config", config.language_model_class, part
        if (modality := name.removesuffix("_encoder")) in config.encoders:
            entry = config.modality(modality)
            if not hasattr(part, "selection"):
                raise TypeError(
                    f"{name} must be a ModalEncoderModule, got {type(part).__name__}: put a tower in model.{name}.module."
                )
            owner = config.joined.get(modality, modality if modality in config.joined.values() else None)
            if owner != getattr(getattr(part, "join", None), "owner", None):
                raise ValueError(
                    f"{name}: its features are joined in the group of {owner!r}, and this one is in another or in none: put a "
                    f"tower in model.{name}.module, or a copy.deepcopy of what was there."
                )
            if "module" in entry["shares"]:
                continue
            key, cls, inner = f"{modality}_config", entry["encoder_class"], getattr(part, "module", part)
        described: Any = getattr(config, key)
        cls = cls or getattr(language_model_class(described), "__name__", "")
        # Whatever wraps a model (PEFT, torch.compile, FSDP) holds it, and FSDP's classes are of classes of theirs.
        below = inner.modules() if isinstance(inner, nn.Module) else ()
        found: Any = next((x for x in below if isinstance(x, PreTrainedModel)), inner)
        named = cls.rpartition(".")[2] in [base.__name__ for base in type(found).__mro__]
        if not named or not same_settings(found.config, described):
            raise ValueError(
                f"{name}: {type(found).__name__} is another model than the one that was composed, whose sizes, inputs and "
                f"placeholders the configuration describes: exchange it by replace(model, processor, {modality}=...), or "
                "compose anew, MultimodalModel(encoders=model.encoders, language_model=model.language_model) with it there."
            )
        bare = key != "text_config" and part.projector is None and modality not in config.joined
        if bare and "projector" not in config.modality(modality)["shares"]:
            raise ValueError(f"{name} has no projector: ModalEncoderModule(tower, model.{name}.projector).")
        setattr(config, key, found.config)  # what is set in the one is to be set in the other


def check_projector(config: Any, name: str, projector: Any) -> None:
    """Refuse what is no projector (TypeError), and one of other sizes than the modality's that was composed (ValueError)."""
    where, described = f"{name}_encoder.projector", getattr(config, f"{name}_projector_config")
    if not hasattr(projector, "check_storable"):
        raise TypeError(
            f"{where} must be a MultimodalProjector, got {type(projector).__name__}: wrap it, MultimodalProjector("
            "MultimodalProjectorConfig(), projection=module)."
        )
    for size in ("in_features", "out_features"):
        got, composed = getattr(projector.config, size), getattr(described, size)
        if got != composed and None not in (got, composed):
            raise ValueError(
                f"{where} has {size}={got}, and the one that was composed {composed}: put one of that size there, or exchange "
                f"what it stands between by replace(model, processor, {name}=...)."
            )


def check_settings(encoders: Any, described: Any) -> None:
    """ValueError where encoders have other settings than those that the configuration builds, by name."""
    for name, encoder in encoders.items():
        for key in _SETTINGS:
            got, composed = (getattr(each, key) for each in (encoder, described[name]))
            if got != composed:
                raise ValueError(
                    f"{name}_encoder: its {key} is {got!r:.200}, but {composed!r:.200} was composed: change it by "
                    f"replace(model, processor, {name}={{...}}), which makes a new model."
                )
