"""Adapters that somebody already has as columns of a comparison: "my old LoRA" beside the new ones, untrained.

A column is an adapter file of any layout that `lab.adapter_files` opens. It lies among the comparison's inputs as
`adapters/<name>/`, and is drawn and scored like every method: same base, prompts and seeds.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError

if TYPE_CHECKING:
    from lab.adapter_files import AdapterFile
    from lab.bases import Base

MOST = 8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,47}")


def named(titles: Iterable[str]) -> list[str]:
    """Names of columns from files' names: letters, digits, - and _; none twice, and none a method's."""
    from lab.methods import METHODS

    found: list[str] = []
    for title in titles:
        stem = re.sub(r"\.(safetensors|zip)$", "", title, flags=re.IGNORECASE)
        plain = re.sub(r"[^A-Za-z0-9_.+]+", "-", stem).strip("-_.+")[:40].strip("-_.+") or "adapter"
        name, number = plain, 2
        while name.lower() in {"base", *(m.lower() for m in METHODS.ids()), *(f.lower() for f in found)}:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found


def checked(value: Any) -> list[str]:
    """A spec's columns. Raises LabError on names that could not be a folder's, or are a method's."""
    from lab.methods import METHODS

    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise LabError(f"The adapters must be a list of names, got {value!r}.")
    if len(value) > MOST:
        raise LabError(f"At most {MOST} adapters can stand beside the methods, got {len(value)}.")
    for name in value:
        if not _NAME.fullmatch(name) or ".." in name:
            raise LabError(f"'{name[:60]}' cannot be an adapter's name: use letters, digits, - and _.")
        if name == "base" or name in METHODS:
            raise LabError(f"'{name}' is a method's name: call the adapter something else.")
    if len(set(value)) < len(value):
        raise LabError(f"The adapters must have different names, got {', '.join(value)}.")
    return list(value)


def of_files(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Column name → file or folder, for the paths that the command line was given. Raises LabError on any that is no
    adapter."""
    from lab.adapter_files import check_file, refuse_pickle

    found = [Path(path) for path in paths]
    for path in found:
        if not path.exists():
            raise LabError(f"There is no adapter '{path}': give a .safetensors file, a PEFT folder, or a zip of one.")
        refuse_pickle(path.name, f"'{path.name}'")
        if path.is_file() and path.suffix.lower() != ".zip":
            check_file(path)
    # A run's adapter lies in a folder of that name: it is called after the run.
    titles = [path.resolve().parent.name if path.is_dir() and path.name == "adapter" else path.name for path in found]
    return dict(zip(checked(named(titles)), found, strict=True))


def inputs(columns: Mapping[str, Path]) -> dict[str, Path]:
    """The columns' files by their names among a comparison's inputs, as `Store.submit` takes them."""
    from lab.adapter_files import CONFIG, WEIGHTS

    found = {}
    for name, path in columns.items():
        for file in (WEIGHTS, CONFIG):
            source = path / file if path.is_dir() else path
            if source.is_file() and (path.is_dir() or file == WEIGHTS):
                found[f"adapters/{name}/{file}"] = source
    return found


def keep(columns: Mapping[str, Path], folder: Path) -> None:
    """Copy the adapters into the folder of a comparison's inputs. Raises LabError when one is none, or for want of room."""
    from lab.adapter_files import CONFIG, WEIGHTS, check_file, unpack
    from lab.jobs import disk

    try:
        for name, path in columns.items():
            own = folder / "adapters" / name
            own.mkdir(parents=True)
            if path.suffix.lower() == ".zip" and path.is_file():
                unpack(path, own, path.name)
            for file, source in inputs({name: path} if not (own / WEIGHTS).exists() else {}).items():
                shutil.copyfile(source, folder / file)
            check_file(own / WEIGHTS, f"{name}.safetensors", configured=(own / CONFIG).is_file())
    except BaseException as error:
        shutil.rmtree(folder / "adapters", ignore_errors=True)
        if disk.is_full(error):
            raise LabError("The disk is full: the adapters could not be kept; make room and try again.") from error
        raise


# -- drawing ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def laid(base: Base, pipe: Any, folder: Path, name: str) -> Generator[AdapterFile]:
    """The column's adapter, from the folder of the inputs, on the base's pipeline, whose weights are not touched. Raises
    LabError when it does not fit."""
    from lab import adapter_files

    file = adapter_files.read(folder / "adapters" / name, base, name=name)
    handles = []
    try:
        for layer, update in file.updates.items():
            hook = _Added(update)
            handles.append(_module(pipe, layer, name).register_forward_hook(hook))
        yield file
    finally:
        for handle in handles:
            handle.remove()


def _module(pipe: Any, layer: str, name: str) -> Any:
    part, _, inner = layer.partition(".")
    if part not in ("text_encoder", "text_encoder_2"):
        part, inner = "unet", layer
    modules = getattr(pipe, part)
    for path in (inner, inner.removeprefix("text_model.")):  # transformers 5.6 took it out of the first encoder's names
        with contextlib.suppress(AttributeError):
            return modules.get_submodule(path)
    raise LabError(f"'{name}' was made for another base: it changes {layer[:100]}, which this one does not have.")


class _Added:
    """A forward hook that adds ΔW·x to a linear or convolution layer's output: by its factors where it has some, so that
    it is as exact as a trained adapter, else by ΔW itself."""

    def __init__(self, update: Any) -> None:
        pair = update.factors()
        self.tensors = [update.dense().float()] if pair is None else [pair[1].float(), pair[0].float()]

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        import torch
        from torch.nn import functional

        x = inputs[0]
        self.tensors = [tensor.to(x.device) for tensor in self.tensors]  # an encoder comes and goes
        y = x.float()
        if isinstance(module, torch.nn.Conv2d):
            first, *more = self.tensors
            kernel = first.reshape(first.shape[0], module.in_channels, *module.kernel_size)
            y = functional.conv2d(y, kernel, None, module.stride, module.padding, module.dilation)
            for tensor in more:
                y = functional.conv2d(y, tensor[:, :, None, None])
        else:
            for tensor in self.tensors:
                y = functional.linear(y, tensor.flatten(1))
        return output + y.to(output.dtype)
