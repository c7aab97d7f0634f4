"""The page of the server, in headless Chromium."""

import json
import random
import re
import threading
import time
from pathlib import Path

import pytest


if not all(Path("/usr/bin", name).exists() for name in ("chromium", "chromedriver")):
    pytest.skip("needs /usr/bin/chromium and /usr/bin/chromedriver (Debian: chromium-driver)", allow_module_level=True)

from fixtures.chat_server import ChatServer, Scripted, call, prefer, resize, start_chromium
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = start_chromium(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


class Page:
    """The page of a server, as a reader has it."""

    def __init__(self, driver, server):
        self.driver, self.server = driver, server
        self.errors = []  # parts of errors in the console that a test expects
        driver.get(server.address)
        self.wait(lambda: self.js("return $('model').value !== '' || $('key').open || !$('notice').hidden"))

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def click(self, text):
        button = self.button(text)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
        button.click()

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector)

    def button(self, text):
        return next(one for one in self.driver.find_elements(By.TAG_NAME, "button") if one.text == text)

    def has_button(self, text):
        return any(one.text == text for one in self.driver.find_elements(By.TAG_NAME, "button"))

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def wait(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"after {seconds} s; the page has {self.texts('body')}"
            time.sleep(0.02)

    def finish(self):
        self.wait(lambda: self.js("return live === null"))

    def ask(self, text):
        self.find("#input").send_keys(text, Keys.ENTER)

    def asked(self, text):
        """Asks, and waits for the end of the answer."""
        self.ask(text)
        self.finish()
        return self.texts("article.assistant > .text")[-1]


@pytest.fixture
def open_page(chromium):
    """Opens a page whose server has these replies. Afterwards there were no errors, and no requests to other hosts."""
    opened = []
    chromium.get_log("browser"), chromium.get_log("performance")
    resize(chromium, 1024, 768)

    def opens(*replies, **options):
        server = ChatServer(*replies, **options).__enter__()
        opened.append(Page(chromium, server))
        return opened[-1]

    yield opens
    (page,) = opened
    requests = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    sent = [one["params"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    # Chromium's own first page, and what that has in it, have addresses that begin with chrome: or chrome-untrusted:.
    addresses = {one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")}
    assert page.server.address + "/v1/models" in addresses
    assert {one for one in addresses if not one.startswith((page.server.address + "/", "data:"))} == set()
    said = [entry["message"] for entry in chromium.get_log("browser")]
    assert [one for one in said if not any(part in one for part in page.errors)] == []
    prefer(chromium)
    chromium.get("about:blank")
    page.server.__exit__()


def test_a_reply_streams_in(open_page):
    go = threading.Event()
    page = open_page(Scripted(("Hello ", "**wor", "ld**", "!"), hold=go))
    page.ask("Hi")
    page.wait(lambda: page.texts("article.assistant strong") == ["world"])
    assert page.texts("article.assistant > .text") == ["Hello world"]
    assert page.find("#send").text == "Stop"
    # Pieces that arrive in the same millisecond have no speed, so that none may be said yet.
    assert page.texts(".figures")[0].split(" · ")[0] == "≈ 3 tokens"
    go.set()
    page.finish()
    assert page.texts("article")[0].startswith("Hi")
    assert page.texts("article.assistant > .text") == ["Hello world!"]
    assert page.find("#send").text == "Send"
    parts = page.texts(".figures")[0].split(" · ")
    assert (parts[0], parts[-1]) == ("4 tokens", "prompt of 96, 64 cached")
    assert parts[1].endswith(" tokens/s")
    assert page.find("#status").get_attribute("textContent") == "Answer: Hello **world**!"
    assert page.server.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_closes_the_connection_and_keeps_what_came(open_page, by):
    page = open_page(
        Scripted(("word ",) * 10_000, pause=0.01),
    )
    page.ask("Go on for ever")
    page.wait(lambda: "word word" in page.texts("article.assistant")[0])
    assert not page.server.left.is_set()
    page.click("Stop") if by == "button" else page.keys(Keys.ESCAPE)
    assert page.server.left.wait(5)
    page.finish()
    assert page.texts(".figures")[0].startswith("Stopped · ≈ ")
    assert "word word" in page.texts("article.assistant > .text")[0]
    page.server.replies = [Scripted(("Yes.",))]
    assert page.asked("More") == "Yes."
    assert [turn["role"] for turn in page.server.requests[-1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.slow
def test_a_message_can_be_edited_and_an_answer_made_again(open_page):
    page = open_page(*(Scripted((f"answer {number}",)) for number in range(5)))
    page.asked("first")
    page.asked("second")
    page.click("Regenerate")
    page.finish()
    assert page.texts("article > .text") == ["first", "answer 0", "second", "answer 2"]
    page.click("Edit")
    page.keys(" draft", Keys.ESCAPE)
    assert page.texts("article > .text") == ["first", "answer 0", "second", "answer 2"]
    assert page.js("return document.activeElement.innerText") == "Edit"
    page.keys(Keys.ENTER)
    page.keys(" of all", Keys.ENTER)
    page.finish()
    assert page.texts("article > .text") == ["first of all", "answer 3"]
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "first of all"}]
    # While an answer comes in, and twice at once.
    page.server.replies = [Scripted(("word ",) * 10_000, pause=0.01), Scripted(("the last answer",))]
    page.ask("second")
    page.wait(lambda: "word word" in page.texts("article.assistant > .text")[-1])
    page.js("arguments[0].click()", page.button("Edit"))
    page.keys("!")
    page.js("const again = document.querySelector('article .main'); again.click(); again.click()")
    page.wait(lambda: page.server.left.is_set() and page.js("return live === null"))
    assert page.texts("article > .text") == ["first of all!", "the last answer"]


@pytest.mark.slow
def test_a_reload_keeps_conversation_draft_and_settings(open_page):
    go = threading.Event()
    page = open_page(Scripted(("one",)), Scripted(("two", " more"), hold=go))
    page.click("Settings")
    for name, value in [
        ("system", "Be brief."),
        ("temperature", "0.7"),
        ("top_k", "40"),
        ("seed", "3"),
        ("max_tokens", "64"),
    ]:
        page.find(f"[name={name}]").send_keys(value)
    page.find("[name=top_p]").send_keys("1.5")  # out of range: it is not kept
    page.find("[name=reasoning_effort]").send_keys("high")
    page.keys(Keys.ESCAPE)
    page.asked("a")
    page.ask("b")
    page.wait(lambda: page.texts("article.assistant > .text")[-1] == "two")
    page.find("#input").send_keys("a dra")
    page.driver.refresh()
    page.wait(lambda: page.js("return $('model').value !== ''"))
    assert page.texts("article > .text") == ["a", "one", "b", "two"]
    # Which of both depends on whether the old page still saw its connection close.
    interrupted = {"The answer was interrupted.", "The connection was lost before the answer ended."}
    assert page.texts(".problem span")[-1] in interrupted
    assert page.find("#input").get_attribute("value") == "a dra"
    go.set()
    page.click("Retry")
    page.finish()
    assert page.texts("article > .text") == ["a", "one", "b", "two more"]
    request = page.server.requests[-1]
    assert [turn["content"] for turn in request.pop("messages")] == ["Be brief.", "a", "one", "b"]
    assert (
        request.items()
        >= {"temperature": 0.7, "top_k": 40, "seed": 3, "max_tokens": 64, "reasoning_effort": "high"}.items()
    )
    assert "top_p" not in request
    page.click("New")
    assert page.texts("article") == []
    page.click("Undo")
    assert page.texts("article > .text") == ["a", "one", "b", "two more"]


@pytest.mark.slow
def test_errors_are_one_sentence_with_retry_and_nothing_typed_is_lost(open_page):
    page = open_page(
        Scripted(status=429, error="The queue is full; try again in 2 seconds."),
        Scripted(("half an ",), finish=None),
        Scripted(("half",), error="The model has no memory left."),
        Scripted(("whole",)),
    )
    page.errors = ["429", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_REFUSED"]
    page.asked("What I typed")
    for sentence, text in [
        ("The queue is full; try again in 2 seconds.", ""),
        ("The connection was lost before the answer ended.", "half an"),
        ("The model has no memory left.", "half"),
    ]:
        assert page.texts(".problem span") == [sentence]
        assert page.texts("article > .text") == ["What I typed", text]
        page.click("Retry")
        page.finish()
    assert page.texts("article > .text") == ["What I typed", "whole"]
    page.server.__exit__()
    page.asked("More")
    assert page.texts(".problem span")[-1] == "The server cannot be reached."
    assert page.texts("article > .text")[2] == "More"


HOSTILE = """\
<script>window.ran = "script"</script><img src=x onerror="window.ran = 'img'"><svg onload="window.ran = 1"><iframe src="https://example.org">
[a](javascript:window.ran=1) [b](JaVaScRiPt:alert(1)) [c](data:text/html,<script>alert(1)</script>)
[d](vbscript:x) [e](/etc/passwd) file:///etc/passwd
[f]( javascript:window.ran=1 ) [g](java\tscript:window.ran=1) <javascript:window.ran=1>
[h](https://example.org/"onclick="window.ran=1)
![i](https://example.org/pixel.png) ![j](javascript:window.ran=1)
[![k](https://example.org/k.png)](https://example.org)
<a href="javascript:window.ran=1">x</a> <style>body { display: none }</style>
<base href="https://example.org"> <meta http-equiv=refresh content=0>
**never *closed `code ~~gone [link](https://exa

| a | b
|--
| <b onclick="window.ran=1">c</b> | d | e

> > > > > > > > > > > > deep
- - - - - - - - - - - * deep
1. <form action="https://example.org"><input autofocus onfocus="window.ran=1">

```html"onload="window.ran=1
<script>window.ran = 1</script>
"""


@pytest.mark.slow
def test_a_hostile_reply_stays_text(open_page):
    long = "x" * 50_000
    pieces = [HOSTILE[at : at + 7] for at in range(0, len(HOSTILE), 7)]
    page = open_page(
        Scripted((*pieces, long, {"reasoning_content": HOSTILE}, call("<img src=x onerror=alert(1)>", HOSTILE)))
    )
    page.js("document.title = 'before'")
    page.js("send(arguments[0])", HOSTILE)
    page.finish()
    page.js("for (const one of document.querySelectorAll('details')) one.open = true")
    page.wait(lambda: "script" in page.texts(".reasoning .text")[0])
    forbidden = "script, img, svg, iframe, style, base, meta, form, input, object, embed, link, video, audio"
    assert (
        page.js(
            "return [...document.querySelectorAll('#log *')].filter(one => one.matches(arguments[0])).length", forbidden
        )
        == 0
    )
    attributes = page.js("return [...document.querySelectorAll('#log *')].flatMap(one => one.getAttributeNames())")
    assert [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "srcdoc", "action")] == []
    links = page.js("return [...document.querySelectorAll('#log a')].map(one => [one.protocol, one.rel, one.target])")
    assert len(links) >= 4
    assert all(link == ["https:", "noopener noreferrer", "_blank"] for link in links)
    (text,) = page.texts("article.assistant > .text")
    for part in (
        '<script>window.ran = "script"</script>',
        "onerror=",
        "[a](javascript:window.ran=1)",
        "**never *closed `code",
        long,
    ):
        assert part in text
    assert page.js("return [window.ran ?? null, document.title]") == [None, "before"]
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")
    # The page still works.
    page.server.replies = [Scripted(("fine",))]
    assert page.asked("And now?") == "fine"


# What is written, and the elements that it becomes.
TABLE = '<div class="table"><table><thead><tr><th>a</th>'
TABLE += '<th style="text-align: right;"><code>b</code></th></tr></thead>'
ROW = '<tbody><tr><td>1 | 2</td><td style="text-align: right;"></td></tr></tbody></table></div>'
MARKDOWN = [
    ("a *b* **c** ~~e~~ _f_", "<p>a <em>b</em> <strong>c</strong> <del>e</del> <em>f</em></p>"),
    ("***d*** **a *b***", "<p><strong><em>d</em></strong> <strong>a <em>b</em></strong></p>"),
    ("*c **d***", "<p><em>c <strong>d</strong></em></p>"),
    ("2 * 3 * 4 and snake_case_name", "<p>2 * 3 * 4 and snake_case_name</p>"),
    (r"\*a\* \_ \\", r"<p>*a* _ \</p>"),
    ("`` a ` b `` and `<b>`", "<p><code>a ` b</code> and <code>&lt;b&gt;</code></p>"),
    ("one\ntwo  \nthree<br>four", "<p>one<br>two<br>three<br>four</p>"),
    ("# A #\n###### B", "<h3>A</h3><h6>B</h6>"),
    ("#no\n\n---\n\n***", "<p>#no</p><hr><hr>"),
    ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    ("- a\n- b\n  - c\n\n    d", "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li></ul>"),
    ("Then:\n3. a\n4. b", "<p>Then:<br>3. a<br>4. b</p>"),
    ("3. a\n   more\n\n4. b", '<ol start="3"><li><p>a<br>more</p></li><li><p>b</p></li></ol>'),
    ("- [x] done\n- [ ] open", "<ul><li><p>☑ done</p></li><li><p>☐ open</p></li></ul>"),
    ("- a\n* * *\n1) b", '<ul><li><p>a</p></li></ul><hr><ol start="1"><li><p>b</p></li></ol>'),
    ("| a | `b` |\n|:-|--:|\n| 1 \\| 2 |\n\nc", TABLE + ROW + "<p>c</p>"),
    ("a | `b`\n- | -:", TABLE + "<tbody></tbody></table></div>"),
    ("see https://a.example/b_c_(d),", "<p>see LINK[https://a.example/b_c_(d)](https://a.example/b_c_(d)),</p>"),
    ("<https://e.example>", "<p>LINK[https://e.example](https://e.example/)</p>"),
    ('[*a* https://b](https://c.example/(d) "t")', "<p>LINK[<em>a</em> https://b](https://c.example/(d))</p>"),
    ("![a](https://b.example/c.png)", "<p>LINK[Image: a](https://b.example/c.png)</p>"),
    ("[a](ftp://b)", "<p>[a](ftp://b)</p>"),
    ("a\n```py x\n  b\n\n``\n```\nc", "<p>a</p>CODE[py]  b\n\n``</figure><p>c</p>"),
    ("~~~\n```", "CODE[text]```</figure>"),
    ("- a\n  ```c\n  b\n  ```", "<ul><li><p>a</p>CODE[c]b</figure></li></ul>"),
]
LINK = r'<a href="([^"]*)" title="\1" target="_blank" rel="noopener noreferrer">(.*?)</a>'
CODE = r'<figure class="code"><figcaption><span>(.*?)</span>.*?</figcaption><pre><code>([^§]*?)</code></pre>'


@pytest.mark.slow
def test_markdown_is_rendered(open_page):
    page = open_page(Scripted())
    render = "const room = h('div'); for (const text of arguments) markdown(text, room); return room.innerHTML"
    for text, expected in MARKDOWN:
        found = re.sub(CODE, r"CODE[\1]\2", re.sub(LINK, r"LINK[\2](\1)", page.js(render, text)))
        assert found == expected, text
    # A text that grows ends as it would at once, whatever its pieces are.
    parts = ["\n", "\n\n", "  ", "a", "*", "**", "_", "`", "```", "- ", "1. ", "> ", "# ", "|", "|-|-|\n", "~~~\n"]
    parts += ["[b](https://c)", "\\"]
    randomness = random.Random(0)
    for _ in range(40):
        text = "".join(randomness.choices(parts, k=40))
        ends = sorted(randomness.sample(range(len(text)), 12))
        assert page.js(render, *(text[:end] for end in ends), text) == page.js(render, text), text


# Broken Markdown: a beginning, what is repeated, and an end.
BROKEN = [
    *[
        ("", unit, "")
        for unit in ("*a ", "**a ", "***a**", "_a_", "~~a~", "`", "`a``", "\\", "<", "<br", "https://a.,")
    ],
    *[("", unit, "") for unit in ("[", "![", "[a](", "[a](b(", "[a](https://b ", "[*", "> ", "- ", "> - ", "#", "|")],
    *[("", unit, "x") for unit in (" ", "-", "- ", "* ", "# ", "1. ")],
    *[("```", unit, "`") for unit in ("a", " ", "`")],
    *[("~~~", unit, "`") for unit in ("a", " ", "~")],
    *[("| a |\n|", unit, "x|") for unit in ("-", " ", "-|", ":")],
    *[("# ", unit, "x") for unit in (" ", "#", " #")],
    *[(f"[a]({mark}", unit, "") for mark in ("https://b", "<") for unit in ("(", " ", "a", '"')],
]


TIMES = """
const [before, unit, after] = arguments;
return [50_000, 200_000].map(length => {
  const text = before + unit.repeat(length / unit.length) + after, start = performance.now();
  markdown(text, h("div"));
  return performance.now() - start;
});
"""


@pytest.mark.slow
def test_trap_broken_markdown_takes_no_time_that_grows_with_its_square(open_page):
    page = open_page(Scripted())
    for broken in BROKEN:
        short, long = page.js(TIMES, *broken)
        # Milliseconds. Four times the text takes four times the time, not sixteen; a pattern with that took seconds.
        assert long < 10 * short + 500, broken


@pytest.mark.slow
def test_the_key_is_asked_for_and_kept_in_the_tab(open_page):
    page = open_page(Scripted(("open",)), key="sesame")
    page.errors = ["401"]
    assert page.find("#key").is_displayed()
    page.keys("wrong", Keys.ENTER)
    page.wait(lambda: page.find("#key-text").text == "The server refused the key.")
    page.keys("sesame", Keys.ENTER)
    page.wait(lambda: page.js("return $('model').value === 'tiny'"))
    assert page.asked("Hi") == "open"
    assert page.js("return Object.keys(sessionStorage)") == ["mistral-eqx.key"]
    assert not page.js("return Object.values(localStorage).join().includes('sesame')")
    page.driver.refresh()
    page.wait(lambda: page.js("return $('model').value === 'tiny'"))
    page.server.key = "another"
    page.ask("Again")
    page.wait(lambda: page.find("#key").is_displayed())
    page.keys(Keys.ESCAPE)
    page.finish()
    assert page.texts(".problem span")[-1] == "The API key is missing or wrong."


@pytest.mark.slow
def test_the_keyboard_is_enough(open_page):
    page = open_page(Scripted(({"reasoning_content": "Hm."}, "```py\ncode\n```"), pause=0.01))
    assert page.js("return document.activeElement.id") == "input"
    page.keys("one")
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys("two").perform()
    assert page.server.requests == []
    page.keys(Keys.ENTER)
    page.finish()
    assert page.server.requests[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    reached = []
    for _ in range(20):
        page.keys(Keys.TAB)
        element = page.driver.switch_to.active_element
        outlined, tag = page.js(
            "const box = arguments[0].id === 'input' ? $('composer') : arguments[0], style = getComputedStyle(box);"
            "return [style.outlineStyle !== 'none' || style.boxShadow !== 'none', arguments[0].tagName]",
            element,
        )
        if tag != "BODY":
            reached.append(element.accessible_name)
            assert outlined, reached
            assert reached[-1] != ""
    wanted = {"Skip to the message box", "Model", "New", "Settings", "Switch between light and dark"}
    assert wanted | {"Edit", "Copy", "Reasoning", "Regenerate", "Message", "Send"} == set(reached)
    page.js("$('settings-button').focus()")
    page.keys(Keys.ENTER)
    fields = page.driver.find_elements(By.CSS_SELECTOR, "#settings :is(input, select, textarea)")
    assert all(field.accessible_name for field in fields)
    page.keys(Keys.ESCAPE)
    assert page.js("return [$('settings').open, document.activeElement.id]") == [False, "settings-button"]


@pytest.mark.slow
def test_nothing_scrolls_sideways_on_a_phone(open_page):
    wide = "| " + " | ".join(f"column{at}" for at in range(20)) + " |\n|" + "-|" * 20
    long = f"{'word' * 100} `{'inline' * 50}` https://example.org/{'a' * 300}"
    reply = f"{wide}\n\n```\n{'code ' * 100}\n```\n\n{long}\n\n> - 1. # deep"
    page = open_page(
        Scripted((reply, call("a_tool_with_a_long_name" * 4, "{}")), finish="tool_calls"),
        models=("a/very-long-name" * 8,),
    )
    resize(page.driver, 320, 600)
    assert page.js("return document.documentElement.scrollWidth") <= 320
    page.asked("word" * 100)
    page.js("for (const one of document.querySelectorAll('details')) one.open = true")
    page.click("Edit")
    assert page.js("return document.documentElement.scrollWidth") <= 320
    outside = page.js(
        """return [...document.querySelectorAll("button, select, textarea, summary")]
        .filter(one => one.checkVisibility()).map(one => one.getBoundingClientRect())
        .filter(box => box.left < 0 || box.right > 320 || box.height < 24).length"""
    )
    assert outside == 0
    page.click("Settings")
    assert page.js("return $('settings').scrollWidth <= $('settings').clientWidth")
    assert page.js("return $('settings').getBoundingClientRect().right") <= 320


CONTRASTS = """
const colour = name => {
  const probe = h("i"); probe.style.color = `var(--${name})`; document.body.append(probe);
  const channels = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number); probe.remove();
  const linear = channels.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
return arguments[0].map(([one, other]) => {
  const [low, high] = [colour(one), colour(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
});
"""


@pytest.mark.slow
def test_both_themes_can_be_read(open_page):
    page = open_page(Scripted())
    is_dark = "return getComputedStyle(document.body).backgroundColor === 'rgb(23, 22, 20)'"
    for system in ("light", "dark"):
        prefer(page.driver, color_scheme=system)
        assert page.js(is_dark) == (system == "dark")
        # The ratios of WCAG 2.2, level AA: 4.5 for text, 3 for the edges of controls.
        pairs = [(ink, paper) for ink in ("fore", "soft", "accent", "bad") for paper in ("back", "tint")]
        assert min(page.js(CONTRASTS, [*pairs, ("on-accent", "accent")])) >= 4.5
        assert min(page.js(CONTRASTS, [("edge", "back"), ("edge", "tint")])) >= 3
    page.find("#theme").click()
    assert not page.js(is_dark)
    page.driver.refresh()
    assert not page.js(is_dark)
    page.find("#theme").click()
    assert page.js(is_dark)
    prefer(page.driver, color_scheme="light")
    assert not page.js(is_dark)  # the system's theme is followed again
    prefer(page.driver, reduced_motion="reduce")
    page.js("$('log').append(h('article', {class: 'live'}, h('div', {class: 'text'}, h('p', {}, 'a'))))")
    animation = "getComputedStyle(document.querySelector('article p'), '::after').animationName"
    prefer(page.driver)
    assert page.js(f"return {animation}") == "blink"
    assert "prefers-reduced-motion" in page.js("return document.querySelector('style').textContent")


@pytest.mark.slow
def test_a_tool_call_is_folded_and_its_result_sent(open_page):
    page = open_page(
        Scripted(
            (
                {"reasoning_content": "I ask."},
                call("weather", '{"city": '),
                {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
            ),
            finish="tool_calls",
        ),
        Scripted(("It is sunny.",)),
    )
    page.click("Settings")
    page.find("[name=tools]").send_keys('{"not": "a list"}')
    page.click("Done")
    assert page.find("#settings").is_displayed()
    tools = [{"type": "function", "function": {"name": "weather"}}]
    page.find("[name=tools]").clear()
    page.find("[name=tools]").send_keys(json.dumps(tools))
    page.click("Done")
    page.asked("The weather?")
    assert page.js("return [...document.querySelectorAll('details')].map(one => one.open)") == [False, False]
    page.find(".call summary").click()
    assert page.texts(".call pre") == ['{\n  "city": "Paris"\n}']
    page.find(".call textarea").send_keys("sunny")
    page.click("Send results")
    page.finish()
    assert page.texts("article.assistant > .text")[-1] == "It is sunny."
    assert not page.has_button("Send results")
    first, second = page.server.requests
    assert first["tools"] == tools
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert second["messages"][1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I ask.",
            "tool_calls": [{"id": "call00000", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call00000", "content": "sunny"},
    ]


@pytest.mark.slow
def test_scrolling_follows_the_answer_but_not_against_the_reader(open_page):
    page = open_page(Scripted(("line\n\n",) * 10_000, pause=0.005))
    page.ask("Count")
    gap = "return document.documentElement.scrollHeight - innerHeight - scrollY"
    page.wait(lambda: page.js("return scrollY") > 300)
    page.js("scrollBy(0, -60)")
    top = page.js("return scrollY")
    height = page.js("return document.documentElement.scrollHeight")
    page.wait(lambda: page.js("return document.documentElement.scrollHeight") > height + 300)
    assert page.js("return scrollY") == top
    page.click("Jump to the end")
    height = page.js("return document.documentElement.scrollHeight")
    page.wait(lambda: page.js("return document.documentElement.scrollHeight") > height + 300)
    page.keys(Keys.ESCAPE)
    page.finish()
    assert page.js(gap) < 4


@pytest.mark.slow
def test_code_and_answers_are_copied(open_page):
    page = open_page(Scripted(("Look:\n```py\nx = 1\n```",)))
    granted = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.server.address}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", granted)
    page.asked("Code")
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)))"
    for selector, text in [("figcaption button", "x = 1"), (".assistant .actions button", "Look:\n```py\nx = 1\n```")]:
        page.find(selector).click()
        page.wait(lambda selector=selector: page.find(selector).text == "Copied")
        assert page.driver.execute_async_script(read) == text
