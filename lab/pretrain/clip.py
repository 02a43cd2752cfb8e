"""Stage "clip": one image tower and both text towers, trained together.

The image tower and the larger text tower are open_clip's CLIP; the smaller text tower (transformers) learns
against the same image tower. The UNet can only draw differences that the text towers carry, therefore
concepts are told apart on purpose: many objects on few places a batch, pictures of one concept in several
styles as positives of each other's captions, and every image compared with the names of all concepts.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lab.pretrain.common import ASSETS, Trainer, autocast, device, generator
from lab.pretrain.concepts import CONCEPTS, PLACES, article, prompt
from lab.pretrain.scenes import captions, compose
from lab.pretrain.sprites import Sprites

CONTEXT, VOCABULARY = 32, 8514
CONFIG = {
    "embed_dim": 192,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 192, "patch_size": 8, "head_width": 32},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": 192,
        "heads": 6,
        "layers": 4,
        "hf_tokenizer_name": "tiny-clip",
    },
}
SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 3}


class Towers(nn.Module):
    """open_clip's CLIP, and a second, smaller text tower beside it."""

    def __init__(self, config: dict | None = None, small: dict | None = None):
        super().__init__()
        import open_clip
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = copy.deepcopy(config or CONFIG)
        sizes: dict[str, Any] = small or SMALL
        self.clip: Any = open_clip.CLIP(**config)
        self.small = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=CONTEXT,
                projection_dim=config["embed_dim"],
                hidden_act="quick_gelu",
                bos_token_id=8512,
                eos_token_id=8513,
                pad_token_id=0,
                **sizes,
            )
        )

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, 64, 64) in -1..1 to unit vectors (n, embed)."""
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def text(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (n, up to 32) to the large tower's unit vectors; shorter rows cost less, and causal
        attention makes the result the same as with padding to 32."""
        clip, length = self.clip, ids.shape[1]
        x = clip.token_embedding(ids) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        x = x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]  # the end token has the highest id
        return F.normalize((x @ clip.text_projection).float(), dim=-1)

    def text_small(self, ids: torch.Tensor) -> torch.Tensor:
        """The same from the small tower."""
        return F.normalize(self.small(input_ids=ids).text_embeds.float(), dim=-1)


def tokenizer():
    """Captions to ids, cut to the longest caption."""
    from transformers import AutoTokenizer

    tokenize: Any = AutoTokenizer.from_pretrained(ASSETS / "tiny-clip")
    start, end = 8512, 8513

    def ids(texts: list[str]) -> torch.Tensor:
        rows = [[start, *tokenize(text, add_special_tokens=False)["input_ids"][: CONTEXT - 2], end] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device())

    return ids


def start_from(towers: Towers, folder: Path) -> int:
    """Take over an assembled folder's weights wherever shapes match; the rest keeps its random start."""
    from safetensors.torch import load_file

    taken = 0
    files = {
        "clip.": folder / "tiny-clip" / "open_clip_model.safetensors",
        "small.": folder / "tiny-sdxl" / "text_encoder" / "model.safetensors",
    }
    own = towers.state_dict()
    for prefix, path in files.items():
        for key, value in (load_file(path) if path.exists() else {}).items():
            if prefix + key in own and own[prefix + key].shape == value.shape:
                own[prefix + key].copy_(value)
                taken += 1
    return taken


def load_towers(folder: Path) -> Towers:
    """The towers of an assembled folder."""
    config = json.loads((folder / "tiny-clip" / "open_clip_config.json").read_text())["model_cfg"]
    kept = json.loads((folder / "tiny-sdxl" / "text_encoder" / "config.json").read_text())
    towers = Towers(config, {key: kept[key] for key in SMALL})
    start_from(towers, folder)
    return towers


def _blurred(pixels: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Some scenes a little soft, noisy, lighter or darker, as drawn pictures are."""
    n = len(pixels)
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1, generator=g) * (torch.rand(n, 1, 1, 1, generator=g) < 0.4)
    noise = torch.randn(pixels.shape, generator=g) * 0.08 * torch.rand(n, 1, 1, 1, generator=g)
    gain = 1 + 0.12 * (torch.rand(n, 1, 1, 1, generator=g) * 2 - 1)
    return ((pixels * (1 - share) + soft * share) * gain + noise).clamp(-1, 1)


def _match_loss(scale: torch.Tensor, image: torch.Tensor, text: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
    """Both ways, with the probability shared among all captions (images) that fit."""
    logits = scale * image @ text.T
    rows = -(F.log_softmax(logits, 1) * match / match.sum(1, keepdim=True)).sum(1).mean()
    columns = -(F.log_softmax(logits, 0) * match / match.sum(0, keepdim=True)).sum(0).mean()
    return (rows + columns) / 2


class Step:
    """The loss of one step, from the step's number alone."""

    def __init__(self, sprites: Sprites, towers: Towers, batch: int):
        self.sprites, self.towers, self.batch, self.ids = sprites, towers, batch, tokenizer()
        is_nameable = sprites.concept[sprites.trainable] < sprites.nameable_count
        self.others = sprites.trainable[~is_nameable]
        self.place_ids = self.ids([f"something {place}" for place in PLACES])

    def draw(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, places, scenes: three quarters nameable concepts, six places a batch."""
        g = generator(11, step)
        n, pool = self.batch, self.sprites.nameable
        rows = pool[torch.randperm(len(pool), generator=g)[: n * 3 // 4]]
        more = self.others[torch.randint(len(self.others), (n - len(rows),), generator=g)]
        rows = torch.cat([rows, more])
        places = torch.randperm(len(PLACES), generator=g)[torch.randint(6, (n,), generator=g)]
        return rows, places, _blurred(compose(self.sprites, rows, places, g, (0.62, 0.95)), g)

    def names(self, concept: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the names of all nameable concepts and of the batch's others; each image's right one."""
        every, count = self.sprites.names, self.sprites.nameable_count
        shown = torch.cat([torch.arange(count), torch.unique(concept[concept >= count])])
        place = f" {PLACES[step // 2 % len(PLACES)]}"
        texts = [(article(every[i]) + (place if step % 2 else "")) for i in shown.tolist()]
        return self.ids(texts), torch.searchsorted(shown, concept)

    def __call__(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        s, towers = self.sprites, self.towers
        rows, places, pixels = self.draw(step)
        concept, style = s.concept[rows], s.style[rows]
        texts, with_place, with_style = captions(s, rows, places, step)
        match = (
            (concept[:, None] == concept)
            & (~with_place | (places[:, None] == places))
            & (~with_style | (style[:, None] == style))
        )
        name_ids, name_target = self.names(concept, step)
        match, name_target, place_target = (t.to(device()) for t in (match.float(), name_target, places))
        caption_ids = self.ids(texts)
        with autocast():
            scale = towers.clip.logit_scale.clamp(max=4.6).exp()
            image = towers.image(pixels.to(device()))
            losses, right = [], 0.0
            for encode in (towers.text, towers.text_small):
                name_logits = scale * image @ encode(name_ids).T
                losses += [
                    _match_loss(scale, image, encode(caption_ids), match),
                    F.cross_entropy(name_logits, name_target),
                    0.3 * F.cross_entropy(scale * image @ encode(self.place_ids).T, place_target),
                ]
                right = right or (name_logits.argmax(1) == name_target).float().mean().item()
        report = dict(
            zip(
                ("match", "name", "place", "match2", "name2", "place2"),
                (float(loss.detach()) for loss in losses),
                strict=True,
            )
        )
        return sum(losses), {**report, "named": right, "scale": float(scale.detach())}


@torch.no_grad()
def name_shares(towers: Towers, sprites: Sprites, seed: int = 7) -> dict[str, float]:
    """Held-out scenes: share named right by either text tower among all concepts, place right, recall@1."""
    g, ids = generator(5, seed), tokenizer()
    rows = sprites.nameable
    places = torch.randint(len(PLACES), (len(rows),), generator=g)
    concept = sprites.concept[rows]
    with autocast():
        image = towers.image(compose(sprites, rows, places, g).to(device()))
        names = ids([prompt(name) for name in CONCEPTS])
        placed = torch.stack([towers.text(ids([prompt(name, place) for place in PLACES])) for name in CONCEPTS])
        by_name = [(image @ encode(names).T).argmax(1).cpu() for encode in (towers.text, towers.text_small)]
    of_place = torch.einsum("nd,npd->np", image, placed[concept]).argmax(1).cpu()
    shares = [(pick == concept).float().mean().item() for pick in by_name]
    return {
        "naming": shares[0],
        "naming_small": shares[1],
        "place": (of_place == places).float().mean().item(),
        "recall": recall(image, placed[concept, places], concept * len(PLACES) + places),
    }


def recall(image: torch.Tensor, text: torch.Tensor, key: torch.Tensor, n: int = 512) -> float:
    """Mean of image-to-text and text-to-image recall@1 among n pairs with different captions."""
    first = {int(k): i for i, k in reversed(list(enumerate(key)))}
    chosen = torch.tensor(sorted(first.values()))
    chosen = chosen[torch.randperm(len(chosen), generator=generator(3))[:n]]
    logits, right = image[chosen] @ text[chosen].T, torch.arange(len(chosen), device=image.device)
    return ((logits.argmax(1) == right).float().mean() + (logits.argmax(0) == right).float().mean()).item() / 2


def train(
    sprites: Sprites,
    steps: int = 1500,
    batch: int = 192,
    config: dict | None = None,
    small: dict | None = None,
    evaluate_every: int = 100,
) -> Trainer:
    """Train, or go on training, up to `steps`."""
    torch.manual_seed(0)
    towers = Towers(config, small)
    known = start_from(towers, ASSETS) > 0
    if not known:
        with torch.no_grad():
            towers.clip.logit_scale.fill_(math.log(30))  # rises too slowly by itself
    trainer = Trainer("clip", towers, peak=8e-4, weight_decay=0.05, ema=0.99, from_assets=known)

    def evaluate() -> str:
        return "  ".join(f"{k} {v:.3f}" for k, v in name_shares(cast(Towers, trainer.ema.model), sprites).items())

    trainer.run(steps, Step(sprites, cast(Towers, trainer.model), batch), evaluate, evaluate_every=evaluate_every)
    return trainer
