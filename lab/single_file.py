"""Single-file checkpoints, as ComfyUI and A1111 keep them: what one holds, and the configuration it leaves out.

Such a file is weights alone, under the names of the original (sgm) code. What diffusers needs beside them, configurations
and tokenizers, is taken from `assets/sdxl` and from open_clip's own vocabulary, so that loading one needs no network.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import sgm_unet
from lab.errors import LabError

if TYPE_CHECKING:
    from lab.architectures import Architecture

CONFIGURATION = Path(__file__).resolve().parents[1] / "assets" / "sdxl"
UNET = "model.diffusion_model."
TEXT = ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.")
VAE = "first_stage_model."
# Playground v2.5 (Li et al., arXiv 2402.17245): EDM's schedule and preconditioning, and latents of its own statistics.
PLAYGROUND = {
    "scheduler/scheduler_config.json": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
    },
    "vae/config.json": {
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "scaling_factor": 0.5,
    },
}


@dataclass(frozen=True)
class Checkpoint:
    """What a single file holds, from its header alone.

    prediction: "epsilon" or "v_prediction"; zero_snr: its noise schedule ends in pure noise; edm: Playground v2.5's
    formulation; has_vae: whether a VAE is in it; depths: of its UNet's transformers, which a prune has shortened
    """

    prediction: str
    zero_snr: bool
    edm: bool
    has_vae: bool
    depths: sgm_unet.Depths = sgm_unet.SDXL


def read(path: str | Path) -> Checkpoint:
    """What the file holds. Raises LabError, saying what it is instead, unless that is an SDXL pipeline's weights."""
    shapes, metadata = _header(Path(path))
    name = f"'{Path(path).name}'"
    if (what := _instead(shapes)) is not None:
        raise LabError(f"{name} is {what}: the lab loads whole Stable Diffusion XL checkpoints.")
    for part, prefix in (("UNet", UNET), ("first text encoder", TEXT[0]), ("second text encoder", TEXT[1])):
        if not any(key.startswith(prefix) for key in shapes):
            raise LabError(f"{name} holds no {part}: give a whole Stable Diffusion XL checkpoint.")
    try:
        depths = sgm_unet.depths(key.removeprefix(UNET) for key in shapes if key.startswith(UNET))
        sgm_unet.configuration(depths)
    except LabError as error:
        raise LabError(f"{name} is no Stable Diffusion XL that the lab can load from one file: {error}.") from None
    velocity = "v_pred" in shapes or metadata.get("modelspec.prediction_type", "").lower() in ("v", "v_prediction")
    edm = "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes
    return Checkpoint(
        "v_prediction" if velocity else "epsilon",
        velocity and "ztsnr" in shapes,
        edm,
        any(key.startswith(VAE) for key in shapes),
        depths,
    )


def architecture(path: str | Path) -> Architecture:
    """The UNet's layers: the shipped table where there is one, else laid out anew, which takes seconds.

    Raises LabError as `read` does.
    """
    stat = Path(path).stat()
    return _architecture(Path(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _architecture(path: Path, size: int, changed: int) -> Architecture:
    from lab import architectures

    depths = read(path).depths
    if depths in sgm_unet.SHIPPED:
        return architectures.load(sgm_unet.SHIPPED[depths])
    config = json.loads((CONFIGURATION / "unet" / "config.json").read_text())
    return architectures.from_config(json.dumps(config | sgm_unet.configuration(depths)), path.name)


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name, and the metadata. Raises LabError when the file is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        text = str(error).splitlines()[0].rstrip(".")
        raise LabError(
            f"'{path.name}' could not be loaded: it is damaged, cut off, or no safetensors file ({text})."
        ) from None


def _instead(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What a file that is no SDXL base holds, in words; None where it may be one."""
    if any(key.endswith((".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".hada_w1_a")) for key in shapes):
        return "an adapter (LoRA), not a base model"
    if any(key.startswith("cond_stage_model.model.") for key in shapes):
        return "a Stable Diffusion 2 checkpoint"
    if any(key.startswith("cond_stage_model.") for key in shapes):
        return "a Stable Diffusion 1 checkpoint"
    if any(key.startswith(("double_blocks.", f"{UNET}double_blocks.")) for key in shapes):
        return "a FLUX checkpoint"
    if any(key.startswith(("joint_blocks.", f"{UNET}joint_blocks.")) for key in shapes):
        return "a Stable Diffusion 3 checkpoint"
    if "conditioner.embedders.0.model.positional_embedding" in shapes:
        return "Stable Diffusion XL's refiner"
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    if first is not None and len(first) == 4 and first[1] != 4:
        return "an inpainting checkpoint" if first[1] == 9 else f"a checkpoint whose UNet takes {first[1]} channels"
    if any(key.startswith("decoder.up.") for key in shapes):
        return "a VAE alone"
    return None


# -- the configuration ---------------------------------------------------------------------------------
def write_configuration(checkpoint: Checkpoint, folder: Path) -> Path:
    """A diffusers folder without weights for this file: configurations, and the tokenizers' vocabulary."""
    shutil.copytree(CONFIGURATION, folder, dirs_exist_ok=True)
    changes: dict[str, dict[str, Any]] = dict(PLAYGROUND) if checkpoint.edm else {}
    changes["unet/config.json"] = sgm_unet.configuration(checkpoint.depths)
    if checkpoint.prediction != "epsilon":
        changes["scheduler/scheduler_config.json"] = {
            "prediction_type": checkpoint.prediction,
            "rescale_betas_zero_snr": checkpoint.zero_snr,
            "timestep_spacing": "trailing" if checkpoint.zero_snr else "leading",
        }
    for file, values in changes.items():
        before = {} if "_class_name" in values else json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(before | values, indent=2))
    if checkpoint.edm:
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", PLAYGROUND["scheduler/scheduler_config.json"]["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
    for part in ("tokenizer", "tokenizer_2"):
        _write_vocabulary(folder / part)
    return folder


def _write_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary and merges as transformers reads them, from the file that open_clip ships: 256 bytes, the same
    ending a word, 48,894 merges, and the two special tokens; numbered in this order (open_clip's SimpleTokenizer)."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise LabError("open_clip is not installed, whose vocabulary the tokenizers need: install requirements.txt.")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
