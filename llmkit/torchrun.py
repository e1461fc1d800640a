"""Torchrun: what it tells each process that it starts, through the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Torchrun:
    """The place of this process among those that torchrun, or a scheduler that sets the same variables, started.

    Attributes:
        rank, world: which process of how many, over all machines.
        local_rank, local_world: the same on this machine.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Torchrun | None:
        """None unless this is one of several processes. Raises ValueError where a variable is no number."""
        if not all(environment.get(name) for name in VARIABLES):
            return None
        try:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_rank = int(environment.get("LOCAL_RANK", rank))
            local_world = int(environment.get("LOCAL_WORLD_SIZE", world))
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and the like in the environment are not torchrun's: {error}") from None
        return cls(rank, world, local_rank, local_world) if world > 1 else None
