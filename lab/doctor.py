"""What works on this machine, and what to change: for `python -m lab doctor` and the page's System tab. No torch.

For strangers (`public`) nothing is told that names this machine: no path, no host, no model of the owner's cache that the
page does not offer.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab import hub, machine
from lab.bases import ASSETS, BASES, Base, hub_allowed, offered
from lab.record import versions

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {
    "bitsandbytes": "8-bit AdamW: a quarter of the optimizer's memory, on a GPU",
    "triton": "compiling the UNet, on a GPU",
    "hf-xet": "faster downloads from the Hub",
    "ray": "a queue over several machines",
}
GIB = 2**30
LEAST_STEP = (
    3 * GIB
)  # beside the weights: one block's activations of SDXL at 1024 px, adapter, VAE; measured at a run's start
SINGLE_STEP = 6 * GIB


@dataclass(frozen=True)
class Finding:
    """state: ok, note (worth knowing) or problem; text: what is so; do: what to change, if anything."""

    state: str
    text: str
    do: str = ""


def examine(public: bool = False) -> dict[str, Any]:
    """Everything, JSON-able: lab, system, processor, memory, gpus, torch, disk, versions, extras, bases, cached, findings.

    Sizes are in bytes.
    """
    from huggingface_hub import constants

    from lab.runs import default_home

    places = {"runs": default_home(), "models": Path(constants.HF_HUB_CACHE)}
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release() if not public else ''} {platform.machine()}".replace(
            "  ", " "
        ),
        "processor": machine.processor(),
        "memory": machine.memory(),
        "gpus": [asdict(gpu) for gpu in machine.gpus()],
        "torch": machine.torch_build(),
        "disk": {name: machine.disk(path) | ({} if public else {"path": str(path)}) for name, path in places.items()},
        "versions": versions(),
        "extras": {name: {"version": _version(name), "for": use} for name, use in EXTRAS.items()},
    }
    cached = hub.cached()
    found["bases"] = [_base(row, cached) for row in offered()]
    if not public or hub_allowed():
        known = {row.source for row in BASES}
        found["cached"] = [asdict(c) | {"usable": _usable(c)} for c in cached if not public or c.repo not in known]
    findings = [*_software(found), *_device(found), *_models(found), *_room(found), *_settings(public)]
    order = {"problem": 0, "note": 1, "ok": 2}
    found["findings"] = [asdict(f) for f in sorted(findings, key=lambda f: order[f.state])]
    return found


# -- facts ---------------------------------------------------------------------------------------------
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _base(row: Base, cached: list[hub.Cached]) -> dict[str, Any]:
    """One base that the page offers: whether it is here, and its size here or to download."""
    size = next((c.bytes for c in cached if c.repo == row.source), None)
    path = Path(row.source)
    if path.exists():
        files = [path] if path.is_file() else path.rglob("*.safetensors")
        size = sum(file.stat().st_size for file in files)
    told = None if row.here or row.megabytes is None else row.megabytes * 10**6
    return {"id": row.id, "name": row.name, "here": row.here, "bytes": size if row.here else told}


def _usable(found: hub.Cached) -> bool:
    return found.pipeline.startswith("StableDiffusionXL") or found.repo in {row.vae for row in BASES}


# -- findings ------------------------------------------------------------------------------------------
def _software(found: dict[str, Any]) -> list[Finding]:
    from packaging.requirements import InvalidRequirement, Requirement

    wrong = []
    python = ".".join(platform.python_version_tuple()[:2])
    if tuple(map(int, python.split("."))) < (3, 11):
        wrong.append(Finding("problem", f"Python {python} is too old.", "Use Python 3.11 or newer."))
    try:
        lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            need = Requirement(line.partition("#")[0].strip())
        except InvalidRequirement:
            continue
        have = _version(need.name)
        if have is None:
            wrong.append(Finding("problem", f"{need.name} is not installed.", "pip install -r requirements.txt"))
        elif not need.specifier.contains(have, prereleases=True):
            text = f"{need.name} {have} is installed; the lab is tested with {need.specifier}."
            wrong.append(Finding("note", text, "pip install -r requirements.txt"))
    weights = ASSETS / "tiny-sdxl" / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file() or weights.stat().st_size < 100_000:
        text = "The embedded base's weights are missing, or are only pointers to them."
        wrong.append(Finding("problem", text, "git lfs pull, or fetch the repository again."))
    return wrong or [Finding("ok", "Python and all packages are as required.")]


def _device(found: dict[str, Any]) -> list[Finding]:
    gpus, cpu, build = found["gpus"], found["processor"], found["torch"]
    if not gpus:
        if machine._another() and machine.ask_torch().get("mps"):
            return [Finding("note", "Apple's GPU is used, through torch's MPS.", "Not measured; CPU: LAB_DEVICE=cpu.")]
        speed = "multiplies in bf16" if cpu["bf16"] else "multiplies in fp32 only, several times slower than bf16"
        return [
            Finding("ok", f"The embedded base trains here in minutes: {cpu['cores']} cores; the processor {speed}."),
            Finding(
                "note", "There is no GPU: SDXL at its real size is slow without one.", "Take a GPU for SDXL's bases."
            ),
        ]
    told = []
    for gpu in gpus:
        need = machine.driver_too_old(gpu["driver"], build["cuda"])
        if gpu["usable"]:
            kind = "bf16" if gpu["bf16"] else "fp16, with scaled losses"
            told.append(Finding("ok", f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB: computes in {kind}."))
        elif need:
            told.append(
                Finding(
                    "problem",
                    f"{gpu['name']} is not used: driver {gpu['driver']} is too old for CUDA {build['cuda']}.",
                    f"Update the driver to {need} or newer, or install a torch for an older CUDA.",
                )
            )
        elif not (build["cuda"] or build["hip"]):
            told.append(
                Finding(
                    "problem",
                    f"{gpu['name']} is not used: torch {build['version']} is built for processors alone.",
                    "Install the torch that https://pytorch.org/get-started/locally names for this system.",
                )
            )
        else:
            text = f"{gpu['name']} is not used: torch {build['version']} cannot compute on it."
            told.append(Finding("problem", text, "See what python -c 'import torch; torch.ones(1).cuda()' says."))
    return told


@functools.cache
def step_bytes(base: str, batch: int) -> tuple[int, int]:
    """(the UNet's weights at two bytes, the estimated peak of one LoRA step in bf16 without gradient checkpointing)."""
    from lab import architectures, memory
    from lab.methods import METHODS

    row, method = BASES[base], METHODS["lora"]
    arch = architectures.load(row.architecture)
    share = row.resolution / arch.unit["side"]
    estimate = memory.estimate(
        arch, arch.select(row.targets), method, method.knobs(), batch=batch, size=share, precision="bf16"
    )
    return estimate.weights, estimate.total


def _models(found: dict[str, Any]) -> list[Finding]:
    """What SDXL and its family need against what the largest usable GPU, or else main memory, has."""
    usable = [gpu["memory_bytes"] for gpu in found["gpus"] if gpu["usable"]]
    told = []
    for row in (r for r in BASES if r.family == "sdxl" and r.megabytes):
        weights, four = step_bytes(row.id, int(row.preset("subject")["batch"]))
        _, one = step_bytes(row.id, 1)
        if usable:
            told.append(_fits(row.name, 0.9 * max(usable), weights, one, four))
    if not usable:
        whole = (
            2 * BASES["sdxl"].megabytes * 10**6 if BASES["sdxl"].megabytes else 0
        )  # fp32 is twice what is downloaded
        enough = found["memory"]["total_bytes"] > whole + SINGLE_STEP
        text = f"SDXL 1.0 in fp32 takes {whole / GIB:.0f} GiB of main memory, {found['memory']['total_bytes'] / GIB:.0f} are here"
        told.append(
            Finding("note", f"{text}: it {'would run, slowly' if enough else 'does not fit'}.", "" if enough else "Hold it in bf16 (--weights bf16), or take the embedded base.")
        )  # fmt: skip
    return told


def _fits(name: str, room: float, weights: int, one: int, preset: int) -> Finding:
    said = f"{name}: {weights / GIB:.1f} GiB of weights"
    if room >= preset:
        return Finding(
            "ok", f"{said}; trains with its preset (estimated {preset / GIB:.0f} GiB a step, without checkpointing)."
        )
    if room >= weights + SINGLE_STEP:
        more = (
            "" if room >= one else "Keep gradient checkpointing on; lower the batch if the measured first step says so."
        )
        return Finding(
            "ok", f"{said}; trains with gradient checkpointing ({preset / GIB:.0f} GiB a step without).", more
        )
    if room >= weights + LEAST_STEP:
        return Finding(
            "note", f"{said}; tight.", "Batch 1, gradient checkpointing, offload; 768 px if the first step says so."
        )
    return Finding("problem", f"{said}; does not fit this GPU.", "Take SSD-1B or the embedded base, or a larger GPU.")


def _room(found: dict[str, Any]) -> list[Finding]:
    told = []
    free, need = found["disk"]["models"]["free_bytes"], BASES["sdxl"].megabytes or 0
    sdxl = next(base for base in found["bases"] if base["id"] == "sdxl")
    if not sdxl["here"]:
        enough = free > (need + 300) * 10**6
        text = f"SDXL 1.0 is not here: {need / 1000:.1f} GB to download, {free / 1e9:.0f} GB are free"
        told.append(
            Finding("note", f"{text}.", "The first run fetches it; or do it beforehand with hf download.")
            if enough
            else Finding("problem", f"{text}.", "Make room, or set HF_HOME to a folder on another disk.")
        )
    left = found["disk"]["runs"]["free_bytes"]
    if left < 2 * GIB:
        told.append(
            Finding("problem", f"{left / GIB:.1f} GiB are left for runs.", "Delete old comparisons, or set LAB_HOME.")
        )
    return told


def _settings(public: bool) -> list[Finding]:
    """Environment variables that name what is not there."""
    told = []
    for folder in filter(None, os.environ.get("LAB_CHECKPOINTS", "").split(os.pathsep)):
        if not Path(folder).expanduser().is_dir():
            text = "A folder of LAB_CHECKPOINTS does not exist" + (f": {folder}." if not public else ".")
            told.append(Finding("problem", text, "Correct the variable, or make the folder."))
    if os.environ.get("HF_HUB_OFFLINE", "").strip() in ("1", "true", "TRUE", "yes"):
        told.append(Finding("note", "HF_HUB_OFFLINE is set: no model is downloaded.", "Unset it to fetch models."))
    if device := os.environ.get("LAB_DEVICE", "").strip():
        told.append(Finding("note", f"LAB_DEVICE is {device[:20]}: runs use that device alone."))
    return told
