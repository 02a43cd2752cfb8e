"""One run of the tasks on trained adapters: fit or merge, export, draw; or draw alone, with an adapter as it came."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from PIL import Image

from lab import adapter_pictures as drawing
from lab import metrics
from lab.adapter_files import read
from lab.bases import Base, resolve
from lab.compress._files import compress_file, opened, part_of
from lab.errors import LabError
from lab.export import export
from lab.files import write_atomic, write_json
from lab.merge import merge_files
from lab.methods import adapters
from lab.tasks import PlannedRun, Report
from lab.tasks._adapters import sources

LAYOUTS = ("diffusers", "kohya")


def compressed(spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report) -> dict[str, Any]:
    """See `lab.tasks.Task.run`. Writes adapter, export and samples into the folder."""
    (source,) = sources(inputs)
    if planned.method in ("base", "original"):
        return _as_it_came(spec, planned, source, source if planned.method == "original" else None, folder, report)

    def make(out: Path, told: Report) -> dict[str, Any]:
        options = {"base": spec["base"] or None, "name": spec["name"], "given": planned.knobs, "seed": spec["seed"]}
        return compress_file(source, planned.method, spec["budget"], out, report=told, **options)

    result = _made(folder, report, make)
    return {"seed": planned.seed, "trainable_parameters": result["parameters"], "adapter_bytes": result["bytes"]} | (
        result | _exported(folder, result["base"], report) | _pictures(spec, result["base"], folder, report)
    )


def merged(spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report) -> dict[str, Any]:
    """See `lab.tasks.Task.run`. Writes adapter, export and samples into the folder."""
    found = sources(inputs)
    if planned.method != "merged":
        _, _, number = planned.method.partition("-")
        return _as_it_came(spec, planned, found[0], found[int(number) - 1] if number else None, folder, report)

    def make(out: Path, told: Report) -> dict[str, Any]:
        options = {name: spec[name] for name in ("rank", "density", "seed")}
        return merge_files(
            found,
            spec["weights"],
            spec["how"],
            out,
            base=spec["base"] or None,
            names=spec["names"],
            report=told,
            **options,
        )

    result = _made(folder, report, make)
    base = result["base"]
    more = _exported(folder, base, report) | _pictures(spec, base, folder, report) if base else {}
    return {
        "method": planned.method, "seed": planned.seed, "knobs": {},
        "trainable_parameters": result["parameters"], "adapter_bytes": result["bytes"],
    } | result | more  # fmt: skip


def _made(folder: Path, report: Report, make: Callable[[Path, Report], dict[str, Any]]) -> dict[str, Any]:
    """The new adapter in `folder/adapter`, whole or not there; what an earlier attempt finished is kept."""
    target, aside, told = folder / "adapter", folder / "adapter.tmp", folder / "fit.json"
    if target.is_dir() and told.is_file():
        return json.loads(told.read_text())
    for path in (target, aside):
        shutil.rmtree(path, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    report(0, 1, phase="opening the adapter")
    result = make(aside, report) | {"adapter": "adapter"}
    write_json(told, result)
    aside.rename(target)
    return result


def _exported(folder: Path, base: str, report: Report) -> dict[str, Any]:
    """The adapter in the layouts of other programs, where its base has them; errors by layout."""
    errors = {}
    for number, layout in enumerate(LAYOUTS if resolve(base).family == "sdxl" else ()):
        report(number, len(LAYOUTS), phase=f"writing the {layout} layout")
        try:
            path = folder / "export" / f"{layout}.safetensors"
            write_atomic(path, lambda part, layout=layout: _export(folder / "adapter", layout, part, base, errors))
        except LabError as problem:
            print(f"No {layout} layout: {problem}", file=sys.stderr, flush=True)
    return {"exports": errors}


def _export(adapter: Path, layout: str, part: Path, base: str, errors: dict[str, float]) -> None:
    written = part.with_name(f"{part.name}.safetensors")  # the exporter goes by the ending
    try:
        errors[layout] = export(adapter, layout, written, base=base)["relative_error"]
        written.replace(part)
    finally:
        written.unlink(missing_ok=True)


# -- pictures -------------------------------------------------------------------------------------------------
def _as_it_came(
    spec: dict[str, Any], planned: PlannedRun, first: Path, source: Path | None, folder: Path, report: Report
) -> dict[str, Any]:
    """Pictures of the base, or of an input added to its weights."""
    report(0, 1, phase="opening the adapter")
    _, row = opened(first, spec["base"] or None, spec.get("name") or None)
    result: dict[str, Any] = {"method": planned.method, "seed": planned.seed, "knobs": {}, "base": row.id}
    if row.family != "sdxl":
        return result
    whole = row.load()
    with drawing.added(row, whole, read(source, row).updates if source else {}):
        _draw(spec, row, whole, folder, report)
    return result


def _pictures(spec: dict[str, Any], base: str, folder: Path, report: Report) -> dict[str, Any]:
    """Pictures through the new adapter's own tuner, and how far they are from those of the adapter as it came."""
    row = resolve(base)
    if row.family != "sdxl" or not spec["prompts"]:
        return {}
    report(0, 1, phase="loading the base model")
    whole = row.load()
    with _attached(row, whole, folder / "adapter"):
        mine = _draw(spec, row, whole, folder, report)
    theirs = [folder.parent / "original-s0" / "samples" / path.name for path in mine]
    if not all(path.is_file() for path in theirs):
        return {}
    try:
        scorer = metrics.scorer(row.scorer)
    except LabError as problem:
        print(f"The pictures are not scored: {problem}", file=sys.stderr, flush=True)
        return {}
    report(1, 1, phase="scoring")
    return {"picture_distance": metrics.drift(scorer, [_open(p) for p in theirs], [_open(p) for p in mine])}


@contextlib.contextmanager
def _attached(row: Base, whole: Any, folder: Path) -> Generator[None]:
    names = adapters.settings(folder).get("target_modules") or []
    model = adapters.load(part_of(row, whole, [names] if isinstance(names, str) else names), folder).eval()
    try:
        yield
    finally:
        model.unload()


def _draw(spec: dict[str, Any], row: Base, whole: Any, folder: Path, report: Report) -> list[Path]:
    """`samples/p<prompt>_s<seed>.png`."""
    seeds = spec["sample_seeds"]
    rows = drawing.draw(row, whole, spec["prompts"], seeds, lambda done, every: report(done, every, phase="drawing"))
    paths = []
    for p, pictures in enumerate(rows):
        for seed, picture in zip(seeds, pictures, strict=True):
            paths.append(folder / "samples" / f"p{p}_s{seed}.png")
            write_atomic(paths[-1], lambda part, picture=picture: picture.save(part, format="PNG"))
    return paths


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
