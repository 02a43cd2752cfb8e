"""Names of tensors in the layouts that are around → (layer as the base calls it, what the tensor is).

Layers of the UNet keep diffusers' names without a prefix; those of the text encoders begin with `text_encoder.` or
`text_encoder_2.`, then transformers' name as files write it (`text_model.encoder.layers.0.self_attn.q_proj`).
`lab.kohya` holds the map to kohya's names; here it is read the other way.
"""

from __future__ import annotations

import re

from lab.kohya import in_text_model

# Endings of tensors' names → what they are. Longest first: "x.lora.down.weight" also ends in ".down.weight".
_ENDINGS = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid", ".lora_A": "down", ".lora_B": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector": "magnitude", ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.default.weight": "magnitude", ".alpha": "alpha", ".diff": "diff",
    **{f".{k}": k for k in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{k}": k for k in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}  # fmt: skip
_ENDING = re.compile(f"(?:{'|'.join(re.escape(e) for e in sorted(_ENDINGS, key=len, reverse=True))})$")

_TEXT = {"lora_te_": "text_encoder.", "lora_te1_": "text_encoder.", "lora_te2_": "text_encoder_2.",
         "lora_te3_": "text_encoder_3."}  # fmt: skip
_UNET = ("lora_unet_", "lycoris_", "lora_transformer_")

# Words that hold an underscore themselves; everything else in a kohya name is cut at every underscore.
_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "proj_in", "proj_out",
    "to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context",
    "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "time_embedding", "add_embedding", "linear_1", "linear_2",
    "text_model", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "input_blocks",
    "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection", "time_embed",
    "label_emb", "token_embedding", "position_embedding", "final_layer_norm", "layer_norm1", "layer_norm2",
    "proj_mlp", "x_embedder", "context_embedder", "time_text_embed", "norm_out", "norm1_context",
)  # fmt: skip
_WORD = re.compile("|".join(sorted(_WORDS, key=len, reverse=True)) + r"|[^_]+")

_SGM = re.compile(r"(input_blocks\.(\d+)|middle_block|output_blocks\.(\d+))\.(\d+)\.(.+)")
_SGM_OUTSIDE = {
    "input_blocks.0.0": "conv_in", "out.2": "conv_out", "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2", "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_SGM_RESNET = {
    "in_layers.2": "conv1", "out_layers.3": "conv2", "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1", "out_layers.0": "norm2",
}  # fmt: skip


def split(key: str) -> tuple[str, str] | None:
    """("unet.….to_q", "down") of a tensor's name, or None when its ending is not known."""
    found = _ENDING.search(key)
    return (key[: found.start()], _ENDINGS[found.group()]) if found else None


def dotted(name: str) -> str:
    """kohya's underscores as the dots they were: `attn1_to_out_0` → `attn1.to_out.0`."""
    return ".".join(_WORD.findall(name))


def layout(stem: str) -> str:
    """Which program's spelling a name has: kohya, lycoris, diffusers, peft or plain."""
    if stem.startswith((*_UNET, *_TEXT)) and "." not in stem:
        return "kohya"
    if stem.startswith("base_model.model."):
        return "peft"
    return "diffusers" if stem.startswith(("unet.", "text_encoder", "transformer.")) else "plain"


def layer(stem: str, layers_a_block: int = 2) -> str:
    """The layer that a tensor belongs to, from its name without the ending.

    `layers_a_block`: of the UNet, for names that count sgm's blocks (2 in SD and SDXL).
    """
    if layout(stem) == "kohya":
        for prefix, part in _TEXT.items():
            if stem.startswith(prefix):
                return part + dotted(stem.removeprefix(prefix))
        prefix = next(p for p in _UNET if stem.startswith(p))
        return unet_layer(dotted(stem.removeprefix(prefix)), layers_a_block)
    stem = stem.removeprefix("base_model.model.")
    for prefix in ("unet.", "diffusion_model.", "model.diffusion_model."):
        if stem.startswith(prefix):
            return unet_layer(_without_processor(stem.removeprefix(prefix)), layers_a_block)
    if stem.startswith("text_encoder"):
        part, _, inner = _without_processor(stem, ("q_proj", "k_proj", "v_proj", "out_proj")).partition(".")
        return f"{part}.{in_text_model(inner)}"
    return unet_layer(_without_processor(stem), layers_a_block)


def _without_processor(name: str, inside: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")) -> str:
    """diffusers' older names: `attn1.processor.to_out` (its ending was `_lora.down.weight`) → `attn1.to_out.0`."""
    for old, new in zip(("to_q", "to_k", "to_v", "to_out"), inside, strict=True):
        if name.endswith(f".processor.{old}"):
            return name.removesuffix(f".processor.{old}") + f".{new}"
        if name.endswith(f"self_attn.{old}"):
            return name.removesuffix(old) + new
    return name


def unet_layer(name: str, layers_a_block: int = 2) -> str:
    """diffusers' name of a UNet layer that may be spelled in sgm's blocks; other names come back as they are."""
    if name in _SGM_OUTSIDE:
        return _SGM_OUTSIDE[name]
    if downsampler := re.fullmatch(r"input_blocks\.(\d+)\.0\.op", name):
        return f"down_blocks.{int(downsampler[1]) // (layers_a_block + 1) - 1}.downsamplers.0.conv"
    if upsampler := re.fullmatch(r"output_blocks\.(\d+)\.[12]\.conv", name):
        return f"up_blocks.{int(upsampler[1]) // (layers_a_block + 1)}.upsamplers.0.conv"
    found = _SGM.fullmatch(name)
    if not found:
        return name
    down, up, inner, rest = found[2], found[3], int(found[4]), found[5]
    length = layers_a_block + 1
    if down is None and up is None:
        return f"mid_block.attentions.0.{rest}" if inner == 1 else f"mid_block.resnets.{inner // 2}.{_resnet(rest)}"
    kind, rest = ("attentions", rest) if inner == 1 else ("resnets", _resnet(rest))
    if down is not None:
        block, j = divmod(int(down) - 1, length)
        return f"down_blocks.{block}.{kind}.{j}.{rest}"
    block, j = divmod(int(up), length)
    return f"up_blocks.{block}.{kind}.{j}.{rest}"


def _resnet(rest: str) -> str:
    return _SGM_RESNET.get(rest, rest)


def counts_blocks(stem: str) -> bool:
    """Whether the name counts sgm's blocks, so that it means another layer with another `layers_a_block`."""
    return bool(re.search(r"(?:input|output)_blocks[._]\d", stem))
