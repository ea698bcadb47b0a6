"""What a composed model is: configuration of the whole, with validation.  That of its projectors is a neighbour.

Sub-configurations are flat attributes (`text_config`, `vision_config`, `vision_projector_config`, ...), the form
that other software looks for; `encoders` keeps their order, and `{name}_modality` holds what belongs to one modality.
"""

import copy
import re
from contextvars import ContextVar
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .configuration_projector import MultimodalProjectorConfig
from .limits import check_count
from .parts.classes import (
    FAMILIES,
    SharedCode,
    SharedConfig,
    apply_implementations,
    carries_code,
    check_origins,
    is_repo_id,
    part_implementations,
    subclasses_of,
)
from .parts.registries import check_rules, last_definition, merging_options, valid_groups
from .parts.stored_errors import explained, make_config
from .parts.stored_modules import SLOTS
from .parts.stored_values import (
    POINTER,
    check_frozen_parts,
    check_kernels,
    check_names,
    check_part_dtypes,
    check_switches,
    check_types,
    check_values,
    fingerprint,
    read_text,
    without_implementations,
)

STATIC_TABLES = tuple(
    f"MODEL_FOR_{task}_MAPPING_NAMES" for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
)
MEDIA_KINDS = ("image", "video", "audio")
FORMAT_VERSION = 1  # rises when older versions could no longer read what is saved
NAME_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,63}")
# Arguments and attributes of models, processors and trainers, which an encoder of that name would hide.
RESERVED_NAMES = frozenset([
    "add_special_tokens", "audios", "base_model", "config", "conversation", "encoder", "encoder_inputs", "encoders",
    "feature_extractor", "generation_config", "image_processor", "images", "inputs", "kernel_config", "labels",
    "language_model", "llm", "llm_inputs", "loss_type", "max_length", "messages", "model", "name_or_path", "padding",
    "processor", "processors", "return_tensors", "sampling_rate", "text", "tokenizer", "training", "truncation",
    "video_processor", "videos",
])  # fmt: skip
# Settings of the whole that a checkpoint keeps where there is something to keep.
OPTIONAL_KEYS = (
    "language_model_class", "language_model_kwargs", "adapters", "encoder_types", "frozen", "frozen_parts", "part_dtypes",
    "origins", "positions", "mask", "native",
)  # fmt: skip
# What belongs to one modality and neither to its encoder's configuration nor to its projector's.
MODALITY_DEFAULTS: dict[str, Any] = {
    "kind": None, "token": None, "token_id": None, "encoder_class": None, "encoder_kwargs": {}, "output": None,
    "layer": -1, "drop_prefix": 0, "data_format": None, "trim": False, "additional_args": [], "input_names": {},
    "callbacks": {}, "layer_features": None, "merge": None, "marks": {}, "shares": {},
}  # fmt: skip

# Parts that an encoder may share with one before it, and the ending of the key of their configuration, which stands there once.
SHARED_KEYS = {"module": "config", "projector": "projector_config"}
SHARED_PARTS = (*SHARED_KEYS, *SLOTS)

_TYPES: dict[str, tuple[type, ...]] = dict.fromkeys((*OPTIONAL_KEYS, "part_implementations"), (dict,))
_TYPES |= {"language_model_class": (str,), "frozen": (list, tuple), "origins": (object,)}  # `check_origins` says more
_ENTRY_TYPES: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("encoder_kwargs", "input_names", "callbacks", "shares"), (dict,)
)
_ENTRY_TYPES |= dict.fromkeys(("kind", "token", "encoder_class", "output", "data_format"), (str,))
_ENTRY_TYPES |= {"token_id": (int,), "trim": (bool,), "additional_args": (list, tuple)}
_HEAD_OPTIONS: dict[str, tuple[type, ...]] = {"scale": (int, float), "softcap": (int, float), "backbone": (str,)}
# What transformers has on every configuration and every model, and names of usual tokens.
_KEYS_OF_ALL = {*dir(PreTrainedConfig), *dir(PreTrainedModel), *dir(GenerationMixin)}
_KEYS_OF_ALL |= {"quantization_config", "generation_config", "language_model_class"}
_TOKEN_KEYS = {f"{k}_token_id" for k in ("bos", "eos", "pad", "sep", "unk", "mask", "decoder_start")}

_READ = "_read_from"  # an attribute that is not stored
# Whether the values from which a configuration is being made have been looked at already, all of them.
_checked: ContextVar[bool] = ContextVar("_checked", default=False)


class _SubConfigs:
    """`sub_configs`, which transformers reads on the class and on instances: the encoders differ per instance."""

    def __get__(self, config, owner=None):
        names = [] if config is None else config.__dict__.get("encoders") or []
        return dict.fromkeys(["text_config", *(key for name in names for key in _own_keys(name)[:2])], AutoConfig)


class MultimodalConfig(SharedCode, PreTrainedConfig):
    """Configuration of a composed multimodal language model; without arguments an empty one, which builds no model.

    Args:
        text_config: the language model's configuration (an object, kept as it is, or a dict with `model_type`).
        encoders: the encoders' names, in order; each matches ``[a-z][a-z0-9_]{0,63}`` and brings
            ``{name}_config``, ``{name}_projector_config`` and ``{name}_modality`` (see `MODALITY_DEFAULTS`).
        share_inputs: groups of modality names that see the same items, lists, or ``{"encoders": [...], "join": "channels"}``
            where their features are joined for one projector and one placeholder, those of the first one.
        positions, mask: rules that the language model's own do not know, ``{"rule": name, **options}``: how tokens are numbered
            (`register_position_rule`), and which attend to each other both ways (`register_mask_rule`).
        loss_at_labels: in training the head runs at labelled positions alone, and there are no `logits`; `compose()` sets it.
        **kwargs: those three for each encoder, settings that a checkpoint keeps (`OPTIONAL_KEYS`; `origins` says from
            which repository each part came), and whatever `transformers.PreTrainedConfig` takes.

    Raises:
        ValueError: a newer `cornstarch_format`; a name that is invalid, reserved or collides; an unknown key
            inside a modality's entry; a missing sub-configuration.
    """

    model_type = "cornstarch_multimodal"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}
    sub_configs = _SubConfigs()
    # Read by trainers that load a model from a path; a checkpoint that carries code sets its own.
    auto_map: ClassVar[dict[str, str]] = {}

    def __init__(
        self, text_config=None, encoders=None, share_inputs=None, cornstarch_format=FORMAT_VERSION, loss_at_labels=False,
        **kwargs,
    ):  # fmt: skip
        if not isinstance(cornstarch_format, int) or not 1 <= cornstarch_format <= FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has cornstarch_format {cornstarch_format!r}, this version of cornstarch_hf reads up "
                f"to {FORMAT_VERSION}: upgrade cornstarch_hf."
            )
        if not isinstance(encoders or [], (list, tuple)):
            raise ValueError(f"encoders must be a list of names, got {encoders!r:.100}.")
        names = list(encoders or [])
        validate_encoder_names(names)
        if not _checked.get():  # `from_dict` has looked at all of them
            given = {"text_config": text_config, **kwargs}
            check_values({key: value for key, value in given.items() if isinstance(value, dict)}, type(self).__name__)
        _check_settings(kwargs, type(self).__name__)
        parts = {key: kwargs.pop(key, None) for name in names for key in _own_keys(name)}
        kwargs.pop(POINTER, None)  # of the save, not of the model
        implementations = {key: kwargs.pop(key, None) for key in ("attn_implementation", "experts_implementation")}
        stored = kwargs.pop("part_implementations", None) or {}
        # The parts come after the base class: its initialiser would reset their attention settings.
        super().__init__(**{**dict.fromkeys(OPTIONAL_KEYS), **kwargs})  # type: ignore[arg-type]
        self.cornstarch_format = cornstarch_format
        self.encoders = names
        shared = carries_code(kwargs.get("auto_map"))  # unknown classes may then come with its code
        self.text_config = _as_config(text_config, "text_config", shared) if text_config is not None else None
        for name in names:
            self._add_encoder(name, parts, kwargs.get("auto_map") if shared else None)
        self.share_inputs = valid_groups(share_inputs, names)
        if not isinstance(loss_at_labels, bool):
            raise ValueError(f"loss_at_labels must be True or False, got {loss_at_labels!r}.")
        self.loss_at_labels = loss_at_labels
        self.origins = check_origins(kwargs.get("origins"))
        apply_implementations(self, stored)
        for key, value in implementations.items():  # last: setting it hands it on to every part
            if value is not None:
                setattr(self, f"_{key}", value)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        read_text(json_file, f"{cls.__name__}: {json_file}")  # a file beyond the caps is refused before it is parsed
        return super()._dict_from_json_file(json_file)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; ValueError for values that no configuration needs, or of wrong types.

        Of implementations of attention and experts the caller's argument counts, if it is one name, and no stored one; stored
        ones that are kernels, or would be fetched as such, are refused.
        """
        asked = [family for family in FAMILIES if isinstance(kwargs.get(f"{family}_implementation"), str)]
        with explained("config.json"):
            check_values(config_dict, cls.__name__, asked)
            values = without_implementations(config_dict, asked)
            check_kernels(values, cls.__name__)
            made = cls.from_checked(values, **kwargs)
        config = made[0] if kwargs.get("return_unused_kwargs") else made
        # Of what, and as what it was read: so that loading sees whether the file, or the configuration, has changed since.
        vars(config)[_READ] = (fingerprint(config_dict), fingerprint(config.to_dict()), kwargs)
        return made

    @classmethod
    def from_checked(cls, config_dict, **kwargs):
        """As `from_dict`, for values that `check_values` has looked at: nothing is built by them, or the caller gave them."""
        token, of_base = _checked.set(True), super().from_dict
        try:
            return make_config(lambda values: of_base(values, **kwargs), config_dict, cls.__name__, whole=True)
        finally:
            _checked.reset(token)

    def _add_encoder(self, name: str, parts: dict[str, Any], auto_map: dict | None) -> None:
        check_types({"modality": parts[f"{name}_modality"]}, {"modality": (dict,)}, name)
        self._take_shared(name, parts)
        if parts[f"{name}_config"] is None:
            raise ValueError(f"The encoder {name!r} is listed in `encoders` but has no {name}_config.")
        setattr(self, f"{name}_config", _as_config(parts[f"{name}_config"], f"{name}_config", auto_map is not None))
        projector = parts[f"{name}_projector_config"]
        if isinstance(projector, dict):
            with explained(f"{name}_projector_config"):
                code = {"auto_map": auto_map} if auto_map else {}
                projector = MultimodalProjectorConfig.from_dict(projector | code)
            projector.__dict__.pop("auto_map", None)  # it was only to say that the type may be defined by that code
        if not isinstance(projector, MultimodalProjectorConfig):
            raise ValueError(f"{name}_projector_config must be a MultimodalProjectorConfig, got {projector!r}.")
        setattr(self, f"{name}_projector_config", projector)
        values = dict(parts[f"{name}_modality"] or {})
        check_types(values, _ENTRY_TYPES, f"{name}_modality")
        check_switches(values.get("encoder_kwargs"), f"{name}_modality: encoder_kwargs")
        check_names(values.get("additional_args") or [], f"{name}_modality: additional_args")
        check_names(list((values.get("input_names") or {}).values()), f"{name}_modality: the values of input_names")
        if unknown := sorted(set(values) - set(MODALITY_DEFAULTS)):
            raise ValueError(
                f"{name}_modality has unknown keys {unknown}, expected some of {sorted(MODALITY_DEFAULTS)}. A checkpoint "
                "written by a newer version needs that version."
            )
        values = {key: value for key, value in values.items() if value is not None}  # null is the default
        entry = copy.deepcopy(MODALITY_DEFAULTS) | values  # so that no two share a list
        entry |= merging_options(entry["layer_features"], entry["merge"], entry["marks"], name)
        check_count(entry["drop_prefix"], f"{name}: drop_prefix (a number of tokens)", least=0)
        layers = entry["layer"] if isinstance(entry["layer"], (list, tuple)) else [entry["layer"]]
        if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise ValueError(f"{name}: layer must be an integer or a list of integers, got {entry['layer']!r}.")
        setattr(self, f"{name}_modality", entry)

    def _take_shared(self, name: str, parts: dict[str, Any]) -> None:
        """Put the configurations of what an encoder shares with one before it among its own (in place)."""
        shares = (parts[f"{name}_modality"] or {}).get("shares") or {}
        check_types({"shares": shares}, {"shares": (dict,)}, f"{name}_modality")
        before = self.encoders[: self.encoders.index(name)]
        for part, lender in shares.items():
            if part not in SHARED_PARTS or lender not in before:
                told = f"expected some of {SHARED_PARTS} of one before it, {before}"
                raise ValueError(f"{name}_modality: shares has {part!r}: {lender!r}, {told}.")
            if part in SHARED_KEYS:
                parts[f"{name}_{SHARED_KEYS[part]}"] = getattr(self, f"{lender}_{SHARED_KEYS[part]}")

    def modality(self, name: str) -> dict[str, Any]:
        """The entry of one modality; ValueError that lists the names for an unknown one."""
        if name not in vars(self)["encoders"]:  # attributes of transformers' configurations are slow
            raise ValueError(f"Unknown modality {name!r}, this model has {self.encoders}.")
        return vars(self)[f"{name}_modality"]

    def modalities_of_kind(self, kind: str) -> list[str]:
        """Names of the modalities of a kind (``"image"``, ``"audio"``, ...), in order."""
        return [name for name in self.encoders if self.modality(name)["kind"] == kind and name not in self.joined]

    def modalities_for(self, what: str) -> list[str]:
        """The modalities that a name, or a kind (``"image"``), means; ValueError for none, or several with other inputs."""
        if (owner := self.joined.get(what)) is not None:
            told = "which has the projector and items of both: name that one, with the inputs of both."
            raise ValueError(f"{what}: its features are joined to those of {owner!r}, {told}")
        if what in self.encoders:
            return [what]
        names = self.modalities_of_kind(what)
        if len(names) > 1 and not any(set(names) <= {*g} for g in self.share_inputs if isinstance(g, list)):
            raise ValueError(
                f"{what!r} could mean any of {names}: name the modality, or say that they see the same items by "
                f"share_inputs=[{names}]."
            )
        if not names:
            told = f"one of {self.encoders} or its kind"
            told += ": pass frames as images" if what == "video" and self.modalities_of_kind("image") else ""
            raise ValueError(f"{what!r} is no modality of this model, expected {told}.")
        return names

    @property
    def joined(self) -> dict[str, str]:
        """Modalities whose features are joined to those of another one, and that one."""
        groups = vars(self)["share_inputs"]
        return {n: g["encoders"][0] for g in groups if isinstance(g, dict) for n in g["encoders"][1:]}

    @property
    def steps(self) -> list[str]:
        """What this composition does between merging and the language model and others do not, see `registries.STEPS`."""
        values = vars(self)  # attributes of transformers' configurations are slow
        entries = [values[f"{name}_modality"] for name in values["encoders"]]
        found = ["merge"] if any(entry["merge"] or entry["marks"] for entry in entries) else []
        found += ["join"] if any(isinstance(group, dict) for group in values["share_inputs"]) else []
        found += ["layer_features"] if any(entry["layer_features"] for entry in entries) else []
        return found + [key for key in ("positions", "mask") if values.get(key)]

    def adapters_of(self, part: str) -> dict[str, Any] | None:
        """The adapters around a part (``"language_model"``, ``"vision_encoder.module"``), None where there are none."""
        return (self.adapters or {}).get(part)

    def with_shared_parts(self) -> "MultimodalConfig":
        """Itself, or with the classes of parts that were not known when it was read (ValueError for one still unknown)."""
        if not any(isinstance(getattr(self, key, None), SharedConfig) for key in self.sub_configs):
            return self
        values = {key: value for key, value in self.to_dict().items() if key != "auto_map"}
        again = type(self).from_checked(values | {"name_or_path": self.name_or_path})
        again.auto_map = self.auto_map
        return again

    def __getattr__(self, key: str):
        # `image_token_id`, `vision_token_id`: what clients and chunked prefill read, derived from the entries.
        if key.endswith(("_token_id", "_token_index")) and not key.startswith("_"):
            names = self.__dict__.get("encoders") or []  # while it is being made or unpickled there are none
            label = key.removesuffix("_token_index").removesuffix("_token_id")
            found = [label] if label in names else self.modalities_of_kind(label) if names else []
            if len(found) == 1:
                return self.modality(found[0])["token_id"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {key!r}")

    @property
    def read_from(self) -> tuple[str, str, dict[str, Any]] | None:
        """Fingerprints of the values it was read from and of what it was then, with the reader's arguments; None if made."""
        return vars(self).get(_READ)

    def __eq__(self, other):
        # Where a checkpoint's code lies, or when it was read, says nothing about what the model is.
        mine, others = ({k: v for k, v in vars(c).items() if k not in ("auto_map", _READ)} for c in (self, other))
        return isinstance(other, MultimodalConfig) and mine == others

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; includes the attention and experts implementations of the parts."""
        output = super().to_dict()
        output.pop(_READ, None)
        for name in self.encoders:
            for part in SHARED_KEYS.keys() & self.modality(name)["shares"].keys():
                output.pop(f"{name}_{SHARED_KEYS[part]}", None)
        for key in self.sub_configs:
            source = (output.get(key) or {}).get("_name_or_path")
            if source and not is_repo_id(source):  # where a part lay on this machine is nobody else's business
                del output[key]["_name_or_path"]
        if implementations := part_implementations(self):
            output["part_implementations"] = implementations
        for key in OPTIONAL_KEYS:
            if not output.get(key):
                output.pop(key, None)
        return output


def _check_settings(values: dict[str, Any], where: str) -> None:
    """Refuse settings of the whole that it cannot have (ValueError)."""
    check_types(values, _TYPES, where)
    others = _HEAD_OPTIONS if values.get("language_model_class") == "TextModelWithHead" else {}
    check_switches(values.get("language_model_kwargs"), "language_model_kwargs", others)
    check_rules(values)
    check_part_dtypes(values.get("part_dtypes"))
    check_names(values.get("frozen") or [], "frozen")
    check_frozen_parts(values.get("frozen_parts"))
    if values.get("is_encoder_decoder"):
        raise ValueError("is_encoder_decoder is true, but the language model of a composed model is a decoder alone.")


def _own_keys(name: str) -> tuple[str, str, str]:
    return f"{name}_config", f"{name}_projector_config", f"{name}_modality"


def _as_config(value, key: str, shared: bool = False) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
        raise ValueError(f"{key} must be a configuration or a dict with its `model_type`, got {value!r:.200}.")
    # transformers' own, else one that is imported already: a class counts by its own `model_type`, not by an inherited one.
    named = {cls for cls in subclasses_of(PreTrainedConfig) if vars(cls).get("model_type") == value["model_type"]}
    known = value["model_type"] in CONFIG_MAPPING
    found: Any = [CONFIG_MAPPING[value["model_type"]]] if known else last_definition(list(named))
    if len(found) != 1 and shared:
        return SharedConfig(stored=dict(value))  # until the code has run, see `with_shared_parts`
    if len(found) != 1:
        raise ValueError(
            f"{key} has the model_type {value['model_type']!r}, which transformers does not know: expected one imported "
            f"configuration class of that type, found {sorted(map(str, found))}. Import the file that defines it first, or "
            "pass trust_remote_code=True for a checkpoint that carries it."
        )
    values = {k: v for k, v in value.items() if k != "model_type"}
    # What `from_dict` does besides is to write the values out for the log.
    plain = found[0].from_dict.__func__ is PreTrainedConfig.from_dict.__func__
    return make_config(lambda given: found[0](**given) if plain else found[0].from_dict(given), values, key)


def validate_encoder_names(names: list[str]) -> None:
    """Refuse names that are malformed, reserved, or whose derived keys collide with anything (ValueError)."""
    taken = {"text_config": "the language model", "language_model": "the language model"}
    for name in names:
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"The encoder name {name!r} is invalid: it must match {NAME_PATTERN.pattern!r}.")
        derived = {*_own_keys(name), f"{name}_encoder", f"{name}_token_id"}
        clash = derived & (_KEYS_OF_ALL | _TOKEN_KEYS)
        if name in RESERVED_NAMES | _KEYS_OF_ALL or clash:
            raise ValueError(f"The encoder name {name!r} is reserved ({sorted(clash) or name}): choose another one.")
        for key in sorted(derived):
            if key in taken:
                raise ValueError(f"The encoder name {name!r} collides with {taken[key]}: both need {key!r}.")
        taken |= dict.fromkeys(derived, f"the encoder {name!r}")


# Trainer, pipelines and `transformers serve` read the names alone, which no Auto class's `register` fills.  It is done here, so
# that a checkpoint's own code does it too: `serve` looks before it has asked for the model's class.
for _table in STATIC_TABLES:
    getattr(modeling_auto, _table).setdefault(MultimodalConfig.model_type, "MultimodalModel")
