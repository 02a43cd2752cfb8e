"""CLIP-LoRA as published (Zanella and Ben Ayed, CVPRW 2024, arXiv 2405.18541): LoRA on q, k and v of both towers.

W' = W + (α/√r)·B·A, r = 2, α = 1, dropout 0.25 on the input. The paper writes α/r; the authors' code
(github.com/MaxZanella/CLIP-LoRA, loralib/layers.py::LoRALayer) divides by √r with the line for r commented out, as
rsLoRA (arXiv 2312.03732) proposes: so does this method, which is why it is not the registry's `lora`.
Authors' code: AdamW lr 2e-4, weight decay 0.01, batch 32, 500 × shots iterations, cosine, no warm-up, no validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BRIEFLY, ClipMethod, Recipe, register
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


@dataclass
class ClipLoraKnobs(Knobs):
    r: int = knob(2, "Rank.", low=1)
    alpha: float = knob(1.0, "The update is scaled by alpha/√r.", low=1e-6)
    dropout: float = knob(0.25, "Dropout on the adapter's input.", low=0.0, high=0.95)


class ClipLora(ClipMethod):
    id, name, order = "clip-lora", "CLIP-LoRA", 40
    paper = Paper("Low-Rank Few-Shot Adaptation of Vision-Language Models", "2405.18541")
    code = "https://github.com/MaxZanella/CLIP-LoRA"
    summary = "LoRA on q, k and v of both towers, scaled by α/√r as its code does it."
    equation = r"W' = W + \tfrac{\alpha}{\sqrt r} B A"
    departures = (
        "Validation chooses the stopping step (the authors' code stops at the last).",
        "Crops are taken from the model's evaluation view instead of the whole picture, bilinear instead of bicubic.",
        "The cosine ends at 0 instead of 1e-6.",
    )
    knobs = ClipLoraKnobs
    inputs = "pixels"
    short = Recipe((5e-3,), steps=BRIEFLY, batch=8, weight_decay=0.01, max_norm=1.0)
    published = Recipe((2e-4,), steps_per_shot=500, batch=32, weight_decay=0.01)

    def build(self, episode: Episode, knobs: ClipLoraKnobs) -> Head:
        from peft import LoraConfig, get_peft_model

        from lab.clip.adapter import sites, tower_head

        clip = episode.clip.copy()
        config = LoraConfig(
            r=knobs.r,
            lora_alpha=knobs.alpha,  # ty: ignore[invalid-argument-type] - PEFT only divides it
            lora_dropout=knobs.dropout,
            use_rslora=True,
            target_modules=sites(clip.model, episode.targets, episode.encoder),
        )
        return tower_head(episode, knobs, get_peft_model(clip.model, config), clip, episode.encoder)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        from lab.clip.adapter import tower_logits

        return tower_logits(head, batch)


register(ClipLora())
