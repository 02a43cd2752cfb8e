"""Image-text models for the few-shot task, and image models with a linear head for NOLA's vision protocol.

Any other open_clip model needs no row: `lab.clip.bases.resolve` takes "NAME:TAG", "NAME:file.safetensors",
"hf-hub:OWNER/NAME", "timm:NAME", or a folder with open_clip_config.json.
"""

import json

from lab.bases import ASSETS, Base, register

_TINY = ASSETS / "tiny-clip"

register(
    Base(
        id="tiny-clip",
        name="Tiny CLIP (embedded)",
        family="open_clip",
        source=str(_TINY),
        architecture="tiny-clip",
        targets="q,k,v",
        pixels=json.loads((_TINY / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"],
        summary="open_clip's structure at 64 pixels, trained beside Tiny SDXL: a run takes seconds on two processor cores.",
        licence="Apache-2.0; trained on Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0) and Fluent Emoji (MIT)",
        presets={
            "fewshot": {
                "preset": "short",
                # Where the preset's 3e-3 is not the method's: `python -m lab bench fewshot_sweep`.
                "learning_rates": {
                    "lora": 1e-2,
                    "nora": 5e-3,
                    "nola": 2e-2,
                    "vera": 5e-2,
                    "adalora": 1e-2,
                    "lora-fa": 2e-2,
                },
            }
        },
        order=11,
    )
)

for _order, (_name, _tag, _what) in enumerate(
    [
        ("ViT-B-16", "openai", "CLIP ViT-B/16, the backbone of the paper's Table 2: 150 million parameters."),
        ("ViT-B-32", "openai", "CLIP ViT-B/32: the fastest of the full-sized ones."),
        ("ViT-L-14", "openai", "CLIP ViT-L/14: 428 million parameters; wants a GPU."),
        ("ViT-B-16", "laion2b_s34b_b88k", "OpenCLIP ViT-B/16 trained on LAION-2B."),
    ]
):
    register(
        Base(
            id=f"{_name}:{_tag}",
            name=f"{_name.replace('-', '/').replace('ViT/', 'CLIP ViT-')} ({_tag})",
            family="open_clip",
            source=f"{_name}-quickgelu:{_tag}" if _tag == "openai" else f"{_name}:{_tag}",
            architecture=f"clip-{_name.lower()}",
            targets="q,k,v",
            pixels=224,
            summary=_what,
            licence="MIT",
            presets={"fewshot": {"preset": "clip-lora"}},
            order=30 + _order,
        )
    )

for _order, (_name, _what) in enumerate(
    [
        ("vit_base_patch16_224.augreg_in21k", "ViT-B/16 trained on ImageNet-21k, as in NOLA's vision protocol."),
        ("vit_large_patch16_224.augreg_in21k", "ViT-L/16 trained on ImageNet-21k; wants a GPU."),
    ]
):
    register(
        Base(
            id=f"timm:{_name}",
            name=f"{_name.split('.')[0]} (timm)",
            family="open_clip",
            source=f"timm:{_name}",
            architecture="vit-b-16" if "base" in _name else "vit-l-16",
            targets="q,v",
            pixels=224,
            summary=_what,
            licence="Apache-2.0",
            presets={"fewshot": {"preset": "nola"}},
            order=40 + _order,
        )
    )
