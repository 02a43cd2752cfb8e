"""One run of the few-shot task: for each number of shots, draw, train, choose on validation, look at the test set once."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lab import datasets
from lab import device as devices
from lab.clip import episode as episodes
from lab.clip import fit as fitting
from lab.clip.adapter import AdapterMethod
from lab.clip.bases import resolve
from lab.clip.episode import Episode, Head
from lab.clip.fit import Fitted
from lab.clip.method import ClipMethod, Recipe
from lab.clip.model import Clip
from lab.clip.pictures import TestSet
from lab.clip.scores import score
from lab.errors import LabError
from lab.files import write_atomic, write_json
from lab.record import record
from lab.tasks import PlannedRun, Report
from lab.tasks.fewshot import PRESETS, method, parts, recipe


def run(spec: dict[str, Any], planned: PlannedRun, folder: Path, report: Report) -> dict[str, Any]:
    """See `lab.tasks.Task.run`. Writes meta.json, validation.jsonl and, for each dataset and number of shots, what was
    trained (`state.safetensors`, for adapters `adapter/` too) and result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    report(0, 1, phase="loading the model")
    clip, listing = model(spec["base"]), pictures(spec["dataset"])
    write_json(folder / "meta.json", record(spec, planned, devices.describe(clip.device)))
    work = [(own, k, place) for own, place in parts(spec, folder) for k in spec["shots"]]
    reports = _parts(report, planned.method, [(own, k) for own, k, _ in work])
    note = functools.partial(_note, folder / "validation.jsonl")
    done = [_shots(own, planned, k, place, told, note) for (own, k, place), told in zip(work, reports, strict=True)]
    return {
        "method": planned.method,
        "seed": planned.seed,
        "knobs": planned.knobs,
        "dataset": spec["dataset"],
        "classes": spec["classes"] or listing.classes,
        "duplicates": listing.duplicates,
        "datasets": [spec["dataset"], *(spec.get("also") or [])],
        "trainable_parameters": done[len(spec["shots"]) - 1]["trainable_parameters"],
        "train_seconds": sum(part["train_seconds"] for part in done),
        "peak_memory_bytes": max(part["peak_memory_bytes"] for part in done),
        "accuracy": {str(part["shots"]): part["accuracy"] for part in done[: len(spec["shots"])]},
        "shots": done,
    }


@functools.lru_cache(maxsize=1)
def model(base: str) -> Clip:
    """The base, loaded once a process; methods that change weights work on a copy."""
    return resolve(base).load()


@functools.lru_cache(maxsize=16)
def pictures(dataset: str) -> datasets.Listing:
    return datasets.resolve(dataset, local=False).listing()


def runner(id: str) -> ClipMethod:
    """What trains this method: CLIP's own row, or the bridge to an adapter."""
    row = method(id)
    return row if isinstance(row, ClipMethod) else AdapterMethod(row)


def episode(spec: dict[str, Any], shots: int, seed: int) -> Episode:
    """The draw of one run, as the spec says, shared by the methods that a process runs one after another: no method
    changes it. Raises LabError when a class has too few pictures, or names do not fit."""
    matters = ("base", "dataset", "classes", "template", "encoder", "targets", "preset", "crop", "flip")
    return _episode(json.dumps({key: spec[key] for key in matters}), shots, seed)


@functools.lru_cache(maxsize=5)
def _episode(text: str, shots: int, seed: int) -> Episode:
    spec = json.loads(text)
    clip, listing, preset = model(spec["base"]), pictures(spec["dataset"]), PRESETS[spec["preset"]]
    classes = spec["classes"] or listing.classes
    if len(classes) != len(listing.classes):
        raise LabError(f"The dataset has {len(listing.classes)} classes, {len(classes)} names were given.")
    flip = datasets.resolve(spec["dataset"], local=False).flip if spec["flip"] is None else spec["flip"]
    return episodes.make(
        clip,
        listing,
        classes,
        [spec["template"]],
        shots,
        seed,
        encoder=spec["encoder"],
        targets=spec["targets"],
        crop=tuple(spec["crop"] or preset.crop),
        flip=bool(flip),
        extra_views=preset.extra_views,
    )


def build(spec: dict[str, Any], planned: PlannedRun, shots: int, folder: Path) -> tuple[ClipMethod, Head]:
    """A trained classifier as a finished run left it in `folder`, for new pictures; spec and folder are those of one
    dataset (`lab.tasks.fewshot.parts`). Raises LabError if it did not."""
    from safetensors.torch import load_file

    here = folder / f"shots-{shots}"
    if not (here / "result.json").exists():
        raise LabError(f"{planned.method} has not finished {shots} shots yet.")
    trained, drawn = runner(planned.method), episode(spec, shots, planned.seed)
    devices.seed_everything(planned.seed)
    head = trained.build(drawn, method(planned.method).knobs.parse(planned.knobs))
    head.also |= json.loads((here / "result.json").read_text())["settled"]
    state = load_file(here / "state.safetensors") if (here / "state.safetensors").exists() else {}
    fitting.restore(trained, head, {name: tensor.to(drawn.clip.device) for name, tensor in state.items()})
    return trained, head


def _parts(report: Report, id: str, work: list[tuple[dict[str, Any], int]]) -> list[Report]:
    """A report for each dataset and number of shots, so that the run's progress counts the steps of all of them."""
    trains, names = runner(id).trains, [own["dataset"] for own, _ in work]
    lengths = []
    for own, k in work:
        plan = recipe(own, id)
        classes = len(pictures(own["dataset"]).classes)
        lengths.append(plan.length(k, k * classes) * len(plan.rates) if trains else 1)

    def part(index: int) -> Report:
        name = f"{datasets.resolve(names[index], local=False).name}, " if len(set(names)) > 1 else ""

        def told(step: int, steps: int, **values: Any) -> None:
            done = sum(lengths[:index]) + lengths[index] * step // max(1, steps)
            phase = f"{name}{work[index][1]} shots: {values.pop('phase', 'training')}"
            report(done, sum(lengths), phase=phase, **values)

        return told

    return [part(i) for i in range(len(lengths))]


def _shots(
    spec: dict[str, Any], planned: PlannedRun, shots: int, folder: Path, report: Report, note: Callable[..., Any]
) -> dict[str, Any]:
    here = folder / f"shots-{shots}"
    if (here / "result.json").exists():
        return json.loads((here / "result.json").read_text())
    here.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    report(0, 1, phase="reading pictures")
    trained, drawn, plan = runner(planned.method), episode(spec, shots, planned.seed), recipe(spec, planned.method)
    knobs = method(planned.method).knobs.parse(planned.knobs)
    fitted = fitting.fit(trained, drawn, knobs, plan, here, report, note(spec["dataset"], shots))
    report(1, 1, phase="testing")
    held_out = TestSet(drawn.clip, pictures(spec["dataset"]), datasets.home() / "cache" / "features")
    logits = fitting.test(trained, fitted.head, held_out)
    scores = score(logits, held_out.labels, [picture.key for picture in held_out.listing.test])
    result = {"dataset": spec["dataset"]} | _result(trained, fitted, drawn, plan, _save(trained, fitted.head, here))
    result |= scores | {"cpu_seconds": round(time.process_time() - began, 2)}  # of this attempt
    write_json(here / "result.json", result)
    return result


def _result(trained: ClipMethod, fitted: Fitted, drawn: Episode, plan: Recipe, size: int) -> dict[str, Any]:
    return {
        "shots": drawn.shots,
        "trainable_parameters": fitted.head.parameter_count(),
        "head_parameters": 0 if drawn.clip.has_text else sum(p.numel() for p in fitted.head.trained.values()),
        "adapter_bytes": size,
        "train_seconds": fitted.train_seconds,
        "peak_memory_bytes": fitted.peak_memory_bytes,
        "validation_accuracy": fitted.validation_accuracy,
        "train_pictures": len(drawn.train),
        "validation_pictures": len(drawn.validation),
        "steps": plan.length(drawn.shots, len(drawn.train)) if trained.trains else 0,
        "best_step": fitted.step,
        "lr": fitted.rate,
        "settled": fitted.settled,
    }


def _save(trained: ClipMethod, head: Head, folder: Path) -> int:
    """What was trained, as one file; adapters also as PEFT's folder. Returns the file's size in bytes.

    Beyond 50 million numbers (full fine-tuning of a large model) they are rounded to bf16.
    """
    from peft import PeftModel
    from safetensors.torch import save

    state = fitting.learned(trained, head)
    if not state:
        return 0
    large = sum(tensor.numel() for tensor in state.values()) > 50e6
    kept = {k: v.to(torch.bfloat16 if large and v.is_floating_point() else v.dtype).cpu() for k, v in state.items()}
    content = save({name: tensor.contiguous() for name, tensor in kept.items()})
    write_atomic(folder / "state.safetensors", content)
    if isinstance(head.model, PeftModel):
        head.model.save_pretrained(str(folder / "adapter"))
    return len(content)


def _note(path: Path, dataset: str, shots: int) -> Callable[..., None]:
    """Appends a line for each validation to the run's curve."""

    def note(**values: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"dataset": dataset, "shots": shots} | values) + "\n")

    return note
