"""What a few-shot method gets to learn from: a frozen model, class names, training and validation pictures. No test."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lab.clip import protocol
from lab.clip.model import Clip
from lab.clip.pictures import Examples, augment, normalise, read
from lab.clip.towers import class_weights, fill, text_features
from lab.datasets import Listing


@dataclass
class Batch:
    """pixels (b, 3, s, s), normalised, for methods that need them; features (b, e) of length 1, by the frozen encoder,
    for the others; labels (b,)."""

    labels: torch.Tensor
    pixels: Any = None  # tensors; which of the two is there depends on the method
    features: Any = None


@dataclass
class Episode:
    """One draw of shots.

    templates: texts with "{}" for the class. encoder: which towers adapters go into ("vision", "text", "both");
    targets: which layers, as `lab.targets` names them.
    """

    clip: Clip
    classes: list[str]
    templates: list[str]
    train: Examples
    validation: Examples
    shots: int
    seed: int
    encoder: str = "both"
    targets: str = "q,k,v"
    crop: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    @functools.cached_property
    def zero_shot(self) -> torch.Tensor:
        """The text classifier (c, e), rows of length 1."""
        with torch.no_grad():
            return class_weights(self.clip, self.classes, self.templates)

    @functools.cached_property
    def text_features(self) -> torch.Tensor:
        """The class texts' features as the tower gives them (c, e), not of length 1; their mean over templates."""
        with torch.no_grad():
            return (
                torch.stack([text_features(self.clip, fill(t, self.classes)) for t in self.templates]).mean(0).float()
            )

    @functools.cached_property
    def centroids(self) -> torch.Tensor:
        """Each class's mean training feature (c, e): where a classifier without texts may start."""
        sums = torch.zeros(len(self.classes), self.train.features.shape[1], device=self.clip.device)
        return sums.index_add(0, self.train.labels, self.train.features)

    def batch(self, indices: torch.Tensor, inputs: str, generator: torch.Generator) -> Batch:
        """Training pictures, freshly cropped (pixels) or a random view's features each."""
        labels = self.train.labels[indices.to(self.clip.device)]
        if inputs == "features":
            view = torch.randint(len(self.train.views), (len(indices),), generator=generator)
            return Batch(labels, features=self.train.views[view, indices])
        pixels = normalise(self.train.pixels[indices], self.clip)
        return Batch(labels, pixels=augment(pixels, generator, self.crop, self.flip))


def make(
    clip: Clip, listing: Listing, classes: list[str], templates: list[str], shots: int, seed: int, **options: Any
) -> Episode:
    """Draw the pictures of one run. `options` are Episode's, and `extra_views` for cached features.

    Raises LabError when a class has too few pictures.
    """
    train, validation = listing.train, listing.validation
    drawn = protocol.draw([p.label for p in train], [p.label for p in validation], classes, shots, seed)
    extra_views, flip = options.pop("extra_views", 0), options.get("flip", True)

    def examples(pictures: list[Any], views: int) -> Examples:
        labels = torch.tensor([p.label for p in pictures], device=clip.device)
        return Examples(clip, read(clip, listing, pictures), labels, views, flip=flip)

    held = validation if drawn.own_validation else train
    return Episode(
        clip,
        classes,
        templates,
        examples([train[i] for i in drawn.train], extra_views),
        examples([held[i] for i in drawn.validation], 0),
        shots,
        seed,
        **options,
    )


class Head(nn.Module):
    """What a method trains, and what it keeps beside: `head["name"]` is either.

    trained and frozen tensors by name; `model`: a network whose trainable parameters count too; `knobs`: settings.
    """

    def __init__(
        self,
        knobs: Any,
        trained: Mapping[str, torch.Tensor] | None = None,
        frozen: Mapping[str, torch.Tensor] | None = None,
        model: nn.Module | None = None,
        **also: Any,
    ) -> None:
        super().__init__()
        self.knobs, self.also = knobs, also
        self.trained = nn.ParameterDict(
            {k: nn.Parameter(v.detach().clone().float()) for k, v in (trained or {}).items()}
        )
        self.frozen = dict(frozen or {})
        self.model = model

    def __getitem__(self, name: str) -> Any:
        for kept in (self.trained, self.frozen, self.also):
            if name in kept:
                return kept[name]
        raise KeyError(name)

    def learned(self) -> dict[str, torch.Tensor]:
        """Everything that training changes: trainable parameters, and statistics that a model keeps (batch norm)."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @torch.no_grad()
    def put(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a `learned()` state into this head. Raises KeyError when a tensor is missing."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
