"""Any adapter of the registry as a few-shot method: put on the towers' q, k, v (or other) layers, trained by
cross-entropy between pictures and class texts (CLIP-LoRA, Zanella and Ben Ayed 2024, arXiv 2405.18541, section 3)."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F

from lab.clip.episode import Batch, Episode, Head
from lab.clip.method import ClipMethod
from lab.clip.pictures import normalise
from lab.clip.towers import cosine_logits, fill, image_features, text_features, unit
from lab.errors import LabError
from lab.methods import Method
from lab.targets import modules


def sites(model: torch.nn.Module, targets: str, encoder: str) -> list[str] | str:
    """The layers that adapters go into, as PEFT's target_modules: their names, or, for the text encoder alone, a regular
    expression, because PEFT takes a name for a suffix and "transformer…" would find "visual.transformer…" too.

    Raises LabError when there are none.
    """
    names = modules(model, targets)
    if not hasattr(model, "visual"):  # an image model alone
        return names
    keep = {"vision": (True,), "text": (False,), "both": (True, False)}[encoder]
    found = [name for name in names if name.startswith("visual.") in keep]
    if not found:
        raise LabError(f"The model's {encoder} encoder has no layers called {targets}: choose other layers.")
    return f"(?:{'|'.join(map(re.escape, found))})" if encoder == "text" else found


def tower_head(episode: Episode, knobs: Any, model: torch.nn.Module, clip: Any, encoder: str) -> Head:
    """A head that classifies with (changed) towers: by class texts, or by a linear layer where there is no text tower,
    started from the classes' mean features. Texts and pictures that no change reaches are computed once."""
    also: dict[str, Any] = {"clip": clip, "encoder": encoder, "scale": clip.scale}
    if not clip.has_text:
        return Head(
            knobs, {"linear": episode.centroids, "bias": torch.zeros(len(episode.classes))}, model=model, **also
        )
    ids = clip.tokenize(fill(episode.templates[0], episode.classes)).to(clip.device)
    frozen = {"texts": episode.zero_shot} if encoder == "vision" else {}
    return Head(knobs, frozen=frozen, model=model, ids=ids, **also)


def tower_logits(head: Head, batch: Batch) -> torch.Tensor:
    """(b, c) by the head's towers as they are now."""
    clip = head["clip"]
    if batch.pixels is None:
        features = batch.features
    else:
        features = image_features(clip, batch.pixels)
    if not clip.has_text:
        with torch.autocast(features.device.type, enabled=False):
            return 10.0 * F.linear(unit(features), head["linear"]) + head["bias"]
    texts = head["texts"] if head["encoder"] == "vision" else text_features(clip, head["ids"])
    return cosine_logits(features, texts, head["scale"])


class AdapterMethod(ClipMethod):
    """A row of `METHODS` in the few-shot task."""

    needs_text = False

    def __init__(self, method: Method) -> None:
        self.method = method
        self.id, self.name, self.paper, self.knobs = method.id, method.name, method.paper, method.knobs
        self.summary, self.equation, self.order = method.summary, method.equation, method.order

    def inputs_for(self, encoder: str) -> str:
        return "features" if encoder == "text" else "pixels"

    def build(self, episode: Episode, knobs: Any) -> Head:
        clip = episode.clip.copy()
        encoder = episode.encoder if clip.has_text else "vision"
        self.inputs = self.inputs_for(encoder)  # ty: ignore[invalid-assignment]
        names = sites(clip.model, episode.targets, encoder)

        def calibrate() -> torch.Tensor:
            """The first training batch's loss, for methods that start from activations or a gradient."""
            count = min(32, len(episode.train))
            pixels = normalise(episode.train.pixels[:count], clip)
            made = tower_head(episode, knobs, clip.model, clip, encoder)
            return F.cross_entropy(
                tower_logits(made, Batch(episode.train.labels, pixels=pixels)), episode.train.labels[:count]
            )

        peft = self.method.attach(clip.model, knobs, names, seed=episode.seed, calibrate=calibrate)
        return tower_head(episode, knobs, peft, clip, encoder)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        return tower_logits(head, batch)

    # -- the loop's questions go to the adapter ------------------------------------------------------------------
    def optimizer(self, model: Any, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        optimizer = self.method.optimizer(model.model, lr, weight_decay)
        if extra := list(model.trained.parameters()):
            optimizer.add_param_group({"params": extra, "lr": 1e-3, "weight_decay": 0.0})
        return optimizer

    def penalty(self, model: Any) -> torch.Tensor | None:
        return self.method.penalty(model.model)

    def before_step(self, model: Any, step: int, steps: int) -> None:
        self.method.before_step(model.model, step, steps)

    def after_step(self, model: Any, step: int, steps: int) -> None:
        self.method.after_step(model.model, step, steps)

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        return self.method.state(model.model)

    def load_state(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        self.method.load_state(model.model, state)
