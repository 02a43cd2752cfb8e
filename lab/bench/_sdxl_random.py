"""A random-weight SDXL of real size, in the hub's format: every part as released, with numbers that mean nothing.

The tokenizers are the embedded base's (a part of CLIP's vocabulary, with other numbers), for want of the released ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lab.bases import ASSETS

HEAD = """# SDXL at its real size, measured and estimated

`python -m lab bench sdxl_real --write`, `… sdxl_memory --write`, `… sdxl_block --write`.
"""
RELEASED = ASSETS / "sdxl"


def released(part: str) -> dict[str, Any]:
    """A part's configuration as released with SDXL 1.0."""
    return json.loads((RELEASED / part / "config.json").read_text(encoding="utf-8"))


def build(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the folder unless it is there already, one part at a time; about 7 GB in bf16."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    words = {"bos_token_id": 0, "eos_token_id": _end_of_text(), "pad_token_id": 1}
    first: Any = released("text_encoder") | words
    second: Any = released("text_encoder_2") | words
    parts: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel.from_config(released("unet")),
        "vae": lambda: AutoencoderKL.from_config(released("vae")),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**first)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**second)),
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # made in it at once: in fp32 the UNet alone would take 10 GB
    try:
        for name, make in parts.items():
            made = make()
            made.to(dtype).save_pretrained(folder / name, max_shard_size="20GB")
            del made
    finally:
        torch.set_default_dtype(before)
    shutil.copytree(RELEASED / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ASSETS / "tiny-sdxl" / name, folder / name, dirs_exist_ok=True)
        config = folder / name / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 77}))
    index = json.loads((ASSETS / "tiny-sdxl" / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))  # last: a folder with an index is whole
    return folder


def _end_of_text() -> int:
    from transformers import CLIPTokenizer

    return int(CLIPTokenizer.from_pretrained(ASSETS / "tiny-sdxl" / "tokenizer").eos_token_id)
