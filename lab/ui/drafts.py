"""Pictures that a visitor has sent but not yet submitted, kept by owner under LAB_HOME/drafts.

The page holds a list of small records (id, size, crop, caption); the pixels lie here, re-encoded, under random ids
that mean something for their owner only. A closed tab loses nothing: `save` and `load` keep the list itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.files import write_atomic
from lab.uploads import check_text

if TYPE_CHECKING:
    from PIL import Image

KEPT = 60  # pictures of one owner that wait here at once; older ones go first
KEPT_DAYS = 14
THUMBNAIL = 560
MAX_CAPTION = 300
_saving = threading.Lock()  # two handlers of one page may save at once, and share the temporary file's name
_ID = re.compile(r"[0-9a-f]{24}")

Picture = dict[str, Any]  # {"id", "width", "height", "crop": [left, top, size], "caption"}


class Drafts:
    """One owner's waiting pictures."""

    def __init__(self, home: Path, owner: str) -> None:
        self.folder = home / "drafts" / hashlib.sha256(owner.encode()).hexdigest()[:32]

    def add(self, image: Image.Image, caption: str = "", crop: list[int] | None = None) -> Picture:
        """Keep a picture and return its record, cropped to the centred square unless told otherwise."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        waiting = sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime)
        for path in waiting[: max(0, len(waiting) - KEPT + 1)]:
            path.unlink(missing_ok=True)
            path.with_suffix(".jpg").unlink(missing_ok=True)
        id = secrets.token_hex(12)
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        write_atomic(self.folder / f"{id}.png", _encoded(image, "PNG", compress_level=3))
        write_atomic(self.folder / f"{id}.jpg", _encoded(small, "JPEG", quality=88))
        size = min(image.size)
        centred = [(image.width - size) // 2, (image.height - size) // 2, size]
        return {
            "id": id,
            "width": image.width,
            "height": image.height,
            "crop": crop or centred,
            "caption": caption,
        }

    def path(self, id: Any, suffix: str) -> Path:
        """Where this owner's picture lies. Raises LabError for ids that are not theirs or do not exist."""
        if not isinstance(id, str) or not _ID.fullmatch(id) or not (self.folder / f"{id}{suffix}").is_file():
            raise LabError("A picture of this draft is not there any more: remove it and add it again.")
        return self.folder / f"{id}{suffix}"

    def image(self, id: Any) -> Image.Image:
        from PIL import Image

        with Image.open(self.path(id, ".png"), formats=["PNG"]) as file:
            return file.convert("RGB")

    def save(self, draft: dict[str, Any]) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _saving:
            write_atomic(self.folder / "draft.json", json.dumps(draft, ensure_ascii=False))

    def load(self) -> dict[str, Any]:
        """The draft as last saved, without pictures that are gone; {} when there is none."""
        try:
            draft = json.loads((self.folder / "draft.json").read_text(encoding="utf-8"))
            pictures = [p for p in draft.get("pictures", []) if (self.folder / f"{p['id']}.png").is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {**draft, "pictures": pictures}

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def checked(pictures: Any, limit: int = 20) -> list[Picture]:
    """The list as it came from the browser, with every field of the right type and range. Raises LabError."""
    if pictures is None:
        return []
    if not isinstance(pictures, list) or not all(isinstance(p, dict) for p in pictures):
        raise LabError("The list of pictures could not be read: reload the page.")
    if len(pictures) > limit:
        raise LabError(f"At most {limit} pictures of the subject are used, {len(pictures)} given: leave some out.")
    found = []
    for number, picture in enumerate(pictures, start=1):
        width, height = (_whole(picture.get(side), f"The {side} of picture {number}") for side in ("width", "height"))
        crop = picture.get("crop")
        if not isinstance(crop, list) or len(crop) != 3:
            raise LabError(f"The crop of picture {number} must be left, top and size.")
        left, top, size = (_whole(v, f"The crop of picture {number}") for v in crop)
        if size < 1 or left + size > width or top + size > height:
            raise LabError(f"The crop of picture {number} reaches beyond the picture: reset it.")
        caption = check_text(f"The caption of picture {number}", picture.get("caption"), MAX_CAPTION, empty=True)
        found.append({"id": picture.get("id"), "width": width, "height": height, "crop": [left, top, size]})
        found[-1]["caption"] = caption
    return found


def sweep(home: Path, days: float = KEPT_DAYS) -> None:
    """Remove drafts that nobody touched for days."""
    for folder in (home / "drafts").glob("*"):
        newest = max((path.stat().st_mtime for path in folder.glob("*")), default=0.0)
        if newest < time.time() - days * 86400:
            shutil.rmtree(folder, ignore_errors=True)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or not 0 <= value <= 100_000:
        raise LabError(f"{name} must be a whole number of pixels, 0 or larger.")
    return int(value)


def _encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
