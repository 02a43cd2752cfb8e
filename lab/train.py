"""The one training loop.

A task supplies an objective; a method supplies the adapter, its optimizer, and what it does after a step. The loop
knows neither. After any checkpoint it can be killed and called again: what it then computes equals what it would
have computed, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from lab import device as devices
from lab import optimizers
from lab.checkpoint import Checkpoint
from lab.errors import LabError
from lab.tasks import Report

if TYPE_CHECKING:
    from lab.methods import Method


class Objective(Protocol):
    """What a task trains for.

    Whatever is random in `loss` is drawn from the generator it is given, whose state the loop saves. `position` counts
    the examples drawn so far: an objective gives the same batch at the same position, and moves it on.
    """

    position: int

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        """The mean loss of the next batch, a scalar on the model's device."""
        ...


@dataclass(frozen=True)
class Settings:
    steps: int
    lr: float
    seed: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0  # steps over which the learning rate rises linearly
    max_norm: float = 1.0  # gradients are clipped to this norm
    weight_decay: float = 0.0
    checkpoint_every: int = 50
    preview_every: int = 0  # 0: never
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    text_encoder_rate: float = 1.0  # learning rate of text encoders as a share of the rest's

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at step 0, 1, …, steps - 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Summary:
    steps: int
    final_loss: float  # mean over the last tenth of the steps
    train_seconds: float  # over all attempts, without previews
    peak_memory_bytes: int  # the largest of all attempts; `lab.device.PeakMemory` says what it counts


def train(
    model: torch.nn.Module,
    method: Method,
    objective: Objective,
    settings: Settings,
    folder: Path,
    report: Report,
    preview: Callable[[int], None] | None = None,
) -> Summary:
    """Train the adapter that `method` put on `model`, from the folder's checkpoint if there is one.

    Writes `folder/metrics.jsonl` (a line a step: step, loss, t seconds) and `folder/checkpoint/`, which the caller
    removes once the adapter is saved. `preview(step)` is called at the start and every `settings.preview_every` steps;
    nothing it draws at random changes the run. Raises LabError when a loss or a gradient is not finite, naming the
    step and the likely cause, or when the folder's checkpoint was made with other settings.
    """
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizers.make(
        method,
        model,
        settings.lr,
        settings.weight_decay,
        kind=settings.optimizer,
        text_encoder_rate=settings.text_encoder_rate,
    )
    rates = [group["lr"] for group in optimizer.param_groups]  # a method may give its groups different rates
    generator = devices.generator(settings.seed, 1)
    scaler = torch.amp.GradScaler(device.type, enabled=devices.computes_in(model) == torch.float16)
    checkpoint = Checkpoint(folder / "checkpoint", model, method, optimizer, scaler, generator, asdict(settings))
    memory = devices.PeakMemory(device).start()

    state = checkpoint.load()
    objective.position = state.position
    log = Metrics(folder / "metrics.jsonl", state.step)
    if preview and settings.preview_every and state.step == 0:
        _preview(model, preview, 0)
    model.train()
    began = time.perf_counter() - state.seconds
    for step in range(state.step, settings.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * settings.factor(step)
        method.before_step(model, step, settings.steps)
        with devices.autocast_of(model):
            loss = objective.loss(model, generator)
            penalty = method.penalty(model)
        total = loss if penalty is None else loss + penalty
        value = _finite(total.item(), "loss", step, settings)
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, settings.max_norm)
        if not scaler.is_enabled() or scaler.get_scale() < 1:  # in fp16, large scales overflow: the step is left out
            _finite(norm.item(), "gradient", step, settings)
        scaler.step(optimizer)
        scaler.update()
        method.after_step(model, step, settings.steps)  # before the gradients go: rank allocation reads them
        optimizer.zero_grad(set_to_none=True)

        done, seconds = step + 1, time.perf_counter() - began
        log.add(done, value, seconds)
        if done % settings.checkpoint_every == 0 and done < settings.steps:
            log.flush()
            checkpoint.save(done, objective.position, seconds, max(state.peak_memory_bytes, memory.read()))
        if preview and settings.preview_every and (done % settings.preview_every == 0 or done == settings.steps):
            paused = time.perf_counter()
            _preview(model, preview, done)
            began += time.perf_counter() - paused
        report(done, settings.steps, phase="training", loss=value)
    log.flush()
    peak = max(state.peak_memory_bytes, memory.read())
    seconds = time.perf_counter() - began
    checkpoint.save(settings.steps, objective.position, seconds, peak)
    model.eval()
    return Summary(settings.steps, log.tail_mean(), seconds, peak)


def _preview(model: torch.nn.Module, preview: Callable[[int], None], step: int) -> None:
    was_training = model.training
    with devices.unchanged_rng(), torch.no_grad():
        model.eval()
        preview(step)
    model.train(was_training)


def _finite(value: float, what: str, step: int, settings: Settings) -> float:
    if math.isfinite(value):
        return value
    if step == 0:
        cause = "the base model or a picture gives numbers out of range: try the base in fp32, or its fp16-fixed VAE"
    else:
        cause = f"the learning rate {settings.lr:g} is probably too high: try {settings.lr / 4:.1g}"
    raise LabError(f"Training stopped at step {step + 1} of {settings.steps}: the {what} is {value}; {cause}.")


class Metrics:
    """`metrics.jsonl`: a line a step, appended; on resuming, what came after the checkpoint is cut off."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in _lines(path) if line["step"] <= step]
        self.losses = [line["loss"] for line in kept]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)

    def add(self, step: int, loss: float, seconds: float) -> None:
        self.losses.append(loss)
        self.file.write(json.dumps({"step": step, "loss": loss, "t": round(seconds, 3)}) + "\n")

    def flush(self) -> None:
        self.file.flush()

    def tail_mean(self) -> float:
        """Mean loss of the last tenth of the steps: one step's loss depends mostly on the noise level it drew."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The file's whole lines; a last line cut short by a crash is dropped."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
