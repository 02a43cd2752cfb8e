"""Compress task: an adapter fitted by other methods within one budget, without data; pictures before and after.

A run is one method; the base's and the original's runs draw alone. The adapter's files are the comparison's inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab import budget as budgets
from lab.errors import LabError
from lab.registry import check_names
from lab.tasks import PlannedRun, Report, _adapters, register

DEFAULTS: dict[str, Any] = {**_adapters.DEFAULTS, "name": "", "methods": {"nora": {}, "lora": {}}, "budget": 20_000}


class Compress:
    id = "compress"
    name = "Compress"
    tab = "xray"
    imports = ("lab.tasks._adapter_run", "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "peft")

    compared = False  # what is seen and taken along is each run's; there is no grid, table or report of all

    def title(self, spec: dict[str, Any]) -> str:
        return spec["title"]

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError, one sentence, on the first bad value."""
        from lab.compress import FITS
        from lab.uploads import check_text

        check_names("setting", spec, DEFAULTS)
        full = DEFAULTS | {k: v for k, v in spec.items() if v is not None}
        full["name"] = check_text("name", full["name"] or "adapter", 120)
        if full["budget"] is not None:
            full["budget"] = budgets.check_budget(full["budget"])
        methods = full["methods"]
        methods = {id: {} for id in methods} if isinstance(methods, list | tuple) else methods
        if not isinstance(methods, dict) or not methods:
            raise LabError("Choose at least one method to compress with.")
        full["methods"] = {FITS[str(id)].id: _held(FITS[str(id)], knobs or {}) for id, knobs in methods.items()}
        _adapters.check_shared(full, f"Compress {full['name']}")
        return full

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        fits = [PlannedRun(id, spec["seed"], knobs) for id, knobs in spec["methods"].items()]
        return [*_adapters.drawn(spec, "original"), *fits]

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        from lab.tasks._adapter_run import compressed

        return compressed(spec, planned, inputs, folder, report)


def _held(fit: Any, given: Any) -> dict[str, Any]:
    """Settings to hold, parsed; the others come from the budget."""
    if not isinstance(given, dict):
        raise LabError(f"The settings of {fit.method.name} must be names and values, got {str(given)[:60]!r}.")
    parsed = fit.knobs(given)
    return {name: getattr(parsed, name) for name in given}


register(Compress())
