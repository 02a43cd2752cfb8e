"""A base's weights by layer, read one at a time from its files where these are on this machine; nothing is downloaded.

Layers have the names of adapter files: the UNet's without a prefix, the text encoders' with `text_encoder.` or
`text_encoder_2.` before them. An open_clip model's layers are named as in the model.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.bases import BASES, Base, resolve
from lab.errors import LabError
from lab.files import safetensors_table
from lab.kohya import in_text_model

if TYPE_CHECKING:
    import torch

PARTS = {"": "unet", "text_encoder.": "text_encoder", "text_encoder_2.": "text_encoder_2"}
Shape = tuple[int, ...]


class Weights:
    """The linear and convolution weights of one base."""

    def __init__(self, row: Base) -> None:
        self.row = row
        self._lock = threading.Lock()

    @functools.cached_property
    def _places(self) -> dict[str, tuple[Any, str, Shape]]:
        """layer → (file, or the loaded model's tensors; key; shape)."""
        folder = _folder(self.row)
        if folder is not None:
            return _in_files(folder, self.row.variant)
        return _in_model(self.row)

    def layers(self) -> dict[str, Shape]:
        with self._lock:
            return {layer: shape for layer, (_, _, shape) in self._places.items()}

    def shape(self, layer: str) -> Shape | None:
        """(out, in) or (out, in, kh, kw), None for a layer that the base does not have."""
        return self.layers().get(layer)

    def get(self, layer: str) -> torch.Tensor:
        """The weight in float32. Raises LabError for a layer that the base does not have."""
        with self._lock:
            if layer not in self._places:
                raise LabError(f"{self.row.name} has no layer {layer[:120]}.")
            place, key, _ = self._places[layer]
        if not isinstance(place, Path):
            return place[key].detach().float().cpu()
        from safetensors import safe_open

        with safe_open(str(place), "pt") as file:
            return file.get_tensor(key).float()


@functools.lru_cache(maxsize=8)
def _open(row_id: str) -> Weights:
    return Weights(resolve(row_id))


def weights(base: str | Base) -> Weights:
    """The weights of a base by id, folder, file or Hub id. Raises LabError when it is not known."""
    row = resolve(base) if isinstance(base, str) else base
    return _open(row.id) if row.id in BASES and BASES[row.id] is row else Weights(row)


def at_hand(row: Base) -> bool:
    """Whether the base's weights are on this machine, so that nothing has to be downloaded."""
    return (
        _folder(row) is not None or Path(row.source).is_file() or (row.family != "sdxl" and Path(row.source).is_dir())
    )


def _folder(row: Base) -> Path | None:
    """The diffusers folder with the base's files: its own, or the Hub's cache."""
    if row.family != "sdxl":
        return None
    if (Path(row.source) / "unet" / "config.json").is_file():
        return Path(row.source)
    if Path(row.source).suffix or row.source.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(row.source, "unet/config.json")
    folder = Path(found).parent.parent if isinstance(found, str) else None
    return folder if folder and any((folder / "unet").glob("*.safetensors")) else None


def _in_files(folder: Path, variant: str | None) -> dict[str, tuple[Path, str, Shape]]:
    places: dict[str, tuple[Path, str, Shape]] = {}
    for prefix, part in PARTS.items():
        files = sorted((folder / part).glob("*.safetensors"))
        plain = [f for f in files if not (variant and f".{variant}." in f.name)]
        for file in plain or files:
            for key, shape in _header(file).items():
                if key.endswith(".weight") and len(shape) in (2, 4):
                    places[_layer(prefix, key)] = (file, key, shape)
    if not places:
        raise LabError(f"{folder.name} holds no safetensors weights.")
    return places


def _layer(prefix: str, key: str) -> str:
    """A weight's layer as adapter files call it."""
    name = key.removesuffix(".weight")
    return prefix + (in_text_model(name) if prefix else name)


def _header(file: Path) -> dict[str, Shape]:
    with file.open("rb") as opened:
        _, table = safetensors_table(opened)
    return {k: tuple(v["shape"]) for k, v in table.items() if k != "__metadata__"}


def _in_model(row: Base) -> dict[str, tuple[dict[str, torch.Tensor], str, Shape]]:
    """From the loaded model: single files, and open_clip's."""
    import torch

    whole = (row.family == "sdxl" and row.loaded()) or row.load("cpu", torch.float32)
    parts = {p: getattr(whole, a) for p, a in PARTS.items()} if row.family == "sdxl" else {"": whole.model}
    places = {}
    for prefix, part in parts.items():
        state = part.state_dict()
        for key, value in state.items():
            if key.endswith(".weight") and value.dim() in (2, 4):
                places[_layer(prefix, key)] = (state, key, tuple(value.shape))
    return places
