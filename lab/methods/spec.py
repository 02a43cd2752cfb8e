"""What the registry knows of an adapter method. Imports no torch: the calculators read this alone."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lab.errors import LabError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Layer:
    """Shape of one adaptable weight: `out`×`in_` for a linear layer, ×kh×kw for a convolution."""

    name: str
    out: int
    in_: int
    kernel: tuple[int, int] | None = None  # None: linear
    role: str = ""  # q, k, v, out, up, down, gate, conv, ... (lab/targets.py)
    bias: bool = False

    @property
    def m(self) -> int:
        """Rows of the weight seen as a matrix."""
        return self.out

    @property
    def n(self) -> int:
        """Columns of the weight seen as a matrix: in, or in·kh·kw."""
        return self.in_ * (self.kernel[0] * self.kernel[1] if self.kernel else 1)


@dataclass(frozen=True)
class Paper:
    title: str
    arxiv: str = ""  # "2106.09685", or a URL where there is no arXiv id

    @property
    def url(self) -> str:
        return self.arxiv if self.arxiv.startswith("http") else f"https://arxiv.org/abs/{self.arxiv}"


def knob(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    size: bool = False,
) -> Any:
    """A dataclass field that is a method's setting: the page's controls and the checks are made from it.

    `size=True` marks a knob that the budget solver may turn: the trainable count grows with it.
    """
    meta = {"help": help, "low": low, "high": high, "choices": tuple(choices) if choices else None, "size": size}
    return dataclasses.field(default=default, metadata=meta)


@dataclass
class Knobs:
    """Base of every method's settings: a dataclass of `knob` fields, checked on construction.

    `seed` is no setting but the adapter's seed, put here when it is attached, for methods with random bases.
    """

    seed = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value, meta = getattr(self, f.name), f.metadata
            if "help" not in meta:
                continue
            if meta["choices"] and value not in meta["choices"]:
                raise LabError(f"{f.name} must be one of {', '.join(meta['choices'])}, got '{value}'.")
            for bound, wrong, word in (
                (meta["low"], lambda v, b: v < b, "at least"),
                (meta["high"], lambda v, b: v > b, "at most"),
            ):
                if bound is not None and isinstance(value, (int, float)) and wrong(value, bound):
                    raise LabError(f"{f.name} must be {word} {bound:g}, got {value:g}.")

    @classmethod
    def parse(cls, given: dict[str, Any]) -> typing.Self:
        """Settings from a JSON object or from `name=value` strings. Raises LabError on names or values that do not fit."""
        from lab.registry import unknown

        fields = {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}
        types = typing.get_type_hints(cls)
        values = {}
        for name, value in given.items():
            if name not in fields:
                raise (
                    unknown("setting", name, list(fields))
                    if fields
                    else LabError(f"There is no setting '{name}' here.")
                )
            values[name] = _convert(name, value, types[name])
        return cls(**values)


def _convert(name: str, value: Any, kind: Any) -> Any:
    kinds = typing.get_args(kind) or (kind,)
    if bool in kinds:
        if str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
            return str(value).lower() in ("true", "1", "yes")
        raise LabError(f"{name} must be true or false, got '{value}'.")
    if str in kinds:
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise LabError(f"{name} must be a number, got '{value}'.") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise LabError(f"{name} must be a finite number, got '{value}'.")
    if int in kinds and number.is_integer() and not (float in kinds and isinstance(value, float)):
        return int(number)
    if float in kinds:
        return number
    raise LabError(f"{name} must be a whole number, got '{value}'.")


Kind = Literal[
    "weight update", "initialisation", "optimizer", "rank allocation", "bias", "multiplicative", "sparse", "frequency"
]


class Method:
    """One row of the registry: subclass, fill in the attributes, register an instance.

    Everything here but `attach`, `optimizer`, `penalty` and `after_step` works without torch.
    """

    id: str
    name: str
    paper: Paper
    kind: Kind
    summary: str  # one sentence
    equation: str  # LaTeX, without dollar signs
    knobs: type[Knobs] = Knobs
    tensors: dict[str, dict[str, str]]  # of "trained" and "frozen": name → shape, for the page's drawing
    product: tuple[str, ...] = ()  # tensors as the update multiplies them, where `tensors` has another order
    learning_rate: float = 1e-3  # recommended, on the embedded base (a recorded sweep)
    own: bool = False  # ours, not PEFT's
    low_rank: bool = False  # ΔW is exactly of rank `rank(...)`: exports as LoRA without loss
    identity_start: bool = True
    conv: bool = False  # works on Conv2d
    mergeable: bool = True
    needs: Literal["", "activations", "gradient"] = ""
    remark: str = ""  # what is ambiguous or unsettled, shown on the page
    order: int = 100

    # -- counting (no torch) ---------------------------------------------------------------------------
    def count_layer(self, layer: Layer, knobs: Any) -> int:
        """Trainable parameters that one layer of this shape gets."""
        raise NotImplementedError(f"{type(self).__name__} counts by layer or overrides count")

    def count(self, layers: Sequence[Layer], knobs: Any) -> int:
        """Trainable parameters over all adapted layers; methods that share tensors override this."""
        return sum(self.count_layer(layer, knobs) for layer in layers)

    def check(self, layer: Layer, knobs: Any) -> None:
        """Raise LabError, naming the layer, when the settings do not fit its shape."""

    def rank(self, layer: Layer, knobs: Any) -> int:
        """Largest possible rank of ΔW on this layer."""
        return min(layer.m, layer.n)

    def knobs_for(self, **given: Any) -> Any:
        return self.knobs.parse(given)

    # -- training (torch) ------------------------------------------------------------------------------
    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        """The PEFT configuration. `targets` is what PEFT calls target_modules."""
        raise NotImplementedError(f"{type(self).__name__} has no PEFT configuration")

    def attach(
        self,
        model: torch.nn.Module,
        knobs: Any,
        targets: str | list[str],
        *,
        seed: int = 0,
        adapter_name: str = "default",
        calibrate: Any = None,
    ) -> PeftModel:
        """Put the adapter on `model` (a PeftModel gets one more). `calibrate()` runs one batch forward and
        returns its loss, for methods that need activations or a gradient."""
        from peft import PeftModel, get_peft_model

        config = self.config(knobs, targets, seed)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            return model
        return get_peft_model(model, config, adapter_name=adapter_name)

    def optimizer(self, model: torch.nn.Module, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)

    def penalty(self, model: torch.nn.Module) -> torch.Tensor | None:
        """A term to add to the loss, or None."""
        return None

    def before_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        """Called before each step's forward pass (a rank drawn for the step, what is frozen by now): sets what
        depends on the step, and on nothing before it, so that a resumed run goes on as it would have."""

    def after_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        """Called after each optimizer step (rank allocation, proximal steps)."""

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What training changes beside the trainable parameters, for checkpoints (rank masks, running averages)."""
        return {}

    def load_state(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Put back what `state` gave."""
