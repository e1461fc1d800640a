"""Byte-level BPE: trained with the `tokenizers` library, encoded through tiktoken, saved as a tokenizer.json.

tiktoken joins whichever adjacent pair spells the token of the lowest id; a tokenizer.json lists the merges that are
allowed. The two give the same ids on every text if each token, encoded alone with only the tokens below it, ends in the
two parts that the list names (`recover_merge`): that is checked for every token, both when reading and when training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmkit.tokenizer import END_OF_TEXT, Tokenizer

#: How text is divided before pairs are merged, by name. Possessive quantifiers (tiktoken's own spelling of these rules)
#: mean something else in Hugging Face's regex engine, and `(?i:...)` folds more there, so both are spelt out.
SPLITS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k_base": (
        r"""'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}
#: Other spellings of the same rules that tokenizer.json files contain.
_SPELLINGS = {pattern: name for name, pattern in SPLITS.items()} | {
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": "gpt2",
    (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ): "cl100k_base",
}
DEFAULT_SPLIT = "cl100k_base"

#: Candidates beyond the wanted vocabulary that training asks for, to replace tokens that fail `recover_merge`.
_SPARE_TOKENS = 64


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a tokenizer.json, as GPT-2 chose them: printable Latin-1 is itself."""
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in itself else chr(next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}


def recover_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, ...]:
    """The parts that `token` is in when only tokens of a lower rank have been merged: two for a sound vocabulary."""
    rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, at = rank, -1
        for i in range(len(parts) - 1):
            candidate = ranks.get(parts[i] + parts[i + 1], rank)
            if candidate < best:
                best, at = candidate, i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


class ByteLevelBPE(Tokenizer):
    """Byte-level BPE; with no merges it is the byte tokenizer.

    `ranks` maps the bytes of each token to its id, which is also its merge priority; all 256 bytes are among them.
    `split` is a key of SPLITS.
    """

    def __init__(
        self,
        name: str,
        ranks: dict[bytes, int],
        *,
        split: str = DEFAULT_SPLIT,
        special_tokens: dict[str, int],
        eot_token: str | None = END_OF_TEXT,
        bos_token: str | None = None,
    ) -> None:
        """Raises ValueError where two tokens have one id, or one special token begins with another."""
        import tiktoken

        ids = [*ranks.values(), *special_tokens.values()]
        if len(set(ids)) != len(ids):
            raise ValueError(f"tokenizer {name!r} gives one id to two tokens")
        check_special_tokens(special_tokens)
        self.name = name
        self.ranks, self.split = ranks, split
        self.special_tokens = dict(special_tokens)
        self.vocab_size = max(ids) + 1
        self.eot_id = None if eot_token is None else special_tokens.get(eot_token)
        self.bos_id = None if bos_token is None else special_tokens[bos_token]
        self._encoding = tiktoken.Encoding(
            name, pat_str=SPLITS[split], mergeable_ranks=ranks, special_tokens=self.special_tokens
        )
        self._special = frozenset(special_tokens)
        self._bytes = [b""] * self.vocab_size  # ids between the tokens and the special ones may be unused: no bytes
        for token, index in ranks.items():
            self._bytes[index] = token
        for text, index in special_tokens.items():
            self._bytes[index] = text.encode()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        if allow_special:
            return self._encoding.encode(text, allowed_special=self._special, disallowed_special=())
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        table, size = self._bytes, self.vocab_size
        for index in ids:
            if not 0 <= index < size:
                raise ValueError(f"token id {index} is outside the vocabulary of {size}")
        return b"".join([table[index] for index in ids])

    def identity(self) -> bytes:
        digest = hashlib.blake2b(digest_size=32)
        for token, index in sorted(self.ranks.items(), key=lambda item: item[1]):
            digest.update(b"%d %d " % (index, len(token)) + token)
        parts = ["byte-level-bpe", self.split, sorted(self.special_tokens.items()), self.eot_id, self.bos_id]
        return json.dumps([*parts, digest.hexdigest()]).encode()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(json.dumps(self._hf_json(), ensure_ascii=False), encoding="utf-8")
        texts = {index: text for text, index in self.special_tokens.items()}
        eot = None if self.eot_id is None else texts[self.eot_id]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": eot if self.bos_id is None else texts[self.bos_id],
            "eos_token": eot,
            "llmkit_name": self.name,
        }
        config = {key: value for key, value in config.items() if value is not None}
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def _hf_json(self) -> dict[str, Any]:
        """The content of tokenizer.json: splitting rule, merges in the order of their ids, special tokens."""
        by_rank = sorted(self.ranks, key=self.ranks.__getitem__)
        merges = [[_spell(part) for part in recover_merge(self.ranks, token)] for token in by_rank if len(token) > 1]
        assert all(len(parts) == 2 for parts in merges)
        special = sorted(self.special_tokens.items(), key=lambda item: item[1])
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": SPLITS[self.split]}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": index, "content": text, **flags} for text, index in special],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": byte_level if self.bos_id is None else self._begin_template(),
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                # The special ones too, as in GPT-2's own file: from here they get their ids where ids are left unused.
                "vocab": {_spell(token): self.ranks[token] for token in by_rank} | self.special_tokens,
                "merges": merges,
            },
        }

    def _begin_template(self) -> dict[str, Any]:
        """The post-processor that puts the begin token in front."""
        text = next(text for text, index in self.special_tokens.items() if index == self.bos_id)
        begin = {"SpecialToken": {"id": text, "type_id": 0}}
        a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        tokens = {text: {"id": text, "ids": [self.bos_id], "tokens": [text]}}
        return {"type": "TemplateProcessing", "single": [begin, a], "pair": [begin, a, b], "special_tokens": tokens}

    @classmethod
    def from_json(cls, path: Path) -> ByteLevelBPE | None:
        """Read a tokenizer.json; None where it is of another kind or would not give the same ids through tiktoken.

        Raises ValueError where the file is no tokenizer.json at all.
        """
        content = read_json(path)
        found = _ranks_and_split(content)
        if found is None:
            return None
        ranks, split = found
        bos = _begin_token(content.get("post_processor"))
        special: dict[str, int] = {}
        for token in content.get("added_tokens") or []:
            plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
            if not plain or not token.get("special") or ranks.get(token["content"].encode()) is not None:
                return None
            special[token["content"]] = token["id"]
        if bos is False or (isinstance(bos, str) and bos not in special):
            return None
        config = read_config(path.parent)
        eot = token_text(config.get("eos_token")) or END_OF_TEXT
        name = config.get("llmkit_name") or f"bpe-{max([*ranks.values(), *special.values()]) + 1}"
        bos_token = bos if isinstance(bos, str) else None
        try:
            return cls(name, ranks, split=split, special_tokens=special, eot_token=eot, bos_token=bos_token)
        except ValueError:  # ids or special tokens that only Hugging Face's own implementation resolves
            return None

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str], *, split: str = DEFAULT_SPLIT
    ) -> ByteLevelBPE:
        """Train on texts (read once, streaming). `vocab_size` counts the special tokens, which take the last ids.

        END_OF_TEXT is always among the special tokens. Bytes have the ids 0-255. Where the texts are too few for
        `vocab_size` pairs that occur twice, the vocabulary is smaller. Raises ValueError where `vocab_size` has no room
        for the bytes and special tokens, or there is no text.
        """
        special = list(dict.fromkeys([END_OF_TEXT, *special_tokens]))
        check_special_tokens(special)
        merges_wanted = vocab_size - 256 - len(special)
        if merges_wanted < 0:
            raise ValueError(
                f"a vocabulary of {vocab_size} is too small: the bytes and special tokens take {256 + len(special)}"
            )
        ranks = {bytes([byte]): byte for byte in range(256)}
        for token in _trained_tokens(texts, merges_wanted + _SPARE_TOKENS, split):
            if len(ranks) == 256 + merges_wanted:
                break
            ranks[token] = len(ranks)
            if len(recover_merge(ranks, token)) != 2:
                del ranks[token]
        tokens = {text: len(ranks) + i for i, text in enumerate(special)}
        return cls(f"bpe-{len(ranks) + len(special)}", ranks, split=split, special_tokens=tokens)


def check_special_tokens(tokens: Iterable[str]) -> None:
    """Raise ValueError for an empty special token, or one that begins with another: which one is meant is undefined."""
    tokens = sorted(tokens)
    for token, following in pairwise(tokens):
        if following.startswith(token):
            raise ValueError(f"special token {following!r} begins with special token {token!r}; choose others")
    if "" in tokens:
        raise ValueError("a special token cannot be empty")


def _trained_tokens(texts: Iterable[str], merges: int, split: str) -> list[bytes]:
    """Bytes of the merged tokens, in the order in which training found them."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(BYTE_CHARACTERS),
    )
    empty = True

    def stream() -> Iterator[str]:
        nonlocal empty
        for text in texts:
            empty = empty and not text
            yield text

    library.train_from_iterator(stream(), trainer=trainer)
    if empty:
        raise ValueError("there is no text to train a tokenizer on")
    vocabulary = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return [_bytes_of(spelt) for spelt, _ in vocabulary if len(spelt) > 1]


def _spell(token: bytes) -> str:
    """A token as tokenizer.json writes it: one character a byte."""
    return "".join([BYTE_CHARACTERS[byte] for byte in token])


def _bytes_of(spelt: str) -> bytes:
    """The reverse of `_spell`. Raises KeyError for a character that stands for no byte."""
    return bytes([CHARACTER_BYTES[character] for character in spelt])


def read_json(path: Path) -> dict[str, Any]:
    """A tokenizer.json as a dict. Raises ValueError where it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is not a tokenizer.json: it describes no tokenizer model")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json in a folder, empty where there is none. Raises ValueError where it is damaged."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return config


def token_text(entry: object) -> str | None:
    """The text of a special token as tokenizer_config.json has it: a string, or an object with its `content`."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    return content if isinstance(content, str) else None


def _ranks_and_split(content: dict[str, Any]) -> tuple[dict[bytes, int], str] | None:
    """Token bytes -> id, and the key of SPLITS, of a tokenizer.json; None unless tiktoken gives the same ids."""
    model = content["model"]
    if model.get("type") != "BPE" or content.get("normalizer") is not None or model.get("byte_fallback"):
        return None
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    if (content.get("decoder") or {}).get("type") != "ByteLevel":
        return None
    split = _split_name(content.get("pre_tokenizer"))
    special = {token["content"] for token in content.get("added_tokens") or []}
    try:
        ranks = {_bytes_of(text): index for text, index in model["vocab"].items() if text not in special}
        merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
        parts = [(_bytes_of(left), _bytes_of(right)) for left, right in merges]
    except (KeyError, ValueError):
        return None
    if split is None or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    if [left + right for left, right in parts] != merged:
        return None
    if any(recover_merge(ranks, token) != pair for token, pair in zip(merged, parts)):
        return None
    return ranks, split


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The key of SPLITS that a pre-tokenizer follows, or None."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space", True):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt2" if steps[0].get("use_regex", True) else None
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True):
        return None
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    return _SPELLINGS.get(steps[0]["pattern"].get("Regex", ""))


def _begin_token(post_processor: dict[str, Any] | None) -> str | bool | None:
    """The special token that a post-processor puts in front, None for none, False where it does anything else."""
    steps = [post_processor] if post_processor else []
    if steps and steps[0].get("type") == "Sequence":
        steps = steps[0]["processors"]
    steps = [step for step in steps if step.get("type") != "ByteLevel"]  # changes offsets, not ids
    if not steps:
        return None
    if len(steps) > 1 or steps[0].get("type") != "TemplateProcessing":
        return False
    single = steps[0]["single"]
    if len(single) == 1 and "Sequence" in single[0]:
        return None
    if len(single) == 2 and "SpecialToken" in single[0] and "Sequence" in single[1]:
        name = single[0]["SpecialToken"]["id"]
        entry = steps[0]["special_tokens"][name]
        return str(name) if entry["tokens"] == [name] else False
    return False
