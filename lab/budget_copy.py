"""A budget to take along: as CSV, as Markdown, as PEFT configurations in Python, as a `python -m lab` command."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from lab import budget, budget_report
from lab.bases import BASES
from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.spec import Layer

CHILD_SECONDS = 30


def copy(state: Any, what: str) -> str:
    """The state's budget as text. Raises LabError on an unknown form and where `report` does."""
    forms: dict[str, Callable[[dict[str, Any]], str]] = {
        "csv": as_csv,
        "markdown": as_markdown,
        "peft": as_peft,
        "command": as_command,
    }
    if what not in forms:
        raise LabError(f"A budget is copied as one of {', '.join(forms)}.")
    return forms[what](budget_report.report(state))


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows, numbers in full; methods that do not fit have their sentence in the last column."""
    head = ["method", "settings", "parameters", "share_of_model"]
    head += [f"bytes_{name.replace(' ', '')}" for name in budget.PRECISIONS]
    head += ["gradient_bytes", "optimizer_bytes", "adapter_activation_bytes", "training_bytes"]
    head += ["times_smaller_than_lora_r1", "times_smaller_than_lora_here", "note"]
    body = []
    for row in report["rows"]:
        settings = " ".join(f"{k}={_plain(v)}" for k, v in row["knobs"].items() if v is not None)
        cells = [row["id"], settings]
        if row["count"] is None:
            body.append([*cells, *[""] * (len(head) - 3), row["error"]])
            continue
        numbers = [row["count"], f"{row['share']:.6g}", *row["bytes"].values()]
        numbers += [row["memory"][k] for k in ("gradients", "optimizer", "adapter", "training")]
        numbers += [None if row[k] is None else f"{row[k]:.4g}" for k in ("below_floor", "below_lora")]
        body.append([*cells, *("" if n is None else str(n) for n in numbers), row["note"]])
    return head, body


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_csv(report: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head, body = table(report)
    writer.writerow(head)
    writer.writerows(body)
    return out.getvalue()


def as_markdown(report: dict[str, Any]) -> str:
    arch = report["arch"]
    lines = [
        f"{arch['name']}, {', '.join(report['state']['targets'])}: {arch['layers']:,} layers",
        "",
        "| method | settings | parameters | of the model | fp32 | bf16 | LoRA r = 1 is | training |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        size = ", ".join(
            f"{c['name']} = {_plain(row['knobs'][c['name']])}" for c in row["controls"] if c["name"] in row["knobs"]
        )
        if row["count"] is None:
            lines.append(f"| {row['name']} | {row['error']} | | | | | | |")
            continue
        cells = [f"{row['count']:,}", f"{row['share']:.3%}", _bytes(row["bytes"]["fp32"]), _bytes(row["bytes"]["bf16"])]
        cells += [f"{row['below_floor']:.3g}×", _bytes(row["memory"]["training"])]
        lines.append(f"| {row['name']} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _bytes(n: int | None) -> str:
    if n is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} B"


def as_command(report: dict[str, Any]) -> str:
    """The `python -m lab subject` command that trains these methods; on an architecture that is no base of the lab's
    image task, the `budget` commands that give the same counts."""
    state, rows = report["state"], [row for row in report["rows"] if row["count"] is not None]
    base = next((b for b in BASES if b.family == "sdxl" and b.architecture == state["arch"]), None)
    if base is None:
        return _budget_commands(report, rows)
    lines = []
    if state["blocks"]:
        low, high = state["blocks"]
        lines.append(f"# `subject` adapts every block: the page counted blocks {low} to {high} alone\n")
    parts = ["python -m lab subject PICTURES --class-word WORD", f"--base {base.id} --targets {_targets(state)}"]
    if state["te"]:
        parts.append("--text-encoder")
    parts += [f"--method {row['id']}" for row in rows]
    settings = [f"{row['id']}.{k}={_plain(v)}" for row in rows for k, v in _changed(row).items()]
    parts += [f"--set {shlex.quote(setting)}" for setting in settings]
    return "".join(lines) + " \\\n    ".join([*parts, "--out out/compared"]) + "\n"


def _budget_commands(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    state, arch = report["state"], report["state"]["arch"]
    lines = []
    if arch.startswith("own-"):
        arch = report["arch"]["name"]
        if arch == "pasted table":
            lines, arch = ["# shapes.txt: the lines that were pasted"], "shapes.txt"
        elif arch.endswith(".json"):
            lines = [f"# {arch}: the file that was uploaded"]
    places = [f"--targets {_targets(state)}"]
    if state["blocks"]:
        places.append(f"--blocks {state['blocks'][0]}-{state['blocks'][1]}")
    if state["part"]:
        places.append(f"--part {shlex.quote(state['part'])}")
    if state["te"] and report["arch"]["companions"]:
        places.append("--text-encoders")
    for row in rows:
        sets = [f"--set {shlex.quote(f'{k}={_plain(v)}')}" for k, v in _changed(row).items()]
        lines.append(" ".join(["python -m lab budget", shlex.quote(arch), row["id"], *places, *sets]))
    return "\n".join(lines) + "\n"


def _targets(state: dict[str, Any]) -> str:
    return ",".join(state["targets"])


def _changed(row: dict[str, Any]) -> dict[str, Any]:
    default = budget.as_dict(METHODS[row["id"]].knobs())
    size = {c["name"] for c in row["controls"]}
    return {k: v for k, v in row["knobs"].items() if v is not None and (k in size or v != default.get(k))}


# -- PEFT configurations -------------------------------------------------------------------------------
def target_modules(chosen: list[Layer], every: list[Layer]) -> list[str] | str:
    """What PEFT takes as target_modules for these layers: the ends of their names where those single them out,
    else a regular expression over the blocks."""
    names = {re.sub(r"\[[qkv]\]$", "", layer.name) for layer in chosen}
    ends = sorted({_end(name) for name in names})
    matched = {x.name for x in every if any(x.name == end or x.name.endswith(f".{end}") for end in ends)}
    if matched == names:
        return ends
    heads = sorted({_head(name) for name in names if _head(name)})
    pattern = f"(?:{'|'.join(map(re.escape, heads))})\\..*?(?:{'|'.join(map(re.escape, ends))})"
    if heads and {x.name for x in every if re.fullmatch(pattern, x.name)} == names:
        return pattern
    return sorted(names)


def _end(name: str) -> str:
    """The last part of a name, with the one before it where the last is a number or too common to stand alone."""
    parts = name.split(".")
    keep = 2 if parts[-1].isdigit() or parts[-1] in ("dense", "proj", "c_proj", "0", "2", "conv") else 1
    if parts[-1] in ("proj", "2") and "net" in parts:
        keep = len(parts) - parts.index("ff" if "ff" in parts else "net")
    return ".".join(parts[-keep:])


def _head(name: str) -> str:
    found = re.match(r".*?(?:\d+|mid_block)(?=\.)", name)
    return found.group(0) if found else ""


def as_peft(report: dict[str, Any]) -> str:
    """A configuration a method, as Python; methods of the lab's own import from lab.methods.

    Made by a child process in which `peft` is a recorder (lab/peft_code.py): neither PEFT nor torch is imported.
    """
    state = budget_report.checked(report["state"])
    picked = budget_report.pick(state)
    arch, rows = picked.groups[0]
    targets = target_modules([row.layer for row in rows], [row.layer for row in arch.rows])
    said = [
        f"{arch.name}, {_targets(state)}: model = peft.get_peft_model(model, {report['rows'][0]['id'].replace('-', '_')})"
    ]
    if arch.fused(state["targets"]) == "split":
        said.append(
            "Query, key and value are one layer of this model, which PEFT adapts whole: more parameters than counted."
        )
    for encoder, chosen in picked.groups[1:]:
        ends = target_modules([row.layer for row in chosen], [row.layer for row in encoder.rows])
        said.append(f"{encoder.name}: the same with target_modules={ends!r}")
    wanted = [[row["id"], _plain_settings(row["knobs"])] for row in report["rows"] if row["count"] is not None]
    return _rendered(json.dumps([wanted, targets, said]))


def _plain_settings(knobs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in knobs.items() if v is not None}


@functools.lru_cache(maxsize=64)
def _rendered(request: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lab.peft_code"],
        input=request,
        capture_output=True,
        text=True,
        timeout=CHILD_SECONDS,
        check=False,
    )
    if done.returncode or not done.stdout:
        raise LabError("The configurations could not be written; the page's log says why.")
    return done.stdout
