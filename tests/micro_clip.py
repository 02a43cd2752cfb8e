"""A CLIP of two narrow layers with random weights, and an episode of coloured squares: what few-shot tests learn from."""

from __future__ import annotations

import open_clip
import torch

from lab.clip.episode import Episode
from lab.clip.model import Clip
from lab.clip.pictures import Examples
from lab.clip.split import split_attention

CLASSES = ["red", "green", "blue"]
COLOURS = [(220, 40, 40), (40, 200, 60), (40, 60, 220)]
SIZE, END = 16, 299


def tokenize(texts: list[str]) -> torch.Tensor:
    """Letters as tokens 1…, the start 298, the end 299 (the highest), zeros behind."""
    rows = [[298, *(1 + ord(c) % 250 for c in text[:44]), END] for text in texts]
    return torch.tensor([row + [0] * (48 - len(row)) for row in rows])


def clip(seed: int = 0, **vision: object) -> Clip:
    torch.manual_seed(seed)
    vision_cfg = {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16} | vision
    text_cfg = {"context_length": 48, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision_cfg, text_cfg=text_cfg).eval().requires_grad_(False)
    split_attention(model)
    return Clip(model, "micro", SIZE, (0.5,) * 3, (0.5,) * 3, tokenize=tokenize)


def squares(labels: list[int], seed: int) -> torch.Tensor:
    """One noisy square of its class's colour for each label: (n, 3, 16, 16) uint8."""
    noise = torch.randint(-30, 31, (len(labels), 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    plain = torch.tensor([COLOURS[label] for label in labels])[:, :, None, None]
    return (plain + noise).clamp(0, 255).to(torch.uint8)


def episode(made: Clip | None = None, shots: int = 4, seed: int = 1, **options: object) -> Episode:
    made = made or clip()
    labels = [label for label in range(len(CLASSES)) for _ in range(shots)]

    def examples(at: int) -> Examples:
        return Examples(made, squares(labels, at), torch.tensor(labels))

    templates = ["a picture of a {}"]
    options = {"crop": (0.6, 1.0)} | options
    return Episode(made, CLASSES, templates, examples(seed), examples(seed + 100), shots, seed, **options)  # type: ignore[arg-type]
