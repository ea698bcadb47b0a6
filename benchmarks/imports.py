"""Time of importing the package, against the part of transformers that it cannot do without."""

from .children import run_python
from .results import Result, Target, in_turn
from .sizes import Sizes

NATIVE = "from transformers import PreTrainedModel, ProcessorMixin"
OURS = "import cornstarch_hf"
PROGRAM = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def import_seconds(statement: str) -> float:
    """Time of a statement in a fresh interpreter, whose own start is left out."""
    return float(run_python("-c", PROGRAM.format(statement)).splitlines()[-1])


def imports(sizes: Sizes) -> list[Result]:
    """Imports in fresh processes, in turn."""
    samples = in_turn(
        lambda: import_seconds(NATIVE), lambda: import_seconds(OURS), sizes.pairs["import"], int(sizes.judged)
    )
    target = Target(at_most=1.1) if sizes.judged else None
    return [Result("import", "import", "s", *samples, target, notes={"native": NATIVE, "ours": OURS})]
