"""The recipe of the embedded base, on made-up pictures and tiny models: no download, a few seconds."""

import random

import pytest
import torch

from lab.errors import LabError
from lab.pretrain import assemble, clip, common, image, scenes, unet, vae, widen
from lab.pretrain.concepts import CONCEPTS, HELD_OUT, PLACES, STYLES, caption, prompt
from lab.pretrain.sprites import Sprites

CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {
        "context_length": clip.CONTEXT,
        "vocab_size": clip.VOCABULARY,
        "width": 32,
        "heads": 1,
        "layers": 2,
        "hf_tokenizer_name": "tiny-clip",
    },
}
SMALL = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 2}
SIZE = {"channels": (32, 32, 32), "transformers": (0, 1, 1), "head": 16}
CHANNELS = (16, 16, 16)


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    """Three styles of four nameable concepts, two held-out subjects and two others, in random colours."""
    g = torch.Generator().manual_seed(0)
    names = [*CONCEPTS, *HELD_OUT, "toolbox", "abacus"]
    shown = torch.tensor([0, 1, 2, 3, len(CONCEPTS), len(CONCEPTS) + 1, len(names) - 2, len(names) - 1])
    images = torch.randint(0, 255, (len(shown) * 3, 4, 1, 1), dtype=torch.uint8, generator=g).repeat(1, 1, 64, 64)
    return Sprites(images, shown.repeat(3), torch.arange(3).repeat_interleave(len(shown)), names)


@pytest.fixture
def fresh_home(tmp_path, monkeypatch):
    """Checkpoints go to a folder of the test's own; nothing starts from the committed weights."""
    monkeypatch.setenv("LAB_PRETRAIN_HOME", str(tmp_path))
    return tmp_path


def _towers() -> clip.Towers:
    return clip.Towers(CONFIG, SMALL)


def _train(stage: str, sprites: Sprites, steps: int) -> dict[str, torch.Tensor]:
    if stage == "clip":
        trainer = clip.train(sprites, steps, batch=8, config=CONFIG, small=SMALL, evaluate_every=0)
    elif stage == "vae":
        trainer = vae.train(sprites, steps, batch=4, channels=CHANNELS)
    elif stage == "decoder":
        trainer = vae.train_decoder(sprites, steps, batch=4, channels=CHANNELS, perceive=None)
    elif stage == "image":
        trainer = image.train(sprites, steps, batch=8, towers=_towers(), auto=vae.build(CHANNELS))
    else:
        encoder = vae.build(CHANNELS)
        trainer = unet.train(sprites, steps, batch=4, scenes=1, size=SIZE, towers=_towers(), encoder=encoder)
    return trainer.model.state_dict()


def _train_all(sprites: Sprites, steps: int) -> dict[str, dict[str, torch.Tensor]]:
    return {stage: _train(stage, sprites, steps) for stage in ("clip", "vae", "decoder", "image", "unet")}


def test_lists_agree():
    assert len(set(CONCEPTS)) == len(CONCEPTS) >= 150
    assert not set(CONCEPTS) & set(HELD_OUT)
    assert prompt("owl", "in the snow") == "an owl in the snow"
    assert prompt("grapes") == "grapes"


def test_captions_depend_on_the_seed_alone_and_begin_with_the_name():
    def draw(seed):
        return [caption(random.Random(seed + i), "owl", PLACES[-1], "3d") for i in range(200)]

    assert draw(3) == draw(3) != draw(4)
    texts = [text for text, _, _ in draw(3)]
    assert sum(text.startswith(("an owl", "owl")) for text in texts) > 100
    for text, with_place, with_style in draw(3):
        assert with_place == (PLACES[-1] in text)
        assert with_style == ("3d" in text)


def test_scenes_depend_on_the_key_alone(sprites):
    first, again, other = (scenes.draw_batch(sprites, sprites.nameable, 6, key) for key in ((1, 2), (1, 2), (1, 3)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])
    assert first[2].shape == (6, 3, 64, 64)
    assert first[2].abs().max() <= 1


def test_subjects_are_kept_out_of_every_stage(sprites):
    held = {sprites.names.index(name) for name in HELD_OUT}
    assert len(sprites.held_out) == 6
    for pool in (sprites.nameable, sprites.trainable):
        assert not held & set(sprites.concept[pool].tolist())
    step = clip.Step(sprites, _towers(), batch=8)
    seen = torch.cat([step.draw(i)[0] for i in range(20)])
    assert not held & set(sprites.concept[seen].tolist())
    assert sprites.find(CONCEPTS[1], STYLES[2]) in sprites.nameable


def test_a_resumed_run_equals_an_uninterrupted_one(sprites, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ASSETS", tmp_path)
    monkeypatch.setattr(vae, "_evaluate", lambda *_: "not asked here")
    monkeypatch.setenv("LAB_PRETRAIN_HOME", str(tmp_path / "whole"))
    whole = _train_all(sprites, 2)
    monkeypatch.setenv("LAB_PRETRAIN_HOME", str(tmp_path / "parts"))
    parts = {}
    for stage in whole:
        _train(stage, sprites, 1)
        parts[stage] = _train(stage, sprites, 2)
    for stage, state in whole.items():
        assert all(torch.equal(value, parts[stage][key]) for key, value in state.items()), stage


def test_the_image_stage_lowers_its_loss_and_touches_the_image_tower_alone(sprites, fresh_home):
    _train("clip", sprites, 1)
    _train("vae", sprites, 1)
    towers, auto = unet.frozen("clip", _towers()), unet.frozen("vae", vae.build(CHANNELS))
    step = image.Step(sprites, towers, auto, 24)
    before = step(999)[0]
    _train("image", sprites, 20)
    towers.clip.visual = unet.frozen("image", towers.clip.visual)
    assert step(999)[0] < before - 0.01


def test_more_latent_channels_keep_what_the_old_ones_said(sprites):
    torch.manual_seed(0)
    narrow, wide = vae.build(CHANNELS, 3).eval(), vae.build(CHANNELS, 5).eval()
    before = {key: value.shape for key, value in wide.state_dict().items()}
    wide.load_state_dict(widen.vae(narrow.state_dict(), wide.state_dict()))
    assert before == {key: value.shape for key, value in wide.state_dict().items()}
    scenes_shown = vae.held_out_scenes(sprites, n=4)
    with torch.no_grad():
        old, new = narrow.encode(scenes_shown).latent_dist, wide.encode(scenes_shown).latent_dist
    torch.testing.assert_close(new.mean[:, :3], old.mean)
    torch.testing.assert_close(new.logvar[:, :3], old.logvar)
    assert new.mean[:, 3:].std() > 0.01
    spread = old.mean[:, :2] / old.mean[:, :2].std((0, 2, 3), keepdim=True) * widen.SPREAD * old.mean.std()
    tie = widen.Tie(narrow)
    assert tie(scenes_shown, torch.cat([old.mean, spread], 1)) < 1e-6
    assert tie(scenes_shown, torch.cat([old.mean, 10 * spread], 1)) > 0.1
    assert tie(scenes_shown, torch.cat([old.mean + old.mean.std(), spread], 1)) > 0.9


def test_a_widened_unet_draws_its_old_channels_as_before():
    narrow, wide = (unet.build(n, 16, 64, 32, SIZE).eval() for n in (3, 5))
    wide.load_state_dict(widen.unet(narrow.state_dict(), wide.state_dict()))
    given = {
        "encoder_hidden_states": torch.randn(2, 32, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.full((2, 6), 64.0)},
    }
    noisy = torch.randn(2, 5, 16, 16)
    with torch.no_grad():
        out = wide(noisy, torch.tensor([3, 900]), **given).sample
        torch.testing.assert_close(out[:, :3], narrow(noisy[:, :3], torch.tensor([3, 900]), **given).sample)
    assert not out[:, 3:].any()


def test_stages_start_from_narrower_assets(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "ASSETS", tmp_path)
    monkeypatch.setattr(unet, "ASSETS", tmp_path)
    assert vae.start_from_assets(vae.build(CHANNELS, 5)) == (False, None)
    vae.build(CHANNELS, 3).save_pretrained(tmp_path / "tiny-sdxl" / "vae")
    unet.build(3, 16, 64, 32, SIZE).save_pretrained(tmp_path / "tiny-sdxl" / "unet")
    assert vae.start_from_assets(vae.build(CHANNELS, 3)) == (True, None)
    assert vae.start_from_assets(vae.build(CHANNELS, 5))[1] is not None
    assert vae.start_from_assets(vae.build((16, 16, 32), 5)) == (False, None)
    assert unet.start_from_assets(unet.build(5, 16, 64, 32, SIZE))
    assert not unet.start_from_assets(unet.build(5, 16, 32, 32, SIZE))


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_muon_moves_matrices_along_orthogonal_directions(shape):
    g = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    spread = torch.linalg.svdvals(common.orthogonal(g))
    assert spread.min() > 0.6
    assert spread.max() < 1.35
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    assert torch.cosine_similarity((u @ v).flatten(), common.orthogonal(g).flatten(), dim=0) > 0.95


def test_assembled_folders_load_and_condition_alike(sprites, fresh_home):
    from diffusers import StableDiffusionXLPipeline

    with pytest.raises(LabError, match="clip"):
        assemble.assemble(fresh_home / "out", sprites)
    _train_all(sprites, 1)
    out = assemble.assemble(fresh_home / "out", sprites, _towers(), vae.build(CHANNELS), SIZE, CONFIG)
    pipe = StableDiffusionXLPipeline.from_pretrained(out / "tiny-sdxl")
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    texts = ["an owl in the snow", "a cat face"]
    hidden, _, pooled, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, device="cpu")
    conditions = unet.Conditions(clip.load_towers(out))
    for ours, theirs in zip(conditions(texts), (hidden, pooled), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert pipe(texts[0], num_inference_steps=2, width=64, height=64).images[0].size == (64, 64)

    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{out / 'tiny-clip'}")
    ids = open_clip.get_tokenizer(f"local-dir:{out / 'tiny-clip'}")(texts)
    torch.testing.assert_close(
        model.encode_text(ids, normalize=True), conditions.towers.text(ids), atol=1e-4, rtol=1e-3
    )
    assert str(fresh_home) not in "".join(p.read_text() for p in out.rglob("*.json"))


def test_learning_rate_rises_holds_and_falls():
    rates = [common.learning_rate(step, 1000, 1.0) for step in (0, 99, 500, 640, 999)]
    assert rates[0] < rates[1] == rates[2] == rates[3] == 1.0
    assert rates[4] < 0.05
