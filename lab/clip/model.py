"""An image-text model, or an image model, ready for few-shot tuning: attention split, frozen, with its own
preprocessing and tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lab.clip.split import split_attention
from lab.errors import LabError

if TYPE_CHECKING:
    from lab.bases import Base

RANDOM = "random"  # weights tag: start values drawn from seed 0 (benchmarks, tests)


@dataclass
class Clip:
    """model: open_clip's CLIP or a timm model without its classifier; frozen, in eval mode.
    mean, std, size, interpolation, squash: how a picture becomes (3, size, size); `squash` ignores its proportions,
    otherwise the shorter side is fitted and the middle is cut out. tokenize: texts → ids (n, length); None: no text.
    """

    model: Any  # nn.Module; what lies in it differs from model to model
    name: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False
    tokenize: Callable[[list[str]], torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def has_text(self) -> bool:
        return self.tokenize is not None

    @property
    def scale(self) -> float:
        """What cosines are multiplied by to become logits: the model's learned inverse temperature (100 for images)."""
        return float(self.model.logit_scale.exp().reshape(-1)[0]) if self.has_text else 1.0

    def copy(self) -> Clip:
        """The same with weights of its own, for methods that change them."""
        return dataclasses.replace(self, model=copy.deepcopy(self.model))


def load(base: Base, device: torch.device | None = None) -> Clip:
    """The model that a row of family "open_clip" names, in fp32. Raises LabError when it cannot be had."""
    from lab import device as devices

    source = base.source
    made = _timm(source.removeprefix("timm:")) if source.startswith("timm:") else _open_clip(source)
    model = made.model.to(device or devices.pick()).float().eval().requires_grad_(False)
    split_attention(model)
    made.name = base.id
    return made


def _open_clip(source: str) -> Clip:
    """`folder` with open_clip_config.json, `name:weights` (a pretrained tag or a file), or `hf-hub:owner/name`."""
    import open_clip

    folder = Path(source)
    local = folder.is_dir()
    name, _, weights = (f"local-dir:{source}", "", "") if local else _parts(source)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _created(open_clip, name, weights)
            tokenize = open_clip.get_tokenizer(name)
    except LabError:
        raise
    except Exception as error:
        raise LabError(
            f"The model '{source}' could not be loaded ({type(error).__name__}): check the name, the weights, "
            "and whether this machine may download them."
        ) from error
    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    if local:  # the file says it; open_clip fills in defaults
        config |= json.loads((folder / "open_clip_config.json").read_text()).get("preprocess_cfg", {})
    return Clip(
        model=model,
        name=source,
        size=size[0] if isinstance(size, (tuple, list)) else size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation", "bicubic"),
        squash=config.get("resize_mode") == "squash",
        tokenize=tokenize,
    )


def _parts(source: str) -> tuple[str, str, str]:
    """ "ViT-B-16:openai" → its parts; "hf-hub:owner/name" stays whole."""
    return (source, "", "") if source.startswith("hf-hub:") else source.partition(":")


def _created(open_clip: Any, name: str, weights: str) -> nn.Module:
    hub = name.startswith(("hf-hub:", "local-dir:"))
    if not hub and name not in open_clip.list_models():
        from lab.registry import unknown

        raise unknown("open_clip model", name, open_clip.list_models())
    if weights.lower().endswith((".pt", ".pth", ".bin", ".ckpt", ".pkl")):
        raise LabError(f"'{Path(weights).name}' is a pickled checkpoint, which can run any code: use .safetensors.")
    pretrained = None if hub or weights == RANDOM else weights
    if not hub and not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:6])
        raise LabError(f"Which weights of {name}? Write {name}:TAG with a tag such as {tags}, or {name}:{RANDOM}.")
    return open_clip.create_model(name, pretrained=pretrained)


def _timm(source: str) -> Clip:
    """`name` (its default weights), `name:random`, or `name:file.safetensors`."""
    import timm
    import timm.data

    name, _, weights = source.partition(":")
    if not timm.is_model(name.split(".")[0]):
        raise LabError(f"timm has no model '{name}': `timm.list_models()` names them, e.g. vit_base_patch16_224.")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            overlay = {"file": weights} if weights not in ("", RANDOM) else None
            model = timm.create_model(name, pretrained=weights != RANDOM, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:
        raise LabError(
            f"The timm model '{source}' could not be loaded ({type(error).__name__}): check the name and whether this "
            "machine may download its weights."
        ) from error
    config = timm.data.resolve_model_data_config(model)
    return Clip(model, source, config["input_size"][-1], config["mean"], config["std"], config["interpolation"])
