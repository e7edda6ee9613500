"""How the page looks: gradio's theme in calm colours, system fonts, the page's own styles and script."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

from glmkit.errors import MissingDependencyError

_FONTS = (
    "system-ui,-apple-system,Segoe UI,PingFang SC,Hiragino Sans GB,Microsoft YaHei,Noto Sans CJK SC,Noto Sans SC,"
    "Source Han Sans SC,sans-serif"
)
_MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,DejaVu Sans Mono,Noto Sans Mono CJK SC,monospace"
_BLUES = "#eef5fb #d9e8f6 #b6d3ee #8bb8e2 #5c98d1 #3a7bba #2c649d #255180 #20446b #1b3756 #12263c"
_GREYS = "#fbfaf8 #f4f2ee #e7e4de #d4d0c8 #a8a39a #78736a #57534b #403c36 #2a2824 #1c1b19 #131211"


def gradio() -> Any:
    """The module gradio, with nothing of it that would call home.

    Raises:
        MissingDependencyError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while it is imported
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as module
    except ImportError:
        raise MissingDependencyError("gradio", "web") from None
    return module


def theme() -> Any:
    """Colours and fonts: those that the system has, so that nothing is fetched."""
    gr = gradio()
    base = gr.themes.Base(
        primary_hue=gr.themes.Color(*_BLUES.split()),
        neutral_hue=gr.themes.Color(*_GREYS.split()),
        radius_size=gr.themes.sizes.radius_lg,
        text_size=gr.themes.sizes.text_md,
        font=_FONTS.split(","),
        font_mono=_MONO.split(","),
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_900",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_info_text_size="*text_xs",
        block_padding="*spacing_sm",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_800",
        body_text_color="#23211d",
        body_text_color_dark="#e9e6e0",
        body_text_color_subdued="#69655c",
        body_text_color_subdued_dark="#a8a39a",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_700",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*primary_950",
        slider_color="*primary_500",
    )


def asset(name: str) -> str:
    """A text file that belongs to the page.

    Args:
        name: Its name.
    """
    return (files("glmkit.web") / "assets" / name).read_text(encoding="utf-8")
