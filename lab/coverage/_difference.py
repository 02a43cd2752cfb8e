"""`python -m lab.coverage._difference`: the real fine-tuning difference that the approximation curves take as a target.

The embedded base's attention weights, all of them in full, are fine-tuned on the pictures of one of the lab's own subjects
(the subject task's objective); kept are the first SIDE outputs and inputs of one layer, before (`W`) and after less before
(`change`), in assets/coverage/difference.npz. The page reads that file with NumPy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lab import device as devices
from lab import targets
from lab.bases import ASSETS, BASES
from lab.diffusion import encode_pictures, training_schedule
from lab.tasks._dreambooth import DreamBooth

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SUBJECT, STEPS, BATCH, RATE, SIDE, SEED = "fox", 100, 4, 2e-4, 64, 0
TO = ASSETS / "coverage" / "difference.npz"


def main() -> None:
    row = BASES["tiny-sdxl"]
    pipe = row.load("cpu", torch.float32)
    objective = _objective(row, pipe, ASSETS / "subjects" / SUBJECT)
    names = targets.modules(pipe.unet, "attn")
    weights: list[Any] = [pipe.unet.get_submodule(name).weight.requires_grad_(True) for name in names]
    layer: Any = pipe.unet.get_submodule(LAYER)
    before = layer.weight.detach().clone()
    optimizer, draw = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0), devices.generator(SEED, 1)
    for step in range(STEPS):
        loss = objective.loss(pipe.unet, draw)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1} of {STEPS}: loss {float(loss):.4f}", file=sys.stderr, flush=True)
    change = layer.weight.detach() - before
    part = slice(0, SIDE)
    told = {"base": row.id, "layer": LAYER, "subject": SUBJECT, "steps": STEPS, "batch": BATCH, "learning_rate": RATE}
    TO.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        TO, W=before[part, part].numpy(), change=change[part, part].numpy(), told=np.array(json.dumps(told))
    )


def _objective(row: Any, pipe: Any, folder: Path) -> DreamBooth:
    files = sorted(folder.glob("*.png"))
    pictures = [Image.open(file).convert("RGB") for file in files]
    captions = [file.with_suffix(".txt").read_text().strip().replace("{subject}", "sks fox") for file in files]
    encoded = encode_pictures(pipe, pictures, captions, row.resolution, size_conditioning=row.size_conditioning)
    return DreamBooth(pipe.vae, training_schedule(pipe), encoded, batch=BATCH, seed=SEED)


if __name__ == "__main__":
    main()
