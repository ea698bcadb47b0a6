"""The base of the composed model: its parts, what transformers reads of it, saving, loading and freezing."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .adapter_tensors import shared_by_adapters
from .adapters import check_all_kept, check_no_wrapped_part, unwrapped
from .checkpointing import (
    cast_buffers,
    check_quantized,
    check_rebuildable,
    dtype_plan,
    first_dtype,
    remove_stale_weights,
    restore_adapter_buffers,
    sync_config,
    weight_files,
)
from .code_export import export_code
from .configuration_multimodal import MultimodalConfig
from .describing import describe_model
from .encoders import ModalEncoderModule
from .freezing import (
    evaluate_frozen_layers_under_checkpointing,
    frozen_patterns,
    keep_frozen_in_eval,
    restore_frozen,
    select_parameters,
    set_part_trainable,
    set_trainable,
)
from .gathering import gathered_plans, gathered_sets, gathered_ties, nearest_models
from .language_model import Headless
from .shared_code import SharedCode, with_shared_code

logger = logging.getLogger(__name__)


class MultimodalPreTrainedModel(SharedCode, PreTrainedModel):
    """What a composed model is besides its `forward`; see `MultimodalModel`."""

    config: MultimodalConfig
    language_model: Any
    config_class = MultimodalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("text", "image", "audio", "video")
    supports_gradient_checkpointing = True
    _saved = False  # whether the whole model lies in some folder
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Whether a placeholder without input is refused although no processor has named its token.
    _strict_placeholders = False

    @property
    def encoders(self) -> dict[str, ModalEncoderModule]:
        """The encoders by name, in order."""
        return {name: getattr(self, f"{name}_encoder") for name in self.config.encoders}

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the language model: the parts may differ."""
        return first_dtype(self.language_model)

    @property
    def base_model(self) -> Headless:
        """This model without its language-model head; a callable, not a module of its own."""
        return Headless(self)

    def get_encoder(self, modality: str | None = None):
        """The encoder module of a modality, by name or kind; without one, the model itself (as in transformers)."""
        return self if modality is None else self.encoders[self._named(modality)].module

    def get_decoder(self):
        """The language model without its head."""
        return unwrapped(self.language_model).get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's input embeddings."""
        unwrapped(self.language_model).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        unwrapped(self.language_model).set_output_embeddings(new_embeddings)

    def init_parallel_plans(self) -> None:
        """Gather the parts' parallelisation plans, by names that this model has."""
        super().init_parallel_plans()
        for key, plan in gathered_plans(self).items():
            setattr(self, key, plan)

    def init_weights(self) -> None:
        """Gather what else the parts know, then initialise and tie as in transformers."""
        for key, values in gathered_sets(self).items():
            setattr(self, key, values)
        self.all_tied_weights_keys = gathered_ties(self)
        super().init_weights()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tied weights of all parts by names that exist, adapters in front of them or not."""
        return gathered_ties(self) if all_submodels else {}

    def initialize_weights(self) -> None:
        """Initialise what was not loaded, each part as its own class does.

        transformers treats models from outside as custom code and then leaves out modules without parameters of their
        own, among them those that fill the buffers of transformers' own parts.
        """
        for _, part in nearest_models(self):
            part.initialize_weights()
        super().initialize_weights()

    def set_modality_token_ids(self, token_ids: Mapping[str, int]) -> None:
        """Say which token id stands for each modality's features (a processor made with `model=` does it itself).

        Args:
            token_ids: ``{modality: id}``; an id may lie outside the embedding table, which need not grow.

        Raises:
            ValueError: an unknown modality, an id that is no natural number or is used twice.
        """
        used = {self.config.modality(n)["token_id"]: n for n in self.config.encoders if n not in token_ids}
        for name, token_id in token_ids.items():
            self.config.modality(name)
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ValueError(f"{name}: a placeholder's token id must be an integer >= 0, got {token_id!r}.")
            if token_id in used:
                raise ValueError(f"{name}: the token id {token_id} already stands for {used[token_id]!r}.")
            used[token_id] = name
        for name, token_id in token_ids.items():
            self.config.modality(name)["token_id"] = token_id
        self._strict_placeholders = True

    def _take_traits(self, supplied: bool) -> None:
        """Traits of the parts that transformers reads on the whole."""
        inner = unwrapped(self.language_model)
        kinds = dict.fromkeys(self.config.modality(name)["kind"] for name in self.config.encoders)
        self.input_modalities = (*kinds, *(() if "text" in kinds else ("text",)))
        self._is_stateful = inner._is_stateful
        self._can_compile_fullgraph = inner._can_compile_fullgraph
        if supplied and inner.generation_config is not None:
            self.generation_config = type(inner.generation_config).from_dict(inner.generation_config.to_dict())

    def _named(self, modality: str) -> str:
        """The name of a modality given by name, or by a kind that only one has (ValueError)."""
        if modality in self.config.encoders:
            return modality
        found = self.config.modalities_of_kind(modality)
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{modality!r} is {'no modality' if not found else 'the kind of several modalities'} of this model, expected "
            f"one of {found or self.config.encoders}."
        )

    def describe(self) -> str:
        """Print, and return, the parts: classes, parameters, how many train, features per item, tokens."""
        text = describe_model(self)
        print(text)
        return text

    # ---- what trains

    def freeze(self, *patterns: str):
        """Exclude parts from training: ``freeze("vision_encoder.module", "language_model")``.

        Args:
            *patterns: dotted names of modules or parameters, or globs such as ``"*.projector"``.

        Returns:
            the model; the choice is kept in its configuration and survives saving.

        Raises:
            ValueError: no pattern, or one that names nothing.
        """
        if not patterns:
            raise ValueError('freeze() needs names, e.g. freeze("vision_encoder.module", "language_model").')
        return self._set_frozen(select_parameters(self, patterns), frozen=True)

    def unfreeze(self, *patterns: str):
        """Train parts again; without names, everything (of PEFT-wrapped parts the adapters only)."""
        if patterns:
            return self._set_frozen(select_parameters(self, patterns), frozen=False)
        for part in self._parts().values():
            set_part_trainable(part, True)
        return self._set_frozen(set(), frozen=False)

    def _set_frozen(self, names: Iterable[str], frozen: bool):
        set_trainable(self, names, not frozen)
        self.config.frozen = frozen_patterns(self) or None
        return self.train(self.training)

    def _parts(self) -> dict[str, nn.Module]:
        parts = {"language_model": self.language_model}
        for name, encoder in self.encoders.items():
            parts |= {f"{name}_encoder.module": encoder.module, f"{name}_encoder.projector": encoder.projector}
        return parts

    def train(
        self,
        mode: bool = True,
        *,
        encoders_mode: Mapping[str, tuple[bool, bool]] | None = None,
        llm_mode: bool | None = None,
    ):
        """Set the training mode; frozen parts keep their dropout and norm statistics off.

        Args:
            mode: as in torch; `requires_grad` is not touched.
            encoders_mode: Cornstarch's form of freezing: ``{name: (encoder trains, projector trains)}`` sets
                `requires_grad` and mode together.  Left out, all encoders follow `llm_mode`.
            llm_mode: likewise for the language model.

        Returns:
            the model.

        Raises:
            ValueError: an encoder that the model does not have, or a value that is no pair; parameters that train but
                would not be saved with the adapters around the model.
        """
        if encoders_mode is not None or llm_mode is not None:
            self._set_modes(encoders_mode, llm_mode)
        super().train(mode)
        if mode:
            check_all_kept(self)
            keep_frozen_in_eval(self._parts())
        return self

    def _set_modes(self, encoders_mode: Mapping[str, tuple[bool, bool]] | None, llm_mode: bool | None) -> None:
        if encoders_mode is None:
            encoders_mode = dict.fromkeys(self.config.encoders, (bool(llm_mode),) * 2)
        if unknown := sorted(set(encoders_mode) - set(self.config.encoders)):
            raise ValueError(f"encoders_mode names {unknown}, this model has the encoders {self.config.encoders}.")
        for name, pair in encoders_mode.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"encoders_mode[{name!r}] must be (encoder trains, projector trains), got {pair!r}.")
            set_part_trainable(self.encoders[name].module, bool(pair[0]))
            set_part_trainable(self.encoders[name].projector, bool(pair[1]))
        if llm_mode is not None:
            set_part_trainable(self.language_model, bool(llm_mode))
        self.config.frozen = frozen_patterns(self) or None

    # ---- adapters around the whole

    @property
    def peft_config(self) -> dict[str, Any]:
        """Configurations of adapters around the whole model, by name; there is none before one is added."""
        if "_whole_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")
        return self.__dict__["_whole_peft_config"]

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        check_no_wrapped_part(self, self._parts())  # `get_peft_model` sets this
        self.__dict__["_whole_peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_whole_peft_config", None)

    def add_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; ValueError where a part has adapters of its own."""
        check_no_wrapped_part(self, self._parts())
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError where a part has adapters of its own."""
        check_no_wrapped_part(self, self._parts())
        return super().load_adapter(*args, **kwargs)

    # ---- saving and loading

    def save_pretrained(self, save_directory, *args, include_code: bool | None = None, **kwargs):
        """As in transformers, safetensors only; the folder keeps every file that is not a weight file of this model.

        Args:
            save_directory: the folder.
            *args, **kwargs: as in transformers.
            include_code: whether the checkpoint carries the code that loads it, see `code_export.export_code`.

        Raises:
            ValueError: something in the model would not come back: an unregistered callback or projection, or weights
                that the configuration does not describe; or only adapters would be saved (`add_adapter`) of a model
                that was never saved itself.
        """
        adapters_only = getattr(self, "_hf_peft_config_loaded", False)
        if not adapters_only:
            check_quantized(self)  # before anything asks for the state: bitsandbytes changes 4-bit weights then
            sync_config(self, self.config, self.encoders, self.language_model)
            check_rebuildable(self)
            # Adapters may have come or gone; saving reads `_tied_weights_keys`, loading the other one.
            self.all_tied_weights_keys = gathered_ties(self)
            self._tied_weights_keys = shared_by_adapters(self) | self.all_tied_weights_keys
        elif not (self.name_or_path or self._saved):
            raise ValueError(
                "After add_adapter only the adapters are saved, but the model below them was never saved, so its projectors "
                "would be lost: call save_pretrained before add_adapter, or wrap the parts with get_peft_model and compose."
            )
        before = weight_files(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        self._saved = True
        if kwargs.get("is_main_process", True):
            remove_stale_weights(save_directory, before)
            if not adapters_only:
                export_code(save_directory, "model", self, include_code=include_code)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; what was frozen is frozen again, which is said once."""
        kwargs["use_safetensors"] = _safetensors_only(kwargs.get("use_safetensors"))
        kwargs = with_shared_code(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        restore_adapter_buffers(model)
        cast_buffers(model, model.config.part_dtypes, model.dtype)
        if getattr(model, "_hf_peft_config_loaded", False):
            return loaded  # a folder of adapters, in which PEFT decides what trains
        if frozen := restore_frozen(model, model.config.frozen):
            logger.warning(
                "%d of the loaded parameter tensors are frozen, as they were when saved (%s). unfreeze() trains all.",
                frozen,
                ", ".join(model.config.frozen[:4]) + (", ..." if len(model.config.frozen) > 4 else ""),
            )
        return loaded

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
        if enable:
            evaluate_frozen_layers_under_checkpointing(self)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        plan = {
            key: value for key, value in super()._get_dtype_plan(dtype).items() if key not in self._projector_names()
        }
        return plan | dtype_plan(self.config.part_dtypes, dtype)

    @property
    def _keep_in_fp32_modules(self) -> set[str]:
        """What the parts want in float32 and, while the model is quantized, the projectors: small, often still to train."""
        names = self.__dict__.get("_parts_in_fp32", set())
        return names | self._projector_names() if getattr(self, "is_quantized", False) else names

    @_keep_in_fp32_modules.setter
    def _keep_in_fp32_modules(self, names: Iterable[str]) -> None:
        self.__dict__["_parts_in_fp32"] = set(names)

    def _projector_names(self) -> set[str]:
        return {f"{name}_encoder.projector" for name in self.config.encoders}


def _safetensors_only(wanted: bool | None) -> bool:
    if wanted is False:
        raise ValueError("Composed models are stored as safetensors only; use_safetensors=False is refused.")
    return True
