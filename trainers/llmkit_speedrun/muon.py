"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), for 2-D weights.

The step of a matrix is the orthogonal matrix nearest to its momentum, which a few matrix products approximate
(Newton-Schulz). All matrices of a shape are orthogonalised in one batch. torch.optim.Muon does the same one matrix at a
time and always in bf16; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

#: Jordan's: a steep slope at zero, so that five steps bring singular values from 0.01 on to about [0.7, 1.2]
JORDAN: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
#: Polar Express (Amsel et al. 2025, arXiv 2505.16932): the best polynomial for each of the steps in turn, with the
#: paper's safety factor 1.01 on all but the last
POLAR_EXPRESS: tuple[Coefficients, ...] = tuple(
    (a / s, b / s**3, c / s**5)
    for (a, b, c), s in zip(
        (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        ),
        (1.01, 1.01, 1.01, 1.01, 1.0),
    )
)
EPSILON = 1e-7
NORMUON_BETA = 0.95  # of the second moment, as in the NorMuon paper


def orthogonalise(
    matrices: Tensor, *, coefficients: Sequence[Coefficients] = JORDAN, dtype: torch.dtype | None = None
) -> Tensor:
    """The nearest orthogonal matrices U V^T of `matrices` = U S V^T, (..., rows, columns), approximately.

    One Newton-Schulz step for each of the `coefficients`, in `dtype` (None: the input's); the result has that dtype.
    """
    x = matrices.to(dtype or matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the products below are rows x rows
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPSILON)  # no singular value above 1
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. For matrices only; embeddings, heads and vectors belong to Adam.

    State of a matrix: `momentum` in its own dtype and, for NorMuon, `second_moment` (rows, 1).
    """

    whole_matrices = True  # several processes may share out its matrices, but not parts of one

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        cautious: bool = False,
        normuon: bool = False,
        coefficients: Sequence[Coefficients] = JORDAN,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`weight_decay` is decoupled and scaled by the learning rate; `cautious` decays only where the update and the
        weight have the same sign (Chen et al. 2025); `normuon` divides rows by their running size (Li et al. 2025).
        `dtype` is that of Newton-Schulz, None the gradient's. Raises ValueError for what is not a matrix.
        """
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                    "cautious": cautious, "normuon": normuon}  # fmt: skip
        super().__init__(params, defaults)
        self.coefficients, self.dtype = tuple(coefficients), dtype
        self.state_keys = ("momentum", "second_moment") if normuon else ("momentum",)  # of the state of a matrix
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"Muon is for matrices, but got a parameter of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in buckets(p for p in group["params"] if p.grad is not None):
                for p, direction in zip(bucket, self._directions(bucket, group)):
                    _update(p, direction, group)
        return loss

    def _directions(self, bucket: Sequence[Tensor], group: dict[str, Any]) -> Iterable[Tensor]:
        """The orthogonalised momenta of parameters of one shape (or its transpose), each in its parameter's shape."""
        momenta = [self._momentum(p, group) for p in bucket]
        directions = (
            self._orthogonal_of_shared(momenta) if hasattr(momenta[0], "device_mesh") else self._orthogonal(momenta)
        )
        for p, direction in zip(bucket, directions):
            yield self._normalise_rows(p, direction) if group["normuon"] else direction

    def _orthogonal(self, momenta: Sequence[Tensor]) -> list[Tensor]:
        """Orthogonal matrices of matrices of one shape (or its transpose), each in the shape and dtype of its own."""
        if not momenta:
            return []
        wide = torch.stack([_wide(u) for u in momenta])  # (N, rows, columns), rows <= columns
        orthogonal = orthogonalise(wide, coefficients=self.coefficients, dtype=self.dtype).to(momenta[0].dtype)
        return [x.T if u.shape[0] > u.shape[1] else x for u, x in zip(momenta, orthogonal)]

    def _orthogonal_of_shared(self, momenta: Sequence[Any]) -> Iterable[Tensor]:
        """The same of matrices whose rows FSDP has shared out (DTensors), as many at a time as there are processes:
        each gathers and orthogonalises one, and deals out its rows again.
        """
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = momenta[0].device_mesh, momenta[0].placements
        rank, count = mesh.get_local_rank(), mesh.size()
        for first in range(0, len(momenta), count):
            some = momenta[first : first + count]
            gathered = (u.full_tensor() for u in some)  # one after the other: only its own stays with a process
            directions = self._orthogonal([u for index, u in enumerate(gathered) if index == rank])
            for index, u in enumerate(some):
                x = directions[0] if index == rank else torch.empty(u.shape, dtype=u.dtype, device=u.device)
                yield distribute_tensor(x.contiguous(), mesh, placements, src_data_rank=index)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Take the gradient into the running mean; what is to be orthogonalised (Nesterov: one step ahead)."""
        assert p.grad is not None
        state, mu = self.state[p], group["momentum"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        mean: Tensor = state["momentum"]
        mean.lerp_(p.grad, 1 - mu)
        return p.grad.lerp(mean, mu) if group["nesterov"] else mean

    def _normalise_rows(self, p: Tensor, direction: Tensor) -> Tensor:
        """NorMuon: every row divided by its running root mean square; the size of the whole is kept."""
        state = self.state[p]
        square = direction.square().mean(dim=1, keepdim=True)  # (rows, 1)
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(square)
        second: Tensor = state["second_moment"]
        second.lerp_(square, 1 - NORMUON_BETA)
        scaled = direction / (second.sqrt() + EPSILON)
        return scaled * (direction.norm() / (scaled.norm() + EPSILON))


def buckets(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters that can be orthogonalised in one batch: those of the same shape, or transposed."""
    found: dict[tuple[int, ...], list[Tensor]] = {}
    for p in params:
        found.setdefault((min(p.shape), max(p.shape)), []).append(p)
    return list(found.values())


def _wide(x: Tensor) -> Tensor:
    return x.T if x.shape[0] > x.shape[1] else x


def _update(p: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
    """p -= lr · (sqrt(max(1, rows / columns)) · direction + weight_decay · p)."""
    lr, decay = group["lr"], group["weight_decay"]
    if decay:
        if group["cautious"]:
            p.mul_(1 - lr * decay * (direction * p > 0))
        else:
            p.mul_(1 - lr * decay)
    p.add_(direction, alpha=-lr * max(1, p.shape[0] / p.shape[1]) ** 0.5)
