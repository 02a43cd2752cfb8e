"""The page. ADD A TAB: one file in this folder that offers `TAB = Tab(id, title, order, build)`.

`build(page)` is called inside the tab's own `with gr.Tab(...)`: it makes the components and wires the handlers.
Handlers take `request: gr.Request` and ask `lab.ui.owner.owner_of(request)` for whom they work; all they return
belongs to that owner. In the browser, `lab.params("budget", {arch: "sdxl-unet"})` (static/lab.js) keeps a tab's
part of the address bar, and a tab reads it back in `page.demo.load(fn)` from `request.query_params`. Text from outside
goes through `lab.ui.html.e` before it is HTML, uploaded files through `lab.uploads` before they are pictures.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

    from lab.runs import Store


@dataclass
class Page:
    """What a tab's `build` gets to work with."""

    demo: gr.Blocks
    tabs: gr.Tabs  # return gr.Tabs(selected=<tab id>) to go to another tab
    store: Store
    opened: gr.State  # id of the comparison to show in the Subject tab; other tabs set it and select "subject"
    tab: gr.Tab | None = None  # the tab being built; `.select` tells when it is shown


@dataclass(frozen=True)
class Tab:
    id: str
    title: str
    order: int  # from left to right
    build: Callable[[Page], None]


def discover() -> list[Tab]:
    """Every tab in this package, from left to right. Modules whose name starts with an underscore are left out."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_")
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [module.TAB for module in modules if isinstance(getattr(module, "TAB", None), Tab)]
    return sorted(found, key=lambda tab: (tab.order, tab.id))
