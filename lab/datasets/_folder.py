"""Pictures sorted into class folders, in a folder or a zip, from people one does not know.

Layouts: CLASS/picture, or train/CLASS/picture beside test/CLASS/picture (and val/…); folders around these are
skipped, folders inside a class belong to it. Nothing is ever unpacked under a name from the archive: members are read
as bytes, and every picture is decoded by `lab.uploads` before it counts.
"""

from __future__ import annotations

import stat
import unicodedata
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from lab.errors import LabError

Split = Literal["", "train", "validation", "test"]
SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_MEMBERS = 400_000
MAX_DEPTH = 24


@dataclass(frozen=True)
class Member:
    path: PurePosixPath
    size: int
    source: object  # what `Source.read` needs


@dataclass
class Source:
    """Names and sizes of the files of a folder or zip, and how to read one. `ignored`: files that are no pictures."""

    members: list[Member] = field(default_factory=list)
    ignored: int = 0
    archive: zipfile.ZipFile | None = None

    def read(self, member: Member, limit: int) -> bytes:
        """The file's bytes, at most `limit` + 1 of them."""
        if self.archive is not None:
            with self.archive.open(member.source) as file:  # ty: ignore[invalid-argument-type]
                return _read(file, limit)
        with Path(str(member.source)).open("rb") as file:
            return _read(file, limit)


def _read(file: IO[bytes], limit: int) -> bytes:
    return file.read(limit + 1)


@contextmanager
def opened(path: Path) -> Generator[Source, None, None]:
    """The files of a folder or zip. Raises LabError for anything else, and for archives that are not what they say."""
    if path.is_dir():
        yield _folder(path)
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, ValueError):
        raise LabError(
            f"'{path.name[:60]}' is neither a folder nor a zip file that can be read: pack the class folders into a zip."
        ) from None
    with archive:
        yield _zip(archive)


def _folder(root: Path) -> Source:
    source = Source()
    top = root.resolve()
    for path in sorted(top.rglob("*")):
        relative = PurePosixPath(path.relative_to(top).as_posix())
        if path.is_dir() or _hidden(relative):
            continue
        # A link that leads out of the folder is somebody else's file.
        if path.suffix.lower() not in PICTURES or not path.resolve().is_relative_to(top):
            source.ignored += 1
            continue
        source.members.append(Member(relative, path.stat().st_size, path))
        _check_count(len(source.members))
    return source


def _zip(archive: zipfile.ZipFile) -> Source:
    source = Source(archive=archive)
    infos = archive.infolist()
    _check_count(len(infos))
    for info in infos:
        path = PurePosixPath(_name(info).replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
            raise LabError(f"The zip holds a path that leads out of it ('{str(path)[:60]}'): pack the folders again.")
        if info.is_dir() or _hidden(path):
            continue
        if info.flag_bits & 1:
            raise LabError("The zip is encrypted: pack it again without a password.")
        if path.suffix.lower() not in PICTURES or stat.S_ISLNK(info.external_attr >> 16):
            source.ignored += 1
            continue
        source.members.append(Member(path, info.file_size, info))
    source.members.sort(key=lambda member: str(member.path))
    return source


def _name(info: zipfile.ZipInfo) -> str:
    """The member's name; without the UTF-8 flag Python reads it as code page 437, and many programs forget the flag."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return info.filename


def _hidden(path: PurePosixPath) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in path.parts)


def _check_count(count: int) -> None:
    if count > MAX_MEMBERS:
        raise LabError(f"There are more than {MAX_MEMBERS} files in it: leave some out.")


def sort(members: list[Member]) -> tuple[list[str], list[tuple[Split, int]]]:
    """Class names in alphabetical order, and each member's (split, class).

    Raises LabError when pictures lie outside class folders or two folders have the same name.
    """
    dirs = [member.path.parent.parts for member in members]
    if not dirs:
        raise LabError(
            "No pictures were found: make one sub-folder for each class, with PNG, JPEG, WebP, GIF, BMP or TIFF files."
        )
    if max(map(len, dirs)) > MAX_DEPTH:
        raise LabError(f"Folders lie more than {MAX_DEPTH} deep in it: pack the class folders alone.")
    # Folders around everything: as long as all pictures share the first one and still lie in another below it.
    while len({d[0] for d in dirs if d}) == 1 and all(len(d) > 1 for d in dirs):
        dirs = [d[1:] for d in dirs]
    splits: list[Split] = [""] * len(dirs)
    if all(len(d) > 1 and d[0].lower() in SPLITS for d in dirs):
        splits = [SPLITS[d[0].lower()] for d in dirs]
        dirs = [d[1:] for d in dirs]
    loose = next((m for m, d in zip(members, dirs, strict=True) if not d), None)
    if loose is not None:
        raise LabError(
            f"'{loose.path.name[:60]}' lies outside the class folders: each picture must be in its class's own folder."
        )
    folders = sorted({d[0] for d in dirs})
    names = [class_name(folder) for folder in folders]
    seen: dict[str, str] = {}
    for folder, name in zip(folders, names, strict=True):
        if name in seen:
            raise LabError(f"The folders '{seen[name][:60]}' and '{folder[:60]}' give the same class name: rename one.")
        seen[name] = folder
    index = {folder: i for i, folder in enumerate(folders)}
    return names, [(s, index[d[0]]) for s, d in zip(splits, dirs, strict=True)]


def class_name(folder: str) -> str:
    """A folder's name as a class name: one line of any script, underscores as spaces, without control characters."""
    text = unicodedata.normalize("NFC", folder).replace("_", " ")
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    return " ".join(text.split())[:100] or "unnamed"
