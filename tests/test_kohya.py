"""kohya's names, key by key, for every layer of SDXL at its real size (on the meta device: shapes and names alone)."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch

from lab.adapter_files import _names
from lab.errors import LabError
from lab.kohya import kohya_name, sgm_name
from lab.single_file import CONFIGURATION

PARTS = ("unet", "text_encoder", "text_encoder_2")


@cache
def layers(part: str) -> dict[str, tuple[int, ...]]:
    """Every linear and convolution layer's weight shape, of the published configuration."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = json.loads((CONFIGURATION / part / "config.json").read_text())
    with torch.device("meta"):
        if part == "unet":
            model: Any = UNet2DConditionModel.from_config(config)
        else:
            kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            model = kind(CLIPTextConfig.from_dict(config))
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def sd_scripts_map() -> list[tuple[str, str]]:
    """(sgm prefix, diffusers prefix), as `sdxl_model_util.make_unet_conversion_map` of kohya-ss/sd-scripts lists them."""
    pairs = []
    for i in range(3):
        for j in range(2):
            pairs.append((f"input_blocks.{3 * i + j + 1}.0.", f"down_blocks.{i}.resnets.{j}."))
            pairs.append((f"input_blocks.{3 * i + j + 1}.1.", f"down_blocks.{i}.attentions.{j}."))
        for j in range(3):
            pairs.append((f"output_blocks.{3 * i + j}.0.", f"up_blocks.{i}.resnets.{j}."))
            pairs.append((f"output_blocks.{3 * i + j}.1.", f"up_blocks.{i}.attentions.{j}."))
        pairs.append((f"input_blocks.{3 * (i + 1)}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."))
        pairs.append((f"output_blocks.{3 * i + 2}.2.", f"up_blocks.{i}.upsamplers.0."))
    pairs.append(("middle_block.1.", "mid_block.attentions.0."))
    pairs += [(f"middle_block.{2 * j}.", f"mid_block.resnets.{j}.") for j in range(2)]
    pairs += [(f"time_embed.{j * 2}.", f"time_embedding.linear_{j + 1}.") for j in range(2)]
    pairs += [(f"label_emb.0.{j * 2}.", f"add_embedding.linear_{j + 1}.") for j in range(2)]
    return [*pairs, ("input_blocks.0.0.", "conv_in."), ("out.0.", "conv_norm_out."), ("out.2.", "conv_out.")]


RESNET = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("emb_layers.1.", "time_emb_proj."),
    ("skip_connection.", "conv_shortcut."),
]


def by_sd_scripts(layer: str) -> str:
    ((sgm, start),) = [(s, d) for s, d in sd_scripts_map() if f"{layer}.".startswith(d)]
    rest = f"{layer}.".removeprefix(start)
    if ".resnets." in layer:
        rest = next(s for s, d in RESNET if rest == d)
    return (sgm + rest).rstrip(".")


def test_there_are_as_many_layers_as_in_the_published_model() -> None:
    assert {part: len(layers(part)) for part in PARTS} == {"unet": 794, "text_encoder": 72, "text_encoder_2": 193}


def test_every_unet_layer_has_sd_scripts_name() -> None:
    for layer in layers("unet"):
        assert sgm_name(layer) == by_sd_scripts(layer), layer
        assert kohya_name(layer) == kohya_name(f"unet.{layer}") == f"lora_unet_{by_sd_scripts(layer).replace('.', '_')}"


@pytest.mark.parametrize(("part", "start"), [("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")])
def test_every_text_encoder_layer_has_sd_scripts_name(part: str, start: str) -> None:
    """sd-scripts names a layer by its path in transformers' model, which had `text_model.` in both encoders."""
    for layer in layers(part):
        path = layer if layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"
        assert kohya_name(f"{part}.{layer}") == start + path.replace(".", "_")
    names = {kohya_name(f"{part}.{layer}") for layer in layers(part)}
    assert f"{start}text_model_encoder_layers_0_self_attn_q_proj" in names
    assert f"{start}text_model_encoder_layers_0_mlp_fc1" in names


def test_no_two_layers_share_a_name_and_each_is_read_back() -> None:
    full = [f"{part}.{layer}" for part in PARTS for layer in layers(part)]
    names = {kohya_name(layer): layer for layer in full}
    assert len(names) == len(full) == 1059
    for name, layer in names.items():
        part, _, inner = layer.partition(".")
        path = inner if part == "unet" or inner.startswith("text_") else f"text_model.{inner}"
        assert _names.layer(name) == (path if part == "unet" else f"{part}.{path}")


def test_comfyui_finds_every_layer() -> None:
    """ComfyUI (`comfy/lora.py`, model_lora_keys_unet and _clip): the checkpoint's own keys with underscores after
    `lora_unet_`; of the encoders, `lora_te{1,2}_text_model_encoder_layers_N_` and transformers' names."""
    keys = {f"lora_unet_{by_sd_scripts(layer).replace('.', '_')}" for layer in layers("unet")}
    inside = ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")))
    for number, depth in ((1, 12), (2, 32)):
        keys |= {
            f"lora_te{number}_text_model_encoder_layers_{n}_{name.replace('.', '_')}"
            for n in range(depth)
            for name in inside
        }
    keys.add("lora_te2_text_projection")
    assert {kohya_name(f"{part}.{layer}") for part in PARTS for layer in layers(part)} == keys


def test_a1111_finds_every_layer() -> None:
    """A1111 (`extensions-builtin/Lora/networks.py`, convert_diffusers_name_to_compvis, and the modules' names of its
    sgm model with underscores; q, k and v of the second encoder are parts of `attn_in_proj`)."""
    modules = {f"diffusion_model_{by_sd_scripts(layer).replace('.', '_')}" for layer in layers("unet")}
    modules |= {
        f"0_transformer_text_model_encoder_layers_{n}_{name}"
        for n in range(12)
        for name in ("mlp_fc1", "mlp_fc2", *(f"self_attn_{p}_proj" for p in ("q", "k", "v", "out")))
    }
    modules |= {
        f"1_model_transformer_resblocks_{n}_{name}"
        for n in range(32)
        for name in ("mlp_c_fc", "mlp_c_proj", "attn", "attn_out_proj")
    }

    def looked_up(key: str) -> str:
        if match := re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", key):
            rest = match[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
            return f"1_model_transformer_resblocks_{match[1]}_{re.sub(r'_[qkv]_proj$', '', rest)}"
        if match := re.fullmatch(r"lora_te1_text_model_encoder_layers_(\d+)_(.+)", key):
            return f"0_transformer_text_model_encoder_layers_{match[1]}_{match[2]}"
        return key.replace("lora_unet", "diffusion_model")

    for part in PARTS:
        for layer in layers(part):
            if layer != "text_projection":  # which A1111 reads no adapter of
                assert looked_up(kohya_name(f"{part}.{layer}")) in modules, layer


def test_diffusers_reads_every_layer_back() -> None:
    """The whole pipeline's LoRA in kohya's names through diffusers' own converter: every layer, its rank and shapes."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    state = {}
    for part in PARTS:
        for layer, shape in layers(part).items():
            if layer in ("conv_in", "conv_out", "text_projection") or "_embedding" in layer:
                continue  # which diffusers' converter does not know in kohya's names
            name, kernel = kohya_name(f"{part}.{layer}"), shape[2:]
            state[f"{name}.lora_down.weight"] = torch.zeros(1, shape[1], *kernel, device="meta")
            state[f"{name}.lora_up.weight"] = torch.zeros(shape[0], 1, *(1 for _ in kernel), device="meta")
            state[f"{name}.alpha"] = torch.tensor(1.0)
    config = json.loads((CONFIGURATION / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    found, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=unet.config)
    read = {_names.layer(stem) for key in found if (stem := (_names.split(key) or ("", ""))[0])}
    written = {_names.layer(key.removesuffix(".alpha")) for key in state if key.endswith(".alpha")}
    assert read == written
    assert len(read) == len(alphas) == len(state) // 3 == 1059 - 7


def test_names_that_have_none() -> None:
    with pytest.raises(LabError, match=r"text\.q_proj has no name in the kohya layout"):
        kohya_name("text.q_proj")
