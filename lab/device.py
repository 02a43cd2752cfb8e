"""Device, precision, seeds, memory."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from lab.errors import LabError


@functools.cache
def pick() -> torch.device:
    """The device to compute on: LAB_DEVICE if set ("cpu", "cuda:1", "mps"), else the first accelerator there is."""
    wish = os.environ.get("LAB_DEVICE")
    if wish:
        try:
            device = torch.device(wish)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise LabError(f"LAB_DEVICE is '{wish}', which this machine has not: unset it or name another.") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it (Ampere or newer; AVX512-BF16 or AMX processors); on older GPUs fp16,
    which the training loop scales its losses for; else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def weights_dtype(device: torch.device) -> torch.dtype:
    """How a base's frozen weights are held: fp16 on GPUs, as they are published, so that W is exactly what other
    programs load (a NoRA basis is recomputed from it); fp32 on CPUs, which holds fp16 weights exactly too."""
    return torch.float16 if device.type == "cuda" else torch.float32


WEIGHTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def held_in(device: torch.device, wish: str | None) -> torch.dtype:
    """The dtype that a setting's word stands for, None being the device's own. Raises LabError for fp16 on a CPU,
    whose norms take no half-precision weights."""
    if wish == "fp16" and device.type == "cpu":
        raise LabError("A processor does not compute with weights in fp16: choose bf16 or fp32, or a GPU.")
    return WEIGHTS[wish] if wish else weights_dtype(device)


def computes_in(network: torch.nn.Module) -> torch.dtype:
    """`compute_dtype` of the network's device, but bf16 for a base that is held in it."""
    first = next(network.parameters())
    return torch.bfloat16 if first.dtype == torch.bfloat16 else compute_dtype(first.device)


def autocast_of(network: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """`autocast` as the network's device and weights want it."""
    return autocast(next(network.parameters()).device, computes_in(network))


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> contextlib.AbstractContextManager[Any]:
    """Matrix products and convolutions in `dtype` (default: `compute_dtype`), everything else in fp32."""
    dtype = dtype or compute_dtype(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def seed_everything(seed: int) -> None:
    """Seed torch's global generators (adapters draw their start values from them) and ask for deterministic kernels."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = False


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on the key alone: the same numbers on every device, for every method."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 0x9E3779B9) % (2**63)
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def unchanged_rng() -> Generator[None]:
    """Whatever is drawn inside, the global generators go on as if it had not been."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield


class PeakMemory:
    """Peak memory in bytes between `start()` and `read()`.

    CUDA: the most that torch held in tensors on the device (`max_memory_allocated`): weights, adapter, gradients,
    optimizer state, activations; not the CUDA context, nor the allocator's reserve. Elsewhere: the process's peak
    resident set: all of that plus the interpreter and the libraries (about 1 GB). On Linux the counter is set back
    at the start; where the system does not allow it (macOS, some containers), the peak counts from the process's
    own start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS (proc(5))
        return self

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform == "linux":
            with contextlib.suppress(OSError, StopIteration, ValueError):
                lines = Path("/proc/self/status").read_text().splitlines()
                return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def resident() -> int:
    """Bytes of this process's resident set; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def describe(device: torch.device) -> str:
    """The device in words, for a run's record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads, {str(compute_dtype(device)).removeprefix('torch.')}"
