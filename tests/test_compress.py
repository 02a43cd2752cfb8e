"""Compressing an update: exact against slow references, through each method's own tuner and file."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from lab.compress import FITS, compress
from lab.errors import LabError
from lab.methods import METHODS, adapters
from lab.methods.deltas import Delta, deltas
from tests.compress_helpers import dense, low_rank, net

SIZES = {  # settings for the reach test; budgets that every method can spend on the small network
    "lora": {"r": 3},
    "nora": {"r_outer": 12, "r_inner": 3, "identity_init": True},
    "nola": {"r": 3, "k": 20, "l": 24},
    "pranc": {"k": 40},
    "lora-xs": {"r": 5},
}
BUDGETS = (200, 600, 1600)


pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


def updates(seed=1):
    full = 0.1 * torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(seed + 9))
    return {
        "block.to_q": low_rank(32, 24, 4, seed),
        "block.to_k": low_rank(16, 24, 6, seed + 1),
        "block.conv1": Delta(lambda: full, lambda: None),
    }


def relative(made, goals):
    lost = sum(float((dense(made[n]) - dense(d)).square().sum()) if n in made else float(dense(d).square().sum())
               for n, d in goals.items())  # fmt: skip
    return (lost / sum(float(dense(d).square().sum()) for d in goals.values())) ** 0.5


def loaded(folder):
    model = adapters.load(net(), folder)
    return model, deltas(model)


def test_the_methods_asked_for_are_there():
    assert set(FITS.ids()) >= set(SIZES)


@pytest.mark.parametrize("id", list(SIZES))
def test_what_a_method_reaches_is_found_again(id, tmp_path):
    method, network = METHODS[id], net()
    model = method.attach(network, method.knobs.parse(SIZES[id]), list(updates()), seed=5)
    draw = torch.Generator().manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=draw) * (1.0 if p.dim() == 1 else 0.1))
    goals = deltas(model)
    kept = {n: d.dense().clone() for n, d in goals.items()}
    goals = {n: Delta(lambda n=n: kept[n], d.factors) for n, d in goals.items()}
    model.unload()
    found = compress(net(), goals, id, None, tmp_path, given=SIZES[id], seed=5)
    assert found["relative_error"] < 1e-5
    assert all(r["relative_error"] < 2e-5 for r in found["layers"])


@pytest.mark.parametrize("id", list(SIZES))
def test_the_error_falls_with_the_budget_and_the_file_is_what_is_said(id, tmp_path):
    goals, network, errors = updates(), net(), []
    before = copy.deepcopy(network.state_dict())
    for budget in BUDGETS:
        out = tmp_path / str(budget)
        found = compress(network, goals, id, budget, out, base="small")
        assert found["parameters"] <= budget
        model, made = loaded(out)
        assert (
            sum(p.numel() for n, p in model.named_parameters() if METHODS[id].peft_name + "_" in n)
            == found["parameters"]
            if METHODS[id].own
            else True
        )
        assert relative(made, goals) == pytest.approx(found["relative_error"], rel=1e-5, abs=1e-6)
        for record in found["layers"]:
            own = {record["layer"]: goals[record["layer"]]}
            assert relative(made, own) == pytest.approx(record["relative_error"], rel=1e-5, abs=1e-6)
        assert found["bytes"] == sum(f.stat().st_size for f in out.iterdir() if f.name != "README.md")
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "small"
        errors.append(found["relative_error"])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] - 1e-3
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert set(network.state_dict()) == set(before)


# -- against slow references -----------------------------------------------------------------------------------
def test_lora_is_the_truncated_svd(tmp_path):
    goals = updates()
    found = compress(net(), goals, "lora", None, tmp_path, given={"r": 2})
    tails = [torch.linalg.svdvals(dense(d))[2:].square().sum() for d in goals.values()]
    whole = sum(dense(d).square().sum() for d in goals.values())
    assert found["relative_error"] == pytest.approx(float((sum(tails) / whole).sqrt()), rel=1e-5)


def test_lora_shares_ranks_out_as_well_as_any_way_of_the_same_cost(tmp_path):
    goals = updates()
    found = compress(net(), goals, "lora", 300, tmp_path)
    given = {r["layer"]: r["rank"] for r in found["layers"]}
    values = {n: torch.linalg.svdvals(dense(d)).square() for n, d in goals.items()}
    cost = {n: sum(dense(d).shape) for n, d in goals.items()}

    def kept(ranks):
        return sum(float(values[n][:r].sum()) for n, r in ranks.items())

    def price(ranks):
        return sum(cost[n] * r for n, r in ranks.items())

    every = [dict(zip(goals, (a, b, c), strict=True)) for a in range(5) for b in range(7) for c in range(7)]
    assert price(given) == found["parameters"] <= 300
    best = max(kept(r) for r in every if price(r) <= price(given))
    assert kept(given) == pytest.approx(best, rel=1e-9)


def test_a_layer_that_earns_no_rank_is_left_out(tmp_path):
    goals = updates() | {"block.to_k": low_rank(16, 24, 1, 3)}
    tiny = goals["block.to_k"].factors()
    goals["block.to_k"] = Delta(lambda: 1e-4 * tiny[0] @ tiny[1], lambda: (1e-4 * tiny[0], tiny[1]))
    found = compress(net(), goals, "lora", 150, tmp_path)
    record = next(r for r in found["layers"] if r["layer"] == "block.to_k")
    assert (record["rank"], record["relative_error"]) == (0, 1.0)
    assert "block.to_k" not in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]


def nora_by_hand(goals, network, r, i, identity=False, outer="svd", scale=1.0):
    lost = 0.0
    for name, delta in goals.items():
        U, S, Vh = torch.linalg.svd(
            network.get_submodule(name).weight.detach().double().flatten(1), full_matrices=False
        )
        U, V = (U[:, :r], Vh[:r]) if outer == "svd" else (U[:, -r:], Vh[-r:])
        X = U.T @ dense(delta) @ V.T
        start = torch.diag(S[:r] * (torch.arange(r) < i)) * (scale if identity else 0.0)
        lost += float(
            dense(delta).square().sum() - X.square().sum() + torch.linalg.svdvals(X + start)[i:].square().sum()
        )
    return (lost / sum(float(dense(d).square().sum()) for d in goals.values())) ** 0.5


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("outer", ["svd", "minor"])
def test_nora_is_the_projection_and_its_truncated_svd(identity, outer, tmp_path):
    goals, network = updates(), net()
    given = {"r_outer": 10, "r_inner": 3, "identity_init": identity, "outer": outer, "scale": 2.0}
    found = compress(network, goals, "nora", None, tmp_path, given=given)
    assert found["relative_error"] == pytest.approx(nora_by_hand(goals, network, 10, 3, identity, outer, 2.0), rel=1e-4)


def test_noras_budget_goes_to_the_best_of_all_pairs(tmp_path):
    goals, network, budget = updates(), net(), 700
    found = compress(network, goals, "nora", budget, tmp_path)
    pairs = [(r, i) for i in range(1, 8) for r in range(i, 17) if 2 * r * i * len(goals) <= budget]
    assert found["relative_error"] <= 1.0001 * min(nora_by_hand(goals, network, *pair) for pair in pairs)


def test_lora_xs_is_least_squares_over_its_matrix(tmp_path):
    goals, network = updates(), net()
    found = compress(network, goals, "lora-xs", None, tmp_path, given={"r": 6, "scale": 0.5})
    lost = 0.0
    for name, delta in goals.items():
        U, S, Vh = torch.linalg.svd(
            network.get_submodule(name).weight.detach().double().flatten(1), full_matrices=False
        )
        basis = torch.kron((U[:, :6] * S[:6]).contiguous(), Vh[:6].T.contiguous())  # vec by rows: B ⊗ Aᵀ
        goal = dense(delta).flatten()
        lost += float((basis @ torch.linalg.lstsq(basis, goal).solution - goal).square().sum())
    whole = sum(float(dense(d).square().sum()) for d in goals.values())
    assert found["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("basis", ["uniform", "hadamard"])
@pytest.mark.parametrize("k", [50, 500])
def test_pranc_is_least_squares_over_its_basis(basis, k, tmp_path):
    from lab import counter
    from lab.methods import _basis

    goals = updates()
    given = {"k": min(k, 380), "basis": basis}
    found = compress(net(), {"block.to_k": goals["block.to_k"]}, "pranc", None, tmp_path, given=given, seed=4)
    V = _basis.vectors(basis, given["k"], counter.key("pranc", 4, "block.to_k"), 16 * 24).double()
    goal = dense(goals["block.to_k"]).flatten()
    left = V.T @ torch.linalg.lstsq(V.T, goal, driver="gelsd").solution - goal
    assert found["relative_error"] == pytest.approx(float(left.norm() / goal.norm()), abs=1e-4)


@pytest.mark.parametrize("basis", ["uniform", "hadamard"])
def test_nola_ends_where_no_direction_leads_further_down(basis, tmp_path):
    goals = {"block.to_q": updates()["block.to_q"], "block.conv1": updates()["block.conv1"]}
    given = {"r": 2, "k": 30, "l": 40, "basis": basis}
    found = compress(net(), goals, "nola", None, tmp_path, given=given)
    method, (model, _) = METHODS["nola"], loaded(tmp_path)
    for name, delta in goals.items():
        site = next(s for n, s, _ in method.sites(model) if n.endswith(name))
        t = {k: v.detach().clone().requires_grad_(True) for k, v in site.tensors("default").items()}
        goal = delta.dense().flatten(1)

        def error(t=t, site=site, goal=goal):
            return (method.delta(t, site.knobs["default"], site.layer) - goal).square().sum() / goal.square().sum()

        before, search = (
            float(error().detach()),
            torch.optim.LBFGS(list(t.values()), max_iter=100, line_search_fn="strong_wolfe"),
        )

        def closure(search=search, error=error):
            search.zero_grad()
            loss = error()
            loss.backward()
            return loss

        search.step(closure)
        assert float(error().detach()) > 0.93 * before
    assert found["relative_error"] < 1


@pytest.mark.parametrize("basis", ["uniform", "hadamard"])
def test_nolas_two_ways_end_near_each_other(basis, tmp_path, monkeypatch):
    """Newton's method of small layers, and the alternation of large ones on the same layers."""
    from lab.compress import nola

    given = {"r": 2, "k": 20, "l": 30, "basis": basis}
    newton = compress(net(), updates(), "nola", None, tmp_path / "newton", given=given)["relative_error"]
    monkeypatch.setattr(nola, "DIRECT", 0)
    turns = compress(net(), updates(), "nola", None, tmp_path / "turns", given=given)["relative_error"]
    assert newton <= 1.005 * turns


# -- what does not fit ------------------------------------------------------------------------------------------
def nan_update():
    return {"block.to_q": Delta(lambda: torch.full((32, 24), float("nan")), lambda: None)}


BAD = {
    "too small": ("nora", 1, updates, {}, "too small for NoRA on these 3 layers"),
    "too small for one rank": ("lora", 20, updates, {}, "too small for LoRA"),
    "too small, k and l": ("nola", 5, updates, {}, "too small for NOLA"),
    "no budget": ("pranc", 0, updates, {}, "at least 1"),
    "other layers": ("lora", 500, lambda: {"mid.to_q": low_rank(32, 24, 1, 0)}, {}, "does not have"),
    "other shape": ("lora", 500, lambda: {"block.to_q": low_rank(24, 32, 1, 0)}, {}, "made for another base"),
    "no layer": ("lora", 500, dict, {}, "changes no layer"),
    "untrained": (
        "lora",
        500,
        lambda: {"block.to_q": Delta(lambda: torch.zeros(32, 24), lambda: None)},
        {},
        "no weight",
    ),
    "not finite": ("pranc", 500, nan_update, {}, "NaN or infinity"),
    "needs data": ("nora", 500, updates, {"outer": "gradient"}, "without training data"),
    "trained quantiser": ("nola", 500, updates, {"quant_bits": 4, "quant": "qat"}, "qat"),
    "unknown setting": ("nora", 500, updates, {"rank": 4}, "rank"),
    "unknown method": ("vera", 500, updates, {}, "vera"),
    "rank above the layer": ("lora-xs", None, updates, {"r": 17}, "17"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_sentence(case, tmp_path):
    id, budget, goals, given, words = BAD[case]
    network = net()
    with pytest.raises(LabError, match=words) as problem:
        compress(network, goals(), id, budget, tmp_path / "out", given=given)
    assert "\n" not in str(problem.value)
    assert str(problem.value).endswith((".", "?"))
    assert not (tmp_path / "out").exists()
    assert type(network.block.to_q) is nn.Linear


def test_zero_layers_cost_nothing_and_are_named(tmp_path):
    goals = updates() | {"block.to_k": Delta(lambda: torch.zeros(16, 24), lambda: None)}
    found = compress(net(), goals, "pranc", 200, tmp_path)
    assert found["left_out"] == ["block.to_k"]
    assert found["knobs"]["k"] == 100


def test_progress_is_told_and_can_stop_it(tmp_path):
    phases = []

    def report(done, total, phase):
        phases.append(phase)
        if phase == "fitting" and done == 1:
            raise KeyboardInterrupt

    network = net()
    with pytest.raises(KeyboardInterrupt):
        compress(network, updates(), "pranc", 200, tmp_path / "out", report=report)
    assert phases[0] == "reading the update"
    assert not (tmp_path / "out").exists()
    assert type(network.block.to_q) is nn.Linear
