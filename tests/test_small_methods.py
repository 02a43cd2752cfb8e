"""The small methods against their formulas, built the slow way: loops, hand-worked cases, other people's algorithms."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lab.errors import LabError
from lab.methods import METHODS
from lab.methods._cosine import cosine
from lab.methods._hashing import Spread
from lab.methods._optimizers import LoraProAdamW, StillAdamW, lora_pro
from lab.methods.loldu import ldu
from lab.methods.sora import soft_threshold
from lab.methods.spec import Layer
from lab.methods.tlora import split

M, N = 6, 8  # out, in
LAYER = Layer("q", M, N, None, "q")


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path_factory.getbasetemp() / "lab"))


class Net(nn.Module):
    """Two linear layers of one shape and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.conv = nn.Linear(N, M, bias=False), nn.Linear(N, M, bias=False), nn.Conv2d(2, 4, (3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def net(weight=None) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Net().requires_grad_(False)
    if weight is not None:
        made.q.weight.data = torch.as_tensor(weight, dtype=torch.float32)
    return made


def site(id, model=None, targets=("q",), calibrate=None, shake=True, **knobs):
    """(model with the adapter, the first target's layer, its tensors), the trained ones moved off their start."""
    method = METHODS[id]
    model = net() if model is None else model
    made = method.attach(model, method.knobs(**knobs), list(targets), seed=4, calibrate=calibrate)
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad and shake:
                p.add_(torch.randn(p.shape, generator=noise) * 0.3)
    first = next(s for _, s, _ in method.sites(made))
    return made, first, {name: t.detach().clone() for name, t in first.tensors("default").items()}


def array(x):
    return np.asarray(torch.as_tensor(x).detach(), dtype=np.float64)


def product(*matrices):
    """A product of matrices by its definition."""
    total = array(matrices[0])
    for other in map(array, matrices[1:]):
        rows, inner, columns = total.shape[0], total.shape[1], other.shape[1]
        grown = np.zeros((rows, columns))
        for i, j in itertools.product(range(rows), range(columns)):
            grown[i, j] = sum(total[i, k] * other[k, j] for k in range(inner))
        total = grown
    return total


def near(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(array(actual), array(expected), rtol=tolerance, atol=tolerance)


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


# -- optimizers and gradients ---------------------------------------------------------------------------------------
def test_soft_threshold_by_hand():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.4, 0.7, 1.5])
    near(soft_threshold(x, 0.5), [-1.5, 0, 0, 0, 0.2, 1.0])


def test_sora():
    made, layer, t = site("sora", r=3, threshold=0.2, l1=0.1, scale=0.5)
    near(layer.delta("default"), 0.5 * product(t["B"] * t["gate"], t["A"]))
    near(METHODS["sora"].penalty(made), 0.1 * t["gate"].abs().mean())
    METHODS["sora"].after_step(made, 0, 10)
    near(layer.tensors("default")["gate"], soft_threshold(t["gate"], 0.2))
    near(layer.tensors("default")["A"], t["A"])
    assert METHODS["sora"].penalty(site("sora")[0]) is None


def test_allora_scales_gradients_and_nothing_else():
    _, layer, _ = site("allora", r=3, eta=2.0)
    G = torch.randn(M, N, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        layer.tensors("default")["B"][0] = 0
    B, A = (layer.tensors("default")[name] for name in "BA")
    delta = layer.delta("default")
    assert torch.equal(delta, B @ A)
    (delta * G).sum().backward()
    for i in range(M):
        near(B.grad[i], array(G @ A.T)[i] / math.sqrt(float(B[i].norm()) + 0.25))
    for j in range(3):
        near(A.grad[j], array(B.T @ G)[j] / math.sqrt(float(A[j].norm()) + 0.25))
    near(B.grad[0], 2 * (G @ A.T)[0])  # a row of zero learns η times as fast


def lora_pro_case(s=0.7):
    g = torch.Generator().manual_seed(8)
    A, B, G = (torch.randn(shape, generator=g) for shape in ((2, N), (M, 2), (M, N)))
    return A, B, G, s * B.T @ G, s * G @ A.T, s


@pytest.mark.parametrize("gauge", [True, False])
def test_lora_pro_is_the_nearest_effect(gauge):
    """min over (g_A, g_B) of ‖s(B·g_A + g_B·A) − G‖, by least squares over all their entries."""
    A, B, G, d_a, d_b, s = lora_pro_case()
    g_a, g_b = lora_pro(A, B, d_a, d_b, s, gauge=gauge)
    a, b = array(A), array(B)
    columns = [s * np.outer(b[:, k], np.eye(N)[j]).ravel() for k in range(2) for j in range(N)]
    columns += [s * np.outer(np.eye(M)[i], a[k]).ravel() for i in range(M) for k in range(2)]
    design = np.stack(columns, axis=1)
    best, *_ = np.linalg.lstsq(design, array(G).ravel(), rcond=None)
    near(s * (B @ g_a + g_b @ A), (design @ best).reshape(M, N), 1e-4)


def test_lora_pros_gauge_keeps_the_pair_nearest_to_the_plain_gradients():
    """min over X of ‖g_A + X·A − ∇A‖² + ‖g_B − B·X − ∇B‖², by least squares over X's entries."""
    A, B, _, d_a, d_b, s = lora_pro_case()
    g_a, g_b = lora_pro(A, B, d_a, d_b, s, gauge=False)
    a, b, design = array(A), array(B), []
    for k, l in itertools.product(range(2), range(2)):
        X = np.zeros((2, 2))
        X[k, l] = 1
        design.append(np.concatenate([(X @ a).ravel(), (-b @ X).ravel()]))
    target = np.concatenate([array(d_a - g_a).ravel(), array(d_b - g_b).ravel()])
    best, *_ = np.linalg.lstsq(np.stack(design, axis=1), target, rcond=None)
    X = best.reshape(2, 2)
    ours = lora_pro(A, B, d_a, d_b, s)
    near(ours[0], array(g_a) + X @ a, 1e-4)
    near(ours[1], array(g_b) - b @ X, 1e-4)


def test_lora_pro_at_the_start():
    """B = 0: only B moves, by the gradient divided by A·Aᵀ and s²."""
    A, _, _, _, d_b, s = lora_pro_case()
    g_a, g_b = lora_pro(A, torch.zeros(M, 2), torch.zeros(2, N), d_b, s)
    assert g_a.abs().max() == 0
    near(g_b, array(d_b) @ np.linalg.inv(array(A @ A.T)) / s**2, 1e-4)


def test_lora_pro_steps():
    """First steps by hand: Adam's first direction is the sign of what its moments are of."""
    A, B, _, d_a, d_b, s = lora_pro_case()
    for full in (False, True):
        a, b = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        a.grad, b.grad = d_a.clone(), d_b.clone()
        LoraProAdamW([(a, b, s)], lr=0.01, weight_decay=0.5, full=full).step()
        g_a, g_b = lora_pro(A, B, d_a, d_b, s)
        if full:
            direction = torch.sign(s * (B @ g_a + g_b @ A))
            g_a, g_b = lora_pro(A, B, s * B.T @ direction, s * direction @ A.T, s)
            near(a, A * math.sqrt(1 - 0.005) - 0.01 * g_a, 1e-4)
            near(b, B * math.sqrt(1 - 0.005) - 0.01 * g_b, 1e-4)
        else:
            near(a, A * (1 - 0.005) - 0.01 * torch.sign(g_a), 1e-4)
            near(b, B * (1 - 0.005) - 0.01 * torch.sign(g_b), 1e-4)


def test_lora_pro_takes_its_optimizer_and_its_state_survives():
    made, layer, t = site("lora-pro", r=2, scale=0.5, full=True)
    near(layer.delta("default"), 0.5 * product(t["B"], t["A"]))
    optimizer = METHODS["lora-pro"].optimizer(made, 1e-2)
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(2))

    def step(opt):
        made(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step(optimizer)
    saved = {n: p.detach().clone() for n, p in made.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    step(optimizer)
    after = {n: p.detach().clone() for n, p in made.named_parameters()}
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.copy_(saved[name])
    resumed = METHODS["lora-pro"].optimizer(made, 1e-2)
    resumed.load_state_dict(state)
    step(resumed)
    assert all(torch.equal(p, after[n]) for n, p in made.named_parameters())


def test_still_adamw_leaves_frozen_entries():
    plain, still = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizers = torch.optim.AdamW([plain], lr=0.1), StillAdamW([still], lr=0.1)
    for step in range(3):
        for p, optimizer in zip((plain, still), optimizers, strict=True):
            p.grad = torch.tensor([1.0, 1.0, 0.0 if step else 1.0, 0.0])
            optimizer.step()
    assert torch.equal(plain[:2], still[:2])
    assert plain[2] < still[2] < 1  # plain Adam coasts on
    assert still[3] == 1 > plain[3]  # nor does weight decay touch it


# -- what changes with the step -------------------------------------------------------------------------------------
def test_dylora():
    made, layer, t = site("dylora", r=4, r_min=2, scale=0.5)
    method, x = METHODS["dylora"], torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    base = net().q(x)
    seen = set()
    for step in range(40):
        method.before_step(made, step, 40)
        b = layer.stages["default"]
        seen.add(b)
        cut = 0.5 * 4 / b * product(t["B"][:, :b], t["A"][:b])
        near(made.train().base_model.model.q(x), array(base) + array(x) @ cut.T, 1e-4)
    assert seen == {2, 3, 4}
    whole = array(base) + array(x) @ (0.5 * product(t["B"], t["A"])).T
    near(made.eval().base_model.model.q(x), whole, 1e-4)
    _, short, t = site("dylora", r=4, keep=1)
    near(short.delta("default"), 4 * product(t["B"][:, :1], t["A"][:1]))


def test_dyloras_frozen_variant_trains_one_rank_a_step():
    made, layer, _ = site("dylora", r=4, frozen=True)
    method, x = METHODS["dylora"], torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    method.before_step(made, 3, 10)
    b = layer.stages["default"]
    made.train()(x).square().sum().backward()
    t = layer.tensors("default")
    assert [i for i in range(4) if t["A"].grad[i].any()] == [b - 1]
    assert [i for i in range(4) if t["B"].grad[:, i].any()] == [b - 1]


def test_lamda():
    _, layer, t = site("lamda", r=3, scale=0.5)
    W = array(net().q.weight)
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    best = U[:, :3] * S[:3] @ Vh[:3]
    near(layer.delta("default"), 0.5 * (product(t["B"], t["S"], t["A"]) - best))


def test_lamda_freezes_column_by_column():
    method = METHODS["lamda"]
    knobs = method.knobs(r=4, freeze=0.4)
    assert [method.stage(knobs, step, 20) for step in range(10)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    made, layer, _ = site("lamda", r=4, freeze=0.4)
    optimizer, x = method.optimizer(made, 0.01, 0.1), torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    for step in range(20):
        before = layer.tensors("default")["B"].detach().clone()
        method.before_step(made, step, 20)
        live = layer.stages["default"]
        made.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (layer.tensors("default")["B"] != before).any(dim=0).tolist()
        assert moved == [True] * live + [False] * (4 - live)


def test_dv_lora():
    made, layer, t = site("dv-lora", r=3, warmup=0.5, scale=0.5)
    left = product(torch.diag(t["v"]), t["B"], torch.diag(t["u"]))
    near(layer.delta("default"), 0.5 * product(left, t["A"]))
    method, x = METHODS["dv-lora"], torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    for step, training in ((4, {"A", "B"}), (5, {"u", "v"})):
        made.zero_grad()
        method.before_step(made, step, 10)
        made.train()(x).square().sum().backward()
        assert {name for name, p in layer.tensors("default").items() if p.grad is not None} == training


def test_dv_lora_starts_its_vectors_in_the_unit_range():
    _, _, t = site("dv-lora", shake=False, r=6)
    vectors = torch.cat((t["u"], t["v"]))
    assert vectors.abs().max() <= 1
    assert vectors.std() > 0.3


def loca_by_loops(c, places, scale):
    expected = np.zeros((M, N))
    for value, (k, l) in zip(c, places, strict=True):
        size_k, size_l = (math.sqrt((1 if f == 0 else 2) / size) for f, size in ((k, M), (l, N)))
        for i, j in itertools.product(range(M), range(N)):
            wave = math.cos(math.pi * (2 * i + 1) * k / (2 * M)) * math.cos(math.pi * (2 * j + 1) * l / (2 * N))
            expected[i, j] += scale * value * size_k * size_l * wave
    return expected


def test_loca():
    _, layer, t = site("loca", k=5, scale=0.5)
    near(product(cosine(M, torch.device("cpu")), cosine(M, torch.device("cpu")).T), np.eye(M))
    places = np.clip(np.round(array(t["places"])), 0, [M - 1, N - 1]).astype(int)
    near(layer.delta("default"), loca_by_loops(array(t["c"]), places, 0.5))


def test_locas_places_follow_central_differences():
    """For a loss linear in ΔW the central difference over one grid step is what the loss itself gives."""
    _, layer, _ = site("loca", k=3, scale=0.5)
    G = torch.randn(M, N, generator=torch.Generator().manual_seed(6))
    places = [[2, 3], [1, 1], [4, 6]]
    with torch.no_grad():
        layer.tensors("default")["places"].copy_(torch.tensor(places))
    t = layer.tensors("default")
    (layer.delta("default") * G).sum().backward()
    c = array(t["c"])
    for k, axis in itertools.product(range(3), range(2)):
        losses = []
        for move in (1, -1):
            moved = [list(p) for p in places]
            moved[k][axis] += move
            losses.append((loca_by_loops(c, moved, 0.5) * array(G)).sum())
        near(t["places"].grad[k, axis], np.clip((losses[0] - losses[1]) / 2, -1, 1), 1e-4)
        alone = [1.0 if i == k else 0.0 for i in range(3)]
        near(t["c"].grad[k], (loca_by_loops(alone, places, 0.5) * array(G)).sum(), 1e-4)


def test_loca_takes_turns_then_lets_the_places_rest():
    method = METHODS["loca"]
    knobs = method.knobs(search=0.5, c_steps=2, l_steps=3)
    turns = "".join(method.stage(knobs, step, 20)[0] for step in range(20))
    assert turns == "ccpppccppp" + "c" * 10
    made, layer, _ = site("loca", k=4, search=0.5, c_steps=2, l_steps=3, l_rate=0.5)
    optimizer, x = method.optimizer(made, 0.1), torch.randn(5, N, generator=torch.Generator().manual_seed(1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    for step in range(20):
        t = layer.tensors("default")
        before = {name: p.detach().clone() for name, p in t.items()}
        method.before_step(made, step, 20)
        made.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert {name for name, p in t.items() if not torch.equal(p, before[name])} == {
            "c" if turns[step] == "c" else "places"
        }


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
