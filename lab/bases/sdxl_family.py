"""Models of SDXL's structure that differ from it in size, in how they are sampled, or in what they predict.

Any other fine-tune of SDXL needs no row: its Hub id, folder or file is enough.
"""

from typing import Any

from lab.bases import Base, register
from lab.bases.sdxl import FIXED_VAE, PRESETS


def _presets(**subject: Any) -> dict[str, dict[str, Any]]:
    """SDXL's, with these settings of the subject task in their places."""
    return PRESETS | {"subject": PRESETS["subject"] | subject}


register(
    Base(
        id="ssd-1b",
        name="SSD-1B",
        family="sdxl",
        source="segmind/SSD-1B",
        variant="fp16",
        vae=FIXED_VAE,
        architecture="ssd-1b",
        pixels=1024,
        summary="SDXL with blocks left out and distilled (Gupta et al., arXiv 2401.02677): half its size, 1.6 times its speed.",
        licence="Apache-2.0",
        megabytes=4620,
        presets=_presets(guidance=9.0),  # its model card's
        order=21,
    )
)
register(
    Base(
        id="sdxl-turbo",
        name="SDXL Turbo",
        family="sdxl",
        source="stabilityai/sdxl-turbo",
        variant="fp16",
        vae=FIXED_VAE,
        architecture="sdxl-unet",
        pixels=512,
        summary=(
            "SDXL distilled to 1 to 4 sampling steps without guidance (Sauer et al., arXiv 2311.17042), at 512 pixels; "
            "long training with the plain loss takes that back."
        ),
        licence="Stability AI Non-Commercial Research Community License",
        megabytes=7110,
        presets=_presets(sampling_steps=4, guidance=0.0),
        order=22,
    )
)
register(
    Base(
        id="playground-v2.5",
        name="Playground v2.5",
        family="sdxl",
        source="playgroundai/playground-v2.5-1024px-aesthetic",
        variant="fp16",
        architecture="sdxl-unet",
        pixels=1024,
        summary=(
            "SDXL's network trained anew in EDM's formulation (Li et al., arXiv 2402.17245): a schedule and latents of "
            "its own, which training and sampling both keep to."
        ),
        licence="Playground v2.5 Community License",
        megabytes=6940,
        presets=_presets(guidance=3.0),  # its model card's
        order=23,
    )
)
