"""What a few-shot method is. Imports no torch: the page lists methods by these rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lab.methods.spec import Knobs, Paper

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


ByShots = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Recipe:
    """How a method is trained. Of `steps`, `steps_per_shot` and `epochs` the first that is not 0 gives the length.

    rates: learning rates; where there are several, validation chooses. max_norm: gradients are clipped to it, 0: never.
    steps, epochs: one number, or ((most shots, number), …) where it depends on the shots, as `BY_SHOTS`. warmup: steps, or
    with `warmup_epochs` epochs, over which the learning rate rises linearly.
    """

    rates: tuple[float, ...] = (1e-3,)
    steps: int | ByShots = 0
    steps_per_shot: int = 0
    epochs: int | ByShots = 0
    batch: int = 32
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # adam: weight decay joins the gradient
    weight_decay: float = 0.0
    warmup: int = 0
    warmup_epochs: int = 0
    max_norm: float = 0.0

    def length(self, shots: int, examples: int) -> int:
        """Optimizer steps for this many shots and training pictures."""
        if self.steps:
            return _of(self.steps, shots)
        if self.steps_per_shot:
            return self.steps_per_shot * shots
        return _of(self.epochs, shots) * self._per_epoch(examples)

    def warmup_steps(self, examples: int) -> int:
        return self.warmup or self.warmup_epochs * self._per_epoch(examples)

    def _per_epoch(self, examples: int) -> int:
        return math.ceil(examples / min(self.batch, examples))


def _of(value: int | ByShots, shots: int) -> int:
    if isinstance(value, int):
        return value
    return next((number for most, number in value if shots <= most), value[-1][1])


BY_SHOTS: ByShots = ((1, 50), (4, 100), (16, 200))  # epochs of CoOp's code, and of those that follow it


BRIEFLY: ByShots = ((4, 60), (64, 160))  # steps of the short recipes of what has to pass through a tower


class ClipMethod:
    """One row: subclass, fill in the attributes, write `build` and `logits`, register an instance.

    `build` makes a `Head` from an episode; `logits` is a function of the head and a batch alone. Whoever needs more
    than cross-entropy overrides `loss`; what is searched on validation after training goes into `settle`.
    """

    id: str
    name: str
    paper: Paper
    code: str = ""  # official code
    summary: str  # one sentence
    equation: str  # LaTeX
    departures: tuple[str, ...] = ()  # from the paper's official code
    knobs: type[Knobs] = Knobs
    inputs: Literal["features", "pixels"] = "features"  # features: the frozen encoder's, computed once
    needs_text = True
    trains = True
    short = Recipe(steps=200)  # embedded model, two processor cores
    published = Recipe(epochs=50)  # as its authors train it
    order = 100

    def build(self, episode: Episode, knobs: Any) -> Head:
        """Start values. Raises LabError when the model or the settings do not fit."""
        raise NotImplementedError(f"{type(self).__name__} must say what it starts from")

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        """(b, classes), fp32."""
        raise NotImplementedError(f"{type(self).__name__} must say how it classifies")

    def loss(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch.nn.functional as F

        return F.cross_entropy(self.logits(head, batch), batch.labels)

    def settle(self, head: Head, episode: Episode) -> dict[str, Any]:
        """Choose what is left to choose on validation pictures; returns what was chosen, for the record."""
        return {}

    # -- what the training loop asks of a method ---------------------------------------------------------------
    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        return None

    def before_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        pass

    def after_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        pass

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        pass
