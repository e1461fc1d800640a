"""Models for the tests of chat: 260 K parameters that tell stories, in a context of 512 tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmkit.testing.tiny import tiny_checkpoint

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' %}"
    "{{ m.content }}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session")
def base_model(test_data: Path) -> Path:
    """As it is: a base model."""
    return test_data / "models" / "stories260k-hf"


@pytest.fixture(scope="session")
def chat_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template, so that it goes on from what the user says."""
    folder = tmp_path_factory.mktemp("models") / "stories-chat"
    shutil.copytree(base_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def scripted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the engine `scripted`, which says what it is told, as slowly as it is told."""
    folder = tmp_path_factory.mktemp("models") / "scripted"
    tiny_checkpoint(folder, context=4096)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    return folder
