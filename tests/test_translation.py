"""The catalogue of errors: complete, current, quick, and the right sentence with the right values comes out."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

import serving
from glmkit.errors import CheckpointError, MissingDependencyError, UsageError
from glmkit.serve.settings import Settings
from glmkit.translation import accepted_language, describe, labelled, language, translate
from glmkit.web.texts import say

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import error_catalogue  # noqa: E402  (lies with the scripts: it makes a page of the documentation)

# Of others, whose texts are not found in our sources: the argument parser, pydantic, the operating system, json.
FOREIGN = "foreign"


@pytest.fixture(scope="module")
def sources() -> error_catalogue.Sources:
    return error_catalogue.Sources()


@pytest.fixture(scope="module")
def catalogue() -> dict[str, str]:
    return {key: value for area in error_catalogue.read_catalogue().values() for key, value in area.items()}


# --- the catalogue ---


def test_reading_the_sources_finds_what_is_known_to_be_there(sources: error_catalogue.Sources) -> None:
    found = {(one.text, one.kind) for one in sources.templates.values()}
    assert len(found) > 1500
    assert ("there is no verb {}", "message") in found  # an f-string
    assert ("did you mean {} {}?", "hint") in found  # through a variable with several values
    assert ("cannot load {}:\n{}", "message") in found  # of the class itself
    assert ("tensor {} of shape {} is missing", "message") in found  # one of a list of problems
    assert ("two tools have one name", "fragment") in found  # through a function's parameter
    assert ("give either model.path or model.init", "fragment") in found  # a ValueError that a message quotes


def test_every_message_and_every_hint_is_in_chinese(
    sources: error_catalogue.Sources, catalogue: dict[str, str]
) -> None:
    said = [one for one in sources.templates.values() if one.kind != "fragment"]
    missing = sorted(f"{min(one.areas)}: {one.text}" for one in said if one.text not in catalogue)
    assert missing == [], "python scripts/error_catalogue.py --missing lists them for src/glmkit/translations"


def test_nearly_every_fragment_is_in_chinese(sources: error_catalogue.Sources, catalogue: dict[str, str]) -> None:
    """Fragments are found by following names; some that are found stand in no error."""
    fragments = [one.text for one in sources.templates.values() if one.kind == "fragment"]
    missing = [text for text in fragments if text not in catalogue]
    assert len(missing) < 0.05 * len(fragments), missing


def test_the_help_is_in_chinese() -> None:
    assert error_catalogue.missing_interface_texts() == set()


def test_the_catalogue_holds_nothing_that_the_sources_no_longer_say(sources: error_catalogue.Sources) -> None:
    said = {one.text for one in sources.templates.values()}
    shown = error_catalogue.interface_texts()
    for area, texts in error_catalogue.read_catalogue().items():
        if area == "interface":
            page = (ROOT / "src/glmkit/cli.py").read_text(encoding="utf-8")
            gone = {text for text in texts if text not in shown and text.partition("{}")[0].strip() not in page}
            assert gone <= {"Options", "Arguments", "Commands", "Show this message and exit."}
        elif area != FOREIGN:
            assert {text for text in texts if text not in said} == set(), area


def test_the_blanks_of_both_languages_fit(catalogue: dict[str, str]) -> None:
    for english, chinese in catalogue.items():
        count = english.count("{}")
        numbered = [int(number) for number in re.findall(r"\{(\d+)\}", chinese)]
        plain = chinese.count("{}")
        assert not (numbered and plain), chinese
        assert plain <= count, (english, chinese)
        assert all(number < count for number in numbered), (english, chinese)
        assert plain + len(set(numbered)) >= count - 1, (english, chinese)  # one may be grammar, as an s of the plural
        assert re.search("[\u3000-\u9fff\uff00-\uffee]", chinese) or english == chinese, (english, chinese)


def test_every_template_is_found_again_from_a_finished_sentence(catalogue: dict[str, str]) -> None:
    wrong = []
    for english, chinese in catalogue.items():
        values = [f"V{number}" for number in range(english.count("{}"))]
        finished, left = english, list(values)
        while left:
            finished = finished.replace("{}", left.pop(0), 1)
        expected = re.sub(r"\{(\d+)\}", lambda blank: f"V{blank[1]}", chinese)
        for value in values:
            expected = expected.replace("{}", value, 1)
        if translate(finished, "zh") != expected:
            wrong.append((finished, expected, translate(finished, "zh")))
    assert len(wrong) <= 0.005 * len(catalogue), wrong  # two templates may fit one sentence


# --- sentences ---


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("there is no verb 'caht'", "没有子命令 'caht'"),
        ("did you mean glm chat?", "是不是想输入 glm chat？"),
        ("has a zip directory of 9 entries in 7 bytes, which is too many", "的 zip 目录在 7 字节中有 9 个条目，过多"),
        ("config.json is missing", "config.json 缺失"),  # name and fragment
        ("cannot listen on ::1 port 80: Permission denied", "无法监听 ::1 的端口 80：没有权限"),  # one in another
        ("a sentence that nobody wrote", "a sentence that nobody wrote"),
        ("it is what some user typed in, not more", "it is what some user typed in, not more"),  # a weak template
        ("", ""),
    ],
)  # fmt: skip
def test_finished_sentences(english: str, chinese: str) -> None:
    assert translate(english, "zh") == chinese
    assert translate(english, "en") == english


def test_values_stay_as_they_are() -> None:
    folder = "/models/is missing {0} {} 模型"
    assert folder in translate(f"there is no adapter folder {folder}", "zh")


def test_an_error_of_several_problems_is_translated_problem_by_problem() -> None:
    error = CheckpointError(
        "m", ["config.json is missing", "tensor a.b of shape [2] is missing", "其他"], hint="fetch the file again"
    )
    message, hint = describe(error, "zh")
    assert message == "无法加载 m：\n  - config.json 缺失\n  - 缺少张量 a.b，其形状应为 [2]\n  - 其他"
    assert hint == "请重新下载该文件"
    assert describe(error, "en") == (error.message, error.hint)
    assert (
        labelled(UsageError("there is no verb 'x'", hint="glm --help"), "zh")
        == "错误：没有子命令 'x'\n提示：glm --help"
    )
    unknown = UsageError("there is no verb 'x'", hint="glm --help")
    assert labelled(unknown, "zh") == "错误：没有子命令 'x'\n提示：glm --help"
    assert labelled(unknown, "en") == "error: there is no verb 'x'\nhint: glm --help"


def test_other_exceptions_are_told_too() -> None:
    assert describe(ValueError("No such file or directory: x"), "zh") == ("没有这个文件或目录：x", None)
    assert describe(MissingDependencyError("peft", "train"), "zh")[0] == "这需要软件包 peft，但它没有安装"


# --- which language ---


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LC_ALL": "zh_CN.UTF-8", "GLMKIT_LANG": "en"}, "en"),
        ({"LC_ALL": "C", "GLMKIT_LANG": "zh"}, "zh"),
    ],
)
def test_language_of_this_machine(variables: dict[str, str], expected: str) -> None:
    assert language(variables) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("zh;q=0.3, en;q=0.7", "en"),
        ("fr, zh;q=0.1", "zh"),
        ("fr", "en"),
        ("*", "en"),
        ("zh;q=x, zhx, ;q=;;,", "en"),
        ("zh;q=0", "en"),
        ("zh-Hans-CN", "zh"),
    ],
)
def test_language_of_a_client(header: str, expected: str) -> None:
    assert accepted_language(header) == expected


def test_the_server_tells_errors_in_the_clients_language_and_programs_read_the_same() -> None:
    app = serving.fake_app(Settings())
    answers = [
        serving.ask(app, "POST", "/echo", headers={"Host": "evil.example", "Accept-Language": spoken})
        for spoken in ("en", "zh-CN,zh;q=0.9")
    ]
    english, chinese = (answer.json()["error"] for answer in answers)
    assert english["message"].startswith("this server does not answer for that Host; start it with --allowed-host")
    assert chinese["message"] == "这个服务不应答该 Host；如果应当应答，请用 --allowed-host NAME 启动"
    assert {**english, "message": ""} == {**chinese, "message": ""}
    assert answers[0].status_code == answers[1].status_code >= 400
    assert [answer.headers.get("content-language") for answer in answers] == [None, "zh"]


def test_the_web_app_says_reasons_in_its_language() -> None:
    assert say("zh", "import_failed", reason="the file is no JSON: x") == "不能导入：文件不是 JSON：x"
    assert say("en", "import_failed", reason="the file is no JSON: x") == "cannot import: the file is no JSON: x"


# --- cost ---


def test_a_sentence_takes_milliseconds_and_a_hostile_one_no_minute() -> None:
    def seconds(text: str) -> float:
        start = time.process_time()
        translate(text, "zh")
        return time.process_time() - start

    translate("there is no verb 'x'", "zh")
    assert min(seconds("no such option: --foo") for _ in range(5)) < 0.05
    for hostile in ("is {} not ", "is a: ", "a: b; ", "x is y, not ", "\n- is a", "cannot load x: "):
        assert seconds(hostile * (900 // len(hostile))) < 2
        assert seconds(hostile * (19_000 // len(hostile))) < 2


# --- the page ---


@pytest.mark.parametrize("spoken", ["en", "zh"])
def test_the_page_of_all_errors_is_current(spoken: str, sources: error_catalogue.Sources) -> None:
    page = ROOT / "docs" / ("troubleshooting.md" if spoken == "en" else "troubleshooting.zh.md")
    assert page.read_text(encoding="utf-8") == error_catalogue.page(spoken, sources), (
        "python scripts/error_catalogue.py --write"
    )
