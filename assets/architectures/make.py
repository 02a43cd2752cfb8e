"""Write the layer tables: every model's published configuration, built on the meta device.

    python assets/architectures/make.py                        all of them (about a minute)
    python assets/architectures/make.py tiny-sdxl tiny-clip    the embedded bases, after they were trained anew

No weights are downloaded: the configurations stand in configurations.py beside this file; those of the embedded
bases are read from assets/.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from lab import layer_tables  # noqa: E402


def _configurations() -> dict[str, dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("configurations", HERE / "configurations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ARCHITECTURES


def table(id: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The table of one architecture, as saved."""
    import torch

    config = entry["config"]
    if isinstance(config, Path):
        config = json.loads(config.read_text())
    if callable(config):
        with torch.device("meta"):
            model = config()
    else:
        model = layer_tables.build(config)
    rows = layer_tables.rows(model)
    head = {"id": id, "order": entry["order"], "parameters": layer_tables.parameters(model)}
    head |= {k: entry[k] for k in ("name", "library", "source", "note", "companions", "unit")}
    head["memory"] = {}
    return {**head, "fields": list(layer_tables.FIELDS), "layers": layer_tables.pack(rows)}


def write(id: str, made: dict[str, Any]) -> None:
    """One layer a line, so that a changed configuration shows as a readable difference."""
    layers = ",\n".join(json.dumps(row, separators=(",", ":")) for row in made["layers"])
    head = json.dumps({k: v for k, v in made.items() if k != "layers"}, indent=1, ensure_ascii=False)
    (HERE / f"{id}.json").write_text(f'{head[:-2]},\n "layers": [\n{layers}\n ]\n}}\n', encoding="utf-8")


def main(ids: list[str]) -> None:
    entries = _configurations()
    for id in ids or list(entries):
        if id not in entries:
            sys.exit(f"Unknown architecture '{id}': choose from {', '.join(entries)}.")
        made = table(id, entries[id])
        write(id, made)
        print(f"{id:16s} {made['parameters']:>15,} parameters, {len(made['layers'])} layers")


if __name__ == "__main__":
    main(sys.argv[1:])
