"""Loading SDXL pipelines: Hub id, diffusers folder, or single file; safetensors only, and no code but diffusers' own."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lab import device as devices
from lab import hub, single_file
from lab.bases import _kept
from lab.errors import LabError
from lab.tasks import Cancelled

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from lab.bases import Base

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def load(
    base: Base, device: Any = None, dtype: Any = None, told: Callable[[int, int], None] | None = None
) -> StableDiffusionXLPipeline:
    """The base's pipeline, weights frozen. The last one loaded is kept: runs in one process share it.

    device: default `lab.device.pick()`; dtype of the weights: default `lab.device.weights_dtype(device)`;
    told(done, all): bytes of a download, a few times a second.
    """
    device = torch.device(device) if device is not None else devices.pick()
    dtype = dtype or devices.weights_dtype(device)
    key = ("sdxl", base.source, base.variant, base.vae, device, dtype, _kept.stamp(base.source))

    def read() -> Any:
        with _plain_errors(base.source), _quiet():
            pipe: Any = _read(base, dtype, told)  # diffusers' annotations leave out what it has
            for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
                part.requires_grad_(False).eval()
            pipe.set_progress_bar_config(disable=True)
            return pipe.to(device)

    return _kept.lend(key, read)


def loaded(base: Base) -> Any:
    """The pipeline that is kept, if it is this base's."""
    return _kept.find(lambda key: key[:4] == ("sdxl", base.source, base.variant, base.vae))


forget = _kept.forget


# -- reading -------------------------------------------------------------------------------------------
def _read(base: Base, dtype: torch.dtype, told: Any) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    path = Path(base.source)
    if path.suffix == ".safetensors":
        found = single_file.read(path)  # a broken file is told before a VAE is fetched for it
        given = _fixed_vae(base, dtype, told) if base.vae and not found.edm else {}
        if not found.has_vae and not given:
            raise LabError(f"'{path.name}' holds no VAE, and the one to use in its place, {base.vae}, cannot be had.")
        with tempfile.TemporaryDirectory() as folder:
            config = str(single_file.write_configuration(found, Path(folder)))
            return StableDiffusionXLPipeline.from_single_file(
                str(path), config=config, torch_dtype=dtype, local_files_only=True, **given
            )
    folder, given = _folder(base, dtype, told)
    files = _files(folder)
    weights = [file for file in hub.component_files(files, "unet", base.variant) if file.endswith(".safetensors")]
    return StableDiffusionXLPipeline.from_pretrained(
        folder,
        torch_dtype=dtype,
        variant=hub.variant_of(weights[0]) if weights else None,
        use_safetensors=True,
        local_files_only=True,
        **dict.fromkeys(hub.UNUSED[:2]),
        **given,
    )


def _folder(base: Base, dtype: torch.dtype, told: Any) -> tuple[Path, dict[str, Any]]:
    """The diffusers folder, and the VAE to use in place of its own, if any."""

    def without(*parts: str) -> Callable[[Path, list[str]], list[str]]:
        return lambda folder, files: hub.pipeline_files(files, checked(folder, name), base.variant, parts, name)

    path, name = Path(base.source), _called(base.source)
    local = path.is_dir()
    folder = path if local else hub.fetch(base.source, without("vae") if base.vae else without(), told)
    if local:
        without()(path, _files(path))  # what it lacks is told here
    given = _fixed_vae(base, dtype, told) if base.vae and _overflows(folder / "vae" / "config.json") else {}
    if not given and not local:
        folder = hub.fetch(base.source, without(), told)
    return folder, given


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file())


def checked(folder: Path, name: str) -> dict[str, Any]:
    """What the folder's model_index.json says. Raises LabError unless that is a whole SDXL text-to-image pipeline of
    diffusers' and transformers' own classes: components with code of their own are not loaded."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict):
        raise LabError(
            f"'{name}' has no model_index.json that can be read: the lab loads Stable Diffusion XL in diffusers' layout, "
            "or as a single .safetensors file."
        )
    kind = str(index.get("_class_name", "")) or "pipeline of no kind"
    if kind not in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"):
        raise LabError(f"'{name}' is a {kind[:80]}: the lab loads bases of kind StableDiffusionXLPipeline.")
    for part, (library, _) in ((k, v) for k, v in index.items() if isinstance(v, list) and len(v) == 2):
        if library not in (None, "diffusers", "transformers", "stable_diffusion"):
            raise LabError(f"'{name}' brings code of its own (its {part[:40]}), which the lab does not run.")
    for part in PARTS:
        if not isinstance(index.get(part), list) or not index[part][0]:
            raise LabError(f"'{name}' is not a whole diffusers folder: its model_index.json names no {part}.")
    return index


# -- the VAE -------------------------------------------------------------------------------------------
def _overflows(config: Path) -> bool:
    """Whether this is SDXL's own VAE, whose activations leave fp16's range and which the fixed one replaces."""
    try:
        vae = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    own = vae.get("latents_mean") is None and abs(vae.get("scaling_factor", 0) - 0.13025) < 1e-6
    return own and vae.get("force_upcast", True) and vae.get("block_out_channels") == [128, 256, 512, 512]


def _fixed_vae(base: Base, dtype: torch.dtype, told: Any) -> dict[str, Any]:
    """{"vae": the VAE that does not overflow in fp16}; {} where it cannot be had: the base's own then works in fp32."""
    from diffusers import AutoencoderKL

    def words_and_weights(_folder: Path, files: list[str]) -> list[str]:
        return [f for f in files if f in ("config.json", "diffusion_pytorch_model.safetensors")]

    source = str(base.vae)
    try:
        folder = Path(source) if Path(source).is_dir() else hub.fetch(source, words_and_weights, told)
        with _plain_errors(source):
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except LabError as error:
        print(f"The base's own VAE is used, in fp32: {error}", file=sys.stderr, flush=True)
        return {}
    return {"vae": vae}


# -- errors --------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _plain_errors(source: str) -> Any:
    """Loading fails in many ways, deep inside three libraries; each becomes one sentence."""
    try:
        yield
    except (Cancelled, LabError):
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise LabError(
            f"The GPU's memory does not hold '{_called(source)}': close what else uses it, or set LAB_DEVICE=cpu."
        ) from error
    except Exception as error:  # OSError, ValueError, KeyError, TypeError, safetensors' and the Hub's own
        raise LabError(_sentence(source, error)) from error


def _called(source: str) -> str:
    """The base in a sentence that strangers may read: a Hub id, or a file's or folder's name without its path."""
    return source if hub.is_id(source) and not Path(source).exists() else Path(source).name


def _sentence(source: str, error: Exception) -> str:
    told = hub.known_sentence(source, error)
    text = hub.first_line(error).replace(str(Path(source).parent) + "/", "")
    return told or f"'{_called(source)}' could not be loaded as a Stable Diffusion XL pipeline: {text}"


@contextlib.contextmanager
def _quiet() -> Any:
    """Without the loaders' own progress bars and deprecation notes: runs report their own progress."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
