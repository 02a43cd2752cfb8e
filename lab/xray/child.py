"""`python -m lab.xray.child < request.json`: reads adapters, tells how far it is, and ends with the result.

Lines of JSON on standard output: {"at": [done, of, what]} again and again, then {"result": …} or {"error": sentence}.
A process of its own, with a limit on its memory, so that no file can take the page down, and the page needs no torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from lab.architecture_child import MEMORY_BYTES, limit_memory

TELL_S = 0.2
TOO_MUCH = "The adapter needs more memory than this machine gives to one visitor."


def main() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    request = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    limit_memory(request.get("memory", MEMORY_BYTES))

    def say(line: dict[str, Any]) -> None:
        with os.fdopen(os.dup(out), "w", encoding="utf-8") as pipe:
            json.dump(line, pipe)
            pipe.write("\n")

    say({"at": [0, 0, "opening"]})
    from lab.errors import LabError

    try:
        say({"result": _answer(request, say)})
    except LabError as error:
        say({"error": str(error)})
    except MemoryError:
        say({"error": TOO_MUCH})
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch's way of saying it
            raise
        say({"error": TOO_MUCH})


def _answer(request: dict[str, Any], say: Any) -> dict[str, Any]:
    from lab.adapter_files import read
    from lab.xray import report

    told = 0.0

    def tell(done: int, total: int, what: str) -> None:
        nonlocal told
        if time.monotonic() - told >= TELL_S:
            told = time.monotonic()
            say({"at": [done, total, what]})

    files = [read(Path(f["path"]), f["base"] or None, name=f["name"]) for f in request["files"]]
    if request["what"] == "compare":
        return report.compare(files, tell=tell)
    against = files[0].base is not None
    return report.analyse(files[0], against_base=against, seconds=request["seconds"], tell=tell)


if __name__ == "__main__":
    main()
