"""Rows for the adapters that PEFT has: what the registry must know of each, and the seeded, checked way onto a model.

The rows are in builtin_lora.py (LoRA and what changes its start, scale or optimizer), builtin_factors.py (other
factorised updates), builtin_shared.py (tensors shared by layers) and builtin_other.py (rotations, masks, spectra).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.methods.spec import Layer, Method

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel


class PeftMethod(Method):
    """A tuner of PEFT's. Subclasses write `config`, the counts, and hooks where the method has any."""

    alone = False  # PEFT allows no second trainable adapter of this kind
    changes_base = False  # its start rewrites the base weight: kept aside, and put back by `unload`
    tensors: dict[str, dict[str, str]] = {"trained": {}, "frozen": {"W": "m × n"}}

    def attach(
        self,
        model: torch.nn.Module,
        knobs: Any,
        targets: str | list[str],
        *,
        seed: int = 0,
        adapter_name: str = "default",
        calibrate: Callable[[], torch.Tensor] | None = None,
    ) -> PeftModel:
        """As Method.attach; PEFT draws its starts from the global generator, which is seeded here and put back after.

        Raises LabError when nothing matches the targets, the settings do not fit a layer's shape, a layer is of a
        kind the method cannot adapt, a weight holds NaN, or `calibrate` is needed and missing.
        """
        import torch
        from peft import PeftModel, get_peft_model

        from lab.methods import _peft_support as support

        if self.needs and calibrate is None:
            raise LabError(
                f"{self.name} starts from a batch's {self.needs}: pass calibrate=, a function that runs one."
            )
        if self.alone and isinstance(model, PeftModel):
            raise LabError(f"{self.name} trains one adapter at a time: take the other one off the model first.")
        config: Any = self.config(knobs, targets, seed)
        inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
        layers = support.checked_layers(inner, config, self, knobs)
        kept = support.keep_weights(inner, layers) if self.changes_base else None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            statistics = self.prepare(inner, config, layers, calibrate) if self.needs else None
            if isinstance(model, PeftModel):
                model.add_adapter(adapter_name, config)
                made = model
            else:
                made = get_peft_model(model, config, adapter_name=adapter_name)
            self.finish(made, adapter_name, knobs, statistics)
        support.own_storage(made)
        if kept:
            support.restore_on_unload(made, kept)
        return made

    peft_config = ""  # name of PEFT's configuration class

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        import warnings

        import peft

        with warnings.catch_warnings():  # that random bases are drawn again from the seed: the row says it
            warnings.filterwarnings("ignore", message="Specified to not save")
            return getattr(peft, self.peft_config)(target_modules=targets, **self.arguments(knobs, seed))

    def arguments(self, knobs: Any, seed: int) -> dict[str, Any]:
        """PEFT's names and values of the settings."""
        return asdict(knobs)

    def prepare(self, model: torch.nn.Module, config: Any, layers: list[Layer], calibrate: Any) -> Any:
        """What the start needs of a batch, before PEFT's tuner is put in place; `finish` gets it."""
        return None

    def finish(self, model: PeftModel, adapter_name: str, knobs: Any, statistics: Any) -> None:
        """Steps after PEFT's tuner is in place."""

    def refuse_conv(self, layer: Layer) -> None:
        if layer.kernel and not self.conv:
            raise LabError(f"{self.name} adapts linear layers only, and {layer.name} is a convolution: leave it out.")

    def must_divide(self, layer: Layer, size: int, what: str, *sides: int) -> None:
        """Raise LabError, naming the layer, when a block size does not divide a side of its weight."""
        for side in sides or (layer.m, layer.n):
            if side % size:
                raise LabError(f"{what} is {size}, which does not divide {side} of layer {layer.name}.")

    def at_most(self, layer: Layer, value: int, limit: int, what: str) -> None:
        if value > limit:
            raise LabError(f"{what} is {value}, but layer {layer.name} ({layer.m}×{layer.n}) allows at most {limit}.")
