"""Closed-form counts against what PEFT makes: every method on every embedded model, LoRA on every architecture."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from lab import architectures, budget, layer_tables
from lab.architectures import Row
from lab.errors import LabError
from lab.methods import METHODS
from tests.architecture_configurations import configuration

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ("tiny-sdxl-te1", "tiny-sdxl-te2", "tiny-sdxl", "tiny-clip")


@functools.cache
def embedded(id: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The embedded model of this architecture with random weights, and inputs for it."""
    import torch

    torch.manual_seed(0)
    config = json.loads(json.dumps(configuration(id)))
    if id == "tiny-clip":
        import open_clip

        from lab.clip.split import split_attention

        model = open_clip.CLIP(**config["model_cfg"])
        split_attention(model)
        side = config["model_cfg"]["vision_cfg"]["image_size"]
        words = torch.zeros(1, config["model_cfg"]["text_cfg"]["context_length"], dtype=torch.long)
        return model.eval(), (torch.randn(1, 3, side, side), words), {}
    if id == "tiny-sdxl":
        from lab.bench.budget_memory import tiny_sdxl

        _, _, make, inputs = tiny_sdxl()
        model = make().eval()
        given = inputs(model)
        return model, (), {k: _first(v) for k, v in given.items()}
    import transformers

    kind = transformers.CLIPTextModel if id.endswith("1") else transformers.CLIPTextModelWithProjection
    return kind(transformers.CLIPTextConfig.from_dict(config)).eval(), (torch.zeros(1, 4, dtype=torch.long),), {}


def _first(value: Any) -> Any:
    return {k: _first(v) for k, v in value.items()} if isinstance(value, dict) else value[:1]


def two_of_each(rows: list[Row]) -> list[Row]:
    """At most two layers of a shape and role: sharing shows, and the singular value decompositions stay few."""
    seen: dict[Any, int] = {}
    found = []
    for row in rows:
        x = row.layer
        key = (x.out, x.in_, x.kernel, x.role)
        if min(x.m, x.n) < 8:  # a UNet's last convolution has four outputs: less than some methods' fixed ranks
            continue
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= 2:
            found.append(row)
    return found


@pytest.mark.parametrize("arch", EMBEDDED)
@pytest.mark.parametrize("id", METHODS.ids())
def test_every_method_on_every_embedded_model(id: str, arch: str) -> None:
    method = METHODS[id]
    targets = "all,conv" if method.conv and arch == "tiny-sdxl" else "all"
    rows = two_of_each(architectures.load(arch).select(targets))
    layers = architectures.shapes(rows)
    knobs = method.knobs()
    try:
        budget.check(method, layers, knobs)
    except LabError:  # a rank above the smallest layer
        knobs = budget.solve(method, layers, 3_000).knobs
    plain, inputs, named = embedded(arch)
    model = copy.deepcopy(plain).requires_grad_(False)

    def calibrate() -> Any:
        out = model(*inputs, **named)
        found = [v for v in (out if isinstance(out, tuple) else out.values()) if hasattr(v, "square") and v.numel() > 1]
        return sum(v.float().square().mean() for v in found)

    made = method.attach(model, knobs, [layer.name for layer in layers], seed=0, calibrate=calibrate)
    total = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert total == budget.count(method, layers, knobs)


@pytest.mark.parametrize("id", architectures.ids())
def test_lora_on_every_architecture(id: str) -> None:
    """All layers of the real model, laid out without weights; fused layers whole."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = configuration(id)
    if callable(config):  # timm
        with torch.device("meta"):
            model = config()
    elif id == "tiny-clip":
        model = copy.deepcopy(embedded(id)[0])
    else:
        model = layer_tables.build(config)
    arch = architectures.load(id)
    rows = arch.select([*arch.targets])
    layers = architectures.shapes(rows)
    names = [layer.name for layer in layers]
    with torch.device("meta"):
        made = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    lora = METHODS["lora"]
    total = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert total == budget.count(lora, layers, lora.knobs.parse({"r": 2}))


def test_eva_refuses_a_batch_that_it_would_go_round_on_for_ever() -> None:
    import torch

    eva = METHODS["eva"]
    net = torch.nn.Sequential()
    net.to_q = torch.nn.Linear(32, 32)
    with pytest.raises(LabError, match="a batch has 4 positions"):
        eva.attach(net, eva.knobs.parse({"r": 8}), ["to_q"], calibrate=lambda: net(torch.randn(4, 32)).square().mean())
