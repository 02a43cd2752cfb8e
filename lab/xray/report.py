"""An adapter's layers in numbers, as plain data that the page, the command line and the plots take."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.xray.places import order, place

if TYPE_CHECKING:
    from lab.adapter_files import AdapterFile

Tell = Callable[[int, int, str], None]  # done, of how many, what
SECONDS = 90.0  # the base's singular directions are found for as many layers, largest updates first, as this may take
FLOPS = 4e9  # per second, of a symmetric eigenproblem on one thread of a slow processor


def _silent(done: int, total: int, what: str) -> None:
    return None


def analyse(
    file: AdapterFile, *, against_base: bool = False, seconds: float = SECONDS, tell: Tell = _silent
) -> dict[str, Any]:
    """Every layer's numbers (`lab.xray.measure.numbers`), its spectrum, and its share of the energy Σ‖ΔW‖².

    against_base: also where ΔW lies among W's singular directions and which are intruders, for the layers with the
        largest updates that about `seconds` suffice for; those found before are read from the disk (`lab.svd`)

    Raises LabError: a tensor that is not finite, no base for a method that needs it.
    """
    import torch

    from lab.xray import measure

    names, rows = sorted(file.updates, key=order), []
    with torch.no_grad():
        for done, name in enumerate(names):
            tell(done, len(names), "spectra")
            found = measure.decompose(file.updates[name])
            block, projection = place(name)
            shape = list(file.updates[name].shape)
            row = {"layer": name, "block": block, "projection": projection, "shape": shape}
            rows.append(row | measure.numbers(found.S) | {"spectrum": measure.points(found.S)})
    total = sum(row["norm"] ** 2 for row in rows)
    for row in rows:
        row["energy"] = row["norm"] ** 2 / total if total else 0.0
    notes = list(file.notes)
    if not total:
        notes.append("It changes no weight: it is untrained, or trains something else.")
    result = head(file) | {"norm": math.sqrt(total), "notes": notes, "layers": rows, **_totals(rows)}
    if against_base:
        result |= _against_base(file, rows, seconds, tell)
    return result


def head(file: AdapterFile) -> dict[str, Any]:
    """What the file is, without reading a layer."""
    return {
        "name": file.name,
        "format": file.format,
        "kinds": list(file.kinds),
        "alpha": file.alpha,
        "family": file.family.name,
        "base": file.base.id if file.base else "",
        "base_name": file.base.name if file.base else "",
        "parameters": file.parameters,
        "bytes": file.bytes,
        "count": len(file.updates),
        "metadata": file.metadata,
        "notes": list(file.notes),
    }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the layers that change: their ranks' range, the medians of the other two."""
    moved = [row for row in rows if row["norm"]] or rows
    ranks = [row["rank"] for row in moved]
    medians = {key: statistics.median(row[key] for row in moved) for key in ("effective_rank", "stable_rank")}
    return {"rank": [min(ranks), max(ranks)], **medians}


def _against_base(file: AdapterFile, rows: list[dict[str, Any]], seconds: float, tell: Tell) -> dict[str, Any]:
    """`subspace` and `intruders` of the layers with the largest updates, put into their rows."""
    import torch

    from lab.base_weights import weights
    from lab.xray import measure

    if file.base is None:
        raise LabError(f"{file.name} was opened without its base, so its place in the base's weights is not known.")
    base, chosen, spent = weights(file.base), [], 0.0
    for row in sorted(rows, key=lambda row: -row["norm"]):
        small, large = sorted((row["shape"][0], math.prod(row["shape"][1:])))
        spent += (9 * small**3 + 2 * small * small * large) / FLOPS
        if row["norm"] and (spent <= seconds or not chosen):
            chosen.append(row)
    with torch.no_grad():
        for done, row in enumerate(chosen):
            tell(done, len(chosen), "the base's singular directions")
            found = measure.decompose(file.updates[row["layer"]])
            weight = base.get(row["layer"])
            row["subspace"] = measure.subspace(found, weight)
            row["intruders"] = measure.intruders(found, weight)
    total = sum(row["intruders"]["intruders"] for row in chosen)
    return {"compared": len(chosen), "intruders": total, "intruder_cosine": measure.INTRUDER_COSINE,
            "intruder_vectors": measure.INTRUDER_VECTORS}  # fmt: skip


def compare(files: Sequence[AdapterFile], *, tell: Tell = _silent) -> dict[str, Any]:
    """Overlap of every two of the adapters in the layers that both change (`lab.xray.measure.overlap`).

    `pairs`: {"a", "b" (numbers in `names`), "outputs", "inputs", "cosine" and the chances (means over layers, weighted by
    √(energy_a·energy_b)), "layers": [...]}. Raises LabError when there are fewer than two or they share no layer.
    """
    import torch

    from lab.xray import measure

    if len(files) < 2:
        raise LabError("An overlap needs at least two adapters.")
    names = sorted(set().union(*(f.updates for f in files)), key=order)
    pairs: dict[tuple[int, int], list[dict[str, Any]]] = {p: [] for p in itertools.combinations(range(len(files)), 2)}
    with torch.no_grad():
        for done, name in enumerate(names):
            tell(done, len(names), "overlap")
            found = {i: measure.decompose(f.updates[name]) for i, f in enumerate(files) if name in f.updates}
            found = {i: x for i, x in found.items() if x.S.numel()}
            for i, j in itertools.combinations(sorted(found), 2):
                a, b = found[i], found[j]
                if (a.m, a.n) != (b.m, b.n):
                    raise LabError(
                        f"{files[i].name} and {files[j].name} are for different bases: layer {name[:90]} is {a.m} × {a.n} "
                        f"in one and {b.m} × {b.n} in the other."
                    )
                block, projection = place(name)
                row = {"layer": name, "block": block, "projection": projection, **measure.overlap(a, b)}
                pairs[i, j].append(row | {"weight": float(a.S.norm() * b.S.norm())})
    empty = next((p for p, rows in pairs.items() if not rows), None)
    if empty is not None:
        raise LabError(f"{files[empty[0]].name} and {files[empty[1]].name} change no layer in common.")
    return {"names": [f.name for f in files], "pairs": [_pair(i, j, rows) for (i, j), rows in pairs.items()]}


def _pair(i: int, j: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(row["weight"] for row in rows)
    keys = ("outputs", "inputs", "cosine", "outputs_chance", "inputs_chance")
    means = {key: sum(row[key] * row["weight"] for row in rows) / total for key in keys}
    return {"a": i, "b": j, **means, "layers": rows}


COLUMNS = ("layer", "block", "projection", "out", "in", "norm", "energy", "spectral", "rank", "effective_rank",
           "stable_rank", "directions_90")  # fmt: skip
BASE_COLUMNS = ("relative_norm", "top_k", "outputs_share", "inputs_share", "both_share", "intruders")


def as_csv(result: dict[str, Any]) -> str:
    """The layers as a table, one line each."""
    against = any("subspace" in row for row in result["layers"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, *(BASE_COLUMNS if against else ())])
    for row in result["layers"]:
        sizes = {"out": row["shape"][0], "in": "x".join(map(str, row["shape"][1:]))}
        values = [(row | sizes)[column] for column in COLUMNS]
        if against:
            found = row.get("subspace")
            values += [found["relative_norm"], found["k"], found["outputs"], found["inputs"], found["both"],
                       row["intruders"]["intruders"]] if found else [""] * len(BASE_COLUMNS)  # fmt: skip
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
    return out.getvalue()
