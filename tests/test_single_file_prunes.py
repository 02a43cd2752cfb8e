"""Single files of SDXL with shorter transformers: SSD-1B, Segmind-Vega, and others of that plan."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lab import architectures, sgm_unet, single_file
from lab.bases import resolve
from lab.errors import LabError
from tests import narrow_sdxl

# Entries of each published unet/config.json that are not SDXL's (narrow, so that it runs here).
PRUNES: dict[str, dict[str, Any]] = {
    "ssd-1b": {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "segmind-vega": {
        "transformer_layers_per_block": [1, 1, 2],
        "mid_block_type": "UNetMidBlock2D",
    },
    "uneven, with a middle": {
        "transformer_layers_per_block": [1, [1, 2], [3, 1]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], [2, 1, 1], 1],
    },
    "no middle, plain": {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 1],
        "mid_block_type": None,
    },
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(pipeline of SDXL's own depths, the folder it came from)."""
    folder = tmp_path_factory.mktemp("narrow")
    return narrow_sdxl.build(folder / "model", folder / "aside"), folder


@pytest.mark.parametrize("name", PRUNES)
def test_a_pruned_single_file_is_the_folder_it_was_made_of(
    narrow: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    pipe, made = narrow
    torch.manual_seed(1)
    config = dict(UNet2DConditionModel.load_config(made / "aside" / "unet"))
    pipe.unet = UNet2DConditionModel.from_config(config | PRUNES[name])
    shutil.copytree(made / "model", tmp_path / "model", ignore=shutil.ignore_patterns("unet"))
    pipe.unet.save_pretrained(tmp_path / "model" / "unet")
    file = narrow_sdxl.single_file(pipe, tmp_path / "pruned.safetensors")
    monkeypatch.setattr(single_file, "CONFIGURATION", made / "aside")

    def load(source: Path) -> Any:
        row = dataclasses.replace(resolve(str(source)), vae=None)
        row.forget()
        return row.load("cpu", torch.float32)

    folder, again = load(tmp_path / "model"), load(file)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(again, part).state_dict(), getattr(folder, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(_predicted(folder.unet), _predicted(again.unet))  # its depths and heads are as they were, too


def _predicted(unet: Any) -> torch.Tensor:
    for parameter in unet.parameters():  # copied: a mapped file aligns by chance, and kernels go by alignment
        parameter.data = parameter.data.clone()
    draw = torch.Generator().manual_seed(1)
    latents, words, pooled = (torch.randn(s, generator=draw) for s in ((1, 4, 8, 8), (1, 7, 80), (1, 48)))
    more = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    with torch.no_grad():
        return unet(latents, torch.tensor([500]), words, added_cond_kwargs=more).sample


# -- from names alone --------------------------------------------------------------------------------------
def names(depths: sgm_unet.Depths) -> list[str]:
    """A few names a block: its residual block's, and of each transformer layer one."""
    layers = dict(zip([f"input_blocks.{n}" for n in (1, 2, 4, 5, 7, 8)], depths.down, strict=True))
    layers |= {f"output_blocks.{n}": depth for n, depth in enumerate(depths.up)} | {"middle_block": depths.middle or 0}
    made = [f"{side}_blocks.{n}.0.weight" for side in ("input", "output") for n in range(9)]
    made += {None: ["middle_block.0.x"], -1: []}.get(depths.middle, ["middle_block.0.x", "middle_block.2.x"])
    for block, depth in layers.items():
        made += [f"{block}.1.transformer_blocks.{n}.norm1.weight" for n in range(depth)]
    return made


def test_depths_from_names() -> None:
    for depths in (*sgm_unet.SHIPPED, sgm_unet.Depths((0, 0, 1, 1, 0, 0), -1, (0, 0, 0, 1, 1, 1, 0, 0, 0))):
        assert sgm_unet.depths(names(depths)) == depths
    assert sgm_unet.configuration(sgm_unet.SDXL) == {}


@pytest.mark.parametrize(
    ("missing", "clause"),
    [
        ("input_blocks.7.1.transformer_blocks.4.", "a transformer layer is missing in its input_blocks.7"),
        ("output_blocks.8.", "its UNet has 8 output blocks where SDXL's has 9"),
        ("input_blocks.5.1.", "a transformer in some layers and none in others"),
        ("middle_block.1.transformer_blocks.9", "its middle block has 9 transformer layers, the one before it 10"),
        ("middle_block.2.", "its middle block is not whole"),
    ],
)
def test_what_no_configuration_describes(missing: str, clause: str) -> None:
    left = [name for name in names(sgm_unet.SDXL) if not name.startswith(missing)]
    with pytest.raises(LabError, match=clause):
        sgm_unet.configuration(sgm_unet.depths(left))


def write(path: Path, depths: sgm_unet.Depths) -> Path:
    """A checkpoint of names alone."""
    from safetensors.torch import save_file

    every = [f"{single_file.UNET}{name}" for name in names(depths)] + [f"{start}x" for start in single_file.TEXT]
    save_file({name: torch.zeros(0) for name in every}, path)
    return path


def test_a_files_layers_are_its_own(tmp_path: Path) -> None:
    """Budgets and checks count the layers that the file has, not SDXL's."""
    for depths, id in sgm_unet.SHIPPED.items():
        row = resolve(str(write(tmp_path / f"{id}.safetensors", depths)))
        assert architectures.resolve(row.architecture) is architectures.load(id)
    vega = sgm_unet.Depths((0, 0, 1, 1, 2, 2), None, (2, 2, 2, 1, 1, 1, 0, 0, 0))
    found = architectures.resolve(resolve(str(write(tmp_path / "vega.safetensors", vega))).architecture)
    assert found.name == "vega.safetensors"
    assert sum(row.layer.name.endswith("attn2.to_k") for row in found.rows) == sum(vega.down) + sum(vega.up)
