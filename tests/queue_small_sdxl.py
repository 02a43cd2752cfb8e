"""Registers the folder that SMALL_SDXL names as the base "small-sdxl", in a training process: LAB_EXTRA_TASKS names this
module."""

from __future__ import annotations

import os
from pathlib import Path

from lab.bases import BASES
from tests import small_sdxl

if "small-sdxl" not in BASES:
    small_sdxl.register(Path(os.environ["SMALL_SDXL"]))
