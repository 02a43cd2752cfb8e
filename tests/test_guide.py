"""The stranger's guide: its example is taken from the text, put in place, and must pass the whole battery."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab.methods import METHODS
from tests import methods_battery as battery

GUIDE = Path(__file__).parents[1] / "lab" / "methods" / "README.md"
BATTERY = [
    battery.starts_at_the_base,
    battery.merges_exactly,
    battery.gradients_reach,
    battery.counts_right,
    battery.learns,
    battery.runs_in_bf16,
    battery.has_the_rank_it_claims,
    battery.delta_is_what_it_adds,
    battery.is_seeded,
    battery.unloads_clean,
    battery.switches,
    battery.adapts_convolutions,
]


def example() -> str:
    return re.search(r"```python\n(\"\"\"Middle:.*?)```", GUIDE.read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    torch.set_num_threads(1)
    METHODS.ids()  # the scan comes first, as it would with the file in the folder
    path = tmp_path_factory.mktemp("methods") / "middle.py"
    path.write_text(example())
    spec = importlib.util.spec_from_file_location("lab.methods.middle", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    yield METHODS["middle"]
    del METHODS._members["middle"], sys.modules[module.__name__]


def test_it_is_as_short_as_promised():
    assert len(example().strip().splitlines()) < 60


@pytest.mark.parametrize("check", BATTERY, ids=lambda f: f.__name__)
def test_the_example_passes_the_battery(method, check):
    check(method)


def test_the_example_saves_and_loads(method, tmp_path):
    battery.saves_and_loads(method, tmp_path)


def test_a_file_in_the_folder_is_enough(tmp_path):
    """In a copy of the registry's folder: the file alone makes it known, without torch."""
    code = (
        "import sys, lab.methods as m\n"
        f"m.__path__.append({str(tmp_path)!r})\n"
        "from lab.methods import METHODS\n"
        "assert METHODS['middle'].count_layer(None, METHODS['middle'].knobs(r=3)) == 9\n"
        "assert 'torch' not in sys.modules\n"
        "print(m.MiddleConfig(8).r)"
    )
    (tmp_path / "middle.py").write_text(example())
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert made.stdout.strip() == "8", made.stderr
