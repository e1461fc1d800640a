"""Scheduler: continuous batching of generations over a fixed number of cache blocks.

Each step runs at most a budget of tokens: first one for every request that is decoding, then chunks of prompts.
Requests join and leave between steps. When blocks run out, the request that came last gives its own back and is
computed again later, which its cached blocks make cheap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from llmkit.engine import Chunk, FinishReason, GenerateRequest
from llmkit_engine.cache import ROOT, Blocks
from llmkit_engine.library import KV_BLOCK
from llmkit_engine.runner import Floats, Run, Runner
from llmkit_engine.sampler import Choice, Sampler, choose, prompt_logprobs

Sink = Callable[[Chunk | ValueError], None]  # takes a request's chunks; an error is its last


@dataclass(slots=True, eq=False)
class Generation:
    """A request with what has been computed of it."""

    request: GenerateRequest
    sampler: Sampler
    sink: Sink
    tokens: list[int]  # prompt and generated
    computed: int = 0  # of them in the cache
    blocks: list[int] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)  # of the published blocks
    prompt_logprobs: list[tuple[float, dict[int, float]]] = field(default_factory=list)  # so far, until handed out
    reported: int = 0  # tokens at the front whose logits are not wanted

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def known(self) -> int:
        """How many of the tokens nothing is to be learnt from any more, so that they may come out of the cache."""
        return min(self.reported, len(self.tokens) - 1)

    def wanted(self, count: int) -> list[int]:
        """Which of the next `count` tokens need logits."""
        end = min(self.computed + count, len(self.request.prompt) - 1)
        return [at - self.computed for at in range(max(self.reported, self.computed), end)] + [count - 1] * (
            count == self.left
        )


class Scheduler:
    """Requests that wait and run. Not to be used by two threads at once.

    Attributes:
        reclaim: gives back blocks that others than generations hold; called when a lone generation has none left.
        computed_tokens: tokens fed since the start.
        preemptions: how often a request had to give its blocks back.
    """

    def __init__(
        self, runner: Runner, blocks: Blocks, *, eos_ids: frozenset[int], context: int, max_running: int
    ) -> None:
        self.runner, self.blocks, self.context = runner, blocks, context
        self.max_running = min(max_running, runner.max_rows, runner.max_tokens)
        self.reclaim: Callable[[], None] = lambda: None
        self.computed_tokens = 0
        self.preemptions = 0
        self._eos_ids = eos_ids
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []  # in order of arrival
        self._by_id: dict[int, Generation] = {}
        self._cancelled: set[int] = set()

    @property
    def busy(self) -> bool:
        return bool(self._by_id)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: GenerateRequest, sink: Sink) -> None:
        """Queue a request that has been checked. Raises ValueError where its id is in flight."""
        if request.id in self._by_id:
            raise ValueError(f"request {request.id}: id is that of a request in flight")
        sampler = Sampler(request, eos_ids=self._eos_ids, room=self.context - len(request.prompt))
        generation = Generation(request, sampler, sink, list(request.prompt))
        if request.sampling.prompt_logprobs is None:
            generation.reported = self.context
        self._by_id[request.id] = generation
        self._waiting.append(generation)

    def cancel(self, request_id: int) -> None:
        """End a request at the next step; does nothing for an unknown one. Safe from any thread."""
        if request_id in self._by_id:
            self._cancelled.add(request_id)

    def drop(self, request_ids: Iterable[int]) -> None:
        """Forget requests without a word to their sinks."""
        for request_id in request_ids:
            if generation := self._by_id.get(request_id):
                self._leave(generation)

    def step(self) -> None:
        """Run one step and hand out what it gave. Does nothing where there is nothing to do."""
        for request_id in list(self._cancelled):
            if generation := self._by_id.get(request_id):
                self._finish(generation, Chunk(request_id, (), finish_reason="cancelled"))
        self._cancelled.clear()
        plan = self._plan()
        if not plan:
            return
        runs = [Run(g.tokens[g.computed : g.computed + n], g.computed, g.blocks, g.wanted(n)) for g, n in plan]
        logits = self.runner.forward(runs)
        ready: list[Generation] = []
        rows: list[int] = []  # of logits, the last of each that is ready
        row = 0
        for run, (generation, count) in zip(runs, plan):
            row += len(run.wanted)
            generation.computed += count
            self.computed_tokens += count
            self._publish(generation)
            if generation.left == 0:
                ready.append(generation)
                rows.append(row - 1)
            if prompt := len(run.wanted) - (generation.left == 0):
                first = row - len(run.wanted)
                self._report(generation, logits[first : first + prompt])
        if ready:
            last = logits if len(rows) == row else logits[rows]
            for generation, choice in zip(ready, choose(self.runner, last, [g.sampler for g in ready])):
                self._hand_out(generation, choice)

    # --- planning

    def _plan(self) -> list[tuple[Generation, int]]:
        """Who runs how many tokens in this step, decoding requests first; they have the blocks for it."""
        budget, rows = self.runner.max_tokens, self.runner.max_rows
        plan: dict[Generation, int] = {}
        for generation in sorted(self._running, key=lambda g: g.left > 1):
            if budget == 0:
                break
            if generation not in self._running:  # gave way to one before it
                continue
            count = _fitting(generation, budget, rows)
            if count and self._reserve(generation, count, plan):
                plan[generation] = count
                budget -= count
                rows -= len(generation.wanted(count))
        while budget and rows and self._waiting and len(self._running) < self.max_running:
            generation = self._waiting[0]
            if not self._admit(generation):
                break
            self._waiting.popleft()
            self._running.append(generation)
            count = _fitting(generation, budget, rows)
            taken = self._reserve(generation, count, plan, may_preempt=False)
            assert taken, "admitted without the blocks for it"
            plan[generation] = count
            budget -= count
            rows -= len(generation.wanted(count))
        return list(plan.items())

    def _admit(self, generation: Generation) -> bool:
        """Give a waiting request the cached blocks of its prefix, if there is room for the rest of it too."""
        if self._will_share(generation):
            return False
        generation.blocks = self.blocks.match(generation.tokens[: generation.known])
        needed = -(-len(generation.tokens) // KV_BLOCK) - len(generation.blocks)
        if needed > self.blocks.available and not self._running:
            self.reclaim()
        # A block for each running request is left free, so that the newcomer does not have to go again at once.
        if needed + len(self._running) > self.blocks.available and (self._running or needed > self.blocks.available):
            self.blocks.release(generation.blocks)
            generation.blocks = []
            return False
        generation.serials = [self.blocks.serial(block) for block in generation.blocks]
        generation.computed = len(generation.blocks) * KV_BLOCK
        return True

    def _will_share(self, generation: Generation) -> bool:
        """Whether a prompt in progress is about to compute blocks that this request wants too."""
        tokens, known = generation.tokens, generation.known
        for other in self._running:
            if other.left <= 1:
                continue
            first = other.computed // KV_BLOCK * KV_BLOCK + KV_BLOCK  # end of the next block that it completes
            if first <= min(len(other.tokens), known) and tokens[:first] == other.tokens[:first]:
                return True
        return False

    def _reserve(
        self, generation: Generation, count: int, plan: dict[Generation, int], *, may_preempt: bool = True
    ) -> bool:
        """Take the blocks for `count` more tokens. False where the request itself had to give way."""
        needed = -(-(generation.computed + count) // KV_BLOCK)
        while len(generation.blocks) < needed:
            block = self.blocks.take()
            if block is not None:
                generation.blocks.append(block)
                continue
            if not may_preempt:
                return False
            if len(self._running) == 1:
                self.reclaim()
                assert self.blocks.available, "the cache cannot hold one request"
                continue
            last = self._running[-1]
            plan.pop(last, None)
            self._preempt(last)
            if last is generation:
                return False
        return True

    def _preempt(self, generation: Generation) -> None:
        """Take a running request's blocks and make it wait, before all others."""
        self.preemptions += 1
        self._running.remove(generation)
        self._free(generation)
        self._waiting.appendleft(generation)

    def preempt_all(self) -> None:
        """Make every running request wait; for others that need the cache's memory."""
        while self._running:
            self._preempt(self._running[-1])

    # --- results

    def _publish(self, generation: Generation) -> None:
        """Make the blocks that are full findable for others."""
        while (len(generation.serials) + 1) * KV_BLOCK <= generation.computed:
            at = len(generation.serials)
            after = generation.serials[-1] if at else ROOT
            tokens = generation.tokens[at * KV_BLOCK : (at + 1) * KV_BLOCK]
            generation.serials.append(self.blocks.publish(generation.blocks[at], after, tokens))

    def _report(self, generation: Generation, logits: Floats) -> None:
        """Note the log-probabilities of the next tokens of a prompt, from their rows of logits, (R, V)."""
        prompt, wanted = generation.request.prompt, generation.request.sampling.prompt_logprobs
        assert wanted is not None
        first = generation.reported
        generation.reported += len(logits)
        targets = prompt[first + 1 : generation.reported + 1]
        generation.prompt_logprobs += prompt_logprobs(self.runner, logits, targets, wanted)
        if generation.reported == len(prompt) - 1:
            generation.reported = self.context

    def _hand_out(self, generation: Generation, choice: Choice | ValueError) -> None:
        request_id = generation.request.id
        if isinstance(choice, ValueError):
            self._finish(generation, ValueError(f"request {request_id}: {choice}"))
            return
        reason = generation.sampler.accept(choice.id)
        chunk = _chunk(request_id, choice, reason)
        if generation.prompt_logprobs:
            given, alternatives = zip(*generation.prompt_logprobs)
            chunk = replace(chunk, prompt_logprobs=given, prompt_top_logprobs=alternatives)
            generation.prompt_logprobs = []
        if reason is not None:
            self._finish(generation, chunk)
            return
        generation.tokens.append(choice.id)
        generation.sink(chunk)

    def _finish(self, generation: Generation, last: Chunk | ValueError) -> None:
        self._leave(generation)
        generation.sink(last)

    def _leave(self, generation: Generation) -> None:
        del self._by_id[generation.request.id]
        if generation in self._running:
            self._running.remove(generation)
        else:
            self._waiting.remove(generation)
        self._free(generation)

    def _free(self, generation: Generation) -> None:
        self.blocks.release(generation.blocks)
        generation.blocks, generation.serials, generation.computed = [], [], 0


def _fitting(generation: Generation, tokens: int, rows: int) -> int:
    """How many of the next tokens fit into a step that has room for so many tokens and rows of logits."""
    count = min(generation.left, tokens)
    wanted = generation.wanted(count)
    return wanted[rows] if len(wanted) > rows else count


def _chunk(request_id: int, choice: Choice, reason: FinishReason | None) -> Chunk:
    if reason == "stop":
        return Chunk(request_id, (), finish_reason="stop")
    if choice.logprob is None:
        return Chunk(request_id, (choice.id,), finish_reason=reason)
    assert choice.top_logprobs is not None
    return Chunk(request_id, (choice.id,), (choice.logprob,), (choice.top_logprobs,), reason)
