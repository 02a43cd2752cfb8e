"""Merge task: several adapters as one, with pictures of each beside the merged one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab import merge as merging
from lab.errors import LabError
from lab.registry import check_names
from lab.tasks import PlannedRun, Report, _adapters, register

DEFAULTS: dict[str, Any] = {
    **_adapters.DEFAULTS,
    "names": [],
    "weights": None,
    "how": "concat",
    "rank": None,
    "density": 0.5,
}


class Merge:
    id = "merge"
    name = "Merge"
    tab = "xray"
    imports = ("lab.tasks._adapter_run", "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "peft")

    compared = False  # what is seen and taken along is each run's; there is no grid, table or report of all

    def title(self, spec: dict[str, Any]) -> str:
        return f"{spec['title']} ({spec['how']})"

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError, one sentence, on the first bad value."""
        from lab.uploads import check_text

        check_names("setting", spec, DEFAULTS)
        full = DEFAULTS | {k: v for k, v in spec.items() if v is not None}
        if not isinstance(full["names"], list | tuple):
            raise LabError("The adapters must be a list of names.")
        full["names"] = [check_text("name", name, 120) for name in full["names"]]
        rank, density = full["rank"], full["density"]
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise LabError(f"The rank must be a whole number, got {str(rank)[:30]}.")
        if isinstance(density, bool) or not isinstance(density, int | float):
            raise LabError(f"The density must be a number, got {str(density)[:30]}.")
        given = full["weights"]
        if given is not None and (
            not isinstance(given, list | tuple) or not all(isinstance(w, int | float) for w in given)
        ):
            raise LabError("The weights must be numbers, one for each adapter.")
        full["weights"] = merging.check(len(full["names"]), given, str(full["how"]), rank, float(density))
        _adapters.check_shared(full, f"Merge {' + '.join(full['names'])}"[:120])
        return full

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        each = (f"adapter-{i + 1}" for i in range(len(spec["names"])))
        return [*_adapters.drawn(spec, *each), PlannedRun("merged", spec["seed"])]

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        from lab.tasks._adapter_run import merged

        return merged(spec, planned, inputs, folder, report)


register(Merge())
