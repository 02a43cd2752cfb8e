"""The configurations that the shipped layer tables were made from, for tests that build the models again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from lab import architectures


def configuration(id: str) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("configurations", architectures.FOLDER / "configurations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.ARCHITECTURES[id]["config"]
    return json.loads(config.read_text()) if isinstance(config, Path) else config
