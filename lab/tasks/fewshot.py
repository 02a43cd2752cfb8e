"""Few-shot task: teach an image-text model a dataset's classes from a few pictures each, by many methods.

A run is one method at one seed and does all datasets and shots in turn, each in its own folder `shots-<k>` (`also-<n>/`
before it for the n-th further dataset): the model is loaded and the test features are computed once. This file checks
and plans; `_fewshot_run.py` trains and scores; `lab/clip/protocol.py` is the protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import datasets
from lab.clip import protocol
from lab.clip.bases import has_text, resolve
from lab.clip.method import BRIEFLY, ClipMethod, Recipe
from lab.errors import LabError
from lab.methods import METHODS, Method
from lab.methods.clip import CLIP_METHODS
from lab.registry import check_names, unknown
from lab.targets import roles
from lab.tasks import PlannedRun, Report, register
from lab.uploads import check_text

if TYPE_CHECKING:
    from lab.bases import Base

SHOTS = (1, 2, 4, 8, 16)
MAX_SHOTS, MAX_STEPS, MAX_RUNS, MAX_DATASETS = 64, 100_000, 500, 16
ENCODERS = ("vision", "text", "both")

# None: decided by the preset, the base or the dataset.
DEFAULTS: dict[str, Any] = {
    "base": "tiny-clip",
    "dataset": datasets.EMBEDDED,
    "also": [],  # further datasets, with class names and templates of their own
    "classes": None,
    "template": None,
    "shots": [4, 16],
    "seeds": [1, 2, 3],
    "methods": {"zero-shot": {}, "lora": {}, "nora": {}},
    "encoder": "both",
    "targets": None,
    "preset": None,
    "steps": None,
    "batch": None,
    "lr": None,
    "crop": None,
    "flip": None,
    "title": None,
    "pictures": None,  # `lab.comparison` counts uploads; this task has none of its own
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """adapters: how adapters are trained. published: whether other methods follow their authors' recipe or the short
    one. crop: area of the random crops. extra_views: random crops cached per picture for frozen encoders. knobs:
    settings that replace a method's own defaults, where it has settings of that name."""

    name: str
    adapters: Recipe
    published: bool
    crop: tuple[float, float] = (0.08, 1.0)
    extra_views: int = 10
    knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summary: str = ""


PRESETS: dict[str, Preset] = {
    "short": Preset(
        "Short, for processors",
        Recipe((3e-3,), steps=BRIEFLY, batch=8, weight_decay=0.01, max_norm=1.0),
        published=False,
        crop=(0.6, 1.0),
        extra_views=3,
        summary="60 steps of 8 pictures for adapters up to 4 shots, 160 beyond; lr 3e-3, other rates where a method's scale is "
        "another; other methods train as briefly.",
    ),
    "clip-lora": Preset(
        "CLIP-LoRA's",
        Recipe((2e-4,), steps_per_shot=500, batch=32, weight_decay=0.01),
        published=True,
        knobs={"r": 2, "dropout": 0.25, "lora_dropout": 0.25},
        summary="r = 2, lr 2e-4, batch 32, 500 × shots steps, dropout 0.25, cosine; other methods as their authors do.",
    ),
    "nora": Preset(
        "NoRA's authors'",
        Recipe((1e-3, 5e-3, 1e-2), steps_per_shot=400, batch=64, weight_decay=0.01),
        published=True,
        knobs={"r_inner": 16, "r_outer": 0.8, "r": 2, "dropout": 0.25, "lora_dropout": 0.25},
        summary="400 × shots steps of 64 pictures; the learning rate from 1e-3, 5e-3, 1e-2 by validation; r_inner 16, "
        "r_outer 0.8 of the smaller side.",
    ),
    "nola": Preset(
        "NOLA's vision protocol",
        Recipe((5e-3, 1e-3, 5e-4), epochs=50, batch=64),
        published=True,
        knobs={"r": 4, "k": 1000, "l": 1000},
        summary="50 epochs of batches of 64; the learning rate from 5e-3, 1e-3, 5e-4 by validation (full fine-tuning: 8e-5 to "
        "1e-5); r 4, k = l = 1000. Parameters count the linear head, which NOLA's own table leaves out.",
    ),
}


def method(id: str) -> Method | ClipMethod:
    """The adapter or CLIP method with this id. Raises LabError naming the nearest ones."""
    if id in CLIP_METHODS:
        return CLIP_METHODS[id]
    if id in METHODS:
        return METHODS[id]
    raise unknown("method", id, [*CLIP_METHODS.ids(), *METHODS.ids()])


def methods() -> list[Method | ClipMethod]:
    """Everything the task can run: CLIP's own methods, then the adapters."""
    return [*CLIP_METHODS, *METHODS]


def name(id: str) -> str:
    return method(id).name if id in CLIP_METHODS or id in METHODS else id


def parts(spec: Mapping[str, Any], folder: Path) -> list[tuple[dict[str, Any], Path]]:
    """For each dataset of a checked spec: the spec as if it were the only one, and where a run keeps what it makes."""
    made = [(dict(spec), folder)]
    for number, id in enumerate(spec.get("also") or [], 1):
        own = {"dataset": id, "classes": None, "template": datasets.resolve(id, local=False).template}
        made.append((dict(spec) | own, folder / f"also-{number}"))
    return made


class FewShot:
    id = "fewshot"
    name = "Few-shot"
    compared = False  # its tables are made of the runs by the page
    imports = ("lab.tasks._fewshot_run", "open_clip", "peft")

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError, one sentence, on the first bad value."""
        check_names("setting", spec, DEFAULTS)
        full = DEFAULTS | {k: v for k, v in spec.items() if v is not None}
        base = resolve(check_text("base", full["base"], 500))
        full["base"] = base.id
        full["preset"] = full["preset"] or base.preset(self.id).get("preset", "clip-lora")
        if full["preset"] not in PRESETS:
            raise unknown("preset", str(full["preset"]), list(PRESETS))
        full["targets"] = full["targets"] or base.targets
        roles(full["targets"])
        _check_choices(full)
        full["methods"] = _methods(full, base)
        _check_data(full)
        _check_also(full)
        if len(full["methods"]) * len(full["seeds"]) > MAX_RUNS:
            raise LabError(f"These are more than {MAX_RUNS} runs: choose fewer methods or seeds.")
        full["title"] = full["title"] or f"Few-shot {datasets.resolve(full['dataset'], local=False).name}"
        return full

    def base(self, spec: dict[str, Any]) -> Base:
        return resolve(spec["base"])

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        """Every method at the first seed, then at the next."""
        chosen = spec["methods"].items()
        return [PlannedRun(id, seed, knobs) for seed in spec["seeds"] for id, knobs in chosen]

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        from lab.tasks._fewshot_run import run

        self.base(spec).hold(inputs.parent)
        return run(spec, planned, folder, report)


def recipe(spec: dict[str, Any], id: str) -> Recipe:
    """How this method is trained under this spec."""
    preset, row = PRESETS[spec["preset"]], method(id)
    if isinstance(row, ClipMethod):
        made = row.published if preset.published else row.short
    else:
        made = preset.adapters
        if not preset.published:
            rate = resolve(spec["base"]).preset("fewshot").get("learning_rates", {}).get(id)
            made = dataclasses.replace(made, rates=(rate,)) if rate else made
    given = spec["lr"] if not isinstance(spec["lr"], dict) else spec["lr"].get(id)
    if given is not None:
        made = dataclasses.replace(made, rates=tuple(given) if isinstance(given, list) else (given,))
    changes = {key: spec[key] for key in ("steps", "batch") if spec[key] is not None}
    return dataclasses.replace(made, **changes)


# -- checks ------------------------------------------------------------------------------------------------
def _check_choices(spec: dict[str, Any]) -> None:
    spec["shots"] = _numbers("shots", spec["shots"], 1, MAX_SHOTS)
    spec["seeds"] = _numbers("seeds", spec["seeds"], 0, 10**6)
    if spec["encoder"] not in ENCODERS:
        raise LabError(f"The encoder must be vision, text or both, got {str(spec['encoder'])[:40]!r}.")
    for key, high in (("steps", MAX_STEPS), ("batch", 1024)):
        if spec[key] is not None:
            spec[key] = _numbers(key, [spec[key]], 1, high)[0]
    rates = spec["lr"].values() if isinstance(spec["lr"], dict) else [spec["lr"]]
    for given in rates:
        for rate in given if isinstance(given, list) else [given]:
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 10):
                raise LabError(f"A learning rate must be a number above 0 and at most 10, got {str(rate)[:40]!r}.")
    if spec["crop"] is not None:
        crop = spec["crop"]
        fits = isinstance(crop, list | tuple) and len(crop) == 2 and all(isinstance(c, int | float) for c in crop)
        if not fits or not 0 < crop[0] <= crop[1] <= 1:
            raise LabError(f"The crop is [least, most] share of the area, each above 0 and at most 1, got {crop!r}.")
        spec["crop"] = list(crop)
    if spec["title"] is not None:
        spec["title"] = check_text("title", spec["title"], 100)


def _numbers(what: str, values: Any, low: int, high: int) -> list[int]:
    if not isinstance(values, list | tuple) or not values:
        raise LabError(f"Choose at least one number of {what}, got {str(values)[:60]!r}.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise LabError(f"{what} must be whole numbers from {low} to {high}, got {str(value)[:40]}.")
    return list(dict.fromkeys(values))


def _methods(spec: dict[str, Any], base: Base) -> dict[str, dict[str, Any]]:
    given = spec["methods"]
    if isinstance(given, list | tuple):
        given = {str(id): {} for id in given}
    if not isinstance(given, dict) or not given:
        raise LabError("Choose at least one method.")
    preset, checked = PRESETS[spec["preset"]], {}
    for id, knobs in given.items():
        row = method(id)
        if isinstance(row, ClipMethod) and row.needs_text and not has_text(base):
            raise LabError(f"{row.name} compares pictures with class texts, which {base.id} cannot read: leave it out.")
        fields = {f.name for f in dataclasses.fields(row.knobs)}
        own = {k: v for k, v in preset.knobs.items() if k in fields and id not in CLIP_METHODS}
        if not isinstance(knobs, dict):
            raise LabError(f"The settings of {row.name} must be names and values, got {str(knobs)[:60]!r}.")
        checked[id] = dataclasses.asdict(row.knobs.parse(own | knobs))
    return checked


def _check_data(spec: dict[str, Any]) -> None:
    """Class names, template, and whether there are pictures enough, where the dataset can tell without torch."""
    dataset = datasets.resolve(spec["dataset"], local=False)
    spec["dataset"] = dataset.id
    spec["template"] = check_text("template", spec["template"] or dataset.template, 200)
    if "{}" not in spec["template"]:
        raise LabError(f"The template must have {{}} where the class belongs, got '{spec['template'][:60]}'.")
    if spec["classes"] is not None:
        if not isinstance(spec["classes"], list):
            raise LabError("The classes must be a list of names.")
        spec["classes"] = [check_text("class name", c, 100) for c in spec["classes"]]
        repeated = next((c for c in spec["classes"] if spec["classes"].count(c) > 1), None)
        if repeated:
            raise LabError(f"Two classes are called '{repeated}': give each a name of its own.")
    _check_pictures(dataset, spec)


def _check_pictures(dataset: datasets.Dataset, spec: dict[str, Any]) -> None:
    if dataset.folder:
        return
    listing = dataset.listing()
    if spec["classes"] is not None and len(spec["classes"]) != len(listing.classes):
        raise LabError(f"The dataset has {len(listing.classes)} classes, {len(spec['classes'])} names were given.")
    names = spec["classes"] or listing.classes
    labels, held = [p.label for p in listing.train], [p.label for p in listing.validation]
    for shots in spec["shots"]:
        protocol.draw(labels, held, names, shots, spec["seeds"][0])


def _check_also(spec: dict[str, Any]) -> None:
    """Further datasets, each once."""
    given = spec["also"]
    if not isinstance(given, list | tuple):
        raise LabError(f"Further datasets must be a list of names, got {str(given)[:60]!r}.")
    found = [datasets.resolve(check_text("dataset", id, 500), local=False) for id in given]
    spec["also"] = [id for id in dict.fromkeys(d.id for d in found) if id != spec["dataset"]]
    if len(spec["also"]) >= MAX_DATASETS:
        raise LabError(f"{len(spec['also']) + 1} datasets are too many for one comparison: at most {MAX_DATASETS}.")
    for dataset in found:
        _check_pictures(dataset, spec | {"classes": None})


register(FewShot())
