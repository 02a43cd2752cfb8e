"""What configurations and metadata say of an adapter: PEFT's adapter_config.json, diffusers' and kohya's headers."""

from __future__ import annotations

import json
import re
from typing import Any

from lab.errors import LabError

OF_INTEREST = (
    "modelspec.title", "modelspec.author", "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.license",
    "ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_optimizer", "ss_learning_rate", "ss_unet_lr", "ss_steps",
    "ss_max_train_steps", "ss_num_train_images", "ss_training_comment",
)  # fmt: skip
MAX_VALUE = 200
_ODD = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "target_parameters", "monteclora_config",
        "arrow_config", "velora_config")  # fmt: skip


def shown(metadata: dict[str, str]) -> dict[str, str]:
    """The metadata that a person wants to see, shortened to one line each."""
    found = {}
    for key in OF_INTEREST:
        text = " ".join(metadata.get(key, "").split())
        if text and text not in ("None", "null", "{}"):
            found[key] = text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
    return found


class Settings:
    """Scales of a file whose layers have no alpha of their own."""

    def __init__(self, given: dict[str, Any] | None = None) -> None:
        self.given = given or {}
        self.kind = str(self.given.get("peft_type") or "").upper()
        self.rs = self.given.get("use_rslora") is True

    def alpha(self, layer: str) -> float | None:
        """alpha of a layer (named as in the network); None where nothing says it. Raises LabError when it is no number."""
        return self._number("alpha", layer, self.given.get("lora_alpha", self.given.get("alpha")))

    def rank(self, layer: str) -> int | None:
        """The rank that alpha is divided by, None where nothing says it."""
        found = self._number("rank", layer, self.given.get("r"))
        return None if found is None else max(1, int(found))

    def _number(self, what: str, layer: str, value: Any) -> float | None:
        pattern = self.given.get(f"{what}_pattern")
        for key, own in pattern.items() if isinstance(pattern, dict) else ():
            if _matches(str(key), layer):
                value = own
                break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < 1e9:
            raise LabError(f"The configuration's {what} must be a number other than 0, got {str(value)[:40]}.")
        return float(value)

    @property
    def plain(self) -> bool:
        """Whether ΔW follows from the tensors and alpha alone (with W for DoRA)."""
        return self.kind in ("", "LORA", "LOHA", "LOKR") and not any(self.given.get(name) for name in _ODD)


def _matches(key: str, layer: str) -> bool:
    """PEFT matches `(.*\\.)?(key)$`; keys are names in all files seen, and a stranger's expression is not run."""
    anchored, name = key.startswith("^"), key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise LabError(
            "The configuration's alpha_pattern or rank_pattern holds an expression in place of a layer's name."
        )
    return layer == name or (not anchored and layer.endswith(f".{name}"))


def of_header(metadata: dict[str, str]) -> dict[str, Settings]:
    """diffusers' `lora_adapter_metadata`: part ("unet", "text_encoder", …) → what it says."""
    try:
        table = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError):
        return {}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in table.items() if isinstance(table, dict) else ():
        part, _, name = str(key).partition(".")
        parts.setdefault(part, {})[name] = value
    return {part: Settings(values | {"peft_type": ""}) for part, values in parts.items()}
