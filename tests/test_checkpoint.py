"""Checkpoints: what opens, what is refused and how, and that a save is whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmkit.checkpoint import Checkpoint, CheckpointError, complete_checkpoints, latest_run, remember_run
from llmkit.gpt2 import (
    PARAMETERS,
    GPT2Config,
    from_llmc,
    hf_shapes,
    hf_weights,
    parameter_shape,
    shape_of_size,
    to_llmc,
)
from llmkit.llmc_files import read_model, write_model
from llmkit.testing import tiny_checkpoint
from llmkit.weights import bf16_to_fp32, fp32_to_bf16


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "checkpoint")


def test_it_opens_a_directory_a_run_and_the_latest_run(tmp_path):
    run = tmp_path / "run"
    for step in (9, 10, 100):
        tiny_checkpoint(run / "checkpoints" / f"step_{step}", seed=step)
    assert Checkpoint.open(run / "checkpoints" / "step_9").path.name == "step_9"
    assert Checkpoint.open(run).path.name == "step_100"
    assert [path.name for path in complete_checkpoints(run)] == ["step_9", "step_10", "step_100"]
    remember_run(run)
    assert Checkpoint.open().path.name == "step_100"
    assert latest_run() == run.resolve()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "is neither a checkpoint nor a run"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is damaged"),
        (lambda p: (p / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda p: (p / "model.safetensors").unlink(), "has no weights: model.safetensors is missing"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled weights only"),
        (lambda p: os.truncate(p / "model.safetensors", 5000), "damaged or no safetensors file"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "damaged or no safetensors file"),
        (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_a_damaged_one_is_refused_in_one_sentence(checkpoint, damage, message):
    damage(checkpoint.path)

    def use() -> None:
        opened = Checkpoint.open(checkpoint.path)
        dict(opened.weights)
        assert opened.tokenizer

    with pytest.raises(CheckpointError, match=message):
        use()


def test_wrong_shapes_are_named(checkpoint):
    config = json.loads((checkpoint.path / "config.json").read_text())
    (checkpoint.path / "config.json").write_text(json.dumps({**config, "n_positions": 65}))
    with pytest.raises(
        ValueError, match=r"transformer.wpe.weight has shape \[64, 32\] where its config.json says \[65, 32\]"
    ):
        hf_weights(Checkpoint.open(checkpoint.path))
    (checkpoint.path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(ValueError, match=r"tensor transformer.h.2.ln_1.weight is missing"):
        hf_weights(Checkpoint.open(checkpoint.path))


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    config = json.loads((checkpoint.path / "config.json").read_text())
    (checkpoint.path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(CheckpointError, match="the tokenizer belongs to another model"):
        assert Checkpoint.open(checkpoint.path).tokenizer


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors", "notes.txt"])
def test_a_file_that_is_no_model_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04K\x01." * 10)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(tmp_path / name)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory, run or file"):
        Checkpoint.open(tmp_path / "nothing")
    pytest.importorskip("huggingface_hub")
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        Checkpoint.open("someone/some-model")


SAVE_FOREVER = """
    import itertools, sys
    from pathlib import Path
    from llmkit.checkpoint import Checkpoint
    from llmkit.run import Run
    start = Checkpoint.open(sys.argv[1])
    weights = {name: start.weights[name] for name in start.weights}
    run = Run(Path(sys.argv[2]))
    run.acquire()
    for step in itertools.count(1):
        run.save(step, config=start.config, weights=weights, tokenizer=start.tokenizer, provenance={"step": step},
                 write_state=lambda folder: (folder / "state.bin").write_bytes(bytes(100_000)), keep_last=2)
        print(step, flush=True)
"""


def test_kill_9_in_a_save_leaves_whole_checkpoints_only(checkpoint, tmp_path):
    """Kills a process that does nothing but save, at many moments; what is there always opens."""
    run = tmp_path / "run"
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), str(checkpoint.path), str(run)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(1 + attempt % 3):
            assert process.stdout.readline()
        try:
            process.wait(0.0015 * attempt)
        except subprocess.TimeoutExpired:
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = complete_checkpoints(run)
        assert 1 <= len(found) <= 3
        for path in found:
            opened = Checkpoint.open(path)
            assert set(opened.weights) == set(checkpoint.weights)
            assert opened.trainer_state is not None
            assert (opened.trainer_state / "state.bin").stat().st_size == 100_000


def test_a_full_disk_leaves_the_last_checkpoint(checkpoint, tmp_path, monkeypatch):
    from llmkit import checkpoint as module
    from llmkit.run import Run

    run = Run(tmp_path / "run")
    run.acquire()
    weights = {name: checkpoint.weights[name] for name in checkpoint.weights}

    def save(step: int):
        return run.save(
            step, config=checkpoint.config, weights=weights, tokenizer=checkpoint.tokenizer,
            provenance={"step": step}, write_state=lambda folder: None, keep_last=1,
        )  # fmt: skip

    save(1)

    def full(path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_weights", full)
    with pytest.raises(OSError, match=r"saving step 2 failed: No space left on device; the newest .* step_1|step_1"):
        save(2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_1"]
    assert Checkpoint.open(run.path).step == 1


def test_multiples_are_kept_besides_the_last(checkpoint, tmp_path):
    from llmkit.run import Run

    run = Run(tmp_path / "run")
    run.acquire()
    weights = {name: checkpoint.weights[name] for name in checkpoint.weights}
    for step in (2, 4, 6, 8, 9):
        run.save(
            step, config=checkpoint.config, weights=weights, tokenizer=checkpoint.tokenizer,
            provenance={"step": step}, write_state=lambda folder: None, keep_last=2, keep_every=4,
        )  # fmt: skip
    assert [path.name for path in run.checkpoints] == ["step_4", "step_8", "step_9"]


CONFIGS = st.builds(
    GPT2Config,
    vocab=st.integers(1, 300),
    context=st.integers(1, 9),
    depth=st.integers(1, 3),
    heads=st.just(2),
    width=st.sampled_from([2, 6, 8]),
)


@given(CONFIGS, st.sampled_from(["fp32", "bf16"]))
def test_llmc_models_come_back(tmp_path_factory, config, dtype):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in hf_shapes(config).items()}
    path = tmp_path_factory.mktemp("llmc") / "model.bin"
    write_model(path, config, to_llmc(weights, config), dtype=dtype)
    read_config, arrays = read_model(path)
    assert read_config == config
    back = from_llmc(arrays, config)
    assert set(back) == set(weights)
    for name, array in weights.items():
        expected = bf16_to_fp32(fp32_to_bf16(array)) if dtype == "bf16" else array
        assert np.array_equal(back[name], expected), name


def test_a_llmc_model_has_the_bytes_that_the_format_says(tmp_path):
    """Against a writer of our own in the test: header, order of arrays, padding, (out, in) layout."""
    config = GPT2Config(vocab=5, context=3, depth=2, heads=1, width=2)
    weights = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + i
        for i, (name, shape) in enumerate(hf_shapes(config).items())
    }
    header = np.zeros(256, "<i4")
    header[:8] = (20240326, 3, 3, 5, 2, 1, 2, 128)
    body = [np.vstack([weights["transformer.wte.weight"], np.zeros((123, 2))]), weights["transformer.wpe.weight"]]
    for kind in ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
                 "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
                 "mlp.c_proj.weight", "mlp.c_proj.bias"):  # fmt: skip
        for layer in range(2):
            tensor = weights[f"transformer.h.{layer}.{kind}"]
            body.append(tensor.T if tensor.ndim == 2 else tensor)
    body += [weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]]
    expected = header.tobytes() + b"".join(np.ascontiguousarray(part, "<f4").tobytes() for part in body)
    write_model(tmp_path / "model.bin", config, to_llmc(weights, config))
    assert (tmp_path / "model.bin").read_bytes() == expected


def test_gpt2_has_the_size_that_llmc_says():
    config = GPT2Config(50257, 1024, *(shape_of_size("gpt2")[i] for i in (0, 2, 1)))
    total = sum(int(np.prod(parameter_shape(p, config))) * (config.depth if p.layered else 1) for p in PARAMETERS)
    assert config.padded_vocab == 50304
    assert total == 124_475_904
    assert 1024 + 4 * total == 497_904_640
    assert config.parameters == 124_439_808


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b[:-4], "truncated or damaged"),
        (lambda b: b[:100], "not a llm.c model"),
        (lambda b: b[:4] + (7).to_bytes(4, "little") + b[8:], "has version 7"),
        (lambda b: b[:24] + (3).to_bytes(4, "little") + b[28:], "is damaged|is truncated"),
        (lambda b: b"\0" * 4 + b[4:], "not a llm.c model"),
    ],
)
def test_a_damaged_llmc_model_is_refused(tmp_path, checkpoint, edit, message):
    config, weights = hf_weights(checkpoint)
    path = tmp_path / "model.bin"
    write_model(path, config, to_llmc(weights, config))
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_a_llmc_model_opens_as_a_checkpoint(tmp_path, checkpoint):
    config, weights = hf_weights(checkpoint)
    write_model(tmp_path / "model.bin", config, to_llmc(weights, config))
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        assert Checkpoint.open(tmp_path / "model.bin").tokenizer
    checkpoint.tokenizer.save(tmp_path)
    os.utime(tmp_path / "model.bin", (1, 1))  # another time, another conversion
    opened = Checkpoint.open(tmp_path / "model.bin")
    assert all(np.array_equal(opened.weights[name], weights[name]) for name in weights)
    assert opened.tokenizer.fingerprint == checkpoint.tokenizer.fingerprint
    assert Checkpoint.open(tmp_path / "model.bin").path == opened.path


@given(hnp.arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_bf16_rounds_as_pytorch_does(values):
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(bf16_to_fp32(fp32_to_bf16(values)), expected)


def test_export_to_both_formats(checkpoint, tmp_path, run_cli):
    done = run_cli("export", checkpoint.path, tmp_path / "hf", "--format", "hf", "--dtype", "bf16", "--json")
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "hf")]
    exported = Checkpoint.open(tmp_path / "hf")
    assert exported.weights.dtype("transformer.wte.weight") == "BF16"
    assert exported.trainer_state is None
    done = run_cli("export", checkpoint.path, tmp_path / "model.bin", "--format", "llmc", "--json")
    assert len(json.loads(done.stdout)["files"]) == 2
    opened = Checkpoint.open(tmp_path / "model.bin")
    assert all(np.array_equal(opened.weights[name], checkpoint.weights[name]) for name in checkpoint.weights)
    done = run_cli("export", checkpoint.path, tmp_path / "hf", "--format", "hf", code=2)
    assert "--overwrite" in done.stderr
