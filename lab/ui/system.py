"""System tab: what `python -m lab doctor` says, as far as strangers may know it."""

from __future__ import annotations

import threading
import time
from typing import Any

import gradio as gr

from lab import doctor
from lab.ui import Page, Tab
from lab.ui.comparison import heading
from lab.ui.html import e, empty, size

FRESH_S = 30.0
STATES = {"problem": "failed", "note": "queued", "ok": "done"}  # the pills' classes
WORDS = {"problem": "to change", "note": "to know", "ok": "works"}
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# In the page itself, so that it is there before anybody has been asked: the first look imports every method.
LOOKING = f'<div class="lab">{empty("Looking …", "Processor, memory, GPU, disk and models: a few seconds the first time.")}</div>'
_lock = threading.Lock()
_last: list[tuple[float, dict[str, Any]]] = []


def build(page: Page) -> None:
    heading("This machine", "what works on it, and what to change; the same as python -m lab doctor")
    shown = gr.HTML(LOOKING, apply_default_css=False, js_on_load=None, elem_id="system")
    if page.tab is not None:
        page.tab.select(lambda: system_html(examined()), None, shown, **QUIET)

    def land(request: gr.Request) -> Any:
        return system_html(examined()) if dict(request.query_params).get("tab") == TAB.id else gr.skip()

    page.demo.load(land, None, shown, **QUIET)


# -- handlers: plain functions ---------------------------------------------------------------------------
def examined() -> dict[str, Any]:
    """What there is, looked up at most every half minute however many ask."""
    with _lock:
        if not _last or time.monotonic() - _last[0][0] > FRESH_S:
            _last[:] = [(time.monotonic(), doctor.examine(public=True))]
        return _last[0][1]


def system_html(found: dict[str, Any]) -> str:
    return f'<div class="lab system" style="display: grid; gap: 16px">{_findings(found)}{_facts(found)}{_bases(found)}</div>'


def _findings(found: dict[str, Any]) -> str:
    def row(finding: dict[str, str]) -> str:
        more = f"<small>{e(finding['do'])}</small>" if finding["do"] else ""
        state = finding["state"]
        return (
            f'<tr><td style="width: 1%"><span class="pill {STATES[state]}">{WORDS[state]}</span></td>'
            f'<td class="wide">{e(finding["text"])}{more}</td></tr>'
        )

    rows = "".join(row(finding) for finding in found["findings"])
    return f'<div class="scroll"><table class="data"><tbody>{rows}</tbody></table></div>'


def _facts(found: dict[str, Any]) -> str:
    cpu, memory, disk = found["processor"], found["memory"], found["disk"]
    rows = [("Processor", f"{cpu['name']}, {cpu['cores']} cores")]
    for gpu in found["gpus"]:
        driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
        rows.append(("GPU", f"{gpu['name']}, {size(gpu['memory_bytes'])}{driver}"))
    optional = (f"{name} {x['version'] or '(not installed)'}: {x['for']}" for name, x in found["extras"].items())
    rows += [
        *([] if found["gpus"] else [("GPU", "none")]),
        ("Memory", f"{size(memory['available_bytes'])} of {size(memory['total_bytes'])} free"),
        ("Disk", f"{size(disk['runs']['free_bytes'])} free for runs, {size(disk['models']['free_bytes'])} for models"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("Optional", "; ".join(optional)),
    ]
    body = "".join(f"<dt>{e(name)}</dt><dd style='text-align: left'>{e(text)}</dd>" for name, text in rows)
    return f'<div class="summary"><h3>Facts</h3><dl>{body}</dl></div>'


def _bases(found: dict[str, Any]) -> str:
    rows = [(base["name"], base["here"], base["bytes"]) for base in found["bases"]]
    rows += [(c["repo"], True, c["bytes"]) for c in found.get("cached", []) if c["pipeline"] and c["usable"]]
    body = "".join(
        f'<tr><td class="name">{e(name)}</td><td><span class="pill {"done" if here else "queued"}">'
        f"{'here' if here else 'to download'}</span></td><td class='r num'>{f'{count / 1e9:.2f} GB' if count else '–'}</td></tr>"
        for name, here, count in rows
    )
    head = "<tr><th>Base model</th><th>Weights</th><th class='r'>Size</th></tr>"
    return f'<div class="scroll"><table class="data"><thead>{head}</thead><tbody>{body}</tbody></table></div>'


TAB = Tab("system", "System", 60, build)
