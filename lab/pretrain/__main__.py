"""`python -m lab.pretrain STAGE`: make the embedded base; every stage resumes where it stopped.

On a processor that others use too: `torchrun --nproc-per-node 2 -m lab.pretrain unet --threads 1`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Threads that sleep while they wait: a spinning wait is ruinous where other work shares the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STAGES = ("data", "clip", "vae", "decoder", "image", "unet", "assemble", "score")


def run(stage: str, into: Path, knobs: dict[str, Any]) -> None:
    """One stage, trained up to its number of steps."""
    from lab.pretrain import assemble, clip, image, score, unet, vae
    from lab.pretrain.sprites import load_sprites

    sprites = load_sprites()
    if stage == "data":
        print(
            f"data: {len(sprites.nameable)} pictures of {sprites.nameable_count} nameable concepts, "
            f"{len(sprites.trainable)} in all, {len(sprites.held_out)} kept out"
        )
    elif stage == "assemble":
        assemble.assemble(into, sprites)
    elif stage == "score":
        score.write(into, sprites)
    elif stage == "decoder":
        vae.train_decoder(sprites, perceive=vae.perception(), **knobs)
    else:
        {"clip": clip.train, "vae": vae.train, "image": image.train, "unet": unet.train}[stage](sprites, **knobs)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run."""
    from lab.errors import LabError
    from lab.pretrain.common import ASSETS, home, rank_and_workers

    parser = argparse.ArgumentParser(prog="python -m lab.pretrain", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--steps", type=int, help="train up to this many steps in all")
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument(
        "--into",
        type=Path,
        default=None,
        help="folder that assemble writes and score reads (default: beside the checkpoints)",
    )
    parser.add_argument("--assets", action="store_true", help="assemble into, and score, the repository's assets")
    args = parser.parse_args(argv)
    import torch

    torch.set_num_threads(args.threads)
    if rank_and_workers()[1] > 1:
        torch.distributed.init_process_group("gloo")
    into = args.into or (ASSETS if args.assets else home() / "assembled")
    knobs = {key: value for key, value in (("steps", args.steps), ("batch", args.batch)) if value is not None}
    try:
        for stage in STAGES if args.stage == "all" else (args.stage,):
            run(stage, into, {} if args.stage == "all" else knobs)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
