"""What every stage shares: where files lie, checkpoints, learning rate, moving average, the loop."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn

ASSETS = Path(__file__).resolve().parents[2] / "assets"
SAVE_EVERY_S = 150.0


def home() -> Path:
    """Checkpoints and data: LAB_PRETRAIN_HOME, else the user's data folder; never the repository."""
    default = Path(platformdirs.user_data_dir("nora-lab")) / "pretrain"
    return Path(os.environ.get("LAB_PRETRAIN_HOME") or default)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast():
    """bf16: about four times faster for matrix products on processors that have it."""
    return torch.autocast(device().type, dtype=torch.bfloat16)


def save_atomic(obj: object, path: Path) -> None:
    """A file that is there is whole: written aside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(obj, aside)
    aside.replace(path)


def facts_of(folder: Path) -> dict[str, dict]:
    """What an assembled folder says of each stage's training: steps, seconds, parameters."""
    path = folder / "tiny-sdxl" / "training.json"
    return json.loads(path.read_text()) if path.exists() else {}


def committed(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a committed diffusers model in fp32; nothing where there is none."""
    from safetensors.torch import load_file

    path = folder / "diffusion_pytorch_model.safetensors"
    return {key: value.float() for key, value in load_file(path).items()} if path.exists() else {}


def fits(weights: dict[str, torch.Tensor], own: dict[str, torch.Tensor], *narrower: str) -> bool:
    """Whether both hold the same tensors in the same shapes, but for those of `narrower`, whose shapes must differ."""
    return weights.keys() == own.keys() and all(
        (value.shape == own[key].shape) != (key in narrower) for key, value in weights.items()
    )


def generator(*key: int) -> torch.Generator:
    """Numbers that depend on the key alone, so that a resumed run draws what an uninterrupted one would."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 0x9E3779B9) % (2**63)
    return torch.Generator().manual_seed(seed)


def rank_and_workers() -> tuple[int, int]:
    """This process among those that torchrun started; 0 of 1 without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def average_gradients(model: nn.Module) -> None:
    """The workers' mean gradient. Where other work shares the processor, workers of one thread that meet once
    a step are far faster than threads that meet in every operation."""
    _, workers = rank_and_workers()
    if workers == 1:
        return
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad) / workers)


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 30, decay: float = 0.35) -> float:
    """Warm-up, constant, and a cosine fall over the last share: more steps may be added before the fall."""
    fall = int(steps * (1 - decay))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if step < fall:
        return peak
    done = (step - fall) / max(1, steps - fall)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Ema:
    """A moving average of a model's weights, slower as training goes on."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (step + 1) / (step + 10))
        kept: list[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(kept, [p.detach() for p in model.parameters()], weight)
        for buffer, source in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; biases, norms and temperatures are not decayed."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but matrices move along their momentum with all singular values set to about 1 (Jordan et al. 2024).

    Kernels count as matrices of their output channels. Steps are scaled by 0.2·√max(m, n), as large as AdamW's
    (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning rate serves both. Beside AdamW on the embedded
    UNet: a lower loss for the same processor time, its own share (a quarter of a step) counted.
    """

    def __init__(self, model: nn.Module, weight_decay: float, momentum: float = 0.95):
        super().__init__(adamw(model, weight_decay).param_groups, lr=1e-3, betas=(0.9, 0.98), fused=True)
        named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
        first_and_last = ("conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
        self.matrices = [p for name, p in named if not name.startswith(first_and_last)]
        self.momentum, self.decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the matrices' gradients are used up by it."""
        lr = self.param_groups[0]["lr"]
        for p in self.matrices:
            if p.grad is None:
                continue
            if not self.state[p]:  # AdamW wants a step when it loads a state
                self.state[p] = {"momentum": torch.zeros_like(p), "step": torch.zeros(())}
            kept = self.state[p]["momentum"]
            kept.lerp_(p.grad, 1 - self.momentum)
            way = orthogonal(p.grad.lerp(kept, self.momentum).flatten(1)).view_as(p)
            p.mul_(1 - lr * self.decay).add_(way, alpha=-0.2 * lr * max(len(p), p[0].numel()) ** 0.5)
            p.grad = None  # AdamW leaves it alone
        return super().step(closure)


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """U·Vᵀ of g = U·S·Vᵀ (m, n), to about 0.3 in the singular values: five Newton-Schulz steps in bf16."""
    x = (g.T if g.shape[0] > g.shape[1] else g).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if g.shape[0] > g.shape[1] else x).to(g)


class Trainer:
    """One model, its optimizer and average, a checkpoint file, and the loop over steps."""

    def __init__(
        self,
        stage: str,
        model: nn.Module,
        *,
        peak: float,
        weight_decay: float,
        ema: float,
        from_assets: bool = False,
        optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = adamw,
    ):
        self.path = home() / f"{stage}.pt"
        self.stage, self.model, self.peak = stage, model.to(device()), peak
        # Weights that are far along already only need the fall.
        self.decay = 0.95 if from_assets else 0.35
        self.optimizer = optimizer(self.model, weight_decay)
        self.ema = Ema(model, ema)
        self.step, self.seconds = 0, 0.0
        self.earlier = facts_of(ASSETS).get(stage, {}) if from_assets else {}
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, map_location=device(), weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.earlier = state["step"], state["seconds"], state.get("earlier", {})
        print(f"{self.stage}: resumed at step {self.step}, {self.seconds / 60:.1f} min", flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        save_atomic(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "earlier": self.earlier,
            },
            self.path,
        )

    def run(
        self,
        steps: int,
        loss_fn: Callable[[int], tuple[torch.Tensor, dict[str, float]]],
        evaluate: Callable[[], str] | None = None,
        log_every: int = 25,
        evaluate_every: int = 250,
    ) -> None:
        """Train up to `steps` in all; loss_fn(step) gives the loss and numbers to print.

        evaluate_every=0: never evaluate.
        """
        saved = time.monotonic()
        rank, workers = rank_and_workers()
        while self.step < steps:
            began = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, steps, self.peak, decay=self.decay)
            loss, report = loss_fn(self.step * workers + rank)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self.model)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.ema.update(self.model, self.step)
            self.step += 1
            self.seconds += time.monotonic() - began
            if rank:
                continue
            if self.step % log_every == 0:
                numbers = "  ".join(f"{key} {value:.4g}" for key, value in report.items())
                print(f"{self.stage} {self.step}/{steps}  {time.monotonic() - began:.2f} s  {numbers}", flush=True)
            if evaluate and evaluate_every and (self.step % evaluate_every == 0 or self.step == steps):
                print(f"{self.stage} {self.step}: {evaluate()}", flush=True)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
        if not rank:
            self.save()
