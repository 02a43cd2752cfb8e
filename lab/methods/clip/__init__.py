"""Few-shot methods that exist for CLIP alone. ADD ONE: one file in this folder that registers a `ClipMethod`.

They have a registry of their own, because a diffusion model has no use for them; the few-shot task offers them beside
every adapter of `lab.methods.METHODS`. Files here import torch inside functions only.
"""

from __future__ import annotations

from lab.clip.method import BRIEFLY, BY_SHOTS, ClipMethod, Recipe
from lab.registry import Registry

CLIP_METHODS: Registry[ClipMethod] = Registry("few-shot method", "lab.methods.clip")
register = CLIP_METHODS.register

__all__ = ["BRIEFLY", "BY_SHOTS", "CLIP_METHODS", "ClipMethod", "Recipe", "register"]
