"""Base models: rows, what names resolve to, and how loading fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.bases import ASSETS, BASES, resolve
from lab.errors import LabError


def test_rows_are_read_without_torch() -> None:
    code = "import sys; from lab.bases import BASES; [b.resolution for b in BASES if b.family == 'sdxl']; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_embedded_bases_resolution_is_what_its_files_say() -> None:
    unet, vae = (json.loads((ASSETS / "tiny-sdxl" / part / "config.json").read_text()) for part in ("unet", "vae"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    assert BASES["tiny-sdxl"].resolution == unet["sample_size"] * factor
    assert BASES["sdxl"].resolution == 1024


def test_names() -> None:
    assert resolve("sdxl") is BASES["sdxl"]
    assert resolve(BASES["sdxl"].source) is BASES["sdxl"]
    local = resolve(str(ASSETS / "tiny-sdxl"))
    assert (local.family, local.vae, local.public_name) == ("sdxl", None, "tiny-sdxl")
    assert resolve("owner/some-model").source == "owner/some-model"
    assert str(ASSETS) not in BASES["tiny-sdxl"].public_name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny_sdxl", "did you mean tiny-sdxl"),
        ("model.ckpt", "pickled checkpoint"),
        ("model.PT", "pickled checkpoint"),
        ("./nothing.safetensors", "There is no file"),
        ("no such base", "Unknown base model"),
        ("a/b/c", "Unknown base model"),
        ("", "Unknown base model"),
    ],
)
def test_names_that_are_none(name: str, sentence: str) -> None:
    with pytest.raises(LabError, match=sentence):
        resolve(name)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"holds no model_index\.json"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(LabError, match="not a whole diffusers folder"):
        _ = resolve(str(tmp_path)).resolution
    with pytest.raises(LabError, match="could not be loaded as a Stable Diffusion XL pipeline"):
        resolve(str(tmp_path)).load("cpu")


def test_a_broken_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(LabError, match="could not be loaded"):
        resolve(str(path)).load("cpu")


def test_a_pickle_inside_a_folder_is_refused(small_sdxl: Any, tmp_path: Path) -> None:
    """A folder whose UNet is only there as a pickle does not load: it is never opened."""
    import shutil

    import torch

    folder = tmp_path / "model"
    shutil.copytree(small_sdxl.source, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(LabError, match="could not be loaded"):
        resolve(str(folder)).load("cpu")


def test_weights_are_frozen_and_shared(small_sdxl: Any) -> None:
    pipe = small_sdxl.load()
    assert pipe is small_sdxl.load()
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    small_sdxl.forget()
    assert pipe is not small_sdxl.load()


def test_a_hub_that_cannot_be_reached_is_told_as_that(tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    from lab.bases._sdxl import _sentence

    error = OSError("no file named config.json")
    error.__cause__ = LocalEntryNotFoundError("no connection")
    assert "check the network" in _sentence("owner/name", error)
    assert "no file named config.json" in _sentence(str(tmp_path), error)  # a folder needs no network
    assert "check the network" in _sentence("owner/name", OSError("the model is not fully cached locally"))
