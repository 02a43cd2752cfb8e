"""Turns any `OwnMethod` into a PEFT tuner: configuration class, model class, registration, saving and loading."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lab import counter
from lab.errors import LabError
from lab.methods import _file
from lab.methods._layer import OwnLayer, as_matrix, check_finite, describe
from lab.methods.own import OwnMethod, Start, Tensors
from lab.methods.spec import Layer

__all__ = ["OwnConfig", "OwnLayer", "OwnModel", "config_class", "targets_of"]

ADAPTABLE = (nn.Linear, nn.Conv2d, Conv1D)


@dataclass
class OwnConfig(PeftConfig):
    """What every configuration of the lab's methods has beside the method's own settings.

    `stored` says that the file holds the frozen tensors too (they come from data, or were asked for).
    """

    target_modules: Any = field(default=None, metadata={"help": "Names, or a regular expression, of layers to adapt."})
    exclude_modules: Any = field(default=None, metadata={"help": "Names of layers to leave out."})
    layers_to_transform: Any = field(default=None, metadata={"help": "Indices of the blocks to adapt."})
    layers_pattern: Any = field(default=None, metadata={"help": "Name of the list of blocks the indices count."})
    modules_to_save: Any = field(default=None, metadata={"help": "Further modules, trained in full and saved."})
    seed: int = field(default=0, metadata={"help": "Seed of random starts and bases."})
    stored: bool = field(default=False, metadata={"help": "The file holds the frozen tensors."})

    method: ClassVar[Any] = None  # the OwnMethod, set by config_class
    statistics = None  # layer name → measured tensor, never saved
    target_parameters = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(type(self).method)
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        self.knobs()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's own. Raises LabError when the folder's adapter file is truncated or no safetensors file: PEFT reads the
        configuration before the file, and would end in the file format's own error."""
        _file.check_readable(Path(pretrained_model_name_or_path, subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def knobs(self) -> Any:
        """The method's settings, checked, with the adapter's seed."""
        kind = type(self).method.knobs
        made = kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind)})
        made.seed = self.seed
        return made

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def peft_type(method: OwnMethod) -> Any:
    """The method's member of PEFT's enumeration of tuners, made on first use."""
    from aenum import extend_enum
    from peft.utils.peft_types import PeftType

    name = method.peft_name.upper()
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType[name]


@functools.cache
def config_class(method: OwnMethod) -> type[OwnConfig]:
    """The method's PEFT configuration, e.g. NoraConfig; making it registers the tuner with PEFT."""
    from peft.utils import register_peft_method

    name = method.peft_name
    peft_type(method)
    knobs = dataclasses.fields(method.knobs)
    fields = [(f.name, Any, field(default=f.default, metadata=f.metadata)) for f in knobs]
    made: Any = dataclasses.make_dataclass(f"{name.capitalize()}Config", fields, bases=(OwnConfig,))
    made.__module__, made.__doc__, made.method = "lab.methods", type(method).__doc__, method
    _take_positional(made, method.positional or tuple(f.name for f in knobs))
    prefix = f"{name}_"
    model = type(f"{name.capitalize()}Model", (OwnModel,), {"prefix": prefix, "method": method})
    register_peft_method(name=name, config_cls=made, model_cls=model, prefix=prefix)
    return made


def _take_positional(config: Any, names: tuple[str, ...]) -> None:
    """Let positional arguments be the method's settings, not PEFT's own first fields."""
    plain = config.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"at most {len(names)} positional arguments: {', '.join(names)}")
        plain(self, **dict(zip(names, args, strict=False)), **kwargs)

    config.__init__ = init


def targets_of(model: nn.Module, given: Any) -> dict[str, nn.Module]:
    """Modules of `model` that the configuration's targets match, by name, unwrapped of earlier adapters.

    Raises LabError, naming what exists, when nothing matches or when a match cannot carry an adapter.
    """
    config: Any = _maybe_include_all_linear_layers(given, model)
    if config.target_modules is None:
        raise LabError(f"Name the layers to adapt: target_modules is not set, this model has {_names(model)}.")
    found: dict[str, nn.Module] = {}
    for name, module in _modules(model):
        if BaseTuner._check_target_module_exists(config, name):
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            describe(name, base)
            found[name] = base
    if not found:
        asked = config.target_modules
        asked = asked if isinstance(asked, str) else ", ".join(sorted(asked))
        raise LabError(f"No layer matches '{asked[:200]}': this model has {_names(model)}.")
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name but the insides of adapter layers."""
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped += (name + ".",)
        yield name, module


def _names(model: nn.Module) -> str:
    """The last parts of the names of adaptable layers, for error messages."""
    names = [n for n, m in _modules(model) if isinstance(m, (*ADAPTABLE, BaseTunerLayer))]
    short = list(
        dict.fromkeys(".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in names)
    )
    return ", ".join(short[:20]) + (", …" if len(short) > 20 else "") if short else "no layer that can be adapted"


class OwnModel(BaseTuner):
    """Puts `OwnLayer`s in place. All tensors are made before anything is replaced: a failure leaves the base as it was."""

    prefix = ""
    method: OwnMethod
    tuner_layer_cls = OwnLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        knobs, targets = config.knobs(), targets_of(model, config)
        layers = [describe(name, base) for name, base in targets.items()]
        for layer, base in zip(layers, targets.values(), strict=True):
            self.method.check(layer, knobs)
            check_finite(layer.name, base)
        shared = self._share(adapter_name, layers, knobs, config, next(iter(targets.values())))
        self._plan: dict[str, tuple[Tensors, dict[str, nn.ParameterDict]]] = {}
        seen = [
            {n: shared[key] for n, key in self.method.shared_for(layer, knobs).items()} if shared else {}
            for layer in layers
        ]
        starts = [make_start(layer, base, config.seed) for layer, base in zip(layers, targets.values(), strict=True)]
        need = self.method.need(knobs)
        loading = bool(need) and not config.statistics and config.stored  # the file holds what was measured
        if need and not config.statistics and not loading:
            raise LabError(
                f"{self.method.name} starts from a batch's {need}: attach it by METHODS['{self.method.id}'].attach."
            )
        for start, containers in zip(starts, seen, strict=True):
            start.shared = {n: container[adapter_name] for n, container in containers.items()}
            if need and config.statistics:
                place = {"activations": "activation", "gradient": "gradient"}[need]
                setattr(start, place, config.statistics[start.layer.name])
        if not loading:
            self.method.prepare(starts, knobs)
        for start, containers in zip(starts, seen, strict=True):
            tensors = self._places(start, knobs) if loading else self.method.init(start, knobs)
            self._plan[start.layer.name] = tensors, containers
            start.prepared = None
        config.stored = config.stored or self.method.stores(knobs)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._mark_shared()

    def _places(self, start: Start, knobs: Any) -> Tensors:
        """Empty tensors for those of a file."""
        trained, frozen = (
            {name: start.zeros(*shape) for name, shape in shapes(start.layer, knobs).items()}
            for shapes in (self.method.trained_shapes, self.method.shapes)
        )
        return Tensors(trained, frozen)

    def _share(
        self, adapter: str, layers: list[Layer], knobs: Any, config: Any, base: nn.Module
    ) -> dict[str, nn.ParameterDict]:
        start = make_start(layers[0], base, config.seed)
        start.generator.manual_seed(counter.key(config.seed, "shared"))  # not the numbers the first layer's own draw
        made = self.method.init_shared(layers, knobs, start)
        for name, value in made.items():
            attribute = f"{self.prefix}{name}"
            if not hasattr(self, attribute):
                setattr(self, attribute, nn.ParameterDict())
            getattr(self, attribute)[adapter] = nn.Parameter(value.float())
        return {name: getattr(self, f"{self.prefix}{name}") for name in made}

    def _shared_containers(self) -> list[nn.ParameterDict]:
        return [c for n, c in self.named_children() if n.startswith(self.prefix) and isinstance(c, nn.ParameterDict)]

    def _mark_shared(self) -> None:
        for container in self._shared_containers():
            for adapter, parameter in container.items():
                parameter.requires_grad_(
                    adapter in self.active_adapters and not self.peft_config[adapter].inference_mode
                )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        tensors, shared = self._plan.pop(current_key)
        knobs = peft_config.knobs()
        if isinstance(target, OwnLayer):
            target.add(adapter_name, self.method, knobs, tensors, shared)
            target.set_adapter(target.active_adapters)
            return
        made = OwnLayer(target, current_key, self.prefix)
        made.add(adapter_name, self.method, knobs, tensors, shared)
        made.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for container in self._shared_containers():
            for adapter, parameter in container.items():
                parameter.requires_grad_(adapter in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for container in self._shared_containers():
            if adapter_name in container:
                del container[adapter_name]

    # -- files ------------------------------------------------------------------------------------------------
    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: list[str]
    ) -> Any:
        found = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        return _file.seal(cls, model, config, adapter_name, found)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        content, extras = _file.open_sealed(cls, config, state_dict)
        content = _file.unpacked(cls, model, config, adapter_name, content)
        mapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=content
        )
        return _file.check(cls, model, config, adapter_name, mapped, extras)


def make_start(layer: Layer, base: Any, seed: int) -> Start:
    """What `OwnMethod.init` gets for a layer; the weight is read, dequantised when it is asked for."""
    from peft.utils.quantization_utils import resolve_quantization_backend

    def weight() -> torch.Tensor:  # not kept: of a whole model in half precision that would be a second one
        backend = resolve_quantization_backend(base)
        raw = backend.get_base_weight(base) if backend else base.weight.detach()
        return as_matrix(base, raw).float()

    generator = torch.Generator().manual_seed(counter.key(seed, layer.name))
    return Start(layer, seed, weight, generator, base.weight.device)
