"""The parts of a model built again from its configuration, with fresh weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..configuration_multimodal import MultimodalConfig
from ..configuration_projector import MultimodalProjectorConfig
from ..language_model.refusals import check_language_model
from ..parts.classes import language_model_class, resolve_class
from ..parts.known_encoders import check_facts_registered
from ..parts.registries import STEPS
from ..parts.stored_adapters import wrap_again
from ..parts.stored_errors import build_part, explained
from ..parts.stored_modules import SLOTS, build_callback
from ..projectors.projector import MultimodalProjector
from .module import ModalEncoderModule


def build_encoder(
    config: MultimodalConfig, name: str, others: Mapping[str, ModalEncoderModule] | None = None
) -> ModalEncoderModule:
    """Build one encoder with its projector and callbacks; ValueError for an unknown class, callback or encoder type.

    What it shares is that of one of the `others`, or of one that is built for it where they are None.
    """
    # First: a type that was registered when this was saved must be registered here too.
    check_facts_registered(config.encoder_types)
    entry, encoder_config = config.modality(name), getattr(config, f"{name}_config")
    lenders = {
        lender: build_encoder(config, lender) if others is None else others[lender]
        for lender in set(entry["shares"].values())
    }
    if (lender := entry["shares"].get("module")) is None:
        cls: Any = resolve_class(entry["encoder_class"], encoder_config, name)
        module = build_part(cls, encoder_config, entry["encoder_kwargs"], f"{name}_encoder", f"{name}_config")
        # Adapters go around the encoder before weights are loaded, whose names they change.
        with explained(f"adapters of {name}_encoder.module"):
            module = wrap_again(module, config.adapters_of(f"{name}_encoder.module"), name)
    else:
        module = lenders[lender].module
    if unknown := sorted(set(entry["callbacks"]) - set(SLOTS)):
        raise ValueError(f"{name}: unknown callback places {unknown}, expected some of {list(SLOTS)}.")
    projector = None
    if "projector" not in entry["shares"]:
        projector = _projector(getattr(config, f"{name}_projector_config"), f"{name}_projector_config")
    keys = ("kind", "layer", "output", "drop_prefix", "data_format", "trim", "layer_features", "merge", "marks")
    with explained(f"{name}_modality"):
        options: Any = {slot: build_callback(d, f"{name}.{slot}") for slot, d in entry["callbacks"].items()}
        options |= {key: entry[key] for key in keys}
        encoder = ModalEncoderModule(module, projector, entry["additional_args"], **options)
    encoder.shares_with = next(iter(entry["shares"].values()), None)
    encoder.name = name  # messages would else name it by its kind
    complete_marks(encoder)
    for part, lender in entry["shares"].items():
        encoder.share(part, lender, lenders[lender])
    return encoder


def _projector(config: MultimodalProjectorConfig, where: str) -> MultimodalProjector:
    with explained(where):
        projector = MultimodalProjector(config)
        if projector.projection is None:
            sizes = f"in_features={config.in_features} and out_features={config.out_features}"
            raise ValueError(
                f"it says {sizes}, expected the widths of the encoder's and the language model's features."
            )
        return projector


def build_language_model(config: MultimodalConfig) -> nn.Module:
    """Build the language model, its adapters wrapped again."""
    text: Any = config.text_config
    name = config.language_model_class
    cls: Any = language_model_class(text) if name is None else resolve_class(name, text, "language_model")
    if cls is None:
        raise ValueError(f"transformers has no causal language model for {type(text).__name__}.")
    model = build_part(cls, text, config.language_model_kwargs or {}, "language_model", "text_config")
    check_language_model(model, masked=bool(config.mask))
    with explained("adapters of language_model"):
        return wrap_again(model, config.adapters_of("language_model"), "language_model")


def build_parts(config: MultimodalConfig) -> tuple[dict[str, ModalEncoderModule], nn.Module]:
    """Build what a configuration describes, with fresh weights; ValueError for an empty one or an unknown class or callback."""
    if config.text_config is None:
        raise ValueError(
            "This MultimodalConfig is empty: it has no text_config, so there is no language model to build. Compose one by "
            "MultimodalModel(encoders=..., language_model=...) or compose(...)."
        )
    encoders: dict[str, ModalEncoderModule] = {}
    for name in config.encoders:
        encoders[name] = build_encoder(config, name, encoders)
    if config.joined:
        STEPS["join"].connect(config.share_inputs, encoders)
    return encoders, build_language_model(config)


def connect(encoders: Mapping[str, Any]) -> None:
    """Have encoders that use parts of others, or run them, find the ones that are there now (in place)."""
    for encoder in encoders.values():
        for part, (name, _) in encoder._lenders.items():
            encoder._lenders[part] = name, encoders[name]
        for name in getattr(encoder.join, "others", ()):
            encoder.join.others[name] = encoders[name]


def complete_marks(encoder: ModalEncoderModule) -> None:
    """Give an encoder with marks a table of learnt tokens beside its projector (in place), where that has none."""
    marks, projector = encoder.merging["marks"], encoder.projector
    if marks and getattr(projector.projection, "mark_table", None) is None and not hasattr(encoder, "mark_table"):
        weight = next(projector.parameters(), None)
        options: dict = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
        encoder.mark_table = nn.Embedding(max(marks.values()) + 1, projector.config.out_features, **options)
