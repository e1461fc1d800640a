"""The page for everybody: by keyboard, on a phone, light and dark; and for nobody else: no script of a message runs."""

from __future__ import annotations

import re

from playwright.sync_api import expect

PAYLOADS = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    '"><svg onload=alert(1)>',
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1)) [b](java\tscript:alert(1)) [c](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x) <javascript:alert(1)> [d](&#106;avascript:alert(1))",
    '![x](https://evil.example/track.png) ![y](x" onerror="alert(1))',
    '```"><script>alert(1)</script>\n</code></pre><script>alert(1)</script>\n```',
    "| <img src=x onerror=alert(1)> |\n|---|\n| <script>alert(1)</script> |",
    '[x](https://a.example/"onmouseover="alert(1)) https://a.example/"onclick="alert(1)',
    "# <iframe src=javascript:alert(1)>\n> <a href=javascript:alert(1)>x</a>\n- <details open ontoggle=alert(1)>",
    "<style>*{display:none}</style><base href=https://evil.example><meta http-equiv=refresh content=0>",
]


def test_nothing_that_is_said_is_run(open_page):
    chat = open_page()
    for payload in PAYLOADS:
        chat.button("New chat").click()
        chat.ask(f"say {payload}")  # the same text as a question, an answer and a title
    for element in ("script", "img", "svg[onload]", "iframe", "style", "base", "meta", "form"):
        expect(chat.page.locator(f"#view {element}, #conversations {element}, #title {element}")).to_have_count(0)
    harmful = chat.page.evaluate(
        """() => [...document.querySelectorAll("#view *")].flatMap((element) => [...element.attributes])
            .filter(({name, value}) => name.startsWith("on") || name === "style" || name === "src"
                || (name === "href" && !/^(https?:|mailto:|#)/.test(value)))
            .map(({name, value}) => name + "=" + value)"""
    )
    assert harmful == []
    expect(chat.last).to_contain_text("<style>*{display:none}</style>")
    # the fixture asserts: no dialog, no error, no request to another host


def test_links_leave_without_a_trace(open_page):
    chat = open_page()
    chat.ask("say see [the *docs*](https://docs.example/a_(b)?x=1&y=2) or https://plain.example/path.")
    links = chat.last.get_by_role("link")
    expect(links).to_have_text(["the docs", "https://plain.example/path"])
    expect(links.first).to_have_attribute("href", "https://docs.example/a_(b)?x=1&y=2")
    for link in links.all():
        expect(link).to_have_attribute("rel", "noopener noreferrer nofollow")
        expect(link).to_have_attribute("target", "_blank")


def test_the_policy_of_the_page_allows_its_own_host_alone(open_page):
    chat = open_page()
    policy = chat.page.request.get(chat.page.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "*" not in policy
    assert "frame-ancestors 'none'" in policy


MARKDOWN = {
    "a *b* **c** ~~d~~ `e*f*`": "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e*f*</code></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "***both*** and **a *b* c**": "<p><em><strong>both</strong></em> and <strong>a <em>b</em> c</strong></p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n### B #": "<h3>A</h3><h5>B</h5>",
    "- a\n- b\n  - c\n\n1. d\n2. e": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li><li>e</li></ol>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "text\n- a\n- b": "<p>text</p><ul><li>a</li><li>b</li></ul>",
    "1. a\n   ```\n   x\n   ```\n2. b": "<ol><li>a[x]</li><li>b</li></ol>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "---": "<hr>",
    "```c\nint a[2] = {1};\n\n  b\n": "[int a[2] = {1};\n\n  b\n]",
    "~~~\n```\n~~~": "[```]",
    "\\*a\\* \\<b": "<p>*a* &lt;b</p>",
    "a | b\n--|-:": '<div class="table" tabindex="0"><table><thead><tr><th class="left">a</th><th class="right">b</th>'
    "</tr></thead><tbody></tbody></table></div>",
    "**open": "<p>**open</p>",
    "`open": "<p>`open</p>",
}


def test_markdown(open_page):
    chat = open_page()
    shown = chat.page.evaluate(
        """async (texts) => {
            const { renderMarkdown } = await import("./markdown.js");
            return texts.map((text) => {
                const whole = document.createElement("div");
                renderMarkdown(whole, text);
                const grown = document.createElement("div");
                for (let end = 0; end <= text.length; end++) renderMarkdown(grown, text.slice(0, end));
                const html = (box) => {
                    for (const figure of box.querySelectorAll("figure")) {
                        figure.replaceWith(`[${figure.querySelector("code").textContent}]`);
                    }
                    return box.innerHTML;
                };
                return [html(whole), html(grown)];
            });
        }""",
        list(MARKDOWN),
    )
    for (text, html), (whole, grown) in zip(MARKDOWN.items(), shown):
        assert whole == html, text
        assert grown == html, f"{text!r} as it grows"


EVIL = [
    *("*a" * 3000, "[" * 20000, "`" * 20001 + "a", "**a " * 4000, "***a" * 3000, "_a*" * 4000, "~~a " * 4000),
    *(
        "> " * 4000,
        "- " * 4000 + "a",
        "1. " * 4000,
        "|" * 9000 + "\n|-" * 2,
        "[a](" * 4000,
        "![" * 4000,
        "<https://" * 3000,
    ),
]


def test_no_text_makes_the_page_slow(open_page):
    chat = open_page()
    chat.page.set_default_timeout(20_000)  # a pattern that backtracks takes for ever
    lengths = chat.page.evaluate(
        """async (texts) => {
            const { renderMarkdown } = await import("./markdown.js");
            return texts.map((text) => {
                const box = document.createElement("div");
                renderMarkdown(box, text);
                return box.textContent.length;
            });
        }""",
        EVIL,
    )
    assert all(lengths)


def test_all_is_done_by_keyboard(open_page):
    chat = open_page()
    keyboard = chat.page.keyboard
    expect(chat.input).to_be_focused()
    keyboard.type("say one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    expect(chat.input).to_have_value("say one\ntwo")
    keyboard.press("Enter")
    chat.wait()
    expect(chat.last).to_have_text("one\ntwo", use_inner_text=True)
    expect(chat.page.locator("#announce")).to_have_text("The answer has ended")
    expect(chat.input).to_be_focused()

    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(30):
            keyboard.press("Shift+Tab" if back else "Tab")
            if chat.page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent") == name:
                return
        raise AssertionError(f"{name} cannot be reached by Tab")

    tab_to("Edit", back=True)
    keyboard.press("Enter")
    keyboard.press("Control+A")
    keyboard.type("say three")
    keyboard.press("Enter")
    chat.wait()
    expect(chat.last).to_have_text("three")
    tab_to("Regenerate", back=True)
    keyboard.press("Enter")
    chat.wait()
    expect(chat.answers).to_have_count(1)
    tab_to("More for say three", back=True)
    keyboard.press("Enter")
    expect(chat.page.get_by_role("menuitem", name="Rename")).to_be_focused()
    keyboard.press("ArrowUp")
    expect(chat.page.get_by_role("menuitem", name="Delete")).to_be_focused()
    keyboard.press("Escape")
    expect(chat.page.get_by_role("menu")).to_be_hidden()
    tab_to("New chat", back=True)
    keyboard.press("Enter")
    expect(chat.answers).to_have_count(0)
    expect(chat.input).to_be_focused()


def test_on_a_phone_nothing_is_cut_off(open_page):
    chat = open_page(viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True)
    chat.ask("say " + "unbreakable" * 30 + "\n\n```\n" + "x" * 300 + "\n```\n\n| " + "a | " * 30 + "\n|" + "-|" * 30)
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 375
    assert chat.page.evaluate("document.querySelector('#scroller').scrollWidth") <= 375
    box = chat.button("Send").bounding_box()
    assert box["x"] + box["width"] <= 375
    assert box["y"] + box["height"] <= 667
    expect(chat.button("New chat")).to_be_hidden()
    chat.button("Conversations").tap()
    chat.button("New chat").tap()
    expect(chat.button("New chat")).to_be_hidden()
    expect(chat.answers).to_have_count(0)


def background(chat) -> int:
    """Brightness of the page, 0 to 255."""
    color = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return max(int(part) for part in re.findall(r"\d+", color)[:3])


def test_light_and_dark(open_page):
    dark = open_page(color_scheme="dark")
    assert background(dark) < 60
    dark.button("System theme").click()
    assert background(dark) > 200
    dark.page.reload()
    assert background(dark) > 200
    dark.button("Light theme").click()
    assert background(dark) < 60
    assert background(open_page(color_scheme="light")) > 200
