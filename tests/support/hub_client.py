"""A client of the tests' Hub: a process of its own, since the real clients read their environment when they are imported.

`Client` starts it, and sends it code; run as a program this module is that process.
"""

import contextlib
import io
import json
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

HERE = Path(__file__).parent


class Failed(Exception):
    """What the client's code raised: `kinds` are the names of its class and of that one's bases."""

    def __init__(self, kinds, message, cause):
        super().__init__(f"{kinds[0]}: {message}" if message else cause)
        self.kinds, self.message, self.cause = kinds, message, cause


class Client:
    """A running client process; call it with code, whose variables stay.  What it prints is returned."""

    def __init__(self, hub, cache, token=None, site=None, **environment):
        """`site` is a folder of packages to use instead of those that are installed, this one among them."""
        command = [sys.executable, *(["-S", "-P"] if site else []), str(HERE / "hub_client.py")]
        path = f"{site}:{HERE}" if site else f"{HERE}:{HERE.parents[1]}"
        self.process = subprocess.Popen(command, env=hub.environment(cache, token, PYTHONPATH=path, **environment), text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        self.log = ""

    def __call__(self, code, **values):
        sent = {"code": textwrap.dedent(code), "values": values}
        self.process.stdin.write(json.dumps(sent) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the client process has ended"
        answer = json.loads(line)
        self.log = answer["log"]
        if answer["error"]:
            raise Failed(*answer["error"])
        return answer["out"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


def main():
    channel, space = sys.stdout, {}
    for line in sys.stdin:
        sent = json.loads(line)
        out, log, error = io.StringIO(), io.StringIO(), None
        space |= sent["values"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
            import logging

            handler = logging.StreamHandler(log)
            logging.getLogger().addHandler(handler)
            try:
                exec(compile(sent["code"], "client", "exec"), space)
            except Exception as caught:
                cause = "".join(traceback.format_exception(caught))
                error = [[c.__name__ for c in type(caught).__mro__], str(caught), cause]
            logging.getLogger().removeHandler(handler)
        print(json.dumps({"out": out.getvalue(), "log": log.getvalue(), "error": error}), file=channel, flush=True)


if __name__ == "__main__":
    main()
