"""Subject tab: pictures in, a comparison out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab.bases import pick
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.runs import Store
from lab.ui import Page, Tab, choices, comparison, settings, setup
from lab.ui.drafts import Drafts, checked
from lab.ui.html import e, sentences
from lab.ui.owner import owner_of

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(page: Page) -> None:
    marks = gr.State({})  # what the panel shows already, so that a tick sends only what changed
    shown_id = gr.Textbox(visible="hidden", elem_id="shown-comparison")
    timer = gr.Timer(comparison.TICK_S, active=False)
    with gr.Column(visible=True, elem_id="setup") as before:
        form = setup.build()
    with gr.Column(visible=False, elem_id="comparison") as after:
        back = gr.Button("← New comparison", size="sm", elem_id="back", scale=0, min_width=160)
        panel, pick = comparison.build()
    _wire_setup(page, form)
    _wire_panel(page, (before, after), (back, timer, shown_id, marks), panel, pick)


# -- before training -------------------------------------------------------------------------------------
def _wire_setup(page: Page, form: setup.Setup) -> None:
    store, names, inputs = page.store, list(form.form), list(form.form.values())
    pictures, picker, class_word = form.form["pictures"], form.form["picker"], form.form["class_word"]

    def changed(request: gr.Request, *values: Any) -> tuple[str, Any, Any]:
        given = dict(zip(names, values, strict=True))
        remember(store, owner_of(request), given)
        return setup.summarise(given), gr.HTML(counts=counts(given)), gr.HTML(placeholder=placeholder(given))

    def added(request: gr.Request, paths: list[str] | None, now: Any) -> tuple[Any, str, None]:
        kept, problems = setup.add_files(store, owner_of(request), paths, now)
        return kept, setup.notices(problems), None

    def example(request: gr.Request, event: gr.EventData) -> tuple[Any, str, str]:
        kept, word = setup.use_example(store, owner_of(request), event._data.get("id"))
        return kept, word, ""

    def sent(request: gr.Request, paths: list[str] | None, picked: Any) -> tuple[Any, str]:
        known, problems = setup.send_adapters(store, owner_of(request), paths, picked)
        return known, setup.notices(problems)

    def adapters(request: gr.Request, picked: Any) -> Any:
        return setup.known_adapters(store, owner_of(request), picked)

    def rebased(base: str) -> list[Any]:
        row = pick(str(base or "").strip())
        return [*settings.shown(row.id).values(), gr.HTML(rows=choices.rows(row))]

    def restored(request: gr.Request) -> list[Any]:
        draft = Drafts(store.home, owner_of(request)).load()
        word, trigger, ticked = draft.get("class_word", ""), draft.get("trigger", "sks"), draft.get("picker")
        return [draft.get("pictures", []), word, trigger, ticked or gr.skip()]

    refreshed = [form.summary, picker, pictures]
    again: dict[str, Any] = {
        "fn": sentences(changed),
        "inputs": inputs,
        "outputs": refreshed,
        "trigger_mode": "always_last",
        **QUIET,
    }
    controls = [form.form[name] for name in settings.NAMES]
    typed = [class_word, form.form["trigger"], *controls]
    beside = form.form["adapters"]
    form.send.upload(
        sentences(sent),
        [form.send, beside],
        [beside, form.unused_adapters],
        api_visibility="private",
        show_progress_on=form.send,
    ).then(**again)
    for event in (page.demo.load, *([page.tab.select] if page.tab is not None else [])):
        event(sentences(adapters), beside, beside, **QUIET)  # runs have been done meanwhile
    gr.on([pictures.input, picker.input, beside.change, *(c.change for c in typed)], **again)
    form.files.upload(
        sentences(added),
        [form.files, pictures],
        [pictures, form.unused, form.files],
        api_visibility="private",
        show_progress_on=form.files,
    ).then(**again)
    form.examples.click(sentences(example), None, [pictures, class_word, form.unused], **QUIET).then(**again)
    form.form["base"].input(sentences(rebased), form.form["base"], [*controls, picker], **QUIET)
    words = [pictures, class_word, form.form["trigger"], picker]
    page.demo.load(sentences(restored), None, words, **QUIET).then(**again)

    def train(request: gr.Request, *values: Any) -> tuple[Any, str]:
        try:
            cid = setup.submit(store, owner_of(request), dict(zip(names, values, strict=True)))
        except LabError as problem:
            return gr.skip(), setup.notices([str(problem)])
        wake(store)
        return cid, ""

    # The button says that it works, and cannot be pressed twice, until the queue or a sentence is shown.
    form.train.click(lambda: gr.Button("Checking…", interactive=False), None, form.train, queue=False, **QUIET).then(
        train, inputs, [page.opened, form.notice], **QUIET
    ).then(lambda: gr.Button("Train", interactive=True), None, form.train, queue=False, **QUIET)


def wake(store: Store) -> None:
    """See that somebody works. What was submitted stays submitted if nobody can: the visitor is told why it waits."""
    try:
        ensure_worker(store.home)
    except LabError as problem:
        gr.Warning(e(problem), title="The queue waits")


def counts(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameter counts for the picker; a base or layers that are not the page's have none."""
    try:
        return choices.counts(values["base"], values["targets"], values["picker"], bool(values["text_encoder"]))
    except LabError:
        return {}


def placeholder(values: dict[str, Any]) -> str:
    """What a picture without a caption is trained with."""
    words = f"{values['trigger'] or ''} {values['class_word'] or 'subject'}".split()
    return f"a {' '.join(words)}"[:80]


def remember(store: Store, owner: str, values: dict[str, Any]) -> None:
    """Keep the draft for the next visit; a form that does not check is not kept, and that is no error here."""
    try:
        draft = {"pictures": checked(values["pictures"])}
    except LabError:
        return
    for name in ("class_word", "trigger"):
        draft[name] = str(values[name] or "")[:500]
    if isinstance(values["picker"], dict) and len(str(values["picker"])) < 20_000:
        draft["picker"] = values["picker"]
    Drafts(store.home, owner).save(draft)


# -- from Train on ---------------------------------------------------------------------------------------
def _wire_panel(
    page: Page,
    columns: tuple[gr.Column, gr.Column],
    parts: tuple[gr.Button, gr.Timer, gr.Textbox, gr.State],
    panel: comparison.Panel,
    pick: comparison.Choosers,
) -> None:
    store, (back, timer, shown_id, marks) = page.store, parts
    views = panel.all()

    def show(request: gr.Request, cid: str | None) -> list[Any]:
        return comparison.opened(store, owner_of(request) if cid else "", cid)

    def refresh(request: gr.Request, cid: str | None, seen: dict[str, int], *given: Any) -> list[Any]:
        picked = dict(zip(vars(pick), given, strict=True))
        return comparison.refreshed(store, owner_of(request) if cid else "", cid, seen or {}, picked)

    def act(request: gr.Request, cid: str | None, event: gr.EventData) -> Any:
        comparison.act(store, owner_of(request), cid or "", event._data or {})
        wake(store)
        return gr.Timer(active=True)

    def land(request: gr.Request) -> str | None:
        return dict(request.query_params).get("comparison") or None

    address = "(id) => { window.lab.params('subject', {comparison: id}); }"
    again: dict[str, Any] = {
        "fn": sentences(refresh),
        "inputs": [page.opened, marks, *pick.all()],
        "outputs": [*views, timer, marks],
        "trigger_mode": "always_last",
        **QUIET,
    }
    page.opened.change(
        sentences(show), page.opened, [*columns, *views, *pick.all(), timer, shown_id, marks], **QUIET
    ).then(None, shown_id, None, js=address)
    timer.tick(**again)
    gr.on([c.input for c in pick.all()], **again)
    if page.tab is not None:  # a run may have been retried in the Runs tab meanwhile
        page.tab.select(**again)
    for buttons in (panel.head, panel.queue):
        buttons.click(sentences(act), page.opened, timer, **QUIET).then(**again)
    back.click(lambda: None, None, page.opened, **QUIET)
    page.demo.load(land, None, page.opened, **QUIET)


TAB = Tab("subject", "Subject", 10, build)
