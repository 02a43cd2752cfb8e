"""NoRA against a hand-worked case, a slow transcription of its formulas, and everything that can go wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lab import svd
from lab.errors import LabError
from lab.methods import METHODS, NoraConfig, adapters
from lab.methods.spec import Layer
from tests import methods_battery as battery

NORA = METHODS["nora"]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def linear(weight: torch.Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    return nn.Sequential(layer).requires_grad_(False)


def attach(weight, calibrate=None, **knobs):
    model = linear(weight)
    made = NORA.attach(model, NORA.knobs.parse(knobs), ["0"], calibrate=calibrate and (lambda: calibrate(model)))
    return made, made.base_model.model[0]


def test_hand_worked_case():
    """W = diag(9, 4): U = V = I, Σ^½ = diag(3, 2), so B'₀ = (3, 0)ᵀ, A'₀ = (3, 0)."""
    model, layer = attach(torch.diag(torch.tensor([9.0, 4.0])), r_outer=2, r_inner=1)
    t = layer.tensors("default")
    torch.testing.assert_close(t["outer_b"], torch.eye(2))
    torch.testing.assert_close(t["inner_b"], torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(t["inner_a"], torch.tensor([[3.0, 0.0]]))
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(model(x), torch.tensor([[9.0, 8.0]]))
    with torch.no_grad():
        t["inner_b"][:] = torch.tensor([[3.0], [1.0]])
    # B'A' − B'₀A'₀ = [[0, 0], [3, 0]], so ΔW·x = (0, 3·1)
    torch.testing.assert_close(model(x), torch.tensor([[9.0, 11.0]]))
    assert NORA.count([Layer("0", 2, 2)], NORA.knobs(r_outer=2, r_inner=1)) == 4


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize(("m", "n"), [(12, 9), (7, 20)])
def test_slow_transcription(m, n, identity):
    """ΔW = s·(B·B'·A'·A [− its start]) with factors built from torch's own SVD, the product formed in full."""
    torch.manual_seed(0)
    W = torch.randn(m, n)
    model, layer = attach(W, r_outer=5, r_inner=2, scale=1.5, identity_init=identity)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    signs = torch.stack([torch.sign(U[U[:, i].abs().argmax(), i]) for i in range(5)])
    B, A = U[:, :5] * signs, Vh[:5] * signs[:, None]
    root = torch.diag(S[:5].sqrt())
    B0, A0 = root[:, :2], root[:2]
    t = layer.tensors("default")
    torch.testing.assert_close(t["inner_b"].double(), B0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t["inner_a"].double(), A0, rtol=1e-5, atol=1e-6)
    b, a = torch.randn(5, 2), torch.randn(2, 5)
    with torch.no_grad():
        t["inner_b"].copy_(b)
        t["inner_a"].copy_(a)
    wanted = B @ b.double() @ a.double() @ A - (B @ B0 @ A0 @ A if identity else 0)
    torch.testing.assert_close(layer.delta("default").double(), 1.5 * wanted, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, n)
    torch.testing.assert_close(model(x).double(), x.double() @ (W.double() + 1.5 * wanted).T, rtol=1e-4, atol=1e-4)


def test_gradient_equals_the_transcriptions():
    torch.manual_seed(1)
    W, x, g = torch.randn(10, 8), torch.randn(6, 8), torch.randn(6, 10)
    model, layer = attach(W, r_outer=6, r_inner=3)
    t = layer.tensors("default")
    (model(x) * g).sum().backward()
    b, a = (t[k].detach().clone().requires_grad_() for k in ("inner_b", "inner_a"))
    (x @ (t["outer_b"] @ b @ a @ t["outer_a"]).T * g).sum().backward()
    torch.testing.assert_close(t["inner_b"].grad, b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t["inner_a"].grad, a.grad, rtol=1e-4, atol=1e-4)


def test_starts_exactly_at_the_base():
    torch.manual_seed(2)
    W, x = torch.randn(16, 16), torch.randn(4, 16)
    for dtype in (torch.float32, torch.bfloat16):
        model = linear(W).to(dtype)
        before = model(x.to(dtype))
        made = NORA.attach(model, NORA.knobs(r_outer=8, r_inner=2), ["0"])
        assert torch.equal(made(x.to(dtype)), before)
        with torch.autocast("cpu", torch.bfloat16):
            base = linear(W).to(dtype)(x.to(dtype))
            assert torch.equal(made(x.to(dtype)), base)


def test_outer_bases():
    torch.manual_seed(3)
    W, x = torch.randn(10, 6), torch.randn(50, 6) * torch.tensor([9.0, 1, 1, 1, 1, 0.1])
    full = svd.exact(W)
    kinds = {}
    for outer in ("svd", "activation", "gradient", "minor", "random"):
        _, layer = attach(W, lambda model: model(x).square().mean(), outer=outer, r_outer=3, r_inner=2)
        kinds[outer] = layer.tensors("default")
    torch.testing.assert_close(kinds["svd"]["outer_b"], full.U[:, :3])
    torch.testing.assert_close(kinds["minor"]["outer_a"], full.Vh[-3:])
    torch.testing.assert_close(kinds["minor"]["inner_b"], kinds["svd"]["inner_b"])
    gradient = 2 * (x @ W.T).T @ x / (50 * 10)
    torch.testing.assert_close(kinds["gradient"]["outer_b"], svd.exact(gradient).U[:, :3], rtol=1e-3, atol=1e-4)
    rms = x.square().mean(0).sqrt()
    scaled = svd.exact(W * (rms / rms.mean()))
    torch.testing.assert_close(kinds["activation"]["outer_b"], scaled.U[:, :3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kinds["activation"]["outer_a"] * (rms / rms.mean()), scaled.Vh[:3], rtol=1e-3, atol=1e-4)
    for side in (kinds["random"]["outer_b"], kinds["random"]["outer_a"].T):
        torch.testing.assert_close(side.T @ side, torch.eye(3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outer", ["activation", "gradient", "random"])
def test_every_basis_saves_and_loads(outer, tmp_path):
    model = battery.base()
    calibrate = lambda: (model(battery.inputs()) - battery.goal()).square().mean()  # noqa: E731
    made = battery.shaken(
        NORA.attach(model, NORA.knobs(r_outer=0.5, r_inner=2, outer=outer), ["q", "k"], calibrate=calibrate)
    )
    made.eval().save_pretrained(tmp_path / "a")
    loaded = adapters.load(battery.base(), tmp_path / "a")
    torch.testing.assert_close(loaded(battery.inputs()), made(battery.inputs()), rtol=1e-5, atol=1e-5)


def test_data_bases_need_data():
    with pytest.raises(LabError, match="calibrate="):
        NORA.attach(battery.base(), NORA.knobs(outer="gradient"), ["q"])
    from peft import get_peft_model

    with pytest.raises(LabError, match="METHODS"):
        get_peft_model(battery.base(), NoraConfig(outer="activation", target_modules=["q"]))


def test_file_holds_the_inner_factors_alone(tmp_path):
    made = NORA.attach(battery.base(), NORA.knobs(r_outer=8, r_inner=2), ["q", "k"])
    made.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(v.numel() for k, v in tensors.items() if "inner" in k) == 2 * (2 * 8 * 2)
    assert not any("outer" in k or "start" in k for k in tensors)
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * 2 * 2 * 8 * 2 + 8192 + sum(len(k) for k in tensors)
    made = NORA.attach(battery.base(), NORA.knobs(r_outer=8, r_inner=2, save_outer=True), ["q", "k"])
    made.save_pretrained(tmp_path / "b")
    assert any("outer_b" in k for k in load_file(tmp_path / "b" / "adapter_model.safetensors"))
    assert adapters.load(battery.base(seed=9), tmp_path / "b") is not None  # nothing is made again from W


def test_another_base_is_refused(tmp_path):
    NORA.attach(battery.base(), NORA.knobs(r_outer=8, r_inner=2), ["q", "k"]).save_pretrained(tmp_path)
    with pytest.raises(LabError, match="another base: layer"):
        adapters.load(battery.base(seed=9), tmp_path)
    permuted = battery.base()
    permuted.q.weight.data = permuted.q.weight.data.flip(0)
    with pytest.raises(LabError, match="layer q"):
        adapters.load(permuted, tmp_path)


def test_files_that_were_changed_are_refused(tmp_path):
    model = NORA.attach(battery.base(), NORA.knobs(r_outer=8, r_inner=2), ["q", "k"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-5])
    with pytest.raises(LabError, match="damaged or incomplete"):
        adapters.load(battery.base(), tmp_path)
    flipped = bytearray(whole)
    at = whole.index(b"}}") + 40
    flipped[at] ^= 1
    file.write_bytes(bytes(flipped))
    with pytest.raises(LabError, match=r"checksum|NaN"):
        adapters.load(battery.base(), tmp_path)
    key = next(k for k in tensors if "inner_b" in k)
    save_file({k: v for k, v in tensors.items() if k != key}, file)
    with pytest.raises(LabError, match="checksum"):
        adapters.load(battery.base(), tmp_path)
    save_file(tensors | {key: tensors[key] * float("nan")}, file)
    with pytest.raises(LabError, match="NaN"):
        adapters.load(battery.base(), tmp_path)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NOTHING"}))
    with pytest.raises(LabError, match="NOTHING"):
        adapters.load(battery.base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(LabError, match="cannot be read"):
        adapters.load(battery.base(), tmp_path)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"r_outer": 33}, r"r_outer is 33, but layer q is 48×32"),
        ({"r_outer": 4, "r_inner": 5}, r"r_inner is 5, more than r_outer 4 on layer q"),
        ({"r_inner": 0}, r"r_inner must be at least 1, got 0"),
        ({"r_outer": 2.5}, r"whole number or a fraction below 1"),
        ({"outer": "pca"}, r"outer must be one of"),
        ({"r_outer": "four"}, r"r_outer must be a number"),
        ({"rank": 4}, r"Unknown setting 'rank'"),
    ],
)
def test_bad_settings(knobs, message):
    model = battery.base()
    before = battery.weights(model)
    with pytest.raises(LabError, match=message):
        NORA.attach(model, NORA.knobs.parse(knobs), ["q", "k"])
    assert set(battery.weights(model)) == set(before), "a refused adapter left something on the base"


def test_fractional_rank():
    layer = Layer("x", 640, 2048)
    assert NORA.outer_rank(layer, NORA.knobs(r_outer=0.8)) == 512
    assert NORA.count([layer], NORA.knobs(r_outer=0.5, r_inner=4)) == 2 * 320 * 4


def test_config_is_public_and_positional():
    config = NoraConfig(8, 2, target_modules=["q"])
    assert (config.r_outer, config.r_inner, config.peft_type) == (8, 2, "NORA")
    with pytest.raises(LabError, match="r_inner"):
        NoraConfig(8, 0)


def test_two_adapters_merge_together_and_come_off():
    x = battery.inputs()
    model = battery.shaken(NORA.attach(battery.base(), NORA.knobs(r_outer=8, r_inner=2), ["q", "k"]))
    NORA.attach(model, NORA.knobs(r_outer=4, r_inner=1), ["q"], adapter_name="second")
    with torch.no_grad():
        model.base_model.model.q.nora_inner_b["second"].add_(0.1)
    model.base_model.set_adapter(["default", "second"])
    both = model.eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.q.get_base_layer().weight, battery.base().q.weight)
    model.delete_adapter("second")
    assert "second" not in model.peft_config
    merged = model.merge_and_unload()
    assert type(merged.q) is nn.Linear


# -- factorisation ----------------------------------------------------------------------------------------------
def spectra(m, n, kind):
    g = torch.Generator().manual_seed(5)
    if kind == "random":
        return torch.randn(m, n, generator=g)
    r = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(s, r, generator=g, dtype=torch.float64))[0] for s in (m, n))
    S = (
        torch.logspace(0, -3, r, dtype=torch.float64)
        if kind == "decaying"
        else torch.logspace(0, -12, r, dtype=torch.float64)
    )
    return ((U * S) @ V.T).float()


@pytest.mark.parametrize("kind", ["random", "decaying", "singular"])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (30, 70), (70, 30)])
def test_fast_factorisation_is_as_accurate_as_svd(m, n, kind):
    W = spectra(m, n, kind)
    exact, fast = svd.exact(W), svd.factorise(W)
    r = 20
    torch.testing.assert_close(fast.S[:r], exact.S[:r], rtol=1e-5, atol=1e-7)
    for side in (fast.U[:, :r], fast.Vh[:r].T):
        torch.testing.assert_close(side.T @ side, torch.eye(r), rtol=1e-5, atol=1e-5)
    if kind != "singular":  # below single precision's reach singular vectors are noise, in either way
        torch.testing.assert_close(
            fast.U[:, :r] @ fast.U[:, :r].T, exact.U[:, :r] @ exact.U[:, :r].T, atol=2e-4, rtol=0
        )
    rest = (W - (fast.U[:, :r] * fast.S[:r]) @ fast.Vh[:r]).norm()
    best = (W - (exact.U[:, :r] * exact.S[:r]) @ exact.Vh[:r]).norm()
    assert rest <= best * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize(("m", "n"), [(300, 300), (256, 400), (400, 256)])
def test_leading_triplets_without_the_rest(m, n):
    W, r = spectra(m, n, "decaying"), 24
    exact, fast, plain = svd.exact(W), svd.leading(W, r), torch.linalg.svd(W, full_matrices=False)
    assert fast is not None
    torch.testing.assert_close(fast.S, exact.S[:r], rtol=1e-5, atol=1e-7)

    def off(U):
        Q = exact.U[:, :r].double()
        return torch.linalg.matrix_norm(U.double() - Q @ (Q.T @ U.double()), ord=2)

    assert off(fast.U) < max(2 * off(plain[0][:, :r]), 5e-6)
    flat = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))[0]
    assert torch.equal(svd.cut(W, r).U, fast.U)
    assert svd.cut(flat, r).S.allclose(torch.ones(r), atol=1e-5)  # no gap anywhere: the full way takes over


def test_many_at_once_are_the_same_ones():
    weights = [spectra(40 + i, 30, "decaying") for i in range(5)]
    alone = [svd.basis(W, 7, cache=False) for W in weights]
    torch.set_num_threads(2)
    together = svd.bases(weights, [7] * 5, cache=False)
    assert torch.get_num_threads() == 2
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_basis_is_cached_and_a_broken_cache_is_no_error(monkeypatch):
    W = spectra(30, 20, "decaying")
    first = svd.basis(W, 6)
    (file,) = svd.cache_folder().glob("*.safetensors")
    monkeypatch.setattr(svd, "factorise", lambda *_: pytest.fail("computed again"))
    assert all(torch.equal(a, b) for a, b in zip(svd.basis(W, 6), first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(svd.basis(copy.deepcopy(W), 6), first, strict=True))
    monkeypatch.undo()
    file.write_bytes(b"not a file of tensors")
    assert torch.equal(svd.basis(W, 6).U, first.U)


def test_signs_follow_the_rule():
    for found in (svd.basis(spectra(25, 25, "random"), 25), svd.exact(spectra(9, 14, "random"))):
        top = found.U.abs().argmax(dim=0)
        assert (found.U.gather(0, top[None])[0] > 0).all()
