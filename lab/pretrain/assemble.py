"""Stage "assemble": the averaged weights as fp16 folders: a diffusers pipeline and its open_clip sibling."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lab.errors import LabError
from lab.pretrain import card, clip, unet, vae
from lab.pretrain.common import ASSETS, facts_of, home
from lab.pretrain.sprites import Sprites, load_sprites

LIMIT_BYTES = 60_000_000
TOKENIZERS = ("tiny-sdxl/tokenizer", "tiny-sdxl/tokenizer_2")


def _halves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().half().contiguous().cpu() for key, value in state.items() if value.is_floating_point()}


def text_tower_of(model: Any) -> dict[str, torch.Tensor]:
    """The open_clip text tower's weights under transformers' CLIPTextModelWithProjection names."""
    state = model.state_dict()
    out = {
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.final_layer_norm.weight": state["ln_final.weight"],
        "text_model.final_layer_norm.bias": state["ln_final.bias"],
        "text_projection.weight": state["text_projection"].T,
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(len(model.transformer.resblocks)):
        old, new = f"transformer.resblocks.{i}.", f"text_model.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for part, name in parts.items():
                out[f"{new}{name}.{kind}"] = state[f"{old}{part}.{kind}"]
            stacked = state[f"{old}attn.in_proj_{kind}"].chunk(3)
            for letter, value in zip("qkv", stacked, strict=True):
                out[f"{new}self_attn.{letter}_proj.{kind}"] = value
    return out


def _small_tower(model: Any) -> dict[str, torch.Tensor]:
    """The small tower without its projection: text_encoder is a CLIPTextModel."""
    return {key: value for key, value in model.state_dict().items() if key != "text_projection.weight"}


def _write_text_encoder(folder: Path, state: dict[str, torch.Tensor], architecture: str, embed: int) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig

    layers = 1 + max(int(key.split(".")[3]) for key in state if ".layers." in key)
    width = state["text_model.final_layer_norm.weight"].shape[0]
    # dtype float32: transformers loads in the dtype named here, and the other parts of the pipeline load so.
    config = CLIPTextConfig(
        vocab_size=clip.VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=clip.CONTEXT,
        hidden_act="quick_gelu",
        projection_dim=embed,
        bos_token_id=8512,
        eos_token_id=8513,
        pad_token_id=0,
        dtype="float32",
        architectures=[architecture],
    )
    config.save_pretrained(folder)
    save_file(_halves(state), folder / "model.safetensors", metadata={"format": "pt"})


def write_pipeline(folder: Path, towers: clip.Towers, auto: Any, net: Any, scale: float) -> None:
    """A folder that StableDiffusionXLPipeline.from_pretrained loads."""
    from diffusers import EulerDiscreteScheduler

    embed = towers.clip.text_projection.shape[1]
    _write_text_encoder(folder / "text_encoder", _small_tower(towers.small), "CLIPTextModel", embed)
    _write_text_encoder(folder / "text_encoder_2", text_tower_of(towers.clip), "CLIPTextModelWithProjection", embed)
    auto.register_to_config(scaling_factor=scale)
    auto.half().save_pretrained(folder / "vae")
    net.half().save_pretrained(folder / "unet")
    scheduler: Any = EulerDiscreteScheduler(**unet.SCHEDULER)
    scheduler.save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ASSETS / "tiny-sdxl" / name, folder / name)
    shutil.copy(ASSETS / "tiny-sdxl" / "model_index.json", folder / "model_index.json")


def write_open_clip(folder: Path, model: Any, config: dict) -> None:
    """A folder that open_clip loads as "local-dir:"."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(_halves(model.state_dict()), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    old = json.loads((ASSETS / "tiny-clip" / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps({**old, "model_cfg": config}, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny-clip" / name, folder / name)


def _facts() -> dict[str, dict]:
    """Steps, seconds and parameters of each stage, with what the weights it started from had behind them."""
    facts = facts_of(ASSETS)  # of a stage that was not run here
    for stage in ("clip", "vae", "decoder", "image", "unet"):
        path = home() / f"{stage}.pt"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            earlier = state.get("earlier", {})
            facts[stage] = {
                "steps": state["step"] + earlier.get("steps", 0),
                "seconds": round(state["seconds"] + earlier.get("seconds", 0)),
                "parameters": sum(v.numel() for v in state["model"].values()),
            }
    return facts


def assemble(
    into: Path,
    sprites: Sprites | None = None,
    towers: clip.Towers | None = None,
    auto: Any = None,
    size: dict | None = None,
    config: dict | None = None,
) -> Path:
    """Write `into`/tiny-sdxl and `into`/tiny-clip; what was there is replaced only once the new is whole."""
    for stage in ("clip", "vae", "unet"):
        if not (home() / f"{stage}.pt").exists():
            raise LabError(f'Nothing to assemble yet: run the stage "{stage}" first.')
    made: Any = unet.frozen("clip", towers or clip.Towers())
    if (home() / "image.pt").exists():
        made.clip.visual = unet.frozen("image", made.clip.visual)
    auto = auto or vae.build()
    scale = vae.scaling_factor(unet.frozen("vae", auto), sprites or load_sprites())
    auto = unet.frozen(vae.last_stage(), auto)
    conditions = unet.Conditions(made)
    side = auto.config.sample_size // 2 ** (len(auto.config.block_out_channels) - 1)
    net = unet.frozen(
        "unet", unet.build(auto.config.latent_channels, side, conditions.width, conditions.pooled_width, size)
    )
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as aside:
        write_pipeline(Path(aside) / "tiny-sdxl", made, auto, net, scale)
        write_open_clip(Path(aside) / "tiny-clip", made.clip, config or clip.CONFIG)
        (Path(aside) / "tiny-sdxl" / "training.json").write_text(json.dumps(_facts(), indent=1) + "\n")
        card.write(Path(aside) / "tiny-sdxl")
        total = sum(p.stat().st_size for p in Path(aside).rglob("*") if p.is_file())
        if total > LIMIT_BYTES:
            raise LabError(
                f"The folders hold {total / 1e6:.1f} MB, above the limit of {LIMIT_BYTES / 1e6:.0f} MB: "
                "choose smaller models."
            )
        for source in sorted(Path(aside).rglob("*")):
            if source.is_file():  # file by file: a reader sees each file whole, old or new
                target = into / source.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.replace(target)
    print(f"assemble: {total / 1e6:.1f} MB", flush=True)
    return into
