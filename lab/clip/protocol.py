"""The few-shot protocol: which pictures train, validate and test. No torch, no pictures here, only indices.

Test pictures are fixed by the dataset (or once, by `split`, from the pictures' contents) and are the same for every
method, seed and number of shots. Shots are drawn a class by seed, without replacement; validation pictures come from
what is left of training, or from the dataset's own validation pictures; no test picture is ever among them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lab.errors import LabError

VALIDATION = 4  # validation pictures a class are min(shots, 4), as CoOp's and CLIP-LoRA's code has it
TEST_SHARE = 0.5  # of a class, where a dataset comes without test pictures

WRITTEN = (
    "Test pictures are the same for every method, seed and number of shots; a run looks at them once, after everything "
    "is settled. Shots are drawn per class by the seed, without replacement; up to four validation pictures per class "
    "are drawn from what is left of training. Stopping step, learning rate (where several are given) and "
    "hyper-parameters searched after training are chosen on validation pictures alone; a tie goes to the lower "
    "validation loss. Figures are means and standard deviations over seeds; a best value is printed bold only where its "
    "lead over the next is larger than the noise (Welch's t-test, 5 %)."
)


@dataclass(frozen=True)
class Draw:
    """Indices of one run's pictures: into the dataset's training list (`train`) and, for `validation`, into the
    validation list if the dataset has one (`own_validation`), else into the training list too."""

    train: list[int]
    validation: list[int]
    own_validation: bool


def draw(train: Sequence[int], validation: Sequence[int], classes: Sequence[str], shots: int, seed: int) -> Draw:
    """Labels of the training and validation lists → the pictures of one run.

    Raises LabError naming the class with too few pictures. With the same seed, 4 shots are among 16 shots.
    """
    by_class = _by_class(train, len(classes))
    own = _by_class(validation, len(classes)) if validation else None
    chosen, held = [], []
    for label, name in enumerate(classes):
        held_count = min(shots, VALIDATION)
        pool = _shuffled(by_class[label], seed, label)
        rest = pool[shots:] if own is None else _shuffled(own[label], seed, label)
        if len(pool) < shots or not rest:
            need = shots + (1 if own is None else 0)
            raise LabError(
                f"Class '{name[:60]}' has {len(pool)} pictures to train with; {shots} shots and at least one validation "
                f"picture need {need}: choose fewer shots, or add pictures to this class."
            )
        chosen += pool[:shots]
        held += rest[:held_count]
    return Draw(chosen, held, own is not None)


def most_shots(train: Sequence[int], validation: Sequence[int], class_count: int) -> int:
    """The largest number of shots that every class has pictures for."""
    smallest = min((len(group) for group in _by_class(train, class_count)), default=0)
    return smallest if validation else max(0, smallest - 1)


def split(labels: Sequence[int], keys: Sequence[str], class_count: int) -> tuple[list[int], list[int]]:
    """Indices of training and test pictures for a dataset without test pictures of its own.

    `keys` name the pictures' contents: equal pictures fall on the same side, and the split is the same whatever order
    they come in. Half of each class is for testing, at least one picture on each side.
    """
    train, test = [], []
    for group in _by_class(labels, class_count):
        contents = sorted({keys[i] for i in group})
        random.Random("split").shuffle(contents)
        held = set(contents[: max(1, round(len(contents) * TEST_SHARE))] if len(contents) > 1 else [])
        train += [i for i in group if keys[i] not in held]
        test += [i for i in group if keys[i] in held]
    return sorted(train), sorted(test)


def _by_class(labels: Sequence[int], class_count: int) -> list[list[int]]:
    groups: list[list[int]] = [[] for _ in range(class_count)]
    for i, label in enumerate(labels):
        groups[label].append(i)
    return groups


def _shuffled(indices: list[int], seed: int, label: int) -> list[int]:
    order = list(indices)
    random.Random(f"shots/{seed}/{label}").shuffle(order)
    return order
