"""Muon: Newton-Schulz against a singular value decomposition, the optimiser against torch.optim.Muon and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llmkit_speedrun.muon import JORDAN, POLAR_EXPRESS, Muon, buckets, orthogonalise  # noqa: E402

COEFFICIENTS = {"jordan": JORDAN, "polar express": POLAR_EXPRESS}


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: Any, rows: int, columns: int) -> Any:
    """A random matrix with these singular values."""
    u, _, vt = torch.linalg.svd(random(rows, columns), full_matrices=False)
    return u @ torch.diag(values) @ vt


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@given(rows=st.integers(1, 48), columns=st.integers(1, 48), scale=st.floats(1e-3, 1e6), seed=st.integers(0, 99))
def test_singular_values_come_near_to_one(coefficients: Any, rows: int, columns: int, scale: float, seed: int) -> None:
    x = scale * random(rows, columns, seed=seed)
    before = torch.linalg.svdvals(x)
    after = torch.linalg.svdvals(orthogonalise(x, coefficients=coefficients))
    if before.min() > 0.01 * x.norm():  # smaller ones are on their way only
        assert after.min() > 0.6
    assert after.max() < 1.3


@pytest.mark.parametrize("coefficients", COEFFICIENTS.values(), ids=COEFFICIENTS)
@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_the_result_is_near_the_orthogonal_factor(coefficients: Any, shape: tuple[int, int]) -> None:
    x = with_singular_values(torch.linspace(0.3, 1, min(shape)), *shape)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    result, exact = orthogonalise(x, coefficients=coefficients), u @ vt
    assert (result * exact).sum() / (result.norm() * exact.norm()) > 0.98
    # It changes the singular values only: u^T result v is diagonal.
    inner = u.T @ result @ vt.T
    assert (inner - torch.diag(inner.diag())).abs().max() < 1e-3


def test_polar_express_is_nearer_than_five_equal_steps() -> None:
    x = with_singular_values(torch.logspace(-2, 0, 64), 64, 64)
    errors = [(torch.linalg.svdvals(orthogonalise(x, coefficients=c)) - 1).abs().max() for c in (POLAR_EXPRESS, JORDAN)]
    assert errors[0] < 0.6 * errors[1]


def test_a_batch_is_its_matrices() -> None:
    x = random(3, 20, 12)
    together = orthogonalise(x)
    for matrix, result in zip(x, together):
        torch.testing.assert_close(orthogonalise(matrix), result)


def test_zeros_stay_zeros() -> None:
    assert orthogonalise(torch.zeros(4, 7)).abs().max() == 0


def test_the_dtype_is_that_of_newton_schulz() -> None:
    x = random(16, 16)
    assert orthogonalise(x, dtype=torch.bfloat16).dtype == torch.bfloat16
    singular = torch.linalg.svdvals(orthogonalise(x, dtype=torch.bfloat16).float())
    assert singular[:-1].min() > 0.5 and singular.max() < 1.3


def parameters(*shapes: tuple[int, int]) -> list[Any]:
    return [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]


SHAPES = ((16, 16), (16, 48), (48, 16), (16, 16), (8, 24))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_steps_as_torch_optim_muon_does(weight_decay: float, nesterov: bool) -> None:
    """Both in bf16, which torch's always is; the only difference is the order of rounding in batches."""
    settings: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    optimisers: list[Any] = [Muon(ours, dtype=torch.bfloat16, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(5):
        for params, optimiser in zip((ours, theirs), optimisers):
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=100 * step + i)
            optimiser.step()
    for p, q, start in zip(ours, theirs, parameters(*SHAPES)):
        moved, theirs_moved = p - start, q - start
        assert (moved - theirs_moved).norm() < 0.02 * theirs_moved.norm()


def test_a_step_is_the_formula() -> None:
    """m = mu m + (1 - mu) g; p -= lr sqrt(max(1, rows / columns)) NS((1 - mu) g + mu m), worked out in NumPy."""
    for shape in SHAPES:
        (p,) = parameters(shape)
        expected, mean = p.detach().numpy().astype(np.float64), np.zeros(shape)
        optimiser = Muon([p], lr=0.1, momentum=0.8)
        for step in range(3):
            gradient = random(*shape, seed=step)
            p.grad = gradient
            optimiser.step()
            g = gradient.numpy().astype(np.float64)
            mean = 0.8 * mean + 0.2 * g
            x = 0.2 * g + 0.8 * mean
            x = x / np.linalg.norm(x)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            expected = expected - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * x
        np.testing.assert_allclose(p.detach().numpy(), expected, atol=2e-5)


def test_normuon_evens_out_the_rows_and_keeps_the_size() -> None:
    """After many steps with the same gradient the rows of the update are equally large."""
    gradient = random(12, 40) * torch.linspace(0.1, 3, 12)[:, None]
    moved = []
    for normuon in (False, True):
        (p,) = parameters((12, 40))
        optimiser = Muon([p], lr=0.1, normuon=normuon)
        for _ in range(200):
            before = p.detach().clone()
            p.grad = gradient.clone()
            optimiser.step()
        moved.append(p.detach() - before)
    rows = [update.norm(dim=1) for update in moved]
    assert rows[1].std() < 0.2 * rows[0].std()
    torch.testing.assert_close(moved[0].norm(), moved[1].norm(), rtol=1e-3, atol=0)


def test_cautious_decay_touches_only_weights_that_the_update_shrinks() -> None:
    plain, cautious = parameters((16, 16)), parameters((16, 16))
    none = parameters((16, 16))
    gradient = random(16, 16, seed=7)
    settings: list[dict[str, Any]] = [
        {"weight_decay": 0.5},
        {"weight_decay": 0.5, "cautious": True},
        {"weight_decay": 0.0},
    ]
    for (p,), options in zip((plain, cautious, none), settings):
        p.grad = gradient.clone()
        Muon([p], lr=0.1, **options).step()
    start = parameters((16, 16))[0]
    shrinks = (start - none[0]) * start > 0  # the step goes against the weight's sign
    assert torch.equal(cautious[0][shrinks], plain[0][shrinks])
    assert torch.equal(cautious[0][~shrinks], none[0][~shrinks])


def test_shapes_and_their_transposes_go_together() -> None:
    params = parameters(*SHAPES)
    assert sorted(len(bucket) for bucket in buckets(params)) == [1, 2, 2]


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters((8, 8), (8, 8))
    params[0].grad = random(8, 8)
    before = params[1].detach().clone()
    Muon(params, lr=0.1).step()
    assert torch.equal(params[1], before)


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(4))])
