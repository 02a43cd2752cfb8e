"""The Hub's models: what is here, what is fetched and how that is told, and every way it can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from lab import hub
from lab.errors import LabError
from lab.tasks import Cancelled
from tests.hub_server import Hub, serving

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": [None, None],
}


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Serves a model as the Hub would, to an empty cache: a function of what the hub is to be like."""
    from huggingface_hub import constants

    made, hubs = [], []

    def make(models: dict[str, Path], **options: Any) -> Hub:
        context = serving(Hub(models, **options))
        served = context.__enter__()
        made.append(context)
        hubs.append(served)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return served

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield make
    for served in hubs:
        served.slow = 0.0
    for thread in threading.enumerate():  # of a cancelled download: the next test's requests would share its session
        if thread.name == "download":
            thread.join(30)
    for context in made:
        context.__exit__(None, None, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, size in (
        ("unet/diffusion_pytorch_model.safetensors", 900_000),
        ("unet/diffusion_pytorch_model.fp16.safetensors", 400_000),
        ("unet/diffusion_pytorch_model.bin", 900_000),
        ("vae/diffusion_pytorch_model.safetensors", 200_000),
        ("sd_xl_base_1.0.safetensors", 2_000_000),
        ("samples.png", 1000),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    for name in ("unet/config.json", "vae/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def choose(folder: Path, files: list[str]) -> list[str]:
    return hub.pipeline_files(files, json.loads((folder / "model_index.json").read_text()), "fp16", name="owner/model")


WANTED = {
    "model_index.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
}


def test_what_is_needed_is_fetched_once(online: Any, model: Path) -> None:
    served = online({"owner/model": model})
    told: list[tuple[int, int]] = []
    folder = hub.fetch("owner/model", choose, lambda done, total: told.append((done, total)))
    fetched = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert fetched == WANTED
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").read_bytes() == (
        model / "unet/diffusion_pytorch_model.fp16.safetensors"
    ).read_bytes()
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == sum((model / name).stat().st_size for name in WANTED - {"model_index.json"})
    count = len(served.sent)
    assert hub.fetch("owner/model", choose) == folder
    assert len(served.sent) == count
    (found,) = hub.cached()
    assert (found.repo, found.pipeline) == ("owner/model", "StableDiffusionXLPipeline")
    assert found.bytes == sum({p.resolve(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}.values())


def test_what_is_here_needs_no_hub(online: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online({"owner/model": model})
    folder = hub.fetch("owner/model", choose)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.fetch("owner/model", choose) == folder
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()  # an unfinished download
    with pytest.raises(LabError, match="Hub cannot be reached: check the network"):
        hub.fetch("owner/model", choose)


def test_an_interrupted_download_is_finished(online: Any, model: Path) -> None:
    served = online({"owner/model": model})
    folder = hub.fetch("owner/model", choose)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    served.sent.clear()
    hub.fetch("owner/model", choose)
    assert served.sent == ["owner/model/vae/diffusion_pytorch_model.safetensors"]
    assert weights.is_file()


def test_a_cancelled_download_is_left_at_once(online: Any, model: Path) -> None:
    online({"owner/model": model}, slow=20.0)

    def told(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        hub.fetch("owner/model", choose, told)


def test_gated_missing_and_wrong_names(online: Any, model: Path) -> None:
    online({"owner/gated": model}, gated=("owner/gated",))
    with pytest.raises(LabError, match=r"'owner/gated' is gated: accept its terms on huggingface\.co"):
        hub.fetch("owner/gated", choose)
    with pytest.raises(LabError, match="There is no model 'owner/none' on the Hugging Face Hub, or it is private"):
        hub.fetch("owner/none", choose)
    for name in (
        "../etc/passwd",
        "owner",
        "a/b/c",
        "owner/..",
        "-x/y",
        "owner/na me",
        "owner/x--y",
        "owner/x.git",
        "owner/" + "x" * 99,
    ):
        assert not hub.is_id(name)
        with pytest.raises(LabError, match="is no model's id"):
            hub.fetch(name, choose)


def test_no_network_and_offline_mode(online: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LabError, match="is not on this machine yet and the Hugging Face Hub cannot be reached"):
        hub.fetch("owner/model", choose)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LabError, match="is not on this machine yet and the Hugging Face Hub cannot be reached"):
        hub.fetch("owner/model", choose)


def test_no_room(online: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = online({"owner/model": model})
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 300 * 2**20, 300 * 2**20))
    monkeypatch.setenv("LAB_MIN_FREE_MB", "300")
    with pytest.raises(
        LabError, match=r"'owner/model' needs 0\.\d+ GB more on the disk of the model cache, which has 0\.0 GB"
    ):
        hub.fetch("owner/model", choose)
    assert served.sent == ["owner/model/model_index.json"]


def test_pickles_are_refused_before_they_come(online: Any, model: Path) -> None:
    for file in model.glob("unet/*.safetensors"):
        file.unlink()
    served = online({"owner/model": model})
    with pytest.raises(LabError, match="'owner/model' has its unet only as a pickle"):
        hub.fetch("owner/model", choose)
    assert not any(file.endswith(".bin") for file in served.sent)


def test_variants() -> None:
    both = ["u/config.json", "u/m.safetensors", "u/m.fp16.safetensors", "u/m.bin", "u/deep/m.safetensors"]
    assert hub.component_files(both, "u", "fp16") == ["u/config.json", "u/m.fp16.safetensors"]
    assert hub.component_files(both, "u", None) == ["u/config.json", "u/m.safetensors"]
    assert hub.component_files(["u/m.fp16.safetensors"], "u", None) == ["u/m.fp16.safetensors"]
    assert hub.component_files(["u/m.safetensors"], "u", "fp16") == ["u/m.safetensors"]
    assert hub.component_files(both, "u", "fp16", weights=False) == ["u/config.json"]
    shards = [f"u/m.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert hub.component_files([*shards, "u/m.safetensors"], "u", "fp16") == shards


@pytest.mark.parametrize(("there", "whole"), [(["1", "2"], True), (["1"], False), ([], False)])
def test_shards(tmp_path: Path, there: list[str], whole: bool) -> None:
    (tmp_path / "u").mkdir()
    for number in there:
        (tmp_path / "u" / f"m-0000{number}-of-00002.safetensors").write_bytes(b"")
    assert hub.complete(tmp_path, lambda _, files: files) == whole


def test_words() -> None:
    assert hub.phase("Stable Diffusion XL 1.0", int(1.2e9), int(6.9e9)) == (
        "downloading Stable Diffusion XL 1.0 … 1.2 of 6.9 GB, 17 %"
    )
    assert hub.phase("small", int(2.5e6), int(5e6)) == "downloading small … 2.5 of 5.0 MB, 50 %"
    assert hub.phase("none", 0, 0).endswith("0.0 of 0.0 MB, 0 %")
    assert len(hub.phase("x" * 100, 99 * 10**9, 99 * 10**9)) <= 60
    full = OSError(28, "No space left on device")
    assert "The disk became full while 'owner/model' was fetched" in hub.sentence("owner/model", full)


def test_no_torch() -> None:
    code = "import sys; from lab import hub; hub.cached(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
