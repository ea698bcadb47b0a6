"""Projectors: from an encoder's features to the language model's embedding width, by a registered type or a module as it is.

Types that leave fewer features lie in `reductions`, `windows` and `resampler`, which register them.
"""

import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import BaseModelOutput

from ..checkpoints.plain_storage import ModelStorage
from ..configuration_projector import CUSTOM_PROJECTION, MultimodalProjectorConfig
from ..limits import check_count
from ..parts.registries import PROJECTORS, register_projector
from ..parts.stored_modules import (
    NotStorable,
    build_by_name,
    build_torch,
    constructor_arguments,
    mark_initialized,
    same_structure,
    torch_spec,
)
from ..parts.weightless import build_without_weights, initialize_weights
from .heads import HEAD_DEFAULTS, NORMS, activation_module, check_head

TORCH_PROJECTION = "torch"
UNSIZED = (TORCH_PROJECTION, "native")  # types that say their sizes themselves
Grid = Sequence[int]  # height and width, or frames, height and width, in which the features of an item lie
Grids = Sequence[Grid] | None
Lengths = Sequence[int] | None  # features of each item


def linear_projection(in_features: int, out_features: int) -> nn.Module:
    """One linear layer, as in LLaVA (Liu et al. 2023, https://arxiv.org/abs/2304.08485)."""
    return nn.Linear(in_features, out_features)


def mlp_projection(
    in_features: int,
    out_features: int,
    activation: str,
    *,
    num_layers: int = 2,
    hidden_size: int | None = None,
    norm: str = "none",
    norm_eps: float | None = None,
    bias: bool = True,
) -> nn.Module:
    """Linear layers with an activation between, two as in LLaVA-1.5 (https://arxiv.org/abs/2310.03744).

    Args:
        activation: a key of `transformers.activations.ACT2CLS`.
        num_layers: how many linear layers, 1 or more.
        hidden_size: width between them; `out_features` when None.
        norm: ``"none"``, ``"layer_norm"`` (InternVL's, https://arxiv.org/abs/2312.14238) or ``"rms_norm"`` before the first.
        norm_eps: of that norm; by default 1e-5 for LayerNorm, 1e-6 for RMSNorm.
        bias: of the linear layers.

    Raises:
        ValueError: an option that does not exist or makes no sense; an unknown activation.
    """
    check_mlp(num_layers=num_layers, hidden_size=hidden_size, norm=norm, norm_eps=norm_eps, bias=bias)
    widths = [in_features, *[hidden_size or out_features] * (num_layers - 1), out_features]
    layers: list[nn.Module] = [] if norm == "none" else [NORMS[norm](in_features, norm_eps)]
    for before, after in itertools.pairwise(widths):  # (..., before) to (..., after)
        layers += [nn.Linear(before, after, bias=bias), activation_module(activation)]
    return nn.Sequential(*layers[:-1])


def check_mlp(num_layers: int = 2, **options: Any) -> None:
    """ValueError for options of `mlp_projection` that do not exist, or that would do nothing."""
    check_count(num_layers, "num_layers")
    check_head(HEAD_DEFAULTS | options)
    if num_layers == 1 and options.get("hidden_size") is not None:
        raise ValueError("hidden_size is the width between layers, and num_layers=1 has none: leave one of them out.")
    if options.get("norm_eps") is not None and options.get("norm", "none") == "none":
        raise ValueError("norm_eps is of a norm, and there is none: choose norm='layer_norm' or 'rms_norm'.")


mlp_projection.check_options = check_mlp  # type: ignore[attr-defined]  # called where a configuration is made
register_projector("linear", linear_projection)
register_projector("mlp", mlp_projection)
register_projector(TORCH_PROJECTION, lambda module: build_torch(module))

# Modules that treat the last axis only, so that features of any number and any padding go through them at once.
_ACTIVATIONS = ("transformers.activations", nn.GELU.__module__)
_FEATUREWISE = (nn.Linear, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Sequential, nn.ModuleList)


def build_projection(config: MultimodalProjectorConfig) -> nn.Module:
    """The module that a configuration describes; ValueError for a size that it lacks, or a type that it cannot tell."""
    if config.projection_type == CUSTOM_PROJECTION:
        raise ValueError(
            "This projector holds a module of an unregistered class, so it cannot be built from its configuration: "
            "register the class with register_projector(name, cls)."
        )
    fields = {key: getattr(config, key) for key in ("in_features", "out_features", "activation", "projection_kwargs")}
    missing = [key for key in ("in_features", "out_features") if fields[key] is None]
    if missing and config.projection_type not in UNSIZED:
        raise ValueError(f"The {config.projection_type!r} projector lacks {missing}: set them in its configuration.")
    # By name, as users' classes take them too; options given in the configuration outdo its fields.
    built = build_by_name(PROJECTORS[config.projection_type], {**fields, **config.projection_kwargs, "config": config})
    return built if config.own_dtype is None else built.to(config.own_dtype)


def describe_projection(projection: nn.Module, config: MultimodalProjectorConfig) -> tuple[str, dict]:
    """The `projection_type` and `projection_kwargs` under which a module can be stored, or NotStorable with the reason."""
    name, reason = PROJECTORS.name_of(type(projection)), None
    if name is not None:  # first: the module says what it is, which a configuration may not know in full
        extra = {k: v for k, v in config.projection_kwargs.items() if not hasattr(projection, k)}
        try:
            return name, (extra if name == config.projection_type else {}) | constructor_arguments(projection)
        except NotStorable as error:
            reason = error  # no attributes of its arguments: perhaps the configuration it was built from has them
    if config.projection_type != CUSTOM_PROJECTION and name in (None, config.projection_type):
        # Sizes that are still missing, or a constructor that wants more: then it is not what the configuration says.
        with contextlib.suppress(TypeError, ValueError):
            if same_structure(build_without_weights(lambda: build_projection(config)), projection):
                return config.projection_type, config.projection_kwargs
    if reason is not None:
        raise reason
    return TORCH_PROJECTION, {"module": torch_spec(projection)}


def acts_on_single_features(projection: nn.Module) -> bool:
    """Whether a module is known to treat the last axis alone, so that it never mixes or removes features."""

    def single(module: nn.Module) -> bool:
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return len(module.normalized_shape) == 1
        elementwise = type(module).__module__ in _ACTIVATIONS and not list(module.parameters())
        across = hasattr(module, "dim") or isinstance(module, nn.Softmax2d)  # softmax and gates along some other axis
        return type(module) in _FEATUREWISE or (elementwise and not across)

    return all(single(module) for module in projection.modules())


def per_item(features: Tensor | Sequence[Tensor], lengths: Lengths, name: str) -> list[Tensor]:
    """One ``(n_i, width)`` tensor per item of a list, of ``(items, tokens, width)`` or of ``(sum of tokens, width)``.

    `lengths` are the features of each item, of which a 3-D tensor's first ones are kept; ValueError for packed features
    without lengths, or lengths that do not fit.
    """
    if not isinstance(features, Tensor):
        return [x.flatten(0, -2) for x in features]  # maps (height, width, channels) are read row by row
    shape, given = tuple(features.shape), None if lengths is None else list(lengths)
    if features.ndim == 3:
        if lengths is None:
            return list(features)
        if len(lengths) != len(features) or max(lengths, default=0) > features.shape[1]:
            raise ValueError(f"{name}: lengths {given} do not fit features of shape {shape}.")
        return [item[:n] for item, n in zip(features, lengths, strict=True)]
    if features.ndim != 2 or lengths is None or sum(lengths) != len(features):
        raise ValueError(
            f"{name}: features of shape {shape} cannot be split into items by lengths {given}: return a list with one "
            "tensor per item, or set output['feature_lens']."
        )
    return list(features.split([int(n) for n in lengths]))


@dataclass
class ProjectorOutput(BaseModelOutput):
    """Projected features: `last_hidden_state` ``(items, fewer, out_features)``, or ``(sum, out_features)`` with
    `feature_lens` ``(items,)`` where the items have different numbers of them."""

    feature_lens: Tensor | None = None


class MultimodalProjector(ModelStorage, PreTrainedModel):
    """Maps features ``(..., in_features)`` to ``(..., out_features)``; some types leave fewer of each item.

    Args:
        config: copied; a size that it lacks is filled in when a model is composed.
        projection: a module to wrap as it is.  None builds what the configuration describes, while composing if a size lacks.

    Raises:
        TypeError: `config` is no configuration of a projector, `projection` no module.
        ValueError: unknown projection type or activation.
    """

    config: MultimodalProjectorConfig
    projection: Any
    gradient_checkpointing: Any
    config_class = MultimodalProjectorConfig
    _side = "projector"
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True
    # Attention inside it (the resampler's) is torch's own, so it runs under any implementation that the whole is given.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    initialize_weights = initialize_weights

    def __init__(self, config: MultimodalProjectorConfig, projection: nn.Module | None = None):
        if not isinstance(config, MultimodalProjectorConfig):
            raise TypeError(
                f"config must be a MultimodalProjectorConfig, got {type(config).__name__}: wrap a module by "
                "MultimodalProjector(MultimodalProjectorConfig(), projection=module)."
            )
        super().__init__(copy.deepcopy(config) if projection is not None else config)
        self.gradient_checkpointing = False
        self.projection = None
        sized = self.config.in_features is not None and self.config.out_features is not None
        if projection is not None:
            if not isinstance(projection, nn.Module):
                raise TypeError(f"projection must be a torch.nn.Module, got {type(projection).__name__}.")
            self._wrap(projection)
        elif sized or self.config.projection_type in UNSIZED:
            self.projection = build_projection(self.config)
        self.post_init()

    def _wrap(self, projection: nn.Module) -> None:
        mark_initialized(projection)
        self.projection, kept = projection, self.config.own_dtype
        if kept and any(p.dtype != kept for p in projection.parameters() if p.is_floating_point()):
            remedy = f"cast it first, projection.to({kept}), or leave the dtype out."
            raise ValueError(
                f"The projection that is wrapped as it is has weights of another dtype than {kept}: {remedy}"
            )
        # The configuration is to describe what is wrapped, as if the module had been built from it.
        if isinstance(activation := getattr(projection, "activation", None), str) and activation in ACT2CLS:
            self.config.activation = activation
        # Widths are attributes of the module, or of its first and last layer, or not known.
        layers = list(projection) if isinstance(projection, nn.Sequential) else [projection]
        first, last = (layers[0], layers[-1]) if layers else (None, None)
        sizes = getattr(first, "in_features", None), getattr(last, "out_features", None)
        self._fill_sizes(*(size if isinstance(size, int) else None for size in sizes))
        described: tuple[str, dict] = (CUSTOM_PROJECTION, {})
        with contextlib.suppress(NotStorable):  # it can be used all the same; `check_storable` tells why
            described = describe_projection(projection, self.config)
        self.config.projection_type, self.config.projection_kwargs = described

    def _fill_sizes(self, *sizes: int | None) -> None:
        for key, size in zip(("in_features", "out_features"), sizes, strict=True):
            if getattr(self.config, key) is None:
                setattr(self.config, key, size)

    def complete(self, in_features: int | None, out_features: int, dims: int | None = None) -> None:
        """Fill in what the configuration lacks, `dims` for types that take them, and build the projection (in place)."""
        target = PROJECTORS.get(self.config.projection_type)
        if self.projection is None and dims is not None and "dims" in getattr(target, "DEFAULTS", ()):
            self.config.projection_kwargs = {"dims": dims} | self.config.projection_kwargs  # what is given stays
        self._fill_sizes(in_features, out_features)
        if self.projection is None:
            self.projection = build_projection(self.config)
            self.post_init()  # once more: the first one had no weights to initialise

    @property
    def reduces(self) -> bool:
        """Whether features of an item may be mixed or removed, so that each item must be projected alone."""
        return self.config.projection_type not in ("linear", "mlp") and not acts_on_single_features(self.projection)

    @property
    def needs_grid(self) -> bool:
        """Whether the projection must be given the grid (height and width) of an item's features."""
        return bool(getattr(self.projection, "needs_grid", False))

    def feature_count(self, length: int, grid: Grid | None = None) -> int | None:
        """Features left of an item (ValueError where it does not fit); None if the projection has no such method."""
        if not self.reduces:
            return length
        count = getattr(self.projection, "feature_count", None)
        return None if count is None else count(length, grid)

    def forward(
        self, inputs_embeds: Tensor, return_dict: bool | None = None, *, lengths: Lengths = None, grids: Grids = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> ProjectorOutput | tuple:  # fmt: skip
        """Project features.

        Args:
            inputs_embeds: ``(..., in_features)``; where the type reduces, ``(items, length, in_features)``, one item
                ``(length, in_features)``, maps ``(items, height, width, in_features)``, or with `lengths` packed items
                ``(sum of lengths, in_features)``.
            return_dict: a `ProjectorOutput` (default by the configuration), or a tuple.
            lengths: features of each item, where it differs from the tensor's shape; the result is packed then.
            grids: ``(height, width)`` or ``(frames, height, width)`` of each item's features, row by row; squares when None.
            inputs: of the encoder, for types that read masks or sizes of items there.

        Raises:
            ValueError: no projection has been built; the width or the reduction does not fit.
        """
        if self.projection is None:
            raise ValueError("This projector has no projection yet: give its configuration both sizes, or compose it.")
        width = self.config.in_features  # None of a wrapped module that does not show its sizes
        if width is not None and inputs_embeds.shape[-1] != width:
            raise ValueError(f"The projector expects features of width {width}, got {inputs_embeds.shape[-1]}.")
        if getattr(self.projection, "whole", False):  # all items at once, as a native model runs it
            projected, counts = self._project(inputs_embeds, lengths, grids, inputs)
            reduced = projected, counts if counts is None else torch.tensor(counts)
        else:
            reduced = (
                self._reduce(inputs_embeds, lengths, grids) if self.reduces else (self._project(inputs_embeds), None)
            )
        output = ProjectorOutput(last_hidden_state=reduced[0], feature_lens=reduced[1])
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _project(self, *inputs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            # Reentrant checkpointing drops the gradients of a function whose inputs need none (a frozen encoder's).
            features = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            return self._gradient_checkpointing_func(self.projection, features, *inputs[1:])
        return self.projection(*inputs)  # (..., in_features) to (..., out_features)

    def _reduce(self, features: Tensor, lengths: Lengths, grids: Grids) -> tuple[Tensor, Tensor | None]:
        """Reduce and project each item alone, those of one length and grid together; features and their numbers."""
        maps = features.ndim == 4 and (self.needs_grid or hasattr(self.projection, "feature_count"))
        # Without items: a class that is not known to reduce takes any leading axes.
        if features.ndim not in (2, 3) and not maps:
            return self._project(features), None
        if maps:  # (items, height, width, in_features) to (items, height * width, in_features)
            grids = [tuple(features.shape[1:3])] * len(features) if grids is None else grids
            features = features.flatten(1, 2)
        if features.ndim == 2 and lengths is None:  # one item
            return self._reduce(features[None], None, grids)[0][0], None
        sizes = [features.shape[1]] * len(features) if lengths is None else [int(n) for n in lengths]
        if grids is not None and len(grids) != len(sizes):
            raise ValueError(f"The projector got {len(grids)} grids for {len(sizes)} items.")
        groups: dict[tuple[int, Grid | None], list[int]] = {}  # positions of the items of each length and grid
        for position, length in enumerate(sizes):
            groups.setdefault((length, None if grids is None else tuple(grids[position])), []).append(position)
        if len(groups) == 1 and lengths is None:  # nothing to sort: the batch as it is
            (_, grid), *_ = groups
            return self._reduce_group(features, grid), None
        split = per_item(features, lengths, "the projector")  # items of (n_i, in_features)
        done: dict[int, Tensor] = {}
        for (_, grid), positions in groups.items():  # padding would enter windows and attention, so equal lengths only
            reduced = self._reduce_group(torch.stack([split[i] for i in positions]), grid)
            done |= dict(zip(positions, reduced, strict=True))
        items = [done[i] for i in range(len(split))]  # of (fewer_i, out_features), in their order again
        if lengths is None and len({len(item) for item in items}) == 1:
            return torch.stack(items), None
        packed = torch.cat(items) if items else features.new_zeros(0, self.config.out_features)  # (sum, out_features)
        return packed, torch.tensor([len(item) for item in items])

    def _reduce_group(self, features: Tensor, grid: Grid | None) -> Tensor:
        """``(items, length, in_features)`` to ``(items, fewer, out_features)``."""
        reduced = self._project(features, grid) if self.needs_grid else self._project(features)
        expected = self.feature_count(features.shape[1], grid)
        if reduced.ndim != 3 or len(reduced) != len(features) or expected not in (None, reduced.shape[1]):
            wanted = "fewer" if expected is None else expected
            raise ValueError(
                f"The projection {type(self.projection).__name__} must map features of shape {tuple(features.shape)} to "
                f"({len(features)}, {wanted}, {self.config.out_features}), it gave {tuple(reduced.shape)}."
            )
        return reduced

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers fills the layers that it knows; bare parameters, such as learnt queries, would stay empty.
        if hasattr(module, "init_own_weights"):
            module.init_own_weights()

    def check_storable(self, where: str) -> None:
        """ValueError, with place, reason and remedy, if the projection cannot be stored; a dtype that was cast away goes."""
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        if self.config.own_dtype is not None and dtypes:
            self.config.dtype = next(iter(dtypes))
            if dtypes != {self.config.own_dtype}:  # they were cast since: what they are now is to come back
                del self.config.kept_dtype
        if self.config.projection_type != CUSTOM_PROJECTION:
            return
        try:
            described = describe_projection(self.projection, self.config)  # its class may be registered by now
        except NotStorable as error:
            raise ValueError(
                f"{where} cannot be saved: {error}. Register the class with register_projector(name, cls), and keep each "
                "constructor argument in an attribute of the same name."
            ) from error
        self.config.projection_type, self.config.projection_kwargs = described

    def _before_save(self) -> bool:
        self.check_storable("the projector")
        return True

    @classmethod
    def _load_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Projectors of the original Cornstarch are read too, whose first form named its layers `in_proj` and `out_proj`."""
        return {"key_mapping": {r"^in_proj\.": "projection.0.", r"^out_proj\.": "projection.2."}} | options
