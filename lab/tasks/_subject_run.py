"""One run of the subject task: train an adapter (or take the base as it is), draw the prompts, score the pictures."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lab import columns, hub, metrics, preflight, svd
from lab import device as devices
from lab.bases import resolve
from lab.diffusion import embed, encode_pictures, encode_prompts, training_schedule
from lab.errors import LabError
from lab.files import write_atomic, write_json
from lab.images import bucket_step, framed, read_folder, strip
from lab.jobs import disk
from lab.methods import METHODS
from lab.networks import ENCODERS, at_work, compile_blocks, network, uncompile
from lab.record import record
from lab.sampling import OutOfRangeError, sample
from lab.targets import modules
from lab.tasks import Cancelled, PlannedRun, Report
from lab.tasks._dreambooth import DreamBooth
from lab.tasks.subject import DEFAULTS, check_count, instance_prompts, prompts
from lab.train import Settings, train

PREVIEW_STEPS = 10
UNRELATED_SEED = 7


def run(spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report) -> dict[str, Any]:
    """See `lab.tasks.Task.run`. Writes meta.json, metrics.jsonl, preview(s), samples and adapter into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = DEFAULTS | spec  # a spec may be older than a setting
    pictures = read_folder(inputs)
    check_count(len(pictures))
    report(0, spec["steps"], phase="loading the base model")
    subject = Run(spec, planned, pictures, folder, inputs.parent, report)
    subject.base.hold(inputs.parent)  # once it is loaded: before, it may have had to be downloaded
    held = {dtype: word for word, dtype in devices.WEIGHTS.items()}[subject.pipe.unet.dtype]
    made = record(spec, planned, devices.describe(subject.device)) | {"weights": held}  # an export takes W as it was
    write_json(folder / "meta.json", made)
    if planned.method == "base":
        return {"method": "base", "seed": planned.seed, "knobs": {}} | subject.draw_and_score()
    if planned.method in spec["adapters"]:
        return subject.lay_and_score()
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
        self.step = 0  # how far training is, for reports of what comes before and after it
        self.base = resolve(spec["base"])
        self.device = devices.pick()
        self.pipe = self.base.load(self.device, devices.held_in(self.device, spec["weights"]), self._fetching)
        self.resolution = spec["resolution"] or self.pipe.default_sample_size * self.pipe.vae_scale_factor
        self.known = encode_prompts(self.pipe, [*self.prompts, *spec["unrelated_prompts"]])
        self.text_adapted = False  # whether the encoders carry an adapter now: embeddings then change with it

    def report(self, phase: str, **values: Any) -> None:
        self.tell(self.step, self.spec["steps"], phase=phase, **values)

    def _fetching(self, done: int, total: int) -> None:
        """How far the base's download is, in megabytes; in words alone where the run counts training steps."""
        phase = hub.phase(self.base.name, done, total)
        if self.planned.method not in METHODS:
            self.tell(done // 10**6, max(1, total // 10**6), phase=phase)
        else:
            self.report(phase)

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
                **{name: spec[name] for name in ("steps", "schedule", "warmup", "optimizer")},
                **{name: spec[name] for name in ("checkpoint_every", "preview_every")},
                lr=spec["lr"][planned.method],
                seed=planned.seed,
                text_encoder_rate=spec["text_encoder_rate"] if spec["text_encoder"] else 1.0,
            )
            method = METHODS[planned.method]
            flight = self._preflight(model, objective, settings)
            trained = train(model, method, objective, settings, self.folder, self.tell, self._preview)
            self.step = spec["steps"]
            size = self._save(model)
            drawn = self.draw_and_score()
            scorer, drift = self._scorer(), None
            if scorer and before:
                drift = metrics.drift(scorer, before, self._draw(texts, seeds, "drawing unrelated prompts"))
        finally:
            self._detach(model)
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
            "preflight": flight,
            "final_loss": trained.final_loss,
            "drift": drift,
        } | drawn

    def lay_and_score(self) -> dict[str, Any]:
        """Draw and score with an adapter that was there before, untrained."""
        texts, seeds = self.spec["unrelated_prompts"], [UNRELATED_SEED] * len(self.spec["unrelated_prompts"])
        before = self._made_once("unrelated", texts, seeds, "drawing unrelated prompts") if texts else []
        with columns.laid(self.base, self.pipe, self.shared / "inputs", self.planned.method) as file:
            self.text_adapted = any(layer.startswith("text_encoder") for layer in file.updates)
            drawn = self.draw_and_score()
            scorer, drift = self._scorer(), None
            if scorer and before:
                drift = metrics.drift(scorer, before, self._draw(texts, seeds, "drawing unrelated prompts"))
        return {
            "method": self.planned.method,
            "seed": self.planned.seed,
            "knobs": {"kind": file.kind, "rank": file.rank},
            "brought": True,  # what was trained elsewhere: its time and memory are not known here
            "trainable_parameters": file.parameters,
            "adapter_bytes": file.bytes,
            "drift": drift,
        } | drawn

    # -- training --------------------------------------------------------------------------------------
    def _preflight(self, model: Any, objective: DreamBooth, settings: Settings) -> str:
        """Whether the run fits, in words, measured before its first step. Raises LabError where it does not."""
        path = self.folder / "preflight.json"
        if path.exists() and (self.folder / "checkpoint" / "state.safetensors").exists():
            told = str(json.loads(path.read_text())["told"])
        else:
            self.report("measuring one step's memory")
            change = partial(preflight.changes, self.spec, self.trainable)
            try:
                flight = preflight.fly(model, METHODS[self.planned.method], objective, settings, change)
            except Exception as error:  # the compiler's errors have no common class
                if not self.spec["compile"] or isinstance(error, LabError | Cancelled):
                    raise
                what = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
                raise LabError(f"The UNet cannot be compiled here ({what}): leave compile off.") from error
            told = flight.sentence
            write_json(path, {"told": told, "peak_bytes": flight.peak, "available_bytes": flight.available})
        self.report(told)
        return told

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
            buckets=spec["buckets"],
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
            embed=partial(embed, pipe) if spec["text_encoder"] else None,
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
        """The adapter on the UNet, or on the UNet and both text encoders."""
        planned, unet, text = self.planned, self.pipe.unet, self.spec["text_encoder"]
        method = METHODS[planned.method]
        devices.seed_everything(planned.seed)
        if self.spec["gradient_checkpointing"]:
            unet.enable_gradient_checkpointing()
        try:
            with contextlib.ExitStack() as stack:
                if text:  # on the device from here on: a part that is trained does not leave it
                    stack.enter_context(at_work(self.pipe, *ENCODERS))
                whole = network(self.pipe, text)

                def calibrate() -> torch.Tensor:
                    with devices.autocast_of(unet):
                        return objective.loss(whole, devices.generator(planned.seed, 3))

                self.report("attaching the adapter")
                stack.enter_context(
                    svd.telling(lambda done, all: self.report("factorising the weights", done=done / all))
                )
                names, knobs = modules(whole, self.spec["targets"]), method.knobs.parse(planned.knobs)
                model = method.attach(whole, knobs, names, seed=planned.seed, calibrate=calibrate)
                if self.spec["compile"]:
                    compile_blocks(unet)
        except BaseException:
            self.base.forget()  # it may be half changed
            raise
        self.text_adapted = text
        objective.position = 0
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for config in model.peft_config.values():
            config.base_model_name_or_path = self.base.public_name
        return model

    def _detach(self, model: Any) -> None:
        """Leave the base, which other runs share, as it was."""
        uncompile(self.pipe.unet)
        model.unload()
        self.text_adapted = False
        self.pipe.unet.disable_gradient_checkpointing()
        with at_work(self.pipe, *ENCODERS):
            pass  # off the device again

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
        known = self.known
        if self.text_adapted:
            known = encode_prompts(self.pipe, texts)
        elif missing := [text for text in texts if text not in known]:
            known |= encode_prompts(self.pipe, missing)

        def on_step(done: int, every: int) -> None:
            if phase and self.planned.method not in METHODS:  # drawing is all that this run does
                self.tell(done, every, phase=phase)
            elif phase:
                self.report(phase, drawn=done / every)

        try:
            return sample(
                self.pipe,
                [known[text] for text in texts],
                list(seeds),
                known[""],
                steps=steps or self.spec["sampling_steps"],
                guidance=self.spec["guidance"],
                resolution=self.resolution,
                offload=self.spec["offload"],
                on_step=on_step,
            )
        except OutOfRangeError as error:
            raise LabError(self._out_of_range()) from error

    def _out_of_range(self) -> str:
        if not self.step:
            cause = (
                "the base gives them before any training: hold its weights in fp32 or bf16, or take its fp16-fixed VAE"
            )
            return f"The pictures come out as numbers out of range; {cause}."
        rate = self.spec["lr"][self.planned.method]
        cause = f"the learning rate {rate:g} is probably too high: try {rate / 4:.1g}"
        steps = self.spec["steps"]
        return f"After step {self.step} of {steps} the pictures come out as numbers out of range; {cause}."

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
        step = bucket_step(self.resolution, self.pipe.vae_scale_factor) if self.spec["buckets"] else 0
        pairs = enumerate(zip(self.pictures, crops, strict=True))
        shown = [framed(p, c, self.resolution, i, step).picture for i, (p, c) in pairs]
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
