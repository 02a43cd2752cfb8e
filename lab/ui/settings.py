"""The Subject tab's advanced settings: their controls, and the task's spec made from what the visitor entered."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lab.bases import hub_allowed, offered, pick
from lab.errors import LabError
from lab.tasks import TASKS

DEFAULT_BASE = "tiny-sdxl"
# The controls in the order in which handlers get their values.
NAMES = (
    "base", "targets", "steps", "batch", "lr", "seeds", "budget",
    "prompts", "sample_seeds", "sampling_steps", "guidance",
    "snr_gamma", "prior_weight", "flip", "resolution",
    "buckets", "text_encoder", "text_encoder_rate", "gradient_checkpointing", "offload", "compile", "weights", "optimizer",
)  # fmt: skip
TARGETS = [
    ("attention: q, k, v, out", "attn"),
    ("attention: q, v", "q,v"),
    ("attention and MLP", "all"),
    ("MLP", "mlp"),
]
WEIGHTS = [("the device's own", ""), ("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")]
OPTIMIZERS = [("AdamW", "adamw"), ("AdamW, 8 bit (needs bitsandbytes)", "adamw8bit")]
CHECKED = {  # switches beside `flip`: what they do, and when
    "buckets": ("Aspect-ratio buckets", "A picture you did not crop is trained whole, in its own shape."),
    "text_encoder": ("Adapt the text encoders", "Adapters on both of them too: stronger, slower, sooner too much."),
    "gradient_checkpointing": ("Gradient checkpointing", "A fraction of the memory for a third more time."),
    "offload": ("Offload when drawing", "The UNet leaves the GPU while pictures are decoded in tiles."),
    "compile": ("Compile the UNet", "Minutes slower to begin, then faster: for long runs on a GPU."),
}


def defaults(base: str) -> dict[str, Any]:
    """The task's settings for this base as it would fill them in itself."""
    return TASKS["subject"].check({"base": base, "class_word": "subject"})


def shown(base: str) -> dict[str, Any]:
    """Values of the controls for a base's defaults; 0 stands for what is off or left to the base."""
    spec = defaults(base)
    values = {
        "base": base,
        "targets": spec["targets"],
        "steps": spec["steps"],
        "batch": spec["batch"],
        "lr": 0,
        "seeds": ", ".join(map(str, spec["seeds"])),
        "budget": 0,
        "prompts": "\n".join(spec["prompts"]),
        "sample_seeds": ", ".join(map(str, spec["sample_seeds"])),
        "sampling_steps": spec["sampling_steps"],
        "guidance": spec["guidance"],
        "snr_gamma": spec["snr_gamma"] or 0,
        "prior_weight": spec["prior_weight"],
        "flip": spec["flip"],
        "resolution": spec["resolution"] or 0,
        "weights": spec["weights"] or "",
        **{name: spec[name] for name in (*CHECKED, "text_encoder_rate", "optimizer")},
    }
    return {name: values[name] for name in NAMES}


def build() -> dict[str, Any]:
    """The controls, in an accordion, by name."""
    first = shown(DEFAULT_BASE)
    bases = [(base.name, base.id) for base in offered()]
    any_base = hub_allowed()
    info = "Shared by every method." + (" Or any SDXL of the Hub, as owner/name." if any_base else "")
    made: dict[str, Any] = {}

    def number(name: str, label: str, info: str, whole: bool = True) -> None:
        made[name] = gr.Number(first[name], label=label, info=info, precision=0 if whole else None, min_width=140)

    with gr.Accordion("Training, prompts and seeds", open=False, elem_id="advanced"):
        with gr.Row():
            made["base"] = gr.Dropdown(
                bases, value=first["base"], label="Base model", info=info, allow_custom_value=any_base
            )
            made["targets"] = gr.Dropdown(
                TARGETS, value=first["targets"], label="Layers to adapt", info="The same for every method."
            )
        with gr.Row():
            number("steps", "Steps", "Batches each run trains on.")
            number("batch", "Batch", "Pictures a step.")
            number("lr", "Learning rate", "0: each method's own.", whole=False)
        with gr.Row():
            made["seeds"] = gr.Textbox(
                first["seeds"], label="Training seeds", info="Each method runs once per seed.", min_width=140
            )
            number("budget", "Equal budget", "Trainable parameters to fit every method to. 0: off.")
        made["prompts"] = gr.Textbox(
            first["prompts"], label="Prompts", info="One a line; {subject} becomes trigger and class word.", lines=4
        )
        with gr.Row():
            made["sample_seeds"] = gr.Textbox(
                first["sample_seeds"], label="Picture seeds", info="The same for every method.", min_width=140
            )
            number("sampling_steps", "Sampling steps", "Denoising steps a picture.")
            number("guidance", "Guidance", "Classifier-free guidance.", whole=False)
        with gr.Row():
            number("snr_gamma", "Min-SNR gamma", "5 is usual. 0: off.", whole=False)
            number("prior_weight", "Prior preservation", "Weight of class pictures. 0: off.", whole=False)
            number("resolution", "Resolution", "0: the base's own.")
        with gr.Row():
            made["flip"] = gr.Checkbox(
                first["flip"],
                label="Mirror pictures",
                info="Leave off for subjects with writing or a side.",
                min_width=220,
            )
            for name, (label, info) in CHECKED.items():
                made[name] = gr.Checkbox(first[name], label=label, info=info, min_width=220)
        with gr.Row():
            number("text_encoder_rate", "Text encoders' rate", "Share of the UNet's learning rate.", whole=False)
            made["weights"] = gr.Dropdown(
                WEIGHTS, value=first["weights"], label="Base held in", info="Adapters are fp32.", min_width=140
            )
            made["optimizer"] = gr.Dropdown(
                OPTIMIZERS,
                value=first["optimizer"],
                label="Optimizer",
                info="A method may bring its own.",
                min_width=140,
            )
    return {name: made[name] for name in NAMES}


def spec(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a spec that these controls hold; what was left empty is left to the task. Raises LabError."""
    base = pick(str(values["base"] or "").strip()).id  # a visitor's path is never opened
    prompts = [line.strip() for line in str(values["prompts"] or "").splitlines() if line.strip()]
    found = {
        "base": base,
        "targets": values["targets"],
        "seeds": _numbers(values["seeds"], "Training seeds"),
        "sample_seeds": _numbers(values["sample_seeds"], "Picture seeds"),
        "prompts": prompts or None,
        "flip": bool(values["flip"]),
    }
    found |= {name: bool(values[name]) for name in CHECKED}
    for name in ("steps", "batch", "sampling_steps", "guidance", "prior_weight", "text_encoder_rate", "optimizer"):
        found[name] = values[name]
    for name in ("lr", "budget", "snr_gamma", "resolution", "weights"):
        found[name] = values[name] or None  # an empty number field shows 0
    return {name: value for name, value in found.items() if value is not None}


def _numbers(text: Any, name: str) -> list[int] | None:
    parts = str(text if text is not None else "").replace(";", ",").replace(" ", ",").split(",")
    try:
        return [int(part) for part in parts if part] or None
    except ValueError:
        raise LabError(f"{name} must be whole numbers with commas between them, got '{str(text)[:60]}'.") from None
