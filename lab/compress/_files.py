"""Adapter files opened, and what they are laid on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.adapter_files import AdapterFile, read
from lab.bases import Base
from lab.compress._engine import Report, compress, reads_text
from lab.errors import LabError

if TYPE_CHECKING:
    import torch


def opened(path: str | Path, base: str | Base | None, name: str | None = None) -> tuple[AdapterFile, Base]:
    """The file and the base at hand that it is laid on. Raises LabError when there is none."""
    file = read(path, base, name=name)
    if file.base is None:
        made = f" (it looks like one for {file.family.name})" if file.family.name else ""
        raise LabError(f"{file.name[:80]} does not tell a base that is on this machine{made}: name the base.")
    return file, file.base


def network(row: Base, names: Any, device: Any = "cpu", dtype: Any = None) -> torch.nn.Module:
    """What an adapter of these layers is attached to, in float32 on the CPU, so that fits do not depend on the machine."""
    import torch

    return part_of(row, row.load(device, dtype or torch.float32), names)


def part_of(row: Base, whole: Any, names: Any) -> torch.nn.Module:
    """Of a loaded base: the UNet, the UNet with the text encoders, or the model."""
    if row.family != "sdxl":
        return whole.model
    from lab import networks

    return networks.network(whole, reads_text(names))


def compress_file(
    path: str | Path,
    id: str,
    budget: int | None,
    out: Path,
    *,
    base: str | None = None,
    name: str | None = None,
    given: Mapping[str, Any] | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> dict[str, Any]:
    """`compress` of an adapter file or folder. Beside its keys: base, and original, with name, kind, parameters, bytes."""
    file, row = opened(path, base, name)
    result = compress(
        network(row, file.updates),
        file.updates,
        id,
        budget,
        out,
        given=given,
        seed=seed,
        base=row.public_name,
        report=report,
    )
    original = {"name": file.name, "kind": file.kind, "parameters": file.parameters, "bytes": file.bytes}
    return {**result, "base": row.id, "original": original}
