"""NOLA and PRANC: the generator's committed values, the bases, slow transcriptions, quantised files."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lab import counter
from lab.errors import LabError
from lab.methods import METHODS, NolaConfig, PrancConfig, _basis, _codes, adapters
from lab.methods.nola import near_square
from lab.methods.spec import Layer
from tests import methods_battery as battery

NOLA, PRANC = METHODS["nola"], METHODS["pranc"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# -- the generator ------------------------------------------------------------------------------------------------
def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x735A2D97 & 0xFFFFFFFF
    return x ^ x >> 15


def word(key: int, stream: int, position: int) -> int:
    """The generator in Python's unbounded integers."""
    low, high = key & 0xFFFFFFFF, key >> 31 & 0xFFFFFFFF
    return mix(mix(position ^ low) ^ mix((mix(stream ^ high) + low) & 0xFFFFFFFF))


def test_words_equal_plain_integers():
    key = counter.key("test", 7)
    found = counter.words(key, range(3, 6), range(1000, 1009))
    wanted = [[word(key, s, p) for p in range(1000, 1009)] for s in range(3, 6)]
    assert (found.long() & 0xFFFFFFFF).tolist() == wanted


def test_committed_checksum():
    """A file trained anywhere must mean the same everywhere: these values may never change."""
    assert counter.key("nola", 0, "to_q", "a") == 991117448509615952
    data = counter.words(counter.key("checksum"), range(64), range(4096)).numpy()
    assert hashlib.sha256(data.astype("<i4").tobytes()).hexdigest() == CHECKSUM_WORDS
    rows = _basis.vectors("hadamard", 16, counter.key("checksum"), 100)
    assert hashlib.sha256(torch.signbit(rows).byte().numpy().tobytes()).hexdigest() == CHECKSUM_HADAMARD


CHECKSUM_WORDS = "d7a6f84abd4808bce2d7401cdcfedb9c8732cb98ffa943335195caefade2d3b4"
CHECKSUM_HADAMARD = "24716495e11a5ca66ed194d0b5b7aeb876cee2f46cb40ebaea9934ff7234a8cf"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU's numbers with the CPU's")
def test_the_same_on_a_gpu():
    key = counter.key("gpu")
    here, there = (counter.words(key, range(100), range(5000), d) for d in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())


def test_the_same_in_any_chunks_and_after_any_global_seed(monkeypatch):
    c = torch.randn(37)
    whole = _basis.combine(c, "uniform", 11, 1001)
    torch.manual_seed(123)
    monkeypatch.setattr(_basis, "CHUNK", 256)
    torch.testing.assert_close(_basis.combine(c, "uniform", 11, 1001), whole, rtol=1e-5, atol=1e-6)
    bytes_ = counter.uniform_bytes(5, range(9), range(64))
    assert torch.equal(counter.uniform_bytes(5, range(4, 9), range(32, 64)), bytes_[4:, 32:])


def test_words_look_random():
    bits = counter.words(counter.key("random"), range(64), range(4096))
    for i in range(32):
        assert abs(((bits >> i) & 1).float().mean() - 0.5) < 0.005
    u = counter.uniform(counter.key("uniform"), range(50), range(10_000))
    assert abs(u.mean()) < 3e-3
    assert abs(u.var() - 1 / 3) < 3e-3
    assert abs(torch.corrcoef(u).fill_diagonal_(0)).max() < 0.06


# -- bases ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["uniform", "hadamard"])
def test_combination_and_its_gradient_equal_the_explicit_sum(basis):
    k, size = 23, 300
    V = _basis.vectors(basis, k, 99, size)
    c = torch.randn(k, requires_grad=True)
    g = torch.randn(size)
    out = _basis.combine(c, basis, 99, size)
    torch.testing.assert_close(out, c.detach() @ V, rtol=1e-4, atol=1e-5)
    out.backward(g)
    torch.testing.assert_close(c.grad, V @ g, rtol=1e-4, atol=1e-5)
    assert 0.8 < V.var() * 3 * k < 1.2


def test_uniform_is_the_papers():
    k, size = 10, 40
    V = _basis.vectors("uniform", k, 5, size)
    torch.testing.assert_close(V, counter.uniform(5, range(k), range(size)) / math.sqrt(k), rtol=1e-5, atol=1e-6)
    assert V.abs().max() < 1 / math.sqrt(k)


@given(a=st.integers(0, 9), k=st.integers(1, 40), key=st.integers(0, 2**62 - 1))
@settings(max_examples=25, deadline=None)
def test_hadamard_rows_are_orthogonal(a, k, key):
    size = 1 << a
    k = min(k, size)
    V = _basis.vectors("hadamard", k, key, size).double()
    torch.testing.assert_close(V @ V.T * (3 * k / size), torch.eye(k, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_hadamard_rows_are_nearly_orthogonal_at_any_size():
    for size in (33, 300, 1280):
        k = 20
        V = _basis.vectors("hadamard", k, 3, size).double()
        G = V @ V.T * (3 * k / size) - torch.eye(k)
        assert G.abs().max() <= 32 / size + 1e-5
        assert torch.linalg.matrix_rank(V) == k


def test_a_pair_in_one_transform_is_the_same():
    c = [torch.randn(k, requires_grad=True) for k in (12, 20)]
    d = [x.detach().clone().requires_grad_() for x in c]
    g = [torch.randn(size) for size in (200, 150)]
    maps = _basis.pair((12, 20), "hadamard", (5, 6), (200, 150), torch.device("cpu"), 1 << 20)
    pair = _basis.combine_pair(*c, maps)
    single = [_basis.combine(x, "hadamard", key, size) for x, key, size in zip(d, (5, 6), (200, 150), strict=True)]
    for a, b in zip(pair, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(pair, g)
    torch.autograd.backward(single, g)
    for a, b in zip(c, d, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("counts", "sizes"), [((12, 20), (200, 152)), ((300, 300), (3000, 900)), ((1200, 5), (1200, 64))]
)
def test_two_uniform_bases_read_together_are_the_same(counts, sizes):
    c, g = [torch.randn(k) for k in counts], [torch.randn(size) for size in sizes]
    found = []
    for limit in (0, 1 << 30, 1 << 30):  # made each time, kept, found again: bit for bit the same
        maps = _basis.pair(counts, "uniform", (5, 6), sizes, torch.device("cpu"), limit, gain=0.25)
        with torch.inference_mode(limit == 0):  # what that mode leaves behind must be usable outside it
            found.append([x.clone() for x in (*maps.forward(*c), *maps.backward(*g))])
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[0], strict=True))
    V, W = (_basis.vectors("uniform", k, key, size) for k, key, size in zip(counts, (5, 6), sizes, strict=True))
    slow = c[0] @ V, c[1] @ W * 0.25, V @ g[0], W @ g[1] * 0.25
    for a, b in zip(found[0], slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_transform_is_walsh_hadamards():
    for a in range(9):
        size = 1 << a
        H = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])
        x = torch.randn(size)
        torch.testing.assert_close(_basis.transform(x), H @ x, rtol=1e-4, atol=1e-4)
    x = torch.randn(1 << 15)
    torch.testing.assert_close(_basis.transform(_basis.transform(x)) / (1 << 15), x, rtol=1e-3, atol=1e-4)


def test_cache_gives_the_same_and_keeps_to_its_limit(monkeypatch):
    monkeypatch.setattr(_basis, "cache", _basis.Cache())
    c = torch.randn(20)
    plain = [_basis.combine(c, "uniform", key, 500) for key in range(5)]
    for _ in range(2):
        cached = [_basis.combine(c, "uniform", key, 500, 25_000) for key in range(5)]
        assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    assert _basis.cache.bytes == 20_000


# -- NOLA -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("basis", ["uniform", "shared", "hadamard"])
def test_nola_slow_transcription(basis):
    """ΔW = (c/r)·(Σβⱼ·Bⱼ)(A₀ + Σαᵢ·Aᵢ), every basis matrix formed and added one by one."""
    m, n, r, k, l, c, seed = 12, 10, 3, 7, 5, 2.0, 4
    layer = Layer("net.q", m, n)
    knobs = NOLA.knobs(r=r, k=k, l=l, basis=basis, c=c)
    knobs.seed = seed
    t = {"alpha": torch.randn(k), "beta": torch.randn(l)}
    kind, whose = ("hadamard" if basis == "hadamard" else "uniform"), ("12x10" if basis == "shared" else "net.q")
    A_i = _basis.vectors(kind, k, counter.key("nola", seed, whose, "a"), r * n).view(k, r, n)
    B_j = _basis.vectors(kind, l, counter.key("nola", seed, whose, "b"), m * r).view(l, m, r)
    A0 = counter.uniform(counter.key("nola", seed, whose, "a0"), range(1), range(r * n)).view(r, n) / math.sqrt(n)
    A, B = A0.clone(), torch.zeros(m, r)
    for i in range(k):
        A += t["alpha"][i] * A_i[i]
    for j in range(l):
        B += t["beta"][j] * B_j[j]
    torch.testing.assert_close(NOLA.delta(t, knobs, layer), (c / r) * B @ A, rtol=1e-4, atol=1e-5)


def test_nola_hand_worked_case():
    """1×1 layer, r = k = l = 1, uniform: ΔW = c·β·b·(a₀ + α·a) with three numbers of the generator."""
    layer, knobs = Layer("x", 1, 1), NOLA.knobs(r=1, k=1, l=1, basis="uniform", c=3.0)
    a, b, a0 = ((signed(word(counter.key("nola", 0, "x", s), 0, 0)) + 0.5) / 128 for s in ("a", "b", "a0"))
    t = {"alpha": torch.tensor([2.0]), "beta": torch.tensor([5.0])}
    assert NOLA.delta(t, knobs, layer).item() == pytest.approx(3 * 5 * b * (a0 + 2 * a), rel=1e-5)


def signed(w: int) -> int:
    byte = w & 255
    return byte - 256 if byte > 127 else byte


def test_seeds_layers_and_shared_bases_differ():
    t = {"alpha": torch.ones(4), "beta": torch.ones(4)}

    def delta(name, seed, basis):
        knobs = NOLA.knobs(r=2, k=4, l=4, basis=basis)
        knobs.seed = seed
        return NOLA.delta(t, knobs, Layer(name, 8, 8))

    for basis in ("uniform", "hadamard"):
        assert not torch.equal(delta("a", 0, basis), delta("b", 0, basis))
        assert not torch.equal(delta("a", 0, basis), delta("a", 1, basis))
    assert torch.equal(delta("a", 0, "shared"), delta("b", 0, "shared"))


def test_count_is_free_of_shape_and_rank():
    for layer in (Layer("a", 10, 10), Layer("b", 5000, 300), Layer("c", 64, 32, (3, 3))):
        for r in (1, 8):
            assert NOLA.count([layer] * 3, NOLA.knobs(r=r, k=100, l=50)) == 450
    assert PRANC.count([Layer("a", 10, 10)] * 2, PRANC.knobs(k=30)) == 60


def test_convolutions_take_the_nearest_to_square_shape():
    assert near_square(16 * 8 * 9) == (32, 36)
    assert near_square(320 * 320 * 9) == (960, 960)
    assert near_square(13) == (1, 13)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_packing_is_exact(bits):
    codes = torch.randint(0, 2**bits, (101,), dtype=torch.uint8)
    packed = _codes.pack(codes, bits)
    assert packed.numel() == math.ceil(101 * bits / 8)
    assert torch.equal(_codes.unpack(packed, bits, 101), codes)


def test_quantiser():
    x = torch.tensor([-1.0, -0.4, 0.1, 2.0])
    codes, low, step = _codes.quantise(x, 2)
    assert codes.tolist() == [0, 1, 1, 3]
    assert (low.item(), step.item()) == (-1.0, 1.0)
    y = x.clone().requires_grad_()
    _codes.fake_quantise(y, 2).sum().backward()
    assert y.grad.tolist() == [1, 1, 1, 1]
    zero = torch.zeros(5)
    assert torch.equal(_codes.fake_quantise(zero, 4), zero)


@pytest.mark.parametrize("quant", ["ptq", "qat"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_quantised_files(bits, quant, tmp_path):
    knobs = NOLA.knobs(r=4, k=40, l=30, quant_bits=bits, quant=quant)
    model = battery.shaken(NOLA.attach(battery.base(), knobs, ["q", "k"], seed=6)).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["nola_packed_codes"].numel() == math.ceil(140 * bits / 8)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1024
    loaded = adapters.load(battery.base(), tmp_path)
    x = battery.inputs()
    if quant == "qat":
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    else:
        change, error = model(x) - battery.base()(x), loaded(x) - model(x)
        assert error.norm() < {8: 0.02, 4: 0.3, 3: 0.5, 2: 1.2}[bits] * change.norm()
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(again["nola_packed_codes"], tensors["nola_packed_codes"])


def test_a_packed_file_of_another_model_is_refused(tmp_path):
    NOLA.attach(battery.base(), NOLA.knobs(r=4, k=40, l=30, quant_bits=4), ["q", "k"]).save_pretrained(tmp_path)
    other = nn.Sequential()
    other.add_module("q", nn.Linear(32, 48))
    with pytest.raises(LabError, match="another"):
        adapters.load(other, tmp_path)


def test_qat_trains():
    knobs = NOLA.knobs(r=4, k=64, l=64, quant_bits=3, quant="qat")
    model = NOLA.attach(battery.base(), knobs, ["q", "k"])
    losses = battery.train(NOLA, model, lr=3e-2)
    assert losses[-1] < 0.97 * losses[0]


def test_pranc_slow_transcription():
    layer = Layer("net.v", 6, 5)
    for basis in ("uniform", "hadamard"):
        knobs = PRANC.knobs(k=9, basis=basis, scale=2.0)
        knobs.seed = 3
        alpha = torch.randn(9)
        V = _basis.vectors(basis, 9, counter.key("pranc", 3, "net.v"), 30)
        wanted = 2.0 * sum(alpha[i] * V[i] for i in range(9)).view(6, 5)
        torch.testing.assert_close(PRANC.delta({"alpha": alpha}, knobs, layer), wanted, rtol=1e-4, atol=1e-5)
    assert PRANC.kind_of_basis(Layer("a", 64, 64), PRANC.knobs(k=256)) == "uniform"
    assert PRANC.kind_of_basis(Layer("a", 1280, 1280), PRANC.knobs(k=256)) == "hadamard"


def test_memory_of_a_uniform_basis_stays_within_a_chunk(monkeypatch):
    """No tensor of the basis's size is made, forward or backward."""
    monkeypatch.setattr(_basis, "CHUNK", 4096)
    largest = 0
    plain = counter.words

    def watched(*args):
        nonlocal largest
        made = plain(*args)
        largest = max(largest, made.numel() * 4)
        return made

    monkeypatch.setattr(counter, "words", watched)
    c = torch.randn(200, requires_grad=True)
    _basis.combine(c, "uniform", 1, 5000).sum().backward()
    assert largest <= 4096


def test_public_configurations():
    config = NolaConfig(4, 10, 20, 7, "shared", target_modules=["q"])
    assert (config.r, config.k, config.l, config.seed, config.basis) == (4, 10, 20, 7, "shared")
    config = PrancConfig(10, 7, "hadamard")
    assert (config.k, config.seed, config.basis) == (10, 7, "hadamard")


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (NOLA, {"k": 0}, "k must be at least 1, got 0"),
        (NOLA, {"r": 33}, "r is 33, but layer q is 48×32"),
        (NOLA, {"r": 1, "k": 33}, "k is 33, more than the 32 entries"),
        (NOLA, {"quant_bits": 5}, "quant_bits must be 8, 4, 3, 2"),
        (NOLA, {"basis": "dct"}, "basis must be one of"),
        (PRANC, {"k": 0}, "k must be at least 1, got 0"),
        (PRANC, {"k": 1537, "basis": "hadamard"}, "k is 1537, more than the 1536 entries of layer q"),
    ],
)
def test_bad_settings(method, knobs, message):
    with pytest.raises(LabError, match=message):
        method.attach(battery.base(), method.knobs.parse(knobs), ["q", "k"])
