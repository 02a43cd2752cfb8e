"""SDXL with all of its layers and few channels: the same names in the same files as the published model's.

`build` writes it in diffusers' layout, `single_file` as the one file that ComfyUI and A1111 keep.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lab import single_file as reader
from lab.kohya import sgm_name

NARROW: dict[str, dict[str, Any]] = {
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": 80,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 48,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 32},
    "text_encoder_2": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2, "projection_dim": 48},
}


def configuration(folder: Path) -> Path:
    """A copy of `assets/sdxl` with fewer channels."""
    shutil.copytree(reader.CONFIGURATION, folder)
    for part, changes in NARROW.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def pipeline(folder: Path) -> Any:
    """A random-weight pipeline of the narrow configuration in this folder, with its tokenizers."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    words = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    texts = [CLIPTextConfig.from_pretrained(folder / name) for name in ("text_encoder", "text_encoder_2")]
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        text_encoder=CLIPTextModel(texts[0]),
        text_encoder_2=CLIPTextModelWithProjection(texts[1]),
        tokenizer=words[0],
        tokenizer_2=words[1],
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
        scheduler=EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        add_watermarker=False,
    )


def build(folder: Path, aside: Path) -> Any:
    """Write a diffusers folder; the pipeline. `aside`: a folder for the configuration."""
    narrow = configuration(aside)
    reader.write_configuration(reader.Checkpoint("epsilon", False, False, True), aside / "whole")
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(aside / "whole" / part, narrow / part, dirs_exist_ok=True)
    shutil.rmtree(aside / "whole")
    pipe = pipeline(narrow)
    pipe.save_pretrained(folder)
    return pipe


# -- the original names --------------------------------------------------------------------------------
def original(pipe: Any) -> dict[str, torch.Tensor]:
    """The pipeline's weights under their names in the original code."""
    found = {f"{reader.UNET}{_unet(key)}": value for key, value in pipe.unet.state_dict().items()}
    found |= {f"{reader.VAE}{_vae(key)}": _as_conv(key, value) for key, value in pipe.vae.state_dict().items()}
    first = {re.sub(r"^text_model\.", "", key): value for key, value in pipe.text_encoder.state_dict().items()}
    found |= {f"{reader.TEXT[0]}{key}": value for key, value in first.items()}
    found |= {f"{reader.TEXT[1]}{key}": value for key, value in _open_clip(pipe.text_encoder_2.state_dict()).items()}
    return {key: value.contiguous() for key, value in found.items()}


def single_file(pipe: Any, path: Path, more: dict[str, torch.Tensor] | None = None, without: str = "\0") -> Path:
    """Write the pipeline as one file. `without`: the start of names to leave out."""
    from safetensors.torch import save_file

    tensors = {k: v for k, v in original(pipe).items() if not k.startswith(without)}
    save_file(tensors | (more or {}), path)
    return path


def _unet(key: str) -> str:
    layer, _, kind = key.rpartition(".")
    if layer == "conv_norm_out":
        return f"out.0.{kind}"
    name = sgm_name(layer)
    if ".resnets." in layer:
        name = re.sub(r"\.norm1$", ".in_layers.0", re.sub(r"\.norm2$", ".out_layers.0", name))
    return f"{name}.{kind}"


def _vae(key: str) -> str:
    for pattern, new in (
        (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
        (r"^encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
        (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"decoder.up.{3 - int(m[1])}.block.{m[2]}"),
        (r"^decoder\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        (r"\.to_out\.0", ".proj_out"),
        (r"\.to_([qkv])", r".\1"),
    ):
        key = re.sub(pattern, new, key)
    return key


def _as_conv(key: str, value: torch.Tensor) -> torch.Tensor:
    return value[:, :, None, None] if re.search(r"attentions\.0\.to_.*weight$", key) else value


def _open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {"logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        key = key.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", key):
            if match[2] == "q":
                others = [state[f"text_model.{key.replace('q_proj', f'{letter}_proj')}"] for letter in "kv"]
                found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat([value, *others])
            continue
        for old, new in (
            ("encoder.layers.", "transformer.resblocks."),
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("final_layer_norm", "ln_final"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            key = key.replace(old, new)
        found["text_projection" if key == "text_projection.weight" else key] = (
            value.T if key == "text_projection.weight" else value
        )
    return found
