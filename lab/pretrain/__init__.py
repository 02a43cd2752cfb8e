"""How the embedded base (tiny SDXL and tiny CLIP) is made: `python -m lab.pretrain`."""
