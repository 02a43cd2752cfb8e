"""Architectures as tables of layer shapes: the shipped ones, an uploaded configuration, a pasted table.

Imports no torch: reading a table takes milliseconds. A configuration (config.json) is built into a table by a child
process on the meta device (lab/architecture_child.py), with a limit on its time and memory: no weights, no code.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.methods.spec import Layer
from lab.registry import unknown
from lab.targets import role_of, roles

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "architectures"
MAX_BYTES = 1_000_000  # of a configuration or of a pasted table
MAX_DEPTH = 32
MAX_LAYERS = 20_000
MAX_SIDE = 10_000_000  # of one layer
BUILD_SECONDS = 180


@dataclass(frozen=True)
class Row:
    """One adaptable layer of an architecture and what the memory estimate knows of it."""

    layer: Layer
    part: str = ""  # tower: vision, text, or "" where there is one
    block: int = 0  # number of its block in the tower
    tokens: int = 0  # positions of one sample that pass through it; 0: not known
    grows: bool = False  # the positions grow with the sample's size (pixels, text length)
    input: int = -1  # layers with the same number read the same tensor
    kept: bool = False  # that tensor is kept for the backward pass by the frozen model itself


@dataclass(frozen=True)
class Architecture:
    id: str
    name: str
    parameters: int  # of the whole model, tied weights once
    rows: tuple[Row, ...]
    library: str = ""
    source: str = ""
    note: str = ""
    companions: tuple[str, ...] = ()  # text encoders trained beside it
    unit: dict[str, Any] = field(default_factory=dict)  # what one sample is
    memory: dict[str, Any] = field(default_factory=dict)  # activations of the frozen model (layer_tables.profile)
    order: int = 1000

    @property
    def blocks(self) -> int:
        return 1 + max((row.block for row in self.rows), default=0)

    @property
    def parts(self) -> list[str]:
        return sorted({row.part for row in self.rows if row.part})

    @property
    def targets(self) -> list[str]:
        """Names of single roles that this architecture has; a fused layer offers q, k and v."""
        found = {row.layer.role for row in self.rows}
        if "qkv" in found:
            found |= {"q", "k", "v"}
        return [role for role in ("q", "k", "v", "out", "up", "down", "gate", "conv") if role in found]

    def __hash__(self) -> int:
        return hash((self.id, self.parameters, len(self.rows)))

    def select(
        self,
        targets: str | Iterable[str],
        *,
        blocks: tuple[int, int] | None = None,
        part: str = "",
    ) -> list[Row]:
        """Rows with these roles, in model order; `blocks` is an inclusive range, `part` a tower.

        A fused query-key-value layer is one row when q, k and v are all asked for (as PEFT adapts it), and one
        square row for each that is asked for otherwise (as the LoRA and NOLA papers do). Raises LabError when
        nothing matches.
        """
        wanted = roles(targets)
        whole = {"q", "k", "v"} <= set(wanted)
        if part and part not in self.parts:
            has = f"it has {' and '.join(self.parts)}" if self.parts else "it has one tower alone, without a name"
            raise LabError(f"{self.name} has no tower called '{part}': {has}.")
        low, high = blocks or (0, self.blocks - 1)
        if high >= self.blocks:
            raise LabError(f"{self.name} has blocks 0 to {self.blocks - 1}, got {low} to {high}.")
        found: list[Row] = []
        for row in self.rows:
            if not low <= row.block <= high or (part and row.part != part):
                continue
            if row.layer.role in wanted or (row.layer.role == "qkv" and whole):
                found.append(row)
            elif row.layer.role == "qkv":
                found += [_third(row, role) for role in ("q", "k", "v") if role in wanted]
        if found:
            return found
        where = f" in blocks {low} to {high}" if blocks else ""
        raise LabError(
            f"{self.name} has no layer called {', '.join(wanted)}{where}: it has {', '.join(self.targets) or 'none'}"
            f" in {self.blocks} blocks, 0 to {self.blocks - 1}."
        )

    def fused(self, targets: str | Iterable[str]) -> str:
        """How a fused query-key-value layer is counted for these targets: "whole", "split", or "" (none adapted)."""
        wanted = set(roles(targets)) & {"q", "k", "v"}
        if not wanted or all(row.layer.role != "qkv" for row in self.rows):
            return ""
        return "whole" if len(wanted) == 3 else "split"


def _third(row: Row, role: str) -> Row:
    fused = row.layer
    if fused.out != 3 * fused.in_:
        raise LabError(
            f"Query, key and value are one layer here ({fused.name}, {fused.out}×{fused.in_}) that is not three squares:"
            " choose q, k and v together."
        )
    layer = Layer(f"{fused.name}[{role}]", fused.out // 3, fused.in_, None, role, fused.bias)
    return Row(layer, row.part, row.block, row.tokens, row.grows, row.input, row.kept)


# -- the shipped tables --------------------------------------------------------------------------------
def ids() -> list[str]:
    """Ids of the shipped architectures, in the order that the page lists them."""
    return sorted((p.stem for p in FOLDER.glob("*.json")), key=lambda id: (_head(id)[0], id))


@functools.cache
def _head(id: str) -> tuple[int, str]:
    """Order and name of a shipped table, without parsing all of it."""
    with (FOLDER / f"{id}.json").open(encoding="utf-8") as file:
        start = file.read(400)
    order, name = re.search(r'"order": (\d+)', start), re.search(r'"name": "([^"]*)"', start)
    return int(order.group(1)) if order else 1000, name.group(1) if name else id


def names() -> dict[str, str]:
    """Names of the shipped architectures by id, in order."""
    return {id: _head(id)[1] for id in ids()}


def load(id: str) -> Architecture:
    """A shipped architecture. Raises LabError, with the nearest names, when there is none of this id."""
    path = FOLDER / f"{id}.json"
    if not re.fullmatch(r"[a-z0-9.-]+", id) or not path.is_file():
        raise unknown("architecture", id, ids())
    return _load(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _load(path: Path, changed: int) -> Architecture:
    return parse(json.loads(path.read_text(encoding="utf-8")))


def parse(table: dict[str, Any]) -> Architecture:
    """An Architecture from a table as `assets/architectures/make.py` writes them."""
    rows = tuple(_row(dict(zip(table["fields"], values, strict=True))) for values in table["layers"])
    head = {k: table[k] for k in ("id", "name", "parameters", "library", "source", "note", "unit", "memory")}
    return Architecture(
        **head, rows=rows, companions=tuple(table.get("companions", ())), order=table.get("order", 1000)
    )


def _row(row: dict[str, Any]) -> Row:
    kernel = tuple(row["kernel"]) if row["kernel"] else None
    layer = Layer(row["name"], row["out"], row["in"], kernel, row["role"], bool(row["bias"]))
    return Row(layer, row["part"], row["block"], row["tokens"], bool(row["grows"]), row["input"], bool(row["kept"]))


# -- a pasted table of shapes ---------------------------------------------------------------------------
_LINE = re.compile(
    r"(?P<name>[A-Za-z_][\w.\-\[\]]*)[\s,;|:]+(?P<out>\d+)\s*[x×*,;|\s]\s*(?P<in>\d+)"
    r"(?:\s*[x×*,;|\s]\s*(?P<kh>\d+)\s*[x×*,;|\s]\s*(?P<kw>\d+))?"
    r"(?:[\s,;|]+(?:times|[x×*])\s*(?P<times>\d+))?"
)
TABLE_HELP = "one layer a line as: name out in [height width] [times N], for example: q 4096 4096 times 32"


def from_table(text: str, name: str = "pasted table") -> Architecture:
    """An architecture from lines `name out in [height width] [times N]`; a first line of column names is skipped.

    A layer's role is read from its name: one of q, k, v, out, up, down, gate, conv, or a module's dotted name;
    four sizes make a convolution. Raises LabError, naming the line, on anything else.
    """
    if len(text.encode()) > MAX_BYTES:
        raise LabError(f"The table is larger than {MAX_BYTES // 1_000_000} MB: paste the layers' shapes alone.")
    rows: list[Row] = []
    parameters = 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip().strip("|").strip()
        if not stripped or stripped.startswith("#") or (number == 1 and not any(c.isdigit() for c in stripped)):
            continue
        layer, times = _table_line(stripped, number)
        if len(rows) + times > MAX_LAYERS:
            raise LabError(f"The table has more than {MAX_LAYERS:,} layers.")
        parameters += times * layer.m * layer.n
        copies = (Layer(f"{i}.{layer.name}" if times > 1 else layer.name, *_shape(layer)) for i in range(times))
        rows += [Row(copy, block=i) for i, copy in enumerate(copies)]
    if not rows:
        raise LabError(f"The table is empty: write {TABLE_HELP}.")
    return Architecture("pasted", name, parameters, tuple(rows), source="pasted by you")


def _shape(layer: Layer) -> tuple[Any, ...]:
    return layer.out, layer.in_, layer.kernel, layer.role, layer.bias


def _table_line(line: str, number: int) -> tuple[Layer, int]:
    found = _LINE.fullmatch(line)
    if not found:
        shown = line if len(line) <= 60 else line[:57] + "…"
        raise LabError(f"Line {number} of the table cannot be read ('{shown}'): write {TABLE_HELP}.")
    sizes = [int(found[g]) for g in ("out", "in", "kh", "kw") if found[g]]
    times = int(found["times"] or 1)
    if not all(1 <= s <= MAX_SIDE for s in sizes) or not 1 <= times <= MAX_LAYERS:
        raise LabError(
            f"Line {number} of the table has a size outside 1 to {MAX_SIDE:,} or a count outside 1 to {MAX_LAYERS:,}."
        )
    kernel = (sizes[2], sizes[3]) if len(sizes) == 4 else None
    name = found["name"]
    last = name.rsplit(".", 1)[-1]
    plain = last if last in ("q", "k", "v", "qkv", "out", "up", "down", "gate", "conv") else ""
    role = plain or role_of(name) or ("conv" if kernel else "")
    if not role:
        raise LabError(
            f"Line {number} of the table: the lab cannot tell what '{name}' is; name it q, k, v, out, up, down, "
            "gate or conv."
        )
    return Layer(name, sizes[0], sizes[1], kernel, role), times


# -- a configuration ------------------------------------------------------------------------------------
def check_config(text: str | bytes) -> dict[str, Any]:
    """The JSON object of a config.json. Raises LabError when it is too large or deep, no JSON, or no model's."""
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise LabError(
            f"The configuration has {len(raw) / 1e6:.1f} MB; a model's config.json has some kilobytes, and at most "
            f"{MAX_BYTES // 1_000_000} MB is read."
        )
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LabError("The configuration is not text in UTF-8: upload a model's config.json.") from None
    if _depth(decoded) > MAX_DEPTH:
        raise LabError(f"The configuration is nested more than {MAX_DEPTH} deep; a model's config.json never is.")
    try:
        config = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise LabError(f"The configuration is not JSON{where}: upload a model's config.json.") from None
    if not isinstance(config, dict) or not any(config.get(k) for k in ("model_type", "_class_name", "model_cfg")):
        raise LabError(
            "The configuration names no model: it needs model_type (transformers), _class_name (diffusers) or "
            "model_cfg (open_clip)."
        )
    _check_numbers(config)
    return config


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, without recursion."""
    deepest = depth = 0
    for bracket in re.sub(r'"(?:[^"\\]|\\.)*"', "", text):
        if bracket in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in "]}":
            depth -= 1
    return deepest


def _check_numbers(value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_numbers(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        limit = 1000 if re.search(r"layers|depth|n_layer|experts", name) else MAX_SIDE
        sizes = ("size", "dim", "channels", "width", "heads", "layers", "depth", "n_layer", "experts", "n_embd")
        if any(s in name for s in sizes) and not -1 <= value <= limit:
            raise LabError(f"The configuration's {name} is {value:g}, outside what a model has (at most {limit:,}).")


def from_config(text: str | bytes, name: str = "uploaded configuration") -> Architecture:
    """An architecture from the text of a config.json, built by a child process on the meta device.

    Raises LabError, in one sentence, on anything that is not a configuration of a known model. Nothing is
    downloaded and no remote code runs (trust_remote_code is never set). Takes the time to import torch: seconds.
    """
    config = check_config(text)
    child = [sys.executable, "-m", "lab.architecture_child"]
    try:
        done = subprocess.run(
            child, input=json.dumps(config), capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise LabError(f"The model could not be laid out within {BUILD_SECONDS} seconds: it is too large.") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise LabError("The model could not be laid out: it is too large for this machine's memory.") from None
    if "error" in answer:
        raise LabError(answer["error"])
    return parse({**answer, "id": "uploaded", "name": name})


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_HUB_FILES = ("config.json", "unet/config.json", "transformer/config.json")


def from_hub(repo: str) -> Architecture:
    """An architecture from a model on the Hub: its config.json alone is fetched (of a pipeline, the denoiser's).

    Raises LabError when the name is not `owner/model`, when there is no such configuration, and when the Hub does
    not answer (offline).
    """
    repo = repo.strip().removeprefix("https://huggingface.co/").strip("/")
    if not _HUB_ID.fullmatch(repo) or ".." in repo:
        raise LabError(f"'{repo[:80]}' is no model's name on the Hub: write owner/model, as openai-community/gpt2.")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    for file in _HUB_FILES:
        try:
            size = get_hf_file_metadata(hf_hub_url(repo, file), timeout=8).size or 0
            path = hf_hub_download(repo, file, etag_timeout=8) if size <= MAX_BYTES else ""
        except GatedRepoError:
            raise LabError(f"{repo} asks for a licence to be accepted on the Hub: upload its config.json.") from None
        except RepositoryNotFoundError:
            raise LabError(f"The Hub has no model '{repo}' that can be read without logging in.") from None
        except EntryNotFoundError:
            continue
        except Exception as error:  # no network, a proxy's page, offline mode, …
            raise LabError(
                f"The Hub did not answer for {repo} ({type(error).__name__}): without a connection, upload the "
                "model's config.json."
            ) from error
        if not path:
            raise LabError(f"{file} of {repo} has {size / 1e6:.1f} MB: no model's configuration is that large.")
        return from_config(Path(path).read_bytes(), repo)
    raise LabError(f"{repo} has no {' or '.join(_HUB_FILES)}.")


def resolve(name: str) -> Architecture:
    """What a command line names: a shipped id, a path to a config.json, to a table of shapes or to a single-file SDXL
    checkpoint, or a model of the Hub as owner/model. Raises LabError when it is none of them."""
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        from lab import single_file

        return single_file.architecture(path)
    if path.suffix in (".json", ".txt", ".csv", ".tsv") and path.is_file():
        if path.stat().st_size > MAX_BYTES:
            raise LabError(
                f"{name} has {path.stat().st_size / 1e6:.1f} MB: at most {MAX_BYTES // 1_000_000} MB is read."
            )
        if path.suffix == ".json":
            return from_config(path.read_bytes(), path.name)
        return from_table(path.read_text(encoding="utf-8", errors="replace"), path.name)
    if path.suffix in (".json", ".txt", ".csv", ".tsv"):
        raise LabError(f"There is no file '{name}': give the path of a config.json or of a table of shapes.")
    if "/" in name:
        return from_hub(name)
    return load(name)


def shapes(rows: Sequence[Row]) -> list[Layer]:
    return [row.layer for row in rows]
