"""The budget: closed forms on random shapes (on models: test_budget_counts.py), solving against counting, memory against
what is allocated."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lab import architectures, budget, memory
from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.spec import Layer

ROOT = Path(__file__).resolve().parent.parent
BOUNDED = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
SIDES = st.sampled_from([8, 12, 16, 20, 24, 32, 36, 48, 64])
SDXL = architectures.shapes(architectures.load("sdxl-unet").select("attn"))
GPT2 = architectures.shapes(architectures.load("gpt2-medium").select("q,v"))
LLAMA = architectures.shapes(architectures.load("llama3-8b").select("all"))


def drawn(method: Any, data: st.DataObject, layers: list[Layer]) -> Any:
    """Settings of the method that fit the layers: its size knobs drawn, halved until they do."""
    knobs = method.knobs()
    values: dict[str, Any] = {}
    for field in budget.knob_fields(method, size=True):
        if isinstance(getattr(knobs, field.name), float):
            values[field.name] = data.draw(st.sampled_from([0.25, 0.5, 0.8]), label=field.name)
        else:
            values[field.name] = max(data.draw(st.integers(1, 24), label=field.name), field.metadata["low"] or 1)
    lows = {f.name: int(f.metadata["low"] or 1) for f in budget.knob_fields(method)}
    for _ in range(8):
        try:
            knobs = dataclasses.replace(method.knobs(), **values)
            budget.check(method, layers, knobs)
        except LabError:  # smaller settings all round: what does not fit is mostly too large, or a limit of another
            every = {f.name: getattr(knobs, f.name) for f in budget.knob_fields(method)} | values
            whole = {k: v for k, v in every.items() if type(v) is int and v > 1}
            values |= {k: max(lows[k], v // 2) for k, v in whole.items()}
        else:
            return knobs
    return None


def instantiated(method: Any, model: Any, knobs: Any, names: list[str], x: Any) -> int:
    """Trainable parameters that the method really puts on a copy of the model."""
    model = copy.deepcopy(model).requires_grad_(False)

    def calibrate() -> Any:
        out = model(x)
        return (out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)).float().square().mean()

    made = method.attach(model, knobs, names, seed=0, calibrate=calibrate)
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


# -- counting --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id", METHODS.ids())
@BOUNDED
@given(data=st.data(), middle=SIDES, ends=SIDES, bias=st.booleans())
def test_count_is_what_peft_makes_on_random_shapes(
    id: str, data: st.DataObject, middle: int, ends: int, bias: bool
) -> None:
    import torch

    method = METHODS[id]
    layers = [Layer("to_q", middle, ends, None, "q", bias), Layer("to_k", ends, middle, None, "k", bias)]
    knobs = drawn(method, data, layers)
    assume(knobs is not None)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k = torch.nn.Linear(ends, middle, bias=bias), torch.nn.Linear(middle, ends, bias=bias)

        def forward(self, x: Any) -> Any:
            return self.to_k(torch.tanh(self.to_q(x)))

    torch.manual_seed(0)
    assert instantiated(method, Net(), knobs, ["to_q", "to_k"], torch.randn(64, ends)) == budget.count(
        method, layers, knobs
    )


def test_grouping_by_shape_changes_no_count() -> None:
    for method in METHODS.where(lambda m: type(m).count is type(METHODS["lora"]).count):
        knobs = method.knobs()
        try:
            each = sum(method.count_layer(layer, knobs) for layer in SDXL)
        except NotImplementedError:
            continue
        assert budget.count(method, SDXL, knobs) == each


def test_known_counts() -> None:
    def lora(layers: list[Layer], r: int) -> int:
        return budget.count(METHODS["lora"], layers, METHODS["lora"].knobs.parse({"r": r}))

    assert lora(SDXL, 1) == 1_451_520
    assert lora(GPT2, 1) == 98_304
    nola = METHODS["nola"]
    assert budget.count(nola, GPT2, nola.knobs.parse({"k": 1000, "l": 1000})) == 96_000
    assert budget.sizes(96_000) == {
        "fp32": 384_000, "bf16": 192_000, "8 bit": 96_000, "4 bit": 48_000, "3 bit": 36_000, "2 bit": 24_000
    }  # fmt: skip


# -- solving ---------------------------------------------------------------------------------------------
def neighbours(method: Any, layers: list[Layer], knobs: Any) -> list[int]:
    """Counts one step away in each size knob, where the settings fit."""
    found = []
    for field in budget.knob_fields(method, size=True):
        value = getattr(knobs, field.name)
        step: Any = 1e-4 if isinstance(value, float) and value < 1 else 1
        for other in (value - step, value + step):
            try:
                moved = dataclasses.replace(knobs, **{field.name: other})
                budget.check(method, layers, moved)
                found.append(budget.count(method, layers, moved))
            except LabError:
                continue
    return found


@pytest.mark.parametrize("id", METHODS.ids())
@pytest.mark.parametrize("layers", [SDXL, LLAMA[:28]], ids=["sdxl", "llama"])
def test_solving_comes_within_one_step(id: str, layers: list[Layer]) -> None:
    method = METHODS[id]
    for n in (1_000, 94_208, 1_234_567, 20_000_000):
        found = budget.solve(method, layers, n)
        assert found.count == budget.count(method, layers, found.knobs)
        assert found.miss == found.count - n
        if found.reachable:
            fraction = any(
                isinstance(getattr(found.knobs, f.name), float) for f in budget.knob_fields(method, size=True)
            )
            slack = budget.SAME * n if fraction else 0
            assert all(abs(found.miss) <= abs(other - n) + slack for other in neighbours(method, layers, found.knobs))
        else:
            assert method.name in found.note
            assert f"{found.count:,}" in found.note


@pytest.mark.parametrize("id", METHODS.ids())
@BOUNDED
@given(data=st.data())
def test_solving_for_a_count_finds_it_again(id: str, data: st.DataObject) -> None:
    method, layers = METHODS[id], SDXL[:16]
    knobs = drawn(method, data, layers)
    assume(knobs is not None)
    n = budget.count(method, layers, knobs)
    sizes = {f.name: getattr(method.knobs(), f.name) for f in budget.knob_fields(method, size=True)}
    try:  # from the default sizes, with whatever else was drawn
        found = budget.solve(method, layers, n, dataclasses.replace(knobs, **sizes))
    except LabError:
        found = budget.solve(method, layers, n, knobs)
    steps = [abs(other - n) for other in neighbours(method, layers, knobs) if other != n]
    assert abs(found.miss) <= max([budget.SAME * n, *steps[:1]])


def test_floors_are_told_in_one_sentence() -> None:
    assert budget.solve(METHODS["lora"], GPT2, 94_208).note == "LoRA's floor here is 98,304: rank 1"
    assert abs(budget.solve(METHODS["nola"], GPT2, 94_208).miss) <= 24  # half of one coefficient in 48 layers
    high = budget.solve(METHODS["lora"], GPT2, 10**10)
    assert high.note == f"LoRA's ceiling here is {98_304 * 1024:,}: rank 1024"


def test_fixed_settings_stay() -> None:
    nola = METHODS["nola"]
    found = budget.solve(nola, GPT2, 96_000, nola.knobs.parse({"k": 500}), fixed=["k"])
    assert (found.knobs.k, found.knobs.l, found.miss) == (500, 1500, 0)


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (0, "at least 1"),
        (-5, "at least 1"),
        (10**15, "larger than any model"),
        ("many", "is a number"),
        (1.5, "whole number"),
        (float("nan"), "whole number"),
        ("inf", "whole number"),
    ],
)
def test_bad_budgets(n: Any, said: str) -> None:
    with pytest.raises(LabError, match=said):
        budget.solve(METHODS["lora"], GPT2, n)


def test_ranks_above_a_layers_size_name_the_layer() -> None:
    for id in ("lora", "nora"):
        method = METHODS[id]
        knobs = method.knobs.parse({"r": 2000} if id == "lora" else {"r_outer": 2000})
        with pytest.raises(LabError, match="1024"):
            budget.check(method, GPT2, knobs)


def test_solving_is_fast_enough_for_a_slider() -> None:
    began = os.times().user
    for id in ("lora", "nora", "nola", "dora", "vera"):
        budget.solve(METHODS[id], SDXL, 1_000_000)
    assert os.times().user - began < 0.5  # seconds of processor time; a quiet machine takes a twentieth


# -- memory ----------------------------------------------------------------------------------------------
def test_memory_adds_up_and_grows_with_what_it_should() -> None:
    arch = architectures.load("sdxl-unet")
    rows, method = arch.select("attn"), METHODS["lora"]
    knobs = method.knobs.parse({"r": 4})
    one = memory.estimate(arch, rows, method, knobs)
    assert one.weights == 4 * arch.parameters
    assert one.optimizer == 2 * one.gradients == 8 * budget.count(method, SDXL, knobs)
    two = memory.estimate(arch, rows, method, knobs, batch=2)
    assert two.kept == pytest.approx(2 * one.kept, rel=1e-6)
    quarter = memory.estimate(arch, rows, method, knobs, size=0.5)
    assert 0.2 < quarter.kept / one.kept < 0.3  # a quarter of the pixels, and the text
    half = memory.estimate(arch, rows, method, knobs, precision="bf16")
    assert half.weights * 2 == one.weights
    assert half.total < one.total
    for wrong in ({"batch": 0}, {"size": 99.0}, {"precision": "fp12"}):
        with pytest.raises(LabError):
            memory.estimate(arch, rows, method, knobs, **wrong)
    assert "Not counted" in memory.explain()


def test_memory_is_within_15_percent_of_every_measured_peak() -> None:
    """Today's estimates against the committed peaks of real training steps (`lab bench budget_memory --write`)."""
    from lab.bench import budget_memory as bench

    bases = {"tiny-sdxl": bench.tiny_sdxl(), "block": bench.sdxl_block()}
    with bench.PEAKS.open(encoding="utf-8", newline="") as file:
        peaks = [row for row in csv.DictReader(file) if row["method"] in METHODS and row["measured"]]
    assert {(base, id) for base in bases for id in ("lora", "nora", "nola", "pranc", "dora", "vera", "adalora")} <= {
        (row["base"], row["method"]) for row in peaks
    }
    wrong = {}
    for row in peaks:
        arch, rows, _, _ = bases[row["base"]]
        method = METHODS[row["method"]]
        ratio = memory.estimate(arch, rows, method, method.knobs(), batch=bench.BATCH).total / int(row["measured"])
        if not 0.85 <= ratio <= 1.15:
            wrong[row["base"], row["method"]] = round(ratio, 3)
    assert not wrong


def test_memory_is_within_15_percent_of_peaks_measured_now() -> None:
    """Real training steps of the embedded base and of a transformer block of SDXL's size, in a process of their own."""
    command = ["-m", "lab", "bench", "budget_memory", "--method", "nora", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)["result"]["rows"]
    assert {row["base"] for row in rows} == {"tiny-sdxl", "block"}
    for row in rows:
        assert 0.85 <= row["ratio"] <= 1.15, row


# -- the command -----------------------------------------------------------------------------------------
def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", "budget", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_command_answers_at_once_and_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("gpt2-medium", "nola", "--targets", "q,v", "--set", "k=1000", "--set", "l=1000", "--json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = json.loads(done.stdout)
    assert answer["trainable_parameters"] == 96_000
    assert (answer["arch"], answer["method"], answer["targets"], answer["layers"]) == (
        "gpt2-medium",
        "nola",
        ["q", "v"],
        48,
    )
    assert answer["bytes"]["fp32"] == 384_000
    assert answer["bytes"]["bf16"] == 192_000
    assert answer["knobs"]["k"] == 1000
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1.5  # processor seconds: wall time on a quiet machine is the same
    check = (
        "import sys, lab.cli.budget as b, lab.budget_report as r; r.report(r.DEFAULT); print('torch' in sys.modules)"
    )
    quiet = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert quiet.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sdxl-unett", "lora"], "did you mean sdxl-unet"),
        (["gpt2", "lorra"], "did you mean"),
        (["gpt2", "lora", "--budget", "0"], "at least 1"),
        (["gpt2", "lora", "--budget", "-7"], "at least 1"),
        (["gpt2", "lora", "--budget", "1000000000000000"], "larger than any model"),
        (["gpt2", "lora", "--set", "r=4000"], "4000"),
        (["gpt2", "lora", "--targets", "x"], "target"),
        (["gpt2", "lora", "--blocks", "5-2"], "ends before"),
        (["gpt2", "nora", "--set", "lora.r=4"], "but the method is nora"),
        (["gpt2", "lora", "--text-encoders"], "no text encoder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lab.cli import main

    assert main(["budget", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_command_solves(capsys: pytest.CaptureFixture[str]) -> None:
    from lab.cli import main

    assert main(["budget", "gpt2-medium", "nola", "--targets", "q,v", "--budget", "48000", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["knobs"]["k"], answer["knobs"]["l"], answer["miss"]) == (500, 500, 0)
    assert main(["budget", "gpt2-medium", "lora", "--targets", "q,v", "--budget", "94208"]) == 0
    assert "LoRA's floor here is 98,304: rank 1" in capsys.readouterr().out
