"""CoOp (Zhou et al., IJCV 2022, arXiv 2109.01134, equations 2 and 3): learned context tokens before the class name.

t_c = text encoder([v_1]…[v_M][class c].), only v ∈ R^{M×d} trained, shared by all classes, the name at the end. Two rows:
4 and 16 tokens, as in NoRA's Table 2. Official code: v ~ N(0, 0.02²), SGD lr 2e-3, batch 32, 50 (1 shot), 100 (2, 4) or
200 (8, 16 shots) epochs, cosine after a warm-up epoch at 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.methods.clip import BY_SHOTS, ClipMethod, Recipe, register
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


WARMUP = "The learning rate rises linearly over the first epoch, where the official code keeps it at 1e-5."


@dataclass
class CoOpKnobs(Knobs):
    tokens: int = knob(16, "Learned context tokens (M).", low=1, high=64)
    words: str = knob("", "Words whose embeddings the context starts from; empty: random numbers.")


@dataclass
class FewTokens(CoOpKnobs):
    tokens: int = knob(4, "Learned context tokens (M).", low=1, high=64)


def start(episode: Episode, tokens: int, words: str) -> torch.Tensor:
    """The context's start (M, d): the first M tokens of the words if they have as many, else N(0, 0.02²)."""
    import torch

    from lab.clip.towers import text_tower, word_embeddings

    given = word_embeddings(episode.clip, words, tokens) if words else None
    if given is not None:
        return given.float()
    width = text_tower(episode.clip).token_embedding.weight.shape[1]
    return (torch.randn(tokens, width) * 0.02).to(episode.clip.device)


def leading_words(episode: Episode) -> str:
    """The prompt template up to the class: "a photo of a {}." → "a photo of a"."""
    return episode.templates[0].partition("{}")[0].strip()


class CoOp(ClipMethod):
    paper = Paper("Learning to Prompt for Vision-Language Models", "2109.01134")
    code = "https://github.com/KaiyangZhou/CoOp"
    summary = "The words around the class name are learned as free token embeddings."
    equation = r"t_c = g([v_1]\dots[v_M][\text{class}_c])"
    departures = (
        "The image features are the frozen encoder's, computed once for a few random crops, not for a new crop each step.",
        WARMUP,
        "Validation chooses the stopping step.",
    )
    short = Recipe((5e-3,), steps=100, batch=64)
    published = Recipe((2e-3,), epochs=BY_SHOTS, batch=32, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)

    def __init__(self, knobs: type[CoOpKnobs], order: int) -> None:
        tokens = knobs().tokens
        self.id, self.name, self.order, self.knobs = f"coop-{tokens}", f"CoOp ({tokens} tokens)", order, knobs

    def build(self, episode: Episode, knobs: CoOpKnobs) -> Head:
        from lab.clip.episode import Head
        from lab.clip.towers import prompted

        context = start(episode, knobs.tokens, knobs.words)
        prompts = prompted(episode.clip, episode.classes, knobs.tokens)
        frozen = {"texts": episode.zero_shot}
        return Head(knobs, {"context": context}, frozen, clip=episode.clip, prompts=prompts).to(episode.clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        from lab.clip.towers import cosine_logits

        return cosine_logits(batch.features, self.texts(head), head["clip"].scale)

    def texts(self, head: Head) -> torch.Tensor:
        """Class text features (c, e) with the context as it is now."""
        from lab.clip.towers import prompt_features

        prompts = head["prompts"]
        return prompt_features(head["clip"], prompts.fill(head["context"]), prompts.ends)


register(CoOp(FewTokens, 20))
register(CoOp(CoOpKnobs, 21))
