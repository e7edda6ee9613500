"""What the chat in a terminal says beside the answers, in English and in Chinese; a test compares the two.

Errors are written in English where they are raised; `glmkit.translation` has their Chinese edition.
"""

from __future__ import annotations

from collections.abc import Mapping

from glmkit.translation import Language

COMMANDS: Mapping[str, tuple[str, str]] = {
    "/help": ("this list", "显示这份列表"),
    "/clear": (
        "forget the conversation, not the system prompt (also: clear, /new)",
        "清空对话，保留系统提示（也可以写 clear、/new）",
    ),
    "/system": (
        "/system TEXT sets the system prompt, /system off removes it, /system shows it",
        "/system 文本 设置系统提示，/system off 去掉，/system 查看",
    ),
    "/set": (
        "/set temperature=0.5 changes a setting, /set temperature=default undoes it, /set shows all",
        "/set temperature=0.5 修改设置，/set temperature=default 恢复默认，/set 查看全部",
    ),
    "/model": (
        "/model NAME goes on with another model, /model shows which one answers",
        "/model 名称 换一个模型继续对话，/model 查看当前模型",
    ),
    "/adapter": (
        "/adapter NAME lets it answer, /adapter base none; /adapter lists those that are loaded",
        "/adapter 名称 用它来回答，/adapter base 不用适配器；/adapter 列出已加载的适配器",
    ),
    "/stats": (
        "tokens, speed and context of the last answer; /stats on shows them after each, /stats off does not",
        "上一个回答的词元数、速度和上下文占用；/stats on 每次回答后都显示，/stats off 不显示",
    ),
    "/retry": ("answer the last question again", "重新回答上一个问题"),
    "/edit": ("change the last question in $EDITOR and ask it again", "用 $EDITOR 修改上一个问题并重新提问"),
    "/undo": ("take back the last question and its answer", "撤回上一个问题和它的回答"),
    "/save": (
        "/save FILE writes the conversation: .json, .md or .html (also: /export)",
        "/save 文件 写出对话：.json、.md 或 .html（也可以写 /export）",
    ),
    "/load": (
        "/load FILE goes on with a .json conversation, /load ID with a kept one; /load lists them",
        "/load 文件 继续 .json 里的对话，/load ID 继续保存过的对话；/load 列出它们",
    ),
    "/lang": ("/lang zh or /lang en changes the language of these texts", "/lang zh 或 /lang en 切换这些提示的语言"),
    "/quit": ("leave (also: stop, /bye, Ctrl-D)", "退出（也可以写 stop、/bye，或按 Ctrl-D）"),
}

_TEXTS: Mapping[str, tuple[str, str]] = {
    "keys": (
        "Enter sends, Esc Enter begins a new line, Ctrl-G opens $EDITOR, Ctrl-C stops an answer, twice it leaves",
        "Enter 发送，Esc Enter 换行，Ctrl-G 打开 $EDITOR，Ctrl-C 停止回答，连按两次退出",
    ),
    "blanks": (
        "[MASK] is a blank, [sMASK] one for a sentence, [gMASK] one to go on at; what was said before is not read",
        "[MASK] 是一个空，[sMASK] 填一句，[gMASK] 从那里往下写；之前说过的不会再读",
    ),
    "fills": (
        "{name} fills blanks: write [MASK] where it shall put words; each text stands alone",
        "{name} 用来填空：在要填的地方写 [MASK]；每段文字各自独立",
    ),
    "base_model": (
        "warning: {name} is a base model: it continues texts and was not trained to chat",
        "警告：{name} 是基座模型，只会续写文字，没有训练过对话",
    ),
    "greeting": ("{name}. {keys}; /help lists commands", "{name}。{keys}；/help 列出命令"),
    "greeting_adapter": (
        "{name} with {adapter}. {keys}; /help lists commands",
        "{name}，适配器 {adapter}。{keys}；/help 列出命令",
    ),
    "unanswered": (
        "[the last question has no answer; /retry asks it again]",
        "[上一个问题还没有回答；/retry 重新提问]",
    ),
    "leave": ("[Ctrl-C again, Ctrl-D or /quit leaves]", "[再按一次 Ctrl-C，或按 Ctrl-D、输入 /quit 退出]"),
    "cleared": ("[cleared]", "[已清空]"),
    "system": ("[system: {text}]", "[系统提示：{text}]"),
    "none": ("none", "无"),
    "loading": ("loading {name} …", "正在加载 {name} …"),
    "model": ("[model: {name}]", "[模型：{name}]"),
    "undone": ("[took back the last question]", "[已撤回上一个问题]"),
    "saved": ("[saved {path}]", "[已保存 {path}]"),
    "loaded": ("[{title}: {count} messages]", "[{title}：{count} 条消息]"),
    "messages": ("{count} messages", "{count} 条消息"),
    "nothing_kept": ("[no conversation is kept yet]", "[还没有保存过的对话]"),
    "language": ("[language: English]", "[语言：中文]"),
    "unchanged": ("[the question was not changed]", "[问题没有修改]"),
    "asked": ("> {text}", "> {text}"),
    "dropped_one": (
        "[the context is full: the oldest turn was left out]",
        "[上下文已满：省略了最早的一轮对话]",
    ),
    "dropped": (
        "[the context is full: the oldest {turns} turns were left out]",
        "[上下文已满：省略了最早的 {turns} 轮对话]",
    ),
    "tool": ("[calls the tool {name} with {arguments}]", "[调用工具 {name}，参数 {arguments}]"),
    "malformed": ("[not a usable tool call: {text}]", "[无法使用的工具调用：{text}]"),
    "cut": ("[cut at the longest length allowed]", "[已到允许的最大长度]"),
    "stopped": ("[stopped]", "[已停止]"),
    "stats": (
        "[{tokens} tokens, {speed:.1f} tokens/s; prompt {prompt} tokens in {seconds:.2f} s;"
        " ended by: {reason}{context}]",
        "[{tokens} 个词元，{speed:.1f} 词元/秒；提示 {prompt} 个词元，用时 {seconds:.2f} 秒；"
        "结束原因：{reason}{context}]",
    ),
    "stats_context": (
        "; context: {used:,} of {all:,} tokens",
        "；上下文：{used:,} / {all:,} 个词元",
    ),
    "below": (
        "{name}  context {share:.0%} of {all:,}  {speed:.1f} tokens/s",
        "{name}  上下文 {share:.0%} / {all:,}  {speed:.1f} 词元/秒",
    ),
}


def say(key: str, language: Language, **values: object) -> str:
    """A text in a language.

    Args:
        key: Which.
        language: "en" or "zh".
        **values: What its blanks are filled with.
    """
    return _TEXTS[key][language == "zh"].format(**values)


def explain(command: str, language: Language) -> str:
    """What a command does, in one line.

    Args:
        command: With its slash.
        language: "en" or "zh".
    """
    return COMMANDS[command][language == "zh"]
