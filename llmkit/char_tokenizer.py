"""CharTokenizer: one id per Unicode character; its tokenizer.json is a WordLevel vocabulary over single characters."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmkit.bpe import check_special_tokens, read_config, read_json, token_text
from llmkit.tokenizer import END_OF_TEXT, Tokenizer

UNKNOWN = "<|unk|>"
_PATTERN = r"[\s\S]"


class CharTokenizer(Tokenizer):
    """Maps each character of `characters` to its index; every other character to the id of UNKNOWN, which loses it."""

    def __init__(
        self,
        characters: Sequence[str],
        special_tokens: dict[str, int],
        *,
        name: str = "char",
        eot_token: str | None = END_OF_TEXT,
    ) -> None:
        """Raises ValueError unless UNKNOWN is among the special tokens and all ids are distinct."""
        check_special_tokens(special_tokens)
        if UNKNOWN not in special_tokens or sorted(special_tokens.values()) != list(
            range(len(characters), len(characters) + len(special_tokens))
        ):
            raise ValueError(f"a character tokenizer has {UNKNOWN!r} and its special tokens behind its characters")
        self.name = name
        self.special_tokens = dict(special_tokens)
        self.vocab_size = len(characters) + len(special_tokens)
        self.eot_id = None if eot_token is None else special_tokens.get(eot_token)
        self.bos_id = None
        self._ids = {character: index for index, character in enumerate(characters)}
        self._unknown = special_tokens[UNKNOWN]
        self._bytes = [text.encode() for text in (*characters, *sorted(special_tokens, key=special_tokens.__getitem__))]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        get, unknown = self._ids.get, self._unknown
        if not allow_special:
            return [get(character, unknown) for character in text]
        ids: list[int] = []
        for part, special in _split_special(text, self.special_tokens):
            ids += [special] if special is not None else [get(character, unknown) for character in part]
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[index] for index in ids])

    def identity(self) -> bytes:
        return json.dumps(["char", list(self._ids), sorted(self.special_tokens.items()), self.eot_id]).encode()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        special = sorted(self.special_tokens.items(), key=lambda item: item[1])
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": text, **flags} for text, index in special],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": _PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self._ids | self.special_tokens, "unk_token": UNKNOWN},
        }
        (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        eot = next((text for text, index in special if index == self.eot_id), None)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "unk_token": UNKNOWN,
            **({} if eot is None else {"bos_token": eot, "eos_token": eot}),
            "llmkit_name": self.name,
        }
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    @classmethod
    def from_json(cls, path: Path) -> CharTokenizer | None:
        """Read a tokenizer.json that `save` wrote; None where it is of another kind."""
        content = read_json(path)
        model, pre = content["model"], content.get("pre_tokenizer") or {}
        ours = model.get("type") == "WordLevel" and pre.get("pattern") == {"Regex": _PATTERN}
        if not ours or content.get("normalizer") or content.get("post_processor") or model.get("unk_token") != UNKNOWN:
            return None
        special = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        vocabulary = {text: index for text, index in model["vocab"].items() if text not in special}
        characters = sorted(vocabulary, key=vocabulary.__getitem__)
        if any(len(character) != 1 for character in characters):
            return None
        config = read_config(path.parent)
        eot = token_text(config.get("eos_token"))
        return cls(characters, special, name=config.get("llmkit_name") or "char", eot_token=eot)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> CharTokenizer:
        """The characters of the texts, by code point; the most frequent ones where `vocab_size` does not hold all.

        Raises ValueError where there is no text, or no room for a character.
        """
        special = list(dict.fromkeys([END_OF_TEXT, UNKNOWN, *special_tokens]))
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        if not counts:
            raise ValueError("there is no text to train a tokenizer on")
        room = vocab_size - len(special)
        if room < 1:
            raise ValueError(f"a vocabulary of {vocab_size} is too small: the special tokens take {len(special)}")
        frequent = sorted(counts, key=lambda character: (-counts[character], character))[:room]
        return cls(sorted(frequent), {text: len(frequent) + index for index, text in enumerate(special)})


def _split_special(text: str, special: dict[str, int]) -> Iterable[tuple[str, int | None]]:
    """Divide text at special tokens: (text between, None) and ("", id of the special token)."""
    import re

    pattern = "(" + "|".join(re.escape(token) for token in special) + ")"
    for index, part in enumerate(re.split(pattern, text)):
        yield (part, None) if index % 2 == 0 else ("", special[part])
