"""The base of the lab's own methods: one torch-free file a method, pure tensor functions, everything else shared.

A method says how its tensors start (`init`) and how they make the update (`factors` for a low-rank method,
`delta` for any other). The layer, the PEFT configuration, merging, saving, loading, counting of PEFT's own kind,
coverage and export are made from these in `lab/methods/_tuner.py` and `lab/methods/deltas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lab.errors import LabError
from lab.methods.spec import Layer, Method

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

    from lab.methods._fused import ByHand
    from lab.methods._tuner import OwnLayer

Need = Literal["", "activations", "gradient"]


@dataclass
class Start:
    """What one layer's adapter may start from. All tensors are float32 on the weight's device.

    `weight()` is the base weight seen as an m×n matrix (dequantised); calling it is the only way a method touches
    it, so that a method that does not need it costs nothing. `activation` (n,) is the root mean square of each input
    channel, `gradient` (m, n) the loss's gradient by the weight: there when the method's `need` asks for them.
    `generator` is seeded by the adapter's seed and the layer's name. `shared` are the tensors `init_shared` made.
    """

    layer: Layer
    seed: int
    weight: Callable[[], torch.Tensor]
    generator: torch.Generator
    device: torch.device
    activation: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    shared: Mapping[str, torch.Tensor] = field(default_factory=dict)
    prepared: Any = None  # whatever the method's `prepare` left here

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers times `scale`, the same on every device."""
        import torch

        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device)

    def kaiming(self, *shape: int) -> torch.Tensor:
        """LoRA's start of A: uniform in ±1/√fan_in, fan_in the last dimension."""
        import torch

        bound = shape[-1] ** -0.5
        return ((torch.rand(*shape, generator=self.generator) * 2 - 1) * bound).to(self.device)

    def orthonormal(self, m: int, r: int) -> torch.Tensor:
        """A random m×r matrix with orthonormal columns, made in double precision so that it reproduces."""
        import torch

        q, upper = torch.linalg.qr(torch.randn(m, r, generator=self.generator, dtype=torch.float64))
        return (q * upper.diagonal().sign()).float().to(self.device)

    def zeros(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.zeros(*shape, device=self.device)


@dataclass
class Tensors:
    """A layer's tensors at the start: trained ones go to the optimizer and the file; frozen ones are made again
    from the weight and the seed when a file is loaded, unless the method `stores` them."""

    trained: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)


class OwnMethod(Method):
    """A method of the lab. Subclass, fill in the row's attributes, write `init` and `factors` or `delta`.

    In `factors`, `delta` and `forward` the mapping `t` holds the trained and frozen tensors by name, and, for methods
    that ask for it, `t["weight"]` (m, n). They are pure: no state, no random numbers but those of lab/counter.py, keyed by
    `knobs.seed` (the adapter's seed) and the layer's name.
    """

    own = True
    conv = True
    tensors: dict[str, dict[str, str]] = {"trained": {}, "frozen": {}}  # name → shape, for the page's diagram
    uses_weight = False  # t["weight"] is wanted by delta, factors or forward
    positional: tuple[str, ...] = ()  # order of the configuration's positional arguments; default: the knobs' order

    # -- the mathematics -------------------------------------------------------------------------------
    def init(self, start: Start, knobs: Any) -> Tensors:
        """Tensors of one layer before training."""
        raise NotImplementedError(f"{type(self).__name__} must say how its tensors start")

    def prepare(self, starts: list[Start], knobs: Any) -> None:
        """Work for all layers together before `init` is called for each: what can be done several at once."""

    def factors(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> Any:
        """(B (m, r), A (r, n)) with ΔW = B·A, or None when the update is not of low rank."""
        return None

    def by_hand(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> ByHand | None:
        """`factors` with their derivative written out, for methods whose step is measured; None: autograd's own."""
        return None

    def delta(self, t: Mapping[str, torch.Tensor], knobs: Any, layer: Layer) -> torch.Tensor:
        """ΔW (m, n)."""
        pair = self.factors(t, knobs, layer)
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} must write factors or delta")
        return pair[0] @ pair[1]

    def forward(self, site: OwnLayer, x: torch.Tensor, t: Mapping[str, torch.Tensor], knobs: Any) -> torch.Tensor:
        """What the adapter adds to the layer's output for x. Override only for a faster way to the same numbers."""
        with site.full_precision():
            pair = self.factors(t, knobs, site.layer)
            delta = self.delta(t, knobs, site.layer) if pair is None else None
        return site.low_rank(x, *pair) if delta is None else site.dense(x, delta)

    def dense(self, layer: Layer, knobs: Any) -> bool:
        """Whether the update has no factors on this layer, so that W + ΔW in one product is the faster way."""
        return type(self).factors is OwnMethod.factors

    # -- tensors that layers share ------------------------------------------------------------------------
    def init_shared(self, layers: list[Layer], knobs: Any, start: Start) -> dict[str, torch.Tensor]:
        """Trained tensors held once on the model; `shared_for` says which of them a layer sees."""
        return {}

    def shared_for(self, layer: Layer, knobs: Any) -> dict[str, str]:
        """Names under which a layer sees shared tensors: name in `t` → name in `init_shared`."""
        return {}

    # -- what it needs, and what it keeps --------------------------------------------------------------------
    def need(self, knobs: Any) -> Need:
        """What must be measured before the start; the row's `needs` unless a knob decides."""
        return self.needs

    def stores(self, knobs: Any) -> bool:
        """Whether frozen tensors go into the file: they must when they come from data."""
        return self.need(knobs) != ""

    def derived(self, knobs: Any) -> tuple[str, ...]:
        """Frozen tensors made from the base's weight: the file holds a fingerprint of them."""
        return ()

    def shapes(self, layer: Layer, knobs: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of stored frozen tensors, for loading them without data. Needed where `stores` may be true."""
        raise NotImplementedError(f"{type(self).__name__} must give the shapes of the tensors it stores")

    def cached(self, layer: Layer, knobs: Any) -> int:
        """Bytes that the layer's basis keeps between steps, where the setting `cache_mib` leaves room for it."""
        return 0

    def trained_shapes(self, layer: Layer, knobs: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the trained tensors, for the same case."""
        raise NotImplementedError(f"{type(self).__name__} must give the shapes of its trained tensors")

    # -- what changes with the step of training ----------------------------------------------------------------
    def stage(self, knobs: Any, step: int, steps: int) -> Any:
        """Where training stands at this step, of `steps` in all, in the method's own terms; None: no matter."""
        return None

    def staged(self, t: Mapping[str, torch.Tensor], stage: Any, knobs: Any) -> Mapping[str, torch.Tensor]:
        """The tensors as a training step's forward pass sees them: some detached, some cut to a rank."""
        return t

    def before_step(self, model: torch.nn.Module, step: int, steps: int) -> None:
        for _, site, adapter in self.sites(model):
            site.stages[adapter] = self.stage(site.knobs[adapter], step, steps)

    def packs(self, knobs: Any) -> bool:
        """Whether a file holds all trained tensors in a packed form of the method's own."""
        return False

    def pack(self, tensors: dict[str, torch.Tensor], knobs: Any) -> dict[str, torch.Tensor]:
        """The packed form of the trained tensors of all layers, by their names in the file."""
        raise NotImplementedError(f"{type(self).__name__} must write pack")

    def unpack(
        self, packed: Mapping[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], knobs: Any
    ) -> dict[str, torch.Tensor]:
        """What `pack` packed, by the names in `shapes`."""
        raise NotImplementedError(f"{type(self).__name__} must write unpack")

    # -- the row ------------------------------------------------------------------------------------------
    @property
    def peft_name(self) -> str:
        """Name of the PEFT tuner: letters and digits of the id."""
        return "".join(c for c in self.id if c.isalnum())

    def sites(self, model: torch.nn.Module) -> Iterator[tuple[str, OwnLayer, str]]:
        """(layer name, layer, adapter name) of every active adapter of this method, for the training hooks."""
        from lab.methods._tuner import OwnLayer

        for name, module in model.named_modules():
            if isinstance(module, OwnLayer):
                for adapter in module.active_adapters:
                    if module.methods.get(adapter) is self:
                        yield name, module, adapter

    def config(self, knobs: Any, targets: str | list[str], seed: int) -> PeftConfig:
        from lab.methods import _tuner

        return _tuner.config_class(self)(**asdict(knobs), target_modules=targets, seed=seed)

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
        """As Method.attach. Raises LabError, naming the layer, when the settings do not fit its shape, when nothing
        matches the targets, when the weight holds NaN, or when `calibrate` is needed and missing."""
        from peft import PeftModel, get_peft_model

        from lab.methods import _statistics

        config: Any = self.config(knobs, targets, seed)
        if need := self.need(knobs):
            if calibrate is None:
                raise LabError(f"{self.name} starts from a batch's {need}: pass calibrate=, a function that runs one.")
            config.statistics = _statistics.measure(model, config, need, calibrate)
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name)
        config.statistics = None  # as large as the adapted weights, and used up
        return model
