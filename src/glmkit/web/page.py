"""The page: what stands where, and in which language. What happens when somebody touches it stands in `actions`.

conversations | mode, conversation, input | model, answer settings, tools, interpreter, prompt
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from glmkit.web.look import gradio
from glmkit.web.texts import EXAMPLES, MODES, Language, Mode, say
from glmkit.web.view import LATEX


@dataclass
class Page:
    """The parts of the page that somebody touches or that change; see `build`."""

    blocks: Any
    language: Any
    talk_id: Any
    wanted_language: Any
    wanted_talk: Any
    new: Any
    search: Any
    history: Any
    manage: Any
    name: Any
    rename: Any
    delete: Any
    delete_sure: Any
    exports: Any
    upload: Any
    sign_out: Any
    mode: Any
    banner: Any
    chat: Any
    asking: Any
    question: Any
    once: Any
    always: Any
    refuse: Any
    go_on: Any
    meter: Any
    input: Any
    announce: Any
    keys: Any
    settings: Any
    model_box: Any
    model: Any
    model_note: Any
    load: Any
    adapter: Any
    answer_box: Any
    system: Any
    max_length: Any
    top_p: Any
    temperature: Any
    repetition_penalty: Any
    reset: Any
    tools_box: Any
    offered: Any
    by_hand: Any
    definitions: Any
    definitions_note: Any
    code_box: Any
    isolation: Any
    files: Any
    reset_kernel: Any
    prompt_box: Any
    prompt_show: Any
    prompt: Any
    prompt_ids: Any

    @property
    def controls(self) -> list[Any]:
        """What decides how the next answer is made."""
        return [self.adapter, self.system, *self.sliders, self.offered, self.by_hand, self.definitions]

    @property
    def sliders(self) -> list[Any]:
        """The sampling settings, in the order of `desk.SETTINGS`."""
        return [self.max_length, self.top_p, self.temperature, self.repetition_penalty]


def build(language: Language, *, user_known: bool = False) -> Page:
    """Lays the page out.

    Args:
        language: Of the first look; the page itself changes it.
        user_known: Whether people sign in.
    """
    gr = gradio()
    parts: dict[str, Any] = {}
    with gr.Blocks(
        title="glm web", fill_height=True, fill_width=True, analytics_enabled=False, delete_cache=(600, 600)
    ) as blocks:
        parts["talk_id"] = gr.State("")
        parts["wanted_language"] = gr.Textbox(language, visible=False)
        parts["wanted_talk"] = gr.Textbox("", visible=False)
        with gr.Sidebar(position="left", width=264, elem_id="glm-left"):
            _left(gr, parts, language, user_known)
        with gr.Column(elem_id="glm-main"):
            _middle(gr, parts, language)
        with gr.Sidebar(position="right", width=320, open=False, elem_id="glm-right"):
            _right(gr, parts, language)
        parts["keys"] = gr.HTML(keys_help(language), elem_id="glm-keys")
    return Page(blocks=blocks, **parts)


def _left(gr: Any, parts: dict[str, Any], language: Language, user_known: bool) -> None:
    gr.HTML('<div class="glm-brand"><span class="mark" aria-hidden="true"></span>glm web</div>')
    parts["new"] = gr.Button(elem_id="glm-new", size="md", variant="secondary")
    parts["search"] = gr.Textbox(show_label=False, container=False, elem_id="glm-search", max_lines=1)
    parts["history"] = gr.Radio([], elem_id="glm-history", container=False, show_label=False)
    with gr.Accordion(open=False, elem_id="glm-manage") as parts["manage"]:
        parts["name"] = gr.Textbox(max_lines=1, elem_id="glm-name")
        with gr.Row():
            parts["rename"] = gr.Button(size="sm", min_width=60)
            parts["delete"] = gr.Button(size="sm", min_width=60)
            parts["delete_sure"] = gr.Button(size="sm", min_width=60, variant="stop", visible=False)
        parts["exports"] = gr.HTML(elem_id="glm-exports")
        parts["upload"] = gr.UploadButton(file_types=[".json"], size="sm", elem_id="glm-import")
    with gr.Row(elem_id="glm-foot"):
        parts["language"] = gr.Radio(
            [("中文", "zh"), ("English", "en")],
            value=language,
            show_label=False,
            container=False,
            elem_id="glm-language",
        )
        parts["sign_out"] = gr.HTML(visible=user_known)


def _middle(gr: Any, parts: dict[str, Any], language: Language) -> None:
    parts["mode"] = gr.Radio([], elem_id="glm-mode", show_label=False, container=False)
    parts["banner"] = gr.HTML(visible=False, elem_id="glm-banner")
    parts["chat"] = gr.Chatbot(
        elem_id="glm-chat",
        show_label=False,
        container=False,
        height=None,
        scale=1,
        layout="bubble",
        editable="all",
        latex_delimiters=LATEX,
        buttons=["copy", "copy_all"],
        feedback_options=None,
        sanitize_html=True,
        allow_tags=False,
        group_consecutive_messages=True,
        allow_file_downloads=False,
    )
    with gr.Group(visible=False, elem_id="glm-asking") as parts["asking"]:
        parts["question"] = gr.Markdown(elem_id="glm-question", sanitize_html=True)
        with gr.Row():
            parts["once"] = gr.Button(size="sm", variant="primary", elem_id="glm-once")
            parts["always"] = gr.Button(size="sm", elem_id="glm-always")
            parts["refuse"] = gr.Button(size="sm", variant="stop", elem_id="glm-refuse")
    with gr.Row(elem_id="glm-state"):
        parts["meter"] = gr.HTML(elem_id="glm-context")
        parts["go_on"] = gr.Button(size="sm", visible=False, elem_id="glm-continue")
    with gr.Row(elem_id="glm-ask"):
        parts["input"] = gr.Textbox(
            show_label=False,
            container=False,
            lines=1,
            max_lines=8,
            submit_btn=True,
            stop_btn=False,
            autofocus=True,
            elem_id="glm-input",
            max_length=200_000,
        )
    parts["announce"] = gr.HTML('<div role="status" aria-live="polite"></div>', elem_id="glm-announce")


def _right(gr: Any, parts: dict[str, Any], language: Language) -> None:
    parts["settings"] = gr.HTML(elem_id="glm-settings")
    with gr.Accordion(open=True, elem_classes="glm-box") as parts["model_box"]:
        parts["model"] = gr.Dropdown([], elem_id="glm-model", show_label=False, container=False)
        parts["model_note"] = gr.HTML(elem_id="glm-model-note")
        parts["load"] = gr.Button(size="sm", visible=False, elem_id="glm-load")
        parts["adapter"] = gr.Dropdown([], visible=False, elem_id="glm-adapter")
    with gr.Accordion(open=True, elem_classes="glm-box") as parts["answer_box"]:
        parts["system"] = gr.Textbox(lines=2, max_lines=8, elem_id="glm-system")
        parts["max_length"] = gr.Slider(1, 1024, step=1, elem_id="glm-max-length")
        parts["top_p"] = gr.Slider(0.01, 1, step=0.01, elem_id="glm-top-p")
        parts["temperature"] = gr.Slider(0, 2, step=0.01, elem_id="glm-temperature")
        parts["repetition_penalty"] = gr.Slider(1, 2, step=0.01, elem_id="glm-repetition-penalty")
        parts["reset"] = gr.Button(size="sm", elem_id="glm-reset")
    with gr.Accordion(open=True, visible=False, elem_classes="glm-box") as parts["tools_box"]:
        parts["offered"] = gr.CheckboxGroup([], elem_id="glm-offered")
        parts["by_hand"] = gr.Checkbox(elem_id="glm-by-hand")
        parts["definitions"] = gr.Code(
            language="yaml", lines=4, max_lines=18, elem_id="glm-definitions", wrap_lines=True, buttons=[]
        )
        parts["definitions_note"] = gr.HTML(elem_id="glm-definitions-note")
    with gr.Accordion(open=True, visible=False, elem_classes="glm-box") as parts["code_box"]:
        parts["isolation"] = gr.HTML(elem_id="glm-isolation")
        parts["files"] = gr.HTML(elem_id="glm-files")
        parts["reset_kernel"] = gr.Button(size="sm", elem_id="glm-reset-kernel")
    with gr.Accordion(open=False, elem_classes="glm-box", elem_id="glm-prompt-box") as parts["prompt_box"]:
        parts["prompt_show"] = gr.Button(size="sm", elem_id="glm-prompt-show")
        parts["prompt"] = gr.HighlightedText(
            elem_id="glm-prompt", show_label=False, combine_adjacent=False, show_inline_category=True, visible=False
        )
        parts["prompt_ids"] = gr.Textbox(
            elem_id="glm-prompt-ids", lines=3, max_lines=8, visible=False, interactive=False
        )


# --- words ---


def relabel(page: Page, language: Language) -> dict[Any, Any]:
    """Everything on the page that is written in one of the languages and does not depend on the conversation.

    Args:
        page: The page.
        language: The language.

    Returns:
        An update for each part.
    """
    gr = gradio()

    def t(key: str) -> str:
        return say(language, key)

    return {
        page.new: gr.update(value="＋ " + t("new")),
        page.search: gr.update(placeholder=t("search")),
        page.history: gr.update(label=t("conversations")),
        page.manage: gr.update(label=t("manage")),
        page.name: gr.update(label=t("name")),
        page.rename: gr.update(value=t("rename")),
        page.delete: gr.update(value=t("delete")),
        page.delete_sure: gr.update(value=t("delete_sure")),
        page.sign_out: f'<a class="glm-out" href="/logout" title="{t("sign_out")}" aria-label="{t("sign_out")}">⎋</a>',
        page.upload: gr.update(label=t("import")),
        page.language: gr.update(label=t("language")),
        page.announce: '<div role="status" aria-live="polite"></div>',
        page.mode: gr.update(label=t("mode"), choices=[(t(f"mode_{mode}"), mode) for mode in MODES]),
        page.once: gr.update(value=t("once")),
        page.always: gr.update(value=t("always")),
        page.refuse: gr.update(value=t("no")),
        page.go_on: gr.update(value=t("continue")),
        page.settings: f'<div class="glm-brand">{t("settings")}</div>',
        page.model_box: gr.update(label=t("model")),
        page.load: gr.update(value=t("model_load")),
        page.adapter: gr.update(label=t("adapter"), info=t("adapter_hint")),
        page.answer_box: gr.update(label=t("settings_answer")),
        page.system: gr.update(label=t("system"), info=t("system_hint")),
        page.max_length: gr.update(label=t("max_length")),
        page.top_p: gr.update(label=t("top_p")),
        page.temperature: gr.update(label=t("temperature")),
        page.repetition_penalty: gr.update(label=t("repetition_penalty")),
        page.reset: gr.update(value=t("reset")),
        page.tools_box: gr.update(label=t("tools")),
        page.offered: gr.update(label=t("registered"), info=t("registered_hint")),
        page.by_hand: gr.update(label=t("by_hand"), info=t("by_hand_hint")),
        page.definitions: gr.update(label=t("definitions")),
        page.code_box: gr.update(label=t("mode_code")),
        page.reset_kernel: gr.update(value=t("reset_kernel")),
        page.prompt_box: gr.update(label=t("prompt")),
        page.prompt_show: gr.update(value=t("prompt_show")),
        page.prompt_ids: gr.update(label=t("prompt_ids")),
        page.keys: keys_help(language),
    }


def examples(language: Language, mode: Mode) -> list[dict[str, str]]:
    """The questions that an empty conversation proposes.

    Args:
        language: Of the page.
        mode: Of the conversation.
    """
    return [{"text": text, "display_text": text} for text in EXAMPLES[language][mode]]


def greeting(language: Language, mode: Mode, problem: str = "") -> str:
    """What stands in an empty conversation, as HTML.

    Args:
        language: Of the page.
        mode: Of the conversation.
        problem: Why the mode cannot be had.
    """
    about = html.escape(problem or say(language, f"about_{mode}"))
    kind = ' class="glm-problem"' if problem else ""
    return f'<div class="glm-greeting"><h1>{say(language, f"greeting_{mode}")}</h1><p{kind}>{about}</p></div>'


def keys_help(language: Language) -> str:
    """The overlay with the keys, as HTML; shown and closed by the page's own script.

    Args:
        language: Of the page.
    """
    table = [
        ("Enter", "keys_send"),
        ("Shift + Enter", "keys_line"),
        ("Esc", "keys_stop"),
        ("↑", "keys_edit"),
        ("Ctrl + K", "keys_search"),
        ("?", "keys_help"),
    ]
    lines = "".join(f"<dt><kbd>{key}</kbd></dt><dd>{say(language, text)}</dd>" for key, text in table)
    title = say(language, "keys")
    return (
        f'<div class="glm-overlay" role="dialog" aria-modal="true" aria-label="{title}" tabindex="-1" hidden>'
        f"<h2>{title}</h2><dl>{lines}</dl>"
        f"<button type='button' class='glm-close'>{say(language, 'close')}</button></div>"
    )
