"""Training processes that start at once.

Importing torch, diffusers and transformers costs several seconds of processor time, for every run anew. Here one
process, kept by the worker, imports what a task says it needs (`Task.imports`) and forks a child for each attempt.
It only imports: no tensor is made before the fork, no thread is started, so the child is as if it had imported
everything itself. On Linux without a GPU only: elsewhere system libraries do not survive a fork (`resident.py` is for
there). LAB_WARM=0 turns it off.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from lab.jobs import child, processes
from lab.jobs.kept import Kept, sees_gpu


class Nursery(Kept):
    """The process that forks."""

    module = "lab.jobs.warm"

    @staticmethod
    def possible(device: str) -> bool:
        return sys.platform == "linux" and not sees_gpu(device) and os.environ.get("LAB_WARM", "1") != "0"


# -- the nursery's own process ---------------------------------------------------------------------------
def main() -> None:
    if not processes.die_with(int(os.environ["LAB_PARENT"])):
        return
    from lab.runs import default_home

    home = default_home()
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")  # the threads are OpenBLAS's own
    for line in sys.stdin:
        run_id = line.strip()
        child.import_for(home, run_id)
        gc.freeze()  # what is here now stays shared with the children
        pid = os.fork()
        if pid == 0:
            _become(home, run_id)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # here too: whoever is told of it may signal the group at once
        print("start", pid, flush=True)
        print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(home: Path, run_id: str) -> NoReturn:
    """Be the training process: own group, own output, and the nursery for a parent."""
    code = child.FAILED
    try:
        os.environ["LAB_PARENT"] = str(os.getppid())
        os.setpgid(0, 0)
        log = child.open_log(home, run_id)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for given, number in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(given, number)
        code = child.main([run_id])
    finally:
        os._exit(code)  # never back into the nursery's loop


if __name__ == "__main__":
    main()
