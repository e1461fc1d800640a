"""`llmkit export`: a checkpoint as a plain Hugging Face folder or as llm.c's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmkit.cli.ui import emit, json_option

if TYPE_CHECKING:
    from llmkit.checkpoint import Checkpoint


@click.command("export")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice(["hf", "llmc"]),
    required=True,
    help="hf: a folder for transformers and others; llmc: a .bin model of llm.c with its tokenizer beside it.",
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True, help="Type of the weights."
)
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@json_option
def command(checkpoint: str, out: Path, format_: str, dtype: str, overwrite: bool, as_json: bool) -> None:
    """Convert CHECKPOINT and write it to OUT.

    With --format hf, OUT becomes a folder without llmkit's training state. With --format llmc, OUT is a file such as
    model.bin, which llm.c reads; GPT-2 only.
    """
    from llmkit.checkpoint import Checkpoint

    opened = Checkpoint.open(checkpoint)
    if out.exists() and not overwrite:
        raise click.UsageError(f"{out} is there already: choose another name, or replace it with --overwrite")
    written = _export_hf(opened, out, dtype) if format_ == "hf" else _export_llmc(opened, out, dtype)
    if as_json:
        emit(
            {
                "checkpoint": str(opened.path),
                "format": format_,
                "dtype": dtype,
                "files": [str(path) for path in written],
            }
        )
    else:
        for path in written:
            print(path)


def _export_hf(checkpoint: Checkpoint, out: Path, dtype: str) -> list[Path]:
    from llmkit.files import new_directory, write_json
    from llmkit.weights import save_weights

    copied = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "chat_template.jinja", "llmkit.json")  # fmt: skip
    weights = checkpoint.weights
    with new_directory(out, replace=True) as folder:
        save_weights(folder / "model.safetensors", weights, dtype=dtype)
        name = "bfloat16" if dtype == "bf16" else "float32"
        write_json(folder / "config.json", {**checkpoint.config, "dtype": name})
        for file in copied:
            if (checkpoint.path / file).is_file():
                shutil.copyfile(checkpoint.path / file, folder / file)
    return [out]


def _export_llmc(checkpoint: Checkpoint, out: Path, dtype: str) -> list[Path]:
    from llmkit.gpt2 import hf_weights, to_llmc
    from llmkit.llmc_files import write_model, write_tokenizer

    config, weights = hf_weights(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_model(out, config, to_llmc(weights, config), dtype="bf16" if dtype == "bf16" else "fp32")
    written = [out]
    if (checkpoint.path / "tokenizer.json").is_file():
        tokenizer = checkpoint.tokenizer
        tokens = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
        beside = out.with_name(out.stem + "_tokenizer.bin")
        write_tokenizer(beside, tokens, tokenizer.eot_id if tokenizer.eot_id is not None else 0)
        written.append(beside)
    return written
