"""One training step of the real SDXL UNet with tensors that have shapes and no numbers: bytes alive, and their peak.

The step is the lab's own on a GPU: weights in fp16, products in bf16 under autocast, norms in fp32, flash attention,
gradient checkpointing as diffusers does it. An adapter is stood in for by one number a layer: what the adapters
themselves hold is added by whoever asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lab.activations import Allocations
from lab.targets import modules


@dataclass(frozen=True)
class Step:
    """Bytes: the weights', and the peak beside them in one step."""

    weights: int
    peak: int


def unet_step(
    config: dict[str, Any],
    resolution: int,
    batch: int,
    *,
    checkpointing: bool,
    train: bool = True,
    weights: torch.dtype = torch.float16,
    precise_norms: bool = True,
    fake: bool = True,
) -> Step:
    """A step of training, or of drawing with guidance (twice the batch). `precise_norms`: as autocast does it on a GPU;
    on a CPU norms compute in bf16. Without `fake` the step is done and its real tensors are counted."""
    from diffusers import UNet2DConditionModel

    side, count = resolution // 8, batch if train else 2 * batch
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, _default(weights), _norms(precise_norms):
        unet: Any = UNet2DConditionModel.from_config(config)
        unet.requires_grad_(False).train(train)
        probe = torch.zeros((), requires_grad=train, dtype=torch.float32)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        names = set(modules(unet, "attn"))
        for name, module in unet.named_modules():
            if name in names:
                module.register_forward_hook(lambda _m, _i, out: out + probe)
        counter = Allocations()
        for tensor in [*unet.parameters(), *unet.buffers()]:
            counter.add(tensor)
        held = counter.now
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        with counter, torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16):
            noisy = torch.randn(count, config["in_channels"], side, side, dtype=torch.float32)
            states = torch.randn(count, 77, config["cross_attention_dim"], dtype=torch.float32)
            known = {
                "text_embeds": torch.randn(count, pooled, dtype=torch.float32),
                "time_ids": torch.zeros(count, 6, dtype=torch.float32),
            }
            times = torch.zeros(count, dtype=torch.long)
            out = unet(noisy, times, encoder_hidden_states=states, added_cond_kwargs=known).sample
            loss = (out.float() - noisy).square().mean()
        if train:
            with counter:
                loss.backward()
    return Step(held, counter.peak - held)


def decoding(config: dict[str, Any], resolution: int, weights: torch.dtype = torch.float16) -> Step:
    """Decoding one picture by the VAE (the fp16-fixed one stays in fp16)."""
    from diffusers import AutoencoderKL

    with FakeTensorMode(allow_non_fake_inputs=True), _default(weights):
        vae: Any = AutoencoderKL.from_config(config)
        vae.requires_grad_(False).eval()
        counter = Allocations()
        for tensor in [*vae.parameters(), *vae.buffers()]:
            counter.add(tensor)
        held = counter.now
        with counter, torch.no_grad():
            vae.decode(torch.randn(1, 4, resolution // 8, resolution // 8))
    return Step(held, counter.peak - held)


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _norms(precise: bool) -> Generator[None]:
    """Group and layer norms in fp32, as autocast has them on a GPU."""
    functional: Any = torch.nn.functional
    before = functional.group_norm, functional.layer_norm

    def group(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        return before[0](x.float(), groups, *(None if t is None else t.float() for t in (weight, bias)), eps)

    def layer(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        return before[1](x.float(), shape, *(None if t is None else t.float() for t in (weight, bias)), eps)

    if precise:
        functional.group_norm, functional.layer_norm = group, layer
    try:
        yield
    finally:
        functional.group_norm, functional.layer_norm = before
