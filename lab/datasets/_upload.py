"""Datasets that people bring: read once, checked, and kept under LAB_HOME/datasets/<digest>.

A kept dataset holds fresh pictures only (at most 512 pixels on a side, PNG up to 256, JPEG of quality 95 above), in
numbered files, and `dataset.json`; nothing of the upload's own bytes or file names is on the disk. The digest names
the contents: the same upload is kept once.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import uploads
from lab.clip import protocol
from lab.datasets import MAX_CLASSES, MAX_PICTURES, Dataset, Listing, Picture, check, home
from lab.datasets._folder import Member, Source, Split, opened, sort
from lab.errors import LabError

if TYPE_CHECKING:
    from PIL import Image

PREFIX = "upload:"
SIDE, LOSSLESS = 512, 256
SHOWN = 5  # damaged files named in a message
DEFAULT_TEMPLATE = "a picture of a {}."


def max_bytes() -> int:
    """Largest sum of all pictures, unpacked, in bytes (LAB_MAX_DATASET_MB, default 1024)."""
    given = os.environ.get("LAB_MAX_DATASET_MB", "").strip()
    return (int(given) if given.isdecimal() and int(given) else 1024) * 2**20


def take(path: Path, *, skip_damaged: bool = False, root: Path | None = None) -> str:
    """Read, check and keep a folder or zip; returns the dataset's name, "upload:<digest>".

    Raises LabError, one sentence: no pictures, one class, too much, or damaged pictures (named; with `skip_damaged`
    they are left out and noted).
    """
    root = (root or home()) / "datasets"
    with opened(path) as source:
        names, places = sort(source.members)
        _check_size(source, names)
        incoming = root / f".incoming-{secrets.token_hex(8)}"
        incoming.mkdir(parents=True)
        try:
            kept, damaged = _decode(source, places, incoming)
            if damaged and not skip_damaged:
                raise LabError(_damaged(damaged))
            notes = _notes(source, damaged)
            return _keep(root, incoming, names, kept, notes)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)


def _check_size(source: Source, names: list[str]) -> None:
    total = sum(member.size for member in source.members)
    if total > max_bytes():
        raise LabError(
            f"The pictures take {total / 2**20:.0f} MB unpacked, at most {max_bytes() // 2**20} MB are taken: "
            "leave some out, or make them smaller."
        )
    if len(source.members) > MAX_PICTURES:
        raise LabError(f"{len(source.members)} pictures are too many: at most {MAX_PICTURES}; leave some out.")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise LabError(
            f"Between 2 and {MAX_CLASSES} classes are needed, {len(names)} "
            f"{'was' if len(names) == 1 else 'were'} found: make one sub-folder for each class."
        )


Kept = dict[str, Any]  # file, class, split, digest


def _decode(source: Source, places: list[tuple[Split, int]], folder: Path) -> tuple[list[Kept], list[str]]:
    """Every picture decoded and written afresh; the names of those that could not be."""
    kept: list[Kept] = []
    damaged: list[str] = []
    for member, (split, label) in zip(source.members, places, strict=True):
        try:
            image = uploads.decode(_bytes(source, member), member.path.name, max_side=SIDE)
        except LabError:
            damaged.append(str(member.path))
            continue
        content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]
        small = max(image.size) <= LOSSLESS
        file = f"{len(kept):06d}.{'png' if small else 'jpg'}"
        image.save(folder / file, quality=95, compress_level=3)  # each format takes its own and leaves the other
        kept.append({"file": file, "class": label, "split": split, "digest": content})
    return kept, damaged


def _bytes(source: Source, member: Member) -> bytes:
    try:
        return source.read(member, uploads.max_bytes())
    except Exception as error:
        raise LabError(f"'{member.path.name}' could not be read.") from error


def _damaged(names: list[str]) -> str:
    shown = ", ".join(f"'{name[-60:]}'" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"{len(names)} of the pictures cannot be read ({shown}{more}): mend them, or choose to leave damaged ones out."
    )


def _notes(source: Source, damaged: list[str]) -> list[str]:
    notes = []
    if damaged:
        shown = ", ".join(f"'{name[-60:]}'" for name in damaged[:SHOWN])
        more = f" and {len(damaged) - SHOWN} more" if len(damaged) > SHOWN else ""
        notes.append(f"{len(damaged)} damaged pictures were left out: {shown}{more}.")
    if source.ignored:
        notes.append(f"{source.ignored} files that are no pictures were left out.")
    return notes


def _keep(root: Path, incoming: Path, names: list[str], kept: list[Kept], notes: list[str]) -> str:
    rows = [[k["file"], k["class"], k["split"], k["digest"]] for k in kept]
    text = json.dumps({"classes": names, "pictures": rows, "notes": notes}, ensure_ascii=False)
    (incoming / "dataset.json").write_text(text, encoding="utf-8")
    # Files are numbered in the order of their names, so equal contents in equal classes make an equal digest.
    digest = hashlib.sha256(text.encode()).hexdigest()[:40]
    check(_listing(incoming))
    target = root / digest
    if not target.exists():
        try:
            incoming.replace(target)
        except OSError:
            if not target.exists():  # somebody else's equal upload was faster
                raise
    return PREFIX + digest


def dataset(name: str, root: Path | None = None) -> Dataset:
    """A kept dataset by its name, "upload:<digest>". Raises LabError when there is none."""
    digest = name.removeprefix(PREFIX)
    folder = (root or home()) / "datasets" / digest
    if len(digest) != 40 or not set(digest) <= set("0123456789abcdef") or not (folder / "dataset.json").exists():
        raise LabError("This uploaded dataset was not found: upload it again.")
    return Dataset(
        id=name,
        name="Your pictures",
        template=DEFAULT_TEMPLATE,
        licence="yours",
        load=lambda _: _listing(folder),
    )


def _listing(folder: Path) -> Listing:
    made = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, int, Split, str]] = [tuple(row) for row in made["pictures"]]
    labels, digests = [row[1] for row in rows], [row[3] for row in rows]
    notes = list(made["notes"])
    splits = {row[2] for row in rows}
    if "test" in splits and "train" in splits:
        groups = {
            s: [i for i, row in enumerate(rows) if (row[2] or "train") == s] for s in ("train", "validation", "test")
        }
    else:
        train, test = protocol.split(labels, digests, len(made["classes"]))
        groups = {"train": train, "validation": [], "test": test}
        notes.append(
            "The pictures came without a test set of their own: half of each class, drawn once, is kept for testing."
        )
    seen = {digests[i] for i in groups["train"] + groups["validation"]}
    duplicates = sum(digests[i] in seen for i in groups["test"])
    if duplicates:
        notes.append(f"{duplicates} of the {len(groups['test'])} test pictures are exact copies of training pictures.")
    repeated = sum(count - 1 for count in Counter(digests).values())
    if repeated > duplicates:
        notes.append(f"{repeated} pictures are exact copies of others.")

    def read(key: str) -> Image.Image:
        return uploads.decode(folder / key)

    parts = {s: [Picture(rows[i][0], rows[i][1]) for i in indices] for s, indices in groups.items()}
    return Listing(made["classes"], parts["train"], parts["test"], read, parts["validation"], notes, duplicates)
