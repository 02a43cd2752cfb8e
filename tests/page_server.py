"""The page served for a test, and visitors who talk to it over HTTP as the browser does."""

from __future__ import annotations

import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from PIL import Image

from lab.runs import Run, Store
from lab.ui import settings
from lab.ui.owner import COOKIE, Owners, secret
from lab.ui.page import application

PICTURE = {"crop": [0, 0, 64], "width": 64, "height": 64, "caption": ""}


@contextmanager
def served(home: Path) -> Iterator[str]:
    """The application in a thread of this process, without a worker; its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(home), log_level="error"))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


class Visitor:
    """A browser, or something that pretends to be one: a cookie and a session."""

    def __init__(self, address: str, home: Path, cookie: str | None = "own") -> None:
        self.http = httpx.Client(base_url=address, timeout=60)
        self.session = secrets.token_hex(6)
        if cookie == "own":
            self.http.get("/")
        elif cookie:
            self.http.cookies.set(COOKIE, cookie)
        self.owner = Owners(secret(home)).check(self.http.cookies.get(COOKIE))
        with httpx.Client(base_url=address, timeout=60) as anybody:
            self.events = {d["api_name"]: d["id"] for d in anybody.get("/config").json()["dependencies"]}

    def call(self, event: str, data: list[Any], said: dict[str, Any] | None = None, query: str = "") -> dict[str, Any]:
        """Run a handler as the page's own script would; {"success", "output"} as the server sends it."""
        body = {
            "data": data,
            "fn_index": self.events[event],
            "session_hash": self.session,
            "event_data": said,
            "trigger_id": None,
        }
        joined = self.http.post(f"/gradio_api/queue/join{query}", json=body)
        joined.raise_for_status()
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("the server closed the stream without an answer")


def pictures(count: int = 3) -> list[Image.Image]:
    return [Image.new("RGB", (64, 64), (40 * i, 90, 200 - 40 * i)) for i in range(count)]


def finish(run: Run, store: Store) -> None:
    """Leave in a run's folder what a finished run leaves, and say so in the table."""
    (run.folder / "samples").mkdir(parents=True)
    for prompt in range(2):
        Image.new("RGB", (64, 64), "teal").save(run.folder / "samples" / f"p{prompt}_s0.png")
    scores = {"clip_t": 0.27, "clip_i": 0.7 + 0.01 * run.seed, "sample_seconds": 1.0}
    result = {"method": run.method, "seed": run.seed, "knobs": run.knobs} | scores
    if run.method != "base":
        (run.folder / "adapter").mkdir()
        (run.folder / "adapter" / "adapter_config.json").write_text("{}")
        (run.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (run.folder / "adapter" / "optimizer.pt").write_bytes(b"not for anybody")
        Image.new("RGB", (128, 64), "orange").save(run.folder / "preview.png")
        (run.folder / "log.txt").write_text("step 1\nstep 2\n")
        (run.folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {1 / i}}}\n' for i in (1, 2, 3)))
        costs = {"adapter_bytes": 4096, "train_seconds": 3.0, "peak_memory_bytes": 10**9, "final_loss": 0.1}
        result |= costs | {"trainable_parameters": 1000}
    (run.folder / "result.json").write_text(json.dumps(result))
    sql = "UPDATE runs SET state = 'done', step = 3, steps = 3, attempt = 1, started = ?, finished = ? WHERE id = ?"
    store._table.write(sql, time.time() - 3, time.time(), run.id)


def form(**given: Any) -> dict[str, Any]:
    """What the browser sends on Train, with some of it replaced."""
    words = {"pictures": [PICTURE | {"id": f"{i:024x}"} for i in range(3)], "class_word": "fox", "trigger": "sks"}
    picker = {"picker": {"chosen": ["lora", "nora"], "knobs": {}}, "adapters": []}
    return words | picker | settings.shown(settings.DEFAULT_BASE) | given


def ticked(*chosen: str, **knobs: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": list(chosen), "knobs": knobs}
