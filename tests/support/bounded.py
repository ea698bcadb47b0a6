"""Runs hostile input in a process of its own, with limits of time and memory.  A plain module."""

import json
import os
import subprocess
import sys

from helpers import HERE

SECONDS, MEGABYTES = 20, 2000  # of computing, imports included; of resident memory
_FRAME = """
import json, resource
resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 2))
resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
CODE
results = {}
for name, attempt in attempts.items():
    try:
        attempt()
        results[name] = ["accepted", ""]
    except Exception as error:
        results[name] = ["ValueError" if isinstance(error, ValueError) else type(error).__name__, str(error)[:600]]
# The kernel's own peak of this program: `ru_maxrss` starts at what the process that started it held.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("RESULT" + json.dumps([results, int(peak.split()[1]) // 1024]))
"""


def refusals(code):
    """What each of the `attempts` (name -> function) that the code defines raised: ``{name: (error, message)}``.

    All of them together have `SECONDS` of computing, and may never have used `MEGABYTES`.
    """
    frame = _FRAME.replace("SECONDS", str(SECONDS)).replace("CODE", code)
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-"], input=frame, capture_output=True, text=True, env=environment, timeout=300
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, f"{done.returncode}: {done.stdout[-1000:]}{done.stderr[-3000:]}"
    results, megabytes = json.loads(lines[0].removeprefix("RESULT"))
    assert megabytes < MEGABYTES, f"{megabytes} MB"
    return {name: tuple(found) for name, found in results.items()}
