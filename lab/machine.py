"""What this machine has: processor, memory, GPUs, disk. Imports no torch; a GPU is asked after in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUERY = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")
# Oldest driver for each major CUDA that a build of torch was made for (NVIDIA, CUDA compatibility, table 2).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
ASK_TORCH = """
import json, torch
found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "devices": []}
for i in range(torch.cuda.device_count() if found["cuda"] else 0):
    free, total = torch.cuda.mem_get_info(i)
    (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).cpu()
    found["devices"].append({"name": torch.cuda.get_device_name(i), "memory_bytes": total, "free_bytes": free,
                             "bf16": torch.cuda.is_bf16_supported(including_emulation=False)})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in bytes; usable: whether torch computes on it; bf16: whether it multiplies in bf16."""

    name: str
    memory_bytes: int
    free_bytes: int
    driver: str = ""
    usable: bool = False
    bf16: bool = False


@functools.cache
def processor() -> dict[str, Any]:
    """{"name", "cores" (that this process may use), "bf16": whether it multiplies in bf16}."""
    name, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = next((m[1].strip() for m in re.finditer(r"^model name\s*:(.+)$", text, re.M)), name)
        flags = next((m[1] for m in re.finditer(r"^flags\s*:(.+)$", text, re.M)), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"name": name, "cores": cores, "bf16": bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))}


def memory() -> dict[str, int]:
    """{"total_bytes", "available_bytes"} of main memory, no more than a container's limit leaves."""
    import psutil

    found = psutil.virtual_memory()
    total, available = int(found.total), int(found.available)
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        total, available = min(total, limit), min(available, max(0, limit - used))
    return {"total_bytes": total, "available_bytes": available}


def disk(path: Path) -> dict[str, int]:
    """{"free_bytes", "total_bytes"} of the disk that the path lies on, or will lie on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    usage = shutil.disk_usage(path)
    return {"free_bytes": usage.free, "total_bytes": usage.total}


# -- GPUs ----------------------------------------------------------------------------------------------
def torch_build() -> dict[str, str]:
    """{"version", "cuda", "hip"} of the torch that is installed, read from its files; "" for what it has not."""
    found, text = importlib.util.find_spec("torch"), ""
    if found is not None and found.origin:
        with contextlib.suppress(OSError):
            text = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    parts = {name: re.search(rf"^{key}\b.*=\s*'([^']*)'", text, re.M) for name, key in
             (("version", "__version__"), ("cuda", "cuda"), ("hip", "hip"))}  # fmt: skip
    return {name: match[1] if match else "" for name, match in parts.items()}


def gpus() -> list[Gpu]:
    """The GPUs, with whether torch computes on them: asking costs torch's import, so only where there is one."""
    listed = _nvidia()
    if not listed and not _another():
        return []
    asked = ask_torch()
    if not asked.get("devices"):
        return listed
    drivers = {gpu.name: gpu.driver for gpu in listed}
    usable = [
        Gpu(d["name"], d["memory_bytes"], d["free_bytes"], drivers.get(d["name"], ""), True, d["bf16"])
        for d in asked["devices"]
    ]
    return usable + listed[len(usable) :]


def _nvidia() -> list[Gpu]:
    """What nvidia-smi lists; [] where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == len(QUERY) and fields[1].isdecimal():
            free = int(fields[2]) if fields[2].isdecimal() else 0
            found.append(Gpu(fields[0], int(fields[1]) << 20, free << 20, fields[3]))
    return found


def _another() -> bool:
    """Whether there is an accelerator that nvidia-smi does not list: AMD's, a container's or Windows' NVIDIA, Apple's."""
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    return apple or any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


@functools.lru_cache(maxsize=1)
def ask_torch() -> dict[str, Any]:
    """What torch says of accelerators, from a process of its own: {"cuda", "mps", "devices"}; {} when it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def driver_too_old(driver: str, cuda: str) -> int | None:
    """The oldest driver that this CUDA works with, if the given one is older."""
    need = OLDEST_DRIVER.get(int(cuda.split(".")[0])) if cuda[:1].isdecimal() else None
    have = int(driver.split(".")[0]) if driver.split(".")[0].isdecimal() else None
    return need if need is not None and have is not None and have < need else None
