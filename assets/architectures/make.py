"""Write the layer tables: every model's published configuration, built on the meta device.

    python assets/architectures/make.py                        all of them (some minutes)
    python assets/architectures/make.py tiny-sdxl tiny-clip    the embedded bases, after they were trained anew

No weights are downloaded: the configurations stand in configurations.py beside this file; those of the embedded
bases are read from assets/.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
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

    def make() -> torch.nn.Module:
        if callable(config):
            with torch.device("meta"):
                return config()
        return layer_tables.build(config)

    model = make()
    rows = layer_tables.rows(model)
    head = {"id": id, "order": entry["order"], "parameters": layer_tables.parameters(model)}
    head |= {k: entry[k] for k in ("name", "library", "source", "note", "companions")}
    head["unit"] = _unit(model, entry["unit"], config)
    head["memory"] = _memory(make, rows, head["unit"])
    return {**head, "fields": list(layer_tables.FIELDS), "layers": layer_tables.pack(rows)}


# -- one training sample -------------------------------------------------------------------------------
def _unit(model: Any, unit: dict[str, Any], config: Any) -> dict[str, Any]:
    """What one sample is: pixels a side (and pixels a latent), text tokens. Read off the model where it is ours."""
    unit = {**unit, "latent": 8}
    kind = type(model).__name__
    if unit["kind"] == "image" and not unit["side"]:
        if kind == "UNet2DConditionModel":
            vae = json.loads((HERE.parent / "tiny-sdxl/vae/config.json").read_text())
            text = json.loads((HERE.parent / "tiny-sdxl/text_encoder/config.json").read_text())
            unit["latent"] = 2 ** (len(vae["block_out_channels"]) - 1)
            unit |= {"side": model.config.sample_size * unit["latent"], "tokens": text["max_position_embeddings"]}
        else:
            unit |= {"side": config["model_cfg"]["vision_cfg"]["image_size"]}
            unit |= {"tokens": config["model_cfg"]["text_cfg"]["context_length"]}
    if unit["kind"] == "text" and not unit["tokens"]:
        unit["tokens"] = model.config.max_position_embeddings
    return unit


def _sample(model: Any, unit: dict[str, Any], share: float) -> dict[str, Any]:
    """Inputs of one sample; `share` of the full size a side (images of diffusion models) or of the tokens (texts)."""
    import torch

    kind = type(model).__name__
    side = int(unit["side"] * share) // unit["latent"]
    if kind == "UNet2DConditionModel":
        c = model.config
        words = torch.zeros(1, unit["tokens"], c.cross_attention_dim)
        found = {
            "sample": torch.zeros(1, c.in_channels, side, side),
            "timestep": torch.zeros(1, dtype=torch.long),
        }
        if c.addition_embed_type == "text_time":
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            extra = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)}
            found["added_cond_kwargs"] = extra
        return {**found, "encoder_hidden_states": words}
    if kind == "FluxTransformer2DModel":
        c, places = model.config, (side // 2) ** 2
        return {
            "hidden_states": torch.zeros(1, places, c.in_channels),
            "encoder_hidden_states": torch.zeros(1, unit["tokens"], c.joint_attention_dim),
            "pooled_projections": torch.zeros(1, c.pooled_projection_dim),
            "timestep": torch.zeros(1),
            "guidance": torch.ones(1),
            "img_ids": torch.zeros(places, 3),
            "txt_ids": torch.zeros(unit["tokens"], 3),
        }
    pixels = torch.zeros(1, 3, unit["side"], unit["side"])
    words = torch.zeros(1, max(1, int(unit["tokens"] * share)), dtype=torch.long)
    if kind == "CLIPModel":
        return {"input_ids": words, "pixel_values": pixels}
    if kind == "CLIP":
        return {"image": pixels, "text": torch.zeros(1, unit["tokens"], dtype=torch.long)}
    if kind == "VisionTransformer":
        return {"x": pixels}
    if kind == "Dinov2Model":
        return {"pixel_values": pixels}
    return {"input_ids": words, **({"labels": words} if kind.endswith(("ForCausalLM", "LMHeadModel")) else {})}


def _memory(make: Callable[[], Any], rows: list[dict[str, Any]], unit: dict[str, Any]) -> dict[str, Any]:
    """What one sample leaves in memory, at its full size and at half of it (a side for images): straight lines in
    between, since attention keeps no square of tokens. Writes each layer's tokens into its row."""
    from lab.activations import trace

    found: dict[str, Any] = {}
    names = [name for row in rows for name in (row["name"], _fused(row["name"]))]
    roles = {"linear": ("q", "k", "v", "qkv", "out", "up", "down", "gate"), "conv": ("conv",)}
    for key, wanted in roles.items():
        start = {row["name"] for row in rows if row["role"] in wanted}
        if not start:
            continue
        full, half = (trace(make, lambda m, s=s: _sample(m, unit, s), names, start=start) for s in (1.0, 0.5))
        found[key] = {"kept": [full.kept, half.kept], "peak": [full.peak, half.peak]}
        if key == "linear" or "linear" not in found:
            for row in rows:
                name = row["name"] if row["name"] in full.inputs else _fused(row["name"])
                tokens, number, kept = full.inputs.get(name, (0, -1, False))
                other = half.inputs.get(name, (0, -1, False))[0]
                row |= {"tokens": tokens, "grows": int(other != tokens), "input": number, "kept": int(kept)}
    return found


def _fused(name: str) -> str:
    """The attention module that open_clip's q_proj, k_proj, v_proj and out_proj are fused into."""
    return name.rpartition(".")[0] if name.endswith("_proj") else name


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
