"""Trained few-shot classifiers on somebody's own picture: the five likeliest classes by each method."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab.clip.fit import predict
from lab.clip.pictures import encode, prepare
from lab.errors import LabError
from lab.tasks import PlannedRun, _fewshot_run

if TYPE_CHECKING:
    from PIL import Image

    from lab.clip.episode import Head
    from lab.clip.method import ClipMethod

HELD = 150_000_000  # parameters of all classifiers that are kept ready
_lock = threading.Lock()
_ready: OrderedDict[tuple[str, int], tuple[ClipMethod, Head, int]] = OrderedDict()


def top(spec: dict[str, Any], runs: Sequence[dict[str, Any]], shots: int, image: Image.Image, k: int = 5) -> list[Any]:
    """`runs`: dicts with method, seed, knobs and folder of finished runs → for each {"method", "seed", "top": [(class,
    probability), …]}, or {"method", "seed", "error"} where a classifier could not be put together again."""
    classes = spec["classes"] or _fewshot_run.pictures(spec["dataset"]).classes
    answers = []
    for run in runs:
        answer: dict[str, Any] = {"method": run["method"], "seed": run["seed"]}
        try:
            with _lock:  # heads are shared; a page answers several visitors at once
                chances = _chances(spec, run, shots, image)
        except LabError as error:
            answers.append(answer | {"error": str(error)})
            continue
        best = torch.topk(chances, min(k, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers.append(answer | {"top": [(classes[i], p) for i, p in pairs]})
    return answers


def _chances(spec: dict[str, Any], run: dict[str, Any], shots: int, image: Image.Image) -> torch.Tensor:
    method, head = _classifier(spec, run, shots)
    pixels = prepare(image, head["clip"])[None]
    features = encode(_fewshot_run.model(spec["base"]), pixels) if method.inputs == "features" else None
    return predict(method, head, features, [pixels])[0].softmax(0)


def _classifier(spec: dict[str, Any], run: dict[str, Any], shots: int) -> tuple[ClipMethod, Head]:
    key = (str(run["folder"]), shots)
    if key not in _ready:
        planned = PlannedRun(run["method"], run["seed"], run["knobs"])
        method, head = _fewshot_run.build(spec, planned, shots, Path(run["folder"]))
        _ready[key] = (method, head, sum(p.numel() for p in head.parameters()))
    _ready.move_to_end(key)
    while len(_ready) > 1 and sum(size for *_, size in _ready.values()) > HELD:
        _ready.popitem(last=False)
    return _ready[key][:2]
