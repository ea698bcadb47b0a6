"""Native classes that hold compositions which never were native: rows of the conversion table, read in reverse.

`CONTAINERS` says which towers each takes; `contained` builds one and refuses what it would compute otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from ..encoders.selection import CHANNELS_LAST
from ..language_model.text_head import TextModelWithHead
from ..modeling_multimodal import MultimodalModel
from ..parts.classes import constructor_options
from ..parts.stored_errors import make_config
from ..parts.stored_modules import same_structure
from ..parts.weightless import build_without_weights
from .entries import HiddenState, Native, Part, Projector, Ratio, settings_for
from .keys import hand_over, key_map, prefixes, tensors, tower_of, with_buffers
from .parts import built, composed, has_bare_head
from .refusals import check_same, entry_of_type, projector_options


@dataclass(frozen=True)
class Tower:
    """How a container takes towers whose configurations are of one type.

    Attributes:
        last_is_hidden: whether no norm lies between the last of `hidden_states` and `last_hidden_state`.
        stands_in: name of the class of ours where the container has one of its own that computes the same of the same weights;
            None where both are of one class.
        config: type of the container's own configuration, and `settings` of it by the names that ours have.
        unused: modules of ours that its features do not come from, and that the container's own lacks.
        fits: ``fits(config)``, why a tower of this configuration computes something else, or None.
    """

    last_is_hidden: bool = False
    stands_in: str | None = None
    config: str | None = None
    settings: Mapping[str, str] | None = None
    unused: tuple[str, ...] = ()
    fits: Any = None


def _positions_differ(config: Any) -> str | None:
    """Idefics' towers find a patch's position by comparing fractions, which rounding may move: whether none has moved."""
    from transformers.models.idefics3 import modeling_idefics3 as modeling

    if not isinstance(config.image_size, int) or config.image_size % config.patch_size:
        return f"image_size={config.image_size} of its tower is no multiple of patch_size={config.patch_size}"
    side = config.image_size // config.patch_size
    small = transformers.Idefics3VisionConfig(hidden_size=1, num_channels=1, image_size=side, patch_size=1)
    with torch.device("cpu"), torch.no_grad():
        embeddings = modeling.Idefics3VisionEmbeddings(small)
        places = torch.arange(side**2, dtype=torch.float64)
        embeddings.double().position_embedding.weight.copy_(places[:, None])
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        pixels, mask = torch.zeros(1, 1, side, side).double(), torch.ones(1, side, side, dtype=torch.bool)
        found = embeddings(pixel_values=pixels, patch_attention_mask=mask)
    if torch.equal(found.flatten(), places):
        return None
    return f"of {side} x {side} patches it numbers some otherwise than SigLIP, by rounding"


_SAME = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "stands_in": "SiglipVisionModel", "settings": {name: name for name in _SAME}, "unused": ("head",),
    "fits": _positions_differ,
}  # fmt: skip
_WHISPER = Tower(stands_in="WhisperEncoder", config="voxtral_encoder", settings={
    "hidden_size": "d_model", "intermediate_size": "encoder_ffn_dim", "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads", "layerdrop": "encoder_layerdrop",
} | {name: name for name in (
    "scale_embedding", "activation_function", "num_mel_bins", "max_source_positions", "dropout",
    "attention_dropout", "activation_dropout",
)})  # fmt: skip
_LAST, _NORMED = Tower(last_is_hidden=True), Tower()
# model_type -> {type of a tower's configuration: how it is taken}
CONTAINERS: dict[str, dict[str, Tower]] = {
    "llava": {
        "clip_vision_model": _LAST, "mlcd_vision_model": _LAST, "internvl_vision": _LAST, "siglip_vision_model": _NORMED,
        "dinov2": _NORMED, "dinov3_vit": _NORMED, "vit": _NORMED, "aimv2_vision_model": _NORMED,
    },
    "deepseek_vl": {"siglip_vision_model": _NORMED},
    "internvl": {"internvl_vision": _NORMED},
    "idefics3": {"idefics3_vision": _NORMED, "siglip_vision_model": Tower(config="idefics3_vision", **_SIGLIP)},
    "smolvlm": {"smolvlm_vision": _NORMED, "siglip_vision_model": Tower(config="smolvlm_vision", **_SIGLIP)},
    "voxtral": {"voxtral_encoder": _NORMED, "whisper": _WHISPER},
    "qwen2_audio": {"qwen2_audio_encoder": _NORMED},
    "audioflamingo3": {"audioflamingo3_encoder": _NORMED},
}  # fmt: skip
_FINAL_NORM = (
    "layer=-1 is what its tower gives after its last norm, which {who} does not reach: compose with layer={layers} "
    "(num_hidden_layers, before that norm), or choose a container that takes the last one ({others})"
)


def contained(model: MultimodalModel, model_type: str | None) -> Any:
    """The native model of a type that holds a composition which never was native; it shares the composition's tensors.

    Raises:
        ValueError: a composition that the type does not hold, with the reason and the remedy; no type, with those that hold it
            and the reasons of the others.
    """
    if model_type is None:
        raise ValueError(_offers(model))
    if model_type not in CONTAINERS:
        entry_of_type(model_type)
        raise ValueError(
            f"{model_type!r} takes no compositions that never were native, expected one of {list(CONTAINERS)}."
        )
    try:
        native, names, identity = _plan(model, model_type)
    except _Unfit as reason:
        raise ValueError(f"{model_type!r} does not hold this composition: {reason}.") from reason
    hand_over(model, native, names)
    text = model.language_model
    if identity is not None:
        first = native.get_submodule(identity[0])
        _make_identity(native.get_submodule(identity[1]), first)
    head, table = native.get_output_embeddings(), native.get_input_embeddings()
    if head.weight is table.weight and not native._tied_weights_keys:  # its class ties none, so each has its own
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    if not text.device.type == "meta" and (empty := [name for name, x in tensors(native) if x.is_meta]):
        raise ValueError(f"{model_type!r} computes tensors that the composition does not have: {empty[:4]}.")
    return native


class _Unfit(ValueError):
    """Why a container does not hold a composition."""


def _offers(model: MultimodalModel) -> str:
    """What `to_native` says where no type is chosen."""
    told = []
    for model_type in CONTAINERS:
        try:
            _plan(model, model_type)
            told.append(f"{model_type!r} holds it: to_native(model, model_type={model_type!r})")
        except ValueError as reason:
            told.append(f"{model_type!r} does not: {reason}")
    return "This composition never was a native model: choose what it becomes by model_type=.\n" + "\n".join(told)


def _plan(model: MultimodalModel, model_type: str) -> tuple[Any, dict[str, str], tuple[str, str] | None]:
    """The native model without weights, ``{its tensor: ours}``, and two layers of it, the second of which is to do nothing."""
    row = entry_of_type(model_type)
    ((_, part),) = row.parts.items()
    name = _only_encoder(model, part, row)
    tower = _tower(model, name, part, model_type)
    _check_text(model.language_model, row)
    part, settings, identity = _projector(model, name, part, row)
    part, more = _selection(model, name, part, tower, model_type)
    if model.encoders[name].preprocess_callback is None:  # whole items, as its own step would give them
        part = replace(part, steps={}, additional_args=())
    entry = replace(row, parts={name: part})
    config = _config(model, name, part, row, tower, model_type, settings | more)
    native = build_without_weights(lambda: built(getattr(transformers, row.architecture), config))
    usual = build_without_weights(lambda: composed(native, entry))
    _check_parts(model, name, native, part, tower, row)
    try:
        check_same(model, usual, entry, text=False)
    except ValueError as error:
        raise _Unfit(str(error).rstrip(".")) from error
    pairs = prefixes(native, model, entry)
    names, rest = key_map(native, model, pairs, unused=tuple(f"{name}_encoder.module.{x}." for x in tower.unused))
    missing = [x for x in rest if identity is None or not x.startswith(f"{identity[1]}.")]
    if missing:
        raise _Unfit(
            f"{row.architecture} has tensors that the composition lacks, {missing[:4]} ({len(missing)}): build its tower with "
            "them"
        )
    names = with_buffers(names, native, model, pairs)
    return native, {of: ours for ours, of in names.items()}, identity


def _only_encoder(model: MultimodalModel, part: Part, row: Native) -> str:
    """The name of the one encoder, of the right kind, that has an id in the table of embeddings."""
    if len(model.encoders) != 1:
        raise _Unfit(
            f"{row.architecture} has one encoder, this composition has {list(model.encoders)}: compose with one"
        )
    (name,) = model.encoders
    if model.encoders[name].kind != part.kind:
        raise _Unfit(
            f"{row.architecture} takes items of the kind {part.kind!r}, {name} has {model.encoders[name].kind!r}"
        )
    token_id, table = model.config.modality(name)["token_id"], model.get_input_embeddings()
    rows = cast(Any, table).weight.shape[0]
    if token_id is None:
        raise _Unfit(f"{name} has no id of placeholders: model.set_modality_token_ids({{{name!r}: id}}), or compose()")
    if token_id >= rows:
        raise _Unfit(
            f"native classes look placeholders up in the table of embeddings, which has {rows} rows, and {name} has the id "
            f"{token_id}: model.resize_token_embeddings({token_id + 1})"
        )
    dtypes = {str(x.dtype) for x in model.parameters() if x.is_floating_point()}
    if len(dtypes) > 1:
        raise _Unfit(
            f"its parts have the dtypes {sorted(dtypes)}, and a native model is loaded in one: model.to(dtype)"
        )
    return name


def _tower(model: MultimodalModel, name: str, part: Part, model_type: str) -> Tower:
    """How the container takes the tower."""
    module, towers = model.encoders[name].module, CONTAINERS[model_type]
    kind = module.config.model_type
    if kind not in towers:
        raise _Unfit(f"its tower is {type(module).__name__} ({kind!r}), expected one of {list(towers)}")
    tower = towers[kind]
    if (
        getattr(module, "hf_quantizer", None) is not None
        or getattr(model.language_model, "hf_quantizer", None) is not None
    ):
        raise _Unfit("it is quantized: convert the plain parts, and quantize where the native model is loaded")
    if tower.stands_in is not None and type(module).__name__ != tower.stands_in:
        raise _Unfit(f"its tower is {type(module).__name__}, expected {tower.stands_in}")
    if tower.fits is not None and (reason := tower.fits(module.config)) is not None:
        raise _Unfit(reason)
    return tower


def _check_text(text: Any, row: Native) -> None:
    """Refuse a language model whose head is more than linear, or whose table of embeddings has another name."""
    cls: Any = type(text)
    plain = isinstance(text, TextModelWithHead) and text.scale is None and text.softcap is None
    caps = getattr(text.config, "final_logit_softcapping", None) is not None
    if not plain and not has_bare_head(cls, caps):
        raise _Unfit(
            f"{cls.__name__} does more to hidden states or logits than a linear head, and {row.architecture} has one: "
            "compose with another language model, or serve the composition itself"
        )
    if not hasattr(text.base_model, "embed_tokens"):
        raise _Unfit(
            f"the table of embeddings of {type(text.base_model).__name__} is not called embed_tokens, by which "
            f"{row.architecture} finds it: compose with another language model"
        )


def _check_parts(model: MultimodalModel, name: str, native: Any, part: Part, tower: Tower, row: Native) -> None:
    """Refuse a tower, a text stack or a head of another class, or built by other arguments, than the container builds."""
    text: Any = model.language_model
    pairs: list[tuple[str, Any, Any]] = [("text stack", text.base_model, native.get_submodule(row.language_model))]
    if tower.stands_in is None:
        pairs.append(("tower", model.encoders[name].module, tower_of(native, part)))
    for what, found, expected in pairs:
        if type(found) is not type(expected):
            raise _Unfit(f"its {what} is {type(found).__name__}, {row.architecture} builds {type(expected).__name__}")
        if (options := constructor_options(found)) != (usual := constructor_options(expected)):
            raise _Unfit(
                f"its {what} was built with {options}, {row.architecture} builds it with {usual or 'no arguments'}"
            )
    if not same_structure(head := text.get_output_embeddings(), native.get_output_embeddings()):
        raise _Unfit(f"its head is {head}, {row.architecture} has {native.get_output_embeddings()}")


def _selection(
    model: MultimodalModel, name: str, part: Part, tower: Tower, model_type: str
) -> tuple[Part, dict[str, Any]]:
    """The part with the layer as the composition says it, and settings by which the container takes it."""
    chosen, layers = model.encoders[name].selection, model.encoders[name].module.config
    layer = list(chosen.layer) if isinstance(chosen.layer, tuple) else chosen.layer
    try:
        settings = settings_for(part.drop_prefix, chosen.drop_prefix)
    except ValueError as error:
        raise _Unfit(
            f"{name} drops {chosen.drop_prefix} leading tokens, and {error}: compose with another drop_prefix"
        ) from error
    if chosen.data_format not in (None, CHANNELS_LAST):
        raise _Unfit(
            f"{name} reads its tower's output {chosen.data_format}, and {model_type!r} takes (items, tokens, width)"
        )
    part = replace(part, data_format=chosen.data_format)
    if not isinstance(part.layer, HiddenState):
        if isinstance(layer, list) and part.layer != layer:
            raise _Unfit(f"{name} joins the layers {layer}, and it takes one: compose with layer=")
        return part, settings | settings_for(part.layer, layer)
    wanted = layer if isinstance(layer, list) else [layer]
    if -1 in wanted and not tower.last_is_hidden:
        others = [x for x, towers in CONTAINERS.items() if x != model_type and layers.model_type in towers]
        raise _Unfit(
            _FINAL_NORM.format(who=repr(model_type), layers=layers.num_hidden_layers, others=others or "none does")
        )
    # Its own -1 is the last of the hidden states, which is ours: see `Tower.last_is_hidden`.  0 it takes for no layer.
    told = layer if layer != 0 else -(layers.num_hidden_layers + 1)
    return replace(part, layer=layer), settings | settings_for(part.layer, told)


def _projector(
    model: MultimodalModel, name: str, part: Part, row: Native
) -> tuple[Part, dict[str, Any], tuple[str, str] | None]:
    """The part with the composition's own projector where that is said otherwise, the settings of it, and layers as `_plan`."""
    encoder, projector = model.encoders[name], part.projector
    if projector is None:
        raise ValueError(f"{row.architecture} has no projector in its row.")
    options, given = dict(projector.options), projector_options(encoder.projector.config)
    kind = given.pop("projection_type")
    first, last = projector.names.get("0"), projector.names.get("2")
    if kind == "linear" and projector.kind == "mlp" and settings_for(options.get("activation"), "linear"):
        # One layer is two of which the second gives what it takes: a product with ones and zeros is exact.
        both = settings_for(options["activation"], "linear") | settings_for(options.get("bias"), True)
        return replace(part, projector=Projector("linear", {}, {"": str(first)})), both, (str(first), str(last))
    if kind != projector.kind:
        other = " or 'linear'" if settings_for(options.get("activation"), "") and projector.kind == "mlp" else ""
        raise _Unfit(f"its projector is {kind!r}, and {row.architecture} has {projector.kind!r}{other}")
    stack = options.get("stack_factor")
    if isinstance(stack, Ratio):
        options |= _whole_stacks(encoder, given, row)
    settings: dict[str, Any] = {}
    for key, value in options.items():
        try:
            settings |= settings_for(value, given.get(key))
        except ValueError as error:
            raise _Unfit(f"its projector has {key}={given.get(key)!r}, and {error}") from error
    return replace(part, projector=replace(projector, options=options)), settings, None


def _whole_stacks(encoder: Any, given: Mapping[str, Any], row: Native) -> dict[str, Any]:
    """What becomes of frames that are left over, which does not matter where a window has none."""
    config, stack = encoder.module.config, given.get("stack_factor")
    frames, wanted = config.max_source_positions, config.encoder_ffn_dim // config.d_model
    if stack != wanted:
        raise _Unfit(
            f"its projector joins {stack} frames, and {row.architecture} joins as many as make the inner width of the tower's "
            f"layers, {config.encoder_ffn_dim} / {config.d_model}: compose with stack_factor={wanted}"
        )
    if frames % wanted:
        raise _Unfit(f"a window of {frames} frames is no multiple of {wanted}, which {row.architecture} joins")
    return {"remainder": given["remainder"]}


def _config(
    model: MultimodalModel,
    name: str,
    part: Part,
    row: Native,
    tower: Tower,
    model_type: str,
    settings: Mapping[str, Any],
) -> Any:
    """The native configuration; parts are copies of the composition's."""
    module, text = model.encoders[name].module, model.language_model
    place = "audio_config" if part.kind == "audio" else "vision_config"
    values: dict[str, Any] = {place: module.config.to_dict(), "text_config": text.config.to_dict()}
    if tower.config is not None and tower.settings is not None:
        own = {theirs: getattr(module.config, ours) for theirs, ours in tower.settings.items()}
        values[place] = {"model_type": tower.config, "dtype": values[place].get("dtype")} | own
    # Its class says whether a head can be the table of embeddings, and its configuration whether it is.
    tied = text.get_output_embeddings().weight is text.get_input_embeddings().weight
    tied = tied and bool(getattr(transformers, row.architecture)._tied_weights_keys)
    values["text_config"]["tie_word_embeddings"] = tied
    values |= {"tie_word_embeddings": tied, "dtype": str(text.dtype).removeprefix("torch.")}
    values |= {part.token: model.config.modality(name)["token_id"], **settings}
    config = make_config(CONFIG_MAPPING[model_type].from_dict, values, f"the configuration of {model_type!r}")
    for key, source in ((place, module.config), ("text_config", text.config)):
        getattr(config, key)._attn_implementation = source._attn_implementation
    return config


def _make_identity(layer: Any, like: Any) -> None:
    """Give a linear layer weights with which it gives what it takes (in place)."""
    width, learnt = layer.out_features, like.weight.requires_grad
    layer.weight = nn.Parameter(torch.eye(width, dtype=like.weight.dtype, device=like.weight.device), learnt)
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(width, dtype=like.weight.dtype, device=like.weight.device), learnt)
