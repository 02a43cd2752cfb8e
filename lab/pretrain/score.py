"""Stage "score": numbers and a sheet of samples for an assembled base, on prompts and seeds fixed here."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from lab.pretrain import card, clip, vae
from lab.pretrain.common import autocast, device, generator
from lab.pretrain.concepts import CONCEPTS, PLACES, STYLES, prompt
from lab.pretrain.scenes import STEADY, compose
from lab.pretrain.sprites import Sprites
from lab.pretrain.unet import PLAIN_STYLE

SEEDS = (0,)  # one picture of each concept: the share is good to about 0.03
STEPS, GUIDANCE, BATCH = 20, 3.5, 73
SHEET = (
    ("cat face", 10),
    ("panda face", 13),
    ("lion face", 16),
    ("frog face", 11),
    ("owl", 14),
    ("elephant", 12),
    ("tropical fish", 16),
    ("butterfly", 11),
    ("sunflower", 4),
    ("red apple", 12),
    ("hamburger", 2),
    ("ice cream", 6),
    ("pizza", 5),
    ("taxi", 15),
    ("sailboat", 12),
    ("airplane", 4),
    ("fire engine", 10),
    ("beer mug", 8),
    ("cherries", 0),
    ("house", 11),
    ("basketball", 3),
    ("crown", 5),
    ("grinning face", 16),
    ("ghost", 13),
)


def plan() -> list[tuple[int, int, int]]:
    """(concept, place, seed) of every scored picture: each concept once a seed, places spread evenly."""
    return [(c, (c * 5 + seed * 3) % len(PLACES), seed) for seed in SEEDS for c in range(len(CONCEPTS))]


def load_pipeline(folder: Path):
    """The pipeline as users load it."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "tiny-sdxl", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device())


@torch.no_grad()
def generate(pipe, prompts: list[str], seeds: list[int], steps: int = STEPS) -> torch.Tensor:
    """Pictures (n, 3, 64, 64) in -1..1, each from its own seed."""
    parts = []
    for i in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds[i : i + BATCH]]
        with autocast():
            parts.append(
                pipe(
                    prompts[i : i + BATCH],
                    width=64,
                    height=64,
                    num_inference_steps=steps,
                    guidance_scale=GUIDANCE,
                    generator=generators,
                    output_type="pt",
                )
                .images.float()
                .cpu()
            )
    return torch.cat(parts) * 2 - 1


class Judge:
    """The CLIP tower: never trained on the UNet's pictures."""

    @torch.no_grad()
    def __init__(self, folder: Path):
        self.towers = clip.load_towers(folder).to(device()).eval()
        ids = clip.tokenizer()
        with autocast():
            self.names = self.towers.text(ids([prompt(name) for name in CONCEPTS]))
            self.placed = torch.stack(
                [self.towers.text(ids([prompt(name, place) for place in PLACES])) for name in CONCEPTS]
            )

    @torch.no_grad()
    def embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """Unit vectors of pictures."""
        with autocast():
            return torch.cat([self.towers.image(x.to(device())) for x in pictures.split(128)])

    def named(self, pictures: torch.Tensor, concept: torch.Tensor, place: torch.Tensor) -> dict[str, float]:
        """Shares of pictures whose concept (first, within five) and place are picked from all."""
        image = self.embed(pictures)
        order = (image @ self.names.T).topk(5).indices.cpu()
        of_place = torch.einsum("nd,npd->np", image, self.placed[concept]).argmax(1).cpu()
        hit = order == concept[:, None]
        return {
            "naming": hit[:, 0].float().mean().item(),
            "naming_top5": hit.any(1).float().mean().item(),
            "place": (of_place == place).float().mean().item(),
        }

    def spread(self, pictures: torch.Tensor, group: int) -> float:
        """Mean distance (1 - cosine) between pictures of one prompt, `group` pictures a prompt."""
        image = self.embed(pictures).view(-1, group, self.names.shape[1])
        cosine = image @ image.transpose(1, 2)
        return float(1 - (cosine.sum((1, 2)) - group).mean() / (group * (group - 1)))


def _diversity(pipe, judge: Judge, sprites: Sprites) -> dict[str, float]:
    """Between four seeds of each of 8 prompts, beside the data's own."""
    concepts = torch.arange(8) * (len(CONCEPTS) // 8)
    places, group = concepts % len(PLACES), 4
    texts = [prompt(CONCEPTS[c], PLACES[p]) for c, p in zip(concepts, places, strict=True) for _ in range(group)]
    drawn = generate(pipe, texts, list(range(10, 10 + group)) * len(concepts))
    g = generator(9)
    plain = sprites.nameable[sprites.style[sprites.nameable] == STYLES.index(PLAIN_STYLE)]
    rows = torch.cat([plain[sprites.concept[plain] == c][:1] for c in concepts]).repeat_interleave(group)
    real = compose(sprites, rows, places.repeat_interleave(group), g, **STEADY)
    return {"diversity": judge.spread(drawn, group), "diversity_real": judge.spread(real, group)}


def _real(sprites: Sprites, concept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Held-out scenes of the scored concepts and places, styles in turn."""
    g = generator(8)
    rows = torch.stack(
        [(sprites.nameable[sprites.concept[sprites.nameable] == c])[i % 3] for i, c in enumerate(concept)]
    )
    return compose(sprites, rows, place, g)


def score(folder: Path, sprites: Sprites, judge_folder: Path | None = None) -> tuple[dict[str, float], torch.Tensor]:
    """All numbers of an assembled folder, and the scored pictures."""
    pipe, judge = load_pipeline(folder), Judge(judge_folder or folder)
    concept, place, seed = (torch.tensor(column) for column in zip(*plan(), strict=True))
    texts = [prompt(CONCEPTS[c], PLACES[p]) for c, p, _ in plan()]
    pictures = generate(pipe, texts, seed.tolist())
    numbers = judge.named(pictures, concept, place)
    real = _real(sprites, concept, place)
    numbers |= {f"{k}_real": v for k, v in judge.named(real, concept, place).items()}
    numbers["naming_real_through_vae"] = judge.named(vae.reconstructed(pipe.vae, real), concept, place)["naming"]
    numbers["naming_of_real"] = numbers["naming"] / max(1e-9, numbers["naming_real"])
    numbers |= _diversity(pipe, judge, sprites)
    numbers["vae_psnr_db"] = vae.psnr(pipe.vae, vae.held_out_scenes(sprites))
    numbers["vae_psnr_unseen_subjects_db"] = vae.psnr(pipe.vae, vae.held_out_scenes(sprites, sprites.held_out, 60))
    numbers["clip_recall_at_1_of_512"] = clip.name_shares(judge.towers, sprites)["recall"]
    return {key: round(value, 4) for key, value in numbers.items()}, pictures


def sheet(pipe, columns: int = 8, zoom: int = 2):
    """The contact sheet: one picture of each prompt of SHEET, its caption below."""
    from PIL import Image, ImageDraw

    texts = [prompt(name, PLACES[place]) for name, place in SHEET]
    pictures = F.interpolate(generate(pipe, texts, [0] * len(texts)), scale_factor=zoom, mode="bicubic")
    pictures = ((pictures.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
    side, line = 64 * zoom, 22
    image = Image.new("RGB", (columns * side, -(-len(texts) // columns) * (side + line)), "white")
    draw = ImageDraw.Draw(image)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = i % columns * side, i // columns * (side + line)
        image.paste(Image.fromarray(picture), (x, y))
        for row, words in enumerate((SHEET[i][0], text.removeprefix(prompt(SHEET[i][0])).strip())):
            draw.text((x + 3, y + side + row * 10), words, fill="black", font_size=9)
    return image


def write(folder: Path, sprites: Sprites) -> dict[str, float]:
    """score.json and samples.png in the pipeline's folder; prints the numbers."""
    numbers, _ = score(folder, sprites)
    path = folder / "tiny-sdxl" / "score.json"
    before = json.loads(path.read_text()).get("start") if path.exists() else None  # scored once, kept for comparison
    path.write_text(json.dumps(numbers | ({"start": before} if before else {}), indent=1) + "\n")
    sheet(load_pipeline(folder)).save(folder / "tiny-sdxl" / "samples.png", optimize=True)
    card.write(folder / "tiny-sdxl")
    for key, value in numbers.items():
        print(f"{key:32} {value:.3f}", flush=True)
    return numbers
