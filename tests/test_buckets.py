"""Aspect-ratio buckets: their sizes, what is told of them, and mixed sizes in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from lab import comparison, device, images
from lab.bases import resolve
from lab.diffusion import denoising_loss, encode_pictures, training_schedule
from lab.tasks import TASKS
from tests import small_sdxl as small


# -- sizes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 1000, (1024, 1024)),
        (3000, 2000, (1216, 832)),  # SDXL's own buckets (appendix I)
        (2000, 3000, (832, 1216)),
        (4000, 3000, (1152, 896)),
        (1920, 1080, (1344, 768)),
        (1024, 1030, (1024, 1024)),
        (5000, 1000, (2048, 512)),  # no further: sides from half to twice the resolution
        (100, 9000, (512, 2048)),
    ],
)
def test_buckets_at_1024_are_sdxls(width: int, height: int, expected: tuple[int, int]) -> None:
    assert images.bucket(width, height, 1024, images.bucket_step(1024, 8)) == expected


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
@pytest.mark.parametrize("shape", [(3, 2), (1, 1), (9, 16), (7, 30)])
def test_buckets_keep_area_and_granule(resolution: int, shape: tuple[int, int]) -> None:
    step = images.bucket_step(resolution, 8)
    width, height = images.bucket(*shape, resolution, step)
    assert step % 8 == width % step == height % step == 0
    assert 0.75 * resolution**2 <= width * height <= resolution**2


# -- what is cut, and told ----------------------------------------------------------------------------------
def marked(width: int, height: int) -> Image.Image:
    """Red at the left and top edge, blue at the right and bottom."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, width // 8, height), fill="red")
    draw.rectangle((width - width // 8, 0, width, height), fill="blue")
    return picture


def test_a_whole_picture_stays_whole() -> None:
    view = images.framed(marked(30, 20), None, 16, bucket_step=4)
    assert view.picture.size == (20, 12)
    # by the larger of 20/30 and 12/20: resized to 20 by 13.3, of which 0.7 are lost above and below
    assert (view.left, view.top, view.right) == (0, 1, 0)
    assert view.picture.getpixel((0, 6))[0] > 200 > view.picture.getpixel((0, 6))[2]
    assert view.picture.getpixel((19, 6))[2] > 200 > view.picture.getpixel((19, 6))[0]


def test_a_crop_of_ones_own_stays_a_square() -> None:
    view = images.framed(marked(30, 20), [2, 3, 16], 16, bucket_step=4)
    assert (view.picture.size, view.left, view.top, view.right) == ((16, 16), 2, 3, 12)


def test_sizes_crops_and_targets_are_told(small_sdxl: Any) -> None:
    pictures = [marked(60, 40), marked(20, 20), marked(16, 40)]
    found = encode_pictures(small_sdxl.load(), pictures, ["a fox"] * 3, 16, buckets=True, flip=True)
    # original height and width; top and left of the crop in the resized picture; the bucket's height and width
    assert found.time_ids[::2].tolist() == [[40, 60, 1, 0, 12, 20], [20, 20, 0, 0, 16, 16], [40, 16, 2, 0, 24, 10]][
        :3
    ] or (found.time_ids[::2].tolist()[:2] == [[40, 60, 1, 0, 12, 20], [20, 20, 0, 0, 16, 16]])
    for mean, told in zip(found.mean, found.time_ids.tolist(), strict=True):
        assert [2 * side for side in mean.shape[1:]] == told[4:]
    told = encode_pictures(
        small_sdxl.load(), pictures, ["a fox"] * 3, 16, buckets=True, size_conditioning=False
    ).time_ids.tolist()
    assert told[0] == [12, 20, 0, 0, 12, 20]


def test_a_batch_of_mixed_sizes_is_the_mean_of_its_pictures(small_sdxl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    pipe = small_sdxl.load()
    pictures = [marked(30, 20), marked(20, 20), marked(30, 20)]
    cached = encode_pictures(pipe, pictures, ["a fox", "a dog", "a cat"], 16, buckets=True)
    schedule, chosen = training_schedule(pipe), [2, 1, 0, 1]
    with torch.no_grad():
        together = denoising_loss(pipe.unet, pipe.vae, schedule, cached, chosen, torch.Generator().manual_seed(1))

        generator = torch.Generator().manual_seed(1)
        draws, noises = ([torch.randn(cached.mean[i].shape, generator=generator) for i in chosen] for _ in range(2))
        times = torch.randint(0, 1000, (4,), generator=generator)
        for k, i in enumerate(chosen):
            latents = ((cached.mean[i] + cached.std[i] * draws[k]) * pipe.vae.config.scaling_factor)[None]
            noisy = schedule.add_noise(latents, noises[k][None], times[k : k + 1])
            known = {"text_embeds": cached.pooled[i : i + 1], "time_ids": cached.time_ids[i : i + 1]}
            predicted = pipe.unet(noisy, times[k : k + 1], cached.states[i : i + 1], added_cond_kwargs=known).sample
            wanted = schedule.get_velocity(latents, noises[k][None], times[k : k + 1])
            assert together[k].item() == pytest.approx((predicted - wanted).square().mean().item(), rel=1e-4)


def test_a_run_in_buckets_trains_and_resumes(small_sdxl: Any, tmp_path: Path) -> None:
    pictures = [marked(30, 20), marked(20, 20), marked(16, 26)]
    for out in ("one", "two"):
        spec = comparison.start(tmp_path / out, "subject", small.spec(buckets=True, flip=True), pictures)
        runs = comparison.run_all(tmp_path / out, "subject", spec, lambda _: lambda *_, **__: None)
        assert [run["message"] for run in runs] == ["", ""]
    files = [tmp_path / out / "runs" / "lora-s0" / "adapter" / "adapter_model.safetensors" for out in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


# -- 1024 by default -------------------------------------------------------------------------------------------
def test_each_bases_own_resolution_is_the_default() -> None:
    for id in ("sdxl", "tiny-sdxl"):
        assert TASKS["subject"].check({"class_word": "fox", "base": id})["resolution"] is None
        assert not TASKS["subject"].check({"class_word": "fox", "base": id})["buckets"]
    assert (resolve("sdxl").resolution, resolve("tiny-sdxl").resolution) == (1024, 64)
