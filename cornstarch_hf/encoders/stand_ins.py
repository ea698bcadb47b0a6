"""A stand-in for the item that an encoder does not have in a step: one ordinary item, of which no feature is used.

Processes that train together must run the same parts: gradients are summed over all of them, and sharded weights are gathered
by all when one needs them.  A process whose batch has no image would leave the others waiting, or stop.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .module import ModalEncoderModule, first_weight


def together() -> bool:
    """Whether this is one of several processes that run together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's weights lie in pieces on several processes (by FSDP, tensor parallelism or ZeRO-3)."""
    pieces = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in module.parameters())
    return pieces or any(hasattr(m, "unshard") or hasattr(m, "_fsdp_wrapped_module") for m in module.modules())


def trains(part: Any) -> bool:
    """Whether something of a module, or of outputs, needs gradients."""
    if isinstance(part, nn.Module):
        return any(p.requires_grad for p in part.parameters())
    items = part if isinstance(part, (list, tuple)) else [part]
    return any(isinstance(x, Tensor) and x.requires_grad for x in items)


def joint(encoder: ModalEncoderModule) -> nn.ModuleList:
    """An encoder with those whose features are joined to its own."""
    return nn.ModuleList([encoder, *(() if encoder.join is None else encoder.join.others.values())])


def idle_encoders(model: Any, outputs: Collection[str], features: Any) -> list[str]:
    """Encoders without an item that have to run all the same.

    They are those that train while several processes do, or whose weights are sharded; and in one process all that train, if
    nothing else would give the loss a gradient.

    Args:
        model: the composed model.
        outputs: modalities that have items in this step.
        features: tensors through which gradients may flow from elsewhere.
    """
    # Of encoders that are joined the first one runs all.
    groups = {name: joint(encoder) for name, encoder in model.encoders.items() if name not in model.config.joined}
    idle = {name: encoder for name, encoder in groups.items() if name not in outputs}
    several, learning = together(), model.training and torch.is_grad_enabled()
    if not idle or not (several or learning):
        return []
    learners = [name for name, encoder in idle.items() if learning and trains(encoder)]
    if several:
        return [name for name, encoder in idle.items() if name in learners or is_sharded(encoder)]
    others = [encoder for name, encoder in groups.items() if name in outputs]
    return [] if not learners or trains(features) or any(map(trains, (model.language_model, *others))) else learners


def run_stand_in(encoder: ModalEncoderModule, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The features of a stand-in, one ``(n, hidden)`` tensor per item.

    In evaluation mode, but for what is checkpointed: nothing is drawn at random, and no statistics of batches change.
    """
    modes = {module: module.training for part in joint(encoder) for module in part.modules()}
    # These run again in the backward pass, in the mode that they have then, and gather their weights again.
    again = {m for top in modes if getattr(top, "gradient_checkpointing", False) for m in top.modules()}
    norms = [module for module, training in modes.items() if training and isinstance(module, _BatchNorm)]
    waits = any(isinstance(module, nn.SyncBatchNorm) for module in norms)
    if waits or (is_sharded(joint(encoder)) and not again.isdisjoint(norms)):
        told = "its batch norms would count what stands in for an item that this process does not have"
        raise ValueError(f"{encoder.name}: {told}: freeze it, or give each step of each process an item.")
    again = again if again.isdisjoint(norms) else set()
    weight = first_weight(encoder)
    device = torch.device("cpu") if weight is None or weight.is_meta else weight.device
    inputs = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in inputs.items()}
    try:
        for module in modes.keys() - again:
            module.training = False
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            output = encoder(**inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    levels = output.get("deepstack_features") or ()  # for inner layers, whose parameters train too
    return [*output.pooler_output, *(item for level in levels for item in level)]
