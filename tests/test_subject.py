"""The subject task: specs, prompts, the loss by hand, whole small runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lab import comparison, images
from lab.bases import resolve
from lab.errors import LabError
from lab.methods import METHODS
from lab.tasks import TASKS, Cancelled, PlannedRun
from lab.tasks import subject as task
from tests import small_sdxl as small


def check(**changes: Any) -> dict[str, Any]:
    return TASKS["subject"].check({"class_word": "fox"} | changes)


# -- specs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_word": ""}, "The class word is empty"),
        ({"class_word": "   "}, "The class word is empty"),
        ({"class_word": "x" * 500}, "at most 60 characters, got 500"),
        ({"class_word": "fox\nx"}, "one line"),
        ({"class_word": 3}, "must be text"),
        ({"steps": 0}, "steps must be between 1 and 20,000, got 0"),
        ({"steps": 1_000_000}, "steps must be between 1 and 20,000, got 1,000,000"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": float("inf")}, "whole number"),
        ({"steps": "many"}, "whole number"),
        ({"batch": 0}, "batch must be between 1 and 64"),
        ({"pictures": 0}, "A subject needs 3 to 20 pictures, got 0"),
        ({"pictures": 1}, "A subject needs 3 to 20 pictures, got 1"),
        ({"pictures": 21}, "got 21"),
        ({"pictures": 4, "captions": ["a", "b"]}, "got 2 for 4 pictures"),
        ({"pictures": 3, "crops": [None]}, "got 1 for 3 pictures"),
        ({"captions": ["x" * 501, "", ""]}, "caption may have at most 500"),
        ({"crops": [[0, 0]]}, "A crop is"),
        ({"crops": [[0, 0, 4]]}, "crop size must be between 16"),
        ({"base": "tiny-sdxk"}, "Unknown base model 'tiny-sdxk': did you mean tiny-sdxl"),
        ({"base": "tiny-clip"}, "makes no pictures"),
        ({"base": "weights.ckpt"}, "pickled checkpoint"),
        ({"methods": {"lara": {}}}, "Unknown method 'lara'"),
        ({"methods": {}}, "No method was chosen"),
        ({"methods": "lora"}, "must be given as"),
        ({"methods": {"lora": {"rank": 4}}}, "LoRA: Unknown setting 'rank'"),
        ({"methods": {"lora": {"r": 0}}}, "LoRA: r must be at least 1"),
        ({"methods": {"nora": {"r_outer": 10**6}}}, "1000000"),
        ({"lr": {"nola": 1.0}}, "for nola, which is not among the methods"),
        ({"lr": 0}, "learning rate of lora must be between"),
        ({"lr": float("nan")}, "must be a number"),
        ({"seeds": []}, "1 to 10 seeds, got 0"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"prompts": []}, "1 to 32 prompts"),
        ({"prompts": [""]}, "prompt is empty"),
        ({"targets": "attention"}, "Unknown target"),
        ({"resolution": 100}, "multiple of 8"),
        ({"resolution": 8}, "between 32"),
        ({"flip": "yes"}, "flip must be true or false"),
        ({"snr_gamma": -1}, "snr_gamma must be between"),
        ({"budget": 0}, "budget must be between"),
        ({"schedule": "linear"}, "Unknown schedule"),
        ({"stepz": 3}, "Unknown setting 'stepz': did you mean steps"),
    ],
)
def test_bad_specs_get_one_clear_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LabError) as caught:
        check(**changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults_come_from_the_base_and_checking_again_changes_nothing() -> None:
    spec = check()
    base = resolve("tiny-sdxl")
    assert spec["steps"] == base.preset("subject")["steps"]
    assert spec["lr"] == {m: base.preset("learning_rates")[m] for m in ("lora", "nora")}
    assert check(**spec) == spec == json.loads(json.dumps(spec))
    assert check(base="sdxl")["lr"]["lora"] == 1e-4
    assert check(lr=3e-4, methods=["lora", "nora"])["lr"] == {"lora": 3e-4, "nora": 3e-4}


def test_no_base_is_loaded_to_check_a_spec() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lab.tasks import TASKS; t = TASKS['subject']; s = t.check({'class_word': 'fox'}); t.plan(s);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plan_is_the_base_then_every_method_at_each_seed() -> None:
    planned = TASKS["subject"].plan(check(seeds=[3, 5]))
    assert [(p.method, p.seed) for p in planned] == [("base", 0), ("lora", 3), ("nora", 3), ("lora", 5), ("nora", 5)]
    assert planned[1].knobs["r"] == METHODS["lora"].knobs.parse(planned[1].knobs).r


def test_equal_budget_sets_the_methods_sizes() -> None:
    from lab import architectures

    layers = architectures.shapes(architectures.load("tiny-sdxl").select("attn"))
    spec = check(budget=60_000)
    for id, knobs in spec["methods"].items():
        method = METHODS[id]
        assert abs(method.count(layers, method.knobs.parse(knobs)) - 60_000) < 30_000
    assert check(**spec) == spec


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("", "a sks fox"),
        ("a {subject} in the snow", "a sks fox in the snow"),
        ("a fox in the snow", "a sks fox in the snow"),
        ("A Fox asleep", "A sks fox asleep"),
        ("in the snow", "sks fox, in the snow"),
        ("sks in the snow", "sks in the snow"),
    ],
)
def test_captions_name_the_subject(caption: str, prompt: str) -> None:
    assert task.instance_prompts(check(captions=[caption] * 3), 3) == [prompt] * 3


def test_the_base_is_asked_for_the_class_word_alone() -> None:
    spec = check(prompts=["a {subject} here"])
    assert task.prompts(spec, "base") == ["a fox here"]
    assert task.prompts(spec, "lora") == ["a sks fox here"]


# -- pictures ------------------------------------------------------------------------------------------
def test_crops() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))
    assert images.centre_crop(40, 20) == (10, 0, 20)
    assert images.cropped(picture, [20, 0, 20], 16).getpixel((8, 8)) == (0, 0, 255)
    with pytest.raises(LabError, match=r"crop of picture 3, 20 pixels from 21, 0, does not lie within its 40 by 20"):
        images.cropped(picture, [21, 0, 20], 16, number=2)


def test_sizes_and_crops_are_told_as_sdxl_was_trained(small_sdxl: Any) -> None:
    from lab.diffusion import encode_pictures

    pipe = small_sdxl.load()
    found = encode_pictures(pipe, [Image.new("RGB", (24, 20))], ["a fox"], 16, [[3, 2, 16]], flip=True)
    # height, width, top, left, target height and width; mirrored, the crop lies 24 - 3 - 16 = 5 from the left
    assert found.time_ids.tolist() == [[20, 24, 2, 3, 16, 16], [20, 24, 2, 5, 16, 16]]
    halved = encode_pictures(pipe, [Image.new("RGB", (64, 32))], ["a fox"], 16)
    assert halved.time_ids.tolist() == [[32, 64, 0, 8, 16, 16]]
    told = encode_pictures(pipe, [Image.new("RGB", (64, 32))], ["a fox"], 16, size_conditioning=False)
    assert told.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]


# -- the loss, written out -----------------------------------------------------------------------------
@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_recipe_written_out(tmp_path: Path, prediction: str, gamma: float | None) -> None:
    """The public DreamBooth-LoRA-SDXL recipe, in plain torch: same numbers drawn, same loss."""
    from lab.diffusion import denoising_loss, encode_pictures, training_schedule

    row = small.register(small.build(tmp_path, prediction, zero_snr=prediction == "v_prediction"), "by-hand")
    small.unregister("by-hand")
    pipe = row.load()
    pictures = small.pictures(3, (16, 16))
    cached = encode_pictures(pipe, pictures, ["a sks fox", "a sks fox at night", "a fox"], 16)
    chosen, generator = [2, 0, 2], torch.Generator().manual_seed(1)
    with torch.no_grad():
        got = denoising_loss(pipe.unet, pipe.vae, training_schedule(pipe), cached, chosen, generator, gamma)

    generator.manual_seed(1)
    draw, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.randint(0, 1000, (3,), generator=generator)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    if prediction == "v_prediction":  # zero terminal SNR (Lin et al., arXiv 2305.08891, algorithm 1)
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root**2
    a = alphas[t].view(3, 1, 1, 1)
    pixels = torch.stack([torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures])
    pixels = pixels.view(3, 16, 16, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels[chosen]).latent_dist
        latents = (posterior.mean + posterior.std * draw) * pipe.vae.config.scaling_factor
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        words = ["a fox", "a sks fox", "a fox"]
        states, _, pooled, _ = pipe.encode_prompt(words, device="cpu", do_classifier_free_guidance=False)
        known = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3)}
        predicted = pipe.unet(noisy, t, encoder_hidden_states=states, added_cond_kwargs=known).sample
    wanted = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
    expected = ((predicted - wanted) ** 2).mean(dim=(1, 2, 3))
    if gamma is not None:
        snr = a.flatten() / (1 - a.flatten())
        expected = expected * snr.clamp(max=gamma) / (snr if prediction == "epsilon" else snr + 1)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_is_finite_at_zero_terminal_snr(small_sdxl: Any) -> None:
    from lab.diffusion import snr_weights, training_schedule

    schedule = training_schedule(small_sdxl.load())
    last = torch.tensor([999])
    assert snr_weights(schedule, last, 5.0).item() == 0.0  # v: nothing of the picture is left to predict
    schedule.register_to_config(prediction_type="epsilon")
    assert snr_weights(schedule, last, 5.0).item() == 1.0


# -- whole runs ----------------------------------------------------------------------------------------
def adapter_bytes(out: Path, run: str) -> bytes:
    return (out / "runs" / run / "adapter" / "adapter_model.safetensors").read_bytes()


def compare(out: Path, report: Any = lambda *_, **__: None, **changes: Any) -> list[dict[str, Any]]:
    spec = comparison.start(out, "subject", small.spec(**changes), small.pictures())
    return comparison.run_all(out, "subject", spec, lambda _: report)


def test_a_comparison_leaves_what_it_promises_and_the_base_untouched(small_sdxl: Any, tmp_path: Path) -> None:
    unet = small_sdxl.load().unet
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    phases: list[str] = []
    runs = compare(
        tmp_path,
        lambda step, steps, **values: phases.append(values["phase"]),
        methods={"lora": {}, "nora": {}},
        preview_every=2,
        unrelated_prompts=["a dog"],
    )
    assert [(r["method"], r["state"], r["message"]) for r in runs] == [
        (m, "done", "") for m in ("base", "lora", "nora")
    ]
    for run in runs:
        folder, result = Path(run["folder"]), run["result"]
        assert {p.name for p in (folder / "samples").iterdir()} == {"p0_s0.png", "p0_s1.png"}
        assert len(result["clip_i_each"]) == 2
        assert result["clip_i"] == pytest.approx(sum(result["clip_i_each"]) / 2)
        meta = json.loads((folder / "meta.json").read_text())
        assert meta["spec"]["class_word"] == "fox"
        assert meta["versions"]["torch"]
    for run in runs[1:]:
        folder, result = Path(run["folder"]), run["result"]
        assert {p.name for p in (folder / "previews").iterdir()} == {f"{s:05d}.png" for s in (0, 2, 4)}
        assert (folder / "preview.png").read_bytes() == (folder / "previews" / "00004.png").read_bytes()
        assert not (folder / "checkpoint").exists()
        assert result["trainable_parameters"] > 0
        assert result["peak_memory_bytes"] > 10**7
        assert 0 <= result["drift"] <= 1
        saved = sum(p.stat().st_size for p in (folder / "adapter").glob("*.safetensors"))
        assert result["adapter_bytes"] == saved > 4 * result["trainable_parameters"]
    assert runs[2]["result"]["trainable_parameters"] < runs[1]["result"]["trainable_parameters"]
    after = unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert images.read_folder(tmp_path / "unrelated")[0].size == (16, 16)
    assert {"training", "drawing a preview", "saving the adapter", "drawing", "scoring"} <= set(phases)


def test_the_same_command_gives_the_same_adapter_and_resuming_changes_nothing(small_sdxl: Any, tmp_path: Path) -> None:
    changes = {"methods": {"lora": {"dropout": 0.2}, "nora": {}}}
    compare(tmp_path / "one", **changes)
    compare(tmp_path / "two", **changes)

    def stop(step: int, steps: int, **values: Any) -> None:
        if step == 3 and values["phase"] == "training":
            raise Cancelled

    for _ in range(2):  # once for each method
        with pytest.raises(Cancelled):
            compare(tmp_path / "cut", stop, **changes)
        cut = tmp_path / "cut"
        compare_one = list(cut.glob("runs/*/checkpoint/state.safetensors"))
        assert len(compare_one) == 1
        spec = json.loads((cut / "spec.json").read_text())
        method = compare_one[0].parents[1].name.split("-")[0]
        folder = cut / "runs" / f"{method}-s0"
        planned = PlannedRun(method, 0, spec["methods"][method])
        result = TASKS["subject"].run(spec, planned, cut / "inputs", folder, lambda *_, **__: None)
        (folder / "result.json").write_text(json.dumps(result))
    for run in ("lora-s0", "nora-s0"):
        assert adapter_bytes(tmp_path / "one", run) == adapter_bytes(tmp_path / "two", run), run
        assert adapter_bytes(tmp_path / "one", run) == adapter_bytes(tmp_path / "cut", run), run
        samples = [sorted((tmp_path / n / "runs" / run / "samples").iterdir()) for n in ("one", "cut")]
        assert [p.read_bytes() for p in samples[0]] == [p.read_bytes() for p in samples[1]]


def test_another_seed_or_method_trains_on_other_or_the_same_draws(small_sdxl: Any, tmp_path: Path) -> None:
    """Both methods see the same pictures, noise and timesteps: their first losses, before any update, agree."""
    runs = compare(tmp_path, methods={"lora": {}, "nora": {}}, seeds=[0, 1])

    def first_loss(run: dict[str, Any]) -> float:
        return json.loads((Path(run["folder"]) / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    first = {(r["method"], r["seed"]): first_loss(r) for r in runs if r["method"] != "base"}
    assert first["lora", 0] == pytest.approx(first["nora", 0], rel=1e-3)
    assert first["lora", 1] == pytest.approx(first["nora", 1], rel=1e-3)
    assert abs(first["lora", 0] - first["lora", 1]) > 1e-3 * first["lora", 0]


def test_prior_pictures_are_made_once_and_change_training(small_sdxl: Any, tmp_path: Path) -> None:
    changes = {"prior_weight": 1.0, "prior_pictures": 2, "flip": True, "snr_gamma": 5.0, "steps": 2}
    compare(tmp_path / "with", **changes)
    made = sorted((tmp_path / "with" / "prior").iterdir())
    assert [p.name for p in made] == ["000.png", "001.png"]
    assert images.read_folder(tmp_path / "with" / "prior")[0].size == (16, 16)
    when = [p.stat().st_mtime_ns for p in made]
    (tmp_path / "with" / "runs" / "lora-s0" / "result.json").unlink()
    compare(tmp_path / "with", **changes)
    assert [p.stat().st_mtime_ns for p in made] == when
    compare(tmp_path / "without", **(changes | {"prior_weight": 0.0}))
    assert adapter_bytes(tmp_path / "with", "lora-s0") != adapter_bytes(tmp_path / "without", "lora-s0")


def test_gradient_checkpointing_changes_no_result(small_sdxl: Any, tmp_path: Path) -> None:
    plain = compare(tmp_path / "plain", steps=2)[1]["result"]
    saved = compare(tmp_path / "saved", steps=2, gradient_checkpointing=True)[1]["result"]
    assert plain["final_loss"] == pytest.approx(saved["final_loss"], rel=1e-4)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in small_sdxl.load().unet.modules())


def test_progress_never_runs_backwards(small_sdxl: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    compare(tmp_path, lambda step, steps, **v: told.append((v["phase"], step, steps)), unrelated_prompts=["a dog"])
    training = [i for i, (phase, *_) in enumerate(told) if phase == "training"]
    before, after = told[: training[0]], told[training[-1] :]
    own = [step for phase, step, _ in before[before.index(("encoding the pictures", 0, 4)) :]]
    assert set(own) == {0}
    assert {step for _, step, _ in after} == {4}


def test_too_few_pictures_and_another_comparisons_folder_are_refused(small_sdxl: Any, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="needs 3 to 20 pictures, got 1"):
        comparison.start(tmp_path, "subject", small.spec(), small.pictures(1))
    comparison.start(tmp_path, "subject", small.spec(), small.pictures())
    comparison.start(tmp_path, "subject", small.spec(), small.pictures())  # the same again: goes on
    with pytest.raises(LabError, match="other pictures"):
        comparison.start(tmp_path, "subject", small.spec(), small.pictures()[::-1])
    with pytest.raises(LabError, match="other settings"):
        comparison.start(tmp_path, "subject", small.spec(steps=9), small.pictures())


def test_a_run_that_fails_says_why_and_the_others_go_on(small_sdxl: Any, tmp_path: Path) -> None:
    runs = compare(tmp_path, methods={"nora": {"r_outer": 80}, "lora": {}}, steps=1)  # wider than its layers
    assert [r["state"] for r in runs] == ["done", "failed", "done"]
    assert "80" in runs[1]["message"]


def test_the_embedded_base_trains_and_draws(tmp_path: Path) -> None:
    """The shipped weights, whatever their sizes, through the whole path in one step."""
    spec = small.spec(base="tiny-sdxl", steps=1, sample_seeds=[0], batch=1)
    spec = comparison.start(tmp_path, "subject", spec, small.pictures(3, (64, 64)))
    runs = comparison.run_all(tmp_path, "subject", spec, lambda _: lambda *_, **__: None)
    assert [r["state"] for r in runs] == ["done", "done"]
    side = resolve("tiny-sdxl").resolution
    with Image.open(Path(runs[1]["folder"]) / "samples" / "p0_s0.png") as picture:
        assert picture.size == (side, side)
