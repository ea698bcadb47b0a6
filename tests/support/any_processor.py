"""A processor that rounds as no real one does, to find tests that depend on which one they run on: `make test-any-processor`.

Real ones choose the order of a sum by shapes, strides and addresses, each in its own way.  `install` shifts the result of
every product, convolution and attention by -2 to 2 units in the last place, drawn from just these, and results of pointwise
functions by the layout.  A comparison of bits that holds here holds everywhere; one that fails compares products of other
shapes, layouts or places.  For a process of tests alone: what it replaces is torch's own, for all threads.
"""

import os
import warnings
import zlib

import torch

PRODUCTS = (
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "_addmm_activation", "_grouped_mm"),
    *("mkldnn_convolution", "_slow_conv2d_forward", "slow_conv3d_forward"),
    "_scaled_dot_product_flash_attention_for_cpu",
)
POINTWISE = (
    *("gelu", "silu", "tanh", "exp", "sigmoid", "sin", "cos", "softplus", "mish", "erf", "rsqrt", "sqrt", "log"),
    "pow.Tensor_Scalar",
)
_installed = []


def install():
    """Put this processor in the place of the real one, once, where `ANY_PROCESSOR` is set."""
    if _installed or not os.environ.get("ANY_PROCESSOR"):
        return
    library = torch.library.Library("aten", "IMPL")
    _installed.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced is what is wanted
        for names, place in ((PRODUCTS, _place), (POINTWISE, _layout)):
            for name in names:
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
                library.impl(name, _shifting(kernel, name, place), "CPU", with_keyset=True, allow_override=True)


def _shifting(kernel, name, place):
    def run(keys, *args, **kwargs):
        output = kernel.call_boxed(keys, *args, **kwargs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        units = zlib.crc32(repr((name, _places(args, place))).encode()) % 5 - 2
        if units and first.is_floating_point() and first.device.type == "cpu":
            first.mul_(1 + units * torch.finfo(first.dtype).eps)
        return output

    return run


def _places(given, place):
    if isinstance(given, torch.Tensor):
        return place(given) if given.device.type == "cpu" else None
    return [_places(one, place) for one in given] if isinstance(given, list | tuple) else None


def _place(x):
    """All that the order of a sum may depend on."""
    return str(x.dtype), *x.shape, x.stride(), x.data_ptr() % 64


def _layout(x):
    """What decides which elements a vector holds and which are left over."""
    return str(x.dtype), *([x.numel()] if x.is_contiguous() else [*x.shape, x.stride()])
