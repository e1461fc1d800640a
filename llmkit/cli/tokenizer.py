"""`llmkit tokenizer train` and `llmkit tokenizer eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmkit.cli import ui

if TYPE_CHECKING:
    from llmkit.data.source import DataSource


@click.group(help="Train and compare tokenizers.")
def command() -> None:
    pass


@command.command()
@click.argument("sources", nargs=-1, required=True, metavar="FILES...")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    metavar="N",
    help="Tokens, special ones included.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder to make.")
@click.option(
    "--special-token",
    "special_tokens",
    multiple=True,
    metavar="T",
    help="A further special token, behind <|endoftext|>; may be repeated.",
)
@click.option(
    "--text-field", metavar="FIELD", show_default="text", help="JSON key or parquet column that holds the text."
)
@click.option("--overwrite", is_flag=True, help="Replace the folder DIR.")
@ui.json_option
def train(
    sources: tuple[str, ...],
    vocab_size: int,
    out: Path,
    special_tokens: tuple[str, ...],
    text_field: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Train byte-level BPE on all of FILES and save it for llmkit and transformers.

    FILES are any SOURCE of `llmkit data prepare`. Memory grows with the number of distinct words, not with the length
    of the text.
    """
    from llmkit import files
    from llmkit.bpe import ByteLevelBPE
    from llmkit.data.readers import open_source

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} is there already: choose another --out, or replace it with --overwrite")
    if out.exists() and any(out.iterdir()) and not (out / "tokenizer.json").is_file():
        raise ValueError(f"{out} holds no tokenizer, so it is not overwritten")
    opened = [open_source(source, text_field=text_field) for source in sources]
    with ui.progress("Reading", 1.0) as update:
        tokenizer = ByteLevelBPE.train(_texts(opened, update), vocab_size, special_tokens)
    with files.new_directory(out, replace=overwrite) as folder:
        tokenizer.save(folder)
    result = {
        "tokenizer": str(out),
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": tokenizer.special_tokens,
        "fingerprint": tokenizer.fingerprint,
    }
    if as_json:
        ui.emit(result)
        return
    if tokenizer.vocab_size < vocab_size:
        ui.note(f"the text has no more than {tokenizer.vocab_size} tokens to offer, fewer than {vocab_size}")
    print(f"{out}: byte-level BPE, {tokenizer.vocab_size:,} tokens; special: {', '.join(tokenizer.special_tokens)}")


def _texts(sources: list[DataSource], update: Callable[..., None]) -> Iterator[str]:
    from llmkit.data.split import split_text

    for index, source in enumerate(sources):
        for document in source.documents():
            yield from split_text(document.text)
            update((index + (document.position or 0.0)) / len(sources))


@command.command("eval")
@click.argument("tokenizer", metavar="TOKENIZER")
@click.argument("sources", nargs=-1, metavar="[FILES...]")
@click.option(
    "--text-field", metavar="FIELD", show_default="text", help="JSON key or parquet column that holds the text."
)
@ui.json_option
def evaluate(tokenizer: str, sources: tuple[str, ...], text_field: str | None, as_json: bool) -> None:
    """Compare the compression of TOKENIZER with gpt2 and cl100k_base, in bytes per token.

    TOKENIZER is a name, a tokenizer.json, its folder, a checkpoint or a run. The texts are built-in samples of English,
    code and other languages, or the first megabyte of each of FILES (any SOURCE of `llmkit data prepare`). More bytes
    per token: fewer tokens for the same text.
    """
    from llmkit.compression import REFERENCES, compare, load_references, sample_texts
    from llmkit.tokenizer import load_tokenizer

    own = load_tokenizer(tokenizer)
    references, missing = load_references(but=own.fingerprint)
    texts = sample_texts(sources, text_field)
    results = compare({tokenizer: own, **references}, texts)
    if as_json:
        ui.emit({"tokenizer": tokenizer, "bytes_per_token": results, "unavailable": missing})
        return
    names = [tokenizer, *(name for name in REFERENCES if name in references or name in missing)]
    rows = []
    for text, ratios in results.items():
        cells = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in names]
        rows.append([text, f"{len(texts[text].encode()):,}", *cells] if text in texts else [text, "", *cells])
    ui.table(["bytes per token", "bytes", *names], rows, right=tuple(range(1, 2 + len(names))))
    for name, reason in missing.items():
        ui.note(f"{name}: not available here: {reason}")
