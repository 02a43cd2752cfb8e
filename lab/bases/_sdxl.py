"""Loading SDXL pipelines: Hub id, diffusers folder, or single file; safetensors only."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from lab import device as devices
from lab.errors import LabError

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

    from lab.bases import Base


def load(base: Base, device: Any = None, dtype: Any = None) -> StableDiffusionXLPipeline:
    """The base's pipeline, weights frozen. The last one loaded is kept: runs in one process share it.

    device: default `lab.device.pick()`; dtype of the weights: default `lab.device.weights_dtype(device)`.
    """
    device = torch.device(device) if device is not None else devices.pick()
    return _load(base.source, base.variant, base.vae, device, dtype or devices.weights_dtype(device))


@functools.lru_cache(maxsize=1)
def _load(
    source: str, variant: str | None, vae: str | None, device: torch.device, dtype: torch.dtype
) -> StableDiffusionXLPipeline:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    if Path(source).suffix == ".safetensors":
        with _plain_errors(source), safe_open(source, "pt"):
            pass  # a broken file is told before the VAE is fetched for it
    parts: dict[str, Any] = {}
    if vae:
        with _plain_errors(vae), _quiet():
            parts["vae"] = AutoencoderKL.from_pretrained(vae, torch_dtype=dtype, use_safetensors=True)
    with _plain_errors(source), _quiet():
        if Path(source).suffix == ".safetensors":
            pipe = StableDiffusionXLPipeline.from_single_file(source, torch_dtype=dtype, **parts)
        else:
            pipe = StableDiffusionXLPipeline.from_pretrained(
                source, torch_dtype=dtype, variant=variant, use_safetensors=True, **parts
            )
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        if part is not None:
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def forget() -> None:
    """Let go of the pipeline that is kept."""
    _load.cache_clear()


@contextlib.contextmanager
def _plain_errors(source: str) -> Any:
    """Loading fails in many ways, deep inside three libraries; each becomes one sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise LabError(
            f"The GPU's memory does not hold '{source}': close what else uses it, or set LAB_DEVICE=cpu."
        ) from error
    except Exception as error:  # OSError, ValueError, KeyError, TypeError, safetensors' and the Hub's own
        raise LabError(_sentence(source, error)) from error


# What the libraries say, in words only, when the Hub cannot be reached.
UNREACHABLE = (
    "not fully cached",
    "outgoing traffic",
    "couldn't connect",
    "connection error",
    "name or service",
    "offline",
)


def _sentence(source: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"'{source}' is gated: accept its terms on huggingface.co and log in with `hf auth login`."
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"There is no model '{source}' on the Hugging Face Hub, or it is private."
    words = " ".join(str(e).lower() for e in chain)
    missing = any(isinstance(e, LocalEntryNotFoundError | ConnectionError) for e in chain)
    if not Path(source).exists() and (missing or any(phrase in words for phrase in UNREACHABLE)):
        return (
            f"'{source}' is not on this machine yet and the Hugging Face Hub cannot be reached: "
            "check the network, or give a local folder."
        )
    return f"'{source}' could not be loaded as a Stable Diffusion XL pipeline: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


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
