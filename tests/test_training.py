"""Training from the command line: results, faults, kill -9 and resume, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llmkit.checkpoint import Checkpoint, complete_checkpoints
from llmkit.testing import tiny_checkpoint, tiny_data
from llmkit.tokenizer import load_tokenizer
from llmkit.training import Progress

torch = pytest.importorskip("torch")

SMALL = [
    "--backend", "torch", "--depth", "1", "--width", "32", "--heads", "2", "--sequence-length", "32",
    "--batch-size", "4", "--total-batch-tokens", "256", "--learning-rate", "0.01", "--warmup-steps", "2",
    "--dtype", "fp32", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("data") / "tokens").path


def weights(run: Path) -> dict[str, np.ndarray]:
    return dict(Checkpoint.open(run).weights)


def test_json_is_one_object_with_the_promised_keys(run_cli, data, tmp_path):
    done = run_cli("train", *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 12, "--json")
    summary = json.loads(done.stdout)
    assert set(summary) == {"run", "steps", "tokens", "train_loss", "val_loss", "val_bpb", "tokens_per_second"}
    assert summary["steps"] == 12 and summary["tokens"] == 12 * 256
    assert 0 < summary["val_bpb"] < 8.1
    # one token is one byte here, but for the end-of-text tokens
    assert summary["val_bpb"] == pytest.approx(summary["val_loss"] / np.log(2), rel=0.02)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(12))
    log = (tmp_path / "run" / "main.log").read_text().splitlines()
    assert re.fullmatch(r"s:0 tel:\d+\.\d{4}", log[0])
    assert re.fullmatch(r"s:0 trl:\d+\.\d{4} lr:\d\.\d{6} norm:\d+\.\d\d", log[1])
    report = json.loads(run_cli("report", tmp_path / "run", "--json").stdout)["report"]
    text = Path(report).read_text()
    assert "validation bits per byte" in text and "![" in text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_resumed_ends_with_the_same_bits(run_cli, data, tmp_path):
    """kill -9 in the middle, more than once, then resume: weights bit-identical to an uninterrupted run."""
    options = [*SMALL, "--data", data, "--steps", "150", "--checkpoint-every", "10", "--val-every", "50"]
    run_cli("train", *options, "--out", tmp_path / "whole")
    cut = tmp_path / "cut"
    command = [sys.executable, "-m", "llmkit", "train", *options, "--out", str(cut)]
    for kill_after in (20, 70):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not any(int(p.name[5:]) >= kill_after for p in complete_checkpoints(cut)):
            assert process.poll() is None, "training ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = [sys.executable, "-m", "llmkit", "train", "--out", str(cut), "--resume"]
    assert complete_checkpoints(cut)[-1].name != "step_150"
    run_cli("train", "--out", cut, "--resume")
    expected, got = weights(tmp_path / "whole"), weights(cut)
    assert all(np.array_equal(expected[name], got[name]) for name in expected)
    losses = [
        [(r["kind"], r["step"], r["loss"]) for r in map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
         if r["kind"] != "sample"]
        for path in (tmp_path / "whole", cut)
    ]  # fmt: skip
    assert losses[0] == losses[1]


def test_ctrl_c_saves_and_exits_130(data, tmp_path):
    run = tmp_path / "run"
    options = [*SMALL, "--data", data, "--out", run, "--steps", "100000", "--checkpoint-every", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "train", *map(str, options), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130
    assert stdout == b""
    assert b"continue with: llmkit train --resume --out" in stderr
    assert b"Traceback" not in stderr
    steps = sum('"kind": "step"' in line for line in (run / "metrics.jsonl").read_text().splitlines())
    assert Checkpoint.open(run).step == steps


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--backend", "torhc"], 2, "unknown backend 'torhc': did you mean torch?"),
        (["--depth", "0"], 2, "--depth"),
        (["--dtype", "fp8"], 2, "fp8"),
        (["--no-such-flag"], 2, "No such option"),
        (["--size", "d12", "--depth", "3"], 1, "--depth 3 contradicts --size d12"),
        (["--size", "huge"], 1, "unknown size 'huge'"),
        (["--width", "33"], 1, "--width 33 does not divide into --heads 2"),
        (["--total-batch-tokens", "300"], 1, "--total-batch-tokens 300 does not divide into micro-batches of 4"),
        (["--sequence-length", "4000", "--total-batch-tokens", "16000"], 1, "fewer than one sequence"),
        (["--warmup-steps", "50"], 1, "--warmup-steps 50 is more than the 10 steps"),
        (["--device", "cuda:7"], 1, "--device cuda:7 cannot be used here"),
        (["--from", "nowhere/at/all"], 1, "there is no checkpoint nowhere/at/all"),
        (["--data", "/nowhere"], 1, "there is no data folder /nowhere"),
    ],
)
def test_bad_options_are_one_sentence(run_cli, data, tmp_path, args, code, message):
    done = run_cli("train", *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 10, *args, code=code)
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def _truncate(folder: Path) -> None:
    os.truncate(folder / "train_000000.bin", 3000)


def _wrong_magic(folder: Path) -> None:
    with (folder / "val_000000.bin").open("r+b") as file:
        file.write(b"\0\0\0\0")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_empty, "is empty"),
        (lambda folder: (folder / "meta.json").unlink(), "its preparation did not finish"),
        (_truncate, "train_000000.bin is truncated or damaged: 3000 bytes"),
        (_wrong_magic, "val_000000.bin is not a token shard: it begins with 0"),
        (lambda folder: (folder / "train_000000.bin").unlink(), "train_000000.bin is missing"),
        (lambda folder: load_tokenizer("byte").save(folder / "tokenizer"), "made by another tokenizer"),
    ],
)
def test_damaged_data_is_one_sentence(run_cli, tmp_path, damage, message):
    trained = load_tokenizer_bpe()
    data = tiny_data(tmp_path / "data", tokenizer=trained)
    damage(data.path)
    done = run_cli("train", *SMALL, "--data", data.path, "--out", tmp_path / "run", "--steps", 3, code=1)
    assert message in done.stderr


def load_tokenizer_bpe():
    from llmkit.plugins import get_plugins
    from llmkit.testing import TEXT

    return get_plugins().tokenizer("bpe").train([TEXT], vocab_size=300, special_tokens=("<|endoftext|>",))


def test_resuming_refuses_what_would_change_the_run(run_cli, data, tmp_path):
    run = tmp_path / "run"
    run_cli("train", *SMALL, "--data", data, "--out", run, "--steps", 4)
    again = run_cli("train", *SMALL, "--data", data, "--out", run, "--steps", 4, code=1)
    assert "--resume" in again.stderr
    other = tiny_data(tmp_path / "other", text="other text\n" * 1000)
    for args, message in (
        (["--learning-rate", "0.5"], "--learning-rate was 0.01 when the run began"),
        (["--data", other.path], "are not those that"),
        (["--backend", "torch", "--seed", "1"], "--seed was 42"),
    ):
        done = run_cli("train", "--out", run, "--resume", *args, code=1)
        assert message in done.stderr
    done = run_cli("train", "--out", run, "--resume", "--steps", "6", "--json")
    assert json.loads(done.stdout)["steps"] == 6
    state = Checkpoint.open(run).trainer_state
    assert state is not None
    os.truncate(state / "optimizer.safetensors", 1000)
    done = run_cli("train", "--out", run, "--resume", "--steps", "8", code=1)
    assert "the trainer state in" in done.stderr and "is damaged" in done.stderr


def test_two_processes_cannot_train_in_one_run(run_cli, data, tmp_path):
    from llmkit.run import Run

    run = Run(tmp_path / "run")
    run.acquire()
    done = run_cli("train", *SMALL, "--data", data, "--out", run.path, "--steps", 3, code=1)
    assert "another process is training in" in done.stderr
    run.close()


def test_nan_stops_and_keeps_the_last_good_checkpoint(run_cli, data, tmp_path):
    options = [*SMALL, "--data", data, "--out", tmp_path / "run", "--checkpoint-every", 2, "--grad-clip", 0]
    done = run_cli("train", *options, "--steps", 60, "--learning-rate", "1e30", "--warmup-steps", 40, code=1)
    match = re.search(r"the (loss|gradient norm) is (nan|inf) at step (\d+)", done.stderr)
    assert match, done.stderr
    assert "lower --learning-rate" in done.stderr
    for path in complete_checkpoints(tmp_path / "run"):
        assert int(path.name[5:]) <= int(match[3])
        assert all(np.isfinite(array).all() for array in Checkpoint.open(path).weights.values())


def test_training_goes_on_from_another_checkpoint(run_cli, data, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", context=64)
    options = ["--backend", "torch", "--data", data, "--batch-size", 4, "--steps", 2, "--threads", 1]
    done = run_cli("train", *options, "--from", checkpoint.path, "--out", tmp_path / "a", "--json")
    assert json.loads(done.stdout)["steps"] == 2
    assert Checkpoint.open(tmp_path / "a").config["n_layer"] == 2
    done = run_cli(
        "train", *options, "--from", checkpoint.path, "--sequence-length", 65, "--out", tmp_path / "b", code=1
    )
    assert "--sequence-length 65 is beyond the 64 positions" in done.stderr
    done = run_cli("train", *options, "--from", checkpoint.path, "--depth", 3, "--out", tmp_path / "b", code=1)
    assert "--depth 3 contradicts the checkpoint of --from" in done.stderr
    other = tiny_data(tmp_path / "other", tokenizer=load_tokenizer_bpe())
    done = run_cli(
        "train", "--backend", "torch", "--data", other.path, "--from", checkpoint.path, "--out", tmp_path / "b", code=1
    )
    assert "another tokenizer than the checkpoint's" in done.stderr


def test_transformers_opens_the_checkpoint_and_agrees(run_cli, data, tmp_path):
    """AutoModelForCausalLM gives the trainer's own logits, AutoTokenizer its own ids."""
    transformers = pytest.importorskip("transformers")
    from llmkit.gpt2 import hf_weights
    from llmkit.testing import TEXT
    from llmkit_torch.model import GPT2, load_hf

    run_cli("train", *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 20)
    checkpoint = Checkpoint.open(tmp_path / "run")
    shape, arrays = hf_weights(checkpoint)
    ours = GPT2(shape).eval()
    load_hf(ours, arrays)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    ids = torch.tensor([checkpoint.tokenizer.encode(TEXT[:32]), checkpoint.tokenizer.encode(TEXT[40:72])])
    with torch.inference_mode():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    for text in (TEXT, "naïve Ελλάδα 日本語 🙂\n\n  x", ""):
        assert tokenizer(text).input_ids == checkpoint.tokenizer.encode(text)
    assert tokenizer.eos_token_id == checkpoint.tokenizer.eot_id


def record(events: list[object], progress: Progress) -> None:
    events.append(progress.event)


def test_gradients_accumulate_to_those_of_one_batch(data, tmp_path):
    """The same step in one micro-batch and in four: the sequences are the same, so the loss is."""
    from llmkit.plugins import get_plugins
    from llmkit.trainer import Step
    from llmkit.training import plan, train

    losses = []
    for size in (2, 8):
        options = {
            "depth": 1, "width": 32, "heads": 2, "sequence_length": 32, "batch_size": size, "total_batch_tokens": 256,
            "steps": 5, "dtype": "fp32", "sample_every": 0,
        }  # fmt: skip
        planned = plan(get_plugins().trainer("torch"), options, data=data, out=tmp_path / str(size), resume=False)
        events: list[object] = []
        train(planned, partial(record, events))
        losses.append([event.loss for event in events if isinstance(event, Step)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_initialisation_follows_the_recipe():
    from llmkit.gpt2 import GPT2Config
    from llmkit_torch.model import GPT2

    model = GPT2(GPT2Config(vocab=512, context=64, depth=4, heads=4, width=128))
    model.initialise(42)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / np.sqrt(8) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    "options", [["--dtype", "bf16"], ["--schedule", "wsd"], ["--schedule", "linear", "--grad-clip", "0"]]
)
def test_options_train(run_cli, data, tmp_path, options):
    done = run_cli("train", *SMALL, "--data", data, "--out", tmp_path / "run", "--steps", 20, *options, "--json")
    assert json.loads(done.stdout)["val_loss"] < 5.0


def test_a_save_that_does_not_fit_loses_nothing(run_cli, data, tmp_path):
    """A real limit of the system on file size, as on a full disk: one sentence, and the checkpoint before it opens."""
    run = tmp_path / "run"
    options = [*SMALL, "--data", data, "--out", run, "--steps", 4, "--checkpoint-every", 2]
    run_cli("train", *options)
    limit = (run / "checkpoints" / "step_4" / "model.safetensors").stat().st_size - 1000

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run_cli("train", "--out", run, "--resume", "--steps", 8, code=1, preexec_fn=lower)
    assert re.search(r"saving step 6 failed: .*; the newest complete checkpoint is .*step_4", done.stderr), done.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_2", "step_4"}
    assert Checkpoint.open(run).step == 4
    run_cli("train", "--out", run, "--resume", "--steps", 8)
    assert Checkpoint.open(run).step == 8
