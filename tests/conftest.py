"""Settings of the whole suite: offline, one thread per process, tiny parts from `support/tiny`."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent / "support"))
from any_processor import install

install()

SUPPORT = Path(__file__).parent / "support"
collect_ignore = [str(path) for path in SUPPORT.glob("*.py") if not path.name.startswith("test_")]


@pytest.fixture(autouse=True)
def nothing_that_threads_share_has_changed():
    """After each test, torch and transformers are the very same: other threads build models beside ours."""
    from process_state import changes, process_state

    before = process_state()
    yield
    assert changes(before, process_state()) == []


@pytest.fixture(scope="module")
def pair():
    """A model with CLIP and Whisper, and its processor, for tests that leave both as they are."""
    from helpers import compose_tiny

    return compose_tiny(["clip", "whisper"])


@pytest.fixture
def fresh_pair():
    """Such a model and processor for one test alone."""
    from helpers import compose_tiny

    return compose_tiny(["clip", "whisper"])


def pytest_addoption(parser):
    parser.addoption("--supported", help="write the page about what is supported to this file, from this run")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--supported")
    if path:
        import transformers
        from supported import page

        states = {state: terminalreporter.stats.get(state, []) for state in ("passed", "failed", "error")}
        reports = [r for state, found in states.items() for r in found if state == "error" or r.when == "call"]
        Path(path).write_text(page(reports, transformers.__version__), encoding="utf-8")
        terminalreporter.write_line(f"written: {path}")
