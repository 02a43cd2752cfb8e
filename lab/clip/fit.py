"""Training one head: the lab's one loop, watched by validation pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from lab import device as devices
from lab.clip.episode import Batch, Episode, Head
from lab.clip.method import ClipMethod, Recipe
from lab.clip.pictures import EVAL_BATCH, Examples, TestSet, normalise
from lab.files import write_atomic
from lab.methods import Method
from lab.tasks import Report
from lab.train import Settings, train

CHECKS, APART = 10, 12  # how often validation is asked during training, and the fewest steps in between
KEPT = "method:"
NO_CLIP = 1e9  # a gradient norm that is never reached


@dataclass
class Fitted:
    head: Head
    rate: float | None
    step: int  # whose weights were kept
    validation_accuracy: float
    train_seconds: float
    peak_memory_bytes: int
    settled: dict[str, Any]


@torch.no_grad()
def predict(method: ClipMethod, head: Head, features: torch.Tensor | None, pixels: Any) -> torch.Tensor:
    """Logits (n, c), fp32, on the CPU: from features (n, e), or from batches of (b, 3, s, s) uint8 pictures."""
    clip, out = head["clip"], []
    none = torch.empty(0, dtype=torch.long)
    head.eval()
    with devices.autocast(clip.device):
        if method.inputs == "features":
            assert features is not None
            out = [method.logits(head, Batch(none, features=part)) for part in features.split(EVAL_BATCH)]
        else:
            out = [method.logits(head, Batch(none, pixels=normalise(part, clip))) for part in pixels]
    return torch.cat(out).float().cpu()


def predict_examples(method: ClipMethod, head: Head, examples: Examples) -> torch.Tensor:
    features = examples.features if method.inputs == "features" else None
    return predict(method, head, features, examples.pixels.split(EVAL_BATCH))


def test(method: ClipMethod, head: Head, held_out: TestSet) -> torch.Tensor:
    """Logits of the test pictures: the one look that a run has."""
    held_out.look()
    features = held_out.features() if method.inputs == "features" else None
    return predict(method, head, features, held_out.batches() if features is None else None)


def learned(method: ClipMethod, head: Head) -> dict[str, torch.Tensor]:
    """Everything that training changes: the head's trainable parameters, and what the method keeps beside them."""
    return head.learned() | {f"{KEPT}{name}": tensor for name, tensor in method.state(head).items()}


def restore(method: ClipMethod, head: Head, state: dict[str, torch.Tensor]) -> None:
    """Put a `learned` state back."""
    head.put(state)
    method.load_state(head, {k.removeprefix(KEPT): v for k, v in state.items() if k.startswith(KEPT)})


class Objective:
    """Cross-entropy, or a method's own loss, over epochs of shuffled training pictures."""

    def __init__(self, method: ClipMethod, episode: Episode, batch: int) -> None:
        self.method, self.episode, self.position = method, episode, 0
        self.batch = min(batch, len(episode.train))

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.episode.train), generator=devices.generator(self.episode.seed, 2, epoch))

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        """The next batch's mean loss. An epoch's last batch is filled up from the next epoch."""
        count = len(self.episode.train)
        epoch, start = divmod(self.position, count)
        indices = self._order(epoch)[start : start + self.batch]
        if len(indices) < self.batch:
            indices = torch.cat([indices, self._order(epoch + 1)[: self.batch - len(indices)]])
        self.position += self.batch
        return self.method.loss(model, self.episode.batch(indices, self.method.inputs, generator))  # ty: ignore


class Watch:
    """Validation during training: keeps the weights of the best step. A tie in accuracy goes to the lower loss.

    Writes `validation.jsonl` (step, accuracy, loss) and the best weights, so that an interrupted run goes on from them.
    """

    def __init__(
        self, method: ClipMethod, head: Head, episode: Episode, folder: Path, note: Callable[..., None]
    ) -> None:
        from safetensors.torch import load_file

        self.method, self.head, self.episode, self.folder, self.note = method, head, episode, folder, note
        self.curve: dict[int, tuple[float, float]] = {}
        self.best: tuple[float, float, int] = (-1.0, 0.0, 0)  # accuracy, -loss, step
        self.state: dict[str, torch.Tensor] = {}
        if (folder / "watch.json").exists():
            kept = json.loads((folder / "watch.json").read_text())
            self.best = tuple(kept["best"])
            self.curve = {int(step): tuple(value) for step, value in kept["curve"].items()}
            self.state = {k: v.to(episode.clip.device) for k, v in load_file(folder / "best.safetensors").items()}

    def __call__(self, step: int) -> None:
        from safetensors.torch import save

        logits = predict_examples(self.method, self.head, self.episode.validation)
        labels = self.episode.validation.labels.cpu()
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        loss = F.cross_entropy(logits, labels).item()
        self.curve[step] = (accuracy, loss)
        self.note(step=step, accuracy=accuracy, loss=loss)
        if (accuracy, -loss) > self.best[:2]:
            self.best = (accuracy, -loss, step)
            self.state = {k: v.clone() for k, v in learned(self.method, self.head).items()}
            plain = {k: v.cpu().contiguous() for k, v in self.state.items()}
            write_atomic(self.folder / "best.safetensors", save(plain))
            write_atomic(self.folder / "watch.json", json.dumps({"best": self.best, "curve": self.curve}))


def fit(
    method: ClipMethod,
    episode: Episode,
    knobs: Any,
    recipe: Recipe,
    folder: Path,
    report: Report,
    note: Callable[..., None],
) -> Fitted:
    """Build the head and train it, for each of the recipe's learning rates; what validation likes best is kept.

    `note(step=, accuracy=, loss=, rate=)` hears every validation. Resumes from what an earlier call left in `folder`.
    """
    if not method.trains:
        devices.seed_everything(episode.seed)
        memory = devices.PeakMemory(episode.clip.device).start()
        head = method.build(episode, knobs)
        settled = method.settle(head, episode)
        report(1, 1, phase="choosing on validation")
        return Fitted(head, None, 0, _accuracy(method, head, episode), 0.0, memory.read(), settled)
    length = recipe.length(episode.shots, len(episode.train))
    total, done, kept, seconds, peak = length * len(recipe.rates), 0, None, 0.0, 0
    for i, rate in enumerate(recipe.rates):
        devices.seed_everything(episode.seed)
        head = method.build(episode, knobs)
        inside = folder / f"rate-{i}"
        inside.mkdir(parents=True, exist_ok=True)
        watch = Watch(method, head, episode, inside, lambda rate=rate, **values: note(rate=rate, **values))
        settings = Settings(
            steps=length,
            lr=rate,
            seed=episode.seed,
            schedule="cosine",
            warmup=recipe.warmup_steps(len(episode.train)),
            max_norm=recipe.max_norm or NO_CLIP,
            weight_decay=recipe.weight_decay,
            checkpoint_every=max(50, length // 4),
            preview_every=min(length, max(APART, length // CHECKS)),
        )
        watched = method if recipe.optimizer == "adamw" else _Otherwise(method, recipe.optimizer)

        def told(step: int, steps: int, before: int = done, **values: Any) -> None:
            report(before + step, total, **values)

        summary = train(
            head, cast(Method, watched), Objective(method, episode, recipe.batch), settings, inside, told, watch
        )
        restore(method, head, watch.state)
        done, seconds = done + length, seconds + summary.train_seconds
        peak = max(peak, summary.peak_memory_bytes)
        if kept is None or watch.best[:2] > kept[1].best[:2]:
            kept = (head, watch, rate)
    assert kept is not None
    head, watch, rate = kept
    settled = method.settle(head, episode)
    accuracy = _accuracy(method, head, episode) if settled else watch.best[0]
    for i in range(len(recipe.rates)):
        shutil.rmtree(folder / f"rate-{i}", ignore_errors=True)
    return Fitted(head, rate, watch.best[2], accuracy, seconds, peak, settled)


def _accuracy(method: ClipMethod, head: Head, episode: Episode) -> float:
    logits = predict_examples(method, head, episode.validation)
    return (logits.argmax(1) == episode.validation.labels.cpu()).float().mean().item()


class _Otherwise:
    """A method trained by SGD with momentum 0.9 or by Adam, as CoOp's code and its descendants do."""

    def __init__(self, method: ClipMethod, optimizer: str) -> None:
        self.method, self.name = method, optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.name == "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
