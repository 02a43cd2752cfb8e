"""What the tasks on trained adapters share: checks of names, bases, prompts and seeds. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.tasks import PlannedRun
from lab.uploads import check_text

FOLDER = "adapter-{}"  # of an input, with its weights and, for PEFT's layout, its configuration
MAX_PROMPTS, MAX_SEEDS = 6, 4
PROMPTS = ["a fox in the snow", "a red car on the beach"]

DEFAULTS: dict[str, Any] = {
    "base": "",  # "": the one that the adapter names or tells
    "prompts": PROMPTS,
    "sample_seeds": [0, 1],
    "seed": 0,
    "title": None,
    "source": "",  # reference of the adapter on the page
    "pictures": None,  # uploads of pictures: none
    "class_word": None,
}


def check_shared(spec: dict[str, Any], title: str) -> None:
    """Check and fill in what DEFAULTS holds. Raises LabError."""
    from lab.bases import resolve

    if spec["base"]:
        spec["base"] = resolve(check_text("base", spec["base"], 500)).id
    if not isinstance(spec["prompts"], list | tuple) or len(spec["prompts"]) > MAX_PROMPTS:
        raise LabError(f"At most {MAX_PROMPTS} prompts are drawn.")
    spec["prompts"] = [check_text("prompt", p, 300) for p in spec["prompts"]]
    seeds = spec["sample_seeds"]
    if not isinstance(seeds, list | tuple) or not 1 <= len(set(map(str, seeds))) == len(seeds) <= MAX_SEEDS:
        raise LabError(f"Give 1 to {MAX_SEEDS} different seeds of the pictures.")
    for seed in (*seeds, spec["seed"]):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise LabError(f"A seed is a whole number from 0 to {2**31 - 1}, got {str(seed)[:30]}.")
    spec["source"] = check_text("source", spec["source"], 100, empty=True)
    spec["title"] = check_text("title", spec["title"] or title, 120)
    spec["class_word"] = spec["title"]  # what lists of runs call it


def drawn(spec: dict[str, Any], *columns: str) -> list[PlannedRun]:
    """Runs that only draw: the base, and the adapters as they came; none without prompts."""
    return [PlannedRun(name, 0) for name in ("base", *columns)] if spec["prompts"] else []


def sources(inputs: Path) -> list[Path]:
    """What the inputs hold: a PEFT folder each, or the one file in it."""
    found = []
    while (folder := inputs / FOLDER.format(len(found))).is_dir():
        configured = (folder / "adapter_config.json").is_file()
        found.append(folder if configured else folder / "adapter_model.safetensors")
    return found


def as_inputs(paths: list[Path]) -> dict[str, Path]:
    """Files for `Store.submit` by the names that `sources` reads: of a folder in PEFT's layout its two files."""
    files = {}
    for number, path in enumerate(paths):
        folder = FOLDER.format(number)
        parts = [path] if path.is_file() else [path / "adapter_config.json", path / "adapter_model.safetensors"]
        files |= {f"{folder}/{'adapter_model.safetensors' if path.is_file() else p.name}": p for p in parts}
    return files
