"""The trainer: documents, schedules, presets, switches, resuming after a kill, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from speedrun_support import TINY, resolved, training  # noqa: E402

from llmkit.checkpoint import Checkpoint  # noqa: E402
from llmkit.testing.tiny import tiny_data  # noqa: E402
from llmkit_speedrun import SpeedrunTrainer  # noqa: E402
from llmkit_speedrun.config import (  # noqa: E402
    FEATURES,
    SpeedrunTrainConfig,
    micro_batches_at,
    momentum_at,
    rate_factor_at,
    token_weights_at,
    window_at,
)
from llmkit_speedrun.muon import Muon  # noqa: E402


def losses_of_documents(run: Any, ids: Any, targets: Any) -> Any:
    """(B, T) loss of every token, as the trainer computes them."""
    from torch.nn.functional import cross_entropy

    logits = run._logits(ids, run._documents(ids), window_at(run.step, run.config))
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none")


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"value_embeddings": True}], ids=str)
def test_changing_a_document_never_changes_the_loss_of_another(tmp_path: Path, options: dict[str, Any]) -> None:
    run = training(tmp_path, **options)
    for _ in range(3):  # projections are zero at first, and then nothing sees anything
        run.train_step()
    eot = run.job.data.eot_id
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = torch.from_numpy(rng.integers(0, 200, (1, 33)))
        begin, end = sorted(rng.choice(np.arange(1, 33), 2, replace=False))
        ids[0, [begin, end]] = eot  # a document from `begin` to `end`
        changed = ids.clone()
        changed[0, begin + 1 : end] = torch.from_numpy(rng.integers(0, 200, end - begin - 1))
        with torch.no_grad():
            before, after = (losses_of_documents(run, x[:, :-1], x[:, 1:])[0] for x in (ids, changed))
        inside = np.zeros(32, dtype=bool)
        inside[begin:end] = True  # the end-of-text token that opens it predicts its first token
        assert torch.equal(before[~inside], after[~inside])
        if end - begin > 2:
            assert not torch.equal(before[inside], after[inside])


def test_without_the_mask_documents_see_each_other(tmp_path: Path) -> None:
    run = training(tmp_path, without="document-mask")
    for _ in range(3):
        run.train_step()
    ids = torch.arange(33)[None].clone()
    ids[0, 10] = run.job.data.eot_id
    changed = ids.clone()
    changed[0, 5] = 77
    with torch.no_grad():
        before, after = (losses_of_documents(run, x[:, :-1], x[:, 1:])[0] for x in (ids, changed))
    assert not torch.equal(before[11:], after[11:])


def test_further_targets_stay_in_the_document(tmp_path: Path) -> None:
    """With multi-token prediction too, a document's loss is its own affair: gradients of the others do not change."""
    run = training(tmp_path, multi_token_prediction=True)
    run.train_step()
    eot = run.job.data.eot_id
    ids = torch.arange(33)[None].clone()
    ids[0, 16] = eot
    changed = ids.clone()
    changed[0, 17:] = torch.arange(100, 116)
    totals = []
    for x in (ids, changed):
        documents = run._documents(x[:, :-1])
        logits = run._logits(x[:, :-1], documents, 32)
        from llmkit_speedrun.training import IGNORED, _further_targets

        further = [_further_targets(x[:, 1:], documents, ahead) for ahead in (0, 1, 2)]
        # What document one is trained on: its own tokens and the end-of-text token, whatever comes after.
        assert further[1][0, :16].tolist() == [*range(2, 16), eot, IGNORED]
        assert further[2][0, :16].tolist() == [*range(3, 16), eot, IGNORED, IGNORED]
        totals.append((logits[0, :16], [target[0, :16] for target in further]))
    torch.testing.assert_close(totals[0], totals[1], rtol=0, atol=0)


def plain(**changes: Any) -> SpeedrunTrainConfig:
    values = {"steps": 100, "warmup_steps": 0, "warmdown_fraction": 0.3, "momentum_warmup_steps": 50,
              "sequence_length": 64, "batch_size": 2, "total_batch_tokens": 1152}  # fmt: skip
    return SpeedrunTrainConfig(**{**values, **changes})


def test_rates_are_constant_and_then_fall_in_a_line() -> None:
    factors = [rate_factor_at(step, plain()) for step in range(100)]
    assert factors[:71] == [1.0] * 71
    np.testing.assert_allclose(factors[70:], np.linspace(1, 1 / 30, 30))
    warm = [rate_factor_at(step, plain(warmup_steps=4)) for step in range(5)]
    assert warm == [0.25, 0.5, 0.75, 1.0, 1.0]
    half = [rate_factor_at(step, plain(final_lr_fraction=0.5)) for step in (0, 85)]
    assert half == [1.0, 0.75]
    cosine = [rate_factor_at(step, plain(schedule="cosine")) for step in (0, 50)]
    assert cosine == pytest.approx([1.0, 0.5])


def test_momentum_warms_up() -> None:
    assert [momentum_at(step, plain()) for step in (0, 25, 50, 99)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momentum_at(0, plain(momentum=0.5)) == 0.5
    assert momentum_at(0, plain(momentum_warmup_steps=0)) in (0.85, 0.95)


def test_the_window_grows_in_eighths_and_stops_at_its_size() -> None:
    assert {window_at(step, plain()) for step in range(100)} == {64}
    sizes = [window_at(step, plain(window=32, window_warmup_steps=40)) for step in range(60)]
    assert sizes[0] == 4 and sizes == sorted(sizes) and set(sizes[40:]) == {32}
    assert set(sizes) <= {4 * eighth for eighth in range(1, 9)}
    assert window_at(0, plain(window=1, window_warmup_steps=5)) == 1


def test_the_batch_grows_by_thirds() -> None:
    counts = [micro_batches_at(step, plain(batch_schedule=True)) for step in range(100)]
    assert [counts.count(size) for size in (3, 6, 9)] == [34, 33, 33]
    assert {micro_batches_at(step, plain()) for step in range(100)} == {9}


def test_fewer_tokens_are_predicted_as_training_goes_on() -> None:
    weights = [token_weights_at(step, plain(multi_token_prediction=True)) for step in (0, 50, 99)]
    assert [len(w) for w in weights] == [3, 2, 1]
    assert token_weights_at(0, plain()) == (1.0,)


def test_the_schedules_reach_the_optimisers(tmp_path: Path) -> None:
    run = training(tmp_path, momentum_warmup_steps=4, warmdown_fraction=0.5, learning_rate=0.02,
                   embedding_learning_rate=0.3)  # fmt: skip
    for _ in range(5):
        step = run.train_step()
    adam, muon = run.optimisers
    assert isinstance(muon, Muon)
    assert muon.param_groups[0]["momentum"] == pytest.approx(0.95)
    assert step.learning_rate == pytest.approx(0.02 * 2 / 3)
    assert adam.param_groups[0]["lr"] == pytest.approx(0.3 * 2 / 3)
    assert run.batches.position == 5 * 8


def test_muon_has_the_matrices_and_adam_the_rest(tmp_path: Path) -> None:
    run = training(tmp_path, value_embeddings=True)
    adam, muon = run.optimisers
    names = {id(p): name for name, p in run.model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert all(name.endswith("_proj.weight") for name in matrices) and len(matrices) == 6 * 3
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert matrices | rest == set(names.values()) and not matrices & rest
    state = sum(p.numel() for group in muon.param_groups for p in group["params"])
    run.train_step()
    assert sum(value.numel() for p in muon.state.values() for value in p.values()) == state  # half of Adam's


SWITCHES: list[dict[str, Any]] = [
    {"polar_express": True},
    {"normuon": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "cautious_weight_decay": True},
    {"value_embeddings": True},
    {"multi_token_prediction": True},
    {"batch_schedule": True, "total_batch_tokens": 384},
    {"window": 16, "window_warmup_steps": 4},
    {"optimizer": "adamw", "learning_rate": 0.003},
    {"grad_clip": 0.1},
    {"compile": False, "dtype": "bf16"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: ",".join(map(str, switch)))
def test_every_switch_trains_another_way_and_resumes_to_the_bit(tmp_path: Path, switch: dict[str, Any]) -> None:
    """Six steps at once, and three and three with everything saved and read back between them."""
    whole, first, plain_run = (training(tmp_path, **options) for options in (switch, switch, {}))
    losses = [whole.train_step().loss for _ in range(6)]
    assert losses != [plain_run.train_step().loss for _ in range(6)]
    assert [first.train_step().loss for _ in range(3)] == losses[:3]
    (state := tmp_path / "state").mkdir()
    first._write_state(state)
    second = training(tmp_path, **switch)
    second.model.load_state_dict(first.model.state_dict())

    class Saved:
        trainer_state = state

    second._restore(Saved())  # type: ignore[arg-type]
    assert [second.train_step().loss for _ in range(3)] == losses[3:]
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    data = tiny_data(tmp_path / "data")
    options = ["--backend", "speedrun", "--data", data.path, "--json"]
    for name, value in {**TINY, "steps": 24, "normuon": True, "momentum_warmup_steps": 20}.items():
        flag = "--" + name.replace("_", "-")
        options += [flag] if value is True else [flag, value]
    run_cli("train", *options, "--out", tmp_path / "whole")
    command = [sys.executable, "-m", "llmkit", "train", *map(str, options), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / "checkpoints" / "step_6").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run_cli("train", "--resume", "--out", tmp_path / "cut", "--json")
    whole, cut = (Checkpoint.open(tmp_path / name) for name in ("whole", "cut"))
    assert whole.step == cut.step == 24
    for name in whole.weights:
        assert np.array_equal(whole.weights[name], cut.weights[name]), name
    logs = [(tmp_path / name / "main.log").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_eval_and_generate_run_the_checkpoint(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    data = tiny_data(tmp_path / "data")
    given = {**TINY, "steps": 2, "checkpoint_every": 0, "val_every": 0}
    options = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    run_cli("train", "--backend", "speedrun", "--data", data.path, "--out", tmp_path / "run", "--json", *options)
    done = run_cli("eval", tmp_path / "run", "--tasks", "bpb", "--limit", 2, "--json")  # on the run's validation split
    assert 0 < json.loads(done.stdout)["results"]["bpb"]["bpb"] < 10
    done = run_cli("generate", tmp_path / "run", "--prompt", "2 and", "--max-tokens", 5, "--greedy")
    assert done.stdout


# --- options


def test_the_record_preset_is_the_published_one(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    config = SpeedrunTrainer.resolve(SpeedrunTrainConfig(preset="record-2024-11", device="cpu"), data, None)
    published = {"depth": 12, "width": 768, "heads": 6, "total_batch_tokens": 524288, "steps": 1875, "window": 1024,
                 "warmup_steps": 0, "learning_rate": 0.04, "embedding_learning_rate": 0.6, "head_learning_rate": 0.008,
                 "scalar_learning_rate": 0.04, "momentum": 0.95, "weight_decay": 0.0, "grad_clip": 0.0}  # fmt: skip
    assert {name: getattr(config, name) for name in published} == published
    assert config.batch_size and config.sequence_length
    assert micro_batches_at(0, config) * config.batch_size * config.sequence_length == 524288
    factors = [rate_factor_at(step, config) for step in range(1875)]
    assert sum(factor < 1 for factor in factors) in (561, 562)
    # What is given goes before the preset.
    changed = SpeedrunTrainConfig(preset="record-2024-11", device="cpu", depth=2, width=64, heads=2, steps=10, window=8)
    config = SpeedrunTrainer.resolve(changed, data, None)
    assert (config.depth, config.steps, config.window, config.learning_rate) == (2, 10, 8, 0.04)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"without": "rotery"}, "did you mean rotary"),
    ({"preset": "record"}, "--preset"),
    ({"cautious_weight_decay": True}, "--weight-decay"),
    ({"optimizer": "adamw", "normuon": True}, "--normuon"),
    ({"batch_schedule": True, "total_batch_tokens": 256, "batch_size": 8}, "--batch-schedule"),
    ({"width": 30, "heads": 10}, "rotary"),
    ({"window": 0}, "--window"),
    ({"momentum": 1.5}, "--momentum"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_work_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(tmp_path, **options)


def test_beginning_with_a_checkpoint_takes_its_architecture(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    data = tiny_data(tmp_path / "data")
    given = {**TINY, "steps": 1, "val_every": 0, "without": "rotary,unet-skips"}
    options = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), value)]
    run_cli("train", "--backend", "speedrun", "--data", data.path, "--out", tmp_path / "run", *options)
    start = Checkpoint.open(tmp_path / "run")
    config = SpeedrunTrainer.resolve(SpeedrunTrainConfig(from_checkpoint=str(start.path)), data, start)
    assert (config.depth, config.width, config.heads) == (3, 32, 2)
    assert config.switched_off == {"rotary", "unet-skips"}
    for changes, message in (
        ({"depth": 4}, "--depth 4 contradicts"),
        ({"without": "relu2"}, "--without relu2 contradicts"),
        ({"value_embeddings": True}, "--value-embeddings contradicts"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeedrunTrainer.resolve(SpeedrunTrainConfig(from_checkpoint=str(start.path), **changes), data, start)


def test_another_architecture_cannot_be_gone_on_with(tmp_path: Path) -> None:
    from llmkit.testing.tiny import tiny_checkpoint

    start = tiny_checkpoint(tmp_path / "gpt2")
    data = tiny_data(tmp_path / "data")
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        SpeedrunTrainer.resolve(SpeedrunTrainConfig(from_checkpoint=str(start.path)), data, start)


def test_a_damaged_state_is_one_sentence(tmp_path: Path) -> None:
    run = training(tmp_path)
    run.train_step()
    (folder := tmp_path / "state").mkdir()
    run._write_state(folder)
    (folder / "optimizer.safetensors").write_bytes(b"no tensors")

    class Damaged:
        trainer_state = folder

    with pytest.raises(ValueError, match="damaged or of another model"):
        training(tmp_path)._restore(Damaged())  # type: ignore[arg-type]


def test_every_option_of_the_preset_is_an_option() -> None:
    from llmkit_speedrun.config import PRESETS

    names = {field.name for field in dataclasses.fields(SpeedrunTrainConfig)}
    assert all(set(values) <= names for values in PRESETS.values())
    assert len(FEATURES) == len(set(FEATURES))
