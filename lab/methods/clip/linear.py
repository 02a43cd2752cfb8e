"""Linear probe (Radford et al. 2021, arXiv 2103.00020, section 3.2 and appendix A.3; the field's second-oldest baseline).

Multinomial logistic regression on the frozen features, W ∈ R^{C×d}, b ∈ R^C. The L2 strength is searched on validation.
Departures: L-BFGS of torch instead of scikit-learn's; eight strengths a factor 10 apart instead of a 96-point grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.methods.clip import ClipMethod, register
from lab.methods.spec import Knobs, Paper, knob

if TYPE_CHECKING:
    import torch

    from lab.clip.episode import Batch, Episode, Head

STRENGTHS = tuple(10.0**power for power in range(-6, 2))


@dataclass
class LinearKnobs(Knobs):
    l2: float = knob(0.0, "Strength of the L2 penalty; 0: searched on validation pictures.", low=0.0)


class Linear(ClipMethod):
    id, name, order = "linear", "Linear probe", 3
    paper = Paper("Learning Transferable Visual Models From Natural Language Supervision", "2103.00020")
    code = "https://github.com/openai/CLIP"
    summary = "Logistic regression on the frozen image features."
    equation = r"p(c \mid x) \propto \exp(w_c^\top f(x) + b_c)"
    departures = (
        "L-BFGS of torch instead of scikit-learn's.",
        "Eight L2 strengths a factor 10 apart instead of 96.",
    )
    knobs = LinearKnobs
    needs_text = False
    trains = False  # solved at once, not by the training loop

    def build(self, episode: Episode, knobs: LinearKnobs) -> Head:
        import torch

        from lab.clip.episode import Head

        width, classes = episode.train.features.shape[1], len(episode.classes)
        start = {"weight": torch.zeros(classes, width), "bias": torch.zeros(classes)}
        return Head(knobs, start, clip=episode.clip).to(episode.clip.device)

    def logits(self, head: Head, batch: Batch) -> torch.Tensor:
        import torch
        import torch.nn.functional as F

        with torch.autocast(batch.features.device.type, enabled=False):
            # Unit features times √d have components of size 1, for which the strengths are meant.
            return F.linear(batch.features * batch.features.shape[1] ** 0.5, head["weight"], head["bias"])

    def settle(self, head: Head, episode: Episode) -> dict[str, Any]:
        import torch.nn.functional as F

        from lab.clip.episode import Batch

        found = []
        for l2 in (head.knobs.l2,) if head.knobs.l2 else STRENGTHS:
            self._solve(head, episode, l2)
            held = episode.validation
            logits = self.logits(head, Batch(held.labels, features=held.features)).detach()
            accuracy = (logits.argmax(1) == held.labels).float().mean().item()
            found.append((accuracy, -F.cross_entropy(logits, held.labels).item(), l2, head.learned()))
            found[-1] = (*found[-1][:3], {k: v.clone() for k, v in found[-1][3].items()})
        _, _, l2, state = max(found, key=lambda f: f[:2])
        head.put(state)
        return {"l2": l2}

    def _solve(self, head: Head, episode: Episode, l2: float) -> None:
        import torch
        import torch.nn.functional as F

        from lab.clip.episode import Batch

        parameters = list(head.trained.values())
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        solver = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")
        batch = Batch(episode.train.labels, features=episode.train.features)

        def closure() -> torch.Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(self.logits(head, batch), batch.labels) + l2 / 2 * head["weight"].square().sum()
            loss.backward()
            return loss

        solver.step(closure)


register(Linear())
