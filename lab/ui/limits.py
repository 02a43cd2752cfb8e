"""What one browser may send: uploads need its owner's cookie, and have a size an hour."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.ui.owner import NO_OWNER, Owners, token_of

HOUR_S = 3600.0
PATH = "/gradio_api/upload"


def megabytes(name: str, default: int) -> int:
    """A limit in bytes from an environment variable in MB."""
    given = os.environ.get(name, "").strip()
    return (int(given) if given.isdecimal() and int(given) else default) * 2**20


def largest_file() -> int:
    """Largest single upload in bytes: an adapter (LAB_MAX_ADAPTER_MB) or a zip of pictures (LAB_MAX_ZIP_MB);
    `lab.uploads` takes less of a picture."""
    return max(megabytes("LAB_MAX_ZIP_MB", 256), megabytes("LAB_MAX_ADAPTER_MB", 1024))


def check_zip(path: Path) -> None:
    """Raise LabError for a zip of pictures beyond LAB_MAX_ZIP_MB; the upload route takes what any tab takes."""
    limit = megabytes("LAB_MAX_ZIP_MB", 256)
    if path.stat().st_size > limit:
        raise LabError(
            f"The zip has {path.stat().st_size / 2**20:.0f} MB: at most {limit >> 20} MB of pictures are taken."
        )


class UploadLimits:
    """ASGI middleware before Gradio's upload route: 403 without an owner, 411 without a length, 429 beyond the limit.

    Counted in this process: a restart forgets. What was uploaded and not used, Gradio removes after a day.
    """

    def __init__(self, app: Any, owners: Owners, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.owners, self.clock = app, owners, clock
        self.sent: dict[str, deque[tuple[float, int]]] = {}  # owner → (when, bytes) of the last hour

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith(PATH):
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
            status, sentence = self._judge(self.owners.check(token_of(headers)), headers.get("content-length", ""))
            if status:
                kind = [(b"content-type", b"text/plain; charset=utf-8")]
                await send({"type": "http.response.start", "status": status, "headers": kind})
                await send({"type": "http.response.body", "body": sentence.encode()})
                return
        await self.app(scope, receive, send)

    def _judge(self, owner: str | None, length: str) -> tuple[int, str]:
        """(0, "") for an upload that may come in, and counts it; else the status and the sentence."""
        if owner is None:
            return 403, NO_OWNER
        if not length.isdecimal():
            return 411, "An upload must say its length."
        now, limit = self.clock(), megabytes("LAB_MAX_HOURLY_UPLOADS_MB", 2048)
        for known in [k for k, times in self.sent.items() if not times or times[-1][0] < now - HOUR_S]:
            del self.sent[known]
        mine = self.sent.setdefault(owner, deque())
        while mine and mine[0][0] < now - HOUR_S:
            mine.popleft()
        if sum(size for _, size in mine) + int(length) > limit:
            return 429, f"At most {limit // 2**20} MB are taken from one browser an hour: please try again later."
        mine.append((now, int(length)))
        return 0, ""
