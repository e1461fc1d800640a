"""Engine `vllm` with a real vLLM: the contract of engines, scores and tokens beside other engines', its death."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator

import psutil
import pytest

from llmkit.checkpoint import Checkpoint
from llmkit.engine import Engine, GenerateRequest, Sampling, ScoreRequest
from llmkit.testing import EngineContract, tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]  # one at a time: 5 GB, and all cores


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Checkpoint:
    """Small, with heads of a size that vLLM's CPU kernels have."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", width=64)


@pytest.fixture(scope="module")
def running(vllm_python, model) -> Iterator[Engine]:
    """One for all tests, since it takes half a minute to start."""
    from llmkit_vllm.engine import VLLMEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMKIT_VLLM_PYTHON", str(vllm_python))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with VLLMEngine.open(model, dtype="fp32", enforce_eager=True) as engine:
            yield engine


class TestVLLMEngine(EngineContract):
    @pytest.fixture
    def engine_class(self):
        from llmkit_vllm.engine import VLLMEngine

        return VLLMEngine

    @pytest.fixture
    def checkpoint(self, model):
        return model

    @pytest.fixture
    def engine(self, running):
        return running


def test_scores_and_greedy_tokens_are_those_of_the_embedded_engine(running, model):
    from llmkit_engine.engine import EmbeddedEngine

    rng = random.Random(0)
    draw = lambda count: tuple(rng.randrange(running.vocab_size) for _ in range(count))  # noqa: E731
    shared = draw(40)  # longer than a block of the prefix cache
    scores = [ScoreRequest(i, shared + draw(i % 3 + 1), draw(i % 5 + 1)) for i in range(60)]
    scores.append(ScoreRequest(60, shared, draw(running.context_length + 1 - len(shared))))  # as long as it may be
    greedy = Sampling(max_tokens=16, temperature=0, ignore_eos=True)
    prompts = [GenerateRequest(i, draw(i + 1), greedy) for i in range(8)]

    def outputs(engine: Engine) -> tuple[dict[int, list[float]], dict[int, bool], dict[int, list[int]]]:
        tokens: dict[int, list[int]] = {request.id: [] for request in prompts}
        for chunk in engine.generate(prompts):
            tokens[chunk.id] += chunk.tokens
        results = list(engine.score(scores))
        return {r.id: list(r.logprobs) for r in results}, {r.id: r.is_greedy for r in results}, tokens

    logprobs, is_greedy, tokens = outputs(running)
    with EmbeddedEngine.open(model, dtype="fp32") as embedded:
        expected = outputs(embedded)
    assert logprobs.keys() == expected[0].keys()
    for index, values in logprobs.items():
        assert values == pytest.approx(expected[0][index], abs=1e-4)
    assert (is_greedy, tokens) == expected[1:]
    again, _, _ = outputs(running)
    assert all(again[index] == pytest.approx(values, abs=1e-4) for index, values in logprobs.items()), "from its cache"


def test_an_architecture_of_our_own_comes_to_vllm_by_its_entry_point(run_cli, vllm_python, tmp_path):
    """From the command line, in a vLLM of its own, beside transformers."""
    torch = pytest.importorskip("torch")
    from llmkit.tokenizer import load_tokenizer
    from llmkit_speedrun.model import SpeedrunConfig, SpeedrunForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer("byte")
    config = SpeedrunConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        zero_init=False,
        eos_token_id=tokenizer.eot_id,
    )
    config.architectures = ["SpeedrunForCausalLM"]
    SpeedrunForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    environment = {**os.environ, "LLMKIT_VLLM_PYTHON": str(vllm_python), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_CI_ENV"] = "1"  # vLLM compiles no C++ then, which takes longer than all the rest
    prompt = ("generate", tmp_path / "model", "--prompt", "one and", "--greedy", "--max-tokens", "24", "--json")
    ours, theirs = (
        json.loads(run_cli(*prompt, "--engine", engine, env=environment).stdout)["samples"][0]
        for engine in ("vllm", "transformers")
    )
    assert (ours["text"], ours["tokens"]) == (theirs["text"], theirs["tokens"]) and ours["tokens"] > 4


def test_kill_of_its_worker_is_an_error_and_leaves_nothing(running):
    """Last: it kills the engine of the other tests."""
    front = psutil.Process(running.worker.process.process.pid)
    children = front.children(recursive=True)
    worker = next(child for child in children if "Worker" in " ".join(child.cmdline()) or "Worker" in child.name())
    sampling = Sampling(max_tokens=60, temperature=0, ignore_eos=True)
    chunks = running.generate(GenerateRequest(i, (1, 2, 3), sampling) for i in range(1000))
    next(chunks)
    worker.kill()
    with pytest.raises(OSError, match="vLLM has died"):
        list(chunks)
    _, alive = psutil.wait_procs([front, *children], timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(OSError, match="vLLM has died"):
        list(running.score([ScoreRequest(0, (1,), (2,))]))
