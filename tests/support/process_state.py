"""What all threads of the process share of torch and transformers, and what therefore nobody may change unasked."""

import sys

import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.utils import _device, _python_dispatch
from transformers import PreTrainedModel, initialization

FACTORIES = (
    "empty",
    "empty_like",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "arange",
    "linspace",
    "tensor",
    "as_tensor",
)
HOOKS = [name for name in vars(modules) if name.startswith("_global_") and isinstance(getattr(modules, name), dict)]


def process_state():
    """Shared objects by name: methods, functions, hooks, flags, defaults; to be compared by equality."""
    state = {f"nn.Module.{name}": value for name, value in vars(nn.Module).items() if name != "smart_apply"}
    for name in initialization.TORCH_MODULES_TO_PATCH:
        found = vars(sys.modules[name]) if name in sys.modules else {}
        state |= {f"{name}.{key}": found[key] for key in initialization.TORCH_INIT_FUNCTIONS if key in found}
    state |= {f"torch.{name}": getattr(torch, name) for name in FACTORIES}
    state |= {f"Tensor.{name}": getattr(torch.Tensor, name) for name in ("to", "normal_", "uniform_", "fill_", "copy_")}
    state |= {
        name: getattr(PreTrainedModel, name)
        for name in ("__init__", "init_weights", "initialize_weights", "tie_weights")
    }
    state |= {name: tuple(getattr(modules, name)) for name in HOOKS}
    state |= {name: getattr(_python_dispatch, name) for name in vars(_python_dispatch) if name.startswith("_is_in")}
    state |= {"device": _device.CURRENT_DEVICE, "dtype": torch.get_default_dtype()}
    return state


def changes(before, after):
    """Names of what is another object now; what torch's compiler puts in for good, when it is first used, is no change."""
    names = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return sorted(n for n in names if "generation_tag" not in n and not _is_compilers(after.get(n)))


def _is_compilers(value):
    return str(getattr(value, "__module__", "")).startswith("torch._dynamo")
