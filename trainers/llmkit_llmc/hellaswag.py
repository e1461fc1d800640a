"""HellaSwag as the C code reads it: the writer of llm.c's eval .bin.

python -m llmkit_llmc.hellaswag validation.jsonl hellaswag_val.bin [--tokenizer gpt2]

An example is its context and four endings, each ending encoded as " " + text, in uint16 words.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.files import TEMPORARY, cache_dir
from llmkit.tokenizer import Tokenizer, load_tokenizer

MAGIC, VERSION, START, ENDINGS = 20240522, 1, 65535, 4


def read_examples(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of HellaSwag's own .jsonl (`ctx`, `endings`, `label`). Raises ValueError, naming the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                example = json.loads(line)
                if len(example["endings"]) != ENDINGS or not 0 <= int(example["label"]) < ENDINGS or not example["ctx"]:
                    raise ValueError("it needs a context, four endings and a label")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}, is no HellaSwag example: {error}") from None
            yield example


def encode_examples(examples: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> bytes:
    """The whole file. Raises ValueError where a token or an example does not fit its 16 bits, or there is none."""
    if tokenizer.vocab_size > START:
        raise ValueError(f"a vocabulary of {tokenizer.vocab_size} does not fit the eval file's 16-bit tokens")
    body: list[bytes] = []
    for index, example in enumerate(examples):
        context = tokenizer.encode(example["ctx"])
        endings = [tokenizer.encode(" " + ending) for ending in example["endings"]]
        words = [int(example["label"]), ENDINGS, len(context), *context]
        for ending in endings:
            words += [len(ending), *ending]
        size = 2 * (len(words) + 3)
        if size > 65535 or index > 65535:
            raise ValueError(f"example {index} of {size} bytes does not fit the eval file")
        body.append(np.array([START, size, index, *words], dtype="<u2").tobytes())
    if not body:
        raise ValueError("there are no examples")
    head = np.zeros(256, dtype="<i4")
    head[:4] = (MAGIC, VERSION, len(body), max(map(len, body)))
    return head.tobytes() + b"".join(body)


def evaluation_file(path: Path, tokenizer: Tokenizer) -> Path:
    """`path` if it is an eval .bin, else its examples encoded with `tokenizer`, made once and kept in the cache."""
    if path.suffix == ".bin":
        return path
    digest = hashlib.blake2b(path.read_bytes() + tokenizer.fingerprint.encode(), digest_size=12).hexdigest()
    made = cache_dir() / "llmc" / f"eval-{digest}.bin"
    if not made.is_file():
        content = encode_examples(read_examples(path), tokenizer)
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=made.parent, prefix=TEMPORARY, delete=False) as beside:
            beside.write(content)
        os.replace(beside.name, made)
    return made


def main(arguments: list[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m llmkit_llmc.hellaswag", description="Write llm.c's eval .bin.")
    parser.add_argument("examples", type=Path, help="HellaSwag's .jsonl")
    parser.add_argument("output", type=Path, help="the .bin to write")
    parser.add_argument("--tokenizer", default="gpt2", help="name, file or folder [default: gpt2]")
    options = parser.parse_args(arguments)
    try:
        tokenizer = load_tokenizer(options.tokenizer)
        options.output.write_bytes(encode_examples(read_examples(options.examples), tokenizer))
    except (OSError, ValueError) as error:
        sys.exit(f"hellaswag: {error}")


if __name__ == "__main__":
    main()
