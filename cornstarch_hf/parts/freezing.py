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
from .stored_modules import SLOTS

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


def usually_trains(part: nn.Module) -> set[str]:
    """What trains of a part that trains: all of it; of a PEFT-wrapped one what its adapters train, not the weights below."""
    # As `get_peft_model` leaves it: whoever wraps a part wants its base weights to stay.
    every = {name for name, p in parameters_by_name(part) if p.is_floating_point() or p.is_complex()}
    return adapter_parameter_names(part) if is_wrapped(part) else every


# ---- parts that `train(llm_mode=False)` froze train again as before.  What of them differs from `usually_trains` is remembered
# in `config.frozen_parts`, by part: "held" back by hand, trained in "addition", and whether the part is "off" at the moment.


def freeze_part(part: nn.Module, before: Mapping[str, Any]) -> dict[str, Any]:
    """Freeze a part (in place), and say what trained until then; `before` is what was said the last time."""
    parameters = dict(parameters_by_name(part))
    trains = {name for name, p in parameters.items() if p.requires_grad}
    if before.get("off") and not trains:
        return dict(before)  # frozen once more
    usual = usually_trains(part)
    set_trainable(part, trains, False)
    found = {
        "off": True,
        "held": compress(usual - trains, parameters),
        "addition": compress(trains - usual, parameters),
    }
    return {key: value for key, value in found.items() if value}


def train_part(part: nn.Module, before: Mapping[str, Any], asked: bool) -> dict[str, Any]:
    """Train a part (in place) as before it was frozen; as usual if nothing trained then and it is `asked` for by name."""
    names = {name for name, _ in parameters_by_name(part)}
    usual = usually_trains(part)
    chosen = (usual - matches(before.get("held", ()), names)) | matches(before.get("addition", ()), names)
    if asked and not chosen and usual:
        chosen, before = usual, {}
    set_trainable(part, chosen, True)
    return {key: value for key, value in before.items() if key != "off"}


_Modes = Mapping[str, tuple[bool, bool]]
# Which of a pair of modes each part follows.
_PAIR = {"module": 0, SLOTS[0]: 0, SLOTS[1]: 0, "projector": 1, SLOTS[2]: 1}

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
        """Train parts again; without names, everything (of PEFT-wrapped parts what their active adapters train).

        Call it after `merge_and_unload()`: PEFT leaves the weights below its adapters frozen, and saving keeps that.
        """
        if patterns:
            chosen = select_parameters(self, patterns)
            self._release(chosen)
            return self._set_frozen(chosen, frozen=False)
        self.config.frozen_parts = None
        for part in self._learnt().values():
            set_trainable(part, usually_trains(part), True)
        return self._set_frozen(set(), frozen=False)

    def _set_frozen(self, names: Iterable[str], frozen: bool):
        set_trainable(self, names, not frozen)
        self.config.frozen = frozen_patterns(self) or None
        return self.train(self.training)  # the modes of frozen layers follow

    def _release(self, names: set[str]) -> None:
        """Hold parameters no longer back that are held back while their part is frozen."""
        known, parts = self.config.frozen_parts or {}, self._learnt()
        for name in known.keys() & parts.keys():
            inside = [parameter for parameter, _ in parameters_by_name(parts[name])]
            left = {n for n in matches(known[name].get("held", ()), inside) if f"{name}.{n}" not in names}
            known[name]["held"] = compress(left, inside)

    def _parts(self, more: Iterable[str] = ()) -> dict[str, Any]:
        parts = {"language_model": self.language_model}
        for name, encoder in self.encoders.items():
            # Else another encoder's.
            own = [part for part in ("module", "projector", *more) if part not in encoder.shares]
            parts |= {f"{name}_encoder.{part}": getattr(encoder, part) for part in own}
        return parts

    def _learnt(self) -> dict[str, nn.Module]:
        """The parts, and callbacks that learn."""
        return {n: part for n, part in self._parts(SLOTS).items() if isinstance(part, nn.Module)}

    def train(self, mode: bool = True, *, encoders_mode: _Modes | None = None, llm_mode: bool | None = None):
        """Set the training mode; frozen parts keep their dropout and norm statistics off.

        Args:
            mode: as in torch; `requires_grad` is not touched.
            encoders_mode: Cornstarch's form of freezing: ``{name: (encoder trains, projector trains)}`` sets
                `requires_grad` and mode together, of callbacks too: of one behind the projector with it, of others with
                the encoder.  Left out, all encoders follow `llm_mode`.
            llm_mode: likewise for the language model.

        A part that is frozen so and trained again trains what it did before, after a save and a load too: parameters that
        were frozen by hand stay frozen, and of a PEFT-wrapped part the active adapters train, with their tokens and biases.
        A part of which nothing trained before trains as a whole when it is named (`llm_mode` names the language model).

        Raises:
            ValueError: an encoder that the model does not have, or a value that is no pair; parameters that train but
                would not be saved with the adapters around the model.
        """
        if encoders_mode is not None or llm_mode is not None:
            self._set_modes(encoders_mode, llm_mode)
        super().train(mode)
        if mode:  # torch has put every module into training mode; frozen ones go back
            check_all_kept(self)
            keep_frozen_in_eval(self._learnt())
            keep_strided_layers(self._parts())
        checkpoint_frozen_layers(self)
        return self

    def _set_modes(self, encoders_mode: _Modes | None, llm_mode: bool | None) -> None:
        follow = encoders_mode is None
        if encoders_mode is None:
            encoders_mode = dict.fromkeys(self.config.encoders, (bool(llm_mode),) * 2)
        if unknown := sorted(set(encoders_mode) - set(self.config.encoders)):
            raise ValueError(f"encoders_mode names {unknown}, this model has the encoders {self.config.encoders}.")
        modes = {}
        for name, pair in encoders_mode.items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(f"encoders_mode[{name!r}] must be (encoder trains, projector trains), got {pair!r}.")
            for part, i in _PAIR.items():
                lender, trains = self.encoders[name].shares.get(part), bool(pair[i])
                if lender and trains != bool(encoders_mode.get(lender, (not trains,) * 2)[i]):
                    raise ValueError(
                        f"encoders_mode[{name!r}]: its {part} is that of {lender!r}, of which say the same."
                    )
                modes[f"{name}_encoder.{part}"] = trains
        if llm_mode is not None:
            modes["language_model"] = bool(llm_mode)
        parts, known = self._learnt(), dict(self.config.frozen_parts or {})
        for name, trains in modes.items():
            if name in parts:  # else another encoder's, or nobody's
                before, asked = known.get(name, {}), name == "language_model" or not follow
                known[name] = train_part(parts[name], before, asked) if trains else freeze_part(parts[name], before)
        self.config.frozen_parts = {n: kept for n, kept in known.items() if kept} or None
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
