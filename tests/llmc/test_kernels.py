"""Every layer, in float and bf16, in every build, against PyTorch in float64 and against the plain reference in C."""

# mypy: disable-error-code="no-untyped-call,union-attr,operator"
# (PyTorch calls `backward` untyped and `grad` optional.)

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import TOLERANCE, empty_like, error, normal, to_bf16, values_of
from torch.nn import functional as F

from llmkit_llmc.kernels import Kernels, matrix

sizes = settings(max_examples=8, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
both = pytest.mark.parametrize("dtype", ["f32", "bf16"])


def rounded(dtype: str, got: Any) -> Any:
    return values_of(got) if dtype == "bf16" else got


@both
@sizes
@given(
    m=st.integers(1, 90), n=st.integers(1, 90), k=st.integers(1, 120), form=st.integers(0, 7), seed=st.integers(0, 99)
)
def test_matrix_product(kernels: Kernels, dtype: str, m: int, n: int, k: int, form: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a_t, b_t, c_t = bool(form & 1), bool(form & 2), bool(form & 4)
    a = normal(rng, k, m, dtype=dtype) if a_t else normal(rng, m, k, dtype=dtype)
    b = normal(rng, n, k, dtype=dtype) if b_t else normal(rng, k, n, dtype=dtype)
    c = empty_like(*((n, m) if c_t else (m, n)), dtype=dtype)
    kernels.gemm(m, n, k, matrix(a, transposed=a_t), matrix(b, transposed=b_t), matrix(c, transposed=c_t))
    x, y = values_of(a), values_of(b)
    expected = (x.T if a_t else x) @ (y.T if b_t else y)
    assert error(rounded(dtype, c), expected.T if c_t else expected) < TOLERANCE[dtype]
    if dtype == "f32" and not form:
        plain = np.empty((m, n), np.float32)
        kernels.call("reference_matmul", plain, a, b, m, n, k)
        assert error(plain, expected) < 1e-5


@both
@pytest.mark.parametrize(("m", "n", "k"), [(29, 1100, 40), (300, 70, 900), (14, 32, 385), (1, 1, 2000)])
def test_matrix_product_beyond_one_block(kernels: Kernels, dtype: str, m: int, n: int, k: int) -> None:
    rng = np.random.default_rng(m)
    a, b, bias = normal(rng, m, k, dtype=dtype), normal(rng, n, k, dtype=dtype), normal(rng, m, dtype=dtype)
    residual = normal(rng, n, m, dtype=dtype)
    c = empty_like(n, m, dtype=dtype)
    more = {"bias": bias.ctypes.data, "residual": residual.ctypes.data}
    kernels.gemm(m, n, k, matrix(a), matrix(b, transposed=True), matrix(c, transposed=True), **more)
    expected = values_of(b) @ values_of(a).T + values_of(bias) + values_of(residual)
    assert error(rounded(dtype, c), expected) < TOLERANCE[dtype]
    total = normal(rng, m, n)
    before = total.copy()
    kernels.gemm(m, n, k, matrix(a), matrix(b, transposed=True), matrix(total), accumulate=1)
    assert error(total, before + (values_of(a) @ values_of(b).T).numpy()) < TOLERANCE[dtype]


@both
@sizes
@given(B=st.integers(1, 3), T=st.integers(1, 9), C=st.integers(1, 70), V=st.integers(1, 30), seed=st.integers(0, 99))
def test_encoder(kernels: Kernels, dtype: str, B: int, T: int, C: int, V: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, B * T).astype(np.int32)
    wte, wpe, dout = normal(rng, V, C, dtype=dtype), normal(rng, T, C, dtype=dtype), normal(rng, B * T, C, dtype=dtype)
    out = empty_like(B * T, C, dtype=dtype)
    kernels.call("encoder_forward", out, tokens, wte, wpe, B * T, T, 0, C, suffix=f"_{dtype}")
    places = torch.arange(B * T) % T
    assert error(rounded(dtype, out), values_of(wte)[tokens] + values_of(wpe)[places]) < TOLERANCE[dtype]
    dwte, dwpe = np.zeros((V, C), np.float32), np.zeros((T, C), np.float32)
    kernels.call("encoder_backward", dwte, dwpe, dout, tokens, B * T, T, C, suffix=f"_{dtype}")
    expected = torch.zeros(V, C, dtype=torch.float64).index_add_(0, torch.from_numpy(tokens).long(), values_of(dout))
    assert error(dwte, expected) < 1e-5
    assert error(dwpe, torch.zeros(T, C, dtype=torch.float64).index_add_(0, places, values_of(dout))) < 1e-5


@both
@sizes
@given(N=st.integers(1, 12), C=st.integers(8, 100), accumulate=st.booleans(), seed=st.integers(0, 99))
def test_layernorm(kernels: Kernels, dtype: str, N: int, C: int, accumulate: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dout = normal(rng, N, C, dtype=dtype), normal(rng, N, C, dtype=dtype)
    weight, bias = normal(rng, C, dtype=dtype), normal(rng, C, dtype=dtype)
    out, mean, rstd = empty_like(N, C, dtype=dtype), np.empty(N, np.float32), np.empty(N, np.float32)
    kernels.call("layernorm_forward", out, mean, rstd, x, weight, bias, N, C, suffix=f"_{dtype}")
    tx, tw, tb = (values_of(a).requires_grad_() for a in (x, weight, bias))
    expected = F.layer_norm(tx, (C,), tw, tb, eps=1e-5)
    assert error(rounded(dtype, out), expected.detach()) < TOLERANCE[dtype]
    expected.backward(values_of(dout))
    dx, dw, db = normal(rng, N, C, dtype=dtype), normal(rng, C), normal(rng, C)
    before = [values_of(a) for a in (dx, dw, db)]
    kernels.call("layernorm_backward", dx, dw, db, dout, x, weight, mean, rstd, N, C, accumulate, suffix=f"_{dtype}")
    assert error(rounded(dtype, dx), before[0] + tx.grad) < TOLERANCE[dtype]
    assert error(dw, before[1] * accumulate + tw.grad) < 1e-5 * 10
    assert error(db, before[2] * accumulate + tb.grad) < 1e-5
    if dtype == "f32":
        plain, plain_dx = np.empty_like(out), np.empty_like(out)
        kernels.call("reference_layernorm_forward", plain, mean, rstd, x, weight, bias, N, C)
        assert error(plain, expected.detach()) < 1e-5
        kernels.call("reference_layernorm_backward", plain_dx, dw, db, dout, x, weight, mean, rstd, N, C)
        assert error(plain_dx, tx.grad) < 1e-4


@both
@sizes
@given(n=st.integers(1, 300), scale=st.sampled_from([0.1, 1.0, 8.0]), seed=st.integers(0, 99))
def test_gelu(kernels: Kernels, dtype: str, n: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, dout = normal(rng, n, dtype=dtype, scale=scale), normal(rng, n, dtype=dtype)
    out, dx = empty_like(n, dtype=dtype), empty_like(n, dtype=dtype)
    kernels.call("gelu_forward", out, x, n, suffix=f"_{dtype}")
    kernels.call("gelu_backward", dx, dout, x, n, suffix=f"_{dtype}")
    tx = values_of(x).requires_grad_()
    expected = F.gelu(tx, approximate="tanh")
    expected.backward(values_of(dout))
    assert error(rounded(dtype, out), expected.detach()) < TOLERANCE[dtype]
    assert error(rounded(dtype, dx), tx.grad) < TOLERANCE[dtype]
    if dtype == "f32":
        kernels.call("reference_gelu_forward", out, x, n)
        kernels.call("reference_gelu_backward", dx, dout, x, n)
        assert error(out, expected.detach()) < 1e-5 and error(dx, tx.grad) < 1e-5


@both
@sizes
@given(
    N=st.integers(1, 70), C=st.integers(1, 50), OC=st.integers(1, 60), accumulate=st.booleans(), seed=st.integers(0, 99)
)
def test_linear(kernels: Kernels, dtype: str, N: int, C: int, OC: int, accumulate: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w, bias, dy = (normal(rng, *s, dtype=dtype) for s in ((N, C), (OC, C), (OC,), (N, OC)))
    y, dx = empty_like(N, OC, dtype=dtype), empty_like(N, C, dtype=dtype)
    kernels.call("linear_forward", y, x, w, bias, None, N, C, OC, suffix=f"_{dtype}", fails=True, scratch=True)
    tx, tw, tb = (values_of(a).requires_grad_() for a in (x, w, bias))
    expected = F.linear(tx, tw, tb)
    assert error(rounded(dtype, y), expected.detach()) < TOLERANCE[dtype]
    expected.backward(values_of(dy))
    dw, db = normal(rng, OC, C), normal(rng, OC)
    before = dw.copy(), db.copy()
    kernels.call(
        "linear_backward",
        dx,
        dw,
        db,
        dy,
        x,
        w,
        N,
        C,
        OC,
        accumulate,
        None,
        suffix=f"_{dtype}",
        fails=True,
        scratch=True,
    )
    assert error(rounded(dtype, dx), tx.grad) < TOLERANCE[dtype]
    assert error(dw, before[0] * accumulate + tw.grad.numpy()) < TOLERANCE[dtype]
    assert error(db, before[1] * accumulate + tb.grad.numpy()) < 1e-5
    if dtype == "f32":
        kernels.call("reference_linear_forward", y, x, w, bias, N, C, OC)
        kernels.call("reference_linear_backward", dx, dw, db, dy, x, w, N, C, OC)
        assert error(y, expected.detach()) < 1e-5 and error(dx, tx.grad) < 1e-5 and error(dw, tw.grad) < 1e-5


@both
@sizes
@given(B=st.integers(1, 2), T=st.integers(1, 150), NH=st.integers(1, 3), hs=st.integers(1, 70), seed=st.integers(0, 99))
def test_attention(kernels: Kernels, dtype: str, B: int, T: int, NH: int, hs: int, seed: int) -> None:
    rng, C = np.random.default_rng(seed), NH * hs
    qkv, dout = normal(rng, B * T, 3 * C, dtype=dtype), normal(rng, B * T, C, dtype=dtype)
    out, lse, dqkv = (
        empty_like(B * T, C, dtype=dtype),
        np.empty((B, NH, T), np.float32),
        empty_like(B * T, 3 * C, dtype=dtype),
    )
    kernels.call("attention_forward", out, lse, qkv, B, T, C, NH, suffix=f"_{dtype}", fails=True, scratch=True)
    tx = values_of(qkv).requires_grad_()
    q, k, v = tx.view(B, T, 3, NH, hs).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B * T, C)
    assert error(rounded(dtype, out), expected.detach()) < TOLERANCE[dtype]
    kernels.call(
        "attention_backward", dqkv, dout, qkv, out, lse, B, T, C, NH, suffix=f"_{dtype}", fails=True, scratch=True
    )
    expected.backward(values_of(dout))
    assert error(rounded(dtype, dqkv), tx.grad) < TOLERANCE[dtype] * (1 if dtype == "f32" else 1.5)
    if dtype == "f32":
        att = np.empty((B, NH, T, T), np.float32)
        kernels.call("reference_attention_forward", out, att, qkv, B, T, C, NH)
        kernels.call("reference_attention_backward", dqkv, dout, qkv, att, B, T, C, NH)
        assert error(out, expected.detach()) < 1e-5 and error(dqkv, tx.grad) < 1e-5


@both
@sizes
@given(
    N=st.integers(1, 20), C=st.integers(1, 40), V=st.integers(2, 150), chunk=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_classifier(kernels: Kernels, dtype: str, N: int, C: int, V: int, chunk: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = normal(rng, N, C, dtype=dtype), normal(rng, V, C, dtype=dtype)
    targets = rng.integers(0, V, N).astype(np.int32)
    losses, dx, dw = np.empty(N, np.float32), empty_like(N, C, dtype=dtype), np.full((V, C), np.nan, np.float32)
    scratch = np.empty(chunk * ((V + 15) // 16 * 16 + C), np.float32)
    sizes_ = (N, C, V, False, None, scratch, chunk)
    kernels.call(
        "classifier", losses, dx, dw, x, w, targets, 0.25, *sizes_, suffix=f"_{dtype}", fails=True, scratch=True
    )
    tx, tw = values_of(x).requires_grad_(), values_of(w).requires_grad_()
    expected = F.cross_entropy(tx @ tw.T, torch.from_numpy(targets).long(), reduction="none")
    (0.25 * expected.sum()).backward()
    assert error(losses, expected.detach()) < 1e-5
    assert error(rounded(dtype, dx), tx.grad) < TOLERANCE[dtype]
    assert error(dw, tw.grad) < TOLERANCE[dtype]
    only = np.empty(N, np.float32)
    kernels.call(
        "classifier", only, None, None, x, w, targets, 0.0, *sizes_, suffix=f"_{dtype}", fails=True, scratch=True
    )
    assert np.array_equal(only, losses)
    if dtype == "f32":
        logits = np.empty((N, V), np.float32)
        kernels.call("reference_classifier", losses, dx, dw, logits, x, w, targets, 0.25, N, C, V)
        assert error(losses, expected.detach()) < 1e-5 and error(dx, tx.grad) < 1e-5 and error(dw, tw.grad) < 1e-5


def test_exponential_is_as_exact_as_it_says(kernels: Kernels) -> None:
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    out = np.empty_like(x)
    kernels.call("probe_exp", out, x, len(x))
    assert np.max(np.abs(out / np.exp(x.astype(np.float64)) - 1)) < 3e-7
    kernels.call("probe_sigmoid", out, x, len(x))
    assert np.max(np.abs(out - 1 / (1 + np.exp(-x.astype(np.float64))))) < 3e-7
    x = np.array([-np.inf, -1e30, 1e30, np.inf], np.float32)
    kernels.call("probe_exp", out, x, 4)
    assert np.all(np.isfinite(out[:4])) and np.all(out[:2] < 2e-38) and np.all(out[2:4] > 1e38)


def test_bf16_rounding_is_pytorchs(kernels: Kernels) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 100_003, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x[:4] = np.inf, -np.inf, np.float32(1.00390625), np.float32(1.01171875)  # the last two are ties
    out = np.empty(len(x), np.uint16)
    kernels.call("probe_round_bf16", out, x, len(x))
    nan = np.isnan(x)
    assert np.array_equal(out[~nan], to_bf16(x)[~nan])
    assert np.all((out[nan] & 0x7F80) == 0x7F80) and np.all(out[nan] & 0x7F)


def test_stochastic_rounding_is_unbiased_and_repeats(kernels: Kernels) -> None:
    value = np.float32(1.0 + 0.3 * 2**-7)  # three tenths of the way from one bf16 to the next
    x = np.full(100_000, value, np.float32)
    out, again = np.empty(len(x), np.uint16), np.empty(len(x), np.uint16)
    kernels.call("probe_stochastic_bf16", out, x, len(x), ctypes.c_uint32(7))
    kernels.call("probe_stochastic_bf16", again, x, len(x), ctypes.c_uint32(7))
    assert np.array_equal(out, again)
    kernels.call("probe_stochastic_bf16", again, x, len(x), ctypes.c_uint32(8))
    assert not np.array_equal(out, again)
    assert set(np.unique(out)) == {0x3F80, 0x3F81}
    assert abs(np.mean(out == 0x3F81) - 0.3) < 0.01
    x[:2] = np.inf, 3.0  # neither infinities nor exact values may move
    kernels.call("probe_stochastic_bf16", out, x, 2, ctypes.c_uint32(7))
    assert list(out[:2]) == [0x7F80, 0x4040]
