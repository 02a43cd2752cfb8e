"""Full fine-tuning: every weight of the chosen encoders is trained ("Full-FT" in NOLA, arXiv 2310.02556, Table 6).

ΔW is unrestricted. With a text tower the class texts are the classifier, as in FLYP (Goyal et al., arXiv 2212.00638) but
with cross-entropy over the classes; without one, a linear head started from the classes' mean features.
Departures: NOLA's code for this baseline is not public. Its appendix A.3 names the learning rates 8e-5, 5e-5, 3e-5 and
1e-5, of which validation chooses, 50 epochs and batch 64, as in the published recipe here; AdamW and the cosine are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.methods.clip import BRIEFLY, ClipMethod, Recipe, register
from lab.methods.spec import Paper

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


class Full(ClipMethod):
    id, name, order = "full", "Full fine-tuning", 4
    paper = Paper("NOLA: Compressing LoRA using Linear Combination of Random Basis", "2310.02556")
    summary = "Every weight of the chosen encoders is trained."
    equation = r"W' = W + \Delta W,\ \Delta W \in \mathbb{R}^{m \times n}"
    inputs = "pixels"
    needs_text = False
    short = Recipe((1e-4,), steps=BRIEFLY, batch=8, weight_decay=0.01, max_norm=1.0)
    published = Recipe((8e-5, 5e-5, 3e-5, 1e-5), epochs=50, batch=64, weight_decay=0.01)

    def build(self, episode: Episode, knobs: Any) -> Head:
        from lab.clip.adapter import tower_head

        clip = episode.clip.copy()
        encoder = episode.encoder if clip.has_text else "vision"
        for name, parameter in clip.model.named_parameters():
            vision = name.startswith("visual.") or not clip.has_text
            parameter.requires_grad = name != "logit_scale" and (encoder == "both" or vision == (encoder == "vision"))
        return tower_head(episode, knobs, clip.model, clip, encoder).to(clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        from lab.clip.adapter import tower_logits

        return tower_logits(head, batch)


register(Full())
