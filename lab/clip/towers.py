"""Features of pictures and texts, with learned prompts where a method has them.

Shapes: b pictures, c texts, t tokens, d token width of a tower, e width of the shared space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lab.clip.model import Clip
from lab.errors import LabError


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


def cosine_logits(features: torch.Tensor, weights: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """(b, e) · (c, e) → scaled cosines (b, c), in fp32: bf16 would round a logit of 20 to the nearest 1/8."""
    with torch.autocast(features.device.type, enabled=False):
        return scale * unit(features) @ unit(weights).T


def image_features(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """(b, 3, size, size) → (b, e), not normalised."""
    return clip.model.encode_image(pixels) if clip.has_text else clip.model(pixels)


# -- text ------------------------------------------------------------------------------------------------------
def text_tower(clip: Clip) -> Any:
    """The module that holds token_embedding, positional_embedding, transformer, ln_final and text_projection.

    Raises LabError for a text tower of another make (HuggingFace, with a class token), which takes no prompts.
    """
    tower = getattr(clip.model, "text", clip.model) if clip.has_text else None
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "attn_mask")
    if tower is None or not all(hasattr(tower, part) for part in parts) or getattr(tower, "cls_emb", None) is not None:
        raise LabError(f"{clip.name} has no text tower that learned prompts fit into: choose another model or method.")
    return tower


def _ends(tower: Any, ids: torch.Tensor) -> torch.Tensor:
    """(c, t) → (c,): position of the token whose output is the text's feature."""
    kind = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "argmax")
    if kind == "eos":
        return (ids == (getattr(tower, "text_eos_id", None) or tower.eos_id)).int().argmax(-1)
    if kind == "argmax":  # CLIP's end token has the highest id; its first occurrence counts
        return ids.argmax(-1)
    raise LabError(f"This model reads its texts at '{kind}', which learned prompts do not support.")


def _project(tower: Any, x: torch.Tensor) -> torch.Tensor:
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Module) else x @ projection


def prompt_features(
    clip: Clip, embeddings: torch.Tensor, ends: torch.Tensor, deep: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Token embeddings (c, t, d) without positions, end positions (c,) → (c, e), not normalised.

    deep: prompts (p, d) that replace tokens 1…p before blocks 1, 2, … (MaPLe, equation 3).
    """
    tower = text_tower(clip)
    length = embeddings.shape[1]
    x = embeddings + tower.positional_embedding[:length]
    mask = tower.attn_mask
    mask = mask[:length, :length] if mask is not None else None
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i <= len(deep):
            prompt = deep[i - 1].to(x.dtype).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], prompt, x[:, 1 + prompt.shape[1] :]], dim=1)
        x = block(x, attn_mask=mask)
    x = tower.ln_final(x)
    return _project(tower, x[torch.arange(len(x), device=x.device), ends])


def tokens(clip: Clip, texts: Sequence[str]) -> torch.Tensor:
    """Texts → ids (c, t) on the model's device. Raises LabError for a model without a text tower."""
    if clip.tokenize is None:
        raise LabError(f"{clip.name} has no text tower: choose a CLIP model, or a method that needs pictures only.")
    return clip.tokenize(list(texts)).to(clip.device)


def text_features(clip: Clip, texts: Sequence[str] | torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Texts (or ids (c, t)) → (c, e), not normalised. Padding behind the longest text is cut off: attention is causal,
    so what comes after the end token changes nothing, and short texts cost a fraction."""
    ids = texts if isinstance(texts, torch.Tensor) else tokens(clip, texts)
    try:
        tower = text_tower(clip)
        ends = _ends(tower, ids)
    except LabError:
        return torch.cat([clip.model.encode_text(part) for part in ids.split(chunk)])
    ids = ids[:, : int(ends.max()) + 1]
    parts = zip(ids.split(chunk), ends.split(chunk), strict=True)
    return torch.cat([prompt_features(clip, tower.token_embedding(part), end) for part, end in parts])


def fill(template: str, names: Sequence[str]) -> list[str]:
    """A template with "{}" → one text a class."""
    return [template.replace("{}", name.replace("_", " ")) for name in names]


def class_weights(clip: Clip, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Zero-shot classifier (c, e) with rows of length 1: the mean of a class's normalised features over templates
    (Radford et al. 2021, arXiv 2103.00020, section 3.1.4)."""
    each = torch.stack([unit(text_features(clip, fill(template, names))) for template in templates])
    return unit(each.mean(0))


@dataclass
class Prompted:
    """Class texts with a gap for learned context: [start] [context × m] [name .] [end]."""

    before: torch.Tensor  # (c, 1, d): the start token
    after: torch.Tensor  # (c, t, d): name, full stop, end, padding
    ends: torch.Tensor  # (c,): where the end token stands, m included

    def fill(self, context: torch.Tensor) -> torch.Tensor:
        """Context (m, d), or (c, m, d) → embeddings (c, 1 + m + t, d)."""
        context = context.expand(len(self.before), -1, -1) if context.dim() == 2 else context
        return torch.cat([self.before, context.to(self.before.dtype), self.after], dim=1)


def prompted(clip: Clip, names: Sequence[str], length: int) -> Prompted:
    """The class names' embeddings, with room for `length` context tokens. Raises LabError when a name is too long."""
    tower = text_tower(clip)
    ids = tokens(clip, [f"{name.replace('_', ' ')}." for name in names])
    ends = _ends(tower, ids)
    ids = ids[:, : int(ends.max()) + 1]
    room = len(tower.positional_embedding)
    if ids.shape[1] + length > room:
        longest = names[int(ends.argmax())]
        raise LabError(
            f"The class name '{longest[:60]}' and {length} context tokens do not fit into the model's {room} tokens: "
            "shorten the name, or choose fewer tokens."
        )
    with torch.no_grad():
        embedded = tower.token_embedding(ids)
    return Prompted(embedded[:, :1], embedded[:, 1:], ends + length)


def word_embeddings(clip: Clip, words: str, length: int) -> torch.Tensor | None:
    """The first `length` token embeddings (length, d) of these words, or None if there are fewer."""
    tower = text_tower(clip)
    ids = tokens(clip, [words])
    if int(_ends(tower, ids)[0]) - 1 < length:
        return None
    with torch.no_grad():
        return tower.token_embedding(ids[0, 1 : 1 + length]).clone()


# -- pictures with prompts -----------------------------------------------------------------------------------------
def vision_tower(clip: Clip) -> Any:
    """open_clip's VisionTransformer. Raises LabError for image towers of another make, which take no prompts."""
    tower = getattr(clip.model, "visual", None)
    if type(tower).__name__ != "VisionTransformer" or not hasattr(tower, "conv1"):
        raise LabError(f"{clip.name} has no vision transformer that learned prompts fit into: choose another model.")
    return tower


def prompted_image_features(
    clip: Clip, pixels: torch.Tensor, prompts: torch.Tensor, deep: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """(b, 3, size, size) with prompt tokens (p, d) behind the patches → (b, e), not normalised.

    deep: prompts (p, d) that replace these tokens before blocks 1, 2, … (MaPLe, equation 6).
    """
    tower = vision_tower(clip)
    x = tower.conv1(pixels).flatten(2).transpose(1, 2)  # (b, patches, d)
    start = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([start, x], dim=1) + tower.positional_embedding.to(x.dtype)
    x = torch.cat([x, prompts.to(x.dtype).expand(len(x), -1, -1)], dim=1)
    x = tower.ln_pre(tower.patch_dropout(x))
    for i, block in enumerate(tower.transformer.resblocks):
        if 0 < i <= len(deep):
            x = torch.cat([x[:, : -len(prompts)], deep[i - 1].to(x.dtype).expand(len(x), -1, -1)], dim=1)
        x = block(x)
    x, _ = tower._pool(x)
    return x @ tower.proj if tower.proj is not None else x
