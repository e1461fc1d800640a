"""The command `llmkit chat`: its flags, and the one answer that it gives when its input is no terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmkit.cli import ui
from llmkit.cli.sampling import engine_flags, read_sampling, sampling_flags

if TYPE_CHECKING:
    from llmkit_chat.conversation import Conversation
    from llmkit_chat.models import ChatModel, Parameters


@click.command("chat")
@click.argument("checkpoint", required=False)
@click.option("--url", metavar="URL", help="Talk to a running OpenAI-compatible server, as http://127.0.0.1:8000.")
@click.option("--model", metavar="NAME", help="Which of the server's models, with --url. [default: the only one]")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the server's key, with --url.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option(
    "--complete/--no-complete",
    default=None,
    help="Continue text and do not answer. [default: for base models, which --no-complete gives a plain transcript]",
)
@sampling_flags
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="End an answer after N tokens. [default: 1024, 256 for base models; with --url the server's]",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--load", "load_from", type=click.Path(path_type=Path), metavar="FILE", help="Go on from this file.")
@click.option(
    "--save",
    "save_to",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the conversation to this file after each answer.",
)
@click.option("--plain", is_flag=True, help="Show answers as the model writes them, not as Markdown.")
@engine_flags
@ui.json_option
def command(
    checkpoint: str | None,
    url: str | None,
    model: str | None,
    api_key_env: str | None,
    system: str | None,
    complete: bool | None,
    greedy: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    max_tokens: int | None,
    stop: tuple[str, ...],
    load_from: Path | None,
    save_to: Path | None,
    plain: bool,
    as_json: bool,
    **engine: str | None,
) -> None:
    """Talk with CHECKPOINT (by default the latest run's newest), or with a server's model.

    Where standard input or output is no terminal, all of the input is one message, which gets one answer.
    """
    _check_place(checkpoint, url, model, api_key_env, engine)
    if "" in stop:
        raise click.UsageError("--stop needs a text that is not empty")
    flags = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    read_sampling(greedy=greedy, **flags, max_tokens=max_tokens or 1)  # type: ignore[arg-type]  # for its checks
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive and as_json:
        raise click.UsageError("--json answers a message from standard input: give it one by a pipe or from a file")

    from llmkit.component import require
    from llmkit_chat.conversation import Conversation
    from llmkit_chat.models import Parameters

    if interactive:
        require(("prompt_toolkit",), "llmkit chat")
    conversation = Conversation.load(load_from) if load_from else Conversation()
    if system is not None:
        conversation.system = system
    if not interactive:
        conversation.ask(_read_message())
    given: dict[str, Any] = {**flags, "temperature": 0.0 if greedy else temperature, "max_tokens": max_tokens}
    parameters = Parameters({name: value for name, value in given.items() if value is not None}, stop)
    opened = _open_remote(url, model, api_key_env, complete) if url else _open_local(checkpoint, complete, engine)
    try:
        if opened.completes and conversation.system is not None:
            raise click.UsageError(
                "a text that is only continued has no system message (--no-complete makes it a chat)"
            )
        if interactive:
            _talk(opened, conversation, parameters, plain=plain, save_to=save_to)
        else:
            _answer_once(opened, conversation, parameters, save_to=save_to, as_json=as_json)
    finally:
        opened.close()


def _check_place(
    checkpoint: str | None, url: str | None, model: str | None, api_key_env: str | None, engine: dict[str, str | None]
) -> None:
    """Raise click.UsageError where flags of a server and flags of a checkpoint are mixed."""
    if url is None:
        for flag, value in (("--model", model), ("--api-key-env", api_key_env)):
            if value is not None:
                raise click.UsageError(f"{flag} needs --url")
        return
    if checkpoint is not None:
        raise click.UsageError("--url talks to a server, so no CHECKPOINT can be named (--model names its model)")
    for name, value in engine.items():
        if value is not None:
            raise click.UsageError(f"--{name} is the server's to choose, so it cannot be combined with --url")


def _open_remote(url: str, model: str | None, api_key_env: str | None, complete: bool | None) -> ChatModel:
    from llmkit.component import require

    require(("openai",), "llmkit chat --url")
    from llmkit_chat.remote import RemoteModel

    key = None
    if api_key_env is not None and not (key := os.environ.get(api_key_env)):
        raise click.UsageError(f"the environment variable {api_key_env} is not set")
    return RemoteModel(url, model, key, completes=complete)


def _open_local(checkpoint: str | None, complete: bool | None, engine: dict[str, str | None]) -> ChatModel:
    from llmkit.checkpoint import Checkpoint
    from llmkit.engines import open_engine
    from llmkit_chat.models import LocalModel

    opened = Checkpoint.open(checkpoint)
    completes = opened.chat_template is None if complete is None else complete
    name = engine.pop("engine")
    return LocalModel(opened, open_engine(opened, name, **engine), completes=completes)


def _talk(
    model: ChatModel, conversation: Conversation, parameters: Parameters, *, plain: bool, save_to: Path | None
) -> None:
    from rich.console import Console

    from llmkit_chat.keyboard import reader
    from llmkit_chat.repl import Repl

    repl = Repl(model, conversation, parameters, console=Console(highlight=False), plain=plain, save_to=save_to)
    read = reader()
    repl.greet()
    repl.run(read)


def _read_message() -> str:
    """Standard input as one message. Raises click.UsageError where it is empty, ValueError unless it is UTF-8."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise ValueError("the message on standard input is not UTF-8 text") from None
    if not text.strip():
        raise click.UsageError("standard input holds no message; in a terminal `llmkit chat` asks for one")
    return text


def _answer_once(
    model: ChatModel, conversation: Conversation, parameters: Parameters, *, save_to: Path | None, as_json: bool
) -> None:
    """One answer on stdout, streamed, or as one JSON object."""
    from llmkit_chat.answering import Interrupted, interruptible

    def start(cancelled: Any) -> Any:
        if model.completes:
            return model.complete(conversation.turns[-1]["content"], parameters, cancelled)
        return model.reply(conversation.messages, parameters, cancelled)

    text, last = "", None
    try:
        for part in interruptible(start):
            if part.notice:
                ui.note(f"[{part.notice}]")
            text += part.text
            last = part if part.finish_reason else last
            if not as_json:
                sys.stdout.write(ui.printable(part.text) if sys.stdout.isatty() else part.text)
                sys.stdout.flush()
    except Interrupted:
        raise KeyboardInterrupt from None
    assert last is not None
    conversation.answer(text)
    if save_to:
        conversation.save(save_to, model.name)
    if as_json:
        answer = {"answer": text, "tokens": last.tokens, "finish_reason": last.finish_reason}
        ui.emit({"model": model.name, **answer, "messages": conversation.messages})
    elif not text.endswith("\n"):
        print(flush=True)
