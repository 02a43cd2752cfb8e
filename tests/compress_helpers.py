"""A small network, updates for it and an adapter file, as the compression and merging tests want them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lab.methods import METHODS
from lab.methods.deltas import Delta


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(24, 32, bias=False)
        self.to_k = nn.Linear(24, 16)
        self.conv1 = nn.Conv2d(4, 16, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()


def net():
    torch.manual_seed(0)
    return Net()


def low_rank(m, n, r, seed, shape=None):
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(m, r, generator=draw) * 0.5 ** torch.arange(r)
    A = torch.randn(r, n, generator=draw)
    return Delta(lambda: (B @ A).reshape(shape or (m, n)), lambda: (B, A))


def dense(delta):
    return delta.dense().double().flatten(1)


def saved_lora(unet, base, every, size, folder):
    """A LoRA with random numbers on each `every`-th attention layer, as PEFT saves it; its folder."""
    from lab import targets

    method = METHODS["lora"]
    model = method.attach(unet, method.knobs.parse({"r": 2}), targets.modules(unet, "attn")[::every], seed=0)
    draw = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=draw) * size
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    model.unload()
    return folder / "adapter"


@pytest.fixture(name="fox", scope="module")
def fox_file(tmp_path_factory):
    """A LoRA of the embedded base as kohya's programs write it."""
    from lab.bases import BASES
    from lab.export import export

    unet = BASES["tiny-sdxl"].load("cpu", torch.float32).unet
    folder = tmp_path_factory.mktemp("fox")
    adapter = saved_lora(unet, "tiny-sdxl", 20, 0.1, folder)
    (file,) = export(adapter, "kohya", folder / "fox.safetensors")["files"]
    return file
