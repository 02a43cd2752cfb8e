"""Our training against a loop written out as diffusers' DreamBooth-LoRA-SDXL example describes it.

Ten steps of a whole run (pictures in, metrics out) and the same ten steps in plain torch, transformers, diffusers and
PEFT: the same examples, noise and timesteps are drawn, everything else is written again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from lab import comparison, device, images
from lab.methods import METHODS
from tests import small_sdxl as small

STEPS, BATCH, SIZE, SEED, LR = 10, 2, 16, 3, 2e-3
WORDS = ["a sks fox", "a sks fox at night", "a sks fox"]
CAPTIONS = ["", "a {subject} at night", ""]


def photographs() -> list[Image.Image]:
    """As small.pictures, but larger than the crop at one side, and of the training's size at the other: what is
    resized first and what is cropped first then are the same pixels."""
    sizes = [(24, 16), (16, 22), (16, 16)]
    return [picture.resize(size) for picture, size in zip(small.pictures(3), sizes, strict=True)]


class Recipe:
    """train_dreambooth_lora_sdxl.py's loop, without its accelerator."""

    def __init__(self, folder: Path, text: bool, prior: list[Image.Image], gamma: float | None, rate: float) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

        self.text, self.gamma = text, gamma
        self.noise_scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
        one = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
        two = CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2").requires_grad_(False)
        self.tokenizers = [AutoTokenizer.from_pretrained(folder, subfolder=f"tokenizer{n}") for n in ("", "_2")]
        knobs = METHODS["lora"].knobs(r=2)
        torch.manual_seed(SEED)
        config = {"r": knobs.r, "lora_alpha": knobs.alpha or knobs.r, "init_lora_weights": True}
        self.unet = get_peft_model(unet, LoraConfig(target_modules=["to_k", "to_q", "to_v", "to_out.0"], **config))
        self.encoders: list[Any] = [one, two]
        if text:
            targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
            self.encoders = [get_peft_model(e, LoraConfig(target_modules=targets, **config)) for e in (one, two)]
        groups = [{"params": [p for p in self.unet.parameters() if p.requires_grad], "lr": LR}]
        if text:
            groups += [
                {"params": [p for p in e.parameters() if p.requires_grad], "lr": rate * LR} for e in self.encoders
            ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.instance = [self.example(picture) for picture in photographs()]
        self.prior = [self.example(picture) for picture in prior]
        with torch.no_grad():
            self.cached = {t: self.encode([t]) for t in {*WORDS, "a fox"}}

    def example(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Pixels (1, 3, h, w) in -1..1 and the time ids: original size, crop's top left, target size."""
        original = (image.height, image.width)
        image = transforms.Resize(SIZE)(image)
        top, left = max(0, round((image.height - SIZE) / 2.0)), max(0, round((image.width - SIZE) / 2.0))
        image = transforms.CenterCrop(SIZE)(image)
        pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(image)
        return pixels[None], (*original, top, left, SIZE, SIZE)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """encode_prompt of the example."""
        states, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids, output_hidden_states=True)
            pooled = out[0]
            states.append(out.hidden_states[-2])
        assert pooled is not None
        return torch.cat(states, dim=-1), pooled.view(len(prompts), -1)

    def drawn(self, examples: list[Any], step: int, generator: torch.Generator) -> tuple[Any, ...]:
        """One set's batch: latents, noise, timesteps, time ids and indices, drawn in the lab's order."""
        n, chosen = len(examples), []
        for position in range(step * BATCH, (step + 1) * BATCH):
            order = torch.randperm(n, generator=device.generator(SEED, 2, position // n))
            chosen.append(int(order[position % n]))
        with torch.no_grad():
            posterior = self.vae.encode(torch.cat([examples[i][0] for i in chosen])).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=generator)
        noise = torch.randn(posterior.mean.shape, generator=generator)
        t = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (BATCH,), generator=generator)
        latents = (posterior.mean + posterior.std * draw) * self.vae.config.scaling_factor
        return latents, noise, t, torch.tensor([examples[i][1] for i in chosen], dtype=torch.float32), chosen

    def step(self, step: int, generator: torch.Generator, prior_weight: float) -> float:
        latents, noise, t, time_ids, chosen = self.drawn(self.instance, step, generator)
        prompts = [WORDS[i] for i in chosen]
        if self.prior:
            others = self.drawn(self.prior, step, generator)[:4]
            latents, noise, t, time_ids = (
                torch.cat(pair) for pair in zip((latents, noise, t, time_ids), others, strict=True)
            )
            prompts += ["a fox"] * BATCH
        if self.text:
            states, pooled = self.encode(prompts)
        else:
            states, pooled = (torch.cat([self.cached[p][k] for p in prompts]) for k in (0, 1))
        noisy = self.noise_scheduler.add_noise(latents, noise, t)
        conditions = {"time_ids": time_ids, "text_embeds": pooled}
        predicted = self.unet(noisy, t, states, added_cond_kwargs=conditions).sample
        target = noise
        if self.noise_scheduler.config.prediction_type == "v_prediction":
            target = self.noise_scheduler.get_velocity(latents, noise, t)
        each = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3)) * self.weights(t)
        loss = each[:BATCH].mean()
        if self.prior:
            loss = loss + prior_weight * each[BATCH:].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def adapter(self) -> dict[str, torch.Tensor]:
        """What was trained, as PEFT would name it on one network of all parts."""
        parts = {"unet": self.unet, "text_encoder": self.encoders[0], "text_encoder_2": self.encoders[1]}
        return {
            name.replace(".default", "").replace(
                "model.model.", f"model.model.{part}." if self.text else "model.model."
            ): p
            for part, model in parts.items()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def weights(self, t: torch.Tensor) -> torch.Tensor:
        """Min-SNR as in train_text_to_image_lora_sdxl.py."""
        if self.gamma is None:
            return torch.ones(len(t))
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.noise_scheduler, t)
        least = torch.stack([snr, self.gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        return least / snr if self.noise_scheduler.config.prediction_type == "epsilon" else least / (snr + 1)


@pytest.mark.parametrize(
    ("prediction", "text", "prior_weight", "gamma"),
    [
        ("epsilon", False, 0.0, None),
        ("epsilon", True, 0.0, None),
        ("epsilon", False, 0.7, None),
        ("epsilon", True, 0.7, 5.0),
        ("v_prediction", False, 0.0, None),
        ("v_prediction", False, 0.0, 5.0),
        ("v_prediction", True, 0.7, 5.0),
    ],
)
def test_ten_steps_equal_the_recipe(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prediction: str,
    text: bool,
    prior_weight: float,
    gamma: float | None,
) -> None:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    folder = small.build(tmp_path / "base", prediction, zero_snr=prediction == "v_prediction")
    small.register(folder, "recipe")
    try:
        spec = small.spec(
            base="recipe",
            steps=STEPS,
            batch=BATCH,
            seeds=[SEED],
            lr=LR,
            captions=CAPTIONS,
            text_encoder=text,
            text_encoder_rate=0.5,
            prior_weight=prior_weight,
            prior_pictures=2,
            snr_gamma=gamma,
            sample_seeds=[0],
        )
        spec = comparison.start(tmp_path / "out", "subject", spec, photographs())
        runs = comparison.run_all(tmp_path / "out", "subject", spec, lambda _: lambda *_, **__: None)
    finally:
        small.unregister("recipe")
    assert [run["message"] for run in runs] == ["", ""]
    lines = (Path(runs[1]["folder"]) / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]

    prior = images.read_folder(tmp_path / "out" / "prior") if prior_weight else []
    recipe = Recipe(folder, text, prior, gamma, rate=0.5)
    recipe.unet.train()
    generator = device.generator(SEED, 1)
    theirs = [recipe.step(step, generator, prior_weight) for step in range(STEPS)]
    assert ours == pytest.approx(theirs, abs=1e-5)
    saved = load_file(Path(runs[1]["folder"]) / "adapter" / "adapter_model.safetensors")
    trained = recipe.adapter()
    assert saved.keys() == trained.keys()
    assert all((saved[name] - trained[name]).abs().mean() < 1e-5 for name in saved)
    assert len([name for name in saved if "text_encoder" in name]) == (32 if text else 0)  # 2 encoders × 2 × 4 × A, B
