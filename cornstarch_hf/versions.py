"""Versions of transformers that are tested, and what is refused with others: caches, whose names change between versions.

Importing this module warns outside the tested range.  A checkpoint's own code carries it, where no installer checks.
"""

import warnings

import transformers
from packaging.version import Version

OLDEST, BELOW = "5.20.2", "5.24"  # the oldest that is tested, and the first that is not
_FOUND = Version(transformers.__version__)
_RANGE = f"transformers >= {OLDEST}, < {BELOW}"
_REMEDY = f'pip install "transformers>={OLDEST},<{BELOW}"'


def check_caches_known() -> None:
    """Refuse to work with a cache where its names are unknown: it would be dropped in silence, or be continued wrongly.

    Raises:
        ValueError: a version of transformers that came after the tested ones.
    """
    if _FOUND.release >= Version(BELOW).release:
        raise ValueError(
            f"Composed models cannot generate, or take a cache, with transformers {transformers.__version__}: tested with "
            f"{_RANGE}, and later versions name caches differently. Remedy: {_REMEDY}"
        )


def _warn_if_untested() -> None:
    if not Version(OLDEST).release <= _FOUND.release < Version(BELOW).release:
        warnings.warn(
            f"cornstarch_hf is tested with {_RANGE}, but transformers {transformers.__version__} is installed. "
            f"Remedy: {_REMEDY}",
            stacklevel=2,
        )


_warn_if_untested()
