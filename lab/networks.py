"""What an adapter is put on: a pipeline's UNet, or the UNet and both text encoders as one network.

One network with one adapter, so that everything a method does over all its layers (shared tensors, rank allocation,
an optimizer's groups) is done over all of them. Names of layers then begin with `unet.`, `text_encoder.` or
`text_encoder_2.`, as they do in diffusers' LoRA files; an adapter of the UNet alone names its layers without a prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import nn

ENCODERS = ("text_encoder", "text_encoder_2")
OF_ENCODERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # layers' names in CLIP's text models


class Networks(nn.Module):
    """The UNet and the text encoders of a pipeline, the very modules. Called, it is the UNet."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = pipe.unet, pipe.text_encoder, pipe.text_encoder_2

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)


def network(pipe: Any, text_encoders: bool = False) -> nn.Module:
    """What an adapter on this pipeline is attached to."""
    return Networks(pipe) if text_encoders else pipe.unet


def adapts_text(settings: dict[str, Any]) -> bool:
    """Whether a saved adapter's configuration names layers of text encoders: PEFT shortens long lists of names to what
    tells them apart, as `q_proj`, which a UNet has not."""
    named = settings.get("target_modules") or []
    names = [named] if isinstance(named, str) else named
    return any(name.split(".")[0] in ENCODERS or name.split(".")[-1] in OF_ENCODERS for name in names)


def of_text(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters that lie in text encoders."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(f".{encoder}." in f".{name}" for encoder in ENCODERS):
            yield parameter


def slow_text(optimizer: torch.optim.Optimizer, model: nn.Module, share: float) -> None:
    """Give the text encoders' parameters groups of their own, whose learning rate is `share` of the rest's."""
    ids = {id(p) for p in of_text(model)}
    for group in list(optimizer.param_groups):
        text = [p for p in group["params"] if id(p) in ids]
        if not text:
            continue
        if len(text) == len(group["params"]):
            group["lr"] *= share
            continue
        group["params"] = [p for p in group["params"] if id(p) not in ids]
        optimizer.add_param_group({**group, "params": text, "lr": group["lr"] * share})


@contextlib.contextmanager
def at_work(pipe: Any, *names: str) -> Generator[None]:
    """These parts of the pipeline on the UNet's device; afterwards off it again, unless they are trained.

    On an accelerator, what was cached needs no encoder: the memory is the UNet's. On a CPU nothing moves.
    """
    device = pipe.unet.device
    parts = [part for name in names if (part := getattr(pipe, name, None)) is not None]
    for part in parts:
        move(part, device)
    try:
        yield
    finally:
        for part in parts:
            if device.type != "cpu" and not any(p.requires_grad for p in part.parameters()):
                move(part, torch.device("cpu"))


def move(part: nn.Module, device: torch.device) -> None:
    """Parameters stay the same objects: an optimizer goes on with them."""
    if next(part.parameters()).device != device:
        part.to(device)


BACKEND = "inductor"  # of torch.compile


def compile_blocks(unet: Any) -> None:
    """Compile the UNet's repeated blocks, adapters and all; each is compiled when it is first called."""
    unet.compile_repeated_blocks(backend=BACKEND)


def uncompile(unet: nn.Module) -> None:
    """Call the blocks as they are written again: the next adapter's are others."""
    for module in unet.modules():
        module._compiled_call_impl = None
