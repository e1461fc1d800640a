"""Checkpoint: the directory that every part passes around, in Hugging Face layout.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json  chat_template.jinja
    llmkit.json      where it came from: backend, version, configuration, data, tokens seen, validation loss
    trainer_state/   what resuming needs beyond the weights, in the backend's own form

transformers, lm-eval and vLLM open it without llmkit. Weights are safetensors only; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit import __version__
from llmkit.files import cache_dir, new_directory, remove_leftovers, write_json, write_text
from llmkit.tokenizer import Tokenizer, load_tokenizer
from llmkit.weights import Array, WeightFiles, save_weights

PROVENANCE = "llmkit.json"
TRAINER_STATE = "trainer_state"
STEP = re.compile(r"step_(\d+)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+|gpt2(-medium|-large|-xl)?|distilgpt2")


class CheckpointError(ValueError):
    """A reference leads to no usable checkpoint. The message says what was found and what to do."""


class Checkpoint:
    """An opened checkpoint directory. Only config.json is read at once; weights and tokenizer when asked for.

    Attributes:
        path: the directory.
        config: config.json.
        provenance: llmkit.json, {} where another program made the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        """Open a directory. Raises CheckpointError unless it has a readable config.json and weights."""
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
        self.config = _read_json(config)
        provenance = path / PROVENANCE
        self.provenance = _read_json(provenance) if provenance.is_file() else {}

    @classmethod
    def open(cls, ref: str | Path | None = None) -> Checkpoint:
        """Open what `ref` names; with None, the latest training run's newest checkpoint.

        `ref` is a checkpoint directory, a run directory (its newest complete checkpoint), a llm.c `.bin` model (which
        is converted into the cache), or a hub id such as `gpt2`. Raises CheckpointError.
        """
        if ref is None:
            path = latest_run()
            if path is None:
                raise CheckpointError("no checkpoint was named and no training run is known: train one, or name one")
            return cls(newest_checkpoint(path))
        path = Path(ref).expanduser()
        if path.is_file():
            return cls(_convert_file(path))
        if path.is_dir():
            if (path / "config.json").is_file() and not (path / "checkpoints").is_dir():
                return cls(path)
            return cls(newest_checkpoint(path))
        if HUB_ID.fullmatch(str(ref)):
            return cls(_download(str(ref)))
        raise CheckpointError(f"there is no checkpoint {ref}: no such directory, run or file")

    @cached_property
    def weights(self) -> WeightFiles:
        """Name -> fp32 array, read when asked for. Raises CheckpointError where there are none."""
        try:
            return WeightFiles(self.path)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises CheckpointError where it has none, or one that does not fit its model."""
        if not (self.path / "tokenizer.json").is_file():
            raise CheckpointError(f"checkpoint {self.path} has no tokenizer.json, so text cannot be read or written")
        tokenizer = load_tokenizer(self.path)
        if tokenizer.vocab_size > self.config.get("vocab_size", tokenizer.vocab_size):
            raise CheckpointError(
                f"checkpoint {self.path} has a tokenizer of {tokenizer.vocab_size} ids but a model of "
                f"{self.config['vocab_size']}: the tokenizer belongs to another model"
            )
        return tokenizer

    @property
    def architecture(self) -> str:
        """The class name in config.json, e.g. GPT2LMHeadModel."""
        return next(iter(self.config.get("architectures") or ["?"]))

    @property
    def step(self) -> int | None:
        """Optimiser steps done, for a checkpoint made by training."""
        step = self.provenance.get("step")
        return int(step) if step is not None else None

    @property
    def run(self) -> Path | None:
        """The run directory that the checkpoint lies in, if it lies in one."""
        folder = self.path.parent.parent
        return folder if self.path.parent.name == "checkpoints" and (folder / "config.json").is_file() else None

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a generation: generation_config.json's, else config.json's, else the tokenizer's."""
        generation = self.path / "generation_config.json"
        for config in ([_read_json(generation)] if generation.is_file() else []) + [self.config]:
            eos = config.get("eos_token_id")
            if eos is not None:
                return frozenset(eos if isinstance(eos, list) else [eos])
        eot = self.tokenizer.eot_id
        return frozenset() if eot is None else frozenset([eot])

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template of the conversation format, or None for a base model."""
        file, config = self.path / "chat_template.jinja", self.path / "tokenizer_config.json"
        if file.is_file():
            return file.read_text("utf-8")
        template = _read_json(config).get("chat_template") if config.is_file() else None
        if isinstance(template, list):  # an older form: several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template if isinstance(template, str) else None

    @property
    def trainer_state(self) -> Path | None:
        """The folder with the backend's own state, or None where the checkpoint cannot be resumed."""
        folder = self.path / TRAINER_STATE
        return folder if folder.is_dir() else None


def save_checkpoint(
    path: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Array],
    tokenizer: Tokenizer | None,
    provenance: Mapping[str, Any],
    dtype: str = "fp32",
    chat_template: str | None = None,
    write_state: Callable[[Path], None] | None = None,
    replace: bool = False,
) -> None:
    """Write a checkpoint, whole or not at all (kill -9 and a full disk leave what was there before).

    `config` and `weights` are in Hugging Face's form; `write_state` fills trainer_state/. `dtype` fp32 or bf16.
    """
    with new_directory(path, replace=replace) as folder:
        save_weights(folder / "model.safetensors", weights, dtype=dtype)
        write_json(folder / "config.json", {**config, "dtype": "bfloat16" if dtype == "bf16" else "float32"})
        ids = {k: config[k] for k in ("bos_token_id", "eos_token_id") if config.get(k) is not None}
        write_json(folder / "generation_config.json", {**ids, "do_sample": True})
        write_json(folder / PROVENANCE, {"llmkit_version": __version__, **provenance})
        if tokenizer is not None:
            tokenizer.save(folder)
        if chat_template is not None:
            write_text(folder / "chat_template.jinja", chat_template)
        if write_state is not None:
            (folder / TRAINER_STATE).mkdir()
            write_state(folder / TRAINER_STATE)


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Saving renames them into place, so each one there is complete."""
    found = [
        (int(match[1]), path) for path in (run / "checkpoints").glob("step_*") if (match := STEP.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run directory. Raises CheckpointError."""
    if found := complete_checkpoints(run):
        return found[-1]
    what = "has no complete checkpoint yet" if (run / "checkpoints").is_dir() else "is neither a checkpoint nor a run"
    raise CheckpointError(f"{run} {what}")


def remember_run(run: Path) -> None:
    """Make `run` the one that commands take when none is named."""
    write_text(cache_dir() / "latest_run", str(run.resolve()))


def latest_run() -> Path | None:
    """The run that was trained last by this user, if it still has a checkpoint."""
    pointer = cache_dir() / "latest_run"
    if not pointer.is_file():
        return None
    run = Path(pointer.read_text("utf-8").strip())
    return run if complete_checkpoints(run) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def _convert_file(path: Path) -> Path:
    """A llm.c model as a checkpoint in the cache, made on first use. The key holds the file's size and time."""
    from llmkit.gpt2 import from_llmc
    from llmkit.llmc_files import is_llmc_model, read_model

    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} is a file of weights: name the directory that holds it and its config.json")
    if not is_llmc_model(path):
        hint = (
            " (pickled weights are not opened, because they can run code)"
            if path.suffix in (".pt", ".pth", ".bin")
            else ""
        )
        raise CheckpointError(f"{path} is neither a checkpoint directory nor a llm.c model{hint}")
    import hashlib

    stat = path.stat()
    key = hashlib.blake2b(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(), digest_size=12).hexdigest()
    target = cache_dir() / "converted" / key
    if not target.is_dir():
        config, arrays = read_model(path)
        tokenizer = _tokenizer_beside(path, config.vocab)
        remove_leftovers(target.parent)
        save_checkpoint(
            target,
            config=config.to_hf(eot_id=tokenizer.eot_id if tokenizer else config.vocab - 1),
            weights=from_llmc(arrays, config),
            tokenizer=tokenizer,
            provenance={"backend": "llm.c", "converted_from": str(path.resolve())},
        )
    return target


def _tokenizer_beside(path: Path, vocab_size: int) -> Tokenizer | None:
    """A llm.c model carries no tokenizer: take tokenizer.json beside it, or GPT-2's where the vocabulary is GPT-2's."""
    if (path.parent / "tokenizer.json").is_file():
        return load_tokenizer(path.parent)
    if vocab_size != 50257:
        return None
    try:
        return load_tokenizer("gpt2")
    except ValueError as error:
        raise CheckpointError(f"{path} needs GPT-2's tokenizer: {error}") from None


def _download(ref: str) -> Path:
    """A checkpoint of the hub, in its own cache; only the files that llmkit reads are fetched."""
    from llmkit.component import require

    require(("huggingface_hub",), f"opening {ref!r} from the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(ref, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"there is no directory {ref}, and the hub cannot be reached to look for a model of that name"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"there is no directory {ref}, and the hub says: {str(error).splitlines()[0]}") from None
