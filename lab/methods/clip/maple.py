"""MaPLe (Khattak et al., CVPR 2023, arXiv 2210.03117, equations 3–8): deep prompts in both towers, coupled.

Text prompts P_0…P_{J−1} (M×d_t each) stand after the start token and replace their predecessors before blocks 1…J−1; the
image tower's prompts are F_k(P_k), F_k: d_t → d_v linear, behind the patches. Official code: J = 9, M = 2, start from
"a photo of a", the others N(0, 0.02²), F_1…F_{J−1} copies of one layer, SGD lr 3.5e-3, batch 4, 5 epochs (base-to-new) or
2.6e-3 and 2 epochs (across datasets), cosine after a warm-up epoch at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BRIEFLY, ClipMethod, Recipe, register
from lab.methods.clip.coop import WARMUP, leading_words, start
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


@dataclass
class MapleKnobs(Knobs):
    tokens: int = knob(2, "Prompt tokens a layer (M).", low=1, high=64)
    depth: int = knob(9, "Layers with prompts (J), at most as many as both towers have.", low=1)


class Maple(ClipMethod):
    id, name, order = "maple", "MaPLe", 30
    paper = Paper("MaPLe: Multi-modal Prompt Learning", "2210.03117")
    code = "https://github.com/muzairkhattak/multimodal-prompt-learning"
    summary = "Prompts in the first layers of both towers; the image side's are linear maps of the text side's."
    equation = r"\tilde P_k = F_k(P_k),\ k = 0, \dots, J-1"
    departures = (
        "J is cut to the number of blocks of the shallower tower.",
        "The first prompt starts from the template's own first words, where it has enough of them.",
        "50 epochs in the published recipe, as the same authors train PromptSRC on few shots: their configurations of MaPLe"
        " are for base-to-new generalisation; validation chooses the stopping step.",
        WARMUP,
    )
    knobs = MapleKnobs
    inputs = "pixels"
    short = Recipe((2e-3,), steps=BRIEFLY, batch=8, max_norm=1.0)
    published = Recipe((3.5e-3,), epochs=50, batch=4, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def build(self, episode: Episode, knobs: MapleKnobs) -> Head:
        import torch

        from lab.clip.episode import Head
        from lab.clip.towers import prompted, text_tower, vision_tower

        clip = episode.clip
        text, vision = text_tower(clip), vision_tower(clip)
        depth = min(knobs.depth, len(text.transformer.resblocks), len(vision.transformer.resblocks))
        first = start(episode, knobs.tokens, leading_words(episode))
        trained = {"text_0": first}
        shallow, deep = (torch.nn.Linear(first.shape[1], vision.class_embedding.shape[0]) for _ in range(2))
        for k in range(depth):
            coupling = deep if k else shallow
            trained |= {f"couple_{k}": coupling.weight, f"bias_{k}": coupling.bias}
            if k:
                trained[f"text_{k}"] = torch.randn(first.shape) * 0.02
        prompts = prompted(clip, episode.classes, knobs.tokens)
        return Head(knobs, trained, clip=clip, prompts=prompts, depth=depth).to(clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch.nn.functional as F

        from lab.clip.towers import cosine_logits, prompt_features, prompted_image_features

        clip, prompts = head["clip"], head["prompts"]
        text = [head[f"text_{k}"] for k in range(head["depth"])]
        vision = [F.linear(p, head[f"couple_{k}"], head[f"bias_{k}"]) for k, p in enumerate(text)]
        texts = prompt_features(clip, prompts.fill(text[0]), prompts.ends, text[1:])
        pictures = prompted_image_features(clip, batch.pixels, vision[0], vision[1:])
        return cosine_logits(pictures, texts, clip.scale)


register(Maple())
