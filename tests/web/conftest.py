"""The chat page in headless Chromium, before a real `llmkit serve` whose models say what they are told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Locator, Page, Request, expect, sync_playwright

from llmkit.testing.tiny import tiny_checkpoint

SCRIPTED = Path(__file__).parents[1] / "scripted"  # a plugin
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

expect.set_options(timeout=15_000)  # the machine may be busy


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium. As root it runs only without its own sandbox; it sees nothing but our pages."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """talker, a chat model; narrow, another with a context of 160 bytes; writer, a base model."""
    folder = tmp_path_factory.mktemp("models")
    for name, context in (("talker", 16384), ("narrow", 160), ("writer", 1024)):
        tiny_checkpoint(folder / name, context=context)
        if name != "writer":
            (folder / name / "chat_template.jinja").write_text(TEMPLATE)
    return {name: folder / name for name in ("talker", "narrow", "writer")}


class Served:
    """A running `llmkit serve` at `url`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """Start `llmkit serve ARGS` with the scripted engine, which it finds as it finds any plugin."""
    running: list[subprocess.Popen[str]] = []

    def start(*args: object, **environment: str) -> Served:
        path = os.pathsep.join([str(SCRIPTED), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "llmkit", "serve", *map(str, args), "--engine", "scripted", "--port", "0"]
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path, **environment}, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"http://\S+", line):
                return Served(process, match[0])
        raise AssertionError(f"llmkit serve did not start:\n{said}")

    yield start
    for process in running:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="session")
def server(serve: Serve, models: dict[str, Path]) -> Served:
    """One server for all tests, with all models."""
    return serve(*models.values())


OpenPage = Callable[..., "ChatPage"]


@pytest.fixture
def open_page(browser: Browser, server: Served) -> Iterator[OpenPage]:
    """Open the page in a browser of its own. At the end: nothing went wrong in it, and no request left the server."""
    opened: list[tuple[ChatPage, str]] = []

    def start(url: str | None = None, *, may_fail: bool = False, **context: Any) -> ChatPage:
        context.setdefault("viewport", {"width": 1100, "height": 760})
        page = browser.new_context(**context).new_page()
        chat = ChatPage(page, may_fail)
        opened.append((chat, url or server.url))
        page.goto(url or server.url)
        return chat

    yield start
    for chat, url in opened:
        chat.page.context.close()
        host = urlsplit(url).netloc
        strangers = [request.url for request in chat.requests if urlsplit(request.url).netloc not in (host, "")]
        assert strangers == []
        assert chat.errors == []


class ChatPage:
    """The page as its users see it. Errors and requests are noted; `may_fail` allows failed requests."""

    def __init__(self, page: Page, may_fail: bool = False) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[Request] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request))
        page.on("dialog", self._dialog)
        page.on("console", self._console)
        self._may_fail = may_fail

    def _dialog(self, dialog: Dialog) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not (self._may_fail and "Failed to load resource" in message.text):
            self.errors.append(message.text)

    @property
    def input(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.get_by_label("Model", exact=True).and_(self.page.locator("article"))

    @property
    def questions(self) -> Locator:
        return self.page.get_by_label("You", exact=True)

    @property
    def last(self) -> Locator:
        return self.answers.last.locator(".text")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def send(self, text: str) -> None:
        """Type a message and send it."""
        self.input.fill(text)
        self.input.press("Enter")

    def ask(self, text: str) -> None:
        """Send a message and wait until it is answered."""
        count = self.answers.count()
        self.send(text)
        expect(self.answers).to_have_count(count + 1)
        self.wait()

    def wait(self) -> None:
        """Wait until no answer is being written."""
        expect(self.button("Regenerate").or_(self.button("Try again"))).to_be_visible()

    def choose(self, model: str) -> None:
        self.page.get_by_role("combobox", name="Model").select_option(model)
