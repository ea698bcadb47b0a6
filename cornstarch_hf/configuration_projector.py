"""Configuration of a projector: type, widths, and the options of the type by their own names, checked."""

import inspect
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS

from .limits import check_count
from .parts.classes import SharedCode, carries_code
from .parts.registries import PROJECTORS
from .parts.stored_modules import as_json
from .parts.stored_values import check_kernels, check_values, read_text, without_implementations

BUILT_IN_PROJECTIONS = (
    "linear",
    "mlp",
    "pixel_shuffle",
    "frame_stack",
    "avg_pool",
    "conv",
    "resampler",
    "qformer",
    "native",
)
CUSTOM_PROJECTION = "custom"
# What any configuration may be given, besides what its class declares.
_BASE_KEYS = frozenset([
    *vars(PreTrainedConfig()), "attn_implementation", "auto_map", "encoder_model_type", "experts_implementation",
    "kept_dtype", "language_model_type", "model_type", "name_or_path", "num_labels", "output_attentions", "quantization_config",
    "torch_dtype", "use_cache", "tie_word_embeddings", "use_return_dict", "trust_remote_code",
])  # fmt: skip
# Where encoders' configurations tell their width, the first that is there; of a list the last counts.
_WIDTHS = ("output_proj_dims", "hidden_sizes", "hidden_size", "out_hidden_size", "output_dim", "embed_dims", "d_model")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FIELDS = frozenset(["in_features", "out_features", "activation", "config", "projection_kwargs"])


class MultimodalProjectorConfig(SharedCode, PreTrainedConfig):
    """Configuration of a projector from an encoder's width to the language model's.

    Args:
        encoder_config, text_config: to read `in_features` and `out_features` from, when these are not given.
        projection_type: ``"linear"``, ``"mlp"``; ``"pixel_shuffle"``, ``"frame_stack"``, ``"avg_pool"``, ``"conv"``,
            ``"resampler"`` or ``"qformer"``, which leave fewer features; or a name given to `register_projector`.  Options of
            ``"mlp"``: `num_layers`, `hidden_size`, `norm`, `norm_eps`, `bias`.
        activation: a key of `transformers.activations.ACT2CLS`, used by all but ``"linear"``.
        in_features: width of the encoder's features; None leaves it to the composition.
        out_features: hidden size of the language model; None leaves it to the composition.
        projection_kwargs: further constructor arguments of the projection (JSON values).
        dtype: of the projection that is built, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``; None builds it
            in the encoder's.  One that is stated is kept (as `kept_dtype`) when a checkpoint is loaded, whatever dtype is asked
            for the rest.
        **kwargs: those arguments by their own names, e.g. ``scale_factor=2``; what `PreTrainedConfig` takes.

    Raises:
        TypeError: a keyword that neither the projection nor `PreTrainedConfig` takes; a type that is no name.
        ValueError: unknown projection type, activation or dtype, sizes that are not positive, options that make no sense.
    """

    model_type = "multimodal-projector"
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}

    def __init__(
        self, encoder_config=None, text_config=None, projection_type="linear", activation="gelu", in_features=None,
        out_features=None, projection_kwargs=None, **kwargs,
    ):  # fmt: skip
        if not isinstance(projection_type, str):
            given = projection_type.__name__ if isinstance(projection_type, type) else type(projection_type).__name__
            raise TypeError(
                f"A projector's type must be a name, one of {sorted(PROJECTORS)}, got {given}. A module: wrap it by "
                "MultimodalProjector(MultimodalProjectorConfig(), projection=module), and give that as the projector of one "
                "encoder. A class: register_projector(name, cls), and give the name."
            )
        # A type that a checkpoint's own code defines is looked up when the projection is built.
        known = projection_type == CUSTOM_PROJECTION or projection_type in BUILT_IN_PROJECTIONS
        if not known and not carries_code(kwargs.get("auto_map")):
            PROJECTORS[projection_type]  # raises for an unknown one, with those that are known
        if not isinstance(activation, str) or activation not in ACT2CLS:
            raise ValueError(f"Unknown activation {activation!r}, expected one of {sorted(ACT2CLS)}.")
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size is not None:
                check_count(size, f"The projector's {name}")
        self.projection_type = projection_type
        self.activation = activation
        self.projection_kwargs = _projection_options(projection_type, projection_kwargs, kwargs)
        self.in_features = in_features if encoder_config is None else in_features or feature_width(encoder_config)
        self.out_features = out_features if text_config is None else out_features or text_width(text_config)
        # A caller's `dtype` is a wish; what transformers stores under that name is how weights were loaded last.
        wish = kwargs.pop("kept_dtype", kwargs.get("dtype") or kwargs.get("torch_dtype"))
        if wish is not None:
            self.kept_dtype = _checked_dtype(wish)
        # The stored names are taken out in any case: the base class is not to see them.
        self.encoder_model_type = getattr(encoder_config, "model_type", kwargs.pop("encoder_model_type", None))
        self.language_model_type = getattr(text_config, "model_type", kwargs.pop("language_model_type", None))
        super().__init__(**kwargs)

    @property
    def own_dtype(self) -> torch.dtype | None:
        """The dtype that was asked for the projection alone; None where it has its neighbours'."""
        return getattr(torch, self.kept_dtype) if "kept_dtype" in vars(self) else None

    @classmethod
    def _dict_from_json_file(cls, json_file):
        read_text(json_file, f"{cls.__name__}: {json_file}")  # a file beyond the caps is refused before it is parsed
        return super()._dict_from_json_file(json_file)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; entries that neither the projection nor `PreTrainedConfig` knows are kept, not refused."""
        asked = ["attn"] if isinstance(kwargs.get("attn_implementation"), str) else []
        check_values(config_dict, cls.__name__, asked)
        config_dict = without_implementations(config_dict, asked)
        check_kernels(config_dict, cls.__name__)
        known = {*_BASE_KEYS, *inspect.signature(cls.__init__).parameters}
        options = options_of(config_dict.get("projection_type", "linear"), tuple(config_dict))
        extras = {k: v for k, v in config_dict.items() if k not in known | options and not k.startswith("_")}
        own = {k: v for k, v in config_dict.items() if k not in extras}
        own["kept_dtype"] = config_dict.get("kept_dtype")
        loaded = super().from_dict(own, **kwargs) if kwargs else cls(**own)  # the former also writes it out for the log
        for key, value in extras.items():
            setattr(loaded[0] if isinstance(loaded, tuple) else loaded, key, value)
        return loaded

    def __eq__(self, other):
        return isinstance(other, MultimodalProjectorConfig) and self.__dict__ == other.__dict__


def _checked_dtype(dtype: Any) -> str:
    """The name of a projection's dtype (ValueError: none in which its layers compute)."""
    if (name := str(dtype).removeprefix("torch.")) not in _DTYPES:
        expected = f"None, one of {_DTYPES}, or such a torch.dtype"
        raise ValueError(f"A projector's dtype must be {expected}, got {dtype!r:.100}.")
    return name


def options_of(projection_type: str, names: tuple[str, ...]) -> set[str]:
    """Those of the names that are constructor arguments of a projection type; none of a type that is not known here."""
    if projection_type not in PROJECTORS:
        return set()
    parameters = inspect.signature(PROJECTORS[projection_type]).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return set(names) - _FIELDS - _BASE_KEYS  # it takes any name but those of settings of every configuration
    return set(names) & set(parameters) - _FIELDS


def _projection_options(projection_type: str, given: dict[str, Any] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The projection's arguments from `projection_kwargs` and from keywords of their own names, which are taken out."""
    options = dict(given or {})
    for key in sorted(options_of(projection_type, tuple(kwargs))):
        if key in options and options[key] != kwargs[key]:
            raise ValueError(f"The projector's {key} was given twice, as {options[key]!r} and as {kwargs[key]!r}.")
        options[key] = kwargs.pop(key)
    unknown = sorted(k for k in kwargs if k not in _BASE_KEYS and not k.startswith("_"))
    surplus = set(options) - options_of(projection_type, tuple(options)) - _FIELDS
    known = inspect.signature(PROJECTORS[projection_type]).parameters if projection_type in PROJECTORS else ()
    # What a type takes that is not known here cannot be judged.
    if unknown or (surplus and projection_type in PROJECTORS):
        raise TypeError(
            f"The {projection_type!r} projector takes no {unknown or sorted(surplus)}, expected some of "
            f"{sorted(set(known) - (_FIELDS - {'activation'}))}."
        )
    check = getattr(PROJECTORS.get(projection_type), "check_options", None)
    if check is not None:  # a reduction refuses bad sizes here, before it is built
        check(**{key: value for key, value in options.items() if key not in _FIELDS})
    return as_json(options, "projection_kwargs")


def text_width(config: PreTrainedConfig) -> int:
    """Hidden size of a language model's input embeddings (ValueError if its configuration tells none)."""
    text = config.get_text_config()
    # Some models embed in another width than their layers have.
    width = getattr(text, "embedding_size", None) or getattr(text, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(config).__name__} has no hidden_size, so the projector's out_features must be given.")
    return width


def feature_width(config: PreTrainedConfig) -> int | None:
    """Width of an encoder's last hidden state by its configuration's attributes, or None."""
    for name in _WIDTHS:
        width = getattr(config, name, None)
        width = width[-1] if isinstance(width, (list, tuple)) and width else width  # of the last stage
        if isinstance(width, int) and width > 0:
            return width
    return None
