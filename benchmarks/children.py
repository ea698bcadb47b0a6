"""Fresh processes that see this checkout of the package."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a fresh interpreter.

    Args:
        *arguments: of the interpreter.
        environment: variables besides those that this process has.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **(environment or {})}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def run_module(name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """As `run_python`, of a module."""
    return run_python("-m", name, *arguments, environment=environment)
