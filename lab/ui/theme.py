"""The look of the page: a Gradio theme and a style sheet, light and dark from the same variables."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import fonts, sizes

from lab.ui.html import static

TEAL = gr.themes.Color(
    name="teal_ink",
    c50="#eef8f6",
    c100="#d9efeb",
    c200="#b3dfd8",
    c300="#80c8be",
    c400="#3fb8a8",
    c500="#12988a",
    c600="#0b7d71",
    c700="#0a665d",
    c800="#0b514b",
    c900="#0b423e",
    c950="#062725",
)
STONE = gr.themes.Color(
    name="stone_green",
    c50="#fbfaf7",
    c100="#f4f3ee",
    c200="#e5e4dd",
    c300="#cfd0c9",
    c400="#9aa39f",
    c500="#6a7673",
    c600="#4d5957",
    c700="#35403e",
    c800="#1f2927",
    c900="#171e1d",
    c950="#101615",
)


class Lab(gr.themes.Base):
    """Paper and ink with one accent; nothing is loaded from another host."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=TEAL,
            secondary_hue=TEAL,
            neutral_hue=STONE,
            radius_size=sizes.radius_md,
            text_size=sizes.text_md,
            # 600 of Plex Sans lacks letters in Gradio's copy; headings that ask for 600 get the whole 700.
            font=(fonts.LocalFont("IBM Plex Sans", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"),
            font_mono=(fonts.LocalFont("IBM Plex Mono", weights=(400, 500)), "ui-monospace", "Consolas", "monospace"),
        )
        self.name = "nora_lab"
        super().set(
            body_background_fill="*neutral_50",
            body_background_fill_dark="*neutral_950",
            body_text_color="#17201e",
            body_text_color_dark="#e6ecea",
            body_text_color_subdued="*neutral_500",
            body_text_color_subdued_dark="#95a29f",
            background_fill_primary="white",
            background_fill_primary_dark="*neutral_900",
            background_fill_secondary="*neutral_100",
            background_fill_secondary_dark="*neutral_800",
            block_background_fill="white",
            block_background_fill_dark="*neutral_900",
            block_border_width="1px",
            block_border_color="*neutral_200",
            block_border_color_dark="#2a3533",
            block_shadow="none",
            block_shadow_dark="none",
            block_label_background_fill="transparent",
            block_label_background_fill_dark="transparent",
            block_label_border_width="0px",
            block_label_border_width_dark="0px",
            block_label_text_color="*neutral_600",
            block_label_text_color_dark="#b4bfbc",
            block_label_text_weight="600",
            block_title_text_color="#17201e",
            block_title_text_color_dark="#e6ecea",
            block_title_text_weight="600",
            block_info_text_color="*neutral_500",
            block_info_text_color_dark="#95a29f",
            border_color_primary="*neutral_200",
            border_color_primary_dark="#2a3533",
            input_background_fill="white",
            input_background_fill_dark="*neutral_950",
            input_border_color="*neutral_300",
            input_border_color_dark="#3a4644",
            input_border_color_focus="*primary_500",
            input_border_color_focus_dark="*primary_400",
            input_border_width="1px",
            input_shadow_focus="0 0 0 3px *primary_100",
            input_shadow_focus_dark="0 0 0 3px *primary_900",
            button_border_width="1px",
            button_transition="background-color .15s, border-color .15s",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_dark="*primary_400",
            button_primary_background_fill_hover_dark="*primary_300",
            button_primary_text_color="white",
            button_primary_text_color_dark="#06211e",
            button_primary_border_color="*primary_600",
            button_primary_border_color_dark="*primary_400",
            button_secondary_background_fill="white",
            button_secondary_background_fill_hover="*neutral_100",
            button_secondary_background_fill_dark="*neutral_800",
            button_secondary_background_fill_hover_dark="*neutral_700",
            button_secondary_border_color="*neutral_300",
            button_secondary_border_color_dark="#3a4644",
            slider_color="*primary_600",
            slider_color_dark="*primary_400",
            checkbox_background_color_selected="*primary_600",
            checkbox_background_color_selected_dark="*primary_500",
            checkbox_border_color_selected="*primary_600",
            checkbox_border_color_selected_dark="*primary_500",
            link_text_color="*primary_700",
            link_text_color_dark="*primary_300",
            link_text_color_hover="*primary_600",
            link_text_color_hover_dark="*primary_200",
            link_text_color_visited="*primary_700",
            link_text_color_visited_dark="*primary_300",
            color_accent_soft="*primary_50",
            color_accent_soft_dark="*primary_950",
            section_header_text_weight="600",
            error_background_fill="#fdf1ef",
            error_background_fill_dark="#2a1614",
            error_text_color="#9f2a1d",
            error_text_color_dark="#ffb4a8",
            error_border_color="#e3b1aa",
            error_border_color_dark="#5d2a24",
        )


def css() -> str:
    return static("lab.css")


def head() -> str:
    """The page's script, inline: the theme is set before the first paint, so that dark pages do not flash."""
    return f'<meta name="color-scheme" content="light dark"><script>{static("lab.js")}</script>'
