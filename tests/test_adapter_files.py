"""Adapter files of every layout give the update that their own programs give, whatever else is in the file."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from lab import adapter_files, architectures, targets
from lab.adapter_files import _names, read
from lab.bases import BASES
from lab.errors import LabError
from lab.export import export
from lab.kohya import kohya_name
from lab.methods import METHODS
from lab.methods.deltas import deltas

ATTN = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


pytestmark = pytest.mark.usefixtures("module_home", "one_thread")


@pytest.fixture(scope="module")
def pipe():
    return BASES["tiny-sdxl"].load("cpu", torch.float32)


def shake(model):
    noise = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=noise) * 0.1)


def saved(model, folder, base="tiny-sdxl"):
    """The trained adapter's folder, and its updates by layer; the network is left as it was."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    wanted = {name: delta.dense() for name, delta in deltas(model).items()}
    model.unload()
    return folder, wanted


def same(file, wanted, tolerance=1e-6):
    assert set(file.updates) == set(wanted)
    for name, W in wanted.items():
        update = file.updates[name]
        assert update.shape == tuple(W.shape)
        assert float((update.dense().reshape(W.shape) - W).norm()) < tolerance * float(W.norm()) + 1e-12, name
        if (pair := update.factors()) is not None:
            product = (pair[0].double() @ pair[1].double()).reshape(W.shape)
            assert float((product - W).norm()) < 1e-5 * float(W.norm()) + 1e-12


# -- the lab's own runs and PEFT's ------------------------------------------------------------------------
@pytest.mark.parametrize("method", list(METHODS), ids=lambda m: m.id)
def test_a_saved_run_of_every_method(method, pipe, tmp_path):
    names = targets.modules(pipe.unet, "attn")[::14]
    if method.id == "bitfit":
        names = targets.modules(pipe.unet, "out")[:3]

    def calibrate():
        size = pipe.unet.config.sample_size
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, 8, pipe.unet.config.cross_attention_dim, generator=generator)
        extra = {
            "text_embeds": torch.zeros(1, pipe.text_encoder_2.config.projection_dim),
            "time_ids": torch.zeros(1, 6),
        }
        noisy = torch.randn(1, pipe.unet.config.in_channels, size, size, generator=generator)
        return pipe.unet(noisy, 10, text, added_cond_kwargs=extra).sample.square().mean()

    model = method.attach(pipe.unet, method.knobs(), names, seed=3, calibrate=calibrate)
    shake(model)
    if method.id == "bitfit":
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        model.unload()
        with pytest.raises(LabError, match="changes no weights"):
            read(tmp_path, "tiny-sdxl")
        return
    folder, wanted = saved(model, tmp_path / "adapter")
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    file = read(folder)
    same(file, wanted)
    assert file.base is BASES["tiny-sdxl"]
    assert file.parameters > 0
    assert all(torch.equal(before[n], p) for n, p in pipe.unet.named_parameters()), "the base was touched"
    assert not hasattr(pipe.unet, "peft_config")


def peft_configs():
    import peft

    common = {"target_modules": ["to_q", "to_out.0", "conv1", "conv_shortcut"]}
    yield "lora", peft.LoraConfig(r=3, lora_alpha=5, alpha_pattern={"conv1": 7}, rank_pattern={"to_q": 2}, **common)
    yield "lora", peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, **common)
    yield "dora", peft.LoraConfig(r=3, use_dora=True, **common)
    yield "loha", peft.LoHaConfig(r=3, alpha=6, **common)
    yield "loha", peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, init_weights=False, **common)
    yield "lokr", peft.LoKrConfig(r=3, alpha=6, init_weights=False, **common)
    yield "lokr", peft.LoKrConfig(r=2, alpha=6, decompose_both=True, use_effective_conv2d=True, **common)
    yield "lokr", peft.LoKrConfig(r=500, alpha=7, init_weights=False, **common)


@pytest.mark.parametrize(("kind", "config"), list(peft_configs()))
def test_what_peft_saves_is_what_peft_merges(kind, config, pipe, tmp_path):
    from peft import get_peft_model

    model = get_peft_model(pipe.unet, config)
    shake(model)
    names = [n for n, m in pipe.unet.named_modules() if hasattr(m, "base_layer")]
    before = {n: pipe.unet.get_submodule(n).base_layer.weight.clone() for n in names}
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.merge_adapter()
    wanted = {n: (pipe.unet.get_submodule(n).base_layer.weight - before[n]).detach() for n in names}
    model.unmerge_adapter()
    model.unload()
    file = read(tmp_path, "tiny-sdxl")
    same(file, wanted, tolerance=2e-4)  # the merged difference is rounded at the weight's own size
    assert file.kind == kind
    assert file.format == "peft"


# -- diffusers' and kohya's ---------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("id", ["lora", "nora"])
def test_an_exported_file_comes_back(to, id, pipe, tmp_path):
    method = METHODS[id]
    model = method.attach(pipe.unet, method.knobs(), targets.modules(pipe.unet, "attn,conv")[::7], seed=3)
    shake(model)
    folder, wanted = saved(model, tmp_path / "adapter")
    made = export(folder, to, tmp_path / "out")["files"][0]
    file = read(tmp_path / "out" if to == "peft" else made)
    same(file, wanted)
    assert (file.format, file.kind, file.family.name) == (to, "lora", "Tiny SDXL")
    assert file.base is BASES["tiny-sdxl"]


def pair(m, n, r, seed=0, kernel=()):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(r, n, *kernel, generator=g), torch.randn(m, r, *([1, 1] if kernel else []), generator=g)


@pytest.mark.parametrize("spelling", ["sgm", "diffusers"])
def test_every_layer_of_sdxl_in_kohyas_names(spelling, tmp_path):
    rows = architectures.load("sdxl-unet").rows
    names = [row.layer.name for row in rows] + ["time_embedding.linear_1", "down_blocks.1.attentions.0.proj_in"]
    for name in names:
        given = kohya_name(name) if spelling == "sgm" else "lora_unet_" + name.replace(".", "_")
        assert _names.layer(given) == name
    layers = [row.layer for row in rows if row.layer.kernel is None][::40]
    tensors = {}
    for i, layer in enumerate(layers):
        key = kohya_name(layer.name) if spelling == "sgm" else "lora_unet_" + layer.name.replace(".", "_")
        down, up = pair(layer.m, layer.n, 2, i)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "2", "ss_sd_model_name": "nobody's"})
    file = read(tmp_path / "a.safetensors")
    assert set(file.updates) == {layer.name for layer in layers}
    assert (file.family.name, file.format, file.alpha, file.rank) == ("SDXL", "kohya", 1.0, 2)
    assert file.metadata["ss_network_dim"] == "2"
    down, up = pair(layers[0].m, layers[0].n, 2, 0)
    assert torch.allclose(file.updates[layers[0].name].dense(), up @ down / 2)


def test_text_encoders_in_every_spelling(tmp_path):
    down, up = pair(768, 768, 2)
    wide = pair(1280, 1280, 2)
    q = "text_model.encoder.layers.3.self_attn.q_proj"
    for names, parts in (
        (("lora_te1_text_model_encoder_layers_3_self_attn_q_proj", "lora_te2_text_model_encoder_layers_3_mlp_fc1"), ()),
        (
            (f"text_encoder.{q}", "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"),
            (".lora_A.weight", ".lora_B.weight"),
        ),
        (
            (f"text_encoder.{q}", "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"),
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        ),
    ):
        a, b = parts or (".lora_down.weight", ".lora_up.weight")
        tensors = {names[0] + a: down, names[0] + b: up, names[1] + a: wide[0], names[1] + b: wide[1]}
        save_file(tensors, tmp_path / "t.safetensors")
        file = read(tmp_path / "t.safetensors")
        assert list(file.updates) == [f"text_encoder.{q}", "text_encoder_2.text_model.encoder.layers.3.mlp.fc1"]
        assert torch.allclose(file.updates[f"text_encoder.{q}"].dense(), up @ down)


@pytest.mark.parametrize(
    ("stem", "ends"),
    [
        (f"unet.{ATTN}.processor.to_out", ("_lora.down.weight", "_lora.up.weight")),
        (f"unet.{ATTN}.to_out.0", (".lora.down.weight", ".lora.up.weight")),
        (f"unet.{ATTN}.to_out.0", (".lora_A.default.weight", ".lora_B.default.weight")),
        (f"diffusion_model.{ATTN}.to_out.0", (".lora_A.weight", ".lora_B.weight")),
        ("lycoris_" + f"{ATTN}.to_out.0".replace(".", "_"), (".lora_down.weight", ".lora_up.weight")),
        (
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
            (".lora_down.weight", ".lora_up.weight"),
        ),
    ],
)
def test_older_and_other_spellings(stem, ends, tmp_path):
    down, up = pair(640, 640, 2)
    save_file({stem + ends[0]: down, stem + ends[1]: up}, tmp_path / "a.safetensors")
    assert list(read(tmp_path / "a.safetensors").updates) == [f"{ATTN}.to_out.0"]


def test_the_scale_in_diffusers_header(tmp_path):
    down, up = pair(128, 128, 2)
    tensors = {f"unet.{ATTN}.to_q.lora_A.weight": down, f"unet.{ATTN}.to_q.lora_B.weight": up}
    for said, scale in (
        ({}, 1.0),
        ({"unet.r": 2, "unet.lora_alpha": 8}, 4.0),
        ({"unet.r": 2, "unet.lora_alpha": 1}, 0.5),
    ):
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(said)})
        update = read(tmp_path / "a.safetensors").updates[f"{ATTN}.to_q"]
        assert torch.allclose(update.dense(), scale * up @ down)


# -- LyCORIS, by hand -----------------------------------------------------------------------------------------
def tucker(t, a, b):
    """Slowly: W[o, i, x, y] = Σ_p Σ_q t[p, q, x, y] · a[p, o] · b[q, i]."""
    W = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:])
    for p, q in itertools.product(range(t.shape[0]), range(t.shape[1])):
        W += a[p][:, None, None, None] * b[q][None, :, None, None] * t[p, q]
    return W


def kron(a, b):
    """Slowly: W[i·p + k, j·q + l, …] = a[i, j] · b[k, l, …]."""
    p, q = b.shape[:2]
    W = torch.zeros(a.shape[0] * p, a.shape[1] * q, *b.shape[2:])
    for i, j in itertools.product(*map(range, a.shape)):
        W[i * p : (i + 1) * p, j * q : (j + 1) * q] = a[i, j] * b
    return W


def lycoris():
    """(name, tensors without the layer's name, ΔW) of every form, on a 12 × 8 layer, alpha 2."""
    g = torch.Generator().manual_seed(0)

    def t(*shape):
        return torch.randn(*shape, generator=g)

    a = torch.tensor(2.0)
    h = {"hada_w1_a": t(12, 4), "hada_w1_b": t(4, 8), "hada_w2_a": t(12, 4), "hada_w2_b": t(4, 8)}
    yield "loha", {**h, "alpha": a}, (h["hada_w1_a"] @ h["hada_w1_b"]) * (h["hada_w2_a"] @ h["hada_w2_b"]) * 0.5
    h = {"hada_w1_a": t(12, 2), "hada_w1_b": t(2, 8), "hada_w2_a": t(12, 2), "hada_w2_b": t(2, 8)}
    yield "loha-small", dict(h), (h["hada_w1_a"] @ h["hada_w1_b"]) * (h["hada_w2_a"] @ h["hada_w2_b"])
    h = {"hada_t1": t(4, 4, 3, 3), "hada_w1_a": t(4, 12), "hada_w1_b": t(4, 8)}
    h |= {"hada_t2": t(4, 4, 3, 3), "hada_w2_a": t(4, 12), "hada_w2_b": t(4, 8)}
    first = tucker(h["hada_t1"], h["hada_w1_a"], h["hada_w1_b"])
    yield "loha-tucker", {**h, "alpha": a}, first * tucker(h["hada_t2"], h["hada_w2_a"], h["hada_w2_b"]) * 0.5
    w1, w2 = t(3, 2), t(4, 4)
    yield "lokr-whole", {"lokr_w1": w1, "lokr_w2": w2, "alpha": a}, kron(w1, w2)
    w2a, w2b = t(4, 1), t(1, 4)
    yield "lokr-half", {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": a}, kron(w1, w2a @ w2b) * 2
    w1a, w1b = t(3, 1), t(1, 2)
    both = {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_w2_a": w2a, "lokr_w2_b": w2b, "alpha": a}
    yield "lokr-both", both, kron(w1a @ w1b, w2a @ w2b) * 2
    core = {"lokr_w1": w1, "lokr_t2": t(2, 2, 3, 3), "lokr_w2_a": t(2, 4), "lokr_w2_b": t(2, 4), "alpha": a}
    yield "lokr-tucker", core, kron(w1, tucker(core["lokr_t2"], core["lokr_w2_a"], core["lokr_w2_b"]))
    flat = {"lokr_w1": w1, "lokr_w2_a": t(4, 2), "lokr_w2_b": t(2, 36), "alpha": a}
    yield "lokr-conv", flat, kron(w1, (flat["lokr_w2_a"] @ flat["lokr_w2_b"]))
    conv = {"lora_down.weight": t(4, 8, 3, 3), "lora_up.weight": t(12, 4, 1, 1), "alpha": a}
    yield "locon", conv, torch.einsum("or,rikl->oikl", conv["lora_up.weight"][:, :, 0, 0], conv["lora_down.weight"]) / 2
    mid = {"lora_down.weight": t(4, 8, 1, 1), "lora_mid.weight": t(4, 4, 3, 3), "lora_up.weight": t(12, 4, 1, 1)}
    W = tucker(mid["lora_mid.weight"], mid["lora_up.weight"][:, :, 0, 0].T, mid["lora_down.weight"][:, :, 0, 0])
    yield "locon-mid", {**mid, "alpha": a}, W / 2
    full = t(12, 8)
    yield "full", {"diff": full, "diff_b": t(12)}, full


@pytest.mark.parametrize(("name", "tensors", "wanted"), [pytest.param(*x, id=x[0]) for x in lycoris()])
def test_lycoris_by_hand(name, tensors, wanted, tmp_path):
    stem = "lora_unet_" + f"{ATTN}.to_q".replace(".", "_")
    save_file({f"{stem}.{k}": v.contiguous() for k, v in tensors.items()}, tmp_path / "l.safetensors")
    file = read(tmp_path / "l.safetensors")
    same(file, {f"{ATTN}.to_q": wanted}, tolerance=1e-5)
    update = file.updates[f"{ATTN}.to_q"]
    assert update.rank >= torch.linalg.matrix_rank(wanted.flatten(1))
    low = name in ("loha-small", "lokr-half", "lokr-both", "lokr-conv", "locon", "locon-mid")
    assert (update.factors() is not None) == low
    assert bool(file.notes) == (name == "full")  # the bias is left out, and said


@pytest.mark.parametrize("layer", [f"{ATTN}.to_q", "down_blocks.1.resnets.0.conv1"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_dora_as_lycoris_writes_it(layer, side, pipe, tmp_path):
    W = pipe.unet.get_submodule(layer).weight.detach()
    down, up = pair(W.shape[0], W.shape[1], 2, kernel=tuple(W.shape[2:]))
    shape = [W.shape[0], *[1] * (W.dim() - 1)] if side == "out" else [1, W.shape[1], *[1] * (W.dim() - 2)]
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    stem = "lora_unet_" + layer.replace(".", "_")
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.dora_scale": scale}
    save_file(tensors, tmp_path / "d.safetensors")
    moved = W + (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    over = tuple(d for d in range(W.dim()) if d != (0 if side == "out" else 1))
    wanted = moved / moved.square().sum(dim=over, keepdim=True).sqrt() * scale - W
    file = read(tmp_path / "d.safetensors", "tiny-sdxl")
    same(file, {layer: wanted}, tolerance=1e-5)
    assert file.kind == "dora"


def test_dora_without_its_base_says_so(tmp_path):
    tensors = {f"{ATTN}.to_q.lora_A.weight": torch.ones(2, 640), f"{ATTN}.to_q.lora_B.weight": torch.ones(640, 2)}
    save_file(tensors | {f"{ATTN}.to_q.lora_magnitude_vector": torch.ones(640)}, tmp_path / "d.safetensors")
    with pytest.raises(LabError, match="choose its base"):
        read(tmp_path / "d.safetensors").updates[f"{ATTN}.to_q"].dense()


def test_tensors_are_read_when_asked_for(tmp_path, monkeypatch):
    down, up = pair(64, 64, 2)
    save_file({"a.to_q.lora_A.weight": down, "a.to_q.lora_B.weight": up}, tmp_path / "a.safetensors")
    asked = []
    real = adapter_files._header.TensorFile.tensor
    monkeypatch.setattr(adapter_files._header.TensorFile, "tensor", lambda s, k: asked.append(k) or real(s, k))
    file = read(tmp_path / "a.safetensors")
    assert not asked
    file.updates["a.to_q"].factors()
    assert sorted(asked) == ["a.to_q.lora_A.weight", "a.to_q.lora_B.weight"]
