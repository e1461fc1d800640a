"""Tokenizer: text to token ids and back; TokenizerProvider: how a plugin offers one by name.

`load_tokenizer` picks the implementation: `llmkit.bpe.ByteLevelBPE` (through tiktoken), `llmkit.char_tokenizer.
CharTokenizer`, and `llmkit.hf_tokenizer.HFTokenizer` for any other Hugging Face tokenizer.json.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from llmkit.component import Component

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Maps text to token ids in [0, vocab_size) and back.

    Attributes:
        name: where it came from, e.g. `gpt2`, `bpe-8192`; for people, not for comparison (that is `fingerprint`).
        vocab_size: number of ids, special tokens included.
        special_tokens: special token -> id. Special tokens in text are encoded as plain text unless asked otherwise.
        eot_id: the id that stands before each document in token shards and ends a generated one, or None.
        bos_id: the id that `encode_prompt` puts in front, or None.
    """

    name: str
    vocab_size: int
    special_tokens: dict[str, int]
    eot_id: int | None
    bos_id: int | None

    @abstractmethod
    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of the text, nothing added. With `allow_special`, special tokens in the text become their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, special tokens as plain text."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a prompt as the model expects it, with the begin token where the checkpoint's tokenizer adds one."""
        ids = self.encode(text, allow_special=allow_special)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """UTF-8 bytes of the ids; special tokens give their text. Raises ValueError for an id out of range.

        Additive: the bytes of a + b are those of a followed by those of b. Streaming text and bits per byte rely on it.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, bytes that are not UTF-8 replaced by U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json as transformers' AutoTokenizer reads them."""

    @property
    def fingerprint(self) -> str:
        """A hash that two tokenizers share when they map all text to the same ids."""
        return hashlib.blake2b(self.identity(), digest_size=16).hexdigest()

    @abstractmethod
    def identity(self) -> bytes:
        """Bytes that determine the mapping: vocabulary, splitting rule, special tokens."""


class TokenizerProvider(Component, ABC):
    """Offers a tokenizer by name. `trainable` ones are trained on text, the others are fixed."""

    trainable: ClassVar[bool] = False

    @classmethod
    def load(cls) -> Tokenizer:
        """The tokenizer, for a fixed one. Raises ValueError where its vocabulary cannot be had."""
        raise ValueError(f"tokenizer {cls.name!r} must be trained on text first")

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, special_tokens: Sequence[str]) -> Tokenizer:
        """Train on texts (read once, streaming), for a trainable one. `vocab_size` counts the special tokens."""
        raise ValueError(f"tokenizer {cls.name!r} is fixed and cannot be trained")


def load_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer that `ref` names: a tokenizer.json, a directory that holds one, or a registered fixed name.

    Such a directory is a tokenizer's own, a checkpoint, a run or a data folder. Raises ValueError where there is none,
    with the nearest registered names.
    """
    path = Path(ref).expanduser()
    if path.is_dir():
        for candidate in (path / "tokenizer.json", path / "tokenizer" / "tokenizer.json"):
            if candidate.is_file():
                return _load_json(candidate)
        if (path / "checkpoints").is_dir():
            from llmkit.checkpoint import Checkpoint

            return Checkpoint.open(path).tokenizer
        raise ValueError(f"no tokenizer.json in {path}")
    if path.is_file():
        return _load_json(path)
    return find_provider(str(ref)).load()


def find_provider(name: str) -> type[TokenizerProvider]:
    """The registered tokenizer of that name. Raises ValueError for another one, with the nearest names."""
    from llmkit.plugins import get_plugins

    if "/" in name or name.endswith(".json"):
        raise ValueError(f"there is no tokenizer {name}: no such file or folder")
    return get_plugins().tokenizer(name)


def _load_json(path: Path) -> Tokenizer:
    from llmkit.bpe import ByteLevelBPE
    from llmkit.char_tokenizer import CharTokenizer
    from llmkit.hf_tokenizer import HFTokenizer

    return ByteLevelBPE.from_json(path) or CharTokenizer.from_json(path) or HFTokenizer(path)
