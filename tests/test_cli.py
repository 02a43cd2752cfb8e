"""The command line: one line and exit code 2 on bad input, JSON alone on standard output."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lab.cli import commands, main, parse_numbers, parse_settings
from lab.errors import LabError


def lab(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", *args], capture_output=True, text=True, timeout=120, check=False
    )


def test_every_command_has_its_parts():
    assert {"methods", "subject", "budget", "jobs", "export"} <= set(commands())
    for name, module in commands().items():
        assert module.HELP, name
        assert all(callable(getattr(module, part)) for part in ("add_arguments", "run", "show")), name


def test_methods_json_is_alone_on_standard_output():
    done = lab("methods", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["id"]: row for row in json.loads(done.stdout)}
    assert {"lora", "nora"} <= set(rows)
    assert {"id", "name", "kind", "paper", "low_rank", "own"} <= set(rows["nora"])
    assert rows["nora"]["own"]
    assert not rows["lora"]["own"]


@pytest.mark.parametrize(
    "words",
    [
        ["no-such-command"],
        ["budget", "sdxl-unett", "lora"],
        ["budget", "sdxl-unet", "lorra"],
        ["budget", "sdxl-unet", "lora", "--set", "r=zero"],
        ["subject", "/no/such/folder", "--class-word", "fox", "--out", "/no/such/out"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(words))
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err


def test_settings_and_numbers():
    assert parse_settings(["nora.r_inner=4", "k=8"]) == {"nora": {"r_inner": "4"}, "": {"k": "8"}}
    assert parse_numbers("0, 1,2", "--seeds") == [0, 1, 2]
    for wrong in ("r", "=3", "nora."):
        with pytest.raises(LabError, match="--set takes"):
            parse_settings([wrong])
    with pytest.raises(LabError, match="--seeds takes whole numbers"):
        parse_numbers("a,b", "--seeds")


def test_commands_start_without_torch():
    code = "import sys, lab.cli as c; c.parser(); print('torch' in sys.modules, 'gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
