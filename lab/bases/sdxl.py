"""Stable Diffusion XL 1.0 (Podell et al., arXiv 2307.01952), with the VAE that does not overflow in fp16."""

from lab.bases import Base, register

FIXED_VAE = "madebyollin/sdxl-vae-fp16-fix"
PRESETS = {
    # NoRA paper, section 4: learning rate 1e-4, batch 4, 500 steps, 50 sampling steps.
    "subject": {
        "steps": 500,
        "batch": 4,
        "sampling_steps": 50,
        "guidance": 7.5,
        "checkpoint_every": 50,
        "preview_every": 50,
        "gradient_checkpointing": True,
        "prompts": [
            "a {subject} in the snow",
            "a {subject} on the beach",
            "a {subject} at night under the stars",
            "a {subject} in the jungle",
        ],
    },
    "learning_rates": {"lora": 1e-4, "nora": 1e-4},
}

register(
    Base(
        id="sdxl",
        name="Stable Diffusion XL 1.0",
        family="sdxl",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        variant="fp16",
        vae=FIXED_VAE,
        architecture="sdxl-unet",
        pixels=1024,
        summary="The full model: 2.6 billion parameters in the UNet; wants a GPU.",
        megabytes=7110,
        licence="CreativeML Open RAIL++-M",
        presets=PRESETS,
        order=20,
    )
)
