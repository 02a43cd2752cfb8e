"""Merging adapters: exact against dense sums and against PEFT's own weighted adapters."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from lab.cli import main
from lab.errors import LabError
from lab.merge import HOW, check, merge, save
from lab.methods import METHODS
from lab.methods.deltas import Delta, deltas
from tests.compress_helpers import dense, fox_file, low_rank, net  # noqa: F401 - fox_file is a fixture

pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


def one(seed=1):
    return {
        "block.to_q": low_rank(32, 24, 3, seed),
        "block.conv1": low_rank(16, 36, 2, seed + 1, (16, 4, 3, 3)),
    }


def other(seed=5):
    return one(seed) | {"block.to_k": low_rank(16, 24, 4, seed + 2)}


def full(seed=8):
    change = torch.randn(32, 24, generator=torch.Generator().manual_seed(seed))
    return {"block.to_q": Delta(lambda: change, lambda: None)}


def made(merged, tmp_path):
    """The update that PEFT reads from the saved folder."""
    save(merged, tmp_path, "small")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "small"
    return {n: dense(d) for n, d in deltas(PeftModel.from_pretrained(net(), str(tmp_path))).items()}


def summed(adapters, weights):
    found = {}
    for updates, weight in zip(adapters, weights, strict=True):
        for name, delta in updates.items():
            found[name] = found.get(name, 0) + weight * dense(delta)
    return found


def test_concatenation_is_the_weighted_sum(tmp_path):
    merged = merge({"a": one(), "b": other()}, [0.7, -1.5], "concat")
    assert merged.relative_error < 1e-6
    assert {r["layer"]: r["rank"] for r in merged.layers} == {"block.to_q": 6, "block.conv1": 4, "block.to_k": 4}
    wanted = summed([one(), other()], [0.7, -1.5])
    for name, update in made(merged, tmp_path).items():
        assert (update - wanted[name]).norm() < 1e-6 * wanted[name].norm()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_is_the_best_of_its_rank(rank, tmp_path):
    adapters = {"a": one(), "b": other(), "c": full()}
    merged = merge(adapters, [0.5, 0.3, 0.2], "svd", rank=rank)
    wanted = summed(adapters.values(), [0.5, 0.3, 0.2])
    lost = sum(float(torch.linalg.svdvals(x)[rank:].square().sum()) for x in wanted.values())
    whole = sum(float(x.square().sum()) for x in wanted.values())
    assert merged.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert merged.from_sum == merged.relative_error
    read = made(merged, tmp_path)
    off = sum(float((read[n] - x).square().sum()) for n, x in wanted.items())
    assert (off / whole) ** 0.5 == pytest.approx(merged.relative_error, rel=1e-5)


def test_svds_default_rank_is_the_largest_of_theirs():
    assert merge({"a": one(), "b": other()}, None, "svd").factors.rank == 4
    assert merge({"a": one(), "c": full()}, None, "svd").factors.rank == 24


def lora(network, seed, name):
    method = METHODS["lora"]
    model = method.attach(network, method.knobs.parse({"r": 4}), ["to_q", "to_k"], seed=seed, adapter_name=name)
    draw = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if f".{name}." in n:
            p.data = torch.randn(p.shape, generator=draw)
    return model


@pytest.mark.parametrize(("how", "theirs"), [("svd", "svd"), ("ties", "ties_svd"), ("dare", "dare_linear_svd")])
def test_the_same_as_pefts_weighted_adapter(how, theirs):
    model = lora(lora(net(), 1, "a"), 2, "b")
    adapters = {name: {n: Delta(lambda d=d: d, lambda: None) for n, d in
                       ((n, x.dense().clone()) for n, x in deltas(model, name).items())} for name in ("a", "b")}  # fmt: skip
    density = 1.0 if how == "dare" else 0.4  # PEFT draws from torch's own generator: only without drops the same
    model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "both", combination_type=theirs, svd_rank=3, density=density)
    merged = merge(adapters, [0.6, 0.4], how, rank=3, density=density)
    for name, delta in deltas(model, "both").items():
        B, A = merged.factors.pairs[name]
        assert (B @ A - delta.dense()).norm() < 1e-4 * delta.dense().norm()


def test_ties_says_how_far_it_is_from_the_sum():
    merged = merge({"a": one(), "b": one(7)}, None, "ties", density=0.3, rank=24)
    assert merged.relative_error < 1e-5  # all ranks are kept
    assert merged.from_sum > 0.1


def test_dare_drops_and_divides_and_is_the_same_again():
    merged = merge({"a": full(1), "b": full(2)}, [1.0, 1.0], "dare", density=0.25, rank=24, seed=3)
    B, A = merged.factors.pairs["block.to_q"]
    a, b = (4 * dense(full(s)["block.to_q"]) for s in (1, 2))
    choices = torch.stack([torch.zeros_like(a), a, b, a + b])
    assert ((B @ A - choices).abs().amin(0) < 1e-4).all()
    dropped = ((B @ A).abs() < 1e-4).float().mean()
    assert 0.45 < dropped < 0.67  # 0.75²
    again, third = (
        merge({"a": full(1), "b": full(2)}, [1.0, 1.0], "dare", density=0.25, rank=24, seed=s) for s in (3, 4)
    )
    assert torch.equal(again.factors.pairs["block.to_q"][0], B)
    assert not torch.equal(third.factors.pairs["block.to_q"][0], B)


def test_random_numbers_of_others_are_left_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    merge({"a": full(1), "b": full(2)}, None, "dare")
    assert torch.equal(torch.rand(3), wanted)


SHAPES = {"block.to_q": (32, 24), "block.conv1": (16, 4, 3, 3)}
BAD = {
    "one adapter": (lambda: merge({"a": one()}), "2 to 8"),
    "weights": (lambda: merge({"a": one(), "b": one()}, [1.0]), "one weight for each"),
    "weight not finite": (lambda: merge({"a": one(), "b": one()}, [1.0, float("nan")]), "-100 to 100"),
    "no weight": (lambda: merge({"a": one(), "b": one()}, [0, 0]), "All weights are 0"),
    "unknown way": (lambda: merge({"a": one(), "b": one()}, None, "slerp"), "slerp"),
    "rank": (lambda: merge({"a": one(), "b": one()}, None, "svd", rank=0), "rank must be"),
    "density": (lambda: merge({"a": one(), "b": one()}, None, "ties", density=0), "density"),
    "rank of concat": (lambda: merge({"a": one(), "b": one()}, None, "concat", rank=2), "Concatenation"),
    "no factors": (lambda: merge({"a": one(), "b": full()}, None, "concat"), "no factors"),
    "other layers": (lambda: merge({"a": one(), "b": {"x.y": low_rank(4, 4, 1, 0)}}), "no layer in common"),
    "other shapes": (lambda: merge({"a": one(), "b": {"block.to_q": low_rank(64, 24, 1, 0)}}), "different bases"),
    "not the base's": (lambda: merge({"a": one(), "b": other()}, shapes=SHAPES), "does not have"),
    "cancels": (lambda: merge({"a": one(), "b": one()}, [1, -1], "svd"), "cancel"),
    "empty": (lambda: merge({"a": one(), "b": {}}), "changes no layer"),
    "not finite": (
        lambda: merge(
            {"a": one(), "b": {"block.to_q": Delta(lambda: torch.full((32, 24), float("inf")), lambda: None)}}
        ),
        "NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_sentence(case):
    make, words = BAD[case]
    with pytest.raises(LabError, match=words) as problem:
        make()
    assert "\n" not in str(problem.value)


def test_settings_are_checked_before_files_are_read():
    assert check(4, None, "ties", None, 0.5) == [0.25] * 4
    assert set(HOW) == {"concat", "svd", "ties", "dare"}


# -- files and the command line -----------------------------------------------------------------------------------
def test_command_line_merges_and_exports(fox, tmp_path, capsys):
    from safetensors.torch import load_file

    from lab.adapter_files import read
    from lab.export import export

    out = tmp_path / "both"
    assert main(["merge", fox, fox, "--weights", "0.5,1", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["relative_error"] < 1e-6
    assert [a["weight"] for a in found["adapters"]] == [0.5, 1.0]
    assert len({a["name"] for a in found["adapters"]}) == 2
    assert found["base"] == "tiny-sdxl"
    before, after = read(fox).updates, read(out).updates
    assert set(before) == set(after)
    for name, update in after.items():
        assert (update.dense() - 1.5 * before[name].dense()).norm() < 1e-5 * update.dense().norm()
    (file,) = export(out, "kohya", tmp_path / "both.safetensors")["files"]
    assert {k.rpartition(".lora_")[0] for k in load_file(file) if ".lora_down" in k} == {
        k.rpartition(".lora_")[0] for k in load_file(fox) if ".lora_down" in k
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--weights", "1"], "one weight"),
        (["--weights", "a,b"], "numbers"),
        (["--density", "2", "--how", "dare"], "density"),
    ],
)
def test_command_line_bad_input(fox, words, said, tmp_path, capsys):
    assert main(["merge", fox, fox, *words, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_text_encoders_are_merged_into_a_folder_that_loads(small_sdxl, tmp_path):
    from lab.adapter_files import read
    from lab.compress import compress
    from lab.compress._files import network
    from lab.merge import merge_files

    names = [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ]
    goals = {name: low_rank(d, d, 2, d) for name, d in zip(names, (32, 64), strict=True)}
    compress(network(small_sdxl, goals), goals, "lora", None, tmp_path / "one", given={"r": 2}, base="small-sdxl")
    found = merge_files([tmp_path / "one"] * 2, [1.0, 0.5], "concat", tmp_path / "both", base="small-sdxl")
    assert found["relative_error"] < 1e-6
    both = read(tmp_path / "both", "small-sdxl").updates
    assert set(both) == set(names)
    for name in names:
        assert (both[name].dense() - 1.5 * goals[name].dense()).norm() < 1e-5 * both[name].dense().norm()
    made = deltas(PeftModel.from_pretrained(network(small_sdxl, goals), str(tmp_path / "both")))
    assert len(made) == 2
