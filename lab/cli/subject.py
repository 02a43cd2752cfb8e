"""Teach a base model one subject by several methods, and compare them.

    python -m lab subject pictures/ --class-word fox --method lora --method nora --out out/fox
    python -m lab subject assets/subjects/fox --budget 20000 --seeds 0,1,2 --out out/fox

IMAGES is a folder of 3 to 20 pictures (with captions beside them, as `name.txt` for `name.jpg`), or the pictures
themselves. Calling again with the same --out goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.cli import parse_numbers, parse_settings
from lab.errors import LabError

NAME = "subject"
HELP = "teach a base model one subject and compare methods"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="a folder of pictures, or the pictures")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for everything that is made")
    parser.add_argument("--class-word", metavar="WORD", help="what the subject is: fox (an example subject knows)")
    parser.add_argument("--trigger", metavar="WORD", help="the word that will stand for this one (default sks)")
    parser.add_argument(
        "--caption", action="append", metavar="TEXT", help="caption of a picture, once for each in turn"
    )
    parser.add_argument("--method", action="append", metavar="ID", help="a method to compare (default lora and nora)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE",
        help="an adapter you have (LoRA file of any program, PEFT folder) to stand beside them; alone, nothing is trained",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.KNOB=VALUE", help="a method's setting, as nora.r_inner=4"
    )
    parser.add_argument("--budget", type=int, metavar="N", help="give every method about N trainable parameters")
    parser.add_argument("--base", metavar="NAME", help="tiny-sdxl, sdxl, a folder, a .safetensors file, or owner/name")
    parser.add_argument("--targets", metavar="NAMES", help="layers to adapt (default: the base's, attn)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps")
    parser.add_argument("--batch", type=int, metavar="N", help="pictures a step")
    parser.add_argument("--lr", action="append", default=[], metavar="[METHOD=]X", help="learning rate, of all or one")
    parser.add_argument("--seeds", metavar="A,B", help="training seeds (default 0,1)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt to draw; {subject} is the subject")
    parser.add_argument(
        "--sample-seeds", metavar="A,B", help="seeds of the pictures drawn for each prompt (default 0,1)"
    )
    parser.add_argument("--sampling-steps", type=int, metavar="N")
    parser.add_argument("--guidance", type=float, metavar="X")
    parser.add_argument("--resolution", type=int, metavar="PIXELS")
    parser.add_argument("--snr-gamma", type=float, metavar="X", help="min-SNR weighting, usually 5")
    parser.add_argument("--prior-weight", type=float, metavar="X", help="prior preservation, usually 1")
    parser.add_argument("--flip", action="store_true", help="train on mirrored pictures too")
    parser.add_argument(
        "--buckets", action="store_true", help="train pictures without a crop whole, in their own aspect ratio"
    )
    parser.add_argument("--text-encoder", action="store_true", help="put adapters on both text encoders too")
    parser.add_argument(
        "--text-encoder-rate", type=float, metavar="X", help="their learning rate as a share of the UNet's (0.05)"
    )
    parser.add_argument(
        "--weights", metavar="DTYPE", help="hold the base in fp32, fp16 or bf16 (default: the device's)"
    )
    parser.add_argument("--optimizer", metavar="NAME", help="adamw or adamw8bit, which needs bitsandbytes")
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="a fraction of the activations' memory for a third more time (default: the base's)",
    )
    parser.add_argument("--offload", action="store_true", help="the UNet leaves the GPU while pictures are decoded")
    parser.add_argument("--compile", action="store_true", help="compile the UNet's blocks: slow to begin, faster then")
    parser.add_argument("--checkpoint-every", type=int, metavar="N")
    parser.add_argument("--preview-every", type=int, metavar="N", help="steps between previews, 0 for none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from lab import columns, compare, comparison

    paths, card = find(args.images)
    adapters = columns.of_files(args.adapter)
    spec = to_spec(args, paths, card) | {"adapters": list(adapters)}
    pictures = read(paths)
    spec = comparison.start(args.out, "subject", spec, pictures, adapters)
    runs = comparison.run_all(args.out, "subject", spec, progress)
    trained = [run for run in runs if run["method"] != "base"]
    if all(run["state"] == "failed" for run in trained):
        raise LabError(trained[0]["message"])
    made = compare.write_report(args.out, spec, runs)
    return {
        "out": str(args.out),
        "base": next(({k: r["result"][k] for k in ("clip_i", "clip_t")} for r in runs if _done(r, "base")), {}),
        "runs": [_told(run) for run in trained],
        "verdicts": compare.verdicts(compare.table(runs)),
        "files": [str(path) for path in made],
    }


def _done(run: dict[str, Any], method: str) -> bool:
    return run["method"] == method and run["state"] == "done"


def _told(run: dict[str, Any]) -> dict[str, Any]:
    keys = (
        "trainable_parameters",
        "adapter_bytes",
        "train_seconds",
        "sample_seconds",
        "peak_memory_bytes",
        "preflight",
    )
    result = run["result"]
    told = {key: run[key] for key in ("method", "seed", "state", "knobs")}
    told |= {key: result.get(key) for key in (*keys, "clip_i", "clip_t", "drift", "final_loss")}
    adapter = Path(run["folder"]) / "adapter"
    return told | {"adapter": str(adapter) if adapter.is_dir() else None, "message": run["message"]}


# -- input ---------------------------------------------------------------------------------------------
def find(given: list[str]) -> tuple[list[Path], dict[str, Any]]:
    """The pictures' paths, and what an example subject's card says of them."""
    card: dict[str, Any] = {}
    paths: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            paths += sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if (path / "subject.json").exists():
                card = json.loads((path / "subject.json").read_text(encoding="utf-8"))
        elif path.exists():
            paths.append(path)
        else:
            raise LabError(f"There is no file or folder '{name}'.")
    return paths, card


def read(paths: list[Path]) -> list[Any]:
    """The pictures, made safe. Raises LabError naming the first that is none, or when there are too few or many."""
    from lab.uploads import decode_all

    return decode_all(paths)


def captions(paths: list[Path]) -> list[str] | None:
    """The text beside each picture (`fox.txt` for `fox.png`); None when there is none at all."""
    beside = [path.with_suffix(".txt") for path in paths]
    if not any(path.exists() for path in beside):
        return None
    return [path.read_text(encoding="utf-8").strip() if path.exists() else "" for path in beside]


def to_spec(args: argparse.Namespace, paths: list[Path], card: dict[str, Any]) -> dict[str, Any]:
    """The task's spec, from what was typed."""
    settings = parse_settings(args.set)
    chosen = args.method or ([] if args.adapter else ["lora", "nora"])
    shared = settings.pop("", {})
    for method in settings:
        if method not in chosen:
            raise LabError(f"--set {method}.… is for a method that is not compared: add --method {method}.")
    spec = {
        "class_word": args.class_word or card.get("class_word") or "",
        "captions": args.caption or captions(paths),
        "methods": {method: shared | settings.get(method, {}) for method in chosen},
        "lr": _learning_rates(args.lr, chosen),
        "prompts": args.prompt,
        "seeds": parse_numbers(args.seeds, "--seeds") if args.seeds else None,
        "sample_seeds": parse_numbers(args.sample_seeds, "--sample-seeds") if args.sample_seeds else None,
    } | {name: True for name in ("flip", "buckets", "text_encoder", "offload", "compile") if getattr(args, name)}
    plain = ("trigger", "budget", "base", "targets", "steps", "batch", "sampling_steps", "guidance", "resolution")
    plain += ("snr_gamma", "prior_weight", "checkpoint_every", "preview_every")
    plain += ("text_encoder_rate", "weights", "optimizer", "gradient_checkpointing")
    return spec | {name: getattr(args, name) for name in plain}


def _learning_rates(given: list[str], methods: list[str]) -> dict[str, float] | None:
    rates: dict[str, float] = {}
    for text in given:
        method, _, value = text.rpartition("=")
        try:
            rates |= dict.fromkeys([method] if method else methods, float(value))
        except ValueError:
            raise LabError(f"--lr takes a number or method=number, got '{text}'.") from None
    return rates or None


# -- output --------------------------------------------------------------------------------------------
def progress(planned: Any) -> Callable[..., None]:
    """A progress bar on standard error for one run; one line a phase where that is no terminal."""
    name, began, last = f"{planned.method} seed {planned.seed}", time.monotonic(), [""]

    def report(step: int, steps: int, **values: Any) -> None:
        phase = values.get("phase", "")
        if sys.stderr.isatty():
            done = round(24 * step / max(1, steps))
            loss = f"  loss {values['loss']:.4f}" if "loss" in values else ""
            bar = f"{'█' * done}{'░' * (24 - done)}"
            line = f"{name:<16} {bar} {step}/{steps}  {time.monotonic() - began:5.0f} s  {phase}{loss}"
            print(f"\r{line:<110}", end="\n" if phase == "scoring" else "", file=sys.stderr, flush=True)
        elif phase.partition(" … ")[0] != last[0]:  # a download's numbers come several times a second
            last[0] = phase.partition(" … ")[0]
            print(f"{name}: {phase} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)

    return report


def _score(value: float | None) -> str:
    return f"{'–' if value is None else f'{value:.3f}':>9}"


def show(result: dict[str, Any]) -> None:
    """Print the comparison as a table."""
    print(f"{'method':<14}{'seed':>5}{'parameters':>12}{'file':>10}{'train':>9}{'CLIP-I':>9}{'CLIP-T':>9}")
    if result["base"]:
        print(f"{'base':<50}{_score(result['base']['clip_i'])}{_score(result['base']['clip_t'])}")
    for run in result["runs"]:
        if run["state"] != "done":
            print(f"{run['method']:<14}{run['seed']:>5}  {run['state']}: {run['message']}")
            continue
        file = f"{run['adapter_bytes'] / 1000:.0f} kB"
        spent = "–" if run["train_seconds"] is None else f"{run['train_seconds']:.0f} s"  # trained elsewhere
        print(
            f"{run['method']:<14}{run['seed']:>5}{run['trainable_parameters']:>12,}{file:>10}"
            f"{spent:>9}{_score(run['clip_i'])}{_score(run['clip_t'])}"
        )
    print("\n".join(["", *result["verdicts"], "", *result["files"]]))
