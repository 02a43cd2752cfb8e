"""Drawing: batches of prompts × seeds, what happens when memory or numbers run out, offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab import comparison, device, sampling
from lab.diffusion import encode_prompts
from lab.errors import LabError
from tests import small_sdxl as small

TEXTS = ["a fox", "a dog", "a fox", "a dog", "a fox"]
SEEDS = [0, 0, 1, 1, 2]


@pytest.fixture
def pipe(small_sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    return small_sdxl.load()


def draw(pipe: Any, **changes: Any) -> list[bytes]:
    known = encode_prompts(pipe, TEXTS)
    options = {"steps": 2, "guidance": 5.0, "resolution": 16} | changes
    return [p.tobytes() for p in sampling.sample(pipe, [known[t] for t in TEXTS], SEEDS, known[""], **options)]


def test_pictures_are_those_of_the_whole_pipeline(pipe: Any) -> None:
    """Encoders and VAE are not in the sampling pipeline: the pictures are those of diffusers' own call."""
    for text, seed, ours in zip(TEXTS, SEEDS, draw(pipe), strict=True):
        first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        theirs = pipe(text, num_inference_steps=2, guidance_scale=5.0, height=16, width=16, latents=first).images[0]
        pairs = zip(ours, theirs.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1  # rounding: theirs is a batch of one


def test_batches_encode_each_prompt_once_and_count_their_steps(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, told, real = [], [], type(pipe).encode_prompt

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["prompt"], kwargs["do_classifier_free_guidance"]))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", counted)
    batches = []
    forward = type(pipe.unet).forward
    monkeypatch.setattr(
        type(pipe.unet), "forward", lambda self, x, *a, **k: batches.append(len(x)) or forward(self, x, *a, **k)
    )
    draw(pipe, batch=3, on_step=lambda done, every: told.append((done, every)))
    # The empty prompt once too; the pipeline is given embeddings, and no text.
    assert [call for call in calls if call[0]] == [("a fox", True), ("a dog", False)]
    assert batches == [6, 6, 4, 4]  # with and without the prompt; two steps each
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_large_pictures_are_drawn_fewer_at_once(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(_: Any, prompts: Any, *a: Any, **k: Any) -> torch.Tensor:
        seen.append(len(prompts))
        return torch.zeros(len(prompts), 4, 8, 8)

    monkeypatch.setattr(sampling, "_denoise", counted)
    monkeypatch.setattr(sampling, "decode", lambda *a, **k: [])
    known = encode_prompts(pipe, ["a fox"])
    for resolution, expected in ((64, [16, 4]), (512, [16, 4]), (1024, [4] * 5)):
        seen.clear()
        sampling.sample(
            pipe, [known["a fox"]] * 20, list(range(20)), known[""], steps=1, guidance=1, resolution=resolution
        )
        assert seen == expected, resolution


def test_where_memory_runs_out_the_batch_is_halved(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, real, seen = draw(pipe), sampling._denoise, []

    def small_memory(pipe: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(sampling, "_denoise", small_memory)
    assert len(draw(pipe)) == len(plain)
    assert seen == [5, 2, 2, 1]

    def none(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "_denoise", none)
    with pytest.raises(LabError, match="drawing of one picture of 16 pixels: lower the resolution"):
        draw(pipe)


def test_offloading_decodes_without_the_unet_and_brings_it_back(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, sent = draw(pipe), []
    monkeypatch.setattr(sampling, "move", lambda part, device: sent.append((type(part).__name__, str(device))))
    assert draw(pipe, offload=True) == plain
    assert sent == [("UNet2DConditionModel", "cpu")] * 2  # away, and to where it was
    assert not pipe.vae.use_tiling


def test_a_broken_adapter_is_told_with_the_step_and_the_cause(
    small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling._denoise

    def broken(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        adapted = any("lora" in name for name, _ in pipe.unet.named_modules())
        return real(pipe, *args, **kwargs) * (float("nan") if adapted else 1.0)

    monkeypatch.setattr(sampling, "_denoise", broken)
    spec = comparison.start(tmp_path, "subject", small.spec(steps=3, lr=0.4), small.pictures())
    base, run = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)
    assert base["state"] == "done"
    assert run["message"] == (
        "After step 3 of 3 the pictures come out as numbers out of range; "
        "the learning rate 0.4 is probably too high: try 0.1."
    )
    assert (Path(run["folder"]) / "adapter" / "adapter_model.safetensors").exists()  # hours of training are kept


def test_a_broken_base_is_told_before_any_training(
    small_sdxl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling._denoise
    monkeypatch.setattr(sampling, "_denoise", lambda *a, **k: real(*a, **k) * float("inf"))
    spec = comparison.start(tmp_path, "subject", small.spec(steps=1), small.pictures())
    base = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)[0]
    assert base["message"].startswith("The pictures come out as numbers out of range; the base gives them before any")


def test_a_vae_that_overflows_is_told(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(LabError, match="fp16-fixed VAE or weights in bf16"):
        sampling.decode(pipe, latents)
