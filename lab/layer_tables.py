"""Layer tables from models built on the meta device: shapes without weights, and without anybody's code.

`assets/architectures/make.py` and the reading of uploaded configurations share this. Imports torch inside functions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.targets import role_of

if TYPE_CHECKING:
    import torch

FIELDS = ("name", "role", "out", "in", "kernel", "bias", "part", "block", "tokens", "grows", "input", "kept")
_BLOCK = re.compile(r"^(.*?\.?(?:\d+|mid_block))\.")


def build(config: dict[str, Any]) -> torch.nn.Module:
    """The model that a transformers, diffusers or open_clip configuration describes, on the meta device.

    No weights are made or fetched and no code but the installed libraries' runs. Raises LabError on a model type
    that they do not know and on values that they do not accept.
    """
    import torch

    make = _diffusers if "_class_name" in config else _open_clip if "model_cfg" in config else _transformers
    try:
        with torch.device("meta"):
            return make(plain(config)).eval()
    except LabError:
        raise
    except Exception as error:  # whatever a library raises on values that it did not expect
        raise LabError(f"No model could be built from this configuration: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a library said, in one sentence of ours or the first of its own."""
    said = " ".join(str(error).split())
    if isinstance(error, PermissionError) or "offline" in said.lower():
        return (
            "it asks for other files to be fetched, and a configuration alone is read here; paste the layers' shapes."
        )
    if "Unrecognized configuration class" in said:
        return "it is made of other models, which the lab does not put together; paste the layers' shapes."
    first = said.split(". ")[0] or type(error).__name__
    return first if len(first) <= 160 else first[:159] + "…"


# What names somebody's code, kernels or weights, at any depth.
_FOREIGN = {"auto_map", "trust_remote_code", "custom_pipelines", "quantization_config", "_name_or_path", "name_or_path"}
_FOREIGN |= {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_pre_quantization_dtype"}


def plain(config: Any) -> Any:
    """The configuration without what its library would fetch or run for it."""
    if isinstance(config, list):
        return [plain(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {key: plain(value) for key, value in config.items() if key not in _FOREIGN}
    return kept | {key: False for key in kept if key.startswith(("use_pretrained", "pretrained"))}


def _diffusers(config: dict[str, Any]) -> torch.nn.Module:
    import diffusers

    name = str(config["_class_name"])
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise LabError(f"'{name}' is not a model that diffusers {diffusers.__version__} knows.")
    return cls.from_config(config)


def _open_clip(config: dict[str, Any]) -> torch.nn.Module:
    from open_clip import CLIP

    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    given = {k: v for k, v in config["model_cfg"].items() if k in known}
    given["text_cfg"] = {k: v for k, v in given["text_cfg"].items() if not k.startswith(("hf_", "tokenizer"))}
    return CLIP(**given)


def _transformers(config: dict[str, Any]) -> torch.nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise LabError(
            f"transformers {transformers.__version__} knows no model type '{kind}': code that a configuration names"
            " (auto_map) is never run; paste the layers' shapes instead."
        )
    drop = ("model_type", "torch_dtype", "dtype", "transformers_version")
    parsed = CONFIG_MAPPING[kind].from_dict({k: v for k, v in config.items() if k not in drop})
    for name in config.get("architectures") or []:
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls(parsed)
    return transformers.AutoModel.from_config(parsed)


def rows(model: torch.nn.Module) -> list[dict[str, Any]]:
    """One row a linear, Conv1D or convolution layer whose name has a role (lab/targets.py), in model order.

    A layer's `block` counts the blocks of its tower (`part`: vision, text or "") from 0; in a UNet: down, mid, up.
    `nn.MultiheadAttention` (open_clip) is listed as the four layers that the lab splits it into.
    """
    found = [row for name, module in model.named_modules() for row in _rows_of(name, module)]
    if len({row["part"] for row in found}) == 1:
        found = [{**row, "part": ""} for row in found]
    for part in {row["part"] for row in found}:
        mine = [row for row in found if row["part"] == part]
        labels = sorted({_block_label(row["name"]) for row in mine} - {""}, key=_block_order) or [""]
        for row in mine:
            label = _block_label(row["name"]) or labels[-1 if row["name"].endswith("_out") else 0]
            row["block"] = labels.index(label)
    return found


def _rows_of(name: str, module: torch.nn.Module) -> list[dict[str, Any]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.MultiheadAttention) and module.in_proj_weight is not None:
        d = module.embed_dim
        return [_row(f"{name}.{x}_proj", d, d, None, module.in_proj_bias is not None) for x in "qkv"]
    if not role_of(name):
        return []
    if isinstance(module, torch.nn.Linear):
        return [_row(name, module.out_features, module.in_features, None, module.bias is not None)]
    if isinstance(module, Conv1D):
        return [_row(name, module.nf, module.nx, None, True)]
    if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
        kernel = [int(k) for k in module.kernel_size]
        return [_row(name, module.out_channels, module.in_channels, kernel, module.bias is not None)]
    return []


def _row(name: str, out: int, in_: int, kernel: list[int] | None, bias: bool) -> dict[str, Any]:
    top = name.split(".")[0]
    part = "vision" if top.startswith("vis") else "text" if top in ("text_model", "text", "transformer_text") else ""
    if top == "transformer" and ".resblocks." in name:  # open_clip's text tower
        part = "text"
    row = dict.fromkeys(FIELDS)
    row.update({"name": name, "role": role_of(name), "out": int(out), "in": int(in_), "kernel": kernel})
    row.update({"bias": int(bias), "part": part, "block": 0, "tokens": 0, "grows": 0, "input": -1, "kept": 0})
    return row


def _block_label(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group(1) if found else ""


def _block_order(label: str) -> tuple[int, list[Any]]:
    """Down, mid and up blocks of a UNet; elsewhere by number."""
    places = {"down_blocks": 0, "transformer_blocks": 0, "mid_block": 1, "single_transformer_blocks": 1, "up_blocks": 2}
    pieces = label.split(".")
    return places.get(pieces[0], 0), [int(p) if p.isdigit() else 0 for p in pieces]


def parameters(model: torch.nn.Module) -> int:
    """Parameters of the model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def pack(rows_: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[f] for f in FIELDS] for row in rows_]
