"""The X-ray's numbers against numbers computed the slow way; the store of files; the page's handlers; the command."""

from __future__ import annotations

import csv
import io
import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file

from lab import adapter_store, architectures, svd
from lab.adapter_files import read
from lab.adapter_store import Chosen
from lab.base_weights import weights
from lab.bases import BASES
from lab.cli import main
from lab.errors import LabError
from lab.methods.deltas import Delta
from lab.plots import PLOTS
from lab.runs import Store
from lab.ui import _xray_html, xray
from lab.xray import apart, child, measure, report
from lab.xray.places import order, place, rank_of

NAMES = [f"down_blocks.1.attentions.0.transformer_blocks.0.{p}" for p in ("attn1.to_q", "attn2.to_k", "ff.net.2")]
CONV = "down_blocks.1.resnets.0.conv1"


pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter(path, seed=0, gain=0.1, r=3, names=(*NAMES, CONV)):
    """A diffusers LoRA on some of the embedded base's layers."""
    base, tensors = weights("tiny-sdxl"), {}
    for i, name in enumerate(names):
        m, n, *kernel = base.shape(name)
        tensors[f"unet.{name}.lora_A.weight"] = draw(r, n, *kernel, seed=100 * seed + i)
        tensors[f"unet.{name}.lora_B.weight"] = (
            gain * (i + 1) * draw(m, r, *[1] * len(kernel), seed=100 * seed + 50 + i)
        )
    save_file(tensors, path)
    return path


def low_rank(m=24, n=16, r=3, seed=0):
    B, A = draw(m, r, seed=seed), draw(r, n, seed=seed + 1)
    return Delta(lambda: B @ A, lambda: (B, A)), B @ A


# -- spectra --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("m", "n", "r"), [(24, 16, 3), (16, 24, 3), (16, 16, 20), (5, 40, 5), (30, 1, 1)])
@pytest.mark.parametrize("factored", [True, False])
def test_singular_triplets(m, n, r, factored):
    delta, W = low_rank(m, n, r)
    found = measure.decompose(delta if factored else Delta(delta.dense, lambda: None))
    wanted = torch.linalg.svdvals(W.double())[: min(m, n, r)]
    assert torch.allclose(found.S, wanted, rtol=1e-5, atol=1e-6 * float(wanted[0]))
    assert torch.allclose((found.U * found.S) @ found.Vh, W.double(), atol=1e-5)
    eye = torch.eye(len(found.S), dtype=torch.double)
    assert torch.allclose(found.U.T @ found.U, eye, atol=1e-6)
    assert torch.allclose(found.Vh @ found.Vh.T, eye, atol=1e-6)


def test_factors_are_never_laid_out():
    delta, _ = low_rank()

    def dense():
        raise AssertionError("the m × n matrix was made")

    measure.decompose(Delta(dense, delta.factors))


def test_numbers_of_known_spectra():
    flat = measure.numbers(torch.full((7,), 2.0, dtype=torch.double))
    assert flat["effective_rank"] == pytest.approx(7)
    assert flat["stable_rank"] == pytest.approx(7)
    assert (flat["rank"], flat["directions_90"]) == (7, 7)
    assert flat["norm"] == pytest.approx(2 * math.sqrt(7))
    S = torch.tensor([3.0, 1.0], dtype=torch.double)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    two = measure.numbers(S)
    assert two["effective_rank"] == pytest.approx(math.exp(entropy))
    assert two["stable_rank"] == pytest.approx(10 / 9)
    assert two["directions_90"] == 1
    assert measure.numbers(torch.zeros(0))["effective_rank"] == 0


def test_points_keep_the_ends():
    S = torch.linspace(5, 1, 1000)
    found = measure.points(S)
    assert found[0] == [1, 5.0]
    assert found[-1] == [1000, 1.0]
    assert len(found) < 130
    assert [i for i, _ in found] == sorted({i for i, _ in found})


# -- beside the base --------------------------------------------------------------------------------------------
def test_share_in_the_leading_directions_of_the_base():
    W = draw(20, 30, seed=5)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    B, A = (U[:, :2] @ torch.diag(torch.tensor([3.0, 1.0]).double())).float(), Vh[[0, 15]].float()
    found = measure.subspace(measure.decompose(Delta(lambda: B @ A, lambda: (B, A))), W)
    assert found["k"] == 2  # a tenth of 20
    assert found["outputs"] == pytest.approx(1, abs=1e-5)
    assert found["inputs"] == pytest.approx(0.9, abs=1e-5)  # 3² of 3² + 1²
    assert found["both"] == pytest.approx(0.9, abs=1e-5)
    assert found["chance"] == {"outputs": 0.1, "inputs": pytest.approx(1 / 15), "both": pytest.approx(4 / 600)}
    assert found["curve"][-1] == [20, *(pytest.approx(1, abs=1e-5),) * 3]
    assert found["relative_norm"] == pytest.approx(math.sqrt(10) / float(W.norm()), rel=1e-4)


def test_a_random_update_has_its_chance():
    W, (delta, _) = draw(60, 60, seed=1), low_rank(60, 60, 40, seed=9)
    found = measure.subspace(measure.decompose(delta), W)
    for side in ("outputs", "inputs"):
        assert found[side] == pytest.approx(found["chance"][side], abs=0.05)


def test_intruders():
    W = draw(40, 30, seed=2)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    inside = Delta(lambda: 9 * S[0] * U[:, 3:4] @ Vh[3:4], lambda: (9 * S[0] * U[:, 3:4], Vh[3:4]))
    assert measure.intruders(measure.decompose(inside), W)["intruders"] == 0
    x, y = draw(40, 1, seed=7), draw(1, 30, seed=8)
    x, y = x / x.norm(), y / y.norm()
    new = Delta(lambda: 20 * S[0] * x @ y, lambda: (20 * S[0] * x, y))
    found = measure.intruders(measure.decompose(new), W, cosine=0.6)
    changed = torch.linalg.svd(W + 20 * S[0] * x @ y, full_matrices=False)
    slowly = [max(abs(float(u @ U[:, i])) for i in range(30)) for u in changed.U.T[:10]]
    assert [c for _, _, c in found["vectors"]] == pytest.approx(slowly, abs=1e-3)
    assert found["intruders"] == sum(c < 0.6 for c in slowly) > 0
    assert found["vectors"][0][1] == pytest.approx(float(changed.S[0]), rel=1e-4)


def test_base_directions_come_from_the_cache(tmp_path, monkeypatch):
    W, (delta, _) = draw(24, 16, seed=3), low_rank()
    with svd.cached_in(tmp_path):
        first = measure.subspace(measure.decompose(delta), W)
        monkeypatch.setattr(svd, "cut", None)
        assert measure.subspace(measure.decompose(delta), W) == first


# -- overlap ----------------------------------------------------------------------------------------------------
def test_overlap_of_known_spaces():
    Q = torch.linalg.qr(draw(20, 20).double())[0].float()
    P = torch.linalg.qr(draw(16, 16, seed=1).double())[0].float()

    def update(left, right, s=1.0):
        return measure.decompose(Delta(lambda: s * left @ right.T, lambda: (s * left, right)))

    a, same = update(Q[:, :3], P[:, :3].T.T), update(Q[:, :3], P[:, :3], -2.0)
    found = measure.overlap(a, same)
    assert (found["outputs"], found["inputs"]) == (pytest.approx(1), pytest.approx(1))
    assert found["cosine"] == pytest.approx(-1, abs=1e-5)
    assert found["outputs_chance"] == 3 / 20
    apart_ = measure.overlap(a, update(Q[:, 3:6], P[:, 5:8]))
    assert (apart_["outputs"], apart_["cosine"]) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    turned = (Q[:, :1] + Q[:, 6:7]) / math.sqrt(2)  # 45° to one of the directions
    found = measure.overlap(update(Q[:, :1], P[:, :1]), update(turned, P[:, :1]))
    assert found["outputs_cosines"] == [pytest.approx(math.cos(math.pi / 4), abs=1e-5)]
    assert found["outputs"] == pytest.approx(0.5, abs=1e-5)


def test_cosine_against_the_matrices():
    (a, A), (b, B) = low_rank(seed=1), low_rank(seed=20)
    found = measure.overlap(measure.decompose(a), measure.decompose(b))
    assert found["cosine"] == pytest.approx(float((A * B).sum() / (A.norm() * B.norm())), abs=1e-5)


# -- reports ------------------------------------------------------------------------------------------------------
def test_a_file_against_its_base(tmp_path):
    file = read(adapter(tmp_path / "fox.safetensors"))
    told = []
    result = report.analyse(file, against_base=True, tell=lambda *at: told.append(at))
    assert [row["layer"] for row in result["layers"]] == sorted([*NAMES, CONV], key=order)
    assert (result["base"], result["rank"], result["compared"]) == ("tiny-sdxl", [3, 3], 4)
    assert sum(row["energy"] for row in result["layers"]) == pytest.approx(1)
    for row in result["layers"]:
        W = file.updates[row["layer"]].dense()
        assert row["norm"] == pytest.approx(float(W.norm()), rel=1e-5)
        assert row["spectrum"][0][1] == pytest.approx(float(torch.linalg.matrix_norm(W.flatten(1), 2)), rel=1e-4)
    assert {what for _, _, what in told} == {"spectra", "the base's singular directions"}
    json.dumps(result, allow_nan=False)
    lines = list(csv.DictReader(io.StringIO(report.as_csv(result))))
    assert {line["layer"] for line in lines} == {*NAMES, CONV}
    assert next(line for line in lines if line["layer"] == CONV)["in"] == "96x3x3"
    assert all(0 <= float(line["outputs_share"]) <= 1 for line in lines)


def test_only_as_many_layers_as_there_is_time_for(tmp_path):
    result = report.analyse(read(adapter(tmp_path / "a.safetensors")), against_base=True, seconds=0.0)
    assert result["compared"] == 1
    most = max(result["layers"], key=lambda row: row["norm"])
    assert [row["layer"] for row in result["layers"] if "subspace" in row] == [most["layer"]]
    assert report.as_csv(result).count(",,") > 0


def test_an_untrained_adapter(tmp_path):
    result = report.analyse(read(adapter(tmp_path / "a.safetensors", gain=0.0)), against_base=True)
    assert result["norm"] == 0
    assert "changes no weight" in result["notes"][-1]
    json.dumps(result, allow_nan=False)


def test_pairs_of_adapters(tmp_path):
    files = [read(adapter(tmp_path / f"{i}.safetensors", seed=i)) for i in (0, 1)] + [read(tmp_path / "0.safetensors")]
    result = report.compare(files)
    by = {(p["a"], p["b"]): p for p in result["pairs"]}
    assert set(by) == {(0, 1), (0, 2), (1, 2)}
    assert (by[0, 2]["outputs"], by[0, 2]["cosine"]) == (pytest.approx(1, abs=1e-5),) * 2
    assert by[0, 1]["outputs"] < 0.3
    assert len(by[0, 1]["layers"]) == 4
    with pytest.raises(LabError, match="at least two"):
        report.compare(files[:1])
    other = read(
        adapter(tmp_path / "o.safetensors", names=["up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])
    )
    with pytest.raises(LabError, match="no layer in common"):
        report.compare([files[0], other])
    wide = {f"unet.{NAMES[1]}.lora_A.weight": draw(2, 768), f"unet.{NAMES[1]}.lora_B.weight": draw(640, 2)}
    save_file(wide, tmp_path / "w.safetensors")
    with pytest.raises(LabError, match="different bases"):
        report.compare([files[0], read(tmp_path / "w.safetensors")])


@pytest.mark.parametrize("id", architectures.ids())
def test_every_layer_has_a_place_of_its_own(id):
    names = [row.layer.name for row in architectures.load(id).rows]
    assert len({place(name) for name in names}) == len(names)
    assert len({place(name)[1] for name in names}) <= 20


def test_places_read_as_people_write_them():
    assert place(NAMES[0]) == ("down 1 · 0.0", "attn1.to_q")
    assert place("mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0") == ("mid · 0.3", "attn2.to_out.0")
    text = "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj"
    assert place(text) == ("text 2 · 3", "self_attn.q_proj")
    assert place("conv_in") == ("conv_in", "conv")
    assert (
        order("mid_block.resnets.0.conv1") < order("mid_block.attentions.0.x.to_q") < order("mid_block.resnets.1.conv1")
    )
    assert order("up_blocks.2.resnets.0.conv1") < order("conv_out") < order(text)
    assert rank_of("attn1.to_q") < rank_of("attn2.to_q") < rank_of("ff.net.2") < rank_of("conv1")


# -- plots --------------------------------------------------------------------------------------------------------
def test_plots(tmp_path):
    result = report.analyse(read(adapter(tmp_path / "a.safetensors")), against_base=True)
    for _, show in xray.SHOWN:
        fig = PLOTS["xray-map"].draw(result["layers"], show=show)
        (heat,) = fig.data
        assert list(heat.x) == ["down 1 · res 0", "down 1 · 0.0"]
        assert list(heat.y) == ["attn1.to_q", "attn2.to_k", "ff.net.2", "conv1"]
        assert sum(v is not None for line in heat.z for v in line) == 4
        assert "NaN" not in fig.to_json()
    assert len(PLOTS["xray-subspace"].draw(result["layers"][:1]).data) == 4
    assert len(PLOTS["xray-spectrum"].draw([result["layers"][0] | {"name": "<b>"}]).data) == 1
    both = report.compare([read(adapter(tmp_path / f"{i}.safetensors", seed=i)) for i in (1, 2)])
    assert PLOTS["xray-overlap"].draw(both["pairs"], names=both["names"]).data[0].z[0][0] == 1
    for id in ("xray-map", "xray-spectrum", "xray-subspace", "xray-overlap"):
        assert PLOTS[id].draw([]).layout.annotations


# -- a process of its own -------------------------------------------------------------------------------------------
def test_apart_gives_the_same_and_keeps_it(tmp_path, monkeypatch):
    path = adapter(tmp_path / "fox.safetensors")
    source = apart.Source(path, "my fox")
    steps = list(apart.analyse(source))
    wanted = report.analyse(read(path, name="my fox"), against_base=True)
    assert steps[0].what == "opening"
    assert steps[-1].result is not None
    assert steps[-1].result["name"] == "my fox"
    for got, row in zip(steps[-1].result["layers"], wanted["layers"], strict=True):
        assert got["norm"] == pytest.approx(row["norm"], rel=1e-6)
    monkeypatch.setattr(apart, "_run", None)
    assert [s.result for s in apart.analyse(source)] == [steps[-1].result]


def test_apart_says_what_is_wrong(tmp_path):
    tensors = {f"unet.{NAMES[0]}.lora_{x}.weight": torch.full((2, 2), float("nan")) for x in "AB"}
    save_file(tensors, tmp_path / "n.safetensors")
    with pytest.raises(LabError, match="'mine' holds NaN"):
        list(apart.analyse(apart.Source(tmp_path / "n.safetensors", "mine")))
    with pytest.raises(LabError, match="not there any more"):
        list(apart.analyse(apart.Source(tmp_path / "gone.safetensors", "gone")))


def test_a_child_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    import subprocess

    started, popen = [], subprocess.Popen

    def watched(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", watched)
    monkeypatch.setattr(apart, "SECONDS", 0.3)  # importing torch alone takes longer
    source = apart.Source(adapter(tmp_path / "slow.safetensors"), "slow")
    with pytest.raises(LabError, match=r"more than 0\.3 s"):
        list(apart.analyse(source))
    assert started[0].returncode == -9


def test_a_child_may_take_no_more_memory_than_it_is_given(tmp_path, monkeypatch):
    """The same file: with 64 MiB there is a sentence, with the usual limit an answer. Torch is imported under the limit."""
    source = apart.Source(adapter(tmp_path / "wide.safetensors"), "wide")
    monkeypatch.setattr(apart, "MEMORY_BYTES", 64 << 20)
    with pytest.raises(LabError, match="memory"):
        list(apart.analyse(source))
    monkeypatch.undo()
    assert list(apart.analyse(source))[-1].result is not None


@pytest.mark.parametrize("make", ["numpy.ones(1 << 28)", "torch.ones(1 << 28, dtype=torch.float64)"])
def test_memory_beyond_the_limit_is_told_as_such(make):
    """2 GiB asked for under a limit of 1 GiB, in the child's own frame."""
    import subprocess
    import sys

    code = (
        "import io, json, sys, numpy, torch; from lab.xray import child;"
        f"child._answer = lambda *_: {make} is None;"
        "sys.stdin = io.StringIO(json.dumps({'memory': 1 << 30})); child.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout.splitlines()[-1]) == {"error": child.TOO_MUCH}


# -- the page's handlers ---------------------------------------------------------------------------------------------
def test_opening_on_the_page(tmp_path):
    store = Store(tmp_path / "home")
    ref = xray.keep(store, "anna", [str(adapter(tmp_path / "fox <i>.safetensors"))])
    *busy, last = xray.opened(store, "anna", ref, "", "norm")
    assert "Opening the adapter" in busy[0][0]
    assert "fox &lt;i&gt;" in last[0]
    assert "Tiny SDXL" in last[0]
    assert last[2] == ref
    assert "torch" not in _xray_html.__dict__
    (wrong,) = xray.opened(store, "bert", ref, "", "norm")
    assert "not there" in wrong[0]
    assert wrong[2] == ""
    result = xray.again(store, "anna", ref, "")
    assert "attn1.to_q" in xray.of_layer(result, NAMES[0])[3]
    assert xray.of_layer(result, "<no such>")[0].value in {*NAMES, CONV}
    with pytest.raises(LabError, match="choose another"):
        xray.source(adapter_store.chosen(store, "anna", ref), "/etc")


def test_overlap_on_the_page(tmp_path):
    store = Store(tmp_path / "home")
    refs = [xray.keep(store, "anna", [str(adapter(tmp_path / f"{i}.safetensors", seed=i))]) for i in range(3)]
    *_, last = xray.overlapped(store, "anna", refs[0], "", refs[1:], "outputs")
    assert last[0].count("<tr>") == 4
    assert "by chance" in last[0]
    *_, wrong = xray.overlapped(store, "bert", refs[0], "", refs[1:], "outputs")
    assert "not there" in wrong[0]


def test_the_base_of_a_run_is_taken(tmp_path):
    found = Chosen("run:1", "t", tmp_path, "tiny-sdxl", "lora", "c", 0)
    assert xray.source(found, "").base == "tiny-sdxl"
    assert xray.source(Chosen("run:1", "t", tmp_path, "somebody/model"), "").base == ""
    assert "tiny-sdxl" in [id for _, id in xray.bases("").choices]
    assert BASES["tiny-sdxl"] is not None


def test_the_tab_needs_no_torch():
    import subprocess

    code = "import sys; from lab.ui import xray; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the command --------------------------------------------------------------------------------------------------------
def test_the_command(tmp_path, capsys):
    paths = [str(adapter(tmp_path / f"{i}.safetensors", seed=i)) for i in range(2)]
    assert main(["xray", paths[0], "--with", paths[1], "--csv", str(tmp_path / "t.csv"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kinds"] == ["lora"]
    assert result["overlap"]["pairs"][0]["outputs"] < 0.3
    assert (tmp_path / "t.csv").read_text().startswith("layer,block,projection")
    assert main(["xray", paths[0], "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert "lora, rank 3, diffusers layout, Tiny SDXL (embedded)" in shown
    assert main(["xray", str(tmp_path / "x.ckpt")]) == 2
    assert "pickle" in capsys.readouterr().err
