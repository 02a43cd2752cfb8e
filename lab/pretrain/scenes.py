"""Scenes composed on the fly: a picture, scaled and shifted a little, on a drawn background."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from lab.pretrain.common import generator
from lab.pretrain.concepts import COLOURS, PLACES, STYLES, caption
from lab.pretrain.sprites import SIDE, Sprites

VARIANTS = 24  # drawings of each place
# What the UNet learns to draw: place and size vary by a pixel or two and nothing is mirrored, so that its steps go
# into the thing itself. At 6 % of shift, twice this, its edges were a blur of the places they might be in.
STEADY: dict[str, Any] = {"scale": (0.79, 0.85), "shift": 0.03, "mirrored": 0.0}
_Y, _X = torch.meshgrid(torch.arange(SIDE) / SIDE, torch.arange(SIDE) / SIDE, indexing="ij")


def _rgb(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).view(3, 1, 1)


def _blend(under: torch.Tensor, over: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return under * (1 - mask) + over * mask


def _edge(distance: torch.Tensor) -> torch.Tensor:
    """1 where the distance is above 0, 0 below, with a soft step one pixel wide."""
    return (distance * SIDE + 0.5).clamp(0, 1)


def _disc(x: float, y: float, radius: float) -> torch.Tensor:
    return _edge(radius - ((_X - x) ** 2 + (_Y - y) ** 2).sqrt())


def _sky(top: torch.Tensor, bottom: torch.Tensor) -> torch.Tensor:
    return top + (bottom - top) * _Y


def _ground(scene: torch.Tensor, colour: torch.Tensor, height: float, slope: float, wave: float) -> torch.Tensor:
    line = height + slope * (_X - 0.5) + wave * torch.sin(6.3 * (_X + wave * 9))
    shade = colour * (1.06 - 0.25 * (_Y - height).clamp(0))
    return _blend(scene, shade, _edge(_Y - line))


# Few random numbers a place: detail that cannot be foreseen costs the VAE bits and the UNet steps.
def _snow(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(150, 195, 235), _rgb(215, 232, 246))
    scene = _ground(scene, _rgb(240, 245, 250), r.uniform(0.62, 0.72), r.uniform(-0.1, 0.1), 0.02)
    for i in range(12):
        x, y = (i % 4 + 0.5) / 4 + r.uniform(-0.05, 0.05), (i // 4 + 0.3 + (i % 2) * 0.4) / 3 + r.uniform(-0.04, 0.04)
        scene = _blend(scene, _rgb(255, 255, 255), _disc(x, y, 0.026))
    return scene


def _grass(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(120, 195, 245), _rgb(205, 232, 250))
    return _ground(scene, _rgb(100, 185, 70), r.uniform(0.55, 0.68), r.uniform(-0.1, 0.1), 0.02)


def _beach(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(150, 212, 248), _rgb(215, 240, 252))
    water = r.uniform(0.36, 0.46)
    scene = _ground(scene, _rgb(45, 150, 200), water, 0, 0)
    return _ground(scene, _rgb(240, 214, 150), water + r.uniform(0.2, 0.27), r.uniform(-0.08, 0.08), 0.012)


def _night(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(14, 18, 52), _rgb(42, 44, 100))
    for i in range(11):
        x, y = (i % 4 + 0.5) / 4 + r.uniform(-0.06, 0.06), (i // 4 + 0.3 + (i % 2) * 0.4) / 3 + r.uniform(-0.05, 0.05)
        scene = _blend(scene, _rgb(250, 245, 200), _disc(x, y, 0.017))
    x = r.choice((0.13, 0.87))
    return _blend(scene, _rgb(250, 240, 180), (_disc(x, 0.13, 0.09) - _disc(x + 0.045, 0.105, 0.08)).clamp(0))


def _forest(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(160, 205, 175), _rgb(110, 165, 120))
    scene = _ground(scene, _rgb(88, 120, 60), r.uniform(0.74, 0.8), 0, 0.01)
    for i in range(5):
        x, top, half = i / 4 + r.uniform(-0.03, 0.03), 0.1 + 0.12 * (i % 2) + r.uniform(-0.03, 0.03), 0.16
        scene = _blend(scene, _rgb(96, 66, 40), _edge(0.022 - (_X - x).abs()) * _edge(_Y - 0.6) * _edge(0.86 - _Y))
        inside = _edge(half * (_Y - top) / 0.62 - (_X - x).abs()) * _edge(0.74 - _Y)
        scene = _blend(scene, _rgb(28, 92 + 14 * (i % 2), 52), inside)
    return scene


def _desert(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(250, 178, 95), _rgb(254, 226, 170))
    scene = _blend(scene, _rgb(255, 240, 190), _disc(r.choice((0.15, 0.85)), 0.16, 0.1))
    scene = _ground(scene, _rgb(222, 160, 90), r.uniform(0.52, 0.6), r.uniform(-0.2, 0.2), 0.04)
    return _ground(scene, _rgb(200, 130, 66), r.uniform(0.74, 0.82), r.uniform(-0.2, 0.2), 0.04)


def _sea(r: random.Random) -> torch.Tensor:
    scene = _sky(_rgb(60, 175, 220), _rgb(8, 62, 132))
    for i in range(6):
        x, y = (0.08, 0.9, 0.16, 0.84, 0.06, 0.94)[i] + r.uniform(-0.03, 0.03), 0.12 + 0.13 * i + r.uniform(-0.04, 0.04)
        scene = _blend(scene, _rgb(170, 225, 245), (_disc(x, y, 0.04) - _disc(x, y, 0.022)).clamp(0))
    return _ground(scene, _rgb(196, 178, 122), r.uniform(0.86, 0.92), 0, 0.012)


_PAINTERS = (_snow, _grass, _beach, _night, _forest, _desert, _sea)


def _background(place: int, variant: int) -> torch.Tensor:
    r = random.Random(place * 1000 + variant)
    if place < len(COLOURS):
        colour = _rgb(*list(COLOURS.values())[place]) + r.uniform(-10, 10)
        scene = (colour * (1.04 - 0.08 * _Y)).expand(3, SIDE, SIDE)
    else:
        scene = _PAINTERS[place - len(COLOURS)](r)
    return (scene / 127.5 - 1).clamp(-1, 1)


@cache
def backgrounds() -> torch.Tensor:
    """(places, variants, 3, 64, 64) in -1..1."""
    return torch.stack([torch.stack([_background(p, v) for v in range(VARIANTS)]) for p in range(len(PLACES))])


def compose(
    sprites: Sprites,
    rows: torch.Tensor,
    places: torch.Tensor,
    g: torch.Generator,
    scale: tuple[float, float] = (0.72, 0.86),
    shift: float = 0.10,
    mirrored: float = 0.33,
) -> torch.Tensor:
    """Scenes (n, 3, 64, 64) in -1..1: picture rows on places, large, near the centre, some mirrored."""
    n = len(rows)
    size = torch.empty(n).uniform_(*scale, generator=g)
    offset = (torch.rand(n, 2, generator=g) * 2 - 1) * shift
    offset[:, 1] += 0.04  # a little below the middle, where the ground is
    mirror = torch.where(torch.rand(n, generator=g) < mirrored, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)  # output to input coordinates
    theta[:, 0, 0], theta[:, 1, 1] = mirror / size, 1 / size
    theta[:, 0, 2], theta[:, 1, 2] = -offset[:, 0] * mirror / size, -offset[:, 1] / size
    rgba = sprites.images[rows].float() / 255
    rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)  # premultiplied, so that edges stay clean
    rgba = F.grid_sample(rgba, F.affine_grid(theta, [n, 4, SIDE, SIDE], align_corners=False), align_corners=False)
    under = backgrounds()[places, torch.randint(VARIANTS, (n,), generator=g)]
    return under * (1 - rgba[:, 3:]) + rgba[:, :3] * 2 - rgba[:, 3:]


def captions(
    sprites: Sprites, rows: torch.Tensor, places: torch.Tensor, seed: int, plain: str | None = None
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """A caption for each scene, and whether it tells the place and the style (see concepts.caption)."""
    r = random.Random(seed)
    told = [
        caption(r, sprites.names[sprites.concept[row]], PLACES[place], STYLES[sprites.style[row]], plain)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ]
    texts, with_place, with_style = zip(*told, strict=True)
    return list(texts), torch.tensor(with_place), torch.tensor(with_style)


def draw_batch(
    sprites: Sprites, pool: torch.Tensor, n: int, key: tuple[int, ...], places_a_batch: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, places and scenes of a batch that depends on the key alone.

    Few places a batch, many objects on each: then the place does not give the object away.
    """
    g = generator(*key)
    rows = pool[torch.randint(len(pool), (n,), generator=g)]
    places = torch.randint(len(PLACES), (n,), generator=g)
    if places_a_batch:
        places = torch.randperm(len(PLACES), generator=g)[places % places_a_batch]
    return rows, places, compose(sprites, rows, places, g)
