"""The whole path once with a random-weight SDXL of real size: start, train, kill, resume, draw, export.

    python -m lab bench sdxl_real --write                       256 px, two steps, bf16: a CPU with 24 GB
    python -m lab bench sdxl_real --resolution 1024 --steps 20  on a GPU

The base is built once into a folder in the hub's format (7 GB, removed afterwards unless --folder names one) and
loaded by the lab's own code. Its numbers are random: times and memory are real, the pictures mean nothing. Memory is the peak
of each phase: on a GPU what torch held in tensors, on a CPU the whole process's. `--write` puts the table into
lab/bench/sdxl.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab.bench import _tables

HELP = "the whole path with a random-weight SDXL of real size"
TABLE = Path(__file__).parent / "sdxl.md"
ID = "sdxl-random"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where the base is, or is to be built and kept")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sampling-steps", type=int, default=2)
    parser.add_argument("--weights", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--methods", default="lora,nora", help="names between commas")
    parser.add_argument("--r-outer", type=float, default=128, help="of NoRA; 0.8, its default, holds 5.7 GB of factors")
    parser.add_argument("--text-encoder", action="store_true", help="adapters on the text encoders too")
    parser.add_argument("--write", action="store_true", help="write the table into lab/bench/sdxl.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"device", "phases": [{"run", "phase", "seconds", "peak_bytes"}], "runs", "exports"}."""
    from lab import device as devices
    from lab.bases import ASSETS, BASES, resolve
    from lab.bench import _sdxl_random

    with tempfile.TemporaryDirectory() as scratch:
        watch = Watch(devices.pick())
        folder = args.folder or Path(scratch) / "base"
        if not (folder / "model_index.json").exists():
            watch.now("base", "building the random base")
        _sdxl_random.build(folder)
        row = dataclasses.replace(
            resolve(str(folder)), id=ID, name="random SDXL", architecture="sdxl-unet", scorer=str(ASSETS / "tiny-clip")
        )
        if ID not in BASES:
            BASES.register(row)
        home, before = Path(scratch) / "home", os.environ.get("LAB_HOME")
        os.environ["LAB_HOME"] = str(home)  # the factorisations are kept there
        try:
            found = _path(args, watch, Path(scratch) / "comparison")
        finally:
            os.environ.pop("LAB_HOME")
            if before is not None:
                os.environ["LAB_HOME"] = before
    made = {"device": devices.describe(watch.device), "settings": _settings(args), "phases": watch.phases} | found
    if args.write:
        _tables.write(TABLE, "real", table(made), _sdxl_random.HEAD)
    return made


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("resolution", "steps", "sampling_steps", "weights", "text_encoder", "r_outer")
    return {name: getattr(args, name) for name in names}


def _path(args: argparse.Namespace, watch: Watch, out: Path) -> dict[str, Any]:
    from PIL import Image, ImageDraw

    from lab import comparison
    from lab.bases import BASES
    from lab.export import export
    from lab.tasks import Cancelled

    pictures = []
    for i in range(3):
        picture = Image.new("RGB", (args.resolution, args.resolution), (60 * i, 90, 160))
        ImageDraw.Draw(picture).ellipse((20, 20 + 9 * i, 120, 120), fill=(240, 140, 30))
        pictures.append(picture)
    spec = {
        "base": ID,
        "class_word": "fox",
        "methods": {id: {"r_outer": args.r_outer} if id == "nora" else {} for id in args.methods.split(",")},
        "seeds": [0],
        "batch": 1,
        "prompts": ["a {subject} in the snow"],
        "unrelated_prompts": [],
        "sample_seeds": [0],
        "checkpoint_every": 1,
        "preview_every": 0,
        "gradient_checkpointing": True,
        "weights": args.weights,
        "steps": args.steps,
        "sampling_steps": args.sampling_steps,
        "resolution": args.resolution,
        "text_encoder": args.text_encoder,
    }
    spec = comparison.start(out, "subject", spec, pictures)
    killed: set[str] = set()
    before_kill: set[tuple[str, str]] = set()

    def report_for(planned: Any) -> Any:
        def report(step: int, steps: int, **values: Any) -> None:
            phase = "first step" if values["phase"].startswith(("fits: ", "tight: ")) else values["phase"]
            if planned.method in killed and (planned.method, phase) in before_kill:
                phase += ", resumed"
            watch.now(planned.method, phase)
            if values["phase"] == "training" and step == 1 and planned.method not in killed:
                killed.add(planned.method)
                before_kill.update({(planned.method, "training"), *((p["run"], p["phase"]) for p in watch.phases)})
                raise Cancelled

        return report

    while True:
        try:
            runs = comparison.run_all(out, "subject", spec, report_for)
            break
        except Cancelled:
            watch.now("", "stopped after its first checkpoint")
    BASES[ID].forget()
    exports = []
    for run in runs:
        print(f"{run['method']}: {run['state']} {run['message']}", file=sys.stderr, flush=True)
        adapter = Path(run["folder"]) / "adapter"
        for layout in ("diffusers", "kohya") if adapter.is_dir() else ():
            watch.now(run["method"], f"exporting as {layout}")
            made = export(adapter, layout, out / "export" / run["method"] / layout, base=ID)
            size = sum(Path(file).stat().st_size for file in made["files"])
            exports.append({"method": run["method"], "layout": layout, "error": made["relative_error"], "bytes": size})
    watch.end()
    keys = ("trainable_parameters", "adapter_bytes", "train_seconds", "peak_memory_bytes", "final_loss")
    told = [{"method": r["method"], "state": r["state"]} | {k: r["result"].get(k) for k in keys} for r in runs]
    return {"runs": told, "exports": exports}


class Watch:
    """Seconds and peak memory of every phase, told on standard error as they end."""

    def __init__(self, device: Any) -> None:
        from lab.device import PeakMemory

        self.device, self.memory = device, PeakMemory(device)
        self.phases: list[dict[str, Any]] = []
        self._key: tuple[str, str] | None = None
        self._began = 0.0

    def now(self, run: str, phase: str) -> None:
        if (run, phase) != self._key:
            self.end()
            self._key, self._began = (run, phase), time.perf_counter()
            self.memory.start()

    def end(self) -> None:
        if self._key is None:
            return
        seconds, peak = time.perf_counter() - self._began, self.memory.read()
        self.phases.append({"run": self._key[0], "phase": self._key[1], "seconds": seconds, "peak_bytes": peak})
        print(
            f"{self._key[0]:>6} {self._key[1]:<40} {seconds:8.1f} s {peak / 2**30:6.2f} GiB",
            file=sys.stderr,
            flush=True,
        )
        self._key = None


# -- output --------------------------------------------------------------------------------------------
def table(made: dict[str, Any]) -> str:
    s = made["settings"]
    lines = [
        "## The whole path, random weights of real size",
        "",
        f"{s['resolution']} px, batch 1, {s['steps']} steps, {s['sampling_steps']} sampling steps, weights in {s['weights']}, "
        f"gradient checkpointing, NoRA's r_outer {s['r_outer']:g}{', text encoders adapted too' if s['text_encoder'] else ''}; "
        f"{made['device']}. "
        "Each run is stopped after its first checkpoint and resumed. Peak: of the phase; of the whole process on a CPU.",
        "",
        "| run | phase | seconds | peak, GiB |",
        "|-|-|-:|-:|",
    ]
    lines += [
        f"| {p['run']} | {p['phase']} | {p['seconds']:.1f} | {p['peak_bytes'] / 2**30:.2f} |"
        for p in made["phases"]
        if p["seconds"] >= 0.05
    ]
    lines += [
        "",
        "| adapter | trained parameters | adapter's file, MB | layout | exported, MB | error |",
        "|-|-:|-:|-|-:|-:|",
    ]
    by_method = {run["method"]: run for run in made["runs"]}
    for x in made["exports"]:
        run = by_method[x["method"]]
        lines.append(
            f"| {x['method']} | {run['trainable_parameters']:,} | {run['adapter_bytes'] / 1e6:.1f} | {x['layout']} "
            f"| {x['bytes'] / 1e6:.1f} | {x['error']:.1e} |"
        )
    return "\n".join(lines)


def show(made: dict[str, Any]) -> None:
    print(table(made))
