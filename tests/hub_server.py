"""A Hugging Face Hub of one's own, on this machine: enough of it to list models and to fetch their files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `models`: repository id → folder. `gated` ids give their files to nobody; `slow` is seconds a megabyte
    takes, of files larger than 100 kB."""

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = (), slow: float = 0.0) -> None:
        self.models, self.gated, self.slow = models, gated, slow
        self.sent: list[str] = []  # files that were fetched, in order
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, to: BaseHTTPRequestHandler, body: bool) -> None:
        path = to.path.partition("?")[0].strip("/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.models:
            _send(to, 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("api/"):
            _send(to, 200, json.dumps(self._listing(repo, rest)).encode(), {"Content-Type": "application/json"}, body)
        elif repo in self.gated:
            _send(to, 403, b"gated", {"X-Error-Code": "GatedRepo"}, body)
        else:
            self._file(to, repo, "/".join(rest[2:]), body)  # resolve/<revision>/<file>

    def _listing(self, repo: str, rest: list[str]) -> Any:
        folder = self.models[repo]
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            return [
                {
                    "type": "file",
                    "path": f.relative_to(folder).as_posix(),
                    "size": f.stat().st_size,
                    "oid": _hash(f)[:40],
                }
                for f in files
            ]
        siblings = [{"rfilename": f.relative_to(folder).as_posix(), "size": f.stat().st_size} for f in files]
        return {"id": repo, "sha": COMMIT, "private": False, "gated": repo in self.gated, "siblings": siblings}

    def _file(self, to: BaseHTTPRequestHandler, repo: str, name: str, body: bool) -> None:
        path = self.models[repo] / name
        if not path.is_file():
            _send(to, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(path)}"', "Accept-Ranges": "bytes"}
        content = path.read_bytes()
        if not body:
            to.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                to.send_header(key, value)
            to.end_headers()
            return
        self.sent.append(f"{repo}/{name}")
        to.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            to.send_header(key, value)
        to.end_headers()
        with contextlib.suppress(OSError):
            step = max(1, len(content) // 8)
            for start in range(0, len(content), step):
                to.wfile.write(content[start : start + step])
                time.sleep(self.slow * step / 1e6 if len(content) > 100_000 else 0)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _send(to: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
    to.send_response(status)
    for key, value in (headers | {"Content-Length": str(len(content))}).items():
        to.send_header(key, value)
    to.end_headers()
    if body:
        to.wfile.write(content)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
