"""What a process that does several runs has to put back after each, so that the next finds it as a new one would be.

The base model is seen to by lab/bases/_kept.py; here is everything else that runs change: torch's switches, random
number generators, the environment, the working folder, limits, what the lab remembers, memory, and what a run left
running.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import random
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.jobs import processes

SLACK_BYTES = 64 * 2**20  # on a GPU, of tensors that nobody knows of: more would be counted as the next run's peak
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
CACHE = type(functools.lru_cache(lambda: None))


class Fresh:
    """The process as it is now; `restore` makes it so again."""

    def __init__(self) -> None:
        self.torch = "torch" in sys.modules
        self._environment, self._folder = dict(os.environ), Path.cwd()
        self._threads = {thread.ident for thread in threading.enumerate()}
        self._limits = [resource.getrlimit(limit) for limit in LIMITS]
        self._random = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy else None
        if self.torch:
            import torch

            self._seed, self._generator = torch.initial_seed(), torch.get_rng_state()
            self._switches = [(put, get()) for get, put in _switches()]

    def restore(self) -> str:
        """Put everything back. Says what could not be, "" when all was: then a run in this process equals one in a new."""
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        random.setstate(self._random)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        _forget_what_was_computed()
        why = self._leftovers() or self._restore_torch()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc: memory that was freed is counted as this process's no longer
        return why

    def _leftovers(self) -> str:
        """What a run left running."""
        left = [t.name for t in threading.enumerate() if t.ident not in self._threads and _may_work(t)]
        if left:
            return f"threads were left: {', '.join(left)[:200]}"
        return "programs were left running" if processes.members() else ""

    def limits_changed(self) -> bool:
        """Whether the run lowered a limit of the process, which a new image of it would have as well."""
        return [resource.getrlimit(limit) for limit in LIMITS] != self._limits

    def _restore_torch(self) -> str:
        if not self.torch:
            return "it was new without torch" if "torch" in sys.modules else ""
        import torch

        for put, value in self._switches:
            put(value)
        gc.collect()
        kept: Any = sys.modules.get("lab.bases._kept")
        if kept and (why := kept.settle()):
            print(f"resident: the base is read again: {why}", file=sys.stderr, flush=True)
        if "torch._dynamo" in sys.modules and hasattr(torch, "_dynamo"):
            torch._dynamo.reset()
        gc.collect()
        torch.set_rng_state(self._generator)
        return self._restore_gpu(torch, kept)

    def _restore_gpu(self, torch: Any, kept: Any) -> str:
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(self._seed)
            torch.mps.empty_cache()
        if not torch.cuda.is_initialized():
            return ""
        torch.cuda.synchronize()  # an error that waits is told here, not in the next run
        torch.cuda.manual_seed_all(self._seed)
        if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
            clear()
        torch.cuda.empty_cache()
        unknown = torch.cuda.memory_allocated() - (kept.held_bytes("cuda") if kept else 0)
        return f"{unknown >> 20} MiB were left on the GPU" if unknown > SLACK_BYTES else ""


def _switches() -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How to read and how to set each of torch's global switches."""
    import torch

    def attribute(thing: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        return lambda: getattr(thing, name), lambda value: setattr(thing, name, value)

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return [
        (deterministic, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        *(attribute(cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")),
    ]


def _may_work(thread: threading.Thread) -> bool:
    """Not torch's own, which Python only knows of, nor the one that wakes up progress bars."""
    return not isinstance(thread, threading._DummyThread) and type(thread).__name__ != "TMonitor"


def _forget_what_was_computed() -> None:
    """Empty the bounded caches of the lab's own functions: they hold tensors, models and pictures, which would count as
    the next run's memory, and which it computes again the same. Unbounded ones hold what is made once a process."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "lab":
            for value in list(vars(module).values()):
                if isinstance(value, CACHE) and value.cache_parameters()["maxsize"] is not None:
                    value.cache_clear()
