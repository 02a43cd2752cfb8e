"""Loading a saved adapter folder of any method, with every way it can be wrong told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def register_all() -> None:
    """Make the lab's own methods known to PEFT, so that `PeftModel.from_pretrained` reads their folders."""
    from lab.methods import METHODS
    from lab.methods._tuner import config_class
    from lab.methods.own import OwnMethod

    for method in METHODS:
        if isinstance(method, OwnMethod):
            config_class(method)


def settings(folder: str | Path) -> dict[str, Any]:
    """What a folder's adapter_config.json says. Raises LabError when it is missing or no JSON object with a tuner's name."""
    path = Path(folder) / "adapter_config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise LabError(f"{folder} is no adapter folder: it has no adapter_config.json.") from None
    except (OSError, ValueError) as error:
        raise LabError(f"{path} cannot be read: {error}.") from None
    if not isinstance(found, dict) or not isinstance(found.get("peft_type"), str):
        raise LabError(f"{path} does not say which kind of adapter it describes.")
    return found


def load(
    model: torch.nn.Module, folder: str | Path, adapter_name: str = "default", *, trainable: bool = False
) -> PeftModel:
    """The base `model` (or a PeftModel, which gets one more adapter) with a saved adapter on it.

    Raises LabError when the folder is not an adapter's, the file is truncated or was changed, or belongs to another
    base. Only safetensors files are read.
    """
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from safetensors import SafetensorError

    register_all()
    kind = settings(folder)["peft_type"]
    if kind not in {t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING}:
        raise LabError(f"{folder} holds an adapter of kind {kind}, which this version does not know.")
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise LabError(f"{folder} has no adapter_model.safetensors.")
    _check_numbers(file)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), adapter_name, is_trainable=trainable)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=trainable)
    except SafetensorError as error:
        raise LabError(f"{file} is damaged or incomplete: {error}.") from None
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LabError(f"The adapter in {folder} does not fit this base model: {first[:300]}") from None


def _check_numbers(file: Path) -> None:
    """Raise LabError when the file cannot be parsed, or a tensor in it is not finite."""
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as content:
            for name in content.keys():  # noqa: SIM118 - no mapping
                value = content.get_tensor(name)
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise LabError(f"{file} holds NaN or infinity in {name}.")
    except (SafetensorError, OSError) as error:
        raise LabError(f"{file} is damaged or incomplete: {error}.") from None
