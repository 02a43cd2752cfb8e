"""Base models. ADD A BASE: one file in this folder that registers a row.

    from lab.bases import Base, register
    register(Base(id="my-base", name="My base", family="sdxl", source="owner/name", architecture="sdxl"))

Rows import no torch. `Base.load` hands the row to `lab/bases/_<family>.py`, which does. A base needs no row to be
used: `resolve` also takes a diffusers folder, a single `.safetensors` file, or a Hub id.

LAB_CHECKPOINTS names folders (between colons; semicolons on Windows) whose checkpoints the page offers too: single
`.safetensors` files, as ComfyUI and A1111 keep them, and diffusers folders. LAB_HUB_BASES=1 lets the page's visitors
name any model on the Hub.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lab import hub
from lab.errors import LabError
from lab.registry import Registry, unknown

if TYPE_CHECKING:
    from lab.methods import Method

ASSETS = Path(__file__).resolve().parents[2] / "assets"


@dataclass(frozen=True)
class Base:
    """One base model.

    source: a Hub id, a diffusers folder, or a single `.safetensors` checkpoint
    variant: weight variant that is taken where there is one ("fp16"), else the plain weights
    vae: Hub id or folder of the VAE to use where the base's own is SDXL's, which overflows in fp16
    megabytes: about what there is to download
    scorer: image-text model that scores its pictures: a folder of open_clip files, or "<open_clip name>:<weights>"
    size_conditioning: the base was trained with each picture's own size and crop (SDXL, section 2.2). Where it is
        not, every picture is told as an uncropped one of the base's own resolution.
    presets: task id → settings that replace the task's defaults; "learning_rates" and "knobs" by method id
    """

    id: str
    name: str
    family: Literal["sdxl", "open_clip"]
    source: str
    architecture: str
    summary: str = ""
    targets: str = "attn"
    scorer: str = "ViT-L-14:openai"
    variant: str | None = None
    vae: str | None = None
    size_conditioning: bool = True
    pixels: int | None = None  # resolution where the source cannot be read without loading it
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    licence: str = ""
    megabytes: int | None = None
    order: int = 100

    @functools.cached_property
    def resolution(self) -> int:
        """Side of the pictures it makes, in pixels."""
        if self.pixels:
            return self.pixels
        unet, vae = (_config(Path(self.source) / part / "config.json") for part in ("unet", "vae"))
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)

    @property
    def public_name(self) -> str:
        """What an adapter's file says it was trained on: the Hub id, or the folder's or file's name without its path."""
        return self.source if hub.is_id(self.source) else Path(self.source).stem

    @property
    def here(self) -> bool:
        """Whether its weights are on this machine; of a model on the Hub, as far as its UNet tells."""
        if self.family != "sdxl" or Path(self.source).exists():
            return Path(self.source).exists()
        found = hub.snapshot(self.source) if hub.is_id(self.source) else None
        return found is not None and any(found.glob("unet/*.safetensors"))

    def preset(self, task: str) -> dict[str, Any]:
        return self.presets.get(task, {})

    def learning_rate(self, method: Method) -> float:
        """The rate to train a subject with on this base: its own for the method, or the method's."""
        return self.preset("learning_rates").get(method.id, method.learning_rate)

    def load(self, device: Any = None, dtype: Any = None, told: Callable[[int, int], None] | None = None) -> Any:
        """The model, e.g. a StableDiffusionXLPipeline, on `device` (default: the lab's) with weights in `dtype`.

        told(done, all): called with the bytes of a download, a few times a second; what it raises ends the wait.
        Raises LabError, in one sentence, when it is missing, gated, unreachable, too large for the disk, or not
        safetensors.
        """
        return self._loader().load(self, device, dtype, told)

    def loaded(self) -> Any:
        """The model where it is loaded already, on whatever device and in whatever dtype, else None."""
        return getattr(self._loader(), "loaded", lambda _: None)(self)

    def hold(self, folder: Path) -> None:
        """Write down in a comparison's folder which weights it is made with, or see that they are still those. Raises
        LabError, in one sentence, when they are not."""
        from lab.bases import _prints

        _prints.hold(self, folder)

    def forget(self) -> None:
        """Let go of a loaded model, so that the next `load` reads it again."""
        self._loader().forget()

    def _loader(self) -> Any:
        return importlib.import_module(f"lab.bases._{self.family}")


def _config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LabError(
            f"'{path.parent.parent.name}' is not a whole diffusers folder: {path.parent.name}/{path.name} "
            "is missing or unreadable."
        ) from error


BASES: Registry[Base] = Registry("base model", "lab.bases")
register = BASES.register

_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
LOCAL = "local:"  # before the name of a checkpoint in LAB_CHECKPOINTS


def resolve(name: str) -> Base:
    """The base with this id, or a row made for a folder, a `.safetensors` file, a Hub id ("owner/name"), or a checkpoint
    of LAB_CHECKPOINTS ("local:name").

    Raises LabError for anything else; a pickled checkpoint is refused, because loading one runs the code in it.
    For names from strangers there is `pick`: this one opens any path.
    """
    if name in BASES:
        return BASES[name]
    if name.startswith(LOCAL):
        rows = local()
        return next((row for row in rows if row.id == name), None) or _raise(name, [row.id for row in rows])
    if name.lower().endswith(_PICKLES):
        raise LabError(
            f"'{name}' is a pickled checkpoint, which can run any code when it is opened: "
            "convert it to .safetensors first."
        )
    path = Path(name).expanduser().resolve()
    if name and path.is_dir():
        if not (path / "model_index.json").exists():
            raise LabError(f"'{name}' is not a diffusers folder: it holds no model_index.json.")
        return _folder_row(path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise LabError(f"There is no file '{name}'.")
        return _file_row(path)
    if hub.is_id(name) and not name.startswith(("./", "../")):
        for row in BASES.where(lambda row: row.source == name):
            return row
        own = {"name": name.split("/")[1], "megabytes": None}
        return _like(id=name, source=name, summary="From the Hugging Face Hub.", **own)
    return _raise(name, BASES.ids())


def pick(name: str) -> Base:
    """The base that a visitor of the page named. Raises LabError unless it is one that the page offers, or, where
    LAB_HUB_BASES=1, a Hub id: a stranger's path is never opened, nor told whether it exists."""
    rows = {row.id: row for row in offered()}
    if name in rows:
        return rows[name]
    if hub_allowed() and hub.is_id(name) and not Path(name).exists():
        return resolve(name)
    raise unknown("base model", name[:60], list(rows))


def hub_allowed() -> bool:
    """Whether the page's visitors may name any model on the Hub (LAB_HUB_BASES=1)."""
    return os.environ.get("LAB_HUB_BASES", "").strip() == "1"


def offered() -> list[Base]:
    """Every SDXL base that the page offers: the registry's, then those in LAB_CHECKPOINTS."""
    return [row for row in BASES if row.family == "sdxl"] + local()


def local() -> list[Base]:
    """The checkpoints in the folders that LAB_CHECKPOINTS names, by name; ids are "local:" and the path inside the
    folder without its suffix."""
    rows: dict[str, Base] = {}
    for folder in filter(None, os.environ.get("LAB_CHECKPOINTS", "").split(os.pathsep)):
        root = Path(folder).expanduser().resolve()
        indices = sorted(root.glob("**/model_index.json"))
        inside = {index.parent for index in indices}
        files = [f for f in sorted(root.rglob("*.safetensors")) if inside.isdisjoint(f.parents)]
        for path, row in [(i.parent, _folder_row(i.parent)) for i in indices] + [(f, _file_row(f)) for f in files]:
            id = LOCAL + path.relative_to(root).with_suffix("" if path.is_file() else path.suffix).as_posix()
            rows.setdefault(id, dataclasses.replace(row, id=id))
    return [rows[id] for id in sorted(rows)]


def _like(**own: Any) -> Base:
    """A row with SDXL 1.0's settings."""
    return dataclasses.replace(BASES["sdxl"], **own)


def _folder_row(path: Path) -> Base:
    own = {"name": path.name, "pixels": None, "architecture": str(path / "unet" / "config.json"), "variant": None}
    return _like(
        id=str(path),
        source=str(path),
        summary="A local diffusers folder.",
        megabytes=None,
        presets=_presets(path),
        **own,
    )


def _presets(folder: Path) -> dict[str, dict[str, Any]]:
    """SDXL's, but for its ranks where the UNet is of other widths, which they may exceed."""
    every = BASES["sdxl"].presets
    try:
        widths = _config(folder / "unet" / "config.json")["block_out_channels"]
    except (LabError, KeyError, TypeError):  # told when it is loaded
        return every
    return every if widths == [320, 640, 1280] else {name: v for name, v in every.items() if name != "knobs"}


def _file_row(path: Path) -> Base:
    own = {"name": path.stem, "architecture": str(path), "variant": None, "megabytes": None}
    return _like(id=str(path), source=str(path), summary="A local single-file checkpoint.", **own)


def _raise(name: str, known: list[str]) -> NoReturn:
    raise unknown("base model", name, known)


__all__ = ["ASSETS", "BASES", "Base", "hub_allowed", "local", "offered", "pick", "register", "resolve"]
