"""The files of drafts and comparisons over HTTP, for their owner only.

No part of a path comes from the address: ids are looked up in the store with the cookie's owner, kinds and numbers
are fixed, and each kind has one fixed file name. A stranger's id and an id that does not exist answer the same.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from gradio_client.utils import is_http_url_like

from lab import compare
from lab.errors import LabError
from lab.runs import Comparison, Store
from lab.tasks import TASKS
from lab.ui.drafts import Drafts
from lab.ui.examples import examples
from lab.ui.owner import owner_of

# A report may be opened in the page's origin: the sandbox leaves its markup no script, form, frame or request.
REPORT_POLICY = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
KINDS = {"grid": "grid.png", "table": "results.csv", "report": "report.html"}


def router(store: Store) -> APIRouter:
    """GET files/drafts/<id>.png · files/comparisons/<id>/{grid,table,report} · .../inputs/<n> ·
    files/runs/<id>/{preview,adapter,diffusers,kohya,log} · files/runs/<id>/samples/<prompt>/<seed>."""
    routes = APIRouter(prefix="/files")

    # Plain functions: Starlette runs them in threads, so disk and zip never block the page's event loop.
    @routes.get("/drafts/{id}.png")
    def draft(id: str, request: Request) -> Response:
        return _answer(lambda: _picture(Drafts(store.home, owner_of(request)).path(id, ".jpg"), "image/jpeg"))

    @routes.get("/examples/{id}/{number}")  # the lab's own pictures: anybody's
    def example(id: str, number: int) -> Response:
        return _answer(lambda: _example(id, number))

    @routes.get("/comparisons/{id}/inputs/{number}")
    def uploaded(id: str, number: int, request: Request) -> Response:
        return _answer(lambda: _picture(store.comparison(owner_of(request), id).inputs / f"{abs(number):03d}.png"))

    @routes.get("/comparisons/{id}/{kind}")
    def comparison(id: str, kind: str, request: Request) -> Response:
        return _answer(lambda: _made(store.comparison(owner_of(request), id), kind))

    @routes.get("/runs/{id}/samples/{prompt}/{seed}")
    def sample(id: str, prompt: int, seed: int, request: Request) -> Response:
        return _answer(
            lambda: _picture(store.run(owner_of(request), id).folder / "samples" / f"p{abs(prompt)}_s{abs(seed)}.png")
        )

    @routes.get("/runs/{id}/{kind}")
    def run(id: str, kind: str, request: Request) -> Response:
        return _answer(lambda: _of_run(store, owner_of(request), id, kind))

    return routes


def _answer(make: Callable[[], Response]) -> Response:
    try:
        return make()
    except LabError as problem:
        return Response(str(problem), 404, SAFE, "text/plain; charset=utf-8")


def _file(path: Path, media_type: str, headers: dict[str, str], name: str | None = None) -> Response:
    if not path.is_file():
        raise LabError("This file is not there (yet).")
    return FileResponse(path, media_type=media_type, headers=SAFE | headers, filename=name)


def _picture(path: Path, media_type: str = "image/png") -> Response:
    # The page adds ?v=<time of the file>: what it asks for never changes under the same address.
    return _file(path, media_type, {"Cache-Control": "private, max-age=86400"})


def _example(id: str, number: int) -> Response:
    if id not in examples() or not 0 <= number < len(examples()[id].pictures):
        raise LabError("There is no such picture.")
    return _file(examples()[id].pictures[number], "image/png", {"Cache-Control": "public, max-age=86400"})


def _made(comparison: Comparison, kind: str) -> Response:
    """The grid, table or report, made anew when a run has finished since."""
    if kind not in KINDS:
        raise LabError("There is no such file.")
    if comparison.task in TASKS and not getattr(TASKS[comparison.task], "compared", True):
        raise LabError("This job has no grid, table or report: take its runs' files along.")
    path = comparison.folder / KINDS[kind]
    newest = max((run.finished or 0.0 for run in comparison.runs if run.state == "done"), default=0.0)
    if newest and (not path.is_file() or path.stat().st_mtime < newest):
        compare.write_report(comparison.folder, comparison.spec, [run.as_dict() for run in comparison.runs])
    name = f"{slug(comparison.title)}-{KINDS[kind]}"
    fresh = {"Cache-Control": "private, no-cache"}
    if kind == "report":
        return _file(path, "text/html; charset=utf-8", fresh | {"Content-Security-Policy": REPORT_POLICY})
    return _file(path, "image/png" if kind == "grid" else "text/csv; charset=utf-8", fresh, name)


def _of_run(store: Store, owner: str, id: str, kind: str) -> Response:
    run = store.run(owner, id)
    if kind == "preview":
        return _picture(run.folder / "preview.png")
    if kind == "log":
        text = store.log_tail(owner, id, 1000) or "The log is empty.\n"
        headers = SAFE | {"Cache-Control": "private, no-cache"}
        return Response(text, 200, headers, "text/plain; charset=utf-8")
    if kind in ("diffusers", "kohya"):  # written when the run made its adapter
        title = slug(store.comparison(owner, run.comparison).title)
        path = run.folder / "export" / f"{kind}.safetensors"
        return _file(path, "application/octet-stream", {}, f"{title}-{run.method}-{kind}.safetensors")
    if kind == "adapter":
        name = f"{slug(store.comparison(owner, run.comparison).title)}-{run.method}-s{run.seed}"
        headers = SAFE | {"Content-Disposition": f'attachment; filename="{name}.zip"'}
        return Response(_zipped(run.folder / "adapter", name), 200, headers, "application/zip")
    raise LabError("There is no such file.")


def _zipped(folder: Path, name: str) -> bytes:
    """The PEFT folder as a zip: weights, configuration and card, nothing else that may lie there."""
    kept = [p for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", ".json", ".md") and p.is_file()]
    if not any(p.suffix == ".safetensors" for p in kept):
        raise LabError("This run has no adapter (yet).")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for path in kept:
            file.write(path, f"{name}/{path.name}")
    return buffer.getvalue()


def uploads_only(block: Any) -> None:
    """Make a component take files that came in by the upload route, and no addresses, which Gradio would fetch."""
    move = getattr(block, "async_move_resource_to_block_cache", None)
    if move is None:
        return

    async def checked(path: str | Path | None) -> str | None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("This file was not uploaded here: choose it again.", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = checked


def slug(text: str) -> str:
    """A file name from a title: ASCII letters, digits and hyphens, at most 60."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "comparison"


def version(path: Path) -> int:
    """Changes whenever the file does: for the ?v= of an address."""
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except OSError:
        return 0


def address(*parts: Any, v: int | None = None) -> str:
    """Address of a file, relative to the page (which may be served under a prefix)."""
    return "/".join(["files", *map(str, parts)]) + (f"?v={v}" if v else "")
