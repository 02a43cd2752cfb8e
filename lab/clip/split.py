"""Fused attention taken apart: q, k, v and out become linear layers, so that every adapter can reach them.

open_clip holds q, k and v in one parameter (`nn.MultiheadAttention.in_proj_weight`), timm in one linear layer
(`attn.qkv`). The outputs stay equal to 1e-6 in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer around a copy of these tensors (out, in), (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer


def _thirds(weight: torch.Tensor, bias: torch.Tensor | None) -> list[nn.Linear]:
    """(3d, n) stacked q, k, v → three linear layers (d, n)."""
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [_linear(w, b) for w, b in zip(weight.chunk(3), biases, strict=True)]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Attention over (b, heads, t, d), with an additive mask.

    In bf16 on a processor it is written out: torch's fused kernel takes 2 to 5 times as long there, forward and backward
    (measured on AVX512-BF16 for 65 and 197 tokens). In fp32 the fused one is as fast.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores if mask is None else scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ v


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` with separate projections. Call it the same way; attention weights are not returned."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.batch_first = fused.num_heads, fused.dropout, fused.batch_first
        if fused.in_proj_weight is not None:
            self.q_proj, self.k_proj, self.v_proj = _thirds(fused.in_proj_weight, fused.in_proj_bias)
        else:  # keys and values of other widths (attentional pooling)
            biases = [None] * 3 if fused.in_proj_bias is None else fused.in_proj_bias.chunk(3)
            weights = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
            self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (b, t, d) → (b, heads, t, d / heads)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, None]:
        """(b, t, d) each, or (t, b, d) without batch_first → ((b, t, d), None). Masks as in `nn.MultiheadAttention`."""
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:  # (b · heads, t, s)
            mask = mask.unflatten(0, (-1, self.num_heads))
        padding = _additive(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding[:, None, None, :]
            mask = padding if mask is None else mask + padding
        x = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        x = self.out_proj(x.transpose(1, 2).flatten(2))
        return (x if self.batch_first else x.transpose(0, 1)), None


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """True, or -inf, where a key is hidden → -inf there, in `dtype`."""
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class SplitOwnAttention(nn.Module):
    """open_clip's own `Attention` (norms on q and k, scaled heads) with separate projections."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = _thirds(fused.in_proj_weight, fused.in_proj_bias)
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.ln_q, self.ln_k, self.ln_inner = fused.ln_q, fused.ln_k, fused.ln_inner
        self.head_scale, self.num_heads = fused.head_scale, fused.num_heads
        self.attn_drop, self.out_drop = fused.attn_drop, fused.out_drop

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(b, t, d) → (b, t, d)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        dropout = self.attn_drop.p if self.training else 0.0
        attended = attend(self.ln_q(q), self.ln_k(k), v, mask, dropout)
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))


class SplitLinear(nn.Module):
    """timm's `attn.qkv`: three linear layers whose outputs are laid side by side, as the fused one's are."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = _thirds(fused.weight, fused.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, n) → (…, 3d)."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def _split(module: nn.Module) -> nn.Module | None:
    """The module that replaces this one, or None where there is nothing to take apart."""
    if isinstance(module, nn.MultiheadAttention) and module.bias_k is None and not module.add_zero_attn:
        return SplitAttention(module)
    own = type(module).__module__.startswith("open_clip.") and type(module).__name__ == "Attention"
    if own and getattr(module, "logit_scale", None) is None:
        return SplitOwnAttention(module)
    return None


def split_attention(model: nn.Module) -> int:
    """Replace every fused attention of `model` in place; returns how many were. Training flags carry over."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = _split(child)
            # timm: only where the attention calls `self.qkv(x)`; some variants read its weight instead.
            timm = type(parent).__module__.startswith("timm.") and type(parent).__name__ == "Attention"
            if new is None and timm and name == "qkv" and isinstance(child, nn.Linear):
                new = SplitLinear(child)
                if child.weight.device.type == "cpu":  # as in `attend`
                    vars(parent)["fused_attn"] = False
            if new is not None:
                setattr(parent, name, new.train(child.training))
                count += 1
    return count
