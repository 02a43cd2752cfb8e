"""`python -m lab.pretrain STAGE`: make the embedded base; every stage resumes where it stopped."""
from __future__ import annotations

import argparse
import sys

import torch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.pretrain", description=__doc__)
    parser.add_argument("stage", choices=("data", "vae", "clip", "unet", "assemble", "score", "all"))
    parser.add_argument("--steps", type=int, help="train up to this many steps in all")
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from lab.pretrain.sprites import load_sprites
    sprites = load_sprites()
    knobs = {key: value for key, value in (("steps", args.steps), ("batch", args.batch)) if value}
    if args.stage == "clip":
        from lab.pretrain import clip
        clip.train(sprites, **knobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
