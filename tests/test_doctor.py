"""The doctor: facts of this machine, findings for machines that are not here, and nothing for strangers to learn."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab import doctor, hub, machine
from lab.bases import BASES
from lab.cli import main
from lab.machine import Gpu
from lab.ui import system
from tests.page_server import served

GIB = 2**30


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no cache and no settings of this machine's own."""
    for name in ("LAB_CHECKPOINTS", "LAB_HUB_BASES", "LAB_DEVICE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "_another", lambda: False)
    monkeypatch.setattr(machine, "torch_build", lambda: {"version": "2.14.1+cu130", "cuda": "13.0", "hip": ""})
    system._last.clear()


def told(public: bool = False) -> list[tuple[str, str, str]]:
    return [(f["state"], f["text"], f["do"]) for f in doctor.examine(public)["findings"]]


def said(state: str, words: str) -> bool:
    return any(s == state and words in f"{text} {do}" for s, text, do in told())


# -- facts -----------------------------------------------------------------------------------------------
def test_it_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from lab import doctor; doctor.examine(); sys.exit('torch' in sys.modules)"
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False, timeout=60).returncode == 0


def test_facts_are_this_machines() -> None:
    found = doctor.examine()
    memory, disk = found["memory"], found["disk"]["runs"]
    assert 0 < memory["available_bytes"] <= memory["total_bytes"]
    assert 0 < disk["free_bytes"] <= disk["total_bytes"]
    assert 1 <= found["processor"]["cores"] <= (os.cpu_count() or 1)
    assert found["versions"]["torch"]
    assert {base["id"] for base in found["bases"]} >= {"tiny-sdxl", "sdxl", "ssd-1b", "sdxl-turbo", "playground-v2.5"}
    tiny = next(base for base in found["bases"] if base["id"] == "tiny-sdxl")
    weights = Path(BASES["tiny-sdxl"].source).rglob("*.safetensors")
    assert (tiny["here"], tiny["bytes"]) == (True, sum(file.stat().st_size for file in weights))


def test_torch_is_read_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.undo()
    assert machine.torch_build()["version"] == torch.__version__
    assert machine.torch_build()["cuda"] == (torch.version.cuda or "")


def test_models_in_the_cache_are_listed_with_their_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [
        hub.Cached("stabilityai/stable-diffusion-xl-base-1.0", 7 * 10**9, "StableDiffusionXLPipeline"),
        hub.Cached("owner/fine-tune", 6 * 10**9, "StableDiffusionXLPipeline"),
        hub.Cached("secret/language-model", 10**9, ""),
    ]
    monkeypatch.setattr(hub, "cached", lambda: kept)
    found = doctor.examine()
    assert [(c["repo"], c["bytes"], c["usable"]) for c in found["cached"]] == [
        (kept[0].repo, 7 * 10**9, True),
        (kept[1].repo, 6 * 10**9, True),
        (kept[2].repo, 10**9, False),
    ]
    assert "owner/fine-tune" not in json.dumps(doctor.examine(public=True))
    monkeypatch.setenv("LAB_HUB_BASES", "1")
    page = system.system_html(doctor.examine(public=True))
    assert "owner/fine-tune" in page
    assert "secret" not in page


# -- GPUs ------------------------------------------------------------------------------------------------
SMI = """#!/bin/sh
echo "NVIDIA GeForce RTX 4090, 24564, 23000, 580.82.07, 8.9"
echo "Tesla K80, [N/A], 0, 470.1, 3.7"
"""


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (gpu,) = machine._nvidia()
    assert gpu == Gpu("NVIDIA GeForce RTX 4090", 24564 << 20, 23000 << 20, "580.82.07")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine._nvidia() == []


def test_what_torch_says_of_a_listed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    listed = [Gpu("RTX 4090", 24 * GIB, 23 * GIB, "580.1")]
    monkeypatch.setattr(machine, "_nvidia", lambda: listed)
    device = {"name": "RTX 4090", "memory_bytes": 24 * GIB, "free_bytes": 22 * GIB, "bf16": True}
    monkeypatch.setattr(machine, "ask_torch", lambda: {"cuda": True, "devices": [device]})
    assert machine.gpus() == [Gpu("RTX 4090", 24 * GIB, 22 * GIB, "580.1", usable=True, bf16=True)]
    monkeypatch.setattr(machine, "ask_torch", dict)
    assert machine.gpus() == listed


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    machine.ask_torch.cache_clear()
    found = machine.ask_torch()
    assert set(found) == {"cuda", "mps", "devices"}
    assert len(found["devices"]) == 0 or found["cuda"]


def gpu(gib: float, **more: Any) -> Gpu:
    return Gpu("Card", round(gib * GIB), round(gib * GIB), **({"usable": True, "bf16": True, "driver": "580.1"} | more))


@pytest.mark.parametrize(
    ("gib", "state", "words"),
    [
        (6, "problem", "does not fit this GPU"),
        (12, "ok", "trains with gradient checkpointing"),
        (24, "ok", "trains with gradient checkpointing"),
        (80, "ok", "trains with"),
    ],
)
def test_what_fits_a_card(monkeypatch: pytest.MonkeyPatch, gib: float, state: str, words: str) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [gpu(gib)])
    (sdxl,) = [(s, text) for s, text, _ in told() if text.startswith("Stable Diffusion XL 1.0:")]
    assert sdxl[0] == state
    assert words in sdxl[1]


def test_larger_cards_never_do_less(monkeypatch: pytest.MonkeyPatch) -> None:
    order = {"problem": 0, "note": 1, "ok": 2}
    for name in ("Stable Diffusion XL 1.0:", "SSD-1B:", "SDXL Turbo:", "Playground v2.5:"):
        states = []
        for gib in (4, 6, 8, 10, 12, 16, 24, 48, 80):
            monkeypatch.setattr(machine, "gpus", lambda gib=gib: [gpu(gib)])
            states.append(next(order[s] for s, text, _ in told() if text.startswith(name)))
        assert states == sorted(states)


@pytest.mark.parametrize(
    ("card", "build", "words"),
    [
        (gpu(24, usable=False, driver="470.1"), ("2.14.1+cu130", "13.0"), "driver 470.1 is too old for CUDA 13.0"),
        (gpu(24, usable=False), ("2.14.1+cpu", ""), "is built for processors alone"),
        (gpu(24, usable=False), ("2.14.1+cu130", "13.0"), "cannot compute on it"),
    ],
)
def test_a_gpu_that_is_not_used(monkeypatch: pytest.MonkeyPatch, card: Gpu, build: tuple[str, str], words: str) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: [card])
    monkeypatch.setattr(machine, "torch_build", lambda: {"version": build[0], "cuda": build[1], "hip": ""})
    assert said("problem", words)
    assert told()[0][0] == "problem", "what is to be changed comes first"


# -- room, packages, settings ------------------------------------------------------------------------------
def test_no_room_for_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "disk", lambda _: {"free_bytes": 10**9, "total_bytes": 10**12})
    assert said("problem", "7.1 GB to download, 1 GB are free")
    assert said("problem", "GiB are left for runs")


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("ok", "all packages are as required")
    real = doctor._version
    monkeypatch.setattr(
        doctor,
        "_version",
        lambda n: {"peft": None, "gradio": "3.0"}.get(n, real(n)) if n in ("peft", "gradio") else real(n),
    )
    assert said("problem", "peft is not installed.")
    assert said("note", "gradio 3.0 is installed")


def test_settings_that_name_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CHECKPOINTS", "/nowhere/at-all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert said("problem", "A folder of LAB_CHECKPOINTS does not exist: /nowhere/at-all.")
    assert said("note", "HF_HUB_OFFLINE is set")
    assert "/nowhere" not in json.dumps(doctor.examine(public=True))


# -- the command and the page ------------------------------------------------------------------------------
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["findings"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "sdxl-turbo" in text
    assert all(finding["text"] in text for finding in found["findings"])


def test_strangers_learn_nothing_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "photo.safetensors").write_bytes(b"x" * 1000)
    monkeypatch.setenv("LAB_CHECKPOINTS", str(shelf))
    page = system.system_html(system.examined())
    everything = page + json.dumps(doctor.examine(public=True))
    assert "photo" in page
    for secret in (str(tmp_path), str(Path.home()), socket.gethostname(), sys.executable, os.uname().release):
        assert secret not in everything
    assert str(tmp_path) in json.dumps(doctor.examine())  # the owner is told where things are


def test_the_page_looks_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(doctor, "examine", lambda public: calls.append(public) or {"findings": []})
    system.examined()
    system.examined()
    assert calls == [True]


def test_the_page_says_at_once_that_it_is_looking(tmp_path: Path) -> None:
    """It stands in the page as it is served: nothing has to answer first."""
    with served(tmp_path / "home") as address:
        parts = httpx.get(f"{address}/config", timeout=60).json()["components"]
    (shown,) = [part["props"]["value"] for part in parts if part["props"].get("elem_id") == "system"]
    assert "Looking" in shown
    assert "Looking" not in system.system_html(system.examined())


def test_names_are_text_on_the_page() -> None:
    found = doctor.examine(public=True)
    found["bases"].append({"id": "x", "name": "<img src=x onerror=alert(1)>", "here": True, "bytes": 1})
    assert "<img" not in system.system_html(found)
