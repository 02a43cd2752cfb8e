"""One step before the first: does the run fit into memory, and if not, what to change.

The step is a real one, forward and backward on the run's first batch; nothing of it stays: no number is drawn from the
run's generators, no weight changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab import device as devices
from lab.errors import LabError

if TYPE_CHECKING:
    from lab.methods import Method
    from lab.train import Objective, Settings

TIGHT = 0.9  # of what there is: more leaves no room for the allocator's gaps and for drawing


@dataclass(frozen=True)
class Flight:
    """What one step takes: `peak` bytes measured, with the optimizer's state added; `available` bytes in all."""

    peak: int
    available: int

    @property
    def sentence(self) -> str:
        share = f"{self.peak / 2**30:.1f} of {self.available / 2**30:.1f} GiB"
        return f"fits: {share}" if self.peak <= TIGHT * self.available else f"tight: {share}"


def fly(
    model: torch.nn.Module,
    method: Method,
    objective: Objective,
    settings: Settings,
    changes: Callable[[], list[str]] = list,
) -> Flight:
    """Measure one training step. Raises LabError with the first of `changes` when it does not fit.

    On a GPU: the most that torch holds in tensors, against the card's memory less what others hold. Elsewhere: the
    process's peak resident set, against that and what the system has left.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    memory, available = devices.PeakMemory(device).start(), room(device)
    position, training = objective.position, model.training
    model.train()
    try:
        with devices.unchanged_rng():
            method.before_step(model, 0, settings.steps)
            with devices.autocast_of(model):
                loss = objective.loss(model, devices.generator(settings.seed, 4))
            loss.backward()
        peak = memory.read()
    except torch.OutOfMemoryError as error:
        raise LabError(
            _too_large(f"one step needs more than the {available / 2**30:.0f} GiB there are", changes())
        ) from error
    finally:
        for parameter in trained:
            parameter.grad = None
        objective.position = position
        model.train(training)
    moments = 2 * (1 if settings.optimizer == "adamw8bit" else 4) * sum(p.numel() for p in trained)
    found = Flight(peak + moments, available)
    if found.peak > available:
        share = f"{found.peak / 2**30:.1f} GiB of {available / 2**30:.1f}"
        raise LabError(_too_large(f"a step and the optimizer's state take {share}", changes()))
    return found


def room(device: torch.device) -> int:
    """Bytes that this process may hold in all."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    own = devices.resident()
    return own + available_memory()


def available_memory() -> int:
    """Bytes of main memory that a process may still take: what the system can free, or a container's limit leaves."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    except (OSError, StopIteration, ValueError):
        found.append(_total_memory())
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    except (OSError, ValueError):  # no limit ("max"), or no such group
        pass
    return min(found)


def _total_memory() -> int:
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):  # Windows
        return 2**40


def _too_large(what: str, changes: list[str]) -> str:
    return f"This run does not fit: {what}; {changes[0] if changes else 'take a smaller base, or a larger device'}."


def changes(spec: dict[str, Any], trainable: int) -> list[str]:
    """What makes a subject run smaller, the most useful first."""
    found = []
    if not spec["gradient_checkpointing"]:
        found.append("turn gradient checkpointing on")
    if spec["batch"] > 1:
        found.append(f"lower the batch from {spec['batch']} to {max(1, spec['batch'] // 2)}")
    if spec["text_encoder"]:
        found.append("leave the text encoders as they are")
    if spec["optimizer"] == "adamw" and trainable > 10**8:
        found.append("take the 8-bit optimizer")
    if not spec["resolution"] or spec["resolution"] > 512:
        found.append("lower the resolution to 768 or 512")
    found.append("lower the method's rank, or adapt fewer layers")
    return found
