"""Few-shot tab: a dataset in, the whole field in one table out. What is shown is made in `_fewshot_html.py`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lab import datasets
from lab.clip import bases
from lab.datasets import DATASETS, EMBEDDED, _upload
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.runs import Store
from lab.tasks import TASKS, fewshot
from lab.ui import Page, Tab, limits
from lab.ui import _fewshot_html as html
from lab.ui._fewshot_results import Results
from lab.ui._fewshot_results import build as build_results
from lab.ui.html import error, sentences, static, view
from lab.ui.owner import owner_of
from lab.ui.setup import step

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
FOLDER = (
    '<div class="lab fs"><button type="button" class="act pick">Choose a folder…</button> '
    '<span class="said" aria-live="polite"></span><input type="file" webkitdirectory multiple hidden></div>'
)
TICKED = ["zero-shot", "linear", "tip-adapter-f", "clip-lora", "lora", "nora"]
NAMES = (
    "dataset", "also", "classes", "template", "shots", "seeds", "methods", "adapters", "base", "preset", "encoder", "targets",
    "steps",
)  # fmt: skip


@dataclass
class Form:
    """The components that are wired up; `controls` in the order of NAMES."""

    controls: dict[str, Any]
    upload: gr.File
    skip: gr.Checkbox
    told: gr.HTML
    shown: gr.HTML
    everything: gr.Button
    run: gr.Button
    notice: gr.HTML


def build(page: Page) -> None:
    gr.HTML(f"<style>{static('fewshot.css')}</style>", apply_default_css=False, js_on_load=None)
    form = _form()
    _wire(page, form, build_results(page))


def _form() -> Form:
    made: dict[str, Any] = {}
    here = [(d.name, d.id) for d in DATASETS if d.is_here()]
    step(1, "Pictures", "One sub-folder a class. A zip, a folder, or a dataset.")
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            made["dataset"] = gr.Dropdown(here, value=EMBEDDED, label="Dataset", elem_id="fs-dataset")
            upload = gr.File(label="Your own: a zip", file_types=[".zip"], height=120, elem_id="fs-upload")
            gr.HTML(FOLDER, js_on_load=static("fewshot.js"), apply_default_css=False)
            told = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="fs-told")
            skip = gr.Checkbox(False, label="Leave out pictures that cannot be read")
            made["also"] = gr.Dropdown(
                here,
                value=[],
                multiselect=True,
                label="More datasets",
                info="A column of the table for each, and their average.",
                elem_id="fs-also",
            )
            with gr.Accordion("Class names and template", open=False):
                made["classes"] = gr.Textbox(
                    "\n".join(class_names(EMBEDDED)),
                    label="Class names",
                    info="One a line, in this order; the model reads them.",
                    lines=6,
                    max_lines=14,
                    elem_id="fs-names",
                )
                made["template"] = gr.Textbox(
                    datasets.resolve(EMBEDDED).template,
                    label="Template",
                    info="{} stands for the class.",
                    max_length=200,
                    elem_id="fs-template",
                )
        with gr.Column(scale=7, min_width=320):
            shown = view(html.classes(EMBEDDED), apply_default_css=False, elem_id="fs-classes")
    step(2, "Methods", "CLIP's own, and every adapter of the registry on the chosen layers.")
    adapters = [(m.name, m.id) for m in fewshot.methods() if m.id not in fewshot.CLIP_METHODS]
    own = [(m.name, m.id) for m in fewshot.CLIP_METHODS]
    made["methods"] = gr.CheckboxGroup(
        own, value=[id for id in TICKED if id in fewshot.CLIP_METHODS], label="For CLIP alone", elem_id="fs-methods"
    )
    made["adapters"] = gr.Dropdown(
        adapters,
        value=[id for id in TICKED if id in fewshot.METHODS],
        label="Adapters",
        multiselect=True,
        filterable=True,
        elem_id="fs-adapters",
    )
    everything = gr.Button("All of NoRA's Table 2", size="sm", scale=0, min_width=200)
    step(3, "Protocol", "Shots are drawn by seed; validation never uses test pictures.")
    made |= _protocol()
    with gr.Row():
        run = gr.Button("Run", variant="primary", size="lg", elem_id="fs-run", scale=0, min_width=160)
        notice = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="fs-notice")
    return Form({name: made[name] for name in NAMES}, upload, skip, told, shown, everything, run, notice)


def _protocol() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        made["shots"] = gr.CheckboxGroup(
            [(str(k), k) for k in fewshot.SHOTS], value=[4, 16], label="Shots a class", elem_id="fs-k"
        )
        made["seeds"] = gr.Textbox(
            "1, 2, 3", label="Seeds", info="Each method runs once per seed.", max_length=200, elem_id="fs-seeds"
        )
        made["base"] = gr.Dropdown(
            [(b.name, b.id) for b in bases.rows()],
            value="tiny-clip",
            label="Model",
            info="Or any open_clip NAME:TAG, or timm:NAME.",
            allow_custom_value=True,
            elem_id="fs-base",
        )
    with gr.Row():
        made["preset"] = gr.Dropdown(
            [("the model's own", ""), *((p.name, id) for id, p in fewshot.PRESETS.items())], value="", label="Preset"
        )
        made["encoder"] = gr.Radio(
            [("vision", "vision"), ("text", "text"), ("both", "both")], value="both", label="Adapters in the encoder"
        )
        made["targets"] = gr.CheckboxGroup(
            ["q", "k", "v", "out", "up", "down"], value=["q", "k", "v"], label="Adapters on", elem_id="fs-targets"
        )
        made["steps"] = gr.Number(0, label="Steps", info="0: the preset's.", precision=0, minimum=0, min_width=120)
    return made


def _wire(page: Page, form: Form, results: Results) -> None:
    store, controls = page.store, list(form.controls.values())
    of = form.controls

    def uploaded(request: gr.Request, path: str | None, skip: bool) -> tuple[Any, ...]:
        owner_of(request)  # strangers without the page's cookie store nothing
        same = [gr.skip()] * 5
        if not path:
            return *same, ""
        try:
            limits.check_zip(Path(path))
            name = _upload.take(Path(path), skip_damaged=skip)
        except LabError as problem:
            return *same, error(str(problem))
        choices = [*((d.name, d.id) for d in DATASETS if d.is_here()), ("Your pictures", name)]
        return gr.Dropdown(choices, value=name), gr.Dropdown(choices), *_shown(name), ""

    def chosen(name: str) -> tuple[str, str, str]:
        return _shown(name)

    def submitted(request: gr.Request, *values: Any) -> tuple[Any, str]:
        try:
            cid = submit(store, owner_of(request), dict(zip(NAMES, values, strict=True)))
            ensure_worker(store.home)
        except LabError as problem:
            return gr.skip(), error(str(problem))
        return cid, ""

    look = [form.shown, of["classes"], of["template"]]
    gr.on(  # giving consent tries the same pictures again
        [form.upload.change, form.skip.input],
        sentences(uploaded),
        [form.upload, form.skip],
        [of["dataset"], of["also"], *look, form.told],
        api_visibility="private",
        show_progress_on=form.upload,
    )
    of["dataset"].input(sentences(chosen), of["dataset"], look, **QUIET)
    form.everything.click(_table, None, [of["methods"], of["adapters"]], **QUIET)
    form.run.click(submitted, controls, [results.opened, form.notice], **QUIET)


# -- handlers: plain functions -------------------------------------------------------------------------------
def _table() -> tuple[list[str], list[str]]:
    from lab.cli.fewshot import TABLE

    return [id for id in TABLE if id in fewshot.CLIP_METHODS], [id for id in TABLE if id in fewshot.METHODS]


def _shown(name: str) -> tuple[str, str, str]:
    """A dataset's pictures, class names and template. Raises LabError for names that are not the page's to give."""
    dataset = datasets.resolve(str(name), local=False)
    return html.classes(dataset.id), "\n".join(class_names(dataset.id)), dataset.template


@functools.lru_cache(maxsize=8)
def class_names(name: str) -> list[str]:
    return datasets.resolve(name, local=False).listing().classes


def to_spec(values: dict[str, Any]) -> dict[str, Any]:
    """The task's spec from what the visitor entered. Raises LabError."""
    dataset = datasets.resolve(str(values["dataset"] or ""), local=False)
    names = [line.strip() for line in str(values["classes"] or "").splitlines() if line.strip()]
    chosen = [*(values["methods"] or []), *(values["adapters"] or [])]
    try:
        seeds = [int(part) for part in str(values["seeds"]).replace(",", " ").split()]
    except ValueError:
        raise LabError(f"Seeds must be whole numbers, got '{str(values['seeds'])[:60]}'.") from None
    return {
        "base": bases.resolve(str(values["base"]), local=False).id,
        "dataset": dataset.id,
        "also": [datasets.resolve(str(id), local=False).id for id in values["also"] or []],
        "classes": names if names and names != class_names(dataset.id) else None,
        "template": str(values["template"] or "") or None,
        "shots": sorted(int(k) for k in values["shots"] or []),
        "seeds": seeds,
        "methods": {str(id): {} for id in chosen},
        "preset": values["preset"] or None,
        "encoder": values["encoder"],
        "targets": ",".join(map(str, values["targets"] or [])) or None,
        "steps": int(values["steps"] or 0) or None,
    }


def submit(store: Store, owner: str, values: dict[str, Any]) -> str:
    """Queue the comparison; its id. Raises LabError."""
    return store.submit(owner, "fewshot", TASKS["fewshot"].check(to_spec(values)), [])


TAB = Tab("fewshot", "Few-shot", 15, build)
