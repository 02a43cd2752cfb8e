"""Models on the Hugging Face Hub: which are on this machine, and fetching one with progress. Imports no torch.

What is here is used as it is and nothing is asked of the Hub: a base does not change between two runs that are compared.
`hf download OWNER/NAME` fetches a newer revision.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.tasks import Cancelled

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
POLL_SECONDS = 0.25
Told = Callable[[int, int], None]  # bytes that have come, bytes in all; may raise, which leaves the download


def is_id(name: str) -> bool:
    """Whether this can be the id of a model on the Hub: "owner/name" in the letters that it allows."""
    return bool(ID.fullmatch(name)) and ".." not in name and "--" not in name and not name.endswith((".git", "."))


# -- what is here --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Cached:
    """A model in the Hub's cache: its id, its files' size, and the class that its model_index.json names, if any."""

    repo: str
    bytes: int
    pipeline: str


def cached() -> list[Cached]:
    """Models in the Hub's cache on this machine, the largest first; none where there is no cache."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in repos:
        if repo.repo_type == "model":
            folders = [revision.snapshot_path for revision in repo.revisions]
            classes = (_json(folder / "model_index.json").get("_class_name") for folder in folders)
            found.append(Cached(repo.repo_id, repo.size_on_disk, next((str(c) for c in classes if c), "")))
    return sorted(found, key=lambda c: (-c.bytes, c.repo))


def snapshot(repo: str) -> Path | None:
    """The folder of the revision that is here, whole or not; None where nothing of it is."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    path = folder / "snapshots" / commit
    return path if re.fullmatch(r"[0-9a-f]{4,64}", commit) and path.is_dir() else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- which files ---------------------------------------------------------------------------------------
WORDS = ("*.json", "*.txt", "*.model")  # configurations and tokenizers
UNUSED = ("image_encoder", "feature_extractor", "safety_checker")  # of IP adapters and filters
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def component_files(
    files: Sequence[str], part: str, variant: str | None, weights: bool = True, name: str = "the model"
) -> list[str]:
    """Files of one component (a folder) that loading needs: its words, and its safetensors weights in the variant asked
    for where it has them, else in the plain one, else in whichever one there is.

    Raises LabError when it has none, or only pickles. `name` is how the sentence calls the model.
    """
    inside = [file for file in files if file.startswith(f"{part}/") and file.count("/") == 1]
    words = [file for file in inside if any(fnmatch.fnmatch(file, pattern) for pattern in WORDS)]
    every = [file for file in inside if file.endswith(".safetensors")]
    if weights and not every and any(file.endswith(PICKLES) for file in inside):
        raise LabError(
            f"'{name}' has its {part} only as a pickle, which can run any code when it is opened: "
            "choose a model with .safetensors files."
        )
    if not inside or (weights and not every and f"{part}/config.json" in inside):  # tokenizers have no config.json
        raise LabError(f"'{name}' is not a whole model: there is no .safetensors file of its {part}.")
    kinds = {variant_of(file) for file in every}
    kind = next((k for k in (variant, None) if k in kinds), min(kinds, key=str, default=None))
    return words + [file for file in every if weights and variant_of(file) == kind]


def variant_of(file: str) -> str | None:
    """ "fp16" for diffusion_pytorch_model.fp16.safetensors and its shards; None for a plain name."""
    match = re.search(r"\.(fp16|bf16|fp32|[a-z0-9_]+)(-\d{5}-of-\d{5})?\.safetensors$", Path(file).name)
    return match[1] if match else None


def pipeline_files(
    files: Sequence[str],
    index: dict[str, Any],
    variant: str | None,
    without: Sequence[str] = (),
    name: str = "the model",
) -> list[str]:
    """Files of a diffusers pipeline that loading needs. `without`: components whose weights come from elsewhere.
    Raises LabError, see `component_files`."""
    wanted = ["model_index.json"]
    for part, kind in index.items():
        if isinstance(kind, list) and len(kind) == 2 and kind[0] and part not in UNUSED:
            wanted += component_files(files, part, variant, part not in without, name)
    return list(dict.fromkeys(wanted))


# -- fetching ------------------------------------------------------------------------------------------
def fetch(repo: str, choose: Callable[[Path, list[str]], list[str]], told: Told | None = None) -> Path:
    """The folder with the files that `choose` wants, fetched where they are not here yet.

    choose: takes the folder and the names of the files there are (on the Hub, or, without it, here) and returns those
    wanted; `model_index.json` lies in the folder by then if the model has one. Raises LabError, one sentence: no such
    model, gated, no network, no room on the disk.
    """
    if not is_id(repo):
        raise LabError(f"'{repo[:100]}' is no model's id on the Hugging Face Hub: give it as owner/name.")
    here = snapshot(repo)
    if here is not None and complete(here, choose):
        return here
    try:
        with _quiet():
            return _fetch(repo, choose, told)
    except (Cancelled, LabError):
        raise
    except Exception as error:
        raise LabError(sentence(repo, error)) from error


def complete(folder: Path, choose: Callable[[Path, list[str]], list[str]]) -> bool:
    """Whether the folder holds what `choose` wants, weights and all their shards among it."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    try:
        wanted = choose(folder, files)
    except LabError:
        return False
    if not set(wanted) <= set(files) or not any(file.endswith(".safetensors") for file in wanted):
        return False
    shards = [m for file in wanted if (m := re.search(r"^(.*)-\d{5}-of-(\d{5})\.safetensors$", file))]
    return all(sum(other[1] == m[1] for other in shards) == int(m[2]) for m in shards)


def _fetch(repo: str, choose: Callable[[Path, list[str]], list[str]], told: Told | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    info = HfApi().model_info(repo, files_metadata=True)
    sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    folder = Path(snapshot_download(repo, revision="main", allow_patterns=["model_index.json"], max_workers=1))
    wanted = choose(folder, list(sizes))
    if not any(file.endswith(".safetensors") for file in wanted):
        raise LabError(
            f"'{repo}' holds no model in safetensors files that the lab can load: give a Stable Diffusion XL pipeline "
            "in diffusers' layout, or download its single .safetensors file and name that."
        )
    missing = [f for f in wanted if not isinstance(try_to_load_from_cache(repo, f, revision=info.sha), str)]
    total = sum(sizes[file] for file in missing)
    check_room(folder, total, repo)

    def download() -> None:
        # Weights last: where they are, the small files that belong to them are too.
        for part in ([f for f in wanted if not f.endswith(".safetensors")], wanted):
            snapshot_download(repo, revision="main", allow_patterns=part, max_workers=4)

    _while(
        download,
        folder.parents[1] / "blobs",
        total,
        told,
    )
    return snapshot(repo) or folder


def check_room(folder: Path, needed: int, repo: str) -> None:
    """Raise LabError unless the disk of this folder holds so many bytes more, with a little left over."""
    from lab.jobs.limits import Limits

    free = shutil.disk_usage(folder).free - Limits.from_environment().free_mb * 2**20
    if needed > free:
        raise LabError(
            f"'{repo}' needs {gigabytes(needed)} GB more on the disk of the model cache, which has "
            f"{gigabytes(max(0, free))} GB to spare: make room, or set HF_HOME to a folder on another disk."
        )


def phase(name: str, done: int, total: int) -> str:
    """What a run that waits for a download is doing, in words: at most 60 letters, what a run's phase holds."""
    unit, size = ("GB", 10**9) if total >= 10**9 else ("MB", 10**6)
    share = 100 * done // max(1, total)
    return f"downloading {name[:23]} … {done / size:.1f} of {total / size:.1f} {unit}, {share} %"


def gigabytes(count: float) -> str:
    """Bytes in GB (10⁹) with one decimal; two below 0.1."""
    return f"{count / 1e9:.1f}" if count >= 0.95e8 or not count else f"{max(count / 1e9, 0.01):.2f}"


def _while(download: Callable[[], Any], blobs: Path, total: int, told: Told | None) -> None:
    """Download in a thread, telling here how far it is. When `told` raises, the thread is left to end with the process."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            download()
        except BaseException as error:
            failed.append(error)

    before = _bytes(blobs)
    thread = threading.Thread(target=work, name="download", daemon=True)
    thread.start()
    while thread.is_alive():
        if told is not None:
            told(min(total, max(0, _bytes(blobs) - before)), total)
        thread.join(POLL_SECONDS)
    if failed:
        raise failed[0]
    if told is not None:
        told(total, total)


def _bytes(folder: Path) -> int:
    """What the files in a folder take up, half-written ones as far as they are written."""
    total = 0
    try:
        for entry in os.scandir(folder):
            stat = entry.stat()
            blocks = getattr(stat, "st_blocks", None)  # a file may be given its whole length before it is written
            total += stat.st_size if blocks is None else min(stat.st_size, blocks * 512)
    except OSError:  # files vanish when they are whole, and the folder is not there before the first
        pass
    return total


class _quiet:  # noqa: N801 - used as a context manager
    """Without the Hub's own progress bars, whose place the run's progress takes."""

    def __enter__(self) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        self.was = are_progress_bars_disabled()
        if not self.was:
            disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils import enable_progress_bars

        if not self.was:
            enable_progress_bars()


# -- what went wrong -----------------------------------------------------------------------------------
# What the libraries say, in words only, when the Hub cannot be reached.
UNREACHABLE = (
    "not fully cached",
    "outgoing traffic",
    "couldn't connect",
    "connection error",
    "name or service",
    "connection refused",
    "timed out",
    "offline",
)


def sentence(source: str, error: BaseException) -> str:
    """What to tell of a failed download, in one sentence."""
    return (
        known_sentence(source, error)
        or f"'{source}' could not be fetched from the Hugging Face Hub: {first_line(error)}"
    )


def known_sentence(source: str, error: BaseException) -> str | None:
    """One sentence for what commonly goes wrong between here and the Hub; None for anything else."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    from lab.jobs import disk

    chain: list[BaseException] = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) and following not in chain:
        chain.append(following)
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"'{source}' is gated: accept its terms on huggingface.co and log in with `hf auth login`."
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        return f"There is no model '{source}' on the Hugging Face Hub, or it is private."
    if disk.is_full(error):
        return (
            f"The disk became full while '{source}' was fetched: make room, or set HF_HOME to a folder on another disk."
        )
    words = " ".join(str(e).lower() for e in chain)
    lost = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    missing = any(isinstance(e, lost) or "Connect" in type(e).__name__ or "Timeout" in type(e).__name__ for e in chain)
    if not Path(source).exists() and (missing or any(phrase in words for phrase in UNREACHABLE)):
        return (
            f"'{source}' is not on this machine yet and the Hugging Face Hub cannot be reached: "
            "check the network, or give a local folder."
        )
    return None


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."
