"""Update: from gradients to new weights, in one process or with the work and the optimisers' state shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from llmkit_torch.processes import Processes

COUNTER = "step"  # Adam's count of its steps, the one state that is no part of a tensor


class Update:
    """The update in one process, or of a model that FSDP has shared out: there every tensor knows its parts."""

    def __init__(self, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        self.model, self.optimisers = model, optimisers

    def step(self, grad_clip: float) -> Tensor:
        """Clip the gradients' norm (0 does not), update the weights, drop the gradients; the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), grad_clip or float("inf"))
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return whole(norm)

    def state(self) -> dict[str, Tensor]:
        """The optimisers' state by PARAMETER/KEY on the CPU, independent of the number of processes.

        All processes must ask; process 0 gets it.
        """
        return {
            f"{name}/{key}": whole(value).cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            for key, value in _optimiser_of(self.optimisers, parameter).state[parameter].items()
        }

    def load(self, path: Path) -> None:
        """Take the state from a safetensors file. Raises KeyError, ValueError or SafetensorError if it is damaged."""
        with safe_open(path, framework="pt") as file:
            for name, parameter in self.model.named_parameters():
                optimiser = _optimiser_of(self.optimisers, parameter)
                optimiser.state[parameter] = {
                    key: _like(_stored(file, f"{name}/{key}", parameter), parameter) for key in state_keys(optimiser)
                }


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows `first` to `end` of a parameter, which process `rank` updates; `at`: where in its part of the buffer."""

    name: str
    parameter: Tensor
    rank: int
    at: int
    first: int
    end: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of the parameter, or of its gradient: a view."""
        return tensor.detach()[self.first : self.end]

    @property
    def place(self) -> slice:
        return slice(self.at, self.at + self.of(self.parameter).numel())


class ShardedUpdate(Update):
    """ZeRO stage 1 (Rajbhandari et al. 2019): every process holds all weights, and the optimiser's state of a part.

    A step takes one reduce-scatter of the gradients and one all-gather of the weights, both of one flat buffer with a
    part for each process. Adam works element by element, so each process takes its share of the rows of every
    tensor; Muon needs whole matrices, so these are dealt out, most expensive first.
    """

    def __init__(self, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], processes: Processes) -> None:
        super().__init__(model, optimisers)
        self.processes = processes
        self.pieces, self.size = _deal_out(model, optimisers, processes.count)
        self.own = {piece: nn.Parameter(piece.of(piece.parameter)) for piece in self.pieces if self._is_own(piece)}
        of_parameter: dict[int, list[Tensor]] = {}
        for piece, own in self.own.items():
            of_parameter.setdefault(id(piece.parameter), []).append(own)
        self.optimiser_of = {piece: _optimiser_of(optimisers, piece.parameter) for piece in self.own}
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["params"] = [own for p in group["params"] for own in of_parameter.get(id(p), [])]
        self._gather_weights()  # so that all begin with the same bits, whatever machine made them

    def _is_own(self, piece: Piece) -> bool:
        return piece.rank == self.processes.rank

    @torch.no_grad()
    def step(self, grad_clip: float) -> Tensor:
        mean = self._mean_gradient()
        norm = self.processes.sum(mean.square().sum()).sqrt()
        if grad_clip:
            mean *= (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        for piece, own in self.own.items():
            own.grad = None if piece.parameter.grad is None else mean[piece.place].view_as(own)
        self.model.zero_grad(set_to_none=True)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._gather_weights()
        return norm

    def _mean_gradient(self) -> Tensor:
        """This process's part of the gradient, averaged over all processes: (size,)."""
        rows = self.pieces[0].parameter.new_zeros(self.processes.count, self.size)
        for piece in self.pieces:
            if piece.parameter.grad is not None:
                rows[piece.rank, piece.place] = piece.of(piece.parameter.grad).flatten()
        return self.processes.reduce_scatter(rows) / self.processes.count

    @torch.no_grad()
    def _gather_weights(self) -> None:
        """Every process receives what the others have updated."""
        row = self.pieces[0].parameter.new_zeros(self.size)
        for piece, own in self.own.items():
            row[piece.place] = own.flatten()
        rows = self.processes.all_gather(row)
        for piece in self.pieces:
            if not self._is_own(piece):
                target = piece.of(piece.parameter)
                target.copy_(rows[piece.rank, piece.place].view_as(target))

    def state(self) -> dict[str, Tensor]:
        own = {
            f"{piece.first}/{piece.name}/{key}": value.cpu().contiguous()
            for piece, part in self.own.items()
            for key, value in self.optimiser_of[piece].state[part].items()
        }
        found: dict[str, dict[int, Tensor]] = {}
        for data in self.processes.gather_bytes(save(own)):
            for key, value in load(data).items():
                first, name = key.split("/", 1)
                found.setdefault(name, {})[int(first)] = value
        return {name: _join([parts[first] for first in sorted(parts)]) for name, parts in found.items()}

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for piece, own in self.own.items():
                optimiser = self.optimiser_of[piece]
                optimiser.state[own] = {
                    key: _stored(file, f"{piece.name}/{key}", piece.parameter, piece.first, piece.end).to(own.device)
                    for key in state_keys(optimiser)
                }


def _deal_out(model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], count: int) -> tuple[list[Piece], int]:
    """Who updates what, and the elements of the largest part."""
    at, cost = [0] * count, [0] * count
    pieces = []

    def give(name: str, p: Tensor, rank: int, first: int, end: int) -> None:
        pieces.append(Piece(name, p, rank, at[rank], first, end))
        at[rank] += p[first:end].numel()

    matrices: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        (matrices if getattr(_optimiser_of(optimisers, p), "whole_matrices", False) else others).append((name, p))
    for name, p in sorted(matrices, key=lambda item: -item[1].numel() * min(item[1].shape)):
        rank = cost.index(min(cost))
        cost[rank] += p.numel() * min(p.shape)  # operations of Newton-Schulz, up to a factor
        give(name, p, rank, 0, p.shape[0])
    for name, p in others:
        bounds = [p.shape[0] * rank // count for rank in range(count + 1)]
        for rank, (first, end) in enumerate(pairwise(bounds)):
            if first < end:
                give(name, p, rank, first, end)
    return pieces, max(at)


def state_keys(optimiser: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of the tensors that an optimiser keeps for each parameter."""
    own: tuple[str, ...] | None = getattr(optimiser, "state_keys", None)
    return own or (COUNTER, "exp_avg", "exp_avg_sq")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that FSDP has shared out, all of it, for which all processes must ask."""
    gather = getattr(tensor, "full_tensor", None)  # of a DTensor, whose module takes half a second to import
    complete: Tensor = tensor if gather is None else gather()
    return complete.detach()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """The value on the parameter's device, shared out like the parameter."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is None or not value.dim():
        return value.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def _stored(file: Any, name: str, parameter: Tensor, first: int = 0, end: int | None = None) -> Tensor:
    """Rows of a stored tensor, or a counter. Raises ValueError where it does not belong to the parameter."""
    if name.endswith("/" + COUNTER):
        counter: Tensor = file.get_tensor(name)
        return counter
    stored = file.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape not in (tuple(parameter.shape), (*parameter.shape[:1], 1)):  # NorMuon keeps one number for a row
        raise ValueError(f"{name} has another shape")
    rows: Tensor = stored[first:end]
    return rows


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts[0].dim() else parts[0]


def _optimiser_of(optimisers: Sequence[torch.optim.Optimizer], parameter: Tensor) -> torch.optim.Optimizer:
    for optimiser in optimisers:
        if any(parameter is p for group in optimiser.param_groups for p in group["params"]):
            return optimiser
    raise AssertionError("a parameter that no optimiser holds")
