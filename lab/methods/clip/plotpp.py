"""PLOT++ (Chen et al., ICLR 2023, arXiv 2210.01253; its code's ViT version): sets of prompts matched by optimal transport.

N text prompts a class and M vision prompt sets give features g_{n,c} and f_m; with cost 1 − cos and uniform weights the
Sinkhorn plan T_c (ε = 0.1, not differentiated) makes the logit τ·Σ_{m,n} T_{c,mn}·cos(f_m, g_{n,c}). The ViT version
matches M whole-image features, each under vision prompts of its own (2 tokens behind the patches), where PLOT matched
local features of a ResNet. Trained: N·4·d_text + M·2·d_vision numbers. Official code (github.com/CHENGY12/PLOT, commit
7944bc1, plot-pp/trainers/plotpp.py, train.py and scripts/main_joint.sh, where the logit of averaged features is
switched off): M = N = 4, 4 context tokens from four templates of each dataset, SGD lr 2e-3, batch 32, 50 (1 shot), 100
(2, 4) or 200 (8, 16 shots) epochs of vision prompts alone, then as many of both, each with a cosine of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BY_SHOTS, ClipMethod, Recipe, register
from lab.methods.clip.coop import WARMUP, leading_words, start
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head

# The official code's second to fourth template for datasets without templates of their own.
WORDS = ("this is a photo", "this is picture of", "one picture of a")
BOTH_STAGES = tuple((shots, 2 * epochs) for shots, epochs in BY_SHOTS)
SINKHORN_STEPS, SINKHORN_TOLERANCE = 100, 1e-2


@dataclass
class PlotKnobs(Knobs):
    text_prompts: int = knob(4, "Text prompts a class (N).", low=1, high=16)
    vision_prompts: int = knob(4, "Vision prompt sets (M): a forward pass of the image tower each.", low=1, high=16)
    tokens: int = knob(4, "Context tokens of a text prompt.", low=1, high=64)
    vision_tokens: int = knob(2, "Tokens of a vision prompt set.", low=1, high=64)
    epsilon: float = knob(0.1, "Entropic regularisation of the transport.", low=1e-3)


def transport(similarity: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Cosines (k, M, N) → Sinkhorn plans (k, M, N) for cost 1 − cosine, rows summing to 1/M, columns to 1/N."""
    import torch

    kernel = torch.exp((similarity - 1) / epsilon)
    _, m, n = kernel.shape
    r, c = torch.ones_like(kernel[:, :, 0]), torch.ones_like(kernel[:, 0])
    for _ in range(SINKHORN_STEPS):
        before = r
        r = (1 / m) / (kernel @ c.unsqueeze(-1)).squeeze(-1)
        c = (1 / n) / (kernel.transpose(1, 2) @ r.unsqueeze(-1)).squeeze(-1)
        if (r - before).abs().mean() < SINKHORN_TOLERANCE:
            break
    return r.unsqueeze(2) * kernel * c.unsqueeze(1)


class PlotPlusPlus(ClipMethod):
    id, name, order = "plotpp", "PLOT++", 31
    paper = Paper("PLOT: Prompt Learning with Optimal Transport for Vision-Language Models", "2210.01253")
    code = "https://github.com/CHENGY12/PLOT"
    summary = "Several prompts for each class and picture, matched by optimal transport."
    equation = r"\tau \sum_{m,n} T_{c,mn} \cos(f_m, g_{n,c})"
    departures = (
        "One cosine schedule over both stages (vision prompts alone for the first half, then both).",
        "The first text prompt starts from the template's own first words, the others from the same three phrases for every"
        " dataset; prompts whose words are too few start from random numbers.",
        WARMUP,
        "Validation chooses the stopping step.",
    )
    knobs = PlotKnobs
    inputs = "pixels"
    short = Recipe((5e-3,), steps=((4, 24), (64, 48)), batch=8, max_norm=1.0)
    published = Recipe((2e-3,), epochs=BOTH_STAGES, batch=32, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def build(self, episode: Episode, knobs: PlotKnobs) -> Head:
        import torch

        from lab.clip.episode import Head
        from lab.clip.towers import prompted, vision_tower

        clip = episode.clip
        width = vision_tower(clip).class_embedding.shape[0]
        words = [leading_words(episode), *WORDS][: knobs.text_prompts]
        words += [""] * (knobs.text_prompts - len(words))
        trained = {
            "text": torch.stack([start(episode, knobs.tokens, w) for w in words]),
            "vision": torch.randn(knobs.vision_prompts, knobs.vision_tokens, width) * 0.02,
        }
        prompts = prompted(clip, episode.classes, knobs.tokens)
        return Head(knobs, trained, clip=clip, prompts=prompts, joint=True).to(clip.device)

    def before_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        model.also["joint"] = step >= steps // 2  # ty: ignore[invalid-assignment]

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch

        from lab.clip.towers import prompt_features, prompted_image_features, unit

        clip, prompts = head["clip"], head["prompts"]
        context = head["text"] if head["joint"] else head["text"].detach()
        texts = torch.stack([unit(prompt_features(clip, prompts.fill(c), prompts.ends)) for c in context])  # (N, c, e)
        pictures = torch.stack(
            [unit(prompted_image_features(clip, batch.pixels, p)) for p in head["vision"]]
        )  # (M, b, e)
        with torch.autocast(clip.device.type, enabled=False):
            similarity = torch.einsum("mbe,nce->bcmn", pictures, texts)
            flat = similarity.flatten(0, 1)
            plan = transport(flat.detach(), head.knobs.epsilon)
            return clip.scale * (plan * flat).sum((1, 2)).unflatten(0, similarity.shape[:2])


register(PlotPlusPlus())
