"""Names of an SDXL pipeline's layers in kohya's LoRA files: the UNet's follow the original (sgm) model's modules, the
text encoders' those of transformers.

The UNet's map is the inverse of diffusers' `_maybe_map_sgm_blocks_to_diffusers` and of sd-scripts'
`sdxl_model_util.make_unet_conversion_map`; L is the UNet's `layers_per_block` (2 in SDXL). `lab.adapter_files` reads
these names.
"""

from __future__ import annotations

import re

from lab.errors import LabError

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def sgm_name(layer: str, layers_a_block: int = 2) -> str:
    """Dotted name in the original model of a layer of diffusers' UNet. Raises LabError on a name that has none."""
    if layer in _OUTSIDE:
        return _OUTSIDE[layer]
    match = re.fullmatch(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\.(\w+)\.(\d+)\.(.+)", layer)
    if not match:
        raise LabError(f"Layer {layer} has no name in the kohya layout: export it in another one.")
    down, up, part, j, rest = match[2], match[3], match[4], int(match[5]), match[6]
    length = layers_a_block + 1
    if part == "downsamplers":
        return f"input_blocks.{length * (int(down) + 1)}.0.op"
    if part == "upsamplers":  # after the block's last attention where it has one; SDXL's and the lab's up blocks do
        return f"output_blocks.{length * int(up) + layers_a_block}.2.conv"
    if down is not None:
        block = f"input_blocks.{length * int(down) + j + 1}"
    elif up is not None:
        block = f"output_blocks.{length * int(up) + j}"
    else:
        return f"middle_block.{1 if part == 'attentions' else 2 * j}.{_inside(part, rest)}"
    return f"{block}.{1 if part == 'attentions' else 0}.{_inside(part, rest)}"


def _inside(part: str, rest: str) -> str:
    return _IN_RESNET.get(rest, rest) if part == "resnets" else rest


def kohya_name(layer: str, layers_a_block: int = 2) -> str:
    """The layer's name in the file: `lora_unet_…`, the original name with underscores, or `lora_te1_…`, `lora_te2_…`.

    layer: the UNet's, bare or after `unet.`, or a text encoder's after `text_encoder.` or `text_encoder_2.`
    """
    for part, start in (("text_encoder_2.", "lora_te2_"), ("text_encoder.", "lora_te1_")):
        if layer.startswith(part):
            return start + in_text_model(layer.removeprefix(part)).replace(".", "_")
    return "lora_unet_" + sgm_name(layer.removeprefix("unet."), layers_a_block).replace(".", "_")


def in_text_model(layer: str) -> str:
    """A text encoder's layer as every file names it: transformers 5.6 took the `text_model.` out of the first one's."""
    return f"text_model.{layer}" if layer.startswith(("encoder.", "embeddings.", "final_layer_norm")) else layer
