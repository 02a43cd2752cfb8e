"""A random-weight SDXL of 16 pixels: everything has SDXL's structure and nothing its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lab.bases import ASSETS, BASES, Base

VOCABULARY = 8514  # of the tokenizer in assets/tiny-sdxl, whose files the pipeline uses
WIDTH = 32


def build(folder: Path, prediction: str = "v_prediction", zero_snr: bool = True) -> Path:
    """Write a diffusers folder."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tiny-sdxl" / "tokenizer")
    words = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
    )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**words)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**words)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def register(folder: Path, id: str = "small-sdxl") -> Base:
    """A row for the folder, scored by the embedded CLIP; `unregister` takes it out again."""
    return BASES.register(
        Base(
            id=id,
            name=id,
            family="sdxl",
            source=str(folder),
            architecture="tiny-sdxl",
            scorer=str(ASSETS / "tiny-clip"),
            presets={"knobs": {"nora": {"r_outer": 0.5, "r_inner": 2}, "lora": {"r": 2}}},
        )
    )


def unregister(id: str = "small-sdxl") -> None:
    BASES._members.pop(id)


def pictures(count: int = 3, size: tuple[int, int] = (24, 20)) -> list[Image.Image]:
    """Discs of one colour on backgrounds of others."""
    drawn = []
    for i in range(count):
        picture = Image.new("RGB", size, (40 * i, 200 - 30 * i, 120))
        ImageDraw.Draw(picture).ellipse((5 + i, 4, 17 + i, 16), fill=(240, 140, 30))
        drawn.append(picture)
    return drawn


def spec(**changes: Any) -> dict[str, Any]:
    """The smallest comparison worth running."""
    small = {
        "base": "small-sdxl",
        "class_word": "fox",
        "methods": {"lora": {}},
        "seeds": [0],
        "steps": 4,
        "batch": 2,
        "prompts": ["a {subject} in the snow"],
        "unrelated_prompts": [],
        "sample_seeds": [0, 1],
        "sampling_steps": 2,
        "checkpoint_every": 2,
        "preview_every": 0,
    }
    return small | changes
