"""The small methods against their formulas, built the slow way: loops, hand-worked cases, other people's algorithms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lab.errors import LabError
from lab.methods import METHODS
from lab.methods._hashing import Spread
from lab.methods.loldu import ldu
from lab.methods.spec import Layer
from lab.methods.tlora import split
from tests.small_methods_helpers import (  # noqa: F401 - small_methods_home is a fixture
    LAYER,
    M,
    N,
    array,
    near,
    net,
    product,
    site,
    small_methods_home,
)

# -- counts, worked out by hand for a 6×8 layer ---------------------------------------------------------------------
COUNTS = [
    ("lora-xs", {"r": 3}, 9),
    ("lora-sb", {"r": 3}, 9),
    ("svfit", {"r": 3}, 3),
    ("loldu", {"r": 3}, 4),
    ("structuredlora", {"r": 3}, 3 * 14 + 9),
    ("nlora", {"r": 3}, 3 * 14 + 9),
    ("inttune", {"r": 3}, 9),
    ("dylora", {"r": 3}, 3 * 14),
    ("sora", {"r": 3}, 3 * 14 + 3),
    ("salt", {"k": 2, "r": 3}, 4 + 2 * 3 * 4),
    ("lamda", {"r": 3}, 9 + 18),
    ("hydra", {"r": 3}, 3 * 14 + 2 * 18),
    ("tied-lora", {"r": 3}, 3 * 14 + 6 + 3),
    ("allora", {"r": 3}, 3 * 14),
    ("lora-pro", {"r": 3}, 3 * 14),
    ("loca", {"k": 5}, 15),
    ("block-lora", {"r": 4, "blocks": 2}, 4 * 6 + 2 * 8),
    ("mos", {"r": 4, "share": 3, "private": 1, "shards": 2}, 3 * 14),
    ("tlora", {"r_transform": 2, "r": 3, "cores": 2}, 4 * (4 + 16) + 9 * (2 + 3 + 2 + 4)),
    ("dv-lora", {"r": 3}, 3 * 14 + 3 + 6),
    ("cp-lora", {"r": 3}, 3 * 14),
    ("hashednet", {"k": 7}, 7),
]


@pytest.mark.parametrize(("id", "knobs", "count"), COUNTS)
def test_count_by_hand(id, knobs, count):
    method = METHODS[id]
    assert method.count([LAYER], method.knobs(**knobs)) == count


def test_counts_of_layers_that_share():
    layers = [Layer(f"{i}.q", M, N, None, "q") for i in range(3)] + [Layer("v", M, N, None, "v")]
    tied, mos = METHODS["tied-lora"], METHODS["mos"]
    assert tied.count(layers, tied.knobs(r=2)) == 2 * (2 * 14) + 4 * (6 + 2)
    assert tied.count(layers, tied.knobs(r=2, tie="shape")) == 2 * 14 + 4 * (6 + 2)
    assert mos.count(layers, mos.knobs(r=4, share=2, shards=2)) == 4 * 2 * 14


# -- updates against loops ------------------------------------------------------------------------------------------
def test_lora_xs():
    _, layer, t = site("lora-xs", r=3, scale=0.5)
    W = array(net().q.weight)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    near(product(t["B"], t["A"]), U[:, :3] * S[:3] @ Vh[:3])  # U·Σ·Vᵀ: the best rank-3 approximation
    near(product(t["A"], t["A"].T), np.eye(3))
    near(layer.delta("default"), 0.5 * product(t["B"], t["R"], t["A"]))


def test_lora_xs_starts_at_noise_of_the_papers_size():
    _, _, t = site("lora-xs", shake=False, r=6)
    assert 0.3e-5 < t["R"].std() < 3e-5
    _, layer, _ = site("lora-xs", shake=False, r=6, sigma=0.0)
    assert layer.delta("default").abs().max() == 0


def test_lora_sb_starts_one_truncated_sign_step_away():
    model, x = net(), torch.randn(32, N, generator=torch.Generator().manual_seed(1))
    _, layer, t = site("lora-sb", model, calibrate=lambda: model(x).pow(2).mean(), shake=False, r=3, eta=0.01)
    W = array(model.q.base_layer.weight) if hasattr(model.q, "base_layer") else array(model.q.weight)
    out = array(x) @ (W + array(model.k.weight)).T
    gradient = 2 * out.T @ array(x) / out.size  # of the mean square, by hand
    U, S, Vh = np.linalg.svd(-0.01 * np.sign(gradient), full_matrices=False)
    near(layer.delta("default"), U[:, :3] * S[:3] @ Vh[:3], 1e-6)
    near(product(t["B"].T, t["B"]), np.eye(3))
    near(product(t["A"], t["A"].T), np.eye(3))


def test_svfit_replaces_singular_values():
    _, layer, t = site("svfit", r=3)
    W = array(net().q.weight)
    singular = np.linalg.svd(W, compute_uv=False)
    near(t["start"], singular[:3])
    changed = W + array(layer.delta("default"))
    expected = sorted([*np.abs(array(t["sigma"])), *singular[3:]])
    near(sorted(np.linalg.svd(changed, compute_uv=False)), expected)


def test_loldu_by_hand():
    """W = [[0, 2], [3, 4]]: the rows change places, L = I, D = (3, 2), U = [[1, 4/3], [0, 1]]."""
    PL, D, U = ldu(torch.tensor([[0.0, 2.0], [3.0, 4.0]]), 2)
    near(PL, [[0, 1], [1, 0]])
    near(D, [3, 2])
    near(U, [[1, 4 / 3], [0, 1]])


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_loldu_reproduces_the_weight(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    W[1] = W[0]  # a pivot of zero on the way
    PL, D, U = ldu(W, 6)
    near(product(PL * D, U), W)


def test_loldu():
    _, layer, t = site("loldu", r=3, scale=0.5)
    PL, D, U = ldu(net().q.weight, 3)
    expected = product(PL, np.diag(array(t["c"]) * array(t["z"])), U) - 0.5 * product(PL, np.diag(array(D)), U)
    near(layer.delta("default"), expected)


def test_structuredlora():
    _, layer, t = site("structuredlora", r=3, scale=2.0)
    near(layer.delta("default"), 2 * product(t["B"], t["N"], t["A"]))


def test_nlora():
    W = net().q.weight
    _, layer, t = site("nlora", r=3, scale=0.5)
    start = product(W[:, :3], W[:3, :3], W[:3])
    near(layer.delta("default"), 0.5 * (product(t["B"], t["N"], t["A"]) - start))


def test_nlora_pinv_is_nystroms_approximation():
    """Columns·W₁₁⁺·rows gives back the first rows and columns of W exactly."""
    _, layer, _ = site("nlora", shake=False, r=3, core="pinv", identity_init=False)
    W, start = net().q.weight, layer.delta("default")
    near(start[:3], W[:3], 1e-4)
    near(start[:, :3], W[:, :3], 1e-4)


def test_inttune():
    W = net().q.weight
    _, layer, t = site("inttune", r=3)
    near(layer.delta("default"), product(W[:, :3], t["N"] - W[:3, :3], W[:3]))


def test_salt():
    _, layer, t = site("salt", k=2, r=1)
    W = array(net().q.weight)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    signs = np.sign(np.sum(array(t["U"]) * U, axis=0))  # numpy's vectors point wherever they like
    U, Vh = U * signs, Vh * signs[:, None]
    core = np.diag(S)
    for i in range(2):
        core[i, i] = array(t["a"])[i] * S[i] + array(t["b"])[i]
    for i, j in itertools.product(range(4), range(4)):
        core[2 + i, 2 + j] += array(t["X"])[i, 0] * array(t["Y"])[0, j]
    assert (core < 0).any()  # or the relu is not tested
    near(W + array(layer.delta("default")), product(U, np.maximum(core, 0), Vh))


def test_salts_regulariser():
    made, _, t = site("salt", k=2, r=1, reg=0.1)
    S = array(t["S"])[:2]
    top = np.linalg.norm(array(t["a"]) * S + array(t["b"]) - S)
    rest = np.linalg.norm(product(t["X"], t["Y"]))
    near(METHODS["salt"].penalty(made), 0.1 * (top + rest))
    assert METHODS["salt"].penalty(site("salt")[0]) is None


def test_hydra():
    _, layer, t = site("hydra", r=2, scale=0.5)
    W = net().q.weight
    parallel, sequential = product(t["B_p"], t["A_p"]), product(t["B_s"], t["A_s"])
    near(layer.delta("default"), 0.5 * parallel + 0.5 * product(sequential, W))


def test_hydras_second_branch_sees_the_layers_output():
    made, _, t = site("hydra", r=2)
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(5))
    out = x @ net().q.weight.T
    added = x @ t["A_p"].T @ t["B_p"].T + out @ t["A_s"].T @ t["B_s"].T
    near(made.base_model.model.q(x), out + added)


def test_block_lora():
    _, layer, t = site("block-lora", r=6, blocks=3, scale=0.5)
    assert t["B"].shape == (3, M, 2)
    assert t["A"].shape == (2, N)
    wide, tall = np.concatenate(list(array(t["B"])), axis=1), np.concatenate([array(t["A"])] * 3)
    near(layer.delta("default"), 0.5 * product(wide, tall))  # LoRA with B = [B_1 B_2 B_3], A = [A_s; A_s; A_s]


def test_cp_lora():
    _, layer, t = site("cp-lora", targets=("conv",), r=3, scale=0.5)
    a, b, c, d = (array(t[name]) for name in "abcd")
    expected = np.zeros((4, 2, 3, 2))
    for o, i, y, x in itertools.product(*map(range, expected.shape)):
        expected[o, i, y, x] = 0.5 * sum(a[o, p] * b[p, i] * c[p, y] * d[p, x] for p in range(3))
    near(layer.get_delta_weight("default"), expected)


def test_tlora():
    _, layer, t = site("tlora", r_transform=2, r=2, cores=2)
    rows, columns = [2, 3], [2, 4]
    assert (split(M, 2), split(N, 2)) == (rows, columns)
    W, T, D = array(net().q.weight), np.zeros((N, N)), np.zeros((M, N))
    t = {name: array(value) for name, value in t.items()}
    for i1, i2, j1, j2 in itertools.product(range(2), range(4), range(2), range(4)):
        T[i1 * 4 + i2, j1 * 4 + j2] = np.trace(t["transform0"][i1, j1] @ t["transform1"][i2, j2])
    for i1, i2, j1, j2 in itertools.product(range(2), range(3), range(2), range(4)):
        cores = t["rows0"][i1] @ t["rows1"][i2] @ t["columns0"][j1] @ t["columns1"][j2]
        D[i1 * 3 + i2, j1 * 4 + j2] = np.trace(cores)
    near(W + array(layer.delta("default")), product(W, T) + D, 1e-4)


@pytest.mark.parametrize(
    ("size", "parts", "expected"), [(640, 3, [8, 8, 10]), (1280, 2, [32, 40]), (7, 3, [1, 1, 7]), (12, 1, [12])]
)
def test_tlora_splits_evenly(size, parts, expected):
    assert split(size, parts) == expected
    assert math.prod(expected) == size


def test_hashednet():
    _, layer, t = site("hashednet", k=5, scale=2.0)
    delta = layer.delta("default")
    sizes = t["w"].abs() * 2
    for value in delta.flatten():
        assert (value.abs() - sizes).abs().min() < 1e-6
    assert 0.2 < (torch.sign(delta) > 0).float().mean() < 0.8


def test_hashing_is_even_stays_and_comes_back():
    w, count = torch.arange(1.0, 9.0, requires_grad=True), 80_000
    spread = Spread.apply(w, 12345, count)
    used = torch.bincount(spread.detach().abs().long() - 1, minlength=8)
    assert used.min() > 0.95 * count / 8
    assert torch.sign(spread).mean().abs() < 0.02
    assert spread[:12].tolist() == [1, 3, 5, -5, 7, 3, 6, 8, -3, -4, 1, -1]  # or files made elsewhere are noise
    g = torch.randn(count, generator=torch.Generator().manual_seed(3))
    (spread * g).sum().backward()
    spread = spread.detach()
    near(w.grad, [(torch.sign(spread) * g)[spread.abs() == i].sum() for i in range(1, 9)], 1e-3)


# -- layers that share ----------------------------------------------------------------------------------------------
def test_tied_lora():
    made, _, _ = site("tied-lora", targets=("q", "k"), r=2, tie="shape", scale=0.5)
    q, k = (s for _, s, _ in METHODS["tied-lora"].sites(made))
    assert q.tensors("default")["A"] is k.tensors("default")["A"]
    for layer in (q, k):
        t = layer.tensors("default")
        left = product(torch.diag(t["v"]), t["B"], torch.diag(t["u"]))
        near(layer.delta("default"), 0.5 * product(left, t["A"]))
    apart, _, _ = site("tied-lora", targets=("q", "k"), r=2)
    first, second = (s.tensors("default")["A"] for _, s, _ in METHODS["tied-lora"].sites(apart))
    assert first is second  # without a role known by name, layers of a shape are of one kind


def test_mos():
    made, _, _ = site("mos", targets=("q", "k"), r=4, share=3, private=1, shards=2, scale=0.5)
    q, k = (s for _, s, _ in METHODS["mos"].sites(made))
    assert q.tensors("default")["pool_a"] is k.tensors("default")["pool_a"]
    for layer in (q, k):
        t = {name: array(value) for name, value in layer.tensors("default").items()}
        assert t["pool_a"].shape == (2 * 2 * 2, N // 2)  # two layers' two shared rows, in two shards each
        assert t["pool_b"].shape == (2 * 2 * 2, M // 2)
        A, B = np.zeros((4, N)), np.zeros((M, 4))
        for row in range(3):
            A[row] = [*t["pool_a"][int(t["pick_a"][2 * row])], *t["pool_a"][int(t["pick_a"][2 * row + 1])]]
            B[:, row] = [*t["pool_b"][int(t["pick_b"][2 * row])], *t["pool_b"][int(t["pick_b"][2 * row + 1])]]
        A[3], B[:, 3] = [*t["own_a"][0], *t["own_a"][1]], [*t["own_b"][0], *t["own_b"][1]]
        near(layer.delta("default"), 0.5 * product(B, A))
        assert len(set(t["pick_a"])) == 6  # without replacement
        assert list(t["pick_a"]) != list(t["pick_b"])  # pair dissociation
    assert list(array(q.tensors("default")["pick_a"])) != list(array(k.tensors("default")["pick_a"]))


def test_mos_alone_has_the_rank_it_pays_for():
    _, layer, t = site("mos", r=4, share=2, private=1, shards=2)
    assert t["pick_a"].numel() == 2
    assert int(torch.linalg.matrix_rank(layer.delta("default"), rtol=1e-4)) == 2
    with pytest.raises(LabError, match="does not divide"):
        METHODS["mos"].check(LAYER, METHODS["mos"].knobs(shards=4))


# -- bad settings ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id", ["lora-xs", "lora-sb", "svfit", "loldu", "nlora", "inttune", "lamda"])
def test_a_rank_larger_than_the_layer(id):
    method = METHODS[id]
    with pytest.raises(LabError, match=r"r is 7, but layer q is 6×8: take at most 6\."):
        method.check(LAYER, method.knobs(r=7))


@pytest.mark.parametrize(
    ("id", "knobs", "message"),
    [
        ("dylora", {"r": 4, "r_min": 5}, "r_min must be at most r = 4, got 5"),
        ("block-lora", {"r": 4, "blocks": 3}, "blocks must divide r = 4, got 3"),
        ("mos", {"share": 2, "private": 3}, "private must be at most share = 2, got 3"),
        ("mos", {"r": 1, "share": 2}, "r must be at least share = 2, got 1"),
    ],
)
def test_settings_that_do_not_fit_each_other(id, knobs, message):
    with pytest.raises(LabError, match=message):
        METHODS[id].knobs(**knobs)


def test_salt_needs_a_rest():
    with pytest.raises(LabError, match="take less than 6"):
        METHODS["salt"].check(LAYER, METHODS["salt"].knobs(k=6))
