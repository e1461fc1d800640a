"""Chat templates: renders a conversation as the text that a chat model was trained on.

A template is a Jinja program that comes with the checkpoint. It runs in Jinja's immutable sandbox, with the settings,
filters and functions that transformers gives it, so that the two render the same text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint import Checkpoint
from llmkit.component import require

if TYPE_CHECKING:
    import jinja2

#: a message: {"role": "user", "content": "…"}, and whatever else the template reads
Message = Mapping[str, Any]

#: for base models, where one is asked for: a transcript, which a model that has only read text can continue
PLAIN_TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content }}

{% else %}
{{ message.role | capitalize }}: {{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{%- endif %}
"""
PLAIN_STOPS = ("\nUser:", "\nAssistant:")  # where the model begins to write the next turn itself

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def render_chat(
    checkpoint: Checkpoint,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    plain: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text, by the checkpoint's template; `variables` are passed on to it.

    With `add_generation_prompt`, the text ends where the assistant's answer begins. With `plain`, PLAIN_TEMPLATE stands
    in for a missing template. Raises ValueError where the checkpoint has none, or it refuses the conversation.
    """
    source = checkpoint.chat_template or (PLAIN_TEMPLATE if plain else None)
    if source is None:
        raise ValueError(
            f"checkpoint {checkpoint.path} has no chat template: it is a base model, so give it plain text instead"
        )
    require(("jinja2",), "a chat template")
    import jinja2

    try:
        return _compile(source).render(
            messages=[dict(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**_special_tokens(checkpoint), **variables},
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template of {checkpoint.path} refuses this conversation: {error}") from error


def encode_chat(checkpoint: Checkpoint, messages: Sequence[Message], **options: Any) -> list[int]:
    """Token ids of `render_chat`. The template writes the special tokens, so none is added.

    As in transformers, a special token that a message spells out counts as that token.
    """
    return checkpoint.tokenizer.encode(render_chat(checkpoint, messages, **options), allow_special=True)


def _special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """The special tokens by their names in templates, as tokenizer_config.json has them."""
    path = checkpoint.path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that transformers gives to chat templates. Raises jinja2.TemplateError."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %}…{% endgeneration %} marks the assistant's text for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> str:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
