"""Scores of pictures: CLIP-T (does it show what the prompt says), CLIP-I (is it the subject), drift from the base.

All are cosines of an image-text model's normalised embeddings, as in DreamBooth (arXiv 2208.12242, section 4.1).
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from lab import device as devices
from lab.errors import LabError


class Scorer(Protocol):
    """An image-text model. Embeddings are (n, d), float32, on the CPU, of length 1."""

    name: str

    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor: ...

    def texts(self, texts: Sequence[str]) -> torch.Tensor: ...


class OpenClip:
    """A scorer made of an open_clip model: a folder of its files, or "name:pretrained" as open_clip lists them."""

    def __init__(self, source: str, device: torch.device) -> None:
        import open_clip

        self.device = device
        try:
            if Path(source).is_dir():
                self.name, where, weights = Path(source).name, f"local-dir:{source}", None
            else:
                where, _, weights = source.partition(":")
                self.name = where
            self.model, self.preprocess = open_clip.create_model_from_pretrained(
                where, pretrained=weights or None, device=device
            )
            self.tokenize = open_clip.get_tokenizer(where)
        except Exception as error:  # open_clip raises RuntimeError, OSError, Hub and safetensors errors alike
            first = (str(error) or type(error).__name__).partition("\n")[0].partition(". ")[0].rstrip(".")[:200]
            raise LabError(f"The model that scores pictures, '{source}', could not be loaded: {first}.") from error
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        parts = []
        for i in range(0, len(pictures), 32):
            pixels = torch.stack([self.preprocess(p.convert("RGB")) for p in pictures[i : i + 32]])
            parts.append(self.model.encode_image(pixels.to(self.device), normalize=True).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenize(list(texts)).to(self.device)
        return self.model.encode_text(tokens, normalize=True).float().cpu()


@functools.lru_cache(maxsize=1)
def scorer(source: str) -> Scorer:
    """The scorer of this name (`Base.scorer`), kept for the next call."""
    return OpenClip(source, devices.pick())


def clip_t(scorer: Scorer, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Cosine of each picture to its prompt."""
    distinct = list(dict.fromkeys(prompts))
    texts = dict(zip(distinct, scorer.texts(distinct), strict=True))
    seen = scorer.images(pictures)
    return [float(image @ texts[prompt]) for image, prompt in zip(seen, prompts, strict=True)]


def clip_i(scorer: Scorer, pictures: Sequence[Image.Image], subject: Sequence[Image.Image]) -> list[float]:
    """Mean cosine of each picture to all of the subject's."""
    return (scorer.images(pictures) @ scorer.images(subject).T).mean(dim=1).tolist()


def drift(scorer: Scorer, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> float:
    """Mean of (1 - cosine)/2 between the base's and the adapted model's pictures of the same unrelated prompts and
    noise: 0 where the adapter left everything else as it was (PEFT's image-gen benchmark measures it so)."""
    cosines = (scorer.images(before) * scorer.images(after)).sum(dim=1)
    return float((1 - cosines).mean() / 2)


def scores(
    scorer: Scorer, pictures: Sequence[Image.Image], prompts: Sequence[str], subject: Sequence[Image.Image]
) -> dict[str, Any]:
    """CLIP-T and CLIP-I of pictures, means and each picture's own."""
    t, i = clip_t(scorer, pictures, prompts), clip_i(scorer, pictures, subject)
    return {"clip_t": statistics.fmean(t), "clip_i": statistics.fmean(i), "clip_t_each": t, "clip_i_each": i}
