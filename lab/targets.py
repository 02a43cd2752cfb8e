"""Names of layers, the same for every architecture: q, k, v, out, up, down, gate, conv and groups of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lab.errors import LabError
from lab.registry import unknown

if TYPE_CHECKING:
    import torch

# Suffixes of module names, as diffusers, transformers, open_clip (split) and timm write them.
ROLES: dict[str, str] = {
    "q": r"to_q|add_q_proj|q_proj|query|query_proj|q_lin|\w*(?:[aA]ttention|attn)\.q",
    "k": r"to_k|add_k_proj|k_proj|key|key_proj|k_lin|\w*(?:[aA]ttention|attn)\.k",
    "v": r"to_v|add_v_proj|v_proj|value|value_proj|v_lin|\w*(?:[aA]ttention|attn)\.v",
    "qkv": r"attn\.qkv|attn\.c_attn|qkv_proj|query_key_value|Wqkv",
    "out": r"to_out\.0|to_add_out|out_proj|o_proj|out_lin|attn\.proj|attn\.c_proj|attention\.output\.dense"
    r"|\w*(?:attention|attn)\.dense|\w*(?:[aA]ttention|attn)\.o",
    "gate": r"gate_proj",
    "up": r"up_proj|gate_up_proj|ff(?:n|_context)?\.net\.0\.proj|(?:img|txt)_mlp\.net\.0\.proj|mlp\.c_fc|mlp\.fc_in|fc1|ffn\.lin1"
    r"|intermediate\.dense|intermediate_dense|dense_h_to_4h|proj_mlp|DenseReluDense\.wi(?:_[01])?|\d+\.ffn",
    "down": r"down_proj|ff(?:n|_context)?\.net\.2|(?:img|txt)_mlp\.net\.2|mlp\.c_proj|mlp\.fc_out|fc2|ffn\.lin2"
    r"|(?<!attention\.)output\.dense|output_dense|dense_4h_to_h|DenseReluDense\.wo|ffn_output"
    r"|single_transformer_blocks\.\d+\.proj_out",  # FLUX: attention's output and the MLP's in one
    "conv": r"conv1|conv2|conv_shortcut|conv_in|conv_out|downsamplers\.\d+\.conv|upsamplers\.\d+\.conv",
}
GROUPS: dict[str, tuple[str, ...]] = {
    "attn": ("q", "k", "v", "out"),
    "mlp": ("up", "down", "gate"),
    "all": ("q", "k", "v", "out", "up", "down", "gate"),
}
NAMES = [r for r in ROLES if r != "qkv"] + list(GROUPS)
_PATTERNS = {role: re.compile(rf"(?:.*\.)?(?:{suffix})$") for role, suffix in ROLES.items()}


def role_of(module_name: str) -> str:
    """The role of a module by its dotted name, or "" when it has none."""
    return next((role for role, pattern in _PATTERNS.items() if pattern.match(module_name)), "")


def roles(targets: str | Iterable[str]) -> list[str]:
    """Roles that target names stand for: "q,v" → [q, v]; "attn" → [q, k, v, out]. Raises LabError on unknown names."""
    names = [t.strip() for t in (targets.split(",") if isinstance(targets, str) else targets) if t.strip()]
    if not names:
        raise LabError(f"No layers were chosen: name some of {', '.join(NAMES)}.")
    found: list[str] = []
    for name in names:
        if name not in NAMES:
            raise unknown("target", name, NAMES)
        found += [r for r in GROUPS.get(name, (name,)) if r not in found]
    return found


def modules(model: torch.nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Dotted names of the model's linear, Conv1D and convolution modules with these roles, in model order.

    Raises LabError, listing what exists, when nothing matches.
    """
    wanted = roles(targets)
    by_role: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and (role := role_of(name)):
            by_role.setdefault(role, []).append(name)
    found = {name for role in wanted for name in by_role.get(role, [])}
    if not found:
        raise LabError(
            f"No layer of this model is called {', '.join(wanted)}: it has {', '.join(by_role) or 'none that the lab knows'}."
        )
    return [name for name, _ in model.named_modules() if name in found]
