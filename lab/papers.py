"""The tables of the NoRA and the NOLA paper (assets/papers, one CSV each), and their parameter counts done again.

A row's `configuration` says what reproduces its printed count, as a sum of terms between semicolons:

    nola on gpt2-medium q,v: k=1000 l=1000     a method of the lab on an architecture's layers
    total of gpt2-large                        all parameters of an architecture
    weights of resnet20 conv,head              the weights of its layers
    24*(2*1024*6+6+1024)                       arithmetic

`unit` is "1024²" where the paper's M is 1,048,576 (and its K a thousandth of that), else empty: M is a million.
"""

from __future__ import annotations

import ast
import csv
import functools
import operator
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import architectures, budget
from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.spec import Layer

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "papers"
TITLES = {
    "nora-table-1": "NoRA, Table 1: LLaMA on commonsense reasoning",
    "nora-table-2": "NoRA, Table 2: few-shot classification",
    "nola-table-1": "NOLA, Table 1: GPT-2 on E2E",
    "nola-table-2": "NOLA, Table 2: time and memory",
    "nola-table-3": "NOLA, Table 3: rank and size",
    "nola-table-4": "NOLA, Table 4: quantised coefficients",
    "nola-table-5": "NOLA, Table 5: LLaMA-2",
    "nola-table-6": "NOLA, Table 6: vision transformers",
    "nola-table-7": "NOLA, Table 7: more vision tasks",
    "nola-table-8": "NOLA, Table 8: ResNet20 on CIFAR-10",
    "nola-table-9": "NOLA, Table 9: ResNet18 on ImageNet-100",
    "nola-table-10": "NOLA, Table 10: attention or MLP",
    "nola-table-11": "NOLA, Table 11: DART and WebNLG",
}
MEBI = 1 << 20


@dataclass(frozen=True)
class Count:
    """A printed parameter count beside ours."""

    table: str
    row: dict[str, str]  # the whole row, as printed
    printed: str
    ours: int | None  # None: the paper gives no count, or nothing is trained
    shown: str  # ours in the paper's unit and digits
    agrees: bool
    configuration: str
    remark: str

    @property
    def label(self) -> str:
        """The row's name: what stands before its count, without what repeats."""
        parts = [self.row.get(k, "") for k in ("model", "method", "layers", "rank", "random basis")]
        return ", ".join(dict.fromkeys(p for p in parts if p and p not in ("-", "All Layers")))


def tables() -> list[str]:
    return list(TITLES)


@functools.cache
def rows(table: str) -> tuple[dict[str, str], ...]:
    """Rows of a table as printed. Raises LabError when there is no such table."""
    if table not in TITLES:
        raise LabError(f"There is no table '{table}': choose one of {', '.join(TITLES)}.")
    with (FOLDER / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@functools.cache
def counts(table: str) -> tuple[Count, ...]:
    """Every printed parameter count of a table with ours beside it."""
    return tuple(_count(table, row) for row in rows(table) if row.get("configuration"))


def _count(table: str, row: dict[str, str]) -> Count:
    printed, unit = row["parameters"], row["unit"]
    ours = evaluate(row["configuration"])
    shown = like(printed, ours, unit)
    return Count(table, row, printed, ours, shown, shown == _unpadded(printed), row["configuration"], row["remark"])


def like(printed: str, number: int, unit: str = "") -> str:
    """`number` as the paper writes: `like("0.096M", 96000)` is "0.096M".

    Zeros that end a printed decimal are padding (0.370M is the LoRA paper's 0.37M) and are not written.
    """
    found = re.fullmatch(r"([\d,]+)(?:\.(\d+))?([MK]?)", printed)
    if not found:
        raise LabError(f"The printed count '{printed}' cannot be read.")
    suffix, digits = found[3], len((found[2] or "").rstrip("0"))
    if not suffix:
        return f"{number:,}"
    million = MEBI if unit else 10**6
    return f"{number / (million if suffix == 'M' else million / 1000):.{digits}f}{suffix}"


def _unpadded(printed: str) -> str:
    return re.sub(r"\.?0+(?=[MK]$)", "", printed) if "." in printed else printed


# -- configurations ------------------------------------------------------------------------------------
_METHOD = re.compile(r"(?P<method>[\w-]+) on (?P<arch>[\w.-]+) (?P<targets>[\w,]+): *(?P<settings>.*)")


def evaluate(configuration: str) -> int:
    """The number of parameters that a configuration stands for. Raises LabError on one that cannot be read."""
    return sum(_term(term.strip()) for term in configuration.split(";"))


def _term(term: str) -> int:
    if found := _METHOD.fullmatch(term):
        method = METHODS[found["method"]]
        layers = _layers(found["arch"], found["targets"])
        settings = dict(pair.split("=", 1) for pair in found["settings"].split())
        return budget.count(method, layers, method.knobs.parse(settings))
    if found := re.fullmatch(r"total of ([\w.-]+)", term):
        return architectures.load(found[1]).parameters
    if found := re.fullmatch(r"weights of ([\w.-]+) ([\w,]+)", term):
        return sum(layer.m * layer.n for layer in _layers(found[1], found[2]))
    try:
        return _arithmetic(ast.parse(term, mode="eval").body)
    except SyntaxError:
        raise LabError(f"The configuration '{term}' cannot be read.") from None


@functools.cache
def _layers(arch: str, targets: str) -> list[Layer]:
    table = FOLDER / f"{arch}.txt"
    if not table.is_file():
        return architectures.shapes(architectures.load(arch).select(targets))
    text = re.sub(r"^head ", "out ", table.read_text(encoding="utf-8"), flags=re.MULTILINE)  # the classifier
    names = targets.replace("head", "out")
    return architectures.shapes(architectures.from_table(text, arch).select(names))


_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}


def _arithmetic(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_arithmetic(node.left), _arithmetic(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_arithmetic(node.operand)
    raise LabError("A configuration's arithmetic has whole numbers, +, -, * and ** alone.")


# -- equations 3 to 6 of the NoRA paper ------------------------------------------------------------------
@dataclass(frozen=True)
class Equations:
    """P_LoRA (eq. 3), P_NoRA (eq. 4), their ratio (eq. 5) and its approximation for r_in = r (eq. 6)."""

    lora: int
    nora: int
    ratio: float
    approximate: float


def equations(L: int, q: int, n: int, r: int, r_out: int, r_in: int) -> Equations:
    """Equations 3 to 6 of the NoRA paper: L layers of q square n×n matrices. Raises LabError on ranks that do not fit."""
    values = {"L": L, "q": q, "n": n, "r": r, "r_out": r_out, "r_in": r_in}
    for name, value in values.items():
        if not 1 <= value <= 10**7:
            raise LabError(f"{name} must be between 1 and 10,000,000, got {value:,}.")
    if r > n or r_out > n:
        raise LabError(f"Ranks are at most n = {n:,}: r is {r:,} and r_out is {r_out:,}.")
    if r_in > r_out:
        raise LabError(f"r_in is at most r_out = {r_out:,}, got {r_in:,}.")
    lora, nora = L * q * r * 2 * n, L * q * r_out * r_in * 2
    return Equations(lora, nora, lora / nora, n / r_out)
