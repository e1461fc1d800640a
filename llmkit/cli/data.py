"""`llmkit data prepare`: text to token shards; `llmkit data info`: what a data folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llmkit.cli import ui


@click.group(help="Turn text into token shards, and describe them.")
def command() -> None:
    pass


@command.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to make.", metavar="DIR")
@click.option(
    "--tokenizer",
    default="bpe",
    show_default=True,
    metavar="T",
    help="A registered name (bpe and char are trained on the text), a tokenizer.json, its folder, or a checkpoint.",
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), metavar="N", show_default="8192", help="Tokens of a trained tokenizer."
)
@click.option("--val", "val_sources", multiple=True, metavar="SOURCE", help="Text to validate on; may be repeated.")
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 0.5, min_open=True),
    metavar="X",
    show_default="0.02",
    help="Fraction of the documents held out to validate on, where no source brings its own.",
)
@click.option(
    "--shard-tokens",
    type=click.IntRange(min=2, max=2**31 - 1),
    default=100_000_000,
    show_default=True,
    metavar="N",
    help="Tokens in a shard.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="one for each core, at most 8",
    help="Processes that encode.",
)
@click.option(
    "--text-field", metavar="FIELD", show_default="text", help="JSON key or parquet column that holds the text."
)
@click.option(
    "--limit-documents",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N documents (a part of a long text counts as one).",
)
@click.option(
    "--limit-tokens", type=click.IntRange(min=1), metavar="N", help="Stop after the document that reaches N tokens."
)
@click.option("--overwrite", is_flag=True, help="Replace the data folder DIR.")
@ui.json_option
def prepare(
    sources: tuple[str, ...],
    out: Path,
    val_sources: tuple[str, ...],
    val_fraction: float | None,
    limit_documents: int | None,
    limit_tokens: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn text into token shards, with their tokenizer and a validation split.

    SOURCE is a file, folder or glob of .txt, .jsonl or .parquet (plain, .gz or .zst), a named source (stdlib,
    tinyshakespeare, tinystories, fineweb, fineweb-edu, climbmix), or hf:DATASET[:CONFIG].
    """
    from llmkit.data.prepare import Limits
    from llmkit.data.prepare import prepare as run

    if val_sources and val_fraction is not None:
        raise click.UsageError("--val and --val-fraction exclude each other")
    if val_fraction is not None:
        options["val_fraction"] = val_fraction
    with ui.progress("Preparing", 1.0) as update:

        def progress(position: float | None, tokens: int) -> None:
            reached = tokens / limit_tokens if limit_tokens else 0.0
            update(min(max(position or 0.0, reached), 1.0), status=f"{tokens:,} tokens")

        limits = Limits(limit_documents, limit_tokens)
        meta = run(sources, out, val_sources=val_sources, limits=limits, note=ui.note, progress=progress, **options)
    _show(out, meta, as_json)


@command.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@ui.json_option
def info(folder: Path, as_json: bool) -> None:
    """Describe a data folder, after checking that its shards are whole."""
    from llmkit.data.tokens import TokenData

    data = TokenData(folder)
    data.shards("train")
    data.shards("val")
    _show(folder, data.meta, as_json)


def _show(folder: Path, meta: dict[str, Any], as_json: bool) -> None:
    if as_json:
        ui.emit({"data": str(folder), **meta})
        return
    tokenizer = meta["tokenizer"]
    print(f"{folder}: tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens; data {meta['fingerprint']}")
    rows = []
    for split in ("train", "val"):
        counts = meta[split]
        ratio = f"{counts['bytes'] / counts['tokens']:.2f}"
        rows.append(
            [
                split,
                *(f"{counts[key]:,}" for key in ("documents", "bytes", "tokens")),
                ratio,
                str(len(counts["shards"])),
            ]
        )
    ui.table(["split", "documents", "bytes", "tokens", "bytes/token", "shards"], rows, right=(1, 2, 3, 4, 5))
