"""A stand-in for the package `kernels`, which writes down in `ASKED` what it is asked for.  A plain module."""

from pathlib import Path

from transformers.utils import import_utils

STAND_IN = """
import types
ASKED, __version__ = [], "VERSION"
def get_kernel(name, *args, **kwargs):
    ASKED.append(name)
    module = types.ModuleType("kernel")
    module.flash_attn_varlen_func = module.flash_attn_func = lambda *args, **kwargs: None
    return module
class _Any:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args and callable(args[0]) else self
    def __getattr__(self, name): return _Any()
    def __or__(self, other): return self
class Device(_Any): pass
class Mode: TRAINING = INFERENCE = TORCH_COMPILE = 1
class LayerRepository(_Any): pass
class CUDAProperties(_Any): pass
def use_kernel_forward_from_hub(name): return lambda cls: cls
def use_kernelized_func(*args, **kwargs): return lambda cls: cls
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Any()
"""


def put_kernels(packages: Path) -> None:
    """Put the stand-in, in the version that transformers wants, into a folder of packages."""
    version = import_utils.KERNELS_MIN_VERSION
    package = packages / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN.replace("VERSION", version))
    meta = packages / f"kernels-{version}.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (meta / "RECORD").write_text("kernels/__init__.py,,\n")
