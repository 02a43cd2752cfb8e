"""The lab's own tuners on whole models: transformers' (Linear and Conv1D), diffusers' UNet, open_clip's with split attention."""

from __future__ import annotations

import pytest
import torch

from lab import targets
from lab.methods import METHODS, adapters


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


def gpt2():
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, attn_pdrop=0)
    tokens = torch.arange(10)[None]
    return GPT2Model(config), "qkv-less", lambda m: m(input_ids=tokens).last_hidden_state


def clip_text():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=50, max_position_embeddings=16, projection_dim=16, **sizes)
    tokens = torch.arange(1, 11)[None]
    return CLIPTextModel(config), "attn,mlp", lambda m: m(input_ids=tokens).last_hidden_state


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 5, 12, generator=g)
    return made, "attn,conv", lambda m: m(x, 10, text).sample


def open_clip():
    from tests.micro_clip import clip

    made = clip().model
    pictures = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return made, "q,k,v,out,mlp", lambda m: m.encode_image(pictures)


@pytest.mark.parametrize("model", [gpt2, clip_text, unet, open_clip], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method_id", ["nora", "nola", "pranc"])
def test_on_a_whole_model(model, method_id, tmp_path):
    """Starts at the base, trains, saves, loads onto a fresh copy, merges, and comes off leaving nothing behind."""
    method = METHODS[method_id]
    base, roles, run = model()
    base.eval().requires_grad_(False)
    names = (
        [n for n, _ in base.named_modules() if n.endswith(("c_attn", "c_fc", "c_proj"))]
        if roles == "qkv-less"
        else targets.modules(base, roles)
    )
    assert len(names) > 3
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.no_grad():
        plain = run(base)
    made = method.attach(base, method.knobs.parse({"nora": {"r_inner": 2}}.get(method_id, {"k": 16})), names, seed=2)
    torch.testing.assert_close(run(made).detach(), plain, rtol=1e-5, atol=1e-5)
    optimizer = method.optimizer(made, 1e-2)
    for _ in range(3):
        run(made).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = run(made)
        assert (trained - plain).abs().max() > 1e-5
        made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        fresh, _, _ = model()
        loaded = adapters.load(fresh.eval(), tmp_path / "adapter")
        torch.testing.assert_close(run(loaded), trained, rtol=1e-5, atol=1e-5)
        made.merge_adapter()
        torch.testing.assert_close(run(made), trained, rtol=1e-3, atol=1e-4)
        made.unmerge_adapter()
    clean = made.unload().state_dict()
    assert set(clean) == set(before)
    assert all(torch.equal(clean[k], before[k]) for k in before)
