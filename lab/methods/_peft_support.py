"""The part of PEFT's rows that needs torch: layers checked before anything changes, base weights kept and put back."""

from __future__ import annotations

from typing import Any

import torch

from lab.errors import LabError
from lab.methods._layer import check_finite, describe
from lab.methods._tuner import targets_of
from lab.methods.spec import Layer


def checked_layers(model: torch.nn.Module, config: Any, method: Any, knobs: Any) -> list[Layer]:
    """Shapes of the layers the configuration's targets match, each checked against the settings."""
    layers = []
    for name, base in targets_of(model, config).items():
        layer = describe(name, base)
        method.refuse_conv(layer)
        method.check(layer, knobs)
        check_finite(name, base)
        layers.append(layer)
    return layers


EVA_BATCHES = 256  # PEFT stops after a few where directions settle at all


def keep_weights(model: torch.nn.Module, layers: list[Layer]) -> dict[str, torch.Tensor]:
    """Copies of the layers' base weights."""
    modules = dict(model.named_modules())
    found = {}
    for layer in layers:
        module: Any = modules[layer.name]
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        found[layer.name] = base.weight.detach().clone()
    return found


def own_storage(model: torch.nn.Module) -> None:
    """Give trained tensors that PEFT cut from a larger one (singular vectors) memory of their own: the rest is let go."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.device.type != "meta":
            size = parameter.numel() * parameter.element_size()
            if parameter.untyped_storage().nbytes() > size:
                parameter.data = parameter.data.clone()


def restore_on_unload(model: Any, kept: dict[str, torch.Tensor]) -> None:
    """Make `model.unload()` put the kept weights back: a start like PiSSA's takes its own value off the base."""
    tuner = model.base_model
    plain = tuner.unload

    def unload() -> torch.nn.Module:
        inner = plain()
        for name, weight in kept.items():
            module = inner.get_submodule(name)
            module.weight.data = weight.to(module.weight.device, module.weight.dtype)
        return inner

    tuner.unload = unload


def start_eva(model: Any, adapter: str, calibrate: Any, seed: int) -> None:
    """EVA's start: principal directions of the layers' inputs in batches that `calibrate` runs.

    Raises LabError where PEFT would go round for ever: on batches with fewer positions than directions, and on
    directions that do not settle.
    """
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    config = model.peft_config[adapter]
    wanted, passes = round(config.r * config.eva_config.rho), 0

    def flat(inputs: Any, _: Any, __: str) -> torch.Tensor:
        tokens = inputs[0] if isinstance(inputs, tuple) else inputs
        tokens = tokens.detach().float().reshape(-1, tokens.shape[-1])
        if len(tokens) < wanted:
            raise LabError(
                f"EVA finds {wanted} directions a layer, but a batch has {len(tokens)} positions: lower r or rho, or take"
                " larger batches."
            )
        return tokens

    def run(_model: Any, _inputs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > EVA_BATCHES:
            raise LabError(f"EVA's directions did not settle in {EVA_BATCHES} batches: lower r.")
        return calibrate()

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        initialize_lora_eva_weights(
            model,
            dataloader=[{}] * 16,
            forward_fn=run,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=flat,
            adapter_name=adapter,
            show_progress_bar=False,
        )


def orthogonality(model: Any, adapter: str, weight: float) -> torch.Tensor | None:
    """AdaLoRA's equation 4, averaged over matrices as PEFT does: weight·mean ‖PᵀP − I‖ and ‖QQᵀ − I‖."""
    terms = []
    for name, p in model.named_parameters():
        for factor in ("lora_A", "lora_B"):
            if name.endswith(f".{factor}.{adapter}"):
                gram = p @ p.T if factor == "lora_A" else p.T @ p
                terms.append(torch.linalg.norm(gram - torch.eye(gram.shape[0], device=p.device)))
    return weight * torch.stack(terms).mean() if terms and weight else None


def allocate_ranks(model: Any, step: int, steps: int) -> None:
    """One call of AdaLoRA's allocator; the schedule's shares become steps on the first."""
    config = model.active_peft_config
    warmup, final = getattr(config, "shares", (0.1, 0.3))
    config.total_step, config.tinit, config.tfinal = steps, int(warmup * steps), int(final * steps)
    if config.tinit < steps - config.tfinal and all(p.grad is not None for p in _factors(model)):
        model.base_model.update_and_allocate(step + 1)


def _factors(model: Any) -> list[torch.Tensor]:
    return [p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad]


def allocator_state(model: Any) -> dict[str, torch.Tensor]:
    """AdaLoRA's running averages and masks, for a checkpoint."""
    allocator, config = model.base_model.rankallocator, model.active_peft_config
    found = {f"importance:{n}": v for n, v in allocator.exp_avg_ipt.items()}
    found |= {f"uncertainty:{n}": v for n, v in allocator.exp_avg_unc.items()}
    found |= {f"mask:{n}": torch.tensor(v) for n, v in (config.rank_pattern or {}).items()}
    return found


def load_allocator_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Put back what `allocator_state` gave."""
    allocator, config = model.base_model.rankallocator, model.active_peft_config
    allocator.reset_ipt()
    masks = {}
    for key, value in state.items():
        kind, _, name = key.partition(":")
        if kind == "mask":
            masks[name] = value.tolist()
        else:
            (allocator.exp_avg_ipt if kind == "importance" else allocator.exp_avg_unc)[name] = value.clone()
            allocator.ipt[name] = torch.zeros_like(value)
    config.rank_pattern = masks or None


def start_of(start: Any, name: str, r: int, alpha: float, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B₀ (m, r), A₀ (r, n)) as PEFT's LoRA layer starts them with `init_lora_weights=name`."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    weight = start.weight()
    m, n = weight.shape
    base: Any = torch.nn.Linear(n, m, bias=False, device="meta")
    base.weight = torch.nn.Parameter(weight.clone())
    if start.gradient is not None:
        base._peft_loraga_grad = start.gradient.clone()
    settings: dict[str, Any] = {"lora_alpha": alpha, "init_lora_weights": name, **options}
    config = LoraConfig(r=r, **settings)
    scaled: dict[str, Any] = {"lora_alpha": alpha}
    with torch.random.fork_rng():
        torch.manual_seed(start.seed)
        layer: Any = Linear(base, "start", config=config, r=r, **scaled)
    return layer.lora_B["start"].weight.detach().float(), layer.lora_A["start"].weight.detach().float()
