"""Adapters added to a base's weights: both text encoders of the embedded base, by every name that files give their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lab.adapter_files import read
from lab.adapter_pictures import added
from lab.bases import BASES
from lab.errors import LabError

# transformers has `text_model.` in the second encoder's modules and, from some version on, none in the first one's.
LAYERS = {
    "text_encoder": ("encoder.layers.0.self_attn.q_proj", "encoder.layers.2.mlp.fc1"),
    "text_encoder_2": ("text_model.encoder.layers.3.self_attn.out_proj", "text_model.encoder.layers.1.mlp.fc2"),
}
UNET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def whole() -> Any:
    return BASES["tiny-sdxl"].load("cpu", torch.float32)


def weights(whole: Any) -> dict[tuple[str, str], torch.nn.Parameter]:
    found = {("unet", UNET): whole.unet.get_submodule(UNET).weight}
    for part, names in LAYERS.items():
        modules = dict(getattr(whole, part).named_modules())
        for name in names:
            here = name if name in modules else name.removeprefix("text_model.")
            here = here if here in modules else f"text_model.{here}"
            found[part, name] = modules[here].weight
    return found


def pair(key: tuple[str, str], weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (2, n) and B (m, 2) of one layer; different for each."""
    draw = torch.Generator().manual_seed(sum(map(ord, "".join(key))))
    return torch.randn(2, weight.shape[1], generator=draw), torch.randn(weight.shape[0], 2, generator=draw)


def stem(layout: str, part: str, name: str) -> str:
    inner = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
    if layout == "kohya":
        prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}.get(part, "lora_unet_")
        return prefix + inner.replace(".", "_")
    return f"base_model.model.{part}.{name}" if layout == "peft" else f"{part}.{inner}"


@pytest.mark.parametrize("layout", ["diffusers", "peft", "kohya"])
def test_both_text_encoders_are_found(layout: str, whole: Any, tmp_path: Path) -> None:
    row, tensors = BASES["tiny-sdxl"], {}
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    before = {key: weight.data for key, weight in weights(whole).items()}
    for key, weight in before.items():
        A, B = pair(key, weight)
        tensors[f"{stem(layout, *key)}.{down}.weight"], tensors[f"{stem(layout, *key)}.{up}.weight"] = A, B
        if layout == "kohya":
            tensors[f"{stem(layout, *key)}.alpha"] = torch.tensor(2.0)  # the rank: a scale of one
    save_file(tensors, tmp_path / "both.safetensors")
    updates = read(tmp_path / "both.safetensors", row).updates
    assert len(updates) == len(before) == 5
    with added(row, whole, updates):
        for key, weight in weights(whole).items():
            A, B = pair(key, weight)
            assert torch.allclose(weight - before[key], B @ A, atol=1e-4), key
    assert all(
        weight.data_ptr() == before[key].data_ptr() for key, weight in weights(whole).items()
    )  # the very tensors


def test_a_layer_that_is_not_there_is_named_and_nothing_is_left(whole: Any, tmp_path: Path) -> None:
    row, before = BASES["tiny-sdxl"], {key: weight.data for key, weight in weights(whole).items()}
    tensors = {f"unet.{UNET}.lora_A.weight": torch.ones(1, before["unet", UNET].shape[1])}
    tensors[f"unet.{UNET}.lora_B.weight"] = torch.ones(before["unet", UNET].shape[0], 1)
    save_file(tensors, tmp_path / "one.safetensors")
    updates = dict(read(tmp_path / "one.safetensors", row).updates)
    updates["text_encoder.text_model.encoder.layers.9.self_attn.q_proj"] = updates[UNET]
    with pytest.raises(LabError, match=r"layers\.9.*Tiny SDXL"), added(row, whole, updates):
        pass
    assert all(weight.data_ptr() == before[key].data_ptr() for key, weight in weights(whole).items())
