"""What adapters cost in a training step of SDXL's UNet, against LoRA of rank 8.

    python -m lab bench sdxl_block --write              its two kinds of transformer block at their real size, on a CPU
    python -m lab bench sdxl_block --whole --write      the whole UNet, on a GPU

Forward, backward and the optimizer's step; weights and products in bf16, adapters in float32. On a CPU the least CPU
seconds of one thread, every candidate in turn (other programs then do not count); on a GPU the least wall seconds.
LoRA is measured twice: what the second differs by is noise. `--write` puts the table into lab/bench/sdxl.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.bench import _tables

HELP = "training step of SDXL's transformer blocks (or its whole UNet), by method, against LoRA"
TABLE = Path(__file__).parent / "sdxl.md"
BLOCKS = {"640": (640, 10, 4096, 10), "1280": (1280, 20, 1024, 60)}  # width, heads, tokens at 1024 px, how many
LORA = "LoRA, r 8"
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    LORA: ("lora", {"r": 8}),
    "LoRA, r 8, again": ("lora", {"r": 8}),
    "NoRA, r_outer 0.8, r_inner 4": ("nora", {"r_inner": 4}),
    "NoRA, r_outer 128, r_inner 4": ("nora", {"r_outer": 128, "r_inner": 4}),
    "NoRA, r_outer 128, r_inner 40 (preset)": ("nora", {"r_outer": 128, "r_inner": 40}),
    "NOLA, hadamard, r 8": ("nola", {"r": 8, "basis": "hadamard"}),
    "NOLA, shared, r 8": ("nola", {"r": 8, "basis": "shared"}),
    "PRANC, hadamard": ("pranc", {"basis": "hadamard"}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repetitions", type=int, default=3, help="least time of so many")
    parser.add_argument("--whole", action="store_true", help="the whole UNet, on the lab's device")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the table into lab/bench/sdxl.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"what", "device", "seconds": {candidate: {part: seconds}}, "to_lora": {candidate: ratio}}."""
    import torch

    from lab import device as devices
    from lab.errors import LabError

    for name in ("repetitions", "batch"):
        if getattr(args, name) < 1:
            raise LabError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    threads = torch.get_num_threads()
    if args.whole:
        device = devices.pick()
        seconds, times = {"whole": whole(device, args.batch, args.repetitions)}, {"whole": 1}
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
        seconds = {name: block(*shape[:3], args.batch, args.repetitions) for name, shape in BLOCKS.items()}
        times = {name: shape[3] for name, shape in BLOCKS.items()}
        torch.set_num_threads(threads)
    sums = {c: sum(times[part] * found[c] for part, found in seconds.items()) for c in CANDIDATES}
    made = {
        "what": "whole" if args.whole else "blocks",
        "device": devices.describe(device),
        "batch": args.batch,
        "seconds": seconds,
        "to_lora": {c: value / sums[LORA] for c, value in sums.items()},
    }
    if args.write:
        from lab.bench._sdxl_random import HEAD

        _tables.write(TABLE, made["what"], table(made), HEAD)
    return made


def block(width: int, heads: int, tokens: int, batch: int, repetitions: int) -> dict[str, float]:
    """Seconds of a step of one transformer block, by candidate."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, width, generator=generator).bfloat16().requires_grad_()
    text = torch.randn(batch, 77, 2048, generator=generator).bfloat16()

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        made = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=2048)
        return made.to(torch.bfloat16).requires_grad_(False)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        x.grad = None
        return model(x, encoder_hidden_states=text).float().square().mean()

    return least(
        {name: step(make(), *chosen, loss) for name, chosen in CANDIDATES.items()}, repetitions, time.process_time
    )


def whole(device: Any, batch: int, repetitions: int) -> dict[str, float]:
    """Seconds of a step of the whole UNet at 1024 pixels with gradient checkpointing, one candidate after the other."""
    import torch
    from diffusers import UNet2DConditionModel

    from lab.bench._sdxl_random import released

    config = released("unet")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            unet: Any = UNet2DConditionModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    unet.requires_grad_(False).enable_gradient_checkpointing()
    side, pooled = (
        config["sample_size"],
        config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],
    )
    noisy = torch.randn(batch, config["in_channels"], side, side, device=device)
    text = torch.randn(batch, 77, config["cross_attention_dim"], device=device)
    known = {"text_embeds": torch.randn(batch, pooled, device=device), "time_ids": torch.zeros(batch, 6, device=device)}
    times = torch.full((batch,), 500, device=device)

    def loss(model: torch.nn.Module) -> torch.Tensor:
        out = model(noisy, times, encoder_hidden_states=text, added_cond_kwargs=known).sample
        return (out.float() - noisy).square().mean()

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = {}
    for name, chosen in CANDIDATES.items():
        call = step(unet, *chosen, loss)
        seconds |= least({name: call}, repetitions, clock)
        call.model.unload()
    return seconds


class step:  # noqa: N801 - a function with what it works on
    """One training step of a method on the model's attention projections."""

    def __init__(self, base: Any, id: str, knobs: dict[str, Any], loss: Callable[[Any], Any]) -> None:
        from lab import device as devices
        from lab.methods import METHODS
        from lab.targets import modules

        method, self.devices, self.loss = METHODS[id], devices, loss
        self.model = method.attach(base, method.knobs.parse(knobs), modules(base, "attn")).train()
        self.optimizer = method.optimizer(self.model, 1e-4)

    def __call__(self) -> None:
        with self.devices.autocast_of(self.model):
            loss = self.loss(self.model)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def least(calls: dict[str, Callable[[], None]], repetitions: int, clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of each call, in turn, after one to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if repetition:
                best[name] = min(best[name], clock() - began)
    return best


# -- output --------------------------------------------------------------------------------------------------
def table(made: dict[str, Any]) -> str:
    what = {
        "blocks": "A training step of SDXL's transformer blocks at their real size (1024 px)",
        "whole": "A training step of the whole UNet, 1024 px, gradient checkpointing",
    }[made["what"]]
    parts = list(made["seconds"])
    heads = [f"{p} wide, ms" if made["what"] == "blocks" else "ms" for p in parts]
    note = "All blocks: 10 of width 640 and 60 of width 1280, as the UNet has them." if made["what"] == "blocks" else ""
    lines = [
        f"## {what}",
        "",
        f"Forward, backward and optimizer, batch {made['batch']}, all attention projections; {made['device']}. {note}".rstrip(),
        "",
        f"| | {' | '.join(heads)} | all, against LoRA |",
        "|-|" + "-:|" * (len(parts) + 1),
    ]
    for name, ratio in made["to_lora"].items():
        cells = " | ".join(f"{1e3 * made['seconds'][p][name]:.0f}" for p in parts)
        lines.append(f"| {name} | {cells} | {ratio:.3f} |")
    return "\n".join(lines)


def show(made: dict[str, Any]) -> None:
    print(table(made))
