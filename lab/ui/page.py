"""The whole page: tabs in a frame, behind the owner's cookie, with the files' routes beside it."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from lab import adapter_store
from lab.errors import LabError
from lab.jobs import ensure_worker
from lab.runs import Store
from lab.ui import Page, discover, drafts, files, limits, owner, theme
from lab.ui.html import static

TITLE = "NoRA Lab: which compact adapter is best for my data?"
WORKER_CHECK_S = 5.0
HEADER = """
<header class="lab top">{logo}
  <div><h1>NoRA Lab</h1><p>Which compact adapter is best for my data, at my budget?</p></div>
  <button class="toggle" type="button" data-theme-toggle aria-label="light or dark page" title="light or dark">
    <svg class="sun" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round"><path d="M20 14.5A8 8 0 0 1 9.5 4a8 8 0 1 0 10.5 10.5Z"/></svg>
    <svg class="moon" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round"><circle cx="12" cy="12" r="4.2"/><path d="M12 2.5v2.2M12 19.3v2.2M2.5 12h2.2M19.3 12h2.2M5.3 5.3l1.5 1.5M17.2 17.2l1.5 1.5M5.3 18.7l1.5-1.5M17.2 6.8l1.5-1.5"/></svg>
  </button>
</header>"""


def build(store: Store) -> gr.Blocks:
    """The page's components and handlers; serves nothing yet."""
    tabs = discover()
    ids = [tab.id for tab in tabs]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.HTML(HEADER.format(logo=static("logo.svg")), apply_default_css=False, js_on_load=None)
        opened = gr.State(None)
        with gr.Tabs(selected="subject") as bar:
            items = [gr.Tab(tab.title, id=tab.id, elem_id=f"tab-{tab.id}") for tab in tabs]
        for tab, item in zip(tabs, items, strict=True):
            with item:
                tab.build(Page(demo, bar, store, opened, item))

        def land(request: gr.Request) -> gr.Tabs:
            asked = dict(request.query_params).get("tab")
            return gr.Tabs(selected=asked if asked in ids else "subject")

        demo.load(land, None, bar, api_visibility="private", show_progress="hidden")
    # Handlers are short (training is elsewhere), so several visitors are served at once; a flood is turned away.
    demo.queue(default_concurrency_limit=8, max_size=200, api_open=False)
    return demo


def application(home: Path | str | None = None) -> FastAPI:
    """The ASGI application over the lab's home folder."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    store = Store(home)
    private = [store.home, Path(__file__).resolve().parents[2]]
    _own_cache(private)
    owners = owner.Owners(owner.secret(store.home))
    owner.use(owners)
    drafts.sweep(store.home)
    adapter_store.sweep(store.home)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(files.router(store))
    demo = build(store)
    gr.mount_gradio_app(
        app,
        demo,
        path="/",
        theme=theme.Lab(),
        css=theme.css(),
        head=theme.head(),
        favicon_path=str(Path(__file__).parent / "static" / "logo.svg"),
        allowed_paths=[],
        blocked_paths=[str(folder) for folder in private],
        max_file_size=limits.largest_file(),
        show_error=False,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    # launch() sets these, mounting does not; without the first, Gradio checks no path that a request names and copies
    # any file of this machine into its cache (tried with 6.31: tests/test_page.py), without the second, it makes
    # static files of SVGs.
    demo.has_launched = demo.is_running = True
    for block in demo.blocks.values():
        files.uploads_only(block)
    app.add_middleware(limits.UploadLimits, owners=owners)
    app.add_middleware(owner.OwnerCookie, owners=owners, framed=bool(os.environ.get("SPACE_ID")))
    return app


def _own_cache(private: list[Path]) -> None:
    """Give Gradio's copies of uploads a folder of this lab alone, readable by its user only.

    Raises LabError when GRADIO_TEMP_DIR lies where nothing may be served from.
    """
    given = os.environ.get("GRADIO_TEMP_DIR")
    if given and any(Path(given).resolve().is_relative_to(folder) for folder in private):
        raise LabError(f"GRADIO_TEMP_DIR is {given}, inside the lab's own folders: choose one outside of them.")
    if not given:
        folder = Path(tempfile.gettempdir()) / f"nora-lab-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        os.environ["GRADIO_TEMP_DIR"] = str(folder)


def keep_working(home: Path) -> None:
    """Start the queue's worker now and again whenever it is gone, from a thread that ends with the page."""

    def watch() -> None:
        told = ""
        while True:
            try:
                ensure_worker(home)
                told = ""
            except LabError as problem:
                if str(problem) != told:
                    told = str(problem)
                    logging.getLogger("lab").warning("No worker: %s", problem)
            time.sleep(WORKER_CHECK_S)

    threading.Thread(target=watch, name="worker-watch", daemon=True).start()


def settle() -> None:
    """Leave what is loaded by now out of garbage collections: Gradio's objects alone make each one stop the page for
    a tenth of a second, in the middle of somebody's drag of a slider."""
    gc.collect()
    gc.freeze()


def serve(host: str, port: int) -> None:
    """Serve the page until interrupted. Raises LabError when the address is taken."""
    import socket

    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise LabError(
            f"Port {port} on {host} cannot be used ({error.strerror}): choose another with --port."
        ) from error
    app = application()
    settle()
    keep_working(Store().home)
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::") else host
    print(f"NoRA Lab is on http://{shown}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", proxy_headers=True, timeout_graceful_shutdown=3)
    uvicorn.Server(config).run(sockets=[listening])
