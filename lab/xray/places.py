"""Where in a network a layer stands: its block and its projection, from its name alone. No torch."""

from __future__ import annotations

import re

# What a projection is called after the block's own number; longest first, because "to_out.0" and "net.0.proj" hold numbers.
_INNER = re.compile(
    r"\.((?:(?:attn\d?|self_attn|attention|cross_attn|mlp|ff|ff_context)\.)?"
    r"(?:to_q|to_k|to_v|to_out\.0|to_add_out|add_[qkv]_proj|[qkvo]_proj|out_proj|in_proj|qkv|proj|c_fc|c_proj|c_attn"
    r"|net\.0\.proj|net\.2|fc1|fc2|gate_proj|up_proj|down_proj|conv\d?|conv_shortcut|time_emb_proj|proj_in|proj_out"
    r"|linear_?\d?|dense))$"
)
_SHORT = (
    (r"^text_encoder\.text_model\.encoder\.layers\.", "text 1 · "),
    (r"^text_encoder_2\.text_model\.encoder\.layers\.", "text 2 · "),
    (r"^text_model\.encoder\.layers\.", "text · "),
    (r"^vision_model\.encoder\.layers\.", "vision · "),
    (r"^visual\.(?:trunk\.|transformer\.)?(?:resblocks|blocks)\.", "vision · "),
    (r"^(?:transformer\.)?resblocks\.", "text · "),
    (r"^(?:\w+\.)*layers\.", "layer "),
    (r"^blocks\.", "block "),
    (r"^transformer\.h\.", "layer "),
    (r"^(?:transformer\.)?single_transformer_blocks\.", "single "),
    (r"^(?:transformer\.)?transformer_blocks\.", "double "),
    (r"^down_blocks\.(\d+)\.", r"down \1 · "),
    (r"^up_blocks\.(\d+)\.", r"up \1 · "),
    (r"^mid_block\.", "mid · "),
    (r"attentions\.(\d+)\.transformer_blocks\.(\d+)$", r"\1.\2"),
    (r"attentions\.(\d+)$", r"\1"),
    (r"resnets\.(\d+)$", r"res \1"),
    (r"downsamplers\.0$", "down"),
    (r"upsamplers\.0$", "up"),
)
_PARTS = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out")
_ORDER = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
    "attn2.to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "ff.net.0.proj", "ff.net.2", "fc1", "fc2", "c_fc",
    "c_proj", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv",
)  # fmt: skip


def place(layer: str) -> tuple[str, str]:
    """(block, projection) as a map's column and row: "down 1 · 0.3", "attn1.to_q". A layer outside all blocks is its own
    block."""
    found = _INNER.search(layer)
    if found and found.start() > 0:
        return short(layer[: found.start()]), found.group(1)
    head, _, tail = layer.rpartition(".")
    return (short(head), tail) if head else (layer, "conv" if layer.startswith("conv") else "weight")


def short(block: str) -> str:
    """A block's name as people write it beside an axis."""
    for pattern, text in _SHORT:
        block = re.sub(pattern, text, block)
    return block


def order(layer: str) -> tuple[object, ...]:
    """Sorts layers as data pass through them, the UNet before the text encoders."""
    first = layer.split(".")[0]
    part = _PARTS.index(first) if first in _PARTS else len(_PARTS)
    at = -1.0
    if found := re.search(r"\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.", layer):
        at = int(found[2]) + {"resnets": 0.0, "attentions": 0.5}.get(found[1], 99.0)
    head = re.match(r"(?:down|up)_blocks\.(\d+)", layer)
    pieces = tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in layer.split("."))
    return (layer.startswith("text_encoder"), part, int(head[1]) if head else 0, at, pieces)


def rank_of(projection: str) -> tuple[int, str]:
    """Sorts projections as the map shows them."""
    tail = next((i for i, name in enumerate(_ORDER) if projection == name or projection.endswith(f".{name}")), 99)
    return tail, projection
