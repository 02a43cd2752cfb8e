"""One run of the subject task: train an adapter (or take the base as it is), draw the prompts, score the pictures."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lab import device as devices
from lab import metrics
from lab.bases import resolve
from lab.diffusion import encode_pictures, encode_prompts, sample, training_schedule
from lab.errors import LabError
from lab.files import write_atomic, write_json
from lab.images import cropped, read_folder, strip
from lab.jobs import disk
from lab.methods import METHODS
from lab.record import record
from lab.targets import modules
from lab.tasks import PlannedRun, Report
from lab.tasks._dreambooth import DreamBooth
from lab.tasks.subject import check_count, instance_prompts, prompts
from lab.train import Settings, train

PREVIEW_STEPS = 10
UNRELATED_SEED = 7


def run(spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report) -> dict[str, Any]:
    """See `lab.tasks.Task.run`. Writes meta.json, metrics.jsonl, preview(s), samples and adapter into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = read_folder(inputs)
    check_count(len(pictures))
    report(0, spec["steps"], phase="loading the base model")
    subject = Run(spec, planned, pictures, folder, inputs.parent, report)
    write_json(folder / "meta.json", record(spec, planned, devices.describe(subject.pipe.device)))
    if planned.method == "base":
        return {"method": "base", "seed": planned.seed, "knobs": {}} | subject.draw_and_score()
    return subject.train_and_score()


class Run:
    """What the parts of one run share."""

    def __init__(
        self,
        spec: dict[str, Any],
        planned: PlannedRun,
        pictures: list[Image.Image],
        folder: Path,
        shared: Path,
        report: Report,
    ) -> None:
        """`folder` is the run's own, `shared` the comparison's."""
        self.spec, self.planned, self.folder, self.shared, self.tell = spec, planned, folder, shared, report
        self.pictures, self.prompts = pictures, prompts(spec, planned.method)
        self.base = resolve(spec["base"])
        self.pipe = self.base.load()
        self.resolution = spec["resolution"] or self.pipe.default_sample_size * self.pipe.vae_scale_factor
        self.known = encode_prompts(self.pipe, [*self.prompts, *spec["unrelated_prompts"]])
        self.step = 0  # how far training is, for reports of what comes before and after it

    def report(self, phase: str, **values: Any) -> None:
        self.tell(self.step, self.spec["steps"], phase=phase, **values)

    def train_and_score(self) -> dict[str, Any]:
        """Train, save the adapter, draw and score. The base, which other runs share, is left as it was."""
        spec, planned = self.spec, self.planned
        self.report("encoding the pictures")
        objective = self._objective()
        texts, seeds = spec["unrelated_prompts"], [UNRELATED_SEED] * len(spec["unrelated_prompts"])
        before = self._made_once("unrelated", texts, seeds, "drawing unrelated prompts") if texts else []
        model = self._attach(objective)
        try:
            settings = Settings(
                **{name: spec[name] for name in ("steps", "schedule", "warmup", "checkpoint_every", "preview_every")},
                lr=spec["lr"][planned.method],
                seed=planned.seed,
            )
            method = METHODS[planned.method]
            trained = train(model, method, objective, settings, self.folder, self.tell, self._preview)
            self.step = spec["steps"]
            size = self._save(model)
            drawn = self.draw_and_score()
            scorer, drift = self._scorer(), None
            if scorer and before:
                drift = metrics.drift(scorer, before, self._draw(texts, seeds, "drawing unrelated prompts"))
        finally:
            model.unload()
            self.pipe.unet.disable_gradient_checkpointing()
        shutil.rmtree(self.folder / "checkpoint", ignore_errors=True)
        return {
            "method": planned.method,
            "seed": planned.seed,
            "knobs": planned.knobs,
            "lr": settings.lr,
            "trainable_parameters": self.trainable,
            "adapter_bytes": size,
            "train_seconds": trained.train_seconds,
            "peak_memory_bytes": trained.peak_memory_bytes,
            "final_loss": trained.final_loss,
            "drift": drift,
        } | drawn

    # -- training --------------------------------------------------------------------------------------
    def _objective(self) -> DreamBooth:
        spec, pipe, prior = self.spec, self.pipe, None
        pictures = encode_pictures(
            pipe,
            self.pictures,
            instance_prompts(spec, len(self.pictures)),
            self.resolution,
            spec["crops"],
            flip=spec["flip"],
            size_conditioning=self.base.size_conditioning,
        )
        if spec["prior_weight"] > 0:
            class_pictures = self._prior()
            texts = [self._class_prompt()] * len(class_pictures)
            prior = encode_pictures(pipe, class_pictures, texts, self.resolution)
        return DreamBooth(
            pipe.vae,
            training_schedule(pipe),
            pictures,
            prior,
            batch=spec["batch"],
            seed=self.planned.seed,
            snr_gamma=spec["snr_gamma"],
            prior_weight=spec["prior_weight"],
        )

    def _class_prompt(self) -> str:
        return f"a {self.spec['class_word']}"

    def _prior(self) -> list[Image.Image]:
        """Pictures of the class as the base draws it."""
        wanted = self.spec["prior_pictures"]
        texts = [self._class_prompt()] * wanted
        return self._made_once("prior", texts, range(1000, 1000 + wanted), "drawing the class for prior preservation")

    def _made_once(self, name: str, texts: Sequence[str], seeds: Sequence[int], phase: str) -> list[Image.Image]:
        """Pictures by the base, kept in the comparison's folder by the first run that needs them."""
        folder = self.shared / name
        if folder.is_dir() and len(made := read_folder(folder)) >= len(texts):
            return made[: len(texts)]
        drawn = self._draw(texts, seeds, phase)
        for number, picture in enumerate(drawn):
            _save_png(picture, folder / f"{number:03d}.png")
        return drawn

    def _attach(self, objective: DreamBooth) -> Any:
        planned, unet = self.planned, self.pipe.unet
        method = METHODS[planned.method]
        devices.seed_everything(planned.seed)
        names = modules(unet, self.spec["targets"])

        def calibrate() -> torch.Tensor:
            with devices.autocast(self.pipe.device):
                return objective.loss(unet, devices.generator(planned.seed, 3))

        if self.spec["gradient_checkpointing"]:
            unet.enable_gradient_checkpointing()
        self.report("attaching the adapter")
        knobs = method.knobs.parse(planned.knobs)
        try:
            model = method.attach(unet, knobs, names, seed=planned.seed, calibrate=calibrate)
        except BaseException:
            self.base.forget()  # it may be half changed
            raise
        objective.position = 0
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for config in model.peft_config.values():
            config.base_model_name_or_path = self.base.public_name
        return model

    def _preview(self, step: int) -> None:
        self.step = step
        self.report("drawing a preview")
        seeds = self.spec["sample_seeds"][:2]
        drawn = self._draw([self.prompts[0]] * len(seeds), seeds, steps=min(PREVIEW_STEPS, self.spec["sampling_steps"]))
        sheet = strip(drawn, max(192, drawn[0].width))
        _save_png(sheet, self.folder / "previews" / f"{step:05d}.png")
        _save_png(sheet, self.folder / "preview.png")

    def _save(self, model: Any) -> int:
        """Save the adapter as PEFT does; its weights' size in bytes. The folder is whole or not there."""
        self.report("saving the adapter")
        target, aside = self.folder / "adapter", self.folder / "adapter.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            model.save_pretrained(aside, save_embedding_layers=False)  # "auto" asks the Hub for the base
            _sorted_names(aside / "adapter_config.json")
        except Exception as error:  # safetensors has an error class of its own for what the disk says
            if disk.is_full(error):
                raise LabError(disk.sentence(self.folder)) from error
            raise
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        return sum(file.stat().st_size for file in target.rglob("*.safetensors"))

    # -- drawing ---------------------------------------------------------------------------------------
    def _draw(self, texts: Sequence[str], seeds: Sequence[int], phase: str = "", steps: int = 0) -> list[Image.Image]:
        if missing := [text for text in texts if text not in self.known]:
            self.known |= encode_prompts(self.pipe, missing)

        def on_step(done: int, every: int) -> None:
            if phase and self.planned.method == "base":  # drawing is all that this run does
                self.tell(done, every, phase=phase)
            elif phase:
                self.report(phase, drawn=done / every)

        return sample(
            self.pipe,
            [self.known[text] for text in texts],
            list(seeds),
            self.known[""],
            steps=steps or self.spec["sampling_steps"],
            guidance=self.spec["guidance"],
            resolution=self.resolution,
            on_step=on_step,
        )

    def _scorer(self) -> metrics.Scorer | None:
        """None where it cannot be had, as without a network: hours of training are not thrown away for a score."""
        try:
            return metrics.scorer(self.base.scorer)
        except LabError as error:
            print(f"The pictures are not scored: {error}", file=sys.stderr, flush=True)
            return None

    def draw_and_score(self) -> dict[str, Any]:
        """Draw every prompt with every sample seed into `samples/`, and score the pictures."""
        seeds, began = self.spec["sample_seeds"], time.perf_counter()
        texts = [text for text in self.prompts for _ in seeds]
        drawn = self._draw(texts, seeds * len(self.prompts), "drawing")
        seconds = time.perf_counter() - began
        for i, picture in enumerate(drawn):
            _save_png(picture, self.folder / "samples" / f"p{i // len(seeds)}_s{seeds[i % len(seeds)]}.png")
        self.report("scoring")
        scorer = self._scorer()
        if scorer is None:
            return {"sample_seconds": seconds} | dict.fromkeys(("clip_t", "clip_i", "clip_t_each", "clip_i_each"))
        crops = self.spec["crops"] or [None] * len(self.pictures)
        shown = [cropped(p, c, self.resolution, i) for i, (p, c) in enumerate(zip(self.pictures, crops, strict=True))]
        asked = [text for text in prompts(self.spec, "base") for _ in seeds]  # without the trigger, no real word
        return {"sample_seconds": seconds} | metrics.scores(scorer, drawn, asked, shown)


def _sorted_names(path: Path) -> None:
    """PEFT writes sets of names in any order; the same run is to write the same file."""
    config = json.loads(path.read_text())
    names = {
        key: sorted(config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), list)
    }
    write_json(path, config | names)


def _save_png(picture: Image.Image, path: Path) -> None:
    write_atomic(path, lambda aside: picture.save(aside, format="PNG"))
