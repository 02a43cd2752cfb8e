"""A random-weight SDXL of real size, in the hub's format: every part as released, with numbers that mean nothing.

The tokenizers are the embedded base's (a part of CLIP's vocabulary, with other numbers), for want of the released ones.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lab.bases import ASSETS

HEAD = """# SDXL at its real size, measured and estimated

`python -m lab bench sdxl_real --write`, `… sdxl_memory --write`, `… sdxl_block --write`.
"""
VAE = {  # stabilityai/stable-diffusion-xl-base-1.0, vae/config.json
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
SCHEDULER = {  # scheduler/scheduler_config.json
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
}


def configurations() -> dict[str, dict[str, Any]]:
    """The released configurations by architecture id, as the layer tables are made from."""
    path = ASSETS / "architectures" / "configurations.py"
    spec: Any = importlib.util.spec_from_file_location("lab_released_configurations", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {id: entry["config"] for id, entry in module.ARCHITECTURES.items()}


def build(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the folder unless it is there already, one part at a time; about 7 GB in bf16."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    known = configurations()
    words = {"bos_token_id": 0, "eos_token_id": _end_of_text(), "pad_token_id": 1}
    first: Any = known["sdxl-te1"] | words
    second: Any = known["sdxl-te2"] | words
    parts: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel.from_config(known["sdxl-unet"]),
        "vae": lambda: AutoencoderKL.from_config(VAE),
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
    scheduler: Any = EulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.save_pretrained(folder / "scheduler")
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
