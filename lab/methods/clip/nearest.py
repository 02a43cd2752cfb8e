"""1-NN: the class of the most similar training picture (NOLA, arXiv 2310.02556, Table 6, where it needs 0 parameters).

argmax over c of max over training pictures i of class c of cos(f(x), f(x_i)). Departures: the paper's code is not
public for this baseline; cosine similarity is taken, as its features are compared for the linear head. Scores are put
on the model's logit scale, which changes no prediction and makes confidences comparable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab.methods.clip import ClipMethod, register
from lab.methods.spec import Paper

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head


class Nearest(ClipMethod):
    id, name, order = "1-nn", "1-NN", 2
    paper = Paper("NOLA: Compressing LoRA using Linear Combination of Random Basis", "2310.02556")
    summary = "The class of the most similar training picture, nothing trained."
    equation = r"\arg\max_c \max_{i: y_i = c} \cos(f(x), f(x_i))"
    needs_text = False
    trains = False

    def build(self, episode: Episode, knobs: Any) -> Head:
        from lab.clip.episode import Head

        frozen = {"keys": episode.train.features, "labels": episode.train.labels}
        return Head(knobs, frozen=frozen, clip=episode.clip, classes=len(episode.classes))

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch

        from lab.clip.towers import cosine_logits

        clip = head["clip"]
        similarity = cosine_logits(batch.features, head["keys"], clip.scale if clip.has_text else 20.0)
        nearest = torch.full((len(similarity), head["classes"]), -1e4, device=similarity.device)
        return nearest.scatter_reduce(1, head["labels"].expand(len(similarity), -1), similarity, "amax")


register(Nearest())
