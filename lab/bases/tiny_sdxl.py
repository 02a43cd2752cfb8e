"""The embedded base: SDXL's structure at 64 pixels, trained on captioned emoji scenes (`lab/pretrain`).

Its presets come from a recorded sweep, which `python -m lab bench subject_sweep search` and `… presets` repeat: what was
measured stands in `lab/bench/subject_search.csv` and `lab/bench/subject_presets.csv`, by weights.
"""

from lab.bases import ASSETS, Base, register

register(
    Base(
        id="tiny-sdxl",
        name="Tiny SDXL (embedded)",
        family="sdxl",
        source=str(ASSETS / "tiny-sdxl"),
        scorer=str(ASSETS / "tiny-clip"),
        architecture="tiny-sdxl",
        summary="SDXL's structure at 64 pixels, made for this lab: a comparison takes minutes on two processor cores.",
        size_conditioning=False,
        licence="Apache-2.0; trained on Noto Emoji (Apache-2.0), Twemoji (CC-BY 4.0) and Fluent Emoji (MIT)",
        presets={
            "subject": {
                "steps": 200,
                "batch": 4,
                "sampling_steps": 25,
                "guidance": 3.5,
                "checkpoint_every": 50,
                "preview_every": 25,
                "prompts": [
                    "a {subject} in the snow",
                    "a {subject} on the beach",
                    "a {subject} at night under the stars",
                    "a {subject} under the sea",
                    "a {subject} on a gray background",
                    "a {subject} on a black background",
                ],
            },
            "learning_rates": {"lora": 2e-3, "nora": 3e-3},
            "knobs": {"lora": {"r": 4}, "nora": {"r_outer": 0.5, "r_inner": 4}},
        },
        order=10,
    )
)
