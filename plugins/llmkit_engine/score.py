"""Scorer: log-likelihoods of many continuations, each shared token computed once.

What the requests feed is merged into a trie. Its nodes, runs of tokens without a branch, are computed depth first,
several in a step under its budget of tokens; a child goes on from its parent's cache blocks, with a copy of the one
that it shares in part. Where blocks run out, nodes give theirs back and are computed again from the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmkit.engine import ScoreRequest, ScoreResult
from llmkit_engine.cache import ROOT
from llmkit_engine.library import KV_BLOCK
from llmkit_engine.runner import Run
from llmkit_engine.scheduler import Scheduler

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Answer:
    """A request's result in the making."""

    request: ScoreRequest
    logprobs: list[float]
    greedy: list[bool]
    missing: int


@dataclass(slots=True, eq=False)
class Node:
    """Tokens [start, end) of `path`, which begins at the root. `wanted`: position -> who asks for which token."""

    path: Tokens
    start: int
    end: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    wanted: dict[int, list[tuple[Answer, int, int]]] = field(default_factory=dict)
    computed: int = 0  # tokens of the path in `blocks`
    blocks: list[int] | None = None  # None: not begun, or given back
    serials: list[int] = field(default_factory=list)
    waiting: int = 0  # children that have not begun


def build_trie(requests: Sequence[ScoreRequest]) -> list[Node]:
    """The roots of the requests' trie, in the order of their tokens."""
    asking: dict[Tokens, list[ScoreRequest]] = {}
    for request in requests:
        asking.setdefault(request.context + request.continuation[:-1], []).append(request)
    roots: list[Node] = []
    branch: list[Node] = []  # from the root to the node of the sequence before
    before: Tokens = ()
    for fed in sorted(asking):
        shared = _common(before, fed)
        while branch and branch[-1].start >= shared:
            branch.pop()
        if branch and branch[-1].end > shared:
            branch[-1] = _split(branch[-1], shared, roots)
        parent = branch[-1] if branch else None
        if parent is None or parent.end < len(fed):
            node = Node(fed, parent.end if parent else 0, len(fed), parent)
            (parent.children if parent else roots).append(node)
            branch.append(node)
        for request in asking[fed]:
            _want(branch, request)
        before = fed
    return roots


def _split(node: Node, at: int, roots: list[Node]) -> Node:
    """Cut a node in two at a position inside it; the front part, which takes its place."""
    front = Node(node.path, node.start, at, node.parent, [node])
    siblings = node.parent.children if node.parent else roots
    siblings[siblings.index(node)] = front
    node.start, node.parent = at, front
    front.wanted = {position: who for position, who in node.wanted.items() if position < at}
    node.wanted = {position: who for position, who in node.wanted.items() if position >= at}
    return front


def _want(branch: Sequence[Node], request: ScoreRequest) -> None:
    """Note, in the nodes of a branch, which logits a request needs."""
    count, first = len(request.continuation), len(request.context) - 1
    answer = Answer(request, [0.0] * count, [False] * count, count)
    for node in branch:
        for position in range(max(node.start, first), min(node.end, first + count)):
            index = position - first
            node.wanted.setdefault(position, []).append((answer, index, request.continuation[index]))


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the common prefix, by bisection: comparing slices is far faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Scorer:
    """Computes one trie. To be used under the engine's lock, one `step` at a time."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[ScoreRequest]) -> None:
        self._scheduler = scheduler
        self._runner, self._blocks = scheduler.runner, scheduler.blocks
        self._ready = build_trie(requests)[::-1]  # a stack
        self._active: list[Node] = []
        self._parents: set[Node] = set()  # done, but with children that have not begun

    @property
    def done(self) -> bool:
        return not self._ready and not self._active

    def step(self) -> list[ScoreResult]:
        """Run one step; the results that it completed."""
        plan = self._plan()
        if not plan:
            # Others hold the blocks, or too many nodes share them: let one node have all there are.
            self._scheduler.preempt_all()
            self.give_back()
            plan = self._plan()
            assert plan, "the cache cannot hold one request"
        runs = []
        for node, count in plan:
            assert node.blocks is not None
            span = range(node.computed, node.computed + count)
            wanted = [i for i, position in enumerate(span) if position in node.wanted]
            runs.append(Run(node.path[node.computed : node.computed + count], node.computed, node.blocks, wanted))
        logits = self._runner.forward(runs)
        results: list[ScoreResult] = []
        if len(logits):
            lse, argmax = self._runner.statistics(logits)
            row = 0
            for run, (node, _) in zip(runs, plan):
                for at in run.wanted:
                    for answer, index, token in node.wanted.pop(run.first + at):
                        answer.logprobs[index] = float(logits[row, token] - lse[row])
                        answer.greedy[index] = int(argmax[row]) == token
                        answer.missing -= 1
                        if answer.missing == 0:
                            results.append(ScoreResult(answer.request.id, tuple(answer.logprobs), tuple(answer.greedy)))
                    row += 1
        for node, count in plan:
            node.computed += count
            self._scheduler.computed_tokens += count
            self._publish(node)
            if node.computed == node.end:
                self._complete(node)
        return results

    def give_back(self) -> None:
        """Release every block; what is unfinished begins again from the root when it runs next."""
        for node in (*self._active, *self._parents):
            self._release(node)
        self._parents.clear()
        self._ready += self._active[::-1]
        self._active.clear()

    # --- planning

    def _plan(self) -> list[tuple[Node, int]]:
        """Which nodes run how many tokens in this step; they have the blocks for it."""
        tokens, rows = self._runner.max_tokens, self._runner.max_rows
        plan: list[tuple[Node, int]] = []
        candidates = list(self._active)
        blocked = False  # a node lacks a block, so no further one may begin
        while tokens and rows:
            if candidates:
                node = candidates.pop(0)
            elif not blocked and self._ready and self._begin(self._ready[-1]):
                node = self._ready.pop()
                self._active.append(node)
            else:
                break
            count = self._fitting(node, min(node.end - node.computed, tokens), rows)
            if not self._reserve(node, count):
                blocked = True
                continue
            plan.append((node, count))
            tokens -= count
            rows -= sum(node.computed <= position < node.computed + count for position in node.wanted)
        return plan

    @staticmethod
    def _fitting(node: Node, count: int, rows: int) -> int:
        """At most `count` tokens, with at most `rows` logits among them."""
        positions = sorted(position for position in node.wanted if position < node.computed + count)
        return positions[rows] - node.computed if len(positions) > rows else count

    def _begin(self, node: Node) -> bool:
        """Give a node its parent's blocks, or those of the longest cached prefix. False where a block is missing."""
        parent = node.parent
        if parent is None or parent.blocks is None:
            # Logits are needed from the first wanted position on; the last token has some that is wanted, or children.
            limit = min(node.wanted, default=node.end - 1)
            node.blocks = self._blocks.match(node.path[: max(limit, 0)])
            node.serials = [self._blocks.serial(block) for block in node.blocks]
            node.computed = len(node.blocks) * KV_BLOCK
            return True
        whole, partial = divmod(node.start, KV_BLOCK)
        node.serials = parent.serials[:whole]
        node.computed = node.start
        if parent.waiting == 1:  # the last child takes them over
            node.blocks, parent.blocks = parent.blocks, None
            self._parents.discard(parent)
        else:
            copy = self._blocks.take() if partial else None
            if partial and copy is None:
                return False
            node.blocks = parent.blocks[:whole]
            for block in node.blocks:
                self._blocks.share(block)
            if copy is not None:
                self._runner.copy_block(parent.blocks[whole], copy)
                node.blocks.append(copy)
        parent.waiting -= 1
        return True

    def _reserve(self, node: Node, count: int) -> bool:
        assert node.blocks is not None
        while len(node.blocks) < -(-(node.computed + count) // KV_BLOCK):
            block = self._blocks.take()
            if block is None:
                return False
            node.blocks.append(block)
        return True

    # --- after a step

    def _publish(self, node: Node) -> None:
        assert node.blocks is not None
        while (len(node.serials) + 1) * KV_BLOCK <= node.computed:
            at = len(node.serials)
            tokens = node.path[at * KV_BLOCK : (at + 1) * KV_BLOCK]
            after = node.serials[-1] if at else ROOT
            node.serials.append(self._blocks.publish(node.blocks[at], after, tokens))

    def _complete(self, node: Node) -> None:
        self._active.remove(node)
        node.waiting = len(node.children)
        if node.children:
            self._ready += node.children[::-1]
            self._parents.add(node)
        else:
            self._release(node)

    def _release(self, node: Node) -> None:
        if node.blocks is not None:
            self._blocks.release(node.blocks)
        node.blocks, node.serials, node.computed = None, [], 0
