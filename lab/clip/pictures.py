"""Pictures as tensors: the model's own view of them, random crops, cached features of frozen encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lab.clip.model import Clip
from lab.clip.towers import image_features, unit
from lab.datasets import Listing, Picture
from lab.files import write_atomic

if TYPE_CHECKING:
    from PIL import Image

EVAL_BATCH = 128


def prepare(image: Image.Image, clip: Clip) -> torch.Tensor:
    """An RGB picture → (3, size, size) uint8, as the model's own evaluation transform makes it."""
    import numpy as np
    from PIL import Image

    how = getattr(Image.Resampling, clip.interpolation.upper(), Image.Resampling.BICUBIC)
    size = clip.size
    if clip.squash:
        image = image.resize((size, size), how)
    else:
        ratio = size / min(image.size)
        width, height = (max(size, int(side * ratio)) for side in image.size)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.resize((width, height), how).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalise(pixels: torch.Tensor, clip: Clip) -> torch.Tensor:
    """(b, 3, s, s) uint8 → float on the model's device, with the model's mean and deviation."""
    mean, std = (torch.tensor(v, device=clip.device).view(3, 1, 1) for v in (clip.mean, clip.std))
    return (pixels.to(clip.device).float() / 255 - mean) / std


def augment(pixels: torch.Tensor, generator: torch.Generator, crop: tuple[float, float], flip: bool) -> torch.Tensor:
    """Random resized crops covering `crop` of the area, proportions 3:4 to 4:3, and mirror images: (b, 3, s, s) float.

    As torchvision's RandomResizedCrop and RandomHorizontalFlip, from the evaluation view instead of the whole
    picture, bilinear, and drawn from `generator`.
    """
    b = len(pixels)
    draws = torch.rand(b, 5, generator=generator)
    area = crop[0] + (crop[1] - crop[0]) * draws[:, 0]
    most = torch.minimum(torch.tensor(4 / 3), 1 / area).log()  # as far as the crop stays inside
    proportion = torch.exp((draws[:, 1] * 2 - 1) * most)
    width, height = (area * proportion).sqrt(), (area / proportion).sqrt()
    mirrored = torch.where((draws[:, 4] < 0.5) & torch.tensor(flip), -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirrored, height
    theta[:, 0, 2] = (1 - width) * (draws[:, 2] * 2 - 1)
    theta[:, 1, 2] = (1 - height) * (draws[:, 3] * 2 - 1)
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


@torch.no_grad()
def encode(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """(n, 3, s, s) uint8 → features (n, e) of length 1, fp32, on the model's device."""
    return torch.cat([unit(image_features(clip, normalise(part, clip))) for part in pixels.split(EVAL_BATCH)])


@dataclass
class Examples:
    """Labelled pictures of one run. `views` (v, n, e) are features by the frozen encoder, computed on first use: the
    plain picture first, then `extra_views` random crops of it."""

    clip: Clip
    pixels: torch.Tensor  # (n, 3, s, s) uint8
    labels: torch.Tensor  # (n,), on the model's device
    extra_views: int = 0
    crop: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    _views: torch.Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> torch.Tensor:
        if self._views is None:
            views = [encode(self.clip, self.pixels)]
            generator = torch.Generator().manual_seed(0)
            for _ in range(self.extra_views):
                with torch.no_grad():
                    parts = [
                        augment(normalise(part, self.clip), generator, self.crop, self.flip)
                        for part in self.pixels.split(EVAL_BATCH)
                    ]
                    views.append(torch.cat([unit(image_features(self.clip, part)) for part in parts]))
            self._views = torch.stack(views)
        return self._views

    @property
    def features(self) -> torch.Tensor:
        """(n, e): the mean over views, of length 1 (Tip-Adapter's cache keys)."""
        return unit(self.views.mean(0)) if len(self.views) > 1 else self.views[0]


def read(clip: Clip, listing: Listing, pictures: Sequence[Picture]) -> torch.Tensor:
    """The pictures as (n, 3, s, s) uint8."""
    if not pictures:
        return torch.empty(0, 3, clip.size, clip.size, dtype=torch.uint8)
    return torch.stack([prepare(listing.open(picture.key), clip) for picture in pictures])


class TestSet:
    """The test pictures of a run. They can be looked at once: a second look is a fault in the protocol."""

    __test__ = False  # no test class, whatever pytest thinks of its name

    def __init__(self, clip: Clip, listing: Listing, cache: Path | None = None) -> None:
        self.clip, self.listing, self.cache, self.looks = clip, listing, cache, 0
        self.labels = torch.tensor([picture.label for picture in listing.test])

    def look(self) -> None:
        self.looks += 1
        if self.looks > 1:
            raise RuntimeError("the test set was looked at twice in one run")

    def features(self) -> torch.Tensor:
        """(n, e) by the frozen encoder, from the cache where it is there."""
        from safetensors.torch import load_file, save

        name = f"{self.listing.fingerprint}-{fingerprint(self.clip)}.safetensors"
        path = self.cache / name if self.cache else None
        if path and path.exists():
            return load_file(path)["features"].to(self.clip.device)
        made = torch.cat([encode(self.clip, pixels) for pixels in self.batches()])
        if path:
            write_atomic(path, save({"features": made.cpu().contiguous()}))
        return made

    def batches(self) -> Iterator[torch.Tensor]:
        """(≤ 128, 3, s, s) uint8 each; read as they are needed, so that a large test set is never in memory."""
        pictures = self.listing.test
        starts = range(0, len(pictures), EVAL_BATCH)
        return (read(self.clip, self.listing, pictures[i : i + EVAL_BATCH]) for i in starts)


def fingerprint(clip: Clip) -> str:
    """Names the model's weights: a digest of each tensor's name, sum and sum of squares."""
    digest = hashlib.sha256(f"{clip.name} {clip.size} {clip.squash} {clip.interpolation}".encode())
    for name, tensor in clip.model.state_dict().items():
        if tensor.is_floating_point():
            values = tensor.double()
            digest.update(f"{name} {values.sum().item():.10e} {values.square().sum().item():.10e}".encode())
    return digest.hexdigest()[:24]
