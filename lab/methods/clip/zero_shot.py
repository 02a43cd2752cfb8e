"""Zero-shot CLIP (Radford et al. 2021, arXiv 2103.00020, section 3.1): no training at all.

p(y = c | x) ∝ exp(τ·cos(f(x), t_c)), t_c the text feature of class c's prompt. Departures: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.methods.clip import ClipMethod, register
from lab.methods.spec import Paper

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


class ZeroShot(ClipMethod):
    id, name, order = "zero-shot", "Zero-shot CLIP", 1
    paper = Paper("Learning Transferable Visual Models From Natural Language Supervision", "2103.00020")
    code = "https://github.com/openai/CLIP"
    summary = "The nearest class text, nothing trained."
    equation = r"p(c \mid x) \propto \exp(\tau \cos(f(x), t_c))"
    trains = False

    def build(self, episode: Episode, knobs: Any) -> Head:
        from lab.clip.episode import Head

        return Head(knobs, frozen={"texts": episode.zero_shot}, clip=episode.clip)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        from lab.clip.towers import cosine_logits

        return cosine_logits(batch.features, head["texts"], head["clip"].scale)


register(ZeroShot())
