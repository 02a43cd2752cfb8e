"""A training step of CLIP-LoRA's preset against a plain loop with PEFT's LoRA over the same model; NoRA and NOLA beside.

    python -m lab bench fewshot_step --base ViT-B-16:random --batch 4 --write

Every candidate does forward, backward and AdamW on the same pictures and class texts, in the same precision. The plain
loop is what CLIP-LoRA's own code does: `encode_image`, `encode_text` on texts padded to the model's full length,
cross-entropy. The lab cuts the padding off. CPU time of one thread, least of the repetitions.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

HELP = "few-shot training steps as ratios to a plain PEFT loop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", default="ViT-B-16:random", metavar="NAME")
    parser.add_argument("--batch", type=int, default=4, metavar="N")
    parser.add_argument("--classes", type=int, default=10, metavar="N")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="least time of so many")
    parser.add_argument("--write", action="store_true", help="write the table into lab/bench/fewshot.md")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lab.bench import _tables
    from lab.bench._steps import least_times
    from lab.bench.fewshot_table import HEAD, PAGE
    from lab.clip.bases import resolve

    torch.set_num_threads(1)  # CPU seconds of several threads count their waiting, too
    clip = resolve(args.base).load()
    made = {"plain PEFT loop": _plain(clip, args.batch, args.classes)}
    made |= {id: _ours(clip, id, args.batch, args.classes) for id in ("clip-lora", "nora", "nola")}
    times = least_times(made, args.repetitions)
    first, own = times["plain PEFT loop"], times["clip-lora"]
    result = {
        "base": args.base,
        "batch": args.batch,
        "classes": args.classes,
        "steps": [
            {"step": id, "seconds": round(t, 4), "ratio": round(t / first, 3), "to_clip_lora": round(t / own, 3)}
            for id, t in times.items()
        ],
    }
    if args.write:
        _tables.write(PAGE, "step", "\n".join(lines(result)), HEAD)
    return result


def _data(clip: Any, batch: int, classes: int) -> tuple[Any, Any, list[str]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, clip.size, clip.size, generator=generator)
    return pixels, torch.arange(batch) % classes, [f"class {i}" for i in range(classes)]


def _plain(clip: Any, batch: int, classes: int) -> Any:
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model

    from lab import device as devices
    from lab.clip.adapter import sites

    own, (pixels, labels, names) = clip.copy(), _data(clip, batch, classes)
    places = sites(own.model, "q,k,v", "both")
    model = get_peft_model(own.model, LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25, target_modules=places))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
    ids, inner = own.tokenize([f"a photo of a {name}." for name in names]), cast(Any, model.get_base_model())
    model.train()

    def step() -> None:
        with devices.autocast(own.device):
            images, texts = (F.normalize(x, dim=-1) for x in (inner.encode_image(pixels), inner.encode_text(ids)))
            loss = F.cross_entropy(own.scale * images @ texts.T, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(clip: Any, id: str, batch: int, classes: int) -> Any:
    import torch

    from lab import device as devices
    from lab.clip.episode import Batch, Episode
    from lab.clip.pictures import Examples
    from lab.tasks._fewshot_run import runner

    pixels, labels, names = _data(clip, batch, classes)
    none = Examples(clip, torch.empty(0, 3, clip.size, clip.size, dtype=torch.uint8), labels[:0])
    episode = Episode(clip, names, ["a photo of a {}."], none, none, 1, 0)
    method = runner(id)
    head = method.build(episode, method.knobs()).train()
    optimizer, made = method.optimizer(head, 2e-4, 0.01), Batch(labels, pixels=pixels)

    def step() -> None:
        with devices.autocast(clip.device):
            loss = method.loss(head, made)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lines(result: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    return [
        "## A training step of CLIP-LoRA's preset",
        "",
        f"`python -m lab bench fewshot_step --base {result['base']} --batch {result['batch']} --write`: {result['base']}, q, k and"
        f" v of both towers, batch {result['batch']}, {result['classes']} classes; forward, backward and AdamW, CPU seconds of one"
        " thread, least of the repetitions, which take turns.",
        "",
        "| | s | against the plain loop | against CLIP-LoRA here |",
        "|-|-:|-:|-:|",
        *(
            f"| {row['step']} | {row['seconds']:.3f} | {row['ratio']:.3f} | {row['to_clip_lora']:.3f} |"
            for row in result["steps"]
        ),
    ]


def show(result: dict[str, Any]) -> None:
    print("\n".join(lines(result)))
