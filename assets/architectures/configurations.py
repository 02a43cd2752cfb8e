"""The published configurations that the layer tables are made from: the values that decide shapes, as released.

`unit` says what one training sample is for the memory estimate: an image of so many pixels a side, or a text of so
many tokens (make.py passes such a sample through the model without computing anything).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent.parent
ARCHITECTURES: dict[str, dict[str, Any]] = {}

FUSED_GPT2 = (
    "Query, key and value are one fused layer (c_attn). Asked for all three, it is counted whole, as PEFT adapts it; "
    "asked for some of them, each is counted as a square layer of its own, as the LoRA and NOLA papers adapt it."
)
FUSED_TIMM = (
    "Query, key and value are one fused layer (attn.qkv). Asked for all three, it is counted whole, as PEFT adapts it "
    "and as the NOLA paper's count of LoRA fits; asked for some of them, each is a square layer of its own."
)


def add(
    id: str,
    name: str,
    config: Any,
    *,
    library: str,
    source: str,
    unit: dict[str, Any],
    note: str = "",
    companions: tuple[str, ...] = (),
) -> None:
    entry = {"name": name, "config": config, "library": library, "source": source, "unit": unit, "note": note}
    ARCHITECTURES[id] = {**entry, "companions": list(companions), "order": len(ARCHITECTURES)}


def image(side: int, tokens: int = 0) -> dict[str, Any]:
    return {"kind": "image", "side": side, "tokens": tokens}


def text(tokens: int) -> dict[str, Any]:
    return {"kind": "text", "side": 0, "tokens": tokens}


# -- diffusion models ----------------------------------------------------------------------------------
_SDXL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
add(
    "sdxl-unet",
    "SDXL 1.0 UNet",
    _SDXL,
    library="diffusers",
    source="stabilityai/stable-diffusion-xl-base-1.0, unet/config.json",
    unit=image(1024, 77),
    companions=("sdxl-te1", "sdxl-te2"),
)
_CLIP_L_TEXT = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
add(
    "sdxl-te1",
    "SDXL text encoder 1 (CLIP ViT-L)",
    _CLIP_L_TEXT,
    library="transformers",
    source="stabilityai/stable-diffusion-xl-base-1.0, text_encoder/config.json; the text encoder of SD 1.5 and FLUX too",
    unit=text(77),
)
add(
    "sdxl-te2",
    "SDXL text encoder 2 (OpenCLIP bigG)",
    {
        **_CLIP_L_TEXT,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    library="transformers",
    source="stabilityai/stable-diffusion-xl-base-1.0, text_encoder_2/config.json",
    unit=text(77),
)
add(
    "sd15-unet",
    "Stable Diffusion 1.5 UNet",
    {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    library="diffusers",
    source="stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json",
    unit=image(512, 77),
    companions=("sdxl-te1",),
)
add(
    "ssd-1b",
    "SSD-1B UNet",
    {
        **_SDXL,
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    library="diffusers",
    source="segmind/SSD-1B, unet/config.json (depths as ComfyUI detects them: 2 2 4 4, none in the middle, 4 4 10 2 1 1)",
    unit=image(1024, 77),
    companions=("sdxl-te1", "sdxl-te2"),
)
add(
    "flux1-dev",
    "FLUX.1-dev transformer",
    {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    library="diffusers",
    source="black-forest-labs/FLUX.1-dev, transformer/config.json",
    unit=image(1024, 512),
    note=(
        "In the 38 single blocks one fused layer (proj_out) takes attention's output and the MLP's together: it is counted "
        "as down. The default list of layers in diffusers' training scripts leaves it out."
    ),
    companions=("sdxl-te1",),
)


# -- CLIP and vision transformers ------------------------------------------------------------------------
def clip(patch: int, vision: tuple[int, int, int], words: tuple[int, int, int], projection: int) -> dict[str, Any]:
    """CLIPModel's configuration; a tower is (width, layers, heads), its MLP four times as wide (bigG's vision: 8192)."""

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        inner = 8192 if width == 1664 else 4 * width
        sizes = {"hidden_size": width, "intermediate_size": inner, "projection_dim": projection}
        return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}

    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": projection,
        "text_config": {**tower(*words), "vocab_size": 49408, "max_position_embeddings": 77},
        "vision_config": {**tower(*vision), "image_size": 224, "patch_size": patch},
    }


_BASE, _LARGE = (768, 12, 12), (1024, 24, 16)
for _id, _name, _config, _source in (
    ("clip-vit-b16", "CLIP ViT-B/16", clip(16, _BASE, (512, 12, 8), 512), "openai/clip-vit-base-patch16"),
    ("clip-vit-b32", "CLIP ViT-B/32", clip(32, _BASE, (512, 12, 8), 512), "openai/clip-vit-base-patch32"),
    ("clip-vit-l14", "CLIP ViT-L/14", clip(14, _LARGE, _BASE, 768), "openai/clip-vit-large-patch14"),
    (
        "openclip-bigg14",
        "OpenCLIP ViT-bigG/14",
        clip(14, (1664, 48, 16), (1280, 32, 20), 1280),
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    ),
):
    _note = "open_clip fuses query, key and value; the lab splits them into three layers when it loads the model."
    _note = f"As transformers lays it out, with query, key and value apart: {_note}" if "bigg" in _id else ""
    add(_id, _name, _config, library="transformers", source=f"{_source}, config.json", unit=image(224, 77), note=_note)


def timm_model(name: str) -> Any:
    def make() -> Any:
        import timm

        return timm.create_model(name, pretrained=False)

    return make


for _id, _name, _timm in (
    ("vit-b16", "ViT-B/16 (timm)", "vit_base_patch16_224"),
    ("vit-l16", "ViT-L/16 (timm)", "vit_large_patch16_224"),
):
    add(_id, _name, timm_model(_timm), library="timm", source=f"timm, {_timm}", unit=image(224), note=FUSED_TIMM)
add(
    "dinov2-base",
    "DINOv2 ViT-B/14",
    {"model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"mlp_ratio": 4, "patch_size": 14, "image_size": 518},
    library="transformers",
    source="facebook/dinov2-base, config.json",
    unit=image(224),
)


# -- language models -------------------------------------------------------------------------------------
def language(
    id: str, name: str, kind: str, model: str, source: str, tokens: int = 512, note: str = "", **values: Any
) -> None:
    config = {"model_type": kind, "architectures": [model], **values}
    add(id, name, config, library="transformers", source=f"{source}, config.json", unit=text(tokens), note=note)


for _id, _name, _width, _layers, _heads in (
    ("gpt2", "GPT-2 small", 768, 12, 12),
    ("gpt2-medium", "GPT-2 medium", 1024, 24, 16),
    ("gpt2-large", "GPT-2 large", 1280, 36, 20),
):
    language(
        _id,
        _name,
        "gpt2",
        "GPT2LMHeadModel",
        f"openai-community/{_id}",
        note=FUSED_GPT2,
        n_embd=_width,
        n_layer=_layers,
        n_head=_heads,
        vocab_size=50257,
        n_positions=1024,
    )
for _id, _name, _width, _layers, _heads in (
    ("roberta-base", "RoBERTa base", 768, 12, 12),
    ("roberta-large", "RoBERTa large", 1024, 24, 16),
):
    language(
        _id,
        _name,
        "roberta",
        "RobertaModel",
        f"FacebookAI/{_id}",
        tokens=128,
        hidden_size=_width,
        num_hidden_layers=_layers,
        num_attention_heads=_heads,
        intermediate_size=4 * _width,
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


def llama(id: str, name: str, source: str, sizes: tuple[int, int, int, int, int, int], **values: Any) -> None:
    """sizes: hidden, MLP, layers, heads, key-value heads, vocabulary."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    settings = {"tie_word_embeddings": False, **dict(zip((*keys, "vocab_size"), sizes, strict=True)), **values}
    kind = str(settings.pop("kind", "llama"))
    model = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
    language(id, name, kind, model, source, **settings)


llama("llama-7b", "LLaMA 7B", "huggyllama/llama-7b", (4096, 11008, 32, 32, 32, 32000))
llama("llama-13b", "LLaMA 13B", "huggyllama/llama-13b", (5120, 13824, 40, 40, 40, 32000))
llama("llama2-7b", "LLaMA-2 7B", "meta-llama/Llama-2-7b-hf", (4096, 11008, 32, 32, 32, 32000))
llama("llama2-13b", "LLaMA-2 13B", "meta-llama/Llama-2-13b-hf", (5120, 13824, 40, 40, 40, 32000))
llama("llama2-70b", "LLaMA-2 70B", "meta-llama/Llama-2-70b-hf", (8192, 28672, 80, 64, 8, 32000))
llama("llama3-8b", "LLaMA-3 8B", "meta-llama/Meta-Llama-3-8B", (4096, 14336, 32, 32, 8, 128256))
llama("mistral-7b", "Mistral 7B", "mistralai/Mistral-7B-v0.1", (4096, 14336, 32, 32, 8, 32000), kind="mistral")
llama("qwen2.5-7b", "Qwen2.5 7B", "Qwen/Qwen2.5-7B", (3584, 18944, 28, 28, 4, 152064), kind="qwen2")


# -- the embedded bases (sizes are read from assets/, never written here) ---------------------------------
_EMBEDDED = "the base that the lab ships"
add(
    "tiny-sdxl",
    "Embedded base: UNet",
    ASSETS / "tiny-sdxl/unet/config.json",
    library="diffusers",
    source=_EMBEDDED,
    unit=image(0, 0),
    companions=("tiny-sdxl-te1", "tiny-sdxl-te2"),
)
for _n, _folder in ((1, "text_encoder"), (2, "text_encoder_2")):
    add(
        f"tiny-sdxl-te{_n}",
        f"Embedded base: text encoder {_n}",
        ASSETS / f"tiny-sdxl/{_folder}/config.json",
        library="transformers",
        source=_EMBEDDED,
        unit=text(0),
    )
add(
    "tiny-clip",
    "Embedded CLIP",
    ASSETS / "tiny-clip/open_clip_config.json",
    library="open_clip",
    source=_EMBEDDED,
    unit=image(0, 0),
    note="open_clip fuses query, key and value; the lab splits them into three layers when it loads the model.",
)
