"""Chat: puts the prompts of evaluation tasks into a chat model's own format, as lm-eval's --apply_chat_template does.

The description of a task and the user's system prompt are the system message; examples and question are one user
message, or turns of user and assistant; the text ends where the assistant's answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from llmkit.chat import Message, render_chat
from llmkit.evaluator import Generate, LogLikelihood, Prompt, Request

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


class Conversation(str):
    """A prompt as the chat template wrote it: the special tokens in it are meant as such."""


@dataclass(frozen=True)
class Chat:
    """The format of a chat model.

    `system_prompt` stands before a task's own description; `fewshot_as_turns` makes each example a question of the
    user and an answer of the assistant.
    """

    checkpoint: Checkpoint
    system_prompt: str = ""
    fewshot_as_turns: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint.chat_template is None:
            raise ValueError(
                f"checkpoint {self.checkpoint.path} has no chat template, so it is a base model: evaluate it without "
                "--apply-chat-template"
            )
        if self.system_prompt and not self.takes_system:
            raise ValueError(f"the chat template of {self.checkpoint.path} takes no system prompt")

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template takes a system message. Where it does not, descriptions are left out, as by lm-eval."""
        user: Message = {"role": "user", "content": "?"}
        render_chat(self.checkpoint, [user])
        try:
            render_chat(self.checkpoint, [{"role": "system", "content": "?"}, user])
        except ValueError:
            return False
        return True

    def requests(self, requests: Sequence[Request]) -> list[Request]:
        """The requests of a document with their prompts rendered; whole texts, and what is rendered, stay as they are.

        Raises ValueError where the template refuses the conversation.
        """
        return [self._request(request) for request in requests]

    def _request(self, request: Request) -> Request:
        if isinstance(request, LogLikelihood) and not isinstance(request.context, Conversation):
            return LogLikelihood(self.render(request.context), request.continuation.removeprefix(" "))
        if isinstance(request, Generate) and not isinstance(request.prompt, Conversation):
            return replace(request, prompt=self.render(request.prompt))
        return request

    def render(self, prompt: str) -> Conversation:
        """A prompt as the conversation that asks it."""
        parts = prompt if isinstance(prompt, Prompt) else Prompt(prompt)
        messages: list[Message] = []
        if self.fewshot_as_turns:
            for question, answer in parts.shots:
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            messages.append({"role": "user", "content": parts.question})
        else:
            messages.append({"role": "user", "content": str(Prompt(parts.question, parts.shots))})
        if (system := _joined(self.system_prompt, parts.description)) and self.takes_system:
            messages.insert(0, {"role": "system", "content": system})
        return self.render_messages(messages)

    def render_messages(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Conversation:
        """Messages as text, for tasks that make their own conversations."""
        return Conversation(render_chat(self.checkpoint, messages, add_generation_prompt=add_generation_prompt))


def _joined(system: str, description: str) -> str:
    """An empty line stands between the two, unless there is white space."""
    if not system or not description:
        return system or description
    apart = system[-1].isspace() or description[0].isspace()
    return system + ("" if apart else "\n\n") + description
