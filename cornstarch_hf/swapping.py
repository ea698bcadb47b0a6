"""replace(): a composition in which some parts are others, and its processor; new ones are loaded as by `assembly`."""

import copy
import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .assembly import (
    HUB_KEYS,
    MODEL_KEYS,
    check_causal,
    check_loads,
    find_processor,
    load_encoder,
    load_language_model,
    made_encoder,
    note_commit,
    set_trim,
    tokenizer_of,
)
from .composition import check_encoders, share_parts, take_checkpointing, twins
from .configuration_multimodal import MultimodalConfig
from .encoders.building import SELECTED, encoder_specs, is_path, make_projector, modality_entry
from .encoders.module import ModalEncoderModule
from .encoders.tiles import PackedTiles
from .language_model.refusals import check_language_model
from .language_model.supported import embedding_width
from .modeling_multimodal import MultimodalModel
from .parts.adapters import is_wrapped
from .parts.freezing import frozen_patterns
from .parts.registries import check_steps, valid_groups
from .processing_multimodal import MultimodalProcessor
from .swap_checks import (
    RULES,
    check_given,
    chosen_names,
    exchanged_parts,
    inherited,
    keeps_projector,
    projector_anew,
    sort_keywords,
    source_in,
    text_spec,
)

logger = logging.getLogger(__name__)


def replace(
    model: MultimodalModel,
    processor: MultimodalProcessor | None = None,
    *,
    language_model: Any = None,
    encoders: Mapping[str, Any] | None = None,
    projector: str | Mapping[str, Any] | None = None,
    tokens: Mapping[str, str] | None = None,
    rules: Mapping[str, Any] | None = None,
    share_inputs: Sequence[Sequence[str]] | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **named: Any,
) -> tuple[MultimodalModel, MultimodalProcessor | None]:
    """Exchange, add or remove parts of a composition: gives a new model and a new processor.

    The model given stays as it is.  Parts that are kept have modules, configurations and parameters of their own in the new
    one, and share its tensors, as in `from_native`: training the one trains the other (give a `copy.deepcopy` to keep it).

    Kept are the selection, callbacks, kind and name of an encoder, freezing, `share_inputs`, `loss_at_labels` and rules of
    positions and masks, as far as they fit; what may not fit raises.  Encoders that are joined stay or go
    together.  A projector is kept where its widths fit; else one of its type is made anew.  What then has to be trained is
    logged as one warning.  `config.native` goes: the result is no native model.

    Args:
        model: a composed model.
        processor: its processor.  None gives None back, and what it would have done is to be done by hand: the ids of
            placeholders set by `model.set_modality_token_ids` where the language model or a modality is new, and a tokenizer.
        language_model: a Hub id, a path or a live causal language model; or a dict with `model` and any of `tokenizer`,
            `chat_template`, `revision`, `subfolder`, `dtype`, `attn_implementation`.  Its tokenizer, chat template and
            generation configuration come with it; placeholders keep their names and get the ids of that tokenizer.
        encoders: by name, what `compose` takes for an encoder: exchanges the encoder of that name, or adds one.  A dict without
            `model` keeps the encoder and changes what it says (``{"projector": "mlp"}``).  None removes the encoder.
        projector: type of the projectors that are made anew; by default that of the one before, ``"linear"`` where none was.
        tokens: placeholder tokens by encoder name, where others are wanted.
        rules: ``{"positions": ..., "mask": ...}`` in place of the model's, None for no rule.
        share_inputs: groups of encoders that see the same items, in place of the model's.
        dtype, device_map, attn_implementation, trust_remote_code: for loading, as in `compose`; nothing is moved.
        **named: encoders by their names, like those in `encoders`; further options of loading that `compose` takes.

    Returns:
        ``(model, processor)``, the model in the mode of the one given.

    Raises:
        TypeError: an unknown keyword or key, a source of a wrong type; no composed model.
        ValueError: what does not fit, with the reason; adapters around the whole or a part that would be lost; a quantized or
            spread model; an option that nothing would do; whatever `compose` refuses.
        OSError, ImportError: a part that cannot be loaded, named.
    """
    options = {"projector": projector, "tokens": tokens, "rules": rules, "share_inputs": share_inputs}
    common = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    given, more = sort_keywords(model, encoders, named, options | common, _keywords())
    hub = {k: v for k, v in more.items() if k in HUB_KEYS} | {"trust_remote_code": trust_remote_code}
    common = {k: v for k, v in (common | more).items() if v is not None and k not in HUB_KEYS}
    text = text_spec(language_model)
    check_given(model, processor, given, text, options)
    swap = _Swap(model, processor, given, text)
    specs = encoder_specs(swap.wanted(), projector or "linear", None)
    masked = bool((rules or {}).get("mask", model.config.mask))
    tokenizer, live = swap.load_text(specs, masked, hub, common)
    found = swap.make_encoders(specs, live, projector, hub, common)
    made = swap.compose(live, dict(rules or {}), share_inputs)
    note_commit((made.config.origins or {}).get("language_model"), text or {"model": None}, hub)
    if processor is not None:
        template = processor.chat_template if text is None else text.get("chat_template")
        names = {n: token for n, token in processor.tokens.items() if n in swap.encoders} | dict(tokens or {})
        processor = MultimodalProcessor(tokenizer, found, model=made, tokens=names, chat_template=template)
        for name, spec in specs.items():
            if not isinstance(spec["model"], ModalEncoderModule):  # which its author set
                set_trim(name, spec.get("trim"), made, processor)
        check_steps(made)  # some look at the ids of placeholders
    swap.finish(made)
    return made, processor


def _keywords() -> list[str]:
    """What `replace` takes by keyword and is no encoder."""
    return [*list(inspect.signature(replace).parameters)[2:-1], *HUB_KEYS, *MODEL_KEYS]


class _Swap:
    """One exchange: twins of the parts of the model given, and the encoders of the new one as they come about."""

    def __init__(self, model: MultimodalModel, processor: Any, given: Mapping[str, Any], text: dict[str, Any] | None):
        self.model, self.processor, self.given, self.text = model, processor, given, text
        self.kept = [name for name in model.config.encoders if name not in given]
        # What the caller took from the model is part of the copy too, so that it is shared there as it was here.
        sources = {f"{name}/given": source_in(spec) for name, spec in given.items()} | {"text/given": source_in(text)}
        own = {id(p) for p in model.parameters()}
        taken = {key: x for key, x in sources.items() if _is_of(x, own, model.encoders)}
        callbacks = [x for e in model.encoders.values() for x in e.callbacks.values() if not isinstance(x, nn.Module)]
        parts = {**model.encoders, "language_model": model.language_model, **taken}
        made = twins(parts, [x for x in callbacks if x is not None])
        self.taken = {key.removesuffix("/given"): made.pop(key) for key in taken}
        self.language_model = made.pop("language_model")
        self.old: dict[str, ModalEncoderModule] = made
        for name, chosen in chosen_names(self.old, self.language_model, model.config).items():
            self.old[name].input_names = chosen  # which a model that was loaded does not know
        self.encoders: dict[str, ModalEncoderModule] = {}
        self.bare: set[str] = set()  # encoders that came without a projector
        self.untrained: list[str] = []
        self.moved: list[str] = []  # projectors that have another neighbour now

    def wanted(self) -> dict[str, Any]:
        """What is said of encoders that are not kept as they are, each with its model."""
        found: dict[str, Any] = {}
        for name, spec in self.given.items():
            if spec is None:
                continue
            source = self.taken.get(name, spec.get("model") if isinstance(spec, Mapping) else spec)
            if isinstance(spec, Mapping) and spec.get("model") is None:
                if name not in self.old:
                    raise TypeError(f"{name}: an encoder needs a model: a Hub id, a path or a live model.")
                if self.old[name].shares:
                    raise ValueError(
                        f"{name} shares {self.old[name].shares}: exchange it by a whole ModalEncoderModule."
                    )
                found[name] = {"trim": self.old[name].trim, **spec, "model": self.old[name].module}
            else:
                found[name] = {**spec, "model": source} if isinstance(spec, Mapping) else source
            if isinstance(source, ModalEncoderModule) and source.projector is None:
                self.bare.add(name)
        return found

    def load_text(self, specs: Mapping[str, dict], masked: bool, hub: dict, common: dict) -> tuple[Any, Any]:
        """The tokenizer, None without a processor, and the language model; the former first, since it needs no weights."""
        text, tokenizer = self.text, getattr(self.processor, "tokenizer", None)
        if text is None:
            check_loads(specs, None, tokenizer, common, None)
            return tokenizer, self.language_model
        source = self.taken.get("text", text["model"])
        place = {key: text[key] for key in ("revision", "subfolder") if text.get(key) is not None}
        own = common | {key: text[key] for key in ("dtype", "attn_implementation") if text.get(key) is not None}
        check_loads(specs, source, text.get("tokenizer"), common, text.get("revision"))
        if is_path(source):
            check_causal(source, hub | place, own)
        else:
            check_language_model(source, masked)
        if self.processor is not None:
            tokenizer = tokenizer_of(text.get("tokenizer"), source, hub | place, text.get("chat_template"))
        return tokenizer, load_language_model(source, hub | place | own)

    def make_encoders(self, specs: Mapping[str, dict], live: Any, projector: Any, hub: dict, common: dict) -> dict:
        """Make the encoders of the new model, in order, with their projectors; gives back their processors."""
        found = {name: part for name, part in getattr(self.processor, "processors", {}).items() if name in self.kept}
        widths = embedding_width(live), embedding_width(self.language_model)
        names = dict.fromkeys([name for name in self.old if name in self.kept or name in specs])
        for name in names | dict.fromkeys(specs):
            if (spec := specs.get(name)) is None:
                self.encoders[name] = self.old[name]
                continue
            encoder = made_encoder(name, spec, load_encoder(name, spec, hub, common))
            note_commit(encoder.origin, spec, hub)
            self.encoders[name] = self._in_place(name, encoder, spec)
            if self.processor is not None and (own := self._processor_of(name, spec, hub)) is not None:
                found[name] = own
        for name, encoder in self.encoders.items():
            encoder.name = name
            self._give_projector(name, encoder, live, projector, widths)
        if projector is not None and not self.untrained:
            raise ValueError("projector= is for projectors that are made anew, and all are kept: leave it out.")
        return found

    def _in_place(self, name: str, new: ModalEncoderModule, spec: Mapping[str, Any]) -> ModalEncoderModule:
        """A new encoder with what it inherits of the one in its place; one that its author made is as that says."""
        if name in self.bare and name in self.old:
            new.projector = None  # until it is seen whether the old one fits
        if (old := self.old.get(name)) is None or isinstance(spec["model"], ModalEncoderModule):
            return new
        stated = set(self.given[name]) if isinstance(self.given[name], Mapping) else set[str]()
        stated |= {*SELECTED, "kind"} if spec.get("select") else set()
        projector = new.projector if self._says(name, "projector") else None
        made = ModalEncoderModule(new.module, projector, **inherited(name, new, old, stated))
        made.origin = old.origin if new.module is old.module else new.origin
        if hasattr(old, "mark_table") and made.merging["marks"]:
            made.mark_table = old.mark_table
        return made

    def _says(self, name: str, key: str) -> bool:
        return isinstance(self.given[name], Mapping) and self.given[name].get(key) is not None

    def _processor_of(self, name: str, spec: Mapping[str, Any], hub: dict) -> Any:
        """The processor of a new encoder; that of the one before where the module, or callbacks that read it, are kept."""
        if (old := self.old.get(name)) is not None and not self._says(name, "processor"):
            new, before = self.encoders[name], self.processor.processors.get(name)
            kept = [
                slot
                for slot, callback in new.callbacks.items()
                if callback is not None and callback is old.callbacks[slot]
            ]
            if new.module is old.module or (kept and before is not None):
                return before
        return find_processor(name, dict(spec), self.encoders[name], hub)

    def _give_projector(
        self, name: str, encoder: ModalEncoderModule, live: Any, wanted: Any, widths: tuple[int, int]
    ) -> None:
        """See that an encoder has a projector of the right widths: its own, the old one, or one made anew (in place)."""
        old, where = self.old.get(name), f"{name}_encoder.projector"
        if "projector" in encoder.shares:
            return
        if old is not None and (encoder is old or encoder.projector is None):
            if "projector" not in old.shares and keeps_projector(encoder, old, *widths):
                encoder.projector = old.projector
                moved = live is not self.language_model or encoder.module is not old.module
                self.moved += [where] if moved else []
                return
            if is_wrapped(old.projector):
                raise ValueError(
                    f"{where} has adapters and does not fit any more: merge them first, merge_and_unload()."
                )
            encoder.projector = make_projector(wanted) if wanted is not None else projector_anew(name, old.projector)
            encoder.known_width = None  # which was told of what was projected before
        if encoder.projector.projection is None:
            self.untrained.append(where)

    def compose(self, live: Any, rules: dict[str, Any], share_inputs: Any) -> MultimodalModel:
        """The new model, with what the configuration of the one given says of what is kept."""
        old, names = self.model.config, list(self.encoders)
        rules = {key: _of_kept(getattr(old, key, None), names, old.encoders) for key in RULES} | rules
        given: list[Any] = [*old.share_inputs]
        groups = [x for x in given if isinstance(x, Mapping) and {*x["encoders"]} <= {*names}]
        groups += [x for g in given if not isinstance(g, Mapping) and len(x := [n for n in g if n in names]) > 1]
        groups = valid_groups(groups if share_inputs is None else share_inputs, names)
        authors = [n for n, spec in self.given.items() if isinstance(source_in(spec), ModalEncoderModule)]
        marked = [n for n in names if n in old.encoders and n not in authors and self.encoders[n].merging["marks"]]
        if self.text and marked:
            raise ValueError(
                f"{marked[0]}: its marks are ids of the old tokenizer's tokens: say those of the new one, {marked[0]}="
                f"ModalEncoderModule(model.{marked[0]}_encoder.module, marks=...)."
            )
        share_parts(self.encoders)
        check_encoders(self.encoders, live)
        try:
            made = MultimodalModel(encoders=self.encoders, language_model=live, share_inputs=groups, **rules)
        except ValueError as error:
            if not old.steps:
                raise
            raise ValueError(
                f"{error} Where that is of the {old.steps} which the model given has: rules={{'positions': None}} or "
                "{'mask': None} drops a rule; layer_features and merge are said anew by an encoder that is exchanged, name="
                "ModalEncoderModule(model.name_encoder.module, ...)."
            ) from error
        self._carry_over(old, made.config)
        return made

    def _carry_over(self, old: MultimodalConfig, new: MultimodalConfig) -> None:
        """Write into a configuration what that of the model given says of what is kept (in place)."""
        new.loss_at_labels, new.return_dict = old.loss_at_labels, old.return_dict
        own = {*old.sub_configs, *(f"{name}_modality" for name in old.encoders), "auto_map", *vars(MultimodalConfig())}
        for key in [key for key in vars(old) if key not in own and not key.startswith("_")]:  # what users have added
            setattr(new, key, copy.deepcopy(getattr(old, key)))
        for name in [name for name in self.encoders if name in old.encoders]:
            entry, before = new.modality(name), old.modality(name)
            entry |= {key: before[key] for key in ("token", *([] if self.text else ["token_id"]))}
            if name in self.kept:
                written = {*modality_entry(self.encoders[name]), "input_names", "callbacks", "token", "token_id"}
                entry |= {key: copy.deepcopy(value) for key, value in before.items() if key not in written}
        kept = {f"{name}_encoder" for name in self.kept} | (set() if self.text else {"language_model"})
        origins = {name: origin for name, origin in (new.origins or {}).items() if name not in kept}
        new.origins = {k: copy.deepcopy(v) for k, v in (old.origins or {}).items() if k in kept} | origins or None

    def finish(self, made: MultimodalModel) -> None:
        """Freeze, train and generate as the model given does (in place), and say what has to be trained."""
        if made.language_model is self.language_model:
            made.generation_config = copy.deepcopy(self.model.generation_config)
        parts, known = made._learnt(), self.model.config.frozen_parts or {}
        gone = exchanged_parts(self.model, self.given, self.text)
        frozen = [name for name, part in gone.items() if not any(p.requires_grad for p in part.parameters())]
        frozen = [name for name in frozen if name in parts and next(gone[name].parameters(), None) is not None]
        if frozen := [name for name in frozen if not is_wrapped(parts[name])]:
            made.freeze(*frozen)
        left = {k: copy.deepcopy(v) for k, v in known.items() if k in parts and k not in self.untrained}
        made.config.frozen_parts = {k: v for k, v in left.items() if k not in gone or k in frozen} or None
        made.config.frozen = frozen_patterns(made) or None
        take_checkpointing(self.model, made)
        made.train(self.model.training)
        for name, encoder in self.encoders.items():
            packing, old = encoder.postprocess_projector_callback, self.old.get(name)
            before = None if old is None else old.postprocess_projector_callback
            if isinstance(packing, PackedTiles) and packing.image_newline is not None and packing is not before:
                self.untrained.append(f"{name}_encoder.postprocess_projector_callback")
        told = [f"{', '.join(self.untrained)} (new and untrained)"] if self.untrained else []
        told += [f"{', '.join(self.moved)} (kept, but trained beside another part)"] if self.moved else []
        if told:
            logger.warning("replace(): to be trained before the model is of use: %s.", "; ".join(told))


def _is_of(source: Any, own: Collection[int], encoders: Mapping[str, Any]) -> bool:
    """Whether a module holds parameters of the model, by their ids, or is to share a part of one of its encoders."""
    if source is None:
        return False
    return getattr(source, "shares_with", None) in encoders or any(id(p) in own for p in source.parameters())


def _of_kept(rule: Any, names: Collection[str], before: Collection[str]) -> Any:
    """A rule without what its options say of modalities that are gone."""
    gone = set(before) - set(names)
    return rule and {
        key: {k: v for k, v in value.items() if k not in gone} if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in rule.items()
    }
