"""The engine's kernels, in builds for other processors than this one too, against PyTorch with the same rounding.

A build is chosen by LLMC_CFLAGS; instructions that this processor lacks are emulated.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import prompts, tiny_llama

from llmkit.checkpoint import Checkpoint
from llmkit.engine import GenerateRequest, Sampling, ScoreRequest
from llmkit_engine.engine import EmbeddedEngine
from llmkit_engine.library import library
from llmkit_llmc.build import find_compiler, run

EMULATED = "-DLLMC_EMULATE_DPBF16 -DLK_EMULATE_DPBUSD"
BUILDS = {"native": "", "emulated": EMULATED}
if platform.machine() == "x86_64":
    BUILDS |= {"avx2": f"-march=x86-64-v3 {EMULATED}", "sse2": f"-march=x86-64 {EMULATED}"}
ODD = {"hidden_size": 54, "intermediate_size": 77, "head_dim": 10, "tie_word_embeddings": False}
GROUP = 32  # as in engine.h


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CFLAGS", BUILDS[request.param])
        yield request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_llama(tmp_path_factory.mktemp("kernels") / "llama", dtype="bf16", **ODD)


def requests_of(checkpoint: Checkpoint) -> list[ScoreRequest]:
    given = prompts(checkpoint.config["vocab_size"], 12, shortest=8, longest=40)
    return [ScoreRequest(i, prompt[:1], prompt[1:]) for i, prompt in enumerate(given)]


def score(checkpoint: Checkpoint, **options: Any) -> dict[int, tuple[float, ...]]:
    with EmbeddedEngine.open(checkpoint, threads=1, **options) as engine:
        return {result.id: result.logprobs for result in engine.score(requests_of(checkpoint))}


def expected(checkpoint: Checkpoint, inputs: Callable[[Any], Any], *, int8: bool) -> dict[int, tuple[float, ...]]:
    """PyTorch's log-probabilities in fp32, with every product's input going through `inputs`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (inputs(given[0]),))
            if int8:
                top = module.weight.data.abs().amax(1, keepdim=True)
                module.weight.data = torch.round(module.weight.data * torch.full_like(top, 127).div(top)) * (top / 127)
    found = {}
    with torch.inference_mode():
        for request in requests_of(checkpoint):
            ids = torch.tensor([request.context + request.continuation])
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            found[request.id] = tuple(logprobs.gather(1, ids[0, 1:, None]).squeeze(1).tolist())
    return found


def as_pairs(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Rounded to a byte in groups of GROUP inputs that share a scale."""
    width = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -width % GROUP)).reshape(*x.shape[:-1], -1, GROUP)
    top = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    rounded = torch.round(padded * torch.full_like(top, 127).div(top)) * (top / 127)
    return rounded.flatten(-2)[..., :width]


def distance(a: dict[int, tuple[float, ...]], b: dict[int, tuple[float, ...]]) -> float:
    return float(np.mean([abs(x - y) for i in a for x, y in zip(a[i], b[i], strict=True)]))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_products_with_fp32_inputs_equal_pytorch(checkpoint: Checkpoint, build: str, quantize: str | None) -> None:
    exact = expected(checkpoint, lambda x: x, int8=quantize is not None)
    found = score(checkpoint, quantize=quantize, fp32_inputs=True)
    for index, logprobs in exact.items():
        assert found[index] == pytest.approx(logprobs, abs=3e-4)


@pytest.mark.parametrize(("quantize", "inputs"), [(None, as_pairs), ("int8", as_bytes)], ids=["pairs", "bytes"])
def test_products_that_round_their_inputs_equal_pytorch_with_the_same_rounding(
    checkpoint: Checkpoint, build: str, quantize: str | None, inputs: Callable[[Any], Any]
) -> None:
    if not library().lk_kinds() & (2 if quantize else 1):  # the other builds emulate what this processor lacks
        assert build == "native"
        rounded, exact = (score(checkpoint, quantize=quantize, fp32_inputs=flag) for flag in (False, True))
        assert rounded == exact
        return
    rounded, exact = (expected(checkpoint, rounding, int8=quantize is not None) for rounding in (inputs, lambda x: x))
    found = score(checkpoint, quantize=quantize, fp32_inputs=False)
    # Where a value lies between two roundings, the last bit of a sum before it decides; few do.
    assert distance(found, rounded) < 0.1 * distance(exact, rounded)


@pytest.mark.parametrize(
    "options",
    [{"fp32_inputs": False}, {"quantize": "int8"}, {"fp32_inputs": True}, {"quantize": "int8", "fp32_inputs": True}],
    ids=str,
)
def test_any_number_of_rows_gives_the_same_bits(checkpoint: Checkpoint, build: str, options: dict[str, Any]) -> None:
    """Steps of 1 to 14 tokens run every kernel there is."""
    whole = score(checkpoint, **options)
    for rows in range(1, 15):
        assert score(checkpoint, step_tokens=rows, **options) == whole


def test_inputs_are_rounded_only_where_that_was_asked_for(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in bf16 stand for bf16 arithmetic, but not where fp32 is asked for, in one way or another."""
    monkeypatch.setenv("LLMC_CFLAGS", EMULATED)
    rounded, exact = score(checkpoint, fp32_inputs=False), score(checkpoint, fp32_inputs=True)
    assert rounded != exact
    assert score(checkpoint, dtype="fp32", fp32_inputs=False) == exact
    monkeypatch.setenv("LLMKIT_ENGINE_FP32_INPUTS", "0")
    assert score(checkpoint) == rounded
    monkeypatch.setenv("LLMKIT_ENGINE_FP32_INPUTS", "1")
    assert score(checkpoint) == exact
    assert score(checkpoint, fp32_inputs=False) == rounded


def test_a_step_with_nan_gives_nan_and_not_a_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to bytes must not hide what is not a number."""
    from llmkit.checkpoint import save_checkpoint

    monkeypatch.setenv("LLMC_CFLAGS", EMULATED)
    model = tiny_llama(tmp_path / "a")
    weights = dict(model.weights.items())
    name = "model.layers.0.input_layernorm.weight"
    weights[name] = np.full_like(weights[name], np.nan)
    save_checkpoint(tmp_path / "b", config=model.config, weights=weights, tokenizer=None, provenance={})
    for options in ({}, {"quantize": "int8"}, {"dtype": "bf16", "fp32_inputs": False}):
        with EmbeddedEngine.open(Checkpoint.open(tmp_path / "b"), **options) as engine:  # type: ignore[arg-type]
            request = GenerateRequest(0, (5, 6), Sampling(max_tokens=1, temperature=0, logprobs=0, ignore_eos=True))
            assert np.isnan(next(engine.generate([request])).logprobs[0])


def test_the_sources_compile_for_arm() -> None:
    """With NEON, bf16 and 8-bit instructions left out; only where a cross compiler is installed."""
    import shutil

    from llmkit_engine.build import SOURCES
    from llmkit_llmc.build import SOURCES as SHARED

    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None or find_compiler() is None:
        pytest.skip("no aarch64-linux-gnu-gcc (Debian: apt install gcc-aarch64-linux-gnu)")
    for source in sorted(SOURCES.glob("*.c")):
        command = [
            compiler,
            "-std=gnu11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            f"-I{SHARED}",
            str(source),
        ]
        assert run(command).returncode == 0
