"""A training run's checkpoint: one safetensors file, written atomically; no pickle.

Tensors: "model.*" (everything the adapter trains), "method.*" (what the method keeps beside), "optimizer.*",
"rng.*". Everything else stands as JSON in the file's header.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab.errors import LabError
from lab.files import write_atomic

if TYPE_CHECKING:
    from lab.methods import Method


@dataclass
class Progress:
    """Where a run stands: steps done, examples drawn, seconds spent, peak memory so far."""

    step: int = 0
    position: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


class Checkpoint:
    """Saves and restores model, optimizer, the loop's generator and torch's global generators."""

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        generator: torch.Generator,
        settings: dict[str, Any],
    ) -> None:
        self.path = folder / "state.safetensors"
        self.model, self.method, self.optimizer, self.scaler = model, method, optimizer, scaler
        self.generator = generator
        self.settings = settings | {"method": method.id}

    def save(self, step: int, position: int, seconds: float, peak_memory_bytes: int) -> None:
        """Replace the checkpoint. Raises LabError when the disk is full; the previous one is then still there."""
        from safetensors.torch import save

        plain, tensors = _split(self.optimizer.state_dict(), "optimizer")
        tensors |= {f"model.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        tensors |= {f"method.{name}": tensor for name, tensor in self.method.state(self.model).items()}
        tensors |= {f"rng.{name}": state for name, state in self._rng().items()}
        progress = Progress(step, position, seconds, peak_memory_bytes)
        header = {"progress": vars(progress), "settings": self.settings, "optimizer": plain}
        header["scaler"] = self.scaler.state_dict()  # empty unless training in fp16
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_atomic(self.path, save(whole, {"lab": json.dumps(header)}))

    def load(self) -> Progress:
        """Restore the last checkpoint, or start at nothing. Raises LabError when it was made with other settings."""
        if not self.path.exists():
            return Progress()
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            header = json.loads(file.metadata()["lab"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        self._same_settings(header["settings"])
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                with torch.no_grad():
                    parameter.copy_(tensors[f"model.{name}"])
        kept = {name.removeprefix("method."): t for name, t in tensors.items() if name.startswith("method.")}
        self.method.load_state(self.model, kept)
        self.optimizer.load_state_dict(_join(header["optimizer"], tensors))
        self.scaler.load_state_dict(header["scaler"])
        self.generator.set_state(tensors["rng.loop"])
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return Progress(**header["progress"])

    def _rng(self) -> dict[str, torch.Tensor]:
        states = {"loop": self.generator.get_state(), "cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def _same_settings(self, saved: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.settings))
        for name in sorted(saved):  # a setting that is newer than the checkpoint had its default then
            if saved[name] != now.get(name):
                raise LabError(
                    f"The checkpoint in {self.path.parent.parent.name} was made with {name} = {saved.get(name)}, "
                    f"not {now.get(name)}: choose another output folder, or remove this one."
                )

    def remove(self) -> None:
        shutil.rmtree(self.path.parent, ignore_errors=True)


def _split(value: Any, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A nested state → the same with tensors replaced by their names, and the tensors by name.

    Dicts become lists of pairs: JSON keys are strings, an optimizer's are numbers.
    """
    if isinstance(value, torch.Tensor):
        return {"tensor": name}, {name: value}
    if isinstance(value, dict | list | tuple):
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        parts = [(key, *_split(item, f"{name}.{key}")) for key, item in pairs]
        kind = "dict" if isinstance(value, dict) else "list"
        tensors = {k: v for _, _, inner in parts for k, v in inner.items()}
        return {kind: [[key, plain] for key, plain, _ in parts]}, tensors
    if value is None or isinstance(value, bool | int | float | str):
        return value, {}
    raise TypeError(f"optimizer state {name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _join(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split` (tuples come back as lists)."""
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "dict" in plain:
        return {key: _join(item, tensors) for key, item in plain["dict"]}
    return [_join(item, tensors) for _, item in plain["list"]]
