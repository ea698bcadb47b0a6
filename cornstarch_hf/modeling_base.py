"""The base of the composed model: its parts, what transformers reads of it, freezing.  Saving and loading are beside it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .checkpoints.config_sync import first_dtype
from .checkpoints.storage import MultimodalStorageMixin
from .composition import describe_model
from .configuration_multimodal import MultimodalConfig
from .encoders.module import ModalEncoderModule
from .language_model.calling import Headless
from .limits import check_count
from .parts.adapters import check_all_kept, check_no_wrapped_part, unwrapped
from .parts.freezing import frozen_patterns, select_parameters, set_part_trainable, set_trainable
from .parts.frozen_modes import (
    checkpoint_frozen_layers,
    keep_frozen_in_eval,
    keep_strided_layers,
    require_grads,
    whole_gradients,
)
from .parts.gathering import gathered_plans, gathered_sets, gathered_ties, nearest_models
from .parts.versions import check_peft
from .parts.weightless import KeepsInitialized


class MultimodalPreTrainedModel(MultimodalStorageMixin, PreTrainedModel):
    """What a composed model is besides its `forward`; see `MultimodalModel`."""

    config: MultimodalConfig
    language_model: Any
    config_class = MultimodalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities: Any = ("text", "image", "audio", "video")
    supports_gradient_checkpointing = True
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, done by the language model's class: it may keep the size in more places than one.

        Returns:
            the language model's input embeddings.
        """
        unwrapped(self.language_model).resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            self.vocab_size = self.config.get_text_config().vocab_size
            self.tie_weights()
        return self.get_input_embeddings()

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
        parts = [part for _, part in nearest_models(self)]
        for part in parts:
            if not all(getattr(module, "_is_hf_initialized", False) for module in part.modules()):
                part.initialize_weights()
        with torch.no_grad(), KeepsInitialized():
            for module in _outside(self, set(map(id, parts))):
                self._initialize_weights(module, is_custom_code=self.is_custom_code())

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
            check_count(token_id, f"{name}: a placeholder's token id", least=0)
            if token_id in used:
                raise ValueError(f"{name}: the token id {token_id} already stands for {used[token_id]!r}.")
            used[token_id] = name
        for name, token_id in token_ids.items():
            self.config.modality(name)["token_id"] = token_id
        self._strict_placeholders = True

    def _inherit_from_language_model(self, supplied: bool) -> None:
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

    def _callback_modules(self) -> dict[str, nn.Module]:
        """Callbacks that are modules, by the names that they have in this model."""
        return {
            f"{name}_encoder.{slot}": callback
            for name, encoder in self.encoders.items()
            for slot, callback in encoder.callbacks.items()
            if isinstance(callback, nn.Module)
        }

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
            keep_frozen_in_eval(self._parts() | self._callback_modules())
            keep_strided_layers(self._parts())
        checkpoint_frozen_layers(self)
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
        """As in transformers; ValueError where a part has adapters of its own, or PEFT is too old for transformers."""
        check_no_wrapped_part(self, self._parts())
        check_peft("add_adapter")
        super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; ValueError where a part has adapters of its own, or PEFT is too old for transformers."""
        check_no_wrapped_part(self, self._parts())
        check_peft("load_adapter")
        return super().load_adapter(*args, **kwargs)

    def enable_input_require_grads(self) -> None:
        """As in transformers, which knows embeddings of one tensor alone: some towers' give several (Swin, Hiera)."""
        found = [_embeddings(module) for module in self.modules() if isinstance(module, PreTrainedModel)]
        embeddings = {id(module): module for module in found if module is not None}
        self._require_grads_hooks = [e.register_forward_hook(require_grads) for e in embeddings.values()]
        self._require_grads_hook = self._require_grads_hooks[0]

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        super()._set_gradient_checkpointing(enable, whole_gradients(gradient_checkpointing_func), **options)
        checkpoint_frozen_layers(self)


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except RuntimeError:  # its kind of error for a model that tells none
        return None
    return found if isinstance(found, nn.Module) else None


def _outside(module: nn.Module, parts: set[int]) -> Iterator[nn.Module]:
    """A module and those below it that are no part and in none, children first."""
    for child in module.children():
        if id(child) not in parts:
            yield from _outside(child, parts)
    yield module
