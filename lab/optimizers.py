"""The optimizer of a run: the method's own, in 8 bits where asked, slower on text encoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.networks import slow_text

if TYPE_CHECKING:
    import torch

    from lab.methods import Method


def make(
    method: Method,
    model: torch.nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    kind: str = "adamw",
    text_encoder_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """`method.optimizer`; with kind "adamw8bit", its groups in bitsandbytes' AdamW8bit, whose two averages take a
    byte a number in place of four.

    Raises LabError when bitsandbytes is not installed, or when the method brings an optimizer that is not AdamW.
    """
    import torch

    optimizer: Any = method.optimizer(model, lr, weight_decay)
    if text_encoder_rate != 1.0:
        slow_text(optimizer, model, text_encoder_rate)
    if kind == "adamw":
        return optimizer
    if type(optimizer) is not torch.optim.AdamW:
        raise LabError(f"{method.name} brings an optimizer of its own, which has no 8-bit form: take adamw for it.")
    defaults = optimizer.defaults
    return _bitsandbytes().optim.AdamW8bit(
        [{k: g[k] for k in ("params", "lr", "betas", "eps", "weight_decay")} for g in optimizer.param_groups],
        **{k: defaults[k] for k in ("lr", "betas", "eps", "weight_decay")},
    )


def _bitsandbytes() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # a build that does not fit the GPU raises whatever it likes
        raise LabError(
            "The 8-bit optimizer needs bitsandbytes, which is not installed here: pip install bitsandbytes, "
            "or take adamw."
        ) from error
