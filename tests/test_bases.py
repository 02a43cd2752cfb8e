"""Base models: rows, what names resolve to, and how loading fails."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab import single_file
from lab.bases import ASSETS, BASES, Base, local, offered, pick, resolve
from lab.errors import LabError


def test_rows_are_read_without_torch() -> None:
    code = "import sys; from lab.bases import BASES; [b.resolution for b in BASES if b.family == 'sdxl']; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_embedded_bases_resolution_is_what_its_files_say() -> None:
    unet, vae = (json.loads((ASSETS / "tiny-sdxl" / part / "config.json").read_text()) for part in ("unet", "vae"))
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    assert BASES["tiny-sdxl"].resolution == unet["sample_size"] * factor
    assert BASES["sdxl"].resolution == 1024


def test_names() -> None:
    assert resolve("sdxl") is BASES["sdxl"]
    assert resolve(BASES["sdxl"].source) is BASES["sdxl"]
    local = resolve(str(ASSETS / "tiny-sdxl"))
    assert (local.family, local.variant, local.public_name) == ("sdxl", None, "tiny-sdxl")
    assert resolve("owner/some-model").source == "owner/some-model"
    assert str(ASSETS) not in BASES["tiny-sdxl"].public_name


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tiny_sdxl", "did you mean tiny-sdxl"),
        ("model.ckpt", "pickled checkpoint"),
        ("model.PT", "pickled checkpoint"),
        ("./nothing.safetensors", "There is no file"),
        ("no such base", "Unknown base model"),
        ("a/b/c", "Unknown base model"),
        ("", "Unknown base model"),
    ],
)
def test_names_that_are_none(name: str, sentence: str) -> None:
    with pytest.raises(LabError, match=sentence):
        resolve(name)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"holds no model_index\.json"):
        resolve(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(LabError, match="not a whole diffusers folder"):
        _ = resolve(str(tmp_path)).resolution
    with pytest.raises(LabError, match=r"not a whole diffusers folder: its model_index\.json names no unet"):
        resolve(str(tmp_path)).load("cpu")


def test_a_broken_single_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(LabError, match="could not be loaded"):
        resolve(str(path)).load("cpu")


def test_a_pickle_inside_a_folder_is_refused(small_sdxl: Any, tmp_path: Path) -> None:
    """A folder whose UNet is only there as a pickle does not load: it is never opened."""
    import torch

    folder = tmp_path / "model"
    shutil.copytree(small_sdxl.source, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(LabError, match="'model' has its unet only as a pickle"):
        resolve(str(folder)).load("cpu")


def test_weights_are_frozen_and_shared(small_sdxl: Any) -> None:
    pipe = small_sdxl.load()
    assert pipe is small_sdxl.load()
    assert not any(p.requires_grad for p in pipe.unet.parameters())
    small_sdxl.forget()
    assert pipe is not small_sdxl.load()


def test_a_hub_that_cannot_be_reached_is_told_as_that(tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    from lab.bases._sdxl import _sentence

    assert str(tmp_path.parent) not in _sentence(str(tmp_path), OSError(f"{tmp_path}/unet/config.json is missing"))
    error = OSError("no file named config.json")
    error.__cause__ = LocalEntryNotFoundError("no connection")
    assert "check the network" in _sentence("owner/name", error)
    assert "no file named config.json" in _sentence(str(tmp_path), error)  # a folder needs no network
    assert "check the network" in _sentence("owner/name", OSError("the model is not fully cached locally"))


def test_family_rows() -> None:
    turbo, playground, ssd = BASES["sdxl-turbo"], BASES["playground-v2.5"], BASES["ssd-1b"]
    assert 1 <= turbo.preset("subject")["sampling_steps"] <= 4
    assert (turbo.preset("subject")["guidance"], turbo.resolution) == (0.0, 512)
    assert (playground.vae, playground.preset("subject")["guidance"]) == (None, 3.0)
    assert ssd.architecture == "ssd-1b"
    for base in (row for row in offered() if not row.id.startswith("small-")):
        assert base.summary
        assert base.licence
        assert base.megabytes or Path(base.source).is_dir()


# -- what a visitor may name -----------------------------------------------------------------------------
@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkpoints as its owner names it in LAB_CHECKPOINTS."""
    folder = tmp_path / "shelf"
    (folder / "anime" / "model" / "unet").mkdir(parents=True)
    (folder / "anime" / "model" / "model_index.json").write_text("{}")
    (folder / "anime" / "model" / "unet" / "x.safetensors").write_bytes(b"")
    (folder / "photo.v2.safetensors").write_bytes(b"")
    (folder / "old.ckpt").write_bytes(b"")
    monkeypatch.setenv("LAB_CHECKPOINTS", str(folder))
    return folder


def test_the_owners_checkpoints_are_offered_by_name(shelf: Path) -> None:
    assert [row.id for row in local()] == ["local:anime/model", "local:photo.v2"]
    for row in local():
        assert pick(row.id) == resolve(row.id) == row
        assert str(shelf) not in row.id + row.name + row.summary
    with pytest.raises(LabError, match="Unknown base model"):
        resolve("local:../shelf/photo.v2")


@pytest.mark.parametrize("hub", ["0", "1"])
def test_a_strangers_path_is_never_opened(shelf: Path, monkeypatch: pytest.MonkeyPatch, hub: str) -> None:
    monkeypatch.setenv("LAB_HUB_BASES", hub)
    monkeypatch.chdir(shelf.parent)
    there = [
        str(shelf / "photo.v2.safetensors"),
        str(ASSETS / "tiny-sdxl"),
        "shelf/anime",
        "./shelf/photo.v2.safetensors",
    ]
    for name in [*there, "/nowhere/model.safetensors", "~/x.safetensors", "a/b/c", "file:///etc/passwd", ""]:
        with pytest.raises(LabError, match="Unknown base model"):
            pick(name)


def test_a_hub_id_is_the_owners_to_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_HUB_BASES", raising=False)
    with pytest.raises(LabError, match="Unknown base model"):
        pick("owner/fine-tune")
    monkeypatch.setenv("LAB_HUB_BASES", "1")
    assert pick("owner/fine-tune").source == "owner/fine-tune"
    assert pick("stabilityai/sdxl-turbo") is BASES["sdxl-turbo"]


# -- the hub's exact format, at a few channels ------------------------------------------------------------
@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(pipeline, its diffusers folder, its single file, its configuration's folder)."""
    from tests import narrow_sdxl

    folder = tmp_path_factory.mktemp("narrow")
    pipe = narrow_sdxl.build(folder / "model", folder / "configuration")
    return (
        pipe,
        folder / "model",
        narrow_sdxl.single_file(pipe, folder / "some.model.safetensors"),
        folder / "configuration",
    )


def own_vae(name: Path) -> Base:
    """The row, with no VAE in place of its own."""
    return dataclasses.replace(resolve(str(name)), vae=None)


def same(pipe: Any, other: Any, parts: tuple[str, ...] = ("unet", "vae", "text_encoder", "text_encoder_2")) -> None:
    import torch

    for part in parts:
        mine, theirs = getattr(pipe, part).state_dict(), getattr(other, part).state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value.half(), theirs[key].half()), f"{part}.{key}"


def test_a_single_file_is_the_folder_it_was_made_of(narrow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: all 2,508 tensors by their original names, and the tokenizers."""
    pipe, _, file, configuration = narrow
    monkeypatch.setattr(single_file, "CONFIGURATION", configuration)
    again = own_vae(file).load("cpu")
    same(pipe, again)
    text = "a photo of a fox, naïve 🦊 don't"
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(again, name)(text).input_ids == getattr(pipe, name)(text).input_ids
        assert getattr(again, name).pad_token == getattr(pipe, name).pad_token
    assert again.scheduler.config.prediction_type == "epsilon"


def test_a_single_file_says_what_its_prediction_is(
    narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests import narrow_sdxl

    pipe, *_, configuration = narrow
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = narrow_sdxl.single_file(pipe, tmp_path / "v.safetensors", marks)
    assert single_file.read(file) == single_file.Checkpoint("v_prediction", True, False, True)
    monkeypatch.setattr(single_file, "CONFIGURATION", configuration)
    config = own_vae(file).load("cpu").scheduler.config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)


def test_playground_in_a_single_file(narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tests import narrow_sdxl

    pipe, *_, configuration = narrow
    marks = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    file = narrow_sdxl.single_file(pipe, tmp_path / "playground.safetensors", marks)
    monkeypatch.setattr(single_file, "CONFIGURATION", configuration)
    loaded = resolve(str(file)).load("cpu")  # its VAE is not SDXL's: nothing is put in its place
    assert type(loaded.scheduler).__name__ == "EDMDPMSolverMultistepScheduler"
    assert loaded.vae.config.scaling_factor == 0.5
    assert len(loaded.vae.config.latents_mean) == len(loaded.vae.config.latents_std) == 4


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (single_file.UNET, "holds no UNet"),
        (single_file.TEXT[0], "holds no first text encoder"),
        (single_file.TEXT[1], "holds no second text encoder"),
        (f"{single_file.UNET}middle_block.1.transformer_blocks.9", "its middle block has 9 transformer layers"),
        (single_file.VAE, "holds no VAE, and the one to use in its place"),
    ],
)
def test_half_a_single_file(
    narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, sentence: str
) -> None:
    from tests import narrow_sdxl

    file = narrow_sdxl.single_file(narrow[0], tmp_path / "half.safetensors", without=without)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LabError, match=sentence):
        resolve(str(file)).load("cpu")


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", "a Stable Diffusion 1 checkpoint"),
        ("cond_stage_model.model.ln_final.weight", "a Stable Diffusion 2 checkpoint"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX checkpoint"),
        ("conditioner.embedders.0.model.positional_embedding", "refiner"),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", r"an adapter \(LoRA\)"),
        ("decoder.up.0.block.0.conv1.weight", "a VAE alone"),
        ("something.else", "holds no UNet"),
    ],
)
def test_single_files_that_are_something_else(tmp_path: Path, key: str, sentence: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({key: torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(LabError, match=sentence):
        resolve(str(tmp_path / "other.safetensors")).load("cpu")


def test_an_inpainting_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({f"{single_file.UNET}input_blocks.0.0.weight": torch.zeros(1, 9, 1, 1)}, tmp_path / "x.safetensors")
    with pytest.raises(LabError, match=r"'x\.safetensors' is an inpainting checkpoint"):
        resolve(str(tmp_path / "x.safetensors")).load("cpu")


def test_a_folder_with_fp16_files_only(narrow: Any, tmp_path: Path) -> None:
    import torch

    pipe = narrow[0]
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert list((tmp_path / "half" / "unet").glob("*.fp16.safetensors"))
    again = own_vae(tmp_path / "half").load("cpu", torch.float16)
    assert again.unet.dtype == torch.float16
    same(pipe, again)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline: the lab loads"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "is a StableDiffusionXLInpaintPipeline"),
        ({"unet": ["my_unet", "MyUNet"]}, "brings code of its own"),
        ({"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ],
)
def test_folders_that_are_something_else(narrow: Any, tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    index = json.loads((narrow[1] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(LabError, match=sentence):
        resolve(str(tmp_path)).load("cpu")


# -- the VAE ----------------------------------------------------------------------------------------------
def test_the_fixed_vae_takes_the_place_of_sdxls_own(
    narrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers import AutoencoderKL

    from lab.bases import _sdxl

    pipe, folder, *_ = narrow
    fixed = AutoencoderKL.from_config(dict(pipe.vae.config) | {"force_upcast": False})
    fixed.save_pretrained(tmp_path / "fixed")
    row = dataclasses.replace(resolve(str(folder)), vae=str(tmp_path / "fixed"))
    own = folder / "vae" / "config.json"
    assert not _sdxl._overflows(own)  # the narrow one is not SDXL's
    same(pipe, row.load("cpu", torch.float32))
    row.forget()
    assert _sdxl._overflows(single_file.CONFIGURATION / "vae" / "config.json")
    assert not _sdxl._overflows(ASSETS / "tiny-sdxl" / "vae" / "config.json")
    monkeypatch.setattr(_sdxl, "_overflows", lambda _: True)
    same(row.load("cpu", torch.float32), type("", (), {"vae": fixed}), ("vae",))


def test_without_the_fixed_vae_the_bases_own_is_used(
    narrow: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lab.bases import _sdxl

    pipe, folder, *_ = narrow
    monkeypatch.setattr(_sdxl, "_overflows", lambda _: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = dataclasses.replace(resolve(str(folder)), vae="owner/no-such-vae")
    same(pipe, base.load("cpu"))
    assert "The base's own VAE is used, in fp32: 'owner/no-such-vae' is not on this machine" in capfd.readouterr().err


# -- from the Hub -----------------------------------------------------------------------------------------
FROM_THE_HUB = """
import sys, torch
from lab.bases import resolve
told = []
pipe = resolve("owner/fine-tune").load("cpu", torch.float32, lambda *numbers: told.append(numbers))
assert told[0][0] == 0 and told[-1][0] == told[-1][1] > 0, told
print(sum(float(p.double().sum()) for p in pipe.unet.parameters()))
"""


def test_from_the_hub_in_fp16(narrow: Any, tmp_path: Path) -> None:
    """A fine-tune by its id: its fp16 files are fetched, and nothing that loading does not need."""
    from tests.hub_server import Hub, serving

    pipe, folder, *_ = narrow
    shutil.copytree(folder, tmp_path / "model")
    pipe.save_pretrained(tmp_path / "model", variant="fp16")
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    with serving(Hub({"owner/fine-tune": tmp_path / "model"})) as hub:
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB],
            env=env | {"HF_ENDPOINT": hub.url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    weights = [file for file in hub.sent if file.endswith(".safetensors")]
    assert len(weights) == 4
    assert all(".fp16." in file for file in weights)
    assert float(done.stdout) == pytest.approx(sum(float(p.double().sum()) for p in pipe.unet.parameters()), rel=1e-6)
