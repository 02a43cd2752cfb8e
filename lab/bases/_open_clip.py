"""Loads rows of family "open_clip": open_clip models, and timm image models ("timm:" before the name)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lab import device as devices
from lab.bases import _kept
from lab.clip import model

if TYPE_CHECKING:
    from lab.bases import Base
    from lab.clip.model import Clip


def load(base: Base, device: Any = None, dtype: Any = None, told: Any = None) -> Clip:
    """The base as `lab.clip.model.Clip`. Weights are held in fp32; the training loop multiplies in bf16 where the
    hardware can. Raises LabError."""
    device = device or devices.pick()

    def read() -> Clip:
        made = model.load(base, device)
        if dtype is not None:
            made.model.to(dtype)
        return made

    key = ("open_clip", base.id, base.source, str(device), dtype, _kept.stamp(base.source))
    return _kept.lend(key, read, shared=False)


forget = _kept.forget
