"""compose(): from Hub ids, paths or live objects to a model and its processor in one call."""

import contextlib
import copy
import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging

from .checkpoints.finding import CONFIG
from .checkpoints.plain_storage import pusher
from .composition import check_encoders, share_parts
from .configuration_multimodal import MultimodalConfig
from .encoders.building import (
    ENCODER_KEYS,
    LOADING_KEYS,
    check_dtype,
    check_kind,
    check_names,
    check_texts,
    encoder_specs,
    is_path,
    takes_any_number,
)  # fmt: skip
from .encoders.module import ModalEncoderModule
from .encoders.towers import packs_frames
from .language_model.refusals import check_language_model
from .modeling_multimodal import MultimodalModel
from .parts.adapters import unwrapped
from .parts.classes import FAMILIES, language_model_class, origin_of
from .parts.registries import valid_groups
from .parts.stored_values import check_kernels, check_quantization, read_json
from .processing.own_processors import default_processor
from .processing.subprocessors import sampling_rate_of
from .processing.video import video_processor_missing
from .processing_multimodal import MultimodalProcessor

# Further keywords of `from_pretrained`: of all that is loaded, and of models alone, whose others mean one model of a kind.
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
MODEL_KEYS = (
    "allow_all_kernels", "code_revision", "device_mesh", "distributed_config", "experts_implementation", "kernel_config",
    "max_memory", "offload_buffers", "offload_folder", "quantization_config", "tp_plan", "use_kernels", "use_safetensors",
    "variant", "weights_only",
)  # fmt: skip
# What people write instead of a keyword of compose(), by what it takes; what ends like an encoder's name is one.
_TAKES: dict[str, str] = {
    "language_model=": "llm lm model text_model llm_model base_model decoder language_model_name model_name_or_path",
    "encoders={'vision': ...}, a dict by names that you choose": "encoder vision image images audio speech video modalities",
    "projector=, or encoders={name: {'model': ..., 'projector': ...}} for one of them": (
        "projectors projector_type projection projection_type init_projector_type connector mm_projector adapter"
    ),
    "projector={'projection_type': 'mlp', 'activation': ...}": "activation init_activation projector_activation hidden_act",
    "processors={name: ...}, by encoder": "processor image_processor feature_extractor audio_processor video_processor",
    "tokens={name: ...}, by encoder": "token_names placeholder placeholders image_token audio_token video_token",
    "device_map=, or model.to(device) afterwards": "device devices cuda gpu",
    "dtype=": "torch_dtype precision bf16 fp16",
    "attn_implementation=": "attention attn attention_implementation use_flash_attention_2",
    "quantization_config= where the saved model is loaded: MultimodalModel.from_pretrained(folder, quantization_config=...)": (
        "load_in_8bit load_in_4bit bnb_config quantize quantization"
    ),
}
_INSTEAD = {word: takes for takes, words in _TAKES.items() for word in words.split()}
logger = logging.get_logger(__name__)
Source = str | os.PathLike | PreTrainedModel


def compose(
    language_model: Source | None = None,
    encoders: Mapping[str, Any] | None = None,
    projector: str | Mapping[str, Any] = "linear",
    tokens: Mapping[str, str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    processors: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    freeze: Sequence[str] = (),
    share_inputs: Sequence[Sequence[str] | Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> tuple[MultimodalModel, MultimodalProcessor]:
    """Compose a multimodal language model and its processor.

    Args:
        language_model: Hub id, path or live causal language model.
        encoders: by name: a Hub id, a path, a live model, a `ModalEncoderModule`, or a dict with `model` and any of
            `processor`, `projector`, `kind`, `layer`, `output`, `drop_prefix`, `select` ("native": the tower of a whole
            multimodal language model, with the layer and the leading tokens that it chooses), `trim`, `additional_args`, the
            callbacks, and for loading `revision`, `dtype`, `attn_implementation`, `subfolder`.  Sounds that a processor fills
            up to a window give features of their valid frames alone, where the encoder's mask tells them and projector and
            callbacks take any number; `trim` False keeps the window.
        projector: type of the projectors (`"linear"`, `"mlp"`, a registered one), a `MultimodalProjectorConfig`, or its fields:
            ``{"dtype": "float32"}`` among them for what trains beside parts that were loaded in another one.
        tokens: placeholder tokens by encoder name.
        tokenizer, processors: of the language model, and by encoder name; found beside what is loaded by id or path.
        dtype, device_map, attn_implementation, revision: for loading what is not live; `revision` is the language model's.
        freeze: names of parts that shall not train, as in `MultimodalModel.freeze`.
        share_inputs: groups of encoders that see the same items: lists, or ``{"encoders": [...], "join": "channels"}`` to join
            their features for one projector and one placeholder, those of the first; with ``"resample"`` onto its grid.
        chat_template: of the processor.
        trust_remote_code: whether code from the checkpoints may run.
        **loading: for `from_pretrained` of all that is loaded (`cache_dir`, `token`, `local_files_only`, ...) or of models
            (`max_memory`, `use_safetensors`, `variant`, ...); `assembly_options` lists them.

    Returns:
        ``(model, processor)``; the model is in evaluation mode, and in training mode with labels has no logits
        (`config.loss_at_labels`).

    Raises:
        TypeError: an unknown keyword or key, a source or a container of a wrong type.
        ValueError: a live object without its tokenizer or processor, an option that nothing would do, and whatever composing
            refuses.
        OSError, ImportError: a part that cannot be loaded, named.
    """
    loading = {k: v for k, v in loading.items() if v is not None}
    _check_keywords(loading, language_model=language_model, encoders=encoders)
    specs = encoder_specs(encoders, projector, processors, share_inputs)
    check_names("tokens", tokens, specs)
    check_texts(freeze, chat_template)
    groups = valid_groups(share_inputs, list(specs))
    hub = {k: v for k, v in loading.items() if k in HUB_KEYS} | {"trust_remote_code": trust_remote_code}
    common = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    common = {k: v for k, v in (common | loading).items() if v is not None and k not in HUB_KEYS}
    check_loads(specs, language_model, tokenizer, common, revision)
    # What needs no weights comes first: a missing tokenizer or a misspelt key is told before anything large is loaded.
    text_loading = hub | ({"revision": revision} if revision else {})
    check_causal(language_model, text_loading, common)
    tokenizer = tokenizer_of(tokenizer, language_model, text_loading, chat_template)
    modules, found = {}, {}
    for name, spec in specs.items():
        modules[name] = made_encoder(name, spec, load_encoder(name, spec, hub, common))
        note_commit(modules[name].origin, spec, hub)
        found[name] = find_processor(name, spec, modules[name], hub)
    live = load_language_model(language_model, text_loading | common)
    share_parts(modules)
    check_encoders(modules, live)
    model = MultimodalModel(encoders=modules, language_model=live, share_inputs=groups)
    model.config.loss_at_labels = True
    asked_for = {"model": language_model, "revision": revision}
    note_commit((model.config.origins or {}).get("language_model"), asked_for, hub)
    processor = MultimodalProcessor(tokenizer, found, model=model, tokens=tokens, chat_template=chat_template)
    for name, spec in specs.items():
        if not isinstance(spec["model"], ModalEncoderModule):  # which its author set
            set_trim(name, spec.get("trim"), model, processor)
    if freeze:  # last: a name may mean a projector, which composing makes
        model.freeze(*([freeze] if isinstance(freeze, str) else freeze))
    return model.eval(), processor


@contextlib.contextmanager
def _naming(who: str, source: Any) -> Iterator[None]:
    """Name the part whose loading fails, in an error of the same kind."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = next((k for k in (OSError, ImportError, TypeError, RuntimeError) if isinstance(error, k)), ValueError)
        raise kind(f"{who} could not be loaded from {str(source)!r}. {type(error).__name__}: {error}") from error


def _refuse_kernels(source: Any, options: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Refuse a configuration by which transformers would fetch kernels, unless it is trusted (ValueError).

    `given` are further options of loading.  Returns whether there is a configuration: a folder of adapters names its model
    elsewhere.
    """
    places = {key: value for key, value in options.items() if key != "trust_remote_code"}
    file = cached_file(source, CONFIG, **places, _raise_exceptions_for_missing_entries=False)
    if file is None or options.get("trust_remote_code"):
        return file is not None
    values, where = read_json(file, f"{source}: {CONFIG}"), f"{source}: {CONFIG}"
    # The caller's argument takes the place of this one key, and transformers lets others that are stored win.
    asked = [f"{family}_implementation" for family in FAMILIES if given.get(f"{family}_implementation")]
    check_kernels({key: value for key, value in values.items() if key not in asked}, where)
    check_quantization(values, where, given)
    return True


def check_causal(language_model: Any, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what is no causal language model before anything large is loaded (TypeError, ValueError)."""
    if not is_path(language_model):
        check_language_model(language_model)
        return
    with _naming("The language model", language_model):
        if not _refuse_kernels(language_model, options, given):
            return
        config = AutoConfig.from_pretrained(language_model, **options)
    by_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not isinstance(config, MultimodalConfig) and (by_code or language_model_class(config) is not None):
        return
    whole = getattr(config, "text_config", None) is not None
    parts = f"by from_native({str(language_model)!r}), or name the checkpoint of its language model"
    remedy = f"it is multimodal already: take it apart {parts}" if whole else "pass a decoder-only one"
    raise ValueError(
        f"The language model {str(language_model)!r} has the model_type {config.model_type!r} ({type(config).__name__}), "
        f"which is no causal language model: {remedy}. An encoder belongs into encoders={{name: ...}}."
    )


def load_language_model(source: Any, options: Mapping[str, Any]) -> Any:
    """A causal language model, of an id or a path by options of loading; a live one as it is."""
    if not is_path(source):
        return source
    with _naming("The language model", source):
        return AutoModelForCausalLM.from_pretrained(source, **options)


def tokenizer_of(given: Any, language_model: Any, options: Mapping[str, Any], template: Any) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, padding on the left: what decoder-only generation needs; the processor copies it."""
    if given is not None and not is_path(given) and not isinstance(given, PreTrainedTokenizerBase):
        what = given.__name__ if isinstance(given, type) else type(given).__name__
        raise TypeError(f"tokenizer must be a tokenizer of transformers, a Hub id or a path, got {what}.")
    if not isinstance(given, PreTrainedTokenizerBase):
        source = given or _source(language_model, "The language model", "tokenizer=")
        with _naming("The tokenizer (of the language model, unless tokenizer= is another)", source):
            given = AutoTokenizer.from_pretrained(source, **options)
    if template is None and getattr(given, "chat_template", None) is None:
        logger.warning_once(
            "The language model's tokenizer has no chat template: apply_chat_template and rows of messages use a plain one, "
            "each turn as its role, a colon and its text. Pass chat_template= if the model knows another one."
        )
    if given.padding_side != "left":
        given = copy.deepcopy(given)
        given.padding_side = "left"
    return given


def note_commit(origin: dict[str, Any] | None, spec: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
    """Write into an origin which revision was asked for and which commit that was (in place); asks nothing of the Hub."""
    if origin is None or not isinstance(spec["model"], str):
        return
    requested, cache = spec.get("revision"), loading.get("cache_dir")
    try:  # what was just loaded is in the cache
        commit = resolve_revision(
            origin["repo_id"], revision=requested, local_files_only=True, cache_dir=cache
        ).resolved
    except (OSError, RevisionResolutionError):
        commit = None  # whoever needs the commit asks for it then
    origin |= {"requested_revision": requested, "revision": commit, "subfolder": spec.get("subfolder") or ""}


def _source(given: Any, who: str, remedy: str) -> str | os.PathLike:
    """The id or path that was given, or that a live model was loaded from (ValueError where there is none)."""
    source = given if isinstance(given, (str, os.PathLike)) else getattr(given, "name_or_path", None)
    if not source:
        raise ValueError(f"{who} is a live object that was not loaded from anywhere: pass {remedy}.")
    return source


def _check_keywords(loading: Mapping[str, Any], **required: Any) -> None:
    """TypeError for keywords that compose() does not take, each with what it takes instead, and for missing ones."""
    if unknown := [key for key in loading if key not in HUB_KEYS and key not in MODEL_KEYS]:
        known = [*list(inspect.signature(compose).parameters)[:-1], *HUB_KEYS, *MODEL_KEYS]
        told = "; ".join(f"{key}= (use {instead_of(key, known)})" for key in unknown)
        raise TypeError(f"compose() takes no {told}. It takes {known}.")
    if missing := [key for key, value in required.items() if value is None]:
        raise TypeError(
            f"compose() needs {' and '.join(f'{key}=' for key in missing)}: language_model is a Hub id, a path or a live "
            "causal language model, encoders a dict of such encoders by names that you choose, {'vision': ...}."
        )


def instead_of(key: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, names, 1, cutoff=0.8)
    if found := _INSTEAD.get(key) or (f"{close[0]}=" if close else None):
        return found
    if key.endswith(("_encoder", "_encoders", "_tower", "_model")):
        return _INSTEAD["encoder"]
    return f"encoders={{name: {{{key!r}: ...}}}}, for one encoder" if key in ENCODER_KEYS else "one of the names below"


def check_loads(
    specs: Mapping[str, dict], language_model: Any, tokenizer: Any, common: Mapping[str, Any], revision: str | None
) -> None:
    """ValueError for what is said of loading where nothing is loaded by it: it would not be done."""
    check_dtype(common.get("dtype"), "")
    remedy = "pass an id or a path, or load the part with it yourself"
    if common and not any(map(is_path, [language_model, *(spec["model"] for spec in specs.values())])):
        raise ValueError(f"{sorted(common)} are for loading, but all models are live objects: {remedy}.")
    if revision and tokenizer is not None and not (is_path(language_model) or is_path(tokenizer)):
        raise ValueError(f"revision= is for loading the language model and its tokenizer, but both are live: {remedy}.")
    for name, spec in specs.items():
        check_dtype(spec.get("dtype"), f"{name}: ")
        beside = spec.get("processor") is None or is_path(spec["processor"])  # is found by revision and subfolder too
        done = LOADING_KEYS if is_path(spec["model"]) else ("revision", "subfolder") if beside else ()
        if idle := [key for key in LOADING_KEYS if spec.get(key) is not None and key not in done]:
            raise ValueError(f"{name}: {idle} are for loading, but its model is a live object: {remedy}.")


def load_encoder(name: str, spec: dict, hub: dict, common: dict) -> Any:
    """What an encoder is made of, of an id or a path as its dict and the call say; a live one as it is."""
    source = spec["model"]
    if not is_path(source):
        return source
    # What an encoder says of itself wins over what the call says of all.
    own = {key: spec[key] for key in LOADING_KEYS if spec.get(key) is not None}
    with _naming(f"{name}: its model", source):
        _refuse_kernels(source, hub | {k: own[k] for k in ("revision", "subfolder") if k in own}, common | own)
        return AutoModel.from_pretrained(source, **{**hub, **common, **own})


def made_encoder(name: str, spec: dict, source: Any) -> ModalEncoderModule:
    """The encoder that a dict describes, of a live model."""
    if isinstance(source, ModalEncoderModule):
        if source.projector is None:
            source.projector = spec.get("projector")
        return source
    others = (*LOADING_KEYS, "model", "processor", "projector", "trim", "select")
    options = {k: v for k, v in spec.items() if k not in others}
    select = spec.get("select") and pusher("native_selection")
    tower, chosen = select(source, spec.get("kind"), f"{name}: ") if select else (source, {})
    encoder = ModalEncoderModule(tower, spec.get("projector"), trim=spec.get("trim") or False, **options | chosen)
    encoder.origin = origin_of(source, encoder.module) if select else encoder.origin
    if spec.get("kind") is None:
        check_kind(name, encoder)
    return encoder


def set_trim(name: str, wanted: bool | None, model: MultimodalModel, processor: MultimodalProcessor) -> None:
    """Leave out a window's padding (in place), where the encoder can and nothing needs the whole; ValueError: it cannot."""
    encoder = model.encoders[name]
    if wanted is None:  # a callback may be made for the window, and so may a projector that does not take any number
        free = encoder.kind == "audio" and encoder.join is None and takes_any_number(encoder.projector)
        free = free and not any(encoder.callbacks.values())
        encoder.trim = free and _trims(name, processor)
    elif wanted and encoder.join is not None:
        raise ValueError(f"{name}: trim=True, but its features are joined to others by their places: leave it out.")
    elif wanted and not _trims(name, processor):
        told = "a mask leaves out nothing of what its processor and its encoder make of a short sound"
        raise ValueError(f"{name}: trim=True, but {told}: leave it out.")
    for config in (model.config, processor.config):
        config.modality(name)["trim"] = encoder.trim


def _trims(name: str, processor: MultimodalProcessor) -> bool:
    """Whether a mask leaves out what an extractor adds to a sound to fill up its window (Whisper's 30 seconds)."""
    extractor = processor.processors.get(name)
    parameters = (
        inspect.signature(extractor.__call__).parameters if isinstance(extractor, FeatureExtractionMixin) else {}
    )
    if "return_attention_mask" not in parameters or parameters["padding"].default != "max_length":
        return False
    half = (getattr(extractor, "n_samples", None) or sampling_rate_of(extractor) or 16_000) // 2
    try:
        whole, valid = (processor.features_of_sound(name, half, {"return_attention_mask": x}) for x in (False, True))
    except ValueError:  # the encoder does not take the mask as its extractor makes it
        return False
    return valid < whole


def find_processor(name: str, spec: dict, encoder: ModalEncoderModule, hub: dict) -> Any:
    given = spec.get("processor")
    if given is None and (ours := default_processor(encoder.kind, unwrapped(encoder.module).config)) is not None:
        return ours  # for items that transformers has no processor for
    if given is not None and not is_path(given):
        return given
    source = spec["model"] if given is None else given
    source = source.module if isinstance(source, ModalEncoderModule) else source
    remedy = f"its processor, encoders={{{name!r}: {{'model': ..., 'processor': ...}}}}"
    source = _source(source, f"{name}: the encoder", remedy)
    own = {key: spec[key] for key in ("revision", "subfolder") if spec.get(key) is not None}
    with _naming(f"{name}: its processor", source):
        return _load_processor(source, encoder, hub | own)  # processors have no dtype and no attention


def _load_processor(source: str | os.PathLike, encoder: ModalEncoderModule, options: dict) -> Any:
    kind = encoder.kind
    if kind == "video" and not packs_frames(encoder.module):
        with contextlib.suppress(OSError, ValueError, ImportError):  # there may be a video processor beside the encoder
            return AutoImageProcessor.from_pretrained(source, **options)  # it is run frame by frame
    if kind == "video":
        try:
            return AutoVideoProcessor.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError) as error:
            raise video_processor_missing(source, error) from error
    auto = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor, "text": AutoTokenizer}.get(kind, AutoProcessor)
    return auto.from_pretrained(source, **options)
