"""The Budget tab: how large every adapter is, and which settings give it a size.

The calculator is one HTML component: its script (static/budget.js) sends the state of the controls to `report` below
and draws the answer; each of these functions wraps a plain one (lab/budget_report.py, lab/budget_copy.py, lab/papers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lab import architectures, brought, budget_copy, budget_report, memory, papers
from lab.errors import LabError
from lab.methods import METHODS
from lab.plots import colour
from lab.ui import Page, Tab
from lab.ui.choices import knobs
from lab.ui.html import e, static

GROUPS = (
    ("Image models", ("sdxl", "sd15", "ssd", "flux")),
    ("CLIP and vision", ("clip", "openclip", "vit", "dinov2")),
    ("Language models", ("gpt2", "roberta", "llama", "mistral", "qwen")),
    ("Embedded in the lab", ("tiny",)),
)
SYMBOLS = (
    ("L", 32, "L"),
    ("q", 2, "q"),
    ("n", 4096, "n"),
    ("r", 16, "r"),
    ("r_out", 2000, "r_out"),
    ("r_in", 16, "r_in"),
)


# -- what the page asks: plain data in and out, LabErrors as {"error": sentence} --------------------------
def answer(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except LabError as problem:
        return {"error": str(problem)}


def budget_report_(state: Any) -> dict[str, Any]:
    """The report for a state of the controls."""
    return answer(lambda: budget_report.report(state))


def budget_link(query: Any) -> dict[str, Any]:
    """The state that an address stands for."""

    def made() -> dict[str, Any]:
        if not isinstance(query, dict):
            raise LabError("The address could not be read.")
        return {"state": budget_report.from_link({str(k): str(v)[:2000] for k, v in list(query.items())[:40]})}

    return answer(made)


def budget_bring(given: Any) -> dict[str, Any]:
    """An architecture from an uploaded configuration, a pasted table or a Hub id."""

    def made() -> dict[str, Any]:
        kind, text, name = (str((given or {}).get(k) or "") for k in ("kind", "text", "name"))
        arch = brought.BROUGHT.get(brought.bring(kind, text, name))
        found = {"id": arch.id, "name": arch.name, "parameters": arch.parameters, "layers": len(arch.rows)}
        linear = [t for t in arch.targets if t in ("q", "k", "v", "out")] or arch.targets
        return {**found, "targets": linear}

    return answer(made)


def budget_copy_(given: Any) -> dict[str, Any]:
    """The budget as CSV, Markdown, PEFT configurations or a command."""
    return answer(lambda: {"text": budget_copy.copy((given or {}).get("state"), str((given or {}).get("what")))})


def budget_equations(given: Any) -> dict[str, Any]:
    """Equations 3 to 6 of the NoRA paper."""

    def made() -> dict[str, Any]:
        values = {}
        for name, _, _ in SYMBOLS:
            text = str((given or {}).get(name, "")).strip()
            if not text.lstrip("-").isdigit() or len(text) > 12:
                raise LabError(f"{name} must be a whole number, got '{text[:20]}'.")
            values[name] = int(text)
        found = papers.equations(**values)
        return {"lora": found.lora, "nora": found.nora, "ratio": found.ratio, "approximate": found.approximate}

    return answer(made)


budget_report_.__name__, budget_copy_.__name__ = "budget_report", "budget_copy"  # their names in the page's script


# -- the page ----------------------------------------------------------------------------------------------
def initial() -> dict[str, Any]:
    """What the script starts from: the worked default, so that the tab is full at first sight."""
    names = architectures.names()
    groups = [[label, [[i, n] for i, n in names.items() if i.startswith(starts)]] for label, starts in GROUPS]
    rest = [[i, n] for i, n in names.items() if not any(i.startswith(starts) for _, starts in GROUPS)]
    rows = [
        {"id": m.id, "name": m.name, "kind": m.kind, "colour": colour(m.id), "knobs": knobs(m)} for m in METHODS
    ]  # every method of the registry
    return {
        "report": budget_report.report(budget_report.DEFAULT),
        "archs": [*groups, *([["Others", rest]] if rest else [])],
        "methods": rows,
    }


def build(page: Page) -> None:
    """The tab's components."""
    brought.BROUGHT.folder = page.store.home / "architectures"
    gr.HTML(
        "",
        html_template=f"<style>{static('budget.css')}</style>{calculator()}",
        js_on_load=static("charts.js") + static("budget.js"),
        apply_default_css=False,
        elem_id="budget",
        initial=initial(),
        server_functions=[budget_report_, budget_link, budget_bring, budget_copy_, budget_equations],
    )


def calculator() -> str:
    """The tab's fixed HTML; the script fills it in."""
    options = "".join(f"<option>{e(name)}</option>" for name in memory.BYTES)
    symbols = "".join(
        f'<label><span>{e(label)}</span><input type="number" name="{e(name)}" value="{value}" min="1"></label>'
        for name, value, label in SYMBOLS
    )
    return f"""<div class="lab budget">
<div class="said-bad"></div>
<section class="panel fields">
  <div class="field"><label><span>Architecture</span><select class="arch"></select></label></div>
  <div class="field"><span>Layers to adapt</span><div class="chips"><div class="chips targets"></div><label class="chip encoders" hidden><input type="checkbox"><span></span></label></div></div>
  <div class="field"><span>Blocks</span><div class="range"><input type="number" min="0" aria-label="first block">to<input type="number" min="0" aria-label="last block"></div></div>
  <div class="field parts" hidden><label><span>Tower</span><select></select></label></div>
  <details class="bring"><summary>Another architecture: upload a config.json, name a model, or paste shapes</summary>
    <div class="bring-grid">
      <div class="field"><span>config.json of a transformers, diffusers or open_clip model</span><div class="drop">Drop it here or click<input type="file" accept=".json,application/json" aria-label="config.json"></div></div>
      <div class="field hub"><label><span>Model on the Hub (its config.json alone is fetched)</span><input type="text" placeholder="owner/model" maxlength="200"></label><button class="plain-button" type="button">Fetch</button></div>
      <div class="field paste"><label><span>{e(architectures.TABLE_HELP.split(",", maxsplit=1)[0].capitalize())}</span><textarea placeholder="q 4096 4096 times 32&#10;v 1024 4096 times 32" spellcheck="false"></textarea></label><button class="plain-button" type="button">Use these shapes</button></div>
    </div><div class="told" aria-live="polite"></div></details>
  <div class="facts"></div>
</section>
<section class="panel equal">
  <label class="switch"><input type="checkbox"> Equal budget</label>
  <input type="range" min="2" max="9" step="0.01" value="6" aria-label="budget, logarithmic">
  <div class="amount"><input type="number" min="1" value="1000000" aria-label="budget">parameters</div>
  <p class="hint">Every method's settings are solved for this number of trainable parameters; each card shows how near it comes.</p>
</section>
<section class="cards-row"><div class="adder"><select aria-label="add a method"></select></div></section>
<section class="results"><div class="scroll"><table aria-label="sizes of the adapters"></table></div></section>
<section class="assume"><span>Memory for a batch of</span><label><input class="batch" type="number" min="1" aria-label="batch"></label><label><input class="size" type="number" min="1" aria-label="sample size"><span class="of"></span></label><label>model in <select class="precision" aria-label="precision of the model">{options}</select></label>
  <details class="explain"><summary>What is counted</summary><p>{e(memory.explain())}</p></details></section>
<section class="charts">
  <div class="panel full"><h3>Parameters against rank</h3><div class="chart" data-figure="curve"></div></div>
  <div class="panel"><h3>Parameters by layer <select class="by" aria-label="layers summed by"><option value="layers">by block</option><option value="kinds">by kind of layer</option></select></h3><div class="chart by-layer" data-figure="layers"></div></div>
  <div class="panel"><h3>File sizes</h3><div class="chart" data-figure="files"></div></div>
</section>
<section class="panel"><h3>Take it along</h3><p class="hint">The link in the address bar brings back this state.</p>
  <div class="copies"><button class="plain-button" type="button" data-copy="link">Link</button><button class="plain-button" type="button" data-copy="csv">CSV</button><button class="plain-button" type="button" data-copy="markdown">Markdown</button><button class="plain-button" type="button" data-copy="peft">PEFT configuration</button><button class="plain-button" type="button" data-copy="command">Command</button><span class="said" aria-live="polite"></span></div>
  <pre class="copied" hidden tabindex="0"></pre></section>
<section class="panel"><h3>Equations 3 to 6 of the NoRA paper</h3><p class="hint">L layers with q square n×n matrices each; LoRA of rank r beside NoRA of outer rank r_out and inner rank r_in.</p>
  <div class="eq">{symbols}</div><div class="eq-out" aria-live="polite"></div></section>
<section class="panel papers"><h3>The papers' tables</h3><p class="hint">Each printed parameter count beside ours, the configuration that gives it, and a remark where number, unit or text do not fit.</p>{printed()}</section>
</div>"""


def printed() -> str:
    """The papers' parameter counts as folded tables."""
    parts = []
    for table in papers.tables():
        try:
            counts = papers.counts(table)
        except LabError as problem:
            parts.append(f"<details><summary>{e(papers.TITLES[table])}</summary><p>{e(problem)}</p></details>")
            continue
        if not counts:
            continue
        agree = sum(count.agrees for count in counts)
        rows = "".join(
            f'<tr><td>{e(c.label)}</td><td>{e(c.printed)}</td><td class="{"yes" if c.agrees else "no"}">{e(c.shown)}</td>'
            f'<td>{c.ours:,}</td><td class="l c">{e(c.configuration)}</td><td class="l remark">{e(c.remark)}</td></tr>'
            for c in counts
        )
        parts.append(
            f"<details><summary>{e(papers.TITLES[table])}<small>{agree} of {len(counts)} counts agree</small></summary>"
            '<div class="scroll"><table><thead><tr><th>row</th><th>printed</th><th>ours, as printed</th><th>ours</th>'
            f'<th class="l">configuration</th><th class="l">remark</th></tr></thead><tbody>{rows}</tbody></table></div></details>'
        )
    return "".join(parts)


TAB = Tab("budget", "Budget", 30, build)
