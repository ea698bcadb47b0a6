"""Run usage snippets, each in a process of its own that has not imported cornstarch_hf.

Called with a JSON file of ``{name: code}``, which becomes ``{name: what it printed}`` with a last line that is a JSON list
of the names of the model's inputs.  The processes are forked from one that has imported transformers: that
takes longer than all the rest.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import transformers  # noqa: F401
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlamaForCausalLM  # noqa: F401


def main():
    results = {}
    for name, code in json.loads(Path(sys.argv[1]).read_text()).items():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writer, 1)
            status = 0
            try:
                assert "cornstarch_hf" not in sys.modules
                names = {"__name__": "__main__"}
                exec(compile(code, name, "exec"), names)
                print(json.dumps(sorted(names.get("inputs", {}))))
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as output:
            printed = output.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, name
        results[name] = printed
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
