"""EDM's formulation (Playground v2.5): the loss written out in plain torch, and pictures as the plain pipeline draws them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab import edm
from lab.single_file import PLAYGROUND
from tests import small_sdxl as small


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A row for a small base with Playground's scheduler and latents' statistics."""
    folder = small.build(tmp_path_factory.mktemp("playground"))
    for name, changes in PLAYGROUND.items():
        before = {} if "_class_name" in changes else json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(before | changes))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMDPMSolverMultistepScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    yield small.register(folder, "small-playground")
    small.unregister("small-playground")


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_recipe_written_out(playground: Any, gamma: float | None) -> None:
    from lab.diffusion import denoising_loss, encode_pictures, training_schedule

    pipe = playground.load("cpu", torch.float32)
    schedule = training_schedule(pipe)
    assert edm.is_edm(schedule)
    pictures = small.pictures(3, (16, 16))
    cached = encode_pictures(pipe, pictures, ["a fox"] * 3, 16)
    chosen, generator = [2, 0, 2, 1], torch.Generator().manual_seed(1)
    with torch.no_grad():
        got = denoising_loss(pipe.unet, pipe.vae, schedule, cached, chosen, generator, gamma)

    generator.manual_seed(1)
    draw, noise = (torch.stack([torch.randn(4, 8, 8, generator=generator) for _ in chosen]) for _ in range(2))
    steps = torch.randint(0, 1000, (4,), generator=generator)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (
        (high + torch.arange(1000) / 1000 * (low - high)).pow(7)[steps].view(4, 1, 1, 1)
    )  # EDM, eq. 5, as diffusers steps it
    mean, std = (torch.tensor(PLAYGROUND["vae/config.json"][f"latents_{n}"]).view(1, 4, 1, 1) for n in ("mean", "std"))
    latents = (
        torch.stack([cached.mean[i] + cached.std[i] * d for i, d in zip(chosen, draw, strict=True)]) - mean
    ) / std
    latents = latents * 0.5
    noisy = latents + sigma * noise
    both = (sigma**2 + 0.25).sqrt()  # EDM, table 1, at σ_data = 0.5
    known = {"text_embeds": cached.pooled[chosen], "time_ids": cached.time_ids[chosen]}
    with torch.no_grad():
        output = pipe.unet(
            noisy / both,
            sigma.flatten().log() / 4,
            encoder_hidden_states=cached.states[chosen],
            added_cond_kwargs=known,
        ).sample
    expected = ((0.25 / both**2 * noisy + sigma * 0.5 / both * output - latents) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        expected = expected * (0.5 / sigma.flatten()).square().clamp(max=gamma)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_pictures_are_the_plain_pipelines(playground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab import device
    from lab.diffusion import encode_prompts
    from lab.sampling import sample

    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    pipe = playground.load("cpu", torch.float32)
    prompts = encode_prompts(pipe, ["a fox"])
    (drawn,) = sample(pipe, [prompts["a fox"]], [3], prompts[""], steps=3, guidance=3.0, resolution=16)
    plain = pipe(
        "a fox",
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    off = np.abs(np.asarray(drawn, dtype=int) - np.asarray(plain, dtype=int))
    assert off.max() <= 1
    assert np.asarray(plain).std() > 0


def test_a_whole_run(playground: Any, tmp_path: Path) -> None:
    from lab import comparison

    spec = small.spec(base="small-playground", methods={"lora": {}, "nora": {}}, snr_gamma=5.0)
    spec = comparison.start(tmp_path / "out", "subject", spec, small.pictures())
    runs = comparison.run_all(tmp_path / "out", "subject", spec, lambda planned: lambda *_, **__: None)
    assert [run["state"] for run in runs] == ["done"] * 3, [run["message"] for run in runs]
    assert all(run["result"]["final_loss"] > 0 for run in runs if run["method"] != "base")
