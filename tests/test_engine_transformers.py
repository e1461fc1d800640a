"""Engine `transformers`: equal to the model's own forward pass and generate, whatever is batched together."""

from __future__ import annotations

import copy
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkit.checkpoint import Checkpoint, CheckpointError
from llmkit.engine import Chunk, Engine, GenerateRequest, Sampling, ScoreRequest
from llmkit.engines import default_engine, open_engine
from llmkit.plugins import UnknownComponent
from llmkit.testing import EngineContract
from llmkit.testing.tiny import tiny_checkpoint
from llmkit_transformers import engine as module
from llmkit_transformers.engine import TransformersEngine

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, most of all where the tests share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TestContract(EngineContract):
    @pytest.fixture
    def engine_class(self) -> type[Engine]:
        return TransformersEngine


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    if request.param == "gpt2":
        checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("engine") / "gpt2")
    else:
        data: Path = request.getfixturevalue("test_data")
        checkpoint = Checkpoint.open(data / "models" / "stories260k-hf")
    with TransformersEngine.open(checkpoint, dtype="fp32", device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def exact(engine: TransformersEngine) -> TransformersEngine:
    """The engine with its model in fp64: what remains of a difference is no rounding, but a mistake.

    In fp32 the neighbours' rounding was seen to move a log-probability of the Llama by 1.5e-5 (in fp64: 1.2e-14), and
    so, once in several hundred requests, a sampled token.
    """
    model = copy.deepcopy(engine.model).double()
    return TransformersEngine(model, context_length=engine.context_length, eos_ids=engine.eos_ids, dtype="fp32")


def tokens_of(chunks: Iterable[Chunk]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for chunk in chunks:
        tokens[chunk.id] += chunk.tokens
    return dict(tokens)


def prompts(engine: Engine, count: int, seed: int = 0, longest: int = 30) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(3, engine.vocab_size, (n,), generator=generator).tolist()) for n in lengths]


def reference_logprobs(engine: TransformersEngine, ids: Sequence[int]) -> torch.Tensor:
    """(T, V) log-probabilities of one plain forward pass, nothing padded or cached."""
    with torch.no_grad():
        return engine.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_log_likelihoods_equal_a_plain_forward_pass(engine: TransformersEngine) -> None:
    requests = [
        ScoreRequest(i, ids[:cut], ids[cut:])
        for i, ids in enumerate(prompts(engine, 12, longest=40))
        if len(ids) > 1
        for cut in [1 + i % (len(ids) - 1)]
    ]
    results = {result.id: result for result in engine.score(requests)}
    assert len(results) == len(requests) > 8
    for request in requests:
        logprobs = reference_logprobs(engine, request.context + request.continuation)
        at = range(len(request.context) - 1, len(request.context) + len(request.continuation) - 1)
        expected = [logprobs[i, token].item() for i, token in zip(at, request.continuation)]
        assert results[request.id].logprobs == pytest.approx(expected, abs=1e-4)
        assert results[request.id].greedy == tuple(
            logprobs[i].argmax().item() == t for i, t in zip(at, request.continuation)
        )


def test_greedy_tokens_equal_the_models_generate(engine: TransformersEngine) -> None:
    requests = [GenerateRequest(i, prompt, GREEDY) for i, prompt in enumerate(prompts(engine, 16))]
    together = tokens_of(engine.generate(requests))
    for request in requests:
        ids = torch.tensor([request.prompt])
        expected = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert together[request.id] == expected[0, ids.shape[1] :].tolist()
        assert together[request.id] == tokens_of(engine.generate([request]))[request.id]


SHAPE = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**SHAPE, "intermediate_size": 64, "max_position_embeddings": 64}
ARCHITECTURES = {  # what differs in positions, masks and heads
    "MistralConfig": {**MLP, "num_key_value_heads": 2, "sliding_window": 8},
    "Gemma2Config": {**MLP, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    "Qwen3Config": {**MLP, "num_key_value_heads": 2, "head_dim": 8},
    "GPTNeoXConfig": MLP,
    "OPTConfig": {**SHAPE, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "BloomConfig": {"vocab_size": 120, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(**ARCHITECTURES[name], eos_token_id=1, bos_token_id=0, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # further from uniform predictions than fresh weights are
        parameter.data *= 3 if parameter.dim() > 1 else 1
    model.save_pretrained(tmp_path)
    with TransformersEngine.open(Checkpoint.open(tmp_path), dtype="fp32", device="cpu") as engine:
        test_greedy_tokens_equal_the_models_generate(engine)
        test_log_likelihoods_equal_a_plain_forward_pass(engine)


def test_a_recurrent_architecture_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=1, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MambaForCausalLM has none"):
        TransformersEngine.open(Checkpoint.open(tmp_path))


def test_an_end_token_ends_a_generation(engine: TransformersEngine) -> None:
    (eos,) = engine.eos_ids
    sampling = Sampling(temperature=0, max_tokens=8, min_tokens=3, logit_bias={eos: 1e4})
    chunks = list(engine.generate([GenerateRequest(0, (1,), sampling)]))
    assert len(tokens_of(chunks)[0]) == 3
    assert chunks[-1].tokens == () and chunks[-1].finish_reason == "stop"


requests_mix = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2)), min_size=1, max_size=10)


@given(requests_mix, st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_neighbours(
    exact: TransformersEngine, mix: list[tuple[int, int, int]], seed: int
) -> None:
    shared = prompts(exact, 1, seed=seed, longest=12)[0]
    requests = []
    for index, (context, continuation, kind) in enumerate(mix):
        generator = torch.Generator().manual_seed(seed + index)
        ids = tuple(torch.randint(0, exact.vocab_size, (context + continuation,), generator=generator).tolist())
        front = shared if kind else ids[:context]
        requests.append(ScoreRequest(index, front, shared if kind == 2 else ids[context:]))
    results = {result.id: result for result in exact.score(requests)}
    for request in requests:
        (alone,) = exact.score([request])
        assert results[request.id].logprobs == pytest.approx(alone.logprobs, abs=1e-5, rel=1e-5)


@given(requests_mix, st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_samples_do_not_depend_on_neighbours(
    exact: TransformersEngine, mix: list[tuple[int, int, int]], seed: int
) -> None:
    requests = [
        GenerateRequest(
            i,
            prompts(exact, 1, seed=seed + i, longest=length + 1)[0],
            Sampling(max_tokens=count, seed=seed, top_k=(0, 5, 40)[kind], top_p=(1.0, 0.9, 1.0)[kind], logprobs=0),
        )
        for i, (length, count, kind) in enumerate(mix)
    ]
    together: dict[int, list[Chunk]] = defaultdict(list)
    for chunk in exact.generate(requests):
        together[chunk.id].append(chunk)
    for request in requests:
        alone = list(exact.generate([request]))
        assert tokens_of(alone) == tokens_of(together[request.id])
        ours = [p for chunk in together[request.id] for p in chunk.logprobs]
        assert ours == pytest.approx([p for chunk in alone for p in chunk.logprobs], abs=1e-5, rel=1e-5)


def test_generated_logprobs_equal_score(engine: TransformersEngine) -> None:
    prompt = prompts(engine, 1)[0]
    sampling = Sampling(max_tokens=10, seed=1, temperature=1.5, top_k=50, ignore_eos=True, logprobs=2)
    chunks = list(engine.generate([GenerateRequest(0, prompt, sampling)]))
    (result,) = engine.score([ScoreRequest(0, prompt, tuple(tokens_of(chunks)[0]))])
    assert [chunk.logprobs[0] for chunk in chunks] == pytest.approx(result.logprobs, abs=1e-4)
    assert all(len(chunk.top_logprobs[0]) == 2 for chunk in chunks)


def test_sampled_tokens_follow_the_models_distribution(engine: TransformersEngine) -> None:
    prompt, draws = prompts(engine, 1, seed=3)[0], 2000
    sampling = Sampling(max_tokens=1, temperature=0.5, top_k=8, ignore_eos=True)
    requests = (GenerateRequest(i, prompt, Sampling(**{**_fields(sampling), "seed": i})) for i in range(draws))
    counts = torch.zeros(engine.vocab_size)
    for tokens in tokens_of(engine.generate(requests)).values():
        counts[tokens[0]] += 1
    best = (reference_logprobs(engine, prompt)[-1] / 0.5).topk(8)
    expected = best.values.softmax(-1) * draws
    assert counts.sum() == counts[best.indices].sum() == draws
    kept = expected >= 5
    chi_square = float(((counts[best.indices] - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < 32  # 0.9999 quantile with 7 degrees of freedom: 29.9


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__slots__}


def test_small_budgets_change_nothing(exact: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools and batches of a few tokens each: the same results, all of them."""
    scores = [ScoreRequest(i, ids, ids[:3]) for i, ids in enumerate(prompts(exact, 10))]
    texts = [GenerateRequest(i, ids, GREEDY) for i, ids in enumerate(prompts(exact, 10))]
    expected = {r.id: r for r in exact.score(scores)}, tokens_of(exact.generate(texts))
    for name, value in {
        "POOL_TOKENS": 40,
        "BATCH_TOKENS": 30,
        "BATCH_LOGITS_BYTES": 1,
        "SLICE": 2,
        "CACHE_BYTES": 1,
        "BATCH_ROWS": 3,
    }.items():
        monkeypatch.setattr(module, name, value)
    results = {r.id: r for r in exact.score(scores)}
    assert results.keys() == expected[0].keys()
    for index, result in results.items():
        assert result.logprobs == pytest.approx(expected[0][index].logprobs, abs=1e-5, rel=1e-5)
    assert tokens_of(exact.generate(texts)) == expected[1]


def test_a_request_is_cancelled_before_and_between_batches(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 2)
    requests = [GenerateRequest(i, (5,) * (9 - i), GREEDY) for i in range(6)]
    reasons: dict[int, str | None] = {}
    tokens: dict[int, int] = defaultdict(int)
    for chunk in engine.generate(requests):
        if not tokens:
            engine.cancel(1)  # the neighbour in this batch, whose token of this step is not out yet
            engine.cancel(5)  # in a later batch
        tokens[chunk.id] += len(chunk.tokens)
        assert chunk.id not in reasons
        if chunk.finish_reason:
            reasons[chunk.id] = chunk.finish_reason
            engine.cancel(chunk.id)  # has ended: nothing happens
    assert reasons == {0: "length", 1: "cancelled", 2: "length", 3: "length", 4: "length", 5: "cancelled"}
    assert (tokens[1], tokens[5]) == (0, 0)
    assert tokens_of(engine.generate(requests[5:]))[5], "an old cancellation is remembered"


def test_an_abandoned_generation_leaves_nothing_behind(engine: TransformersEngine) -> None:
    chunks = engine.generate([GenerateRequest(0, (5,), GREEDY)])
    next(chunks)
    with pytest.raises(ValueError, match="same id"):
        next(engine.generate([GenerateRequest(0, (5,), GREEDY)]))
    chunks.close()  # type: ignore[attr-defined]
    assert len(tokens_of(engine.generate([GenerateRequest(0, (5,), GREEDY)]))[0]) == 24


def test_scoring_leaves_no_inference_mode_behind(engine: TransformersEngine) -> None:
    results = engine.score([ScoreRequest(i, (5,), (6,)) for i in range(2)])
    next(results)
    assert not torch.is_inference_mode_enabled()


def test_bad_sampling_ids_are_refused(engine: TransformersEngine) -> None:
    for sampling in (Sampling(logit_bias={10**6: 1.0}), Sampling(stop_token_ids=(10**6,))):
        with pytest.raises(ValueError, match=r"request 3: .* outside the vocabulary"):
            list(engine.generate([GenerateRequest(3, (5,), sampling)]))


# --- opening


def test_bf16_is_close(test_data: Path) -> None:
    checkpoint = Checkpoint.open(test_data / "models" / "stories260k-hf")
    request = ScoreRequest(0, (1,), tuple(checkpoint.tokenizer.encode("Once upon a time there was a little girl")))
    with open_engine(checkpoint, "transformers", dtype="bf16") as half, open_engine(checkpoint) as full:
        assert (half.dtype, full.dtype) == ("bf16", "fp32")
        assert next(half.score([request])).logprob == pytest.approx(next(full.score([request])).logprob, rel=0.02)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    tiny_checkpoint(path)
    return path


def _change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def _drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path / "model.safetensors")
    del weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_an_error(broken: Path) -> None:
    _drop_tensor(broken, "transformer.h.1.mlp.c_fc.weight")
    with pytest.raises(CheckpointError, match=r"incomplete: tensor transformer\.h\.1\.mlp\.c_fc\.weight is missing"):
        TransformersEngine.open(Checkpoint.open(broken))


def test_a_wrong_shape_is_an_error(broken: Path) -> None:
    _change_config(broken, n_positions=32)
    with pytest.raises(
        CheckpointError, match=r"tensor transformer\.wpe\.weight has shape \[64, 32\] .* says \[32, 32\]"
    ):
        TransformersEngine.open(Checkpoint.open(broken))


def test_absent_and_pickled_weights_are_errors(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        TransformersEngine.open(Checkpoint.open(broken))
    (broken / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(CheckpointError, match="pickled weights"):
        TransformersEngine.open(Checkpoint.open(broken))


def test_truncated_weights_are_an_error(broken: Path) -> None:
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError):
        TransformersEngine.open(Checkpoint.open(broken))


def test_an_unknown_architecture_is_an_error_and_its_code_is_not_run(broken: Path) -> None:
    (broken / "evil.py").write_text("raise SystemExit('the code of a checkpoint was run')")
    _change_config(broken, model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"})
    with pytest.raises(CheckpointError, match="transformers cannot load"):
        TransformersEngine.open(Checkpoint.open(broken))


def test_bad_options_are_errors(broken: Path) -> None:
    with pytest.raises(ValueError, match="fp32 or bf16, not int3"):
        TransformersEngine.open(Checkpoint.open(broken), dtype="int3")
    with pytest.raises(ValueError, match="device 'toaster' cannot be used"):
        TransformersEngine.open(Checkpoint.open(broken), device="toaster")


def test_the_default_engine_and_unknown_names(broken: Path) -> None:
    assert default_engine("NobodysForCausalLM") is TransformersEngine
    with pytest.raises(UnknownComponent, match="did you mean transformers"):
        open_engine(Checkpoint.open(broken), "transformer")


def test_the_checkpoint_folder_is_only_read(broken: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    other = tmp_path / "copy"
    shutil.copytree(broken, other)
    with TransformersEngine.open(Checkpoint.open(other)) as engine:
        list(engine.generate([GenerateRequest(0, (1,), GREEDY)]))
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_an_architecture_that_no_other_engine_knows_comes_here_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from llmkit.engines import open_engine

    config = transformers.OPTConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    tiny_checkpoint(tmp_path / "tiny").tokenizer.save(tmp_path)
    with open_engine(Checkpoint.open(tmp_path)) as engine:
        assert engine.name == "transformers"
    assert "'transformers' runs OPTForCausalLM, which no other engine knows" in capsys.readouterr().err
    with open_engine(tiny_checkpoint(tmp_path / "known"), "transformers"):
        assert capsys.readouterr().err == ""
