"""`llmkit chat` with real keystrokes in a pseudo-terminal, and with its input from a pipe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

SCRIPTED = Path(__file__).parents[1] / "scripted"  # a plugin with the engine of that name
CTRL_C, CTRL_D, CTRL_J, ENTER = "\x03", "\x04", "\n", "\r"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """`llmkit chat` in a terminal of 100 columns."""

    def __init__(self, folder: Path, *args: object) -> None:
        environment = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "TERM": "xterm-256color",
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "PYTHONPATH": os.pathsep.join([str(SCRIPTED), os.environ.get("PYTHONPATH", "")]),
        }
        command = ["-m", "llmkit", "chat", *map(str, args)]
        self.child = pexpect.spawn(
            sys.executable,
            command,
            env=environment,
            cwd=str(folder),
            encoding="utf-8",
            dimensions=(30, 100),
            timeout=60,
        )
        self.child.expect_exact("Ctrl-D leaves")
        self.prompt()

    def prompt(self) -> str:
        """Wait for the next prompt; what was shown before it."""
        self.child.expect_exact("\x1b[?2004h")  # bracketed paste is on: the line editor is reading
        return ESCAPES.sub("", self.child.before or "")

    def send(self, keys: str) -> None:
        self.child.send(keys)

    def say(self, line: str) -> str:
        """Send a line; what is shown until the next prompt."""
        self.send(line + ENTER)
        self.child.expect_exact("\x1b[?2004l")
        return self.prompt()

    def see(self, text: str) -> None:
        self.child.expect_exact(text)

    def leave(self) -> None:
        self.send(CTRL_D)
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.exitstatus == 0


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    opened: list[Terminal] = []

    def start(*args: object) -> Terminal:
        opened.append(Terminal(tmp_path, *args))
        return opened[-1]

    yield start
    for one in opened:
        one.child.close(force=True)


def saved(path: Path) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in json.loads(path.read_text())["messages"]]


def test_a_conversation_is_held_saved_reset_and_loaded(terminal: Open, chat_model: Path, tmp_path: Path) -> None:
    chat = terminal(chat_model, "--greedy", "--max-tokens", "20")
    assert "there was a little girl named Lily." in chat.say("Once upon a time")
    chat.say("/system A tale.")
    assert "tokens/s" in chat.say("Then she")
    assert "saved 5 messages" in chat.say("/save 'my talk.json'")
    messages = saved(tmp_path / "my talk.json")
    assert [role for role, _ in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0][1] == "A tale."
    assert messages[2][1].startswith(", there was a little girl named Lily.")
    assert "there is no message to answer again" in (chat.say("/reset"), chat.say("/retry"))[1]
    shown = chat.say("/load 'my talk.json'")
    assert "> Then she" in shown
    assert "loaded 5 messages" in shown
    chat.say("/retry")  # greedy: the same answer again
    chat.say("/save again.json")
    assert saved(tmp_path / "again.json") == messages
    chat.leave()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Open, scripted_model: Path, tmp_path: Path) -> None:
    chat = terminal(scripted_model, "--engine", "scripted", "--save", "kept.json")
    chat.send("slowly " + "word " * 200 + ENTER)  # 20 seconds
    chat.see("\x1b[?2004l")
    chat.see("word word")  # the answer has begun
    chat.send(CTRL_C)
    assert "[stopped]" in chat.prompt()
    _, (role, partial) = saved(tmp_path / "kept.json")
    assert role == "assistant"
    assert partial.startswith("word word")
    assert len(partial) < 900
    chat.say("/set max_tokens 5")
    assert "5 tokens" in chat.say("/retry")
    assert saved(tmp_path / "kept.json")[1:] == [("assistant", "word ")]
    chat.send(CTRL_C)
    assert "Ctrl-C again" in chat.prompt()
    chat.send(CTRL_C)
    chat.child.expect(pexpect.EOF)
    chat.child.close()
    assert chat.child.exitstatus == 0


def test_several_lines_are_one_message_and_history_survives(terminal: Open, chat_model: Path, tmp_path: Path) -> None:
    chat = terminal(chat_model, "--greedy", "--max-tokens", "3")
    chat.say("One day," + CTRL_J + "a cat" + "\x1b\r" + "ran")
    chat.say("\x1b[200~pasted\nlines\x1b[201~")
    chat.say("/save talk.json")
    assert [text for role, text in saved(tmp_path / "talk.json") if role == "user"] == [
        "One day,\na cat\nran",
        "pasted\nlines",
    ]
    chat.leave()
    history = tmp_path / "state" / "llmkit" / "chat_history"
    assert history.stat().st_mode & 0o077 == 0
    again = terminal(chat_model, "--greedy", "--max-tokens", "3")
    again.send("\x1b[A" * 2)  # up: first /save, then the pasted message, whose last line the cursor is in
    again.say("!")
    again.say("/save again.json")
    assert saved(tmp_path / "again.json")[0][1] == "pasted\nlines!"
    again.leave()


def test_what_is_typed_during_an_answer_waits_for_the_prompt(
    terminal: Open, scripted_model: Path, tmp_path: Path
) -> None:
    chat = terminal(scripted_model, "--engine", "scripted", "--plain")
    chat.send("slowly " + "word " * 20 + ENTER)  # 2 seconds
    chat.see("\x1b[?2004l")
    chat.see("word word")
    chat.send("say more" + ENTER)
    assert "say more" not in chat.prompt()
    chat.see("tokens/s")  # that message is answered
    chat.prompt()
    chat.say("/save talk.json")
    assert [text for _, text in saved(tmp_path / "talk.json")][2:] == ["say more", "more"]
    chat.leave()


def test_mistakes_are_one_line_and_lose_nothing(terminal: Open, chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    chat = terminal(chat_model, "--greedy", "--max-tokens", "5")
    chat.say("Once upon a time")
    assert "unknown command /sav: did you mean /save" in chat.say("/sav x")
    assert "absent.json: No such file" in chat.say("/load absent.json")
    assert "it has no list of messages" in chat.say("/load bad.json")
    assert "name one file" in chat.say("/save")
    assert "unknown setting 'heat'" in chat.say("/set heat 3")
    assert "/more continues a base model's text" in chat.say("/more")
    assert "/retry" in chat.say("/help")
    assert "saved 2 messages" in chat.say("/save kept.json")
    chat.leave()


def test_the_oldest_messages_make_room_and_a_line_says_so(terminal: Open, chat_model: Path, tmp_path: Path) -> None:
    chat = terminal(chat_model, "--greedy", "--max-tokens", "100")
    long = "Lily saw a big red ball in the park and she was happy. " * 8
    assert "left out" not in chat.say(long)
    for _ in range(2):
        shown = chat.say(long)
    assert "no longer fits the model's context of 512 tokens: the oldest" in shown
    assert "tokens/s" in shown
    assert "the message is too long" in chat.say(long * 5)
    assert "tokens/s" in chat.say("Once upon a time")  # the long message is gone, the talk goes on
    assert "saved 8 messages" in chat.say("/save all.json")  # what was left out is still in the conversation
    chat.leave()


def test_a_base_model_continues_text(terminal: Open, base_model: Path) -> None:
    chat = terminal(base_model, "--greedy", "--max-tokens", "10")
    first = chat.say("Once upon a time")
    assert ", there was a little girl" in first
    more = chat.say("/more")
    assert "little girl" not in more
    assert "tokens/s" in more
    assert "there was a little girl" in chat.say("Once upon a time")  # each text by itself
    assert "a text that is only continued has no system message" in chat.say("/system Be kind.")
    chat.leave()


def pipe(*args: object, text: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmkit", "chat", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_base_model_can_be_given_a_transcript(base_model: Path) -> None:
    args = (base_model, "--greedy", "--max-tokens", "12", "--json")
    continued = json.loads(pipe(*args, text="Once upon a time").stdout)
    answered = json.loads(pipe(*args, "--no-complete", "--system", "A tale.", text="Once upon a time").stdout)
    assert continued["answer"] != answered["answer"]
    assert "no system message" in pipe(*args, "--system", "A tale.", text="Once upon a time", code=2).stderr


def test_all_of_a_pipe_is_one_message(chat_model: Path, tmp_path: Path) -> None:
    talk = tmp_path / "talk.json"
    args = (chat_model, "--greedy", "--max-tokens", "12", "--save", talk)
    first = pipe(*args, text="Once upon\na time\n")
    assert first.stdout.endswith("\n")
    assert saved(talk) == [("user", "Once upon\na time"), ("assistant", first.stdout[:-1])]
    second: dict[str, Any] = json.loads(pipe(*args, "--load", talk, "--json", text="Then").stdout)
    assert set(second) == {"model", "answer", "tokens", "finish_reason", "messages"}
    assert (second["tokens"], second["finish_reason"]) == (12, "length")
    assert [m["content"] for m in second["messages"]][1:] == [first.stdout[:-1], "Then", second["answer"]]


@pytest.mark.parametrize(
    ("args", "text", "code", "sentence"),
    [
        ([], "", 2, "standard input holds no message"),
        (["--url", "http://127.0.0.1:9"], "x", 2, "no CHECKPOINT can be named"),
        (["--model", "x"], "x", 2, "--model needs --url"),
        (["--greedy", "--seed", "1"], "x", 2, "--greedy does not sample"),
        (["--stop", ""], "x", 2, "--stop needs a text"),
        (["--load", "/nowhere/talk.json"], "x", 1, "/nowhere/talk.json: No such file"),
        ([], "word " * 2000, 1, "the message is too long"),
    ],
)
def test_usage_errors(chat_model: Path, args: list[str], text: str, code: int, sentence: str) -> None:
    assert sentence in pipe(chat_model, *args, text=text, code=code).stderr
