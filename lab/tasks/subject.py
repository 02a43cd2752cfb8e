"""Subject task: teach a base one subject from 3 to 20 pictures, by several methods, and compare them.

DreamBooth (Ruiz et al., arXiv 2208.12242) with an adapter in place of full fine-tuning, as the public
DreamBooth-LoRA-SDXL recipe does it. This file checks and plans; `_subject_run.py` trains, draws and scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

from lab import columns
from lab.bases import BASES, Base, resolve
from lab.errors import LabError
from lab.methods import METHODS, Layer, Method
from lab.registry import check_names, unknown
from lab.targets import roles
from lab.tasks import PlannedRun, Report, register

MIN_PICTURES, MAX_PICTURES = 3, 20
MAX_STEPS = 20_000

# What a base's presets and then the caller replace. None: decided later, from the base or the pictures.
DEFAULTS: dict[str, Any] = {
    "base": "tiny-sdxl",
    "class_word": "",
    "trigger": "sks",
    "pictures": None,  # how many there are, where the caller knows it: captions and crops are checked against it
    "captions": None,
    "crops": None,
    "methods": {"lora": {}, "nora": {}},
    "adapters": [],  # names of adapters to lay beside the methods, untrained: see lab/columns.py
    "targets": None,
    "seeds": [0, 1],
    "steps": 500,
    "batch": 4,
    "lr": None,
    "schedule": "constant",
    "warmup": 0,
    "budget": None,
    "prompts": ["a {subject} in the snow", "a {subject} on the beach", "a {subject} at night under the stars"],
    "unrelated_prompts": ["a dog on the grass", "a red car in the desert", "a bowl of fruit", "a house in the forest"],
    "sample_seeds": [0, 1],
    "sampling_steps": 25,
    "guidance": 5.0,
    "snr_gamma": None,
    "prior_weight": 0.0,
    "prior_pictures": 8,
    "flip": False,
    "resolution": None,
    "buckets": False,  # pictures without a crop of their own are trained whole, in their own aspect ratio
    "text_encoder": False,  # adapters on both text encoders too
    "text_encoder_rate": 0.05,  # their learning rate as a share of the UNet's: the public recipe's 5e-6 to 1e-4
    "weights": None,  # how the frozen base is held: fp32, fp16, bf16; None: the device's own, see lab/device.py
    "optimizer": "adamw",
    "gradient_checkpointing": False,  # a quarter to a third slower, with a fraction of the activations' memory
    "offload": False,  # the UNet leaves the GPU while pictures are decoded, tile by tile
    "compile": False,
    "checkpoint_every": 50,
    "preview_every": 50,
}

SWITCHES = ("flip", "buckets", "text_encoder", "gradient_checkpointing", "offload", "compile")
CHOICES = {
    "schedule": ("constant", "cosine"),
    "optimizer": ("adamw", "adamw8bit"),
    "weights": (None, "fp32", "fp16", "bf16"),
}


class Subject:
    id = "subject"
    name = "Subject"
    imports = (
        "lab.tasks._subject_run",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "peft",
        "open_clip",
    )

    def check(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The spec with every default filled in. Raises LabError, one sentence, on the first bad value."""
        check_names("setting", spec, DEFAULTS)
        given = {name: value for name, value in spec.items() if value is not None}
        base = resolve(_text("base", given.get("base", DEFAULTS["base"]), 500))
        if base.family != "sdxl":
            raise LabError(f"{base.name} makes no pictures: choose a Stable Diffusion XL base.")
        full = DEFAULTS | base.preset(self.id) | given
        full |= {"base": base.id, "targets": full["targets"] or base.targets}
        _check_words(full)
        _check_numbers(full, base)
        full["adapters"] = columns.checked(full["adapters"])
        if full["methods"] or not full["adapters"]:
            full["methods"] = {id: _knobs(base, METHODS[id], knobs) for id, knobs in _methods(full["methods"]).items()}
        full["lr"] = _learning_rates(base, full["methods"], full["lr"])
        roles(full["targets"])
        if full["budget"] is not None:
            full["methods"] = _fit_budget(base, full)
        if base.id in BASES:  # others' shapes are known when they are loaded
            _check_layers(base, full)
        return full

    def base(self, spec: dict[str, Any]) -> Base:
        return resolve(spec["base"])

    def plan(self, spec: dict[str, Any]) -> list[PlannedRun]:
        """The base's run, those of adapters that are there already, then every method at the first seed, then at the next."""
        methods = spec["methods"].items()
        return [
            PlannedRun("base", 0),
            *(PlannedRun(name, spec["seeds"][0]) for name in spec.get("adapters", [])),
            *(PlannedRun(id, seed, knobs) for seed in spec["seeds"] for id, knobs in methods),
        ]

    def run(
        self, spec: dict[str, Any], planned: PlannedRun, inputs: Path, folder: Path, report: Report
    ) -> dict[str, Any]:
        from lab.tasks._subject_run import run

        return run(spec, planned, inputs, folder, report)


# -- words ---------------------------------------------------------------------------------------------
def subject(spec: dict[str, Any], method: str) -> str:
    """What `{subject}` stands for: the trigger and the class word; the class word alone for the untouched base."""
    return spec["class_word"] if method == "base" else f"{spec['trigger']} {spec['class_word']}".strip()


def prompts(spec: dict[str, Any], method: str) -> list[str]:
    """The prompts to draw, for this method."""
    return [prompt.replace("{subject}", subject(spec, method)) for prompt in spec["prompts"]]


def instance_prompts(spec: dict[str, Any], count: int) -> list[str]:
    """One training prompt a picture.

    A caption's `{subject}` becomes "trigger class word". A caption without it, which also lacks the trigger, gets the
    trigger before its class word, or, where it does not name the class, "trigger class word, " in front. A picture
    without a caption is "a trigger class word".
    """
    return [instance_prompt(spec, caption) for caption in spec["captions"] or [""] * count]


def instance_prompt(spec: dict[str, Any], caption: str) -> str:
    named, class_word, trigger = subject(spec, ""), spec["class_word"], spec["trigger"]
    if not caption.strip():
        return f"a {named}"
    if "{subject}" in caption:
        return caption.replace("{subject}", named)
    if trigger and trigger.lower() in caption.lower().split():
        return caption
    at = caption.lower().find(class_word.lower())
    if at < 0:
        return f"{named}, {caption}"
    return caption[:at] + named + caption[at + len(class_word) :]


# -- checks --------------------------------------------------------------------------------------------
def check_count(count: int) -> None:
    """Raise LabError unless this many pictures can be trained on."""
    if not MIN_PICTURES <= count <= MAX_PICTURES:
        raise LabError(f"A subject needs {MIN_PICTURES} to {MAX_PICTURES} pictures, got {count}.")


def _text(name: str, value: Any, most: int, empty: bool = False) -> str:
    label = name.replace("_", " ")
    if not isinstance(value, str):
        raise LabError(f"The {label} must be text, got {value!r}.")
    value = value.strip()
    if not value and not empty:
        raise LabError(f"The {label} is empty: say it in a word or two.")
    if len(value) > most:
        raise LabError(f"The {label} may have at most {most} characters, got {len(value)}.")
    if any(ord(c) < 32 for c in value):
        raise LabError(f"The {label} must be one line of plain text.")
    return value


def _check_words(spec: dict[str, Any]) -> None:
    spec["class_word"] = _text("class_word", spec["class_word"], 60)
    spec["trigger"] = _text("trigger", spec["trigger"], 40, empty=True)
    spec["prompts"] = [_text("prompt", p, 500) for p in _list("prompts", spec["prompts"], 1, 32)]
    spec["unrelated_prompts"] = [
        _text("prompt", p, 500) for p in _list("unrelated_prompts", spec["unrelated_prompts"], 0, 32)
    ]
    count = spec["pictures"]
    if count is not None:
        check_count(_whole("pictures", count, 0, 10**6))
    if spec["captions"] is not None:
        captions = [_text("caption", c or "", 500, empty=True) for c in _list("captions", spec["captions"], 1, 1000)]
        spec["captions"] = _one_a_picture("captions", captions, count)
    if spec["crops"] is not None:
        crops = [_crop(c) for c in _list("crops", spec["crops"], 1, 1000)]
        spec["crops"] = _one_a_picture("crops", crops, count)


def _one_a_picture(name: str, values: list[Any], count: int | None) -> list[Any]:
    if count is not None and len(values) != count:
        raise LabError(f"There must be one of the {name} for each picture: got {len(values)} for {count} pictures.")
    return values


def _crop(value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise LabError(f"A crop is [left, top, size] in pixels of the picture, or null, got {value!r}.")
    left, top = (_whole("crop", v, 0, 10**6) for v in value[:2])
    return [left, top, _whole("crop size", value[2], 16, 10**6)]


def _check_numbers(spec: dict[str, Any], base: Base) -> None:
    for name, low, high in (
        ("steps", 1, MAX_STEPS),
        ("batch", 1, 64),
        ("sampling_steps", 1, 200),
        ("checkpoint_every", 1, MAX_STEPS),
        ("preview_every", 0, MAX_STEPS),
        ("warmup", 0, MAX_STEPS),
        ("prior_pictures", 1, 200),
    ):
        spec[name] = _whole(name, spec[name], low, high)
    spec["guidance"] = _number("guidance", spec["guidance"], 0, 30)
    spec["prior_weight"] = _number("prior_weight", spec["prior_weight"], 0, 10)
    if spec["snr_gamma"] is not None:
        spec["snr_gamma"] = _number("snr_gamma", spec["snr_gamma"], 0.1, 100)
    if spec["budget"] is not None:
        spec["budget"] = _whole("budget", spec["budget"], 1, 10**10)
    for name, most in (("seeds", 10), ("sample_seeds", 16)):
        seeds = [_whole(name, s, 0, 2**31 - 1) for s in _list(name, spec[name], 1, most)]
        if len(set(seeds)) < len(seeds):
            raise LabError(f"The {name.replace('_', ' ')} must differ, got {', '.join(map(str, seeds))}.")
        spec[name] = seeds
    if spec["resolution"] is not None:
        spec["resolution"] = _whole("resolution", spec["resolution"], 32, 2048)
        if spec["resolution"] % 8:
            raise LabError(f"The resolution must be a multiple of 8, got {spec['resolution']}.")
    spec["text_encoder_rate"] = _number("text_encoder_rate", spec["text_encoder_rate"], 0, 100)
    for name in SWITCHES:
        if not isinstance(spec[name], bool):
            raise LabError(f"{name} must be true or false, got {spec[name]!r}.")
    for name, known in CHOICES.items():
        if spec[name] not in known:
            raise unknown(name, str(spec[name]), [word for word in known if word])


def _list(name: str, value: Any, least: int, most: int) -> list[Any]:
    label = name.replace("_", " ")
    if not isinstance(value, list | tuple):
        raise LabError(f"The {label} must be a list, got {value!r}.")
    if not least <= len(value) <= most:
        raise LabError(f"There must be {least} to {most} {label}, got {len(value)}.")
    return list(value)


def _number(name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LabError(f"{name} must be a number, got {value!r}.")
    if not low <= value <= high:
        raise LabError(f"{name} must be between {low:,g} and {high:,g}, got {value:,g}.")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise LabError(f"{name} must be a whole number, got {value!r}.")
    if not low <= value <= high:
        raise LabError(f"{name} must be between {low:,} and {high:,}, got {int(value):,}.")
    return int(value)


# -- methods -------------------------------------------------------------------------------------------
def _methods(value: Any) -> dict[str, dict[str, Any]]:
    if isinstance(value, list | tuple):
        value = {id: {} for id in value}
    if not isinstance(value, dict) or not all(isinstance(knobs, dict | None) for knobs in value.values()):
        raise LabError('The methods must be given as {"lora": {"r": 4}, "nora": {}}: an object of settings a method.')
    if not value:
        raise LabError("No method was chosen: tick at least one.")
    return {id: knobs or {} for id, knobs in value.items()}


def _knobs(base: Base, method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """The method's settings: its own defaults, the base's presets over them, the caller's over both."""
    preset = base.preset("knobs").get(method.id, {})
    try:
        return dataclasses.asdict(method.knobs.parse(preset | given))
    except LabError as error:
        raise LabError(f"{method.name}: {error}") from error


def _learning_rates(base: Base, methods: dict[str, Any], given: Any) -> dict[str, float]:
    """The learning rate of each method: the caller's, else the base's preset, else the method's own."""
    by_method = given if isinstance(given, dict) else {} if given is None else dict.fromkeys(methods, given)
    for id in by_method:
        if id not in methods:
            raise LabError(f"A learning rate was given for {id}, which is not among the methods {', '.join(methods)}.")
    rates = {id: by_method.get(id, base.learning_rate(METHODS[id])) for id in methods}
    return {id: _number(f"The learning rate of {id}", rate, 1e-8, 100) for id, rate in rates.items()}


def layers(base: Base, targets: str, text_encoder: bool = False) -> list[Layer]:
    """The layers that these targets adapt in this base, its text encoders' too where asked. Raises LabError when the
    base's table of layers is not known or has none of them."""
    from lab import architectures

    unet = architectures.resolve(base.architecture)
    found = architectures.shapes(unet.select(targets))
    for encoder, id in zip(
        ("text_encoder", "text_encoder_2"), unet.companions or ("sdxl-te1", "sdxl-te2"), strict=False
    ):
        with contextlib.suppress(LabError):  # targets that an encoder has not, as convolutions
            rows = architectures.load(id).select(targets) if text_encoder else []
            found += [dataclasses.replace(row.layer, name=f"{encoder}.{row.layer.name}") for row in rows]
    return found


def _check_layers(base: Base, spec: dict[str, Any]) -> None:
    adapted = layers(base, spec["targets"], spec["text_encoder"])
    for id, knobs in spec["methods"].items():
        parsed = METHODS[id].knobs.parse(knobs)
        for layer in adapted:
            METHODS[id].check(layer, parsed)


def _fit_budget(base: Base, spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings with which every method trains about `budget` parameters on this base's layers."""
    from lab.budget import solve

    adapted, budget = layers(base, spec["targets"], spec["text_encoder"]), spec["budget"]
    starts = {id: METHODS[id].knobs.parse(knobs) for id, knobs in spec["methods"].items()}
    return {id: dataclasses.asdict(solve(METHODS[id], adapted, budget, start).knobs) for id, start in starts.items()}


register(Subject())
