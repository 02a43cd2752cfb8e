"""Parts of committed tables, each between two comments, so that one can be measured again alone."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, part: str, body: str, head: str = "") -> None:
    """Replace one part of a Markdown file, leaving the others; a file that is not there begins with `head`."""
    start, end = f"<!-- {part} -->", f"<!-- /{part} -->"
    text = path.read_text(encoding="utf-8") if path.exists() else head
    block = "\n".join([start, body, end])
    if start in text:
        text = text[: text.index(start)] + block + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip() + "\n\n" + block + "\n"
    path.write_text(text.lstrip("\n"), encoding="utf-8")
