"""The Subject tab before training: pictures, words, methods, settings, and what will be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from lab import adapter_store, columns
from lab.bases import BASES, Base, resolve
from lab.columns import MOST
from lab.errors import LabError
from lab.methods import METHODS
from lab.plots import colour
from lab.runs import Store
from lab.tasks import TASKS
from lab.ui import choices, settings
from lab.ui.drafts import MAX_CAPTION, Drafts, Picture, checked
from lab.ui.examples import examples
from lab.ui.html import dot, e, error, static, view
from lab.uploads import check_text, decode

LOW, HIGH = 3, 20  # pictures of a subject
PICKER = """<div class="lab picker"><div class="methods"></div>
<details><summary></summary><input class="search" type="search" placeholder="Search by name or kind" aria-label="search methods"><div class="rest"></div></details></div>"""


def step(number: int, title: str, hint: str) -> gr.HTML:
    return gr.HTML(
        f'<div class="lab step"><i>{number}</i><h2>{e(title)}</h2><p>{e(hint)}</p></div>',
        apply_default_css=False,
        js_on_load=None,
    )


@dataclass
class Setup:
    """The components that other parts wire up."""

    form: dict[str, Any]  # pictures, class_word, trigger, picker, adapters and the settings' controls, in this order
    files: gr.File
    examples: gr.HTML
    send: gr.UploadButton
    summary: gr.HTML
    train: gr.Button
    unused: gr.HTML  # what was wrong with pictures, beside where they are given
    unused_adapters: gr.HTML  # the same of adapter files
    notice: gr.HTML  # what Train says


def build() -> Setup:
    with gr.Row(equal_height=False):
        with gr.Column(scale=7, min_width=320):
            step(1, "Pictures", "3 to 20 of one subject. The bright square is what is trained on: drag it.")
            files = gr.File(
                label="Pictures (and captions as .txt of the same name)",
                file_count="multiple", height=150, elem_id="upload",
            )  # fmt: skip
            unused = _sentences("unused-files")
            gallery = view(_examples(), apply_default_css=False, elem_id="examples")
            pictures = gr.HTML(
                [],
                html_template='<div class="lab"><div class="pics"></div><div class="picsfoot"></div></div>',
                js_on_load=static("pictures.js"),
                apply_default_css=False,
                elem_id="pictures",
                placeholder="a sks subject",
            )
            step(2, "Words", "What it is, and a rare word that will come to mean yours.")
            with gr.Row():
                class_word = gr.Textbox(
                    label="Class word", placeholder="fox", max_length=500, elem_id="class-word", min_width=140
                )
                trigger = gr.Textbox("sks", label="Trigger word", max_length=500, elem_id="trigger", min_width=140)
            step(3, "Methods", "Every ticked method trains on the same pictures, seeds and steps.")
            base = BASES[settings.DEFAULT_BASE]
            picker = gr.HTML(
                {"chosen": [id for id in choices.TICKED if id in METHODS], "knobs": {}},
                html_template=PICKER,
                js_on_load=static("methods.js"),
                apply_default_css=False,
                elem_id="picker",
                rows=choices.rows(base),
                counts={},
                pinned=sum(id in METHODS for id in choices.PINNED),
            )
            with gr.Row(equal_height=True):
                adapters = gr.Dropdown(
                    [], multiselect=True, max_choices=MOST, label="Beside them, untrained", elem_id="columns", scale=5,
                    info="Adapters you have: files of any program, or this page's runs. Same prompts, seeds and scores.",
                    min_width=240,
                )  # fmt: skip
                send = gr.UploadButton(
                    "Send adapter files",
                    file_count="multiple",
                    size="sm",
                    elem_id="send-adapters",
                    scale=1,
                    min_width=160,
                )
            unused_adapters = _sentences("unused-adapters")
            controls = settings.build()
        with gr.Column(scale=3, min_width=290, elem_classes="aside"):
            summary = gr.HTML(apply_default_css=False, js_on_load=None, elem_id="summary")
            train = gr.Button("Train", variant="primary", size="lg", elem_id="train", elem_classes="train")
            notice = _sentences("notice")
    form = {"pictures": pictures, "class_word": class_word, "trigger": trigger, "picker": picker, "adapters": adapters}
    form = form | controls
    return Setup(form, files, gallery, send, summary, train, unused, unused_adapters, notice)


def _sentences(id: str) -> gr.HTML:
    return gr.HTML(apply_default_css=False, js_on_load=None, elem_id=id)


def _examples() -> str:
    cards = "".join(
        f'<button type="button" class="example" data-do="example" data-id="{e(x.id)}" title="{e(x.licence)}"><span class="mosaic">'
        + "".join(
            f'<img src="files/examples/{e(x.id)}/{i}" alt="" loading="lazy">' for i in range(min(4, len(x.pictures)))
        )
        + f"</span><span>{e(x.name)}<small>{len(x.pictures)} pictures</small></span></button>"
        for x in examples().values()
    )
    hint = "<small>or begin with an example</small>" if cards else ""
    return f'<div class="lab">{hint}<div class="examples">{cards}</div></div>'


# -- handlers: plain functions ---------------------------------------------------------------------------
def add_files(store: Store, owner: str, paths: list[str] | None, pictures: Any) -> tuple[list[Picture], list[str]]:
    """The pictures with the uploaded ones added, and one sentence for every file that could not be used.

    A .txt file is the caption of the picture with the same stem, whether that came before, with, or not at all.
    """
    drafts, kept = Drafts(store.home, owner), checked(pictures)
    problems: list[str] = []
    captions: dict[str, str] = {}
    images = []
    for path in [Path(p) for p in paths or []]:
        if path.suffix.lower() != ".txt":
            images.append(path)
            continue
        try:
            text = path.read_bytes()[:4000].decode("utf-8", "replace")
            captions[path.stem] = check_text(f"The caption file '{path.name[:60]}'", text, MAX_CAPTION)
        except LabError as problem:
            problems.append(str(problem))
    for path in images:
        if len(kept) >= HIGH:
            problems.append(f"'{path.name[:60]}' was left out: at most {HIGH} pictures are used.")
            continue
        try:
            kept.append(drafts.add(decode(path, name=path.name), captions.pop(path.stem, "")))
        except LabError as problem:
            problems.append(str(problem))
    problems += [f"There is no picture for the caption file '{stem[:60]}.txt'." for stem in captions]
    return kept, problems


def use_example(store: Store, owner: str, id: Any) -> tuple[list[Picture], str]:
    """An example's pictures as a draft of this owner's, and its class word."""
    if id not in examples():
        raise LabError("There is no such example subject.")
    example, drafts = examples()[id], Drafts(store.home, owner)
    pairs = zip(example.pictures, example.captions, strict=True)
    return [drafts.add(decode(path), caption) for path, caption in pairs], example.class_word


def spec_of(values: dict[str, Any], adapters: Sequence[str] | None = None) -> tuple[dict[str, Any], list[Picture]]:
    """The spec that the form stands for, checked by the task, and the pictures it is about. `adapters`: names of the
    chosen ones, where they have been looked up. Raises LabError."""
    pictures = checked(values["pictures"], HIGH)
    if len(pictures) < LOW:
        raise LabError(f"Between {LOW} and {HIGH} pictures of the subject are needed, {len(pictures)} given.")
    words = {"class_word": check_text("The class word", values["class_word"], 60)}
    trigger = check_text("The trigger word", values["trigger"], 40, empty=True)
    beside = [f"adapter-{n}" for n in range(len(values.get("adapters") or []))] if adapters is None else list(adapters)
    methods = {} if beside and not _ticked(values) else choices.checked(values["picker"])
    spec = settings.spec(values) | words | {"trigger": trigger, "methods": methods, "adapters": beside}
    spec |= {"captions": [p["caption"] for p in pictures], "crops": [p["crop"] for p in pictures]}
    spec["pictures"] = len(pictures)
    return TASKS["subject"].check(spec), pictures


def submit(store: Store, owner: str, values: dict[str, Any]) -> str:
    """Queue the comparison that the form describes; its id."""
    adapters = beside(store, owner, values.get("adapters"))
    spec, pictures = spec_of(values, list(adapters))
    drafts = Drafts(store.home, owner)
    images = [drafts.image(p["id"]) for p in pictures]
    return store.submit(owner, "subject", spec, images, columns.inputs(adapters))


def beside(store: Store, owner: str, refs: Any) -> dict[str, Path]:
    """Column name → file or folder of each chosen adapter of this owner. Raises LabError for what is not theirs."""
    if refs is not None and (not isinstance(refs, list) or len(refs) > MOST):
        raise LabError(f"At most {MOST} adapters can stand beside the methods: choose fewer.")
    found = [adapter_store.chosen(store, owner, ref) for ref in dict.fromkeys(map(str, refs or []))]
    titles = [f"{c.title.partition(':')[0]}-{c.method}-s{c.seed}" if c.method else c.title for c in found]
    return dict(zip(columns.named(titles), [c.path for c in found], strict=True))


def known_adapters(store: Store, owner: str, picked: Any = None) -> Any:
    """The dropdown of everything that this owner can lay beside the methods, at those picked that are theirs."""
    found = adapter_store.choices(store, owner)
    mine = {c.ref for c in found}
    return gr.Dropdown([(c.title, c.ref) for c in found], value=[r for r in picked or [] if r in mine])


def send_adapters(store: Store, owner: str, paths: list[str] | None, picked: Any) -> tuple[Any, list[str]]:
    """The dropdown with what was sent added and picked, and one sentence for every file that could not be used. A PEFT
    folder's configuration goes with its weights; any other file is an adapter of its own."""
    sent = [(Path(path), Path(path).name) for path in paths or []]
    together = any(name.lower().endswith(".json") for _, name in sent)
    refs, problems = list(picked or []), []
    for files in [sent] if together else [[file] for file in sent[: MOST + 1]]:
        try:
            refs.append(adapter_store.Adapters(store.home, owner).add(files))
        except LabError as problem:
            problems.append(str(problem))
    return known_adapters(store, owner, refs[:MOST]), problems


def _ticked(values: dict[str, Any]) -> bool:
    return isinstance(values["picker"], dict) and bool(values["picker"].get("chosen"))


def missing(values: dict[str, Any]) -> list[str]:
    """What still has to be done before Train can work, each in a few words."""
    count = len(values["pictures"] or []) if isinstance(values["pictures"], list) else 0
    todo = []
    if count < LOW:
        todo.append(
            f"add {LOW - count} more picture{'s' if LOW - count > 1 else ''}" if count else "add 3 to 20 pictures"
        )
    if not str(values["class_word"] or "").strip():
        todo.append("say what the subject is (class word)")
    if not _ticked(values) and not values.get("adapters"):
        todo.append("tick at least one method")
    return todo


def summarise(values: dict[str, Any]) -> str:
    """What pressing Train will do, as HTML."""
    todo = missing(values)
    if todo:
        return _panel([], "", "".join(f"<li>{e(t)}</li>" for t in todo))
    try:
        spec, pictures = spec_of(values)
    except LabError as problem:
        return _panel([], "", f"<li>{e(problem)}</li>")
    runs, adapters = len(spec["methods"]) * len(spec["seeds"]), len(spec["adapters"])
    facts = [
        ("Base", base_words(resolve(spec["base"]))),
        ("Pictures", f"{len(pictures)}"),
        (
            "Runs",
            f"{len(spec['methods'])} method{'s' * (len(spec['methods']) > 1)} × {len(spec['seeds'])} seed{'s' * (len(spec['seeds']) > 1)} = {runs}",
        ),
        ("Steps a run", f"{spec['steps']:,} × batch {spec['batch']}"),
        ("Each picture is seen", f"{spec['steps'] * spec['batch'] / len(pictures):,.0f} times"),
        *([("Beside them", f"{adapters} adapter{'s' * (adapters > 1)} of yours")] if adapters else []),
        ("Grid", f"{len(spec['prompts'])} prompts × {len(spec['sample_seeds'])} seeds"),
    ]
    return _panel(facts, _bars(spec), "")


def base_words(base: Base) -> str:
    """The base's name, and what has to be downloaded before the first run on it."""
    if base.here:
        return base.name
    return f"{base.name}, {base.megabytes / 1000:.1f} GB to download" if base.megabytes else f"{base.name}, to download"


def _bars(spec: dict[str, Any]) -> str:
    base = resolve(spec["base"])
    counts = {
        id: choices.count(base, spec["targets"], METHODS[id], METHODS[id].knobs.parse(knobs), spec["text_encoder"])
        for id, knobs in spec["methods"].items()
    }
    if not counts:
        return ""
    most = max(count["n"] or 0 for count in counts.values()) or 1
    rows = "".join(
        f'<div class="bar" style="--c:{colour(id)};--w:{100 * (count["n"] or 0) / most:.1f}%" title="{e(count["error"])}">'
        f'<span>{dot(id)} {e(METHODS[id].name)}</span><span class="num">{e(count["text"])}</span><u></u></div>'
        for id, count in counts.items()
    )
    return f'<div class="bars"><small>trainable parameters</small>{rows}</div>'


def _panel(facts: list[tuple[str, str]], more: str, todo: str) -> str:
    rows = "".join(f'<dt>{e(k)}</dt><dd class="num">{e(v)}</dd>' for k, v in facts)
    title = "Ready to train" if facts else "Before training"
    return (
        f'<div class="lab summary"><h3>{title}</h3>{f"<dl>{rows}</dl>" if rows else ""}{more}'
        f"{f'<ul>{todo}</ul>' if todo else ''}</div>"
    )


def notices(problems: list[str]) -> str:
    return "".join(f'<div class="lab">{error(problem)}</div>' for problem in problems)
