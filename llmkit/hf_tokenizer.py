"""HFTokenizer: any Hugging Face tokenizer.json, through the `tokenizers` library."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.bpe import CHARACTER_BYTES, read_config, read_json, token_text
from llmkit.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SAVED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class HFTokenizer(Tokenizer):
    """A tokenizer.json with the tokenizer_config.json beside it.

    `decode_bytes` is additive: the bytes of a sequence are those of its tokens, one behind the other. So a tokenizer
    that puts a space in front of every text (Llama's) gives that space back; `decode` takes it away, as transformers
    does.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is damaged, or decodes by rules that are not known here."""
        from tokenizers import Tokenizer as Library

        self._path = path
        content = read_json(path)
        config = read_config(path.parent)
        for key in ("truncation", "padding"):  # as transformers does: they belong to a use, not to the tokenizer
            content[key] = None
        _follow_begin_flag(content, config)
        serialized = json.dumps(content)
        try:
            self._plain: Library = Library.from_str(serialized)
            self._with_special: Library = Library.from_str(serialized)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self._plain.encode_special_tokens = True
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
        special = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or [] if entry.get("special")}
        self.special_tokens = special
        self.vocab_size = max(vocabulary.values()) + 1
        self.name = config.get("llmkit_name") or path.parent.name or "hf"
        eos = token_text(config.get("eos_token"))
        candidates = [eos, END_OF_TEXT, "</s>"]
        self.eot_id = next((vocabulary[token] for token in candidates if token in vocabulary), None)
        self.bos_id = _begin_id(self._plain)
        self._config = config
        steps = _decoder_steps(content)
        self._strip = _stripped_spaces(steps)
        self._bytes = [b""] * self.vocab_size
        spell = _Speller(steps, path)
        for text, index in vocabulary.items():
            self._bytes[index] = text.encode() if text in added else spell(text)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        library = self._with_special if allow_special else self._plain
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        library = self._with_special if allow_special else self._plain
        ids: list[int] = library.encode(text, add_special_tokens=True).ids
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        return b"".join([self._bytes[index] for index in ids])

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        for _ in range(self._strip):
            text = text.removeprefix(" ")
        return text

    def save(self, directory: Path) -> None:
        """Copy the files as they are."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in _SAVED:
            source = self._path if name == "tokenizer.json" else self._path.parent / name
            if source.is_file():
                shutil.copyfile(source, directory / name)

    def identity(self) -> bytes:
        content = json.loads(self._plain.to_str())
        content["encode_special_tokens"] = None
        return json.dumps(["hf", content, self.eot_id, self.bos_id], sort_keys=True).encode()


def _follow_begin_flag(content: dict[str, Any], config: dict[str, Any]) -> None:
    """Apply `add_bos_token` of tokenizer_config.json, which Llama's and Gemma's classes put above tokenizer.json."""
    flag, token = config.get("add_bos_token"), token_text(config.get("bos_token"))
    kind = str(config.get("tokenizer_class", ""))
    if not isinstance(flag, bool) or token is None or not kind.startswith(("Llama", "Gemma", "CodeLlama")):
        return
    ids = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    if token not in ids:
        return
    begin = [{"SpecialToken": {"id": token, "type_id": 0}}] if flag else []
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    entry = {token: {"id": token, "ids": [ids[token]], "tokens": [token]}} if flag else {}
    template = {"type": "TemplateProcessing", "single": [*begin, a], "pair": [*begin, a, b], "special_tokens": entry}
    content["post_processor"] = template


def _begin_id(library: Library) -> int | None:
    """The id that the post-processor puts in front of a prompt, or None."""
    plain = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a", add_special_tokens=True).ids
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[0] if at == 1 else None


def _decoder_steps(content: dict[str, Any]) -> list[dict[str, Any]]:
    decoder = content.get("decoder") or {"type": "Fuse"}
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _stripped_spaces(steps: list[dict[str, Any]]) -> int:
    """How many spaces at most `decode` takes from the front of a text."""
    for step in steps:
        if step["type"] == "Strip" and step.get("content") == " ":
            return int(step.get("start", 0))
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return 1
    return 0


class _Speller:
    """Bytes of a token as its decoder spells them out. Raises ValueError for a decoder that is not known here."""

    def __init__(self, steps: list[dict[str, Any]], path: Path) -> None:
        self._replace: list[tuple[str, str]] = []
        self._byte_level = self._byte_fallback = False
        self._prefix: str | None = None
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel":
                self._byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Metaspace":
                self._replace.append((step.get("replacement", "▁"), " "))
            elif kind == "Replace" and "String" in step.get("pattern", {}):
                self._replace.append((step["pattern"]["String"], step["content"]))
            elif kind == "WordPiece":
                self._prefix = step["prefix"]
            elif kind not in ("Fuse", "Strip"):
                raise ValueError(f"{path} decodes by a rule that llmkit does not know: {kind}")

    def __call__(self, token: str) -> bytes:
        if self._byte_level:
            if all(character in CHARACTER_BYTES for character in token):
                return bytes([CHARACTER_BYTES[character] for character in token])
            return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._prefix is not None:
            token = token.removeprefix(self._prefix) if token.startswith(self._prefix) else " " + token
        for old, new in self._replace:
            token = token.replace(old, new)
        return token.encode()
