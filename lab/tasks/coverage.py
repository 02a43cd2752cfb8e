"""Coverage task: the points of a large layer, one run a method. What is measured is kept by its question
(`lab.coverage.kept`), where the page finds it; the run tells how far it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.registry import check_names
from lab.tasks import PlannedRun, Report, register

DEFAULTS: dict[str, Any] = {"view": {}, "title": None, "class_word": None, "pictures": None}


class Coverage:
    id = "coverage"
    name = "Coverage"
    tab = "coverage"
    compared = False

    def title(self, spec: dict[str, Any]) -> str:
        return spec["title"]

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError, one sentence, on the first bad value."""
        from lab.coverage import report

        check_names("setting", spec, DEFAULTS)
        if not isinstance(spec.get("view"), dict):
            raise LabError("A coverage job names its view: d, methods, counts.")
        asked = report.view(spec["view"])
        if not asked.methods:
            raise LabError("Choose at least one method to measure.")
        title = f"Coverage, d = {asked.d}: {report.WHAT[asked.what]}"
        return {"view": asked.link(), "title": title, "class_word": title, "pictures": None}

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        from lab.coverage import report

        asked = report.view(spec["view"])
        return [PlannedRun(id, asked.seed) for id in asked.methods]

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        from lab.coverage import report as plots

        asked, began = plots.view(spec["view"]), time.perf_counter()
        counts = asked.wanted()
        for number, n in enumerate(counts):
            report(number, len(counts), phase="measuring")
            plots.measured(asked, planned.method, n)
        report(len(counts), len(counts), phase="measuring")
        seconds = round(time.perf_counter() - began, 3)
        return {"method": planned.method, "seed": planned.seed, "points": len(counts), "seconds": seconds}


register(Coverage())
