"""How the small methods train: their optimizers and gradients, and what changes with the step."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lab.methods import METHODS
from lab.methods._cosine import cosine
from lab.methods._optimizers import LoraProAdamW, StillAdamW, lora_pro
from lab.methods.sora import soft_threshold
from tests.small_methods_helpers import (  # noqa: F401 - small_methods_home is a fixture
    M,
    N,
    array,
    near,
    net,
    product,
    site,
    small_methods_home,
)


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
