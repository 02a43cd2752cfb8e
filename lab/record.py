"""What a run was made with: settings, versions, git state, device. Saved beside every result."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lab
from lab.tasks import PlannedRun

PACKAGES = ("torch", "diffusers", "transformers", "peft", "open_clip_torch", "safetensors", "numpy", "pillow")


def record(spec: dict[str, Any], planned: PlannedRun, device: str) -> dict[str, Any]:
    """The content of a run's `meta.json`."""
    return {"spec": spec, "run": asdict(planned), "device": device, "versions": versions(), "git": git_state()}


def versions() -> dict[str, str]:
    """Versions of the lab, Python and the packages that decide a result."""
    found = {"lab": lab.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether files were changed since; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "changed": bool(changed.strip())}
