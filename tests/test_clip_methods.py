"""Every few-shot method: it starts where it says, learns, comes back from what was saved; split attention is attention."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.bases import ASSETS
from lab.clip.adapter import AdapterMethod, sites
from lab.clip.bases import resolve
from lab.clip.episode import Batch
from lab.clip.fit import fit, learned, predict_examples, restore
from lab.clip.method import Recipe
from lab.clip.pictures import Examples
from lab.clip.split import SplitAttention, attend, split_attention
from lab.clip.towers import (
    class_weights,
    cosine_logits,
    image_features,
    prompted,
    text_features,
    unit,
    word_embeddings,
)
from lab.errors import LabError
from lab.methods import METHODS
from lab.methods.clip import CLIP_METHODS
from lab.methods.clip.plotpp import transport
from lab.methods.clip.prograd import project
from tests import micro_clip

TRAINED = [m.id for m in CLIP_METHODS if m.trains]


def quiet(*_args, **_values):
    pass


def plain_episode(**options):
    """Without random crops, so that one batch is the whole training set, always the same."""
    return micro_clip.episode(crop=(1.0, 1.0), flip=False, **options)


def whole(method, episode) -> Batch:
    return episode.batch(torch.arange(len(episode.train)), method.inputs, torch.Generator().manual_seed(0))


# -- the split ----------------------------------------------------------------------------------------------------
def test_split_embedded_model_gives_the_same_features():
    fused = open_clip.create_model(f"local-dir:{ASSETS / 'tiny-clip'}").eval()
    made = resolve("tiny-clip").load(torch.device("cpu"))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in made.model.modules())
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, made.size, made.size, generator=generator)
    ids = made.tokenize(["a fox", "an emoji of a small red apple on a table"])
    with torch.no_grad():
        assert (unit(fused.encode_image(pixels)) - unit(made.model.encode_image(pixels))).abs().max() <= 1e-6
        texts = unit(fused.encode_text(ids))
        assert (texts - unit(made.model.encode_text(ids))).abs().max() <= 1e-6
        assert (texts - unit(text_features(made, ids))).abs().max() <= 1e-6  # shortened to the longest text


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_split_attention_equals_the_fused_one_with_masks(bias, batch_first):
    torch.manual_seed(0)
    fused = nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first).eval()
    split = SplitAttention(fused)
    x = torch.randn(2, 7, 32) if batch_first else torch.randn(7, 2, 32)
    causal = torch.full((7, 7), float("-inf")).triu(1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    for masks in ({}, {"attn_mask": causal}, {"attn_mask": causal == 0}, {"key_padding_mask": padding}):
        if masks.get("attn_mask") is not None and masks["attn_mask"].dtype == torch.bool:
            masks = {"attn_mask": ~masks["attn_mask"]}
        expected = fused(x, x, x, need_weights=False, **masks)[0]
        torch.testing.assert_close(split(x, x, x, **masks)[0], expected, atol=1e-6, rtol=0)


def test_split_of_other_widths_and_of_open_clips_own_attention():
    torch.manual_seed(0)
    pooling = nn.MultiheadAttention(32, 4, kdim=20, vdim=20, batch_first=True).eval()
    query, keys = torch.randn(2, 3, 32), torch.randn(2, 9, 20)
    torch.testing.assert_close(
        SplitAttention(pooling)(query, keys, keys)[0], pooling(query, keys, keys)[0], atol=1e-6, rtol=0
    )
    own = {
        "image_size": 16,
        "layers": 2,
        "width": 32,
        "patch_size": 8,
        "head_width": 16,
        "qk_norm": True,
        "scale_heads": True,
    }
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=own, text_cfg=text).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = unit(model.encode_image(pixels))
        assert split_attention(model) == 3
        assert (unit(model.encode_image(pixels)) - before).abs().max() <= 1e-6


def test_split_timm_model_gives_the_same_features_and_has_q_k_v():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32, depth=2).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = unit(model(pixels))
        assert split_attention(model) == 2
        assert (unit(model(pixels)) - before).abs().max() <= 1e-6
    assert sites(model, "q,v", "both") == [f"blocks.{i}.attn.qkv.{p}_proj" for i in (0, 1) for p in "qv"]


# -- every method -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id", CLIP_METHODS.ids())
def test_method_learns_what_colours_tell_and_comes_back_from_its_state(id, tmp_path):
    """On three colours, which random features separate, a trained method ends above chance on validation pictures."""
    method, episode = CLIP_METHODS[id], micro_clip.episode(shots=4)
    knobs = method.knobs()
    recipe = Recipe((2e-2 if id != "full" else 3e-3,), steps=25, batch=8, max_norm=1.0)
    fitted = fit(method, episode, knobs, recipe, tmp_path, quiet, quiet)
    if id != "zero-shot":
        assert fitted.validation_accuracy > 1 / 3
    state = {name: tensor.clone() for name, tensor in learned(method, fitted.head).items()}
    assert fitted.head.parameter_count() == sum(t.numel() for n, t in state.items() if not n.startswith("method:"))
    assert (fitted.head.parameter_count() > 0) == (method.trains or id == "linear")
    torch.manual_seed(episode.seed)
    again = method.build(episode, knobs)
    again.also |= fitted.settled
    restore(method, again, state)
    logits, expected = (predict_examples(method, head, episode.validation) for head in (again, fitted.head))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert logits.dtype == torch.float32
    assert logits.shape == (12, 3)


@pytest.mark.parametrize("id", TRAINED)
def test_every_trained_tensor_gets_a_gradient(id):
    method, episode = CLIP_METHODS[id], plain_episode(shots=2)
    torch.manual_seed(0)
    wide = {"reduction": 2} if id == "cocoop" else {}  # one hidden unit may be dead
    head = method.build(episode, method.knobs(**wide)).train()
    with torch.no_grad():  # LoRA's A has no gradient while B is zero
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    method.loss(head, whole(method, episode)).backward()
    without = [n for n, p in head.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    # Rows of the embedding that no text uses have none, the tensor as a whole does.
    assert without == []


@pytest.mark.parametrize(
    ("id", "encoder"),
    [(m.id, "both") for m in METHODS] + [(id, "text") for id in ("lora", "nora", "nola", "vera", "loha")],
)
def test_every_adapter_of_the_registry_attaches_and_trains(id, encoder):
    method, episode = AdapterMethod(METHODS[id]), plain_episode(shots=2, encoder=encoder)
    torch.manual_seed(0)
    knobs = method.knobs.parse(_small(method.knobs))
    head = method.build(episode, knobs)
    batch = whole(method, episode)
    if METHODS[id].identity_start:
        with torch.no_grad():
            start = method.logits(head.eval(), batch)
        features = image_features(episode.clip, batch.pixels) if encoder == "both" else batch.features
        expected = cosine_logits(features, episode.zero_shot, episode.clip.scale)
        torch.testing.assert_close(start, expected, atol=2e-3, rtol=1e-3)
    before = {name: tensor.clone() for name, tensor in learned(method, head).items()}
    optimizer = method.optimizer(head, 1e-3)
    for step in range(2):
        method.before_step(head.train(), step, 2)
        loss = method.loss(head, batch)
        penalty = method.penalty(head)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        method.after_step(head, step, 2)
        optimizer.zero_grad()
    assert torch.isfinite(loss)
    assert any(
        not torch.equal(before[name], tensor) for name, tensor in learned(method, head).items() if name in before
    )
    reached = {
        ".visual." in name for name, p in head.model.named_parameters() if p.requires_grad and "resblocks" in name
    }
    assert reached <= ({True, False} if encoder == "both" else {False})
    assert not any(p.requires_grad for p in episode.clip.model.parameters())  # the shared base stays as it was


def _small(knobs) -> dict[str, int]:
    """Ranks that fit layers of width 32."""
    import dataclasses

    known = {f.name for f in dataclasses.fields(knobs)}
    return {
        name: value
        for name, value in {"r": 4, "r_inner": 2, "init_r": 4, "target_r": 2, "k": 16, "l": 16}.items()
        if name in known
    }


@pytest.mark.parametrize("encoder", ["vision", "text"])
def test_adapters_in_one_encoder_leave_the_other_alone(encoder):
    method, episode = AdapterMethod(METHODS["lora"]), plain_episode(shots=2, encoder=encoder)
    head = method.build(episode, method.knobs())
    names = [name for name, p in head.named_parameters() if p.requires_grad]
    assert names
    assert all((".visual." in name) == (encoder == "vision") for name in names)
    assert method.inputs == ("pixels" if encoder == "vision" else "features")
    method.loss(head, whole(method, episode)).backward()
    with pytest.raises(LabError, match="no layers called"):
        sites(nn.ModuleDict({"visual": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}), "q", "text")


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_for_bf16_is_attention(masked):
    """To bf16's precision; in fp32 it is torch's own, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3))
    mask = torch.full((9, 9), float("-inf")).triu(1) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(attend(q, k, v, mask, 0.0), expected)
    short = attend(*(x.bfloat16() for x in (q, k, v)), mask if mask is None else mask.bfloat16(), 0.0)
    assert short.dtype == torch.bfloat16
    assert (short.float() - expected).abs().max() < 0.03


# -- formulas, checked by hand ------------------------------------------------------------------------------------
def batch_of(features: torch.Tensor, labels: list[int]) -> Batch:
    return Batch(torch.tensor(labels), features=features)


def test_nearest_neighbour_by_hand():
    episode, method = plain_episode(shots=2), CLIP_METHODS["1-nn"]
    logits = method.logits(method.build(episode, method.knobs()), batch_of(episode.train.features, [0] * 6))
    similarity = episode.train.features @ episode.train.features.T * episode.clip.scale
    expected = torch.stack([similarity[:, 2 * c : 2 * c + 2].max(1).values for c in range(3)], 1)
    torch.testing.assert_close(logits, expected)
    assert logits.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


def test_tip_adapter_by_hand():
    episode, method = plain_episode(shots=2), CLIP_METHODS["tip-adapter"]
    head = method.build(episode, method.knobs(alpha=3.0, beta=2.0))
    f, keys = episode.validation.features, episode.train.features
    values = torch.eye(3).repeat_interleave(2, 0)
    expected = episode.clip.scale * f @ episode.zero_shot.T + 3.0 * torch.exp(-2.0 * (1 - f @ keys.T)) @ values
    torch.testing.assert_close(method.logits(head, batch_of(f, [0] * 6)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("id", ["taskres", "clip-lora"])
def test_starts_at_zero_shot(id):
    episode, method = plain_episode(shots=2), CLIP_METHODS[id]
    head = method.build(episode, method.knobs()).eval()
    expected = episode.clip.scale * episode.train.features @ episode.zero_shot.T
    torch.testing.assert_close(method.logits(head, whole(method, episode)), expected, atol=1e-4, rtol=1e-4)


def test_coop_with_the_templates_words_is_zero_shot_with_that_template():
    """The words' own embeddings as context give the features of "words class."."""
    episode, method = plain_episode(shots=2), CLIP_METHODS["coop-4"]
    words = "abcd"  # four tokens of this tokenizer
    head = method.build(episode, method.knobs(tokens=4, words=words))
    expected = class_weights(episode.clip, episode.classes, [words + "{}."])
    torch.testing.assert_close(unit(method.texts(head)), expected, atol=1e-5, rtol=1e-4)


def test_prograd_starts_from_the_templates_words_behind_zeros():
    episode, method = plain_episode(shots=2), CLIP_METHODS["prograd"]
    context = method.build(episode, method.knobs(tokens=16))["context"]
    words = word_embeddings(episode.clip, "a picture of a", 14)  # a token a letter in this tokenizer
    torch.testing.assert_close(context[2:], words)
    assert not context[:2].any()


def test_taskres_adds_to_the_towers_own_features():
    """Not to features of length 1: a step of the same size would weigh more there."""
    episode, method = plain_episode(shots=2), CLIP_METHODS["taskres"]
    head = method.build(episode, method.knobs(alpha=0.5))
    raw = episode.clip.model.encode_text(episode.clip.tokenize([f"a picture of a {c}" for c in episode.classes]))
    torch.testing.assert_close(head["texts"], raw, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        head["residual"].normal_(generator=torch.Generator().manual_seed(0))
    f = episode.validation.features
    expected = episode.clip.scale * f @ unit(raw + 0.5 * head["residual"]).T
    torch.testing.assert_close(method.logits(head, batch_of(f, [0] * 6)), expected, atol=1e-4, rtol=1e-4)


def test_clip_adapter_is_the_same_on_raw_features():
    """Why the feature of length 1 is no departure: the bottleneck has no biases, and the result is normalised."""
    episode, method = plain_episode(shots=2), CLIP_METHODS["clip-adapter"]
    head = method.build(episode, method.knobs())
    f = episode.validation.features
    logits = [method.logits(head, batch_of(f * length, [0] * 6)) for length in (1.0, 11.3)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)


def test_cached_views_of_pictures_that_must_not_be_mirrored_are_not():
    ramp = (torch.linspace(0, 255, micro_clip.SIZE).expand(3, 3, micro_clip.SIZE, micro_clip.SIZE)).to(torch.uint8)
    made = micro_clip.clip()
    plain = Examples(made, ramp, torch.arange(3), 8, (1.0, 1.0), flip=False)
    assert (plain.views - plain.views[:1]).abs().max() < 1e-4
    assert (Examples(made, ramp, torch.arange(3), 8, (1.0, 1.0)).views - plain.views).abs().max() > 1e-3


def test_clip_lora_scales_by_the_square_root_of_its_rank():
    episode, method = plain_episode(shots=2), CLIP_METHODS["clip-lora"]
    head = method.build(episode, method.knobs(r=4, alpha=3.0))
    layer = head.model.base_model.model.visual.transformer.resblocks[0].attn.q_proj
    assert layer.scaling["default"] == pytest.approx(3.0 / math.sqrt(4))
    # q, k, v of 2 layers in 2 towers, 32 → 32
    assert head.parameter_count() == 12 * 4 * 64


def test_prograd_takes_off_what_points_against_general_knowledge():
    task, general = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 5.0])
    assert project(task, general, 1.0).tolist() == [1.0, 0.0]
    assert project(task, general, 0.5).tolist() == [1.0, -1.0]
    assert project(-task, general, 1.0).tolist() == [-1.0, 2.0]


def test_prograd_gradient_is_the_projected_one():
    episode, method = plain_episode(shots=2), CLIP_METHODS["prograd"]
    torch.manual_seed(0)
    head = method.build(episode, method.knobs(tokens=4))
    batch = whole(method, episode)
    loss = method.loss(head, batch)
    loss.backward()
    logits = method.logits(head, batch)
    teacher = (episode.clip.scale * batch.features @ episode.zero_shot.T).softmax(1)
    parts = (F.cross_entropy(logits, batch.labels), -(teacher * logits.log_softmax(1)).sum(1).mean())
    task, general = (torch.autograd.grad(part, head["context"], retain_graph=True)[0] for part in parts)
    torch.testing.assert_close(head["context"].grad, project(task, general, 1.0), atol=1e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(parts[0].item(), abs=1e-4)


def test_transport_plan_has_uniform_margins():
    similarity = torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0))
    plan = transport(similarity, 0.1)
    torch.testing.assert_close(plan.sum(1), torch.full((5, 3), 1 / 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(5), atol=1e-4, rtol=0)
    assert (plan >= 0).all()
    cheap = transport(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 0.01)
    torch.testing.assert_close(cheap, torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]), atol=1e-4, rtol=0)


def test_plotpp_trains_vision_prompts_alone_in_its_first_half():
    episode, method = plain_episode(shots=2), CLIP_METHODS["plotpp"]
    head = method.build(episode, method.knobs())
    for step, text_learns in ((0, False), (5, True)):
        head.zero_grad()
        method.before_step(head, step, 10)
        method.loss(head, whole(method, episode)).backward()
        assert (head["text"].grad is not None) == text_learns
        assert head["vision"].grad.abs().sum() > 0


def test_linear_probe_solves_logistic_regression():
    """At its solution the gradient of cross-entropy and penalty is zero."""
    episode, method = plain_episode(shots=4), CLIP_METHODS["linear"]
    head = method.build(episode, method.knobs(l2=0.1))
    assert method.settle(head, episode) == {"l2": 0.1}
    loss = F.cross_entropy(method.logits(head, whole(method, episode)), episode.train.labels)
    (loss + 0.05 * head["weight"].square().sum()).backward()
    assert head["weight"].grad.abs().max() < 1e-3


def test_class_names_too_long_for_the_model_are_named():
    with pytest.raises(LabError, match="do not fit into the model's 48 tokens"):
        prompted(micro_clip.clip(), ["fox", "x" * 40], 16)


def test_methods_import_no_torch():
    import subprocess
    import sys

    code = "import sys; from lab.methods.clip import CLIP_METHODS; len(CLIP_METHODS); from lab.tasks import TASKS; TASKS['fewshot'].check({}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
