// What the page does besides gradio: it proves where it comes from, guards Enter while Chinese is being typed, has keys,
// and tells screen readers about an answer once, at its end.
"use strict";
(() => {
  const token = document.querySelector('meta[name="glm-token"]')?.content ?? "";
  const own = (url) => new URL(url, location.href).origin === location.origin;

  // Every change carries the page's token; other sites cannot know it.
  const fetchPlainly = window.fetch.bind(window);
  window.fetch = (resource, options = {}) => {
    const url = resource instanceof Request ? resource.url : String(resource);
    if (!own(url)) return Promise.reject(new TypeError("this page talks to its own server only"));
    const method = (options.method ?? (resource instanceof Request ? resource.method : "GET")).toUpperCase();
    if (method === "GET" || method === "HEAD") return fetchPlainly(resource, options);
    const headers = new Headers(options.headers ?? (resource instanceof Request ? resource.headers : undefined));
    headers.set("x-glm-token", token);
    return fetchPlainly(resource, { ...options, headers });
  };
  const send = XMLHttpRequest.prototype.send;
  XMLHttpRequest.prototype.send = function (body) {
    this.setRequestHeader("x-glm-token", token);
    return send.call(this, body);
  };

  // What is copied has no invisible characters in it (see view.py).
  const clean = (text) =>
    text.replaceAll("\u2060\\", "").replaceAll("<\u2060", "<").replaceAll("!\u2060", "!").replaceAll("]\u2060", "]")
      .replaceAll("\u2060\u00a0", " ").replaceAll("\u2060\u2003", "\t")
      .replace(/\n*<span class="glm-[a-z]+">[^<]*<\/span>/g, "");
  if (navigator.clipboard?.writeText) {
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = (text) => write(clean(String(text)));
  }
  document.addEventListener("copy", (event) => {
    const text = String(getSelection());
    if (text.includes("\u2060") && event.clipboardData) {
      event.clipboardData.setData("text/plain", clean(text));
      event.preventDefault();
    }
  });

  // Enter that chooses a Chinese word must not send. Chromium and Firefox say isComposing or keyCode 229; Safari sends the
  // key after compositionend, so an Enter right behind it counts as part of it too.
  const AFTER_COMPOSITION_MS = 80;
  let composing = false;
  let composedAt = -Infinity;
  addEventListener("compositionstart", () => { composing = true; }, true);
  addEventListener("compositionend", () => { composing = false; composedAt = performance.now(); }, true);
  const guard = (event) => {
    if (event.key !== "Enter" && event.keyCode !== 13 && event.keyCode !== 229) return;
    const late = performance.now() - composedAt < AFTER_COMPOSITION_MS;
    if (event.isComposing || composing || event.keyCode === 229 || late) {
      event.stopImmediatePropagation();
      if (late && !event.isComposing && !composing && !event.shiftKey) event.preventDefault();
    }
  };
  for (const kind of ["keydown", "keypress", "keyup"]) addEventListener(kind, guard, true);

  // Words of gradio's own buttons, which otherwise follow the browser and not the page.
  const builtIn = [
    ["Clear", "清空"], ["Copy conversation", "复制对话"], ["Copy message", "复制"], ["Retry", "重新生成"], ["Undo", "撤回"],
    ["Edit", "编辑"], ["Submit", "保存"], ["Cancel", "取消"], ["Toggle Sidebar", "展开或收起侧栏"],
  ];
  const known = new Map([["重试", "Retry"], ["撤销", "Undo"], ["清除", "Clear"], ["复制消息", "Copy message"], ["提交", "Submit"], ["发送", "Submit"],
    ["清空对话", "Clear"]]);
  for (const [en, zh] of builtIn) { known.set(en, en); known.set(zh, en); }
  const inChinese = new Map(builtIn);
  // --- keys ---
  const find = (selector) => document.querySelector(selector);
  const input = () => find("#glm-input textarea");
  const overlay = () => find("#glm-keys .glm-overlay");
  const showKeys = (shown) => {
    const box = overlay();
    if (!box) return;
    box.hidden = !shown;
    (shown ? box : input())?.focus();
  };
  const editLast = () => {
    const pencils = [...document.querySelectorAll("#glm-chat .message-buttons-right button")];
    pencils.filter((one) => known.get(one.ariaLabel) === "Edit").at(-1)?.click();
  };
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || event.target.isContentEditable;
    const open = overlay() && !overlay().hidden;
    if (event.key === "Escape") {
      if (open) showKeys(false);
      else find("#glm-input .stop-button")?.click();
    } else if (event.key === "?" && !typing) {
      event.preventDefault();
      showKeys(!open);
    } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      const left = find("#glm-left");
      if (left && !left.classList.contains("open")) left.querySelector(".toggle-button")?.click();
      find("#glm-search textarea, #glm-search input")?.focus();
    } else if (event.key === "ArrowUp" && event.target === input() && !input().value) {
      event.preventDefault();
      editLast();
    }
  });
  addEventListener("click", (event) => {
    if (event.target.closest?.(".glm-close")) showKeys(false);
  });

  // --- screen readers, languages, phones ---
  const prepare = () => {
    const log = find("#glm-chat [role='log'], #glm-chat [aria-live]");
    if (log && log.getAttribute("aria-live") !== "off") log.setAttribute("aria-live", "off"); // the announcement below says it once
    const box = input();
    const words = { zh: ["输入消息", "发送", "停止", "搜索对话"], en: ["Message", "Send", "Stop", "Search chats"] };
    const language = find("#glm-language input:checked")?.value ?? "zh";
    const [message, sends, stops, searches] = words[language] ?? words.en;
    if (document.documentElement.lang !== language) document.documentElement.lang = language;
    nameButtons(language);
    for (const box of document.querySelectorAll("#glm-chat textarea")) {
      const plain = clean(box.value); // a message that is edited
      if (plain === box.value) continue;
      box.value = plain;
      box.dispatchEvent(new Event("input", { bubbles: true }));
    }
    closeForPhone();
    box?.setAttribute("aria-label", message);
    find("#glm-input .submit-button")?.setAttribute("aria-label", sends);
    find("#glm-input .stop-button")?.setAttribute("aria-label", stops);
    find("#glm-search textarea, #glm-search input")?.setAttribute("aria-label", searches);
  };
  const nameButtons = (language) => {
    for (const button of document.querySelectorAll("#glm-chat button[aria-label], .toggle-button")) {
      const key = known.get(button.ariaLabel);
      if (!key) continue;
      const name = language === "zh" ? inChinese.get(key) ?? key : key;
      if (button.ariaLabel !== name) button.ariaLabel = name;
      if (button.title && button.title !== name) button.title = name;
    }
    for (const message of document.querySelectorAll('#glm-chat [data-testid="bot"], #glm-chat [data-testid="user"]')) {
      if (message.hasAttribute("aria-label")) message.removeAttribute("aria-label"); // it would read Markdown aloud
    }
  };
  let closedForPhone = false;
  const closeForPhone = () => {
    const left = find("#glm-left.open");
    if (closedForPhone || !left) return;
    closedForPhone = true;
    if (innerWidth <= 768) left.querySelector(".toggle-button")?.click();
  };
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; prepare(); });
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
