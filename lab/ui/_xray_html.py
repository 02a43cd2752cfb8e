"""What the X-ray tab shows besides its plots, as HTML."""

from __future__ import annotations

import base64
from typing import Any

from lab.plots.xray_map import value
from lab.ui.html import e, empty, size
from lab.xray.report import as_csv

ROWS = 15
INTRO = """<div class="lab xray-intro"><h2>What does an adapter change?</h2>
<p>Yours, or one from the internet: each layer's update ΔW, its spectrum, and where it lies among the base's own directions.</p></div>"""
NOTHING = empty(
    "No adapter open",
    "Choose one of your finished runs, or send a LoRA file: .safetensors as diffusers, kohya and LyCORIS write it, a PEFT folder's two files, or a zip. Nothing in it is run.",
)
SAYS = {
    "norm": "How far each layer moves: the Frobenius norm of ΔW.",
    "effective_rank": "How many directions a layer's update spreads over: exp of the entropy of its singular values (Roy and Vetterli 2007).",
    "energy": "Each layer's part of Σ‖ΔW‖².",
    "top": "How much of ΔW lies in the top tenth of W's left singular directions; a random update has a tenth, or less where W is tall.",
    "intruders": "Of the ten first singular directions of W + ΔW, those with a cosine below 0.5 to every one of W's (Shuttleworth et al. 2024).",
}


def busy(what: str, done: int, total: int) -> str:
    told = {"opening": "Opening the adapter"}.get(what, what.capitalize())
    at = f": layer {done + 1} of {total}" if total else ""
    share = 100 * done / total if total else 0
    return f'<div class="lab xray-busy"><p>{e(told)}{at} …</p><div class="track"><i style="width:{share:.0f}%"></i></div></div>'


def facts(result: dict[str, Any], title: str) -> str:
    """What the file is and what it does, over all layers."""
    low, high = result["rank"]
    pairs = [
        ("kind", ", ".join(_kind(k) for k in result["kinds"])),
        ("rank", str(high) if low == high else f"{low} to {high}"),
        ("effective rank", f"{result['effective_rank']:.1f}, median"),
        ("‖ΔW‖", f"{result['norm']:.3g}"),
        ("layers", f"{result['count']:,}"),
        ("parameters", f"{result['parameters']:,}"),
        ("file", f"{size(result['bytes'])}, {result['format']}"),
        ("made for", result["base_name"] or result["family"] or "not known"),
    ]
    if result["alpha"] is not None:
        pairs.insert(2, ("alpha", f"{result['alpha']:g}"))
    if "intruders" in result:
        least = f" in {result['compared']} layers" if result["compared"] < result["count"] else ""
        pairs.append(("intruders", f"{result['intruders']}{least}"))
    cells = "".join(f"<div><small>{e(k)}</small><b>{e(v)}</b></div>" for k, v in pairs)
    notes = "".join(f"<p>{e(note)}</p>" for note in result["notes"])
    if not result["base"]:
        notes += "<p>Its base is not on this machine: what needs the base's weights is left out.</p>"
    meta = "".join(f"<dt>{e(k)}</dt><dd>{e(v)}</dd>" for k, v in result["metadata"].items())
    meta = f"<details><summary>What the file says of itself</summary><dl>{meta}</dl></details>" if meta else ""
    return f'<div class="lab xray-facts"><h3>{e(title)}</h3><div class="cells">{cells}</div>{notes}{meta}</div>'


def _kind(kind: str) -> str:
    return {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "dora": "DoRA", "full": "full difference"}.get(
        kind, kind.replace("_", " ")
    )


def said(show: str) -> str:
    return f'<div class="lab xray-said"><p>{e(SAYS.get(show, ""))}</p></div>'


def table(result: dict[str, Any], picked: str) -> str:
    """The layers that move most; a row chooses the layer whose spectrum is drawn."""
    against = "compared" in result
    head = ["‖ΔW‖", "energy", "rank", "eff. rank", "stable"]
    head += ["‖ΔW‖/‖W‖", "top 10 %", "intruders"] if against else []
    cells = "".join(f'<th class="r">{e(name)}</th>' for name in head)
    rows = sorted(result["layers"], key=lambda row: -row["norm"])[:ROWS]
    body = "".join(_row(row, against, picked) for row in rows)
    return (
        '<div class="lab xray-table"><div class="scroll"><table class="data"><thead><tr>'
        f"<th>Layer</th>{cells}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )


def _row(row: dict[str, Any], against: bool, picked: str) -> str:
    numbers = [f"{row['norm']:.3g}", f"{row['energy']:.1%}", f"{row['rank']}", f"{row['effective_rank']:.1f}"]
    numbers.append(f"{row['stable_rank']:.1f}")
    if against:
        found, top, intruders = row.get("subspace"), value(row, "top"), value(row, "intruders")
        numbers += (
            [f"{found['relative_norm']:.2%}", f"{top:.0%}", f"{intruders:.0f}"]
            if found and top is not None
            else ["–"] * 3
        )
    cells = "".join(f'<td class="r num">{e(n)}</td>' for n in numbers)
    mark = ' class="picked"' if row["layer"] == picked else ""
    return (
        f'<tr{mark}><td class="name"><button type="button" data-do="layer" data-id="{e(row["layer"])}" title="{e(row["layer"])}">'
        f"{e(row['projection'])}</button><small>{e(row['block'])}</small></td>{cells}</tr>"
    )


def take(result: dict[str, Any], name: str) -> str:
    """The table and the map to take along."""
    content = base64.b64encode(as_csv(result).encode()).decode()
    return (
        f'<div class="lab xray-take"><a class="act" download="{e(name)}-layers.csv" href="data:text/csv;base64,{content}">'
        f'CSV of all layers</a><button type="button" class="act" data-png="xray-map" data-name="{e(name)}-map.png">PNG</button></div>'
    )


def layer(row: dict[str, Any] | None) -> str:
    """One layer in words: its sizes, and the leading directions of W + ΔW beside W's."""
    if row is None:
        return ""
    sizes = " × ".join(map(str, row["shape"]))
    text = f"<p><b>{e(row['layer'])}</b>, {sizes}: {row['directions_90']} directions hold 90 % of its energy.</p>"
    if found := row.get("subspace"):
        text += (
            f"<p>‖ΔW‖ is {found['relative_norm']:.2%} of ‖W‖. The top {found['k']} directions of W hold "
            f"{found['outputs']:.0%} of ΔW's outputs (a random one: {found['chance']['outputs']:.0%}) and "
            f"{found['inputs']:.0%} of its inputs ({found['chance']['inputs']:.0%}).</p>"
        )
        cells = "".join(
            f'<td class="r num{" bad" if c < 0.5 else ""}" title="σ = {s:.4g}">{c:.2f}</td>'
            for _, s, c in row["intruders"]["vectors"]
        )
        heads = "".join(f'<th class="r">{n}</th>' for n, _, _ in row["intruders"]["vectors"])
        text += (
            "<p>Leading directions of W + ΔW, and the largest cosine of each to one of W's: below 0.5 it is an intruder.</p>"
            f'<div class="scroll"><table class="data"><thead><tr>{heads}</tr></thead><tbody><tr>{cells}</tr></tbody></table></div>'
        )
    return f'<div class="lab xray-layer">{text}</div>'


def overlap(result: dict[str, Any]) -> str:
    """Every pair in numbers, beside what random spaces of the same sizes have."""
    names = result["names"]
    rows = "".join(
        f'<tr><td class="name">{e(names[p["a"]])}<small>{e(names[p["b"]])}</small></td>'
        f'<td class="r num">{p["outputs"]:.3f}<small> by chance {p["outputs_chance"]:.3f}</small></td>'
        f'<td class="r num">{p["inputs"]:.3f}<small> by chance {p["inputs_chance"]:.3f}</small></td>'
        f'<td class="r num">{p["cosine"]:+.3f}</td><td class="r num">{len(p["layers"])}</td></tr>'
        for p in result["pairs"]
    )
    return (
        '<div class="lab xray-table"><p>φ = Σ cos² of the principal angles ÷ the smaller number of directions (LoRA, section 7.2), '
        "on each update's directions that hold 90 % of its energy: 0 is orthogonal, 1 is contained.</p>"
        '<div class="scroll"><table class="data"><thead><tr><th>Pair</th><th class="r">φ, outputs</th><th class="r">φ, inputs</th>'
        f'<th class="r">cosine</th><th class="r">layers</th></tr></thead><tbody>{rows}</tbody></table></div></div>'
    )
