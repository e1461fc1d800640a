"""The whole model against this project's PyTorch model: loss, gradients, loss curve, initialisation; determinism."""

# mypy: disable-error-code="no-untyped-call,union-attr,operator"
# (PyTorch calls `backward` untyped and `grad` optional.)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import error

from llmkit.gpt2 import PARAMETERS, GPT2Config, from_llmc
from llmkit_llmc.library import AdamW, Library, LlmcError, Model
from llmkit_torch.model import GPT2, load_hf, to_hf
from llmkit_torch.trainer import TorchConfig, make_optimiser

SHAPES = [
    (GPT2Config(vocab=101, context=40, depth=2, heads=2, width=32), 3, 17),
    (GPT2Config(vocab=333, context=130, depth=3, heads=3, width=57), 2, 129),
    (GPT2Config(vocab=130, context=8, depth=1, heads=1, width=1), 1, 8),
]


def tokens(shape: GPT2Config, B: int, T: int, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, shape.vocab, (B, T)), rng.integers(0, shape.vocab, (B, T))


def made(library: Library, shape: GPT2Config, **options: Any) -> Model:
    model = Model(library, shape, **options)
    model.initialise(1)
    rng = np.random.default_rng(5)
    values = model.split(model.get())
    for name, array in values.items():  # so that no bias is zero and no norm is one
        array += rng.standard_normal(array.shape).astype(np.float32) * 0.02 * (name != "wte")
    model.load_arrays(values)
    return model


def torch_model(model: Model) -> GPT2:
    twin = GPT2(model.shape)
    load_hf(twin, from_llmc(model.split(model.get()), model.shape))
    return twin


@pytest.mark.parametrize(("shape", "B", "T"), SHAPES)
def test_loss_and_every_gradient(library: Library, shape: GPT2Config, B: int, T: int) -> None:
    model = made(library, shape)
    x, y = tokens(shape, B, T)
    loss = model.gradient(x, y, scale=1 / x.size, accumulate=False)
    twin = torch_model(model).double()
    logits = twin(torch.from_numpy(x))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5
    mean, losses = model.loss(x, y)
    assert mean == pytest.approx(loss, abs=1e-7) and losses.shape == x.shape
    assert error(model.logits([int(t) for t in x[0]]), logits[0, -1].detach()) < 1e-4
    gradients = from_llmc(model.split(model.gradients()), shape)
    for name, parameter in twin.named_parameters():
        grad = gradients[name].T if parameter.dim() == 2 and ".h." in f".{name}" else gradients[name]
        assert error(grad, parameter.grad) < 1e-4 or torch.linalg.norm(parameter.grad) < 1e-7, name
    padding = model.split(model.gradients())["wte"][shape.vocab :]
    assert not padding.any()


def test_bf16_model(library: Library) -> None:
    shape, B, T = SHAPES[1]
    model = made(library, shape, dtype="bf16")
    x, y = tokens(shape, B, T)
    loss = model.gradient(x, y, scale=1 / x.size, accumulate=False)
    twin = torch_model(model).double()
    expected = twin(torch.from_numpy(x), torch.from_numpy(y))
    expected.backward()
    assert abs(loss - expected.item()) < 1e-2
    flat = torch.cat([p.grad.flatten() for p in twin.parameters()])
    gradients = from_llmc(model.split(model.gradients()), shape)
    names = [name for name, _ in twin.named_parameters()]
    transposed = {p.hf.split("{}")[1] for p in PARAMETERS if p.transposed}
    mine = [gradients[n].T if any(n.endswith(t) for t in transposed) else gradients[n] for n in names]
    assert error(np.concatenate([g.ravel() for g in mine]), flat) < 2e-2


def test_twenty_steps_follow_pytorch(library: Library) -> None:
    shape = GPT2Config(vocab=200, context=32, depth=2, heads=4, width=64)
    model = Model(library, shape)
    model.initialise(42)
    twin = torch_model(model)
    optimiser = make_optimiser(twin, TorchConfig(learning_rate=1e-3, weight_decay=0.1))
    x, y = tokens(shape, 4, 32)
    for step in range(20):
        loss = model.gradient(x, y, scale=1 / x.size, accumulate=False)
        norm = model.grad_square() ** 0.5
        model.update(AdamW(1e-3, 0.9, 0.95, 1e-8, 0.1, min(1.0, 1.0 / norm), step + 1, 0))
        expected = twin(torch.from_numpy(x), torch.from_numpy(y))
        expected.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        assert abs(loss - expected.item()) < 1e-3, step
    assert loss < 5.0


@pytest.mark.parametrize("shape", [SHAPES[0][0], GPT2Config(vocab=7, context=3, depth=2, heads=1, width=5)])
def test_a_seed_means_the_same_as_in_pytorch(library: Library, shape: GPT2Config) -> None:
    model, twin = Model(library, shape), GPT2(shape)
    model.initialise(1234)
    twin.initialise(1234)
    mine, theirs = from_llmc(model.split(model.get()), shape), to_hf(twin)
    for name, value in theirs.items():
        assert np.allclose(mine[name], value, atol=2e-7), name


def test_the_table_of_parameters_is_the_cores(library: Library) -> None:
    import ctypes

    from llmkit.gpt2 import parameter_shape
    from llmkit_llmc.library import Shape

    class Info(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p), ("hf", ctypes.c_char_p),
            *[(n, ctypes.c_int64) for n in ("offset", "layers", "rows", "cols")],
            *[(n, ctypes.c_int32) for n in ("stacked", "decayed", "transposed")],
        ]  # fmt: skip

    shape = SHAPES[1][0]
    config, start = Shape(shape.context, shape.vocab, shape.padded_vocab, shape.depth, shape.heads, shape.width), 0
    for index, parameter in enumerate(PARAMETERS):
        info = Info()
        assert library.llmc_param_info(ctypes.byref(config), index, ctypes.byref(info)) == 0
        one = parameter_shape(parameter, shape)
        assert info.name.decode() == parameter.name and "transformer." + info.hf.decode() == parameter.hf
        assert (info.rows, info.cols) == (one if len(one) == 2 else (*one, 1))
        assert (info.stacked, info.decayed, info.transposed) == (parameter.layered, len(one) == 2, parameter.transposed)
        assert info.offset == start
        start += info.layers * info.rows * info.cols
    assert library.llmc_param_info(ctypes.byref(config), len(PARAMETERS), ctypes.byref(Info())) == -1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bits_do_not_depend_on_threads_or_recomputation(library: Library, dtype: str) -> None:
    shape, B, T = SHAPES[1]
    x, y = tokens(shape, B, T)
    results = []
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 3}, {"recompute": 0}, {"recompute": 2}):
        model = made(library, shape, dtype=dtype, **options)
        for step in range(3):
            model.gradient(x, y, scale=1 / x.size, accumulate=False)
            model.gradient(y, x, scale=1 / x.size, accumulate=True)
            scale = 1.0 / max(1.0, model.grad_square() ** 0.5)
            model.update(AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1, scale, step + 1, 77 + step))
        results.append(model.get().tobytes())
        model.close()
    assert len(set(results)) == 1


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"dtype": "bf16", "master": False}])
@pytest.mark.parametrize(("shape", "B", "T"), [*SHAPES, (GPT2Config(130, 160, depth=1, heads=1, width=8), 4, 160)])
def test_a_step_without_stored_gradients(
    library: Library, shape: GPT2Config, B: int, T: int, options: dict[str, Any]
) -> None:
    """The same bits as gradient and update, also where tokens repeat and where the logits come in chunks (the last)."""
    x, y = tokens(shape, B, T)
    x[:, 1:4] = 5
    results: list[tuple[float, bytes]] = []
    squares: list[float] = []
    for threads, fused in ((1, False), (1, True), (2, True), (3, True)):
        model = made(library, shape, threads=threads, **options)
        flat = model.get()
        model.split(flat)["wte"][shape.vocab :] = 0.5  # padding that a foreign file left there: it only decays
        model.set(flat)
        for step in range(3):
            how = AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, step + 1, 77 + step)
            if fused:
                loss, square = model.step(x, y, how, scale=1 / x.size)
                assert square == pytest.approx(squares[step], rel=1e-5)
            else:
                loss = model.gradient(x, y, scale=1 / x.size, accumulate=False)
                squares.append(model.grad_square())
                model.update(how)
        results.append((loss, model.get().tobytes()))
        model.close()
    assert len(set(results)) == 1


def test_a_step_changes_nothing_when_a_token_is_wrong(library: Library) -> None:
    shape, B, T = SHAPES[0]
    model = made(library, shape)
    before = model.get()
    x, y = tokens(shape, B, T)
    y[-1, -1] = shape.vocab
    with pytest.raises(LlmcError, match="token 101 is outside the vocabulary of 101"):
        model.step(x, y, AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 1, 1), scale=1 / x.size)
    assert np.array_equal(model.get(), before)
    shared = Model(library, shape, rank=0, ranks=2)
    with pytest.raises(LlmcError, match="one of several processes cannot update"):
        shared.step(x, x, AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0, 1, 1), scale=1 / x.size)


def test_accumulation_is_the_sum(library: Library) -> None:
    shape, B, T = SHAPES[0]
    model = made(library, shape)
    (x, y), (u, v) = tokens(shape, B, T), tokens(shape, B, T, 1)
    model.gradient(x, y, scale=1.0, accumulate=False)
    first = model.gradients()
    model.gradient(u, v, scale=1.0, accumulate=False)
    second = model.gradients()
    model.gradient(x, y, scale=1.0, accumulate=True)
    assert error(model.gradients(), first + second) < 1e-6
    assert model.grad_square() == pytest.approx(float(np.sum(model.gradients().astype(np.float64) ** 2)), rel=1e-5)


def test_master_weights_keep_what_bf16_cannot(library: Library) -> None:
    shape, B, T = SHAPES[0]
    x, y = tokens(shape, B, T)
    moved = {}
    for master in (True, False):
        model = made(library, shape, dtype="bf16", master=master)
        before = model.get()
        for step in range(4):
            model.gradient(x, y, scale=1 / x.size, accumulate=False)
            model.update(AdamW(1e-5, 0.9, 0.95, 1e-8, 0.0, 1.0, step + 1, step))
        moved[master] = np.mean(model.get() != before)
    assert moved[True] > 0 and moved[False] > 0  # stochastic rounding lets small steps through on average


def test_generation_takes_the_likeliest(library: Library) -> None:
    shape = SHAPES[0][0]
    model = made(library, shape)
    ids = model.generate([3, 5], 6, temperature=0.0, top_k=0, seed=0)
    context = [3, 5]
    for token in ids:
        assert token == int(np.argmax(model.logits(context)))
        context.append(token)
    assert model.generate([3, 5], 6, temperature=1.0, top_k=1, seed=9) == ids
    assert model.generate([3], 10, temperature=1.0, top_k=5, seed=1) == model.generate(
        [3], 10, temperature=1.0, top_k=5, seed=1
    )
    assert len(model.generate([1] * 39, 50, temperature=1.0, top_k=0, seed=1)) == 1  # 40 positions


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.full((1, 4), 101), "token 101 is outside the vocabulary of 101"),
        (np.full((1, 4), -1), "token -1 is outside"),
        (np.zeros((1, 41), int), "1 x 41 tokens does not fit a model of 40 positions"),
        (np.zeros((0, 4), int), "0 x 4 tokens does not fit"),
    ],
)
def test_tokens_that_do_not_fit(library: Library, x: Any, match: str) -> None:
    model = Model(library, SHAPES[0][0])
    with pytest.raises(LlmcError, match=match) as caught:
        model.loss(x, np.zeros_like(x))
    assert caught.value.where.startswith("model")


def test_impossible_sizes(library: Library) -> None:
    from unittest.mock import Mock

    shape = Mock(context=4, vocab=5, padded_vocab=128, depth=1, heads=3, width=8)
    with pytest.raises(LlmcError, match="8 channels do not divide into 3 heads"):
        Model(library, shape)
