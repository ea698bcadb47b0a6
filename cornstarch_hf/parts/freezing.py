"""What of a model trains: names and `requires_grad`.  How frozen parts run is beside it, in `frozen_modes`."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .adapters import adapter_parameter_names, check_all_kept, is_wrapped
from .frozen_modes import (
    checkpoint_frozen_layers,
    keep_frozen_in_eval,
    keep_strided_layers,
    require_grads,
    whole_gradients,
)
from .names import at_or_above, compress, matches, parameters_by_name

# Names are looked up with `parameters_by_name`, which gives a tied weight under each of its names: whoever freezes the
# embeddings by name freezes the head that shares them, and a pattern for either name finds it.


def select_parameters(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Parameters at or below what names or globs such as ``"*.projector"`` name; ValueError lists parts if one names none."""
    parameters = [name for name, _ in parameters_by_name(model)]
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        named = set(fnmatch.filter([*modules, *parameters], pattern))
        if not named:  # a part without parameters may be named, and has nothing to choose
            parts = [name for name in modules if name.count(".") <= 1][:12]
            raise ValueError(f"{pattern!r} names no part with parameters, expected names or globs such as {parts}.")
        chosen |= {name for name in parameters if not named.isdisjoint(at_or_above(name))}
    return chosen


def set_trainable(model: nn.Module, names: Iterable[str], trainable: bool) -> None:
    """Set `requires_grad` of the named parameters (floating-point ones; others cannot have gradients)."""
    wanted = set(names)
    for name, parameter in parameters_by_name(model):
        if name in wanted and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(trainable)


def frozen_patterns(model: nn.Module) -> list[str]:
    """Patterns that match exactly the parameters that do not train."""
    parameters = dict(parameters_by_name(model))
    return compress((name for name, p in parameters.items() if not p.requires_grad), parameters)


def restore_frozen(model: nn.Module, patterns: Iterable[str] | None) -> int:
    """Freeze exactly the parameters that match the patterns, and no others; returns how many are frozen."""
    if patterns is None:
        return 0
    names = [name for name, _ in parameters_by_name(model)]
    frozen = matches(patterns, names)
    # Both ways: PEFT, for one, makes every parameter trainable when adapters are loaded.
    set_trainable(model, frozen, False)
    set_trainable(model, set(names) - frozen, True)
    return len(frozen)


def set_part_trainable(part: nn.Module, trainable: bool) -> None:
    """Train or freeze a part; of a PEFT-wrapped one only the adapters are ever trained."""
    # As `get_peft_model` leaves it: whoever wraps a part wants its base weights to stay.
    only_adapters = trainable and is_wrapped(part)
    chosen = adapter_parameter_names(part) if only_adapters else (name for name, _ in part.named_parameters())
    set_trainable(part, chosen, trainable)


_Modes = Mapping[str, tuple[bool, bool]]

# Three things follow from what is frozen: `requires_grad` (set here), `config.frozen` (patterns of names, kept by a
# checkpoint), and the mode of each module (set by `train`, see `frozen_modes`).


class FreezingMixin(PreTrainedModel):
    """Which parts of a composed model train, and the modes in which they run."""

    config: Any
    encoders: Any
    language_model: Any

    def freeze(self, *patterns: str):
        """Exclude parts from training: ``freeze("vision_encoder.module", "language_model")``; the choice survives saving.

        Args:
            *patterns: dotted names of modules or parameters, or globs such as ``"*.projector"``.

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
        return self.train(self.training)  # the modes of frozen layers follow

    def _parts(self) -> dict[str, nn.Module]:
        parts = {"language_model": self.language_model}
        for name, encoder in self.encoders.items():
            parts |= {f"{name}_encoder.module": encoder.module, f"{name}_encoder.projector": encoder.projector}
        return parts

    def train(self, mode: bool = True, *, encoders_mode: _Modes | None = None, llm_mode: bool | None = None):
        """Set the training mode; frozen parts keep their dropout and norm statistics off.

        Args:
            mode: as in torch; `requires_grad` is not touched.
            encoders_mode: Cornstarch's form of freezing: ``{name: (encoder trains, projector trains)}`` sets
                `requires_grad` and mode together.  Left out, all encoders follow `llm_mode`.
            llm_mode: likewise for the language model.

        Raises:
            ValueError: an encoder that the model does not have, or a value that is no pair; parameters that train but
                would not be saved with the adapters around the model.
        """
        if encoders_mode is not None or llm_mode is not None:
            self._set_modes(encoders_mode, llm_mode)
        super().train(mode)
        if mode:  # torch has put every module into training mode; frozen ones go back
            check_all_kept(self)
            callbacks = {f"{n}.{slot}": c for n, e in self.encoders.items() for slot, c in e.callbacks.items()}
            keep_frozen_in_eval(self._parts() | {n: c for n, c in callbacks.items() if isinstance(c, nn.Module)})
            keep_strided_layers(self._parts())
        checkpoint_frozen_layers(self)
        return self

    def _set_modes(self, encoders_mode: _Modes | None, llm_mode: bool | None) -> None:
        if encoders_mode is None:
            encoders_mode = dict.fromkeys(self.config.encoders, (bool(llm_mode),) * 2)
        if unknown := sorted(set(encoders_mode) - set(self.config.encoders)):
            raise ValueError(f"encoders_mode names {unknown}, this model has the encoders {self.config.encoders}.")
        for name, pair in encoders_mode.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"encoders_mode[{name!r}] must be (encoder trains, projector trains), got {pair!r}.")
            for part, trains in zip((self.encoders[name].module, self.encoders[name].projector), pair, strict=True):
                set_part_trainable(part, bool(trains))
        if llm_mode is not None:
            set_part_trainable(self.language_model, bool(llm_mode))
        self.config.frozen = frozen_patterns(self) or None

    def enable_input_require_grads(self) -> None:
        """As in transformers, which knows embeddings of one tensor alone: some towers' give several (Swin, Hiera)."""
        found = [_embeddings(module) for module in self.modules() if isinstance(module, PreTrainedModel)]
        embeddings = {id(module): module for module in found if module is not None}  # each once, whoever else gives it
        self._require_grads_hooks = [e.register_forward_hook(require_grads) for e in embeddings.values()]
        self._require_grads_hook = self._require_grads_hooks[0]

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **options):
        super()._set_gradient_checkpointing(enable, whole_gradients(gradient_checkpointing_func), **options)
        checkpoint_frozen_layers(self)


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except RuntimeError:  # what transformers raises for a model that names none
        return None
    return found if isinstance(found, nn.Module) else None
