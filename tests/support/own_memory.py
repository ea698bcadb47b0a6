"""Equality across a reload: weights to the bit as they were loaded, outputs from memory of their own.

Weights that were loaded lie in the mapped file, arrays of NumPy and slices anywhere; torch allocates at multiples of 64.
Some processors sum in another order elsewhere, so equal weights give outputs that differ in the last bit, with models of
transformers as with ours.  `weights` tells weights by their bits; `own_memory` moves both sides before outputs are compared.
"""

import hashlib
from itertools import chain

import torch
from any_processor import install
from torch import nn


def own_memory(given):
    """What is given, each tensor copied to memory that torch allocates; a module changes in place, weights stay tied."""
    install()  # here, since every process that compares outputs comes by
    if isinstance(given, nn.Module):
        for tensor in chain(given.parameters(), given.buffers()):
            tensor.data = own_memory(tensor.data)
        return given
    if isinstance(given, torch.Tensor):
        return given.clone(memory_format=torch.contiguous_format)
    if isinstance(given, dict):
        return {key: own_memory(value) for key, value in given.items()}
    return type(given)(map(own_memory, given)) if isinstance(given, list | tuple) else given


def weights(model):
    """``{name: (dtype, shape, digest)}`` of parameters and buffers, to be compared within a process or between two."""
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: (str(tensor.dtype), tuple(tensor.shape), _digest(tensor)) for name, tensor in named}


def _digest(tensor):
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()


def check_comes_back(model, again, inputs, **generation):
    """Demand of a reloaded model the weights, logits and, with options of `generate`, the tokens of the one that was saved.

    Both models are moved to memory of their own.
    """
    assert weights(again) == weights(model)
    sides, inputs = [own_memory(model), own_memory(again)], own_memory(inputs)
    with torch.no_grad():
        logits, found = [side(**inputs).logits for side in sides]
    assert torch.equal(found, logits)
    if generation:
        tokens, found = [side.generate(**inputs, **generation) for side in sides]
        assert torch.equal(found, tokens)
