"""Teach an image-text model a dataset's classes from a few pictures each, by several methods, and compare them.

    python -m lab fewshot --method lora --method nora --shots 4,16 --out out/emoji
    python -m lab fewshot pictures.zip --method all --seeds 1,2,3 --out out/mine

DATA is a folder or zip with one sub-folder a class (train/ and test/ around them if there is a split), or a dataset's
id (`--list` shows them); without it, the embedded OpenMoji set. Several make a table with a column for each. Calling
again with the same --out goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from lab.cli import parse_numbers, parse_settings
from lab.cli.subject import _learning_rates, progress
from lab.errors import LabError

NAME = "fewshot"
HELP = "tune an image-text model on a few pictures a class and compare methods"
# NoRA's Table 2, with the baselines that every table needs.
TABLE = (
    "zero-shot", "1-nn", "linear", "full", "tip-adapter", "tip-adapter-f", "clip-adapter", "taskres", "coop-4", "coop-16",
    "cocoop", "kgcoop", "prograd", "maple", "plotpp", "clip-lora", "lora", "lora-plus", "adalora", "dylora", "lora-fa",
    "vera", "nora", "nola",
)  # fmt: skip
KEYS = (
    "validation_accuracy", "head_parameters", "adapter_bytes", "peak_memory_bytes", "best_step", "steps", "lr", "settled", "per_class",
    "train_pictures", "validation_pictures", "test_pictures",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", metavar="DATA", help="folders, zips, or datasets' ids")
    parser.add_argument("--list", action="store_true", help="show datasets, models, presets and methods, and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for everything that is made")
    parser.add_argument(
        "--method",
        action="append",
        metavar="ID",
        help="a method, or 'table' for NoRA's Table 2 (default: zero-shot, lora, nora)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KNOB=VALUE", help="a method's setting")
    parser.add_argument("--shots", default="4,16", metavar="A,B", help="training pictures a class (default 4,16)")
    parser.add_argument("--seeds", default="1,2,3", metavar="A,B", help="seeds of the draws (default 1,2,3)")
    parser.add_argument("--base", metavar="NAME", help="tiny-clip, an open_clip NAME:TAG, timm:NAME, or a folder")
    parser.add_argument("--preset", metavar="NAME", help="short, clip-lora or nora (default: the model's)")
    parser.add_argument("--encoder", choices=("vision", "text", "both"), help="towers that adapters go into (both)")
    parser.add_argument("--targets", metavar="NAMES", help="layers that adapters go into (q,k,v)")
    parser.add_argument("--template", metavar="TEXT", help="the class text, with {} for the class")
    parser.add_argument(
        "--class-name", action="append", metavar="NAME", help="the classes' names, once for each in turn"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, for every method")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures a step")
    parser.add_argument("--lr", action="append", default=[], metavar="[METHOD=]X", help="learning rate, of all or one")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs done at once (default 1)")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out pictures that cannot be read")


def run(args: argparse.Namespace) -> Any:
    if args.list:
        return listed()
    if args.out is None:
        raise LabError("Say with --out which folder the results go into.")
    from lab import comparison
    from lab.clip import table
    from lab.files import write_atomic

    if not 1 <= args.processes <= 64:
        raise LabError(f"--processes must be between 1 and 64, got {args.processes}.")
    spec = comparison.start(args.out, NAME, to_spec(args), [])
    runs = comparison.run_all(args.out, NAME, spec, progress, args.processes)
    found = table.records(runs)
    if found:
        write_atomic(args.out / "results.csv", table.results_csv(found))
        write_atomic(args.out / "table.md", table.markdown(found))
    return {
        "out": str(args.out),
        "dataset": spec["dataset"],
        "base": spec["base"],
        "runs": [_told(record) for record in found] + [_failed(r, spec) for r in runs if r["state"] != "done"],
        "table": table.markdown(found),
    }


def _told(record: dict[str, Any]) -> dict[str, Any]:
    first = ("method", "seed", "dataset", "shots", "trainable_parameters", "accuracy", "train_seconds")
    return {key: record[key] for key in first} | {"state": "done"} | {key: record.get(key) for key in KEYS}


def _failed(run: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    return {key: run[key] for key in ("method", "seed", "state", "message")} | {"shots": spec["shots"]}


def to_spec(args: argparse.Namespace) -> dict[str, Any]:
    """The task's spec, from what was typed; a folder or zip is taken in first."""
    settings = parse_settings(args.set)
    chosen: list[str] = []
    for id in args.method or ["zero-shot", "lora", "nora"]:
        chosen += [m for m in _table() if m not in chosen] if id in ("table", "all") else [id]
    shared = settings.pop("", {})
    for method in settings:
        if method not in chosen:
            raise LabError(f"--set {method}.… is for a method that is not compared: add --method {method}.")
    names = [_dataset(given, args.skip_damaged) for given in args.data or [""]]
    spec = {
        "dataset": names[0],
        "also": names[1:],
        "methods": {method: shared | settings.get(method, {}) for method in chosen},
        "shots": parse_numbers(args.shots, "--shots"),
        "seeds": parse_numbers(args.seeds, "--seeds"),
        "classes": args.class_name,
        "lr": _learning_rates(args.lr, chosen),
    }
    plain = ("base", "preset", "encoder", "targets", "template", "steps", "batch")
    return spec | {name: getattr(args, name) for name in plain}


def _table() -> list[str]:
    from lab.methods import METHODS
    from lab.methods.clip import CLIP_METHODS

    return [id for id in TABLE if id in CLIP_METHODS or id in METHODS]


def _dataset(given: str, skip_damaged: bool) -> str:
    from lab import datasets
    from lab.datasets import _upload

    path = Path(given).expanduser()
    if given and given not in datasets.DATASETS and path.exists():
        return _upload.take(path, skip_damaged=skip_damaged)
    return datasets.resolve(given).id


def listed() -> dict[str, Any]:
    """Everything that can be named, for people and for programs."""
    from lab import datasets
    from lab.clip.bases import rows
    from lab.tasks.fewshot import PRESETS, methods

    return {
        "datasets": [
            {"id": d.id, "name": d.name, "here": d.is_here(), "licence": d.licence, "template": d.template}
            for d in datasets.DATASETS
        ],
        "bases": [{"id": b.id, "name": b.name, "summary": b.summary} for b in rows()],
        "presets": [{"id": id, "name": p.name, "summary": p.summary} for id, p in PRESETS.items()],
        "methods": [
            {"id": m.id, "name": m.name, "summary": m.summary, "paper": m.paper.url, "knobs": _knobs(m)}
            for m in methods()
        ],
    }


def _knobs(method: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(method.knobs) if "help" in f.metadata}


def show(result: dict[str, Any]) -> None:
    """Print the table, or the lists."""
    if "table" not in result:
        for what, entries in result.items():
            print(f"{what}:")
            for entry in entries:
                here = "" if entry.get("here", True) else "  (not on this machine)"
                print(f"  {entry['id']:<22}{entry.get('summary') or entry['name']}{here}")
        return
    print(result["table"])
    for run in result["runs"]:
        if run["state"] != "done":
            print(f"{run['method']} seed {run['seed']}: {run['state']}: {run['message']}")
    print(f"\n{result['out']}/results.csv\n{result['out']}/table.md")
