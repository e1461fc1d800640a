"""Blocks: which blocks of the key-value cache are in use, by whom, and what they hold.

A full block is known by a key: what the block before it is known as, and its own tokens. So equal keys mean an equal
prefix. Blocks that nobody uses keep their content until their memory is wanted, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from llmkit_engine.library import KV_BLOCK

Key = tuple[int, tuple[int, ...]]
ROOT = -1  # what the first block of every sequence comes after


class Blocks:
    """A fixed number of blocks, counted by user.

    A cached block's `serial` never repeats, so a block whose predecessor is gone can no longer be found by accident.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._serial = [ROOT] * count  # of cached blocks
        self._keys: list[Key | None] = [None] * count
        self._cached: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached and unused, longest unused first
        self._next_serial = 0

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.available

    def take(self) -> int | None:
        """A block for one user, its content undefined; None when all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more user of a block in use."""
        assert self._users[block] > 0
        self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user fewer. The later blocks of a sequence become idle first, so that prefixes live longest."""
        for block in reversed(blocks):
            assert self._users[block] > 0
            self._users[block] -= 1
            if self._users[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The cached blocks of the longest known prefix of whole blocks, each with one more user."""
        found: list[int] = []
        serial = ROOT
        for start in range(0, len(tokens) - KV_BLOCK + 1, KV_BLOCK):
            block = self._cached.get((serial, tuple(tokens[start : start + KV_BLOCK])))
            if block is None:
                break
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1
            found.append(block)
            serial = self._serial[block]
        return found

    def publish(self, block: int, after: int, tokens: Sequence[int]) -> int:
        """Make a full block findable; `after` is the serial before it. The serial that stands for its content.

        Where an equal block is known already, that one stays the findable one.
        """
        key = (after, tuple(tokens))
        known = self._cached.get(key)
        if known is not None:
            return self._serial[known]
        self._cached[key] = block
        self._keys[block] = key
        self._serial[block] = self._next_serial
        self._next_serial += 1
        return self._serial[block]

    def serial(self, block: int) -> int:
        """The serial of a cached block."""
        return self._serial[block]

    def clear(self) -> None:
        """Forget what idle blocks hold."""
        while self._idle:
            block, _ = self._idle.popitem()
            self._forget(block)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._cached[key]
        self._keys[block], self._serial[block] = None, ROOT
