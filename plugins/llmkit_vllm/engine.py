"""VLLMEngine: vLLM as an engine of llmkit, in a process of its own that talks over pipes (see `inside/worker.py`).

Scores come from generations of one token: what precedes the last token is the prompt, the last token is the only one
allowed, and its log-probability, which vLLM takes before it restricts anything, is the answer. So a continuation of
one token, as in multiple choice by letter, uses vLLM's prefix cache; longer ones need the log-probabilities of the
prompt too, for which vLLM computes the whole prompt anew.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import subprocess
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from llmkit.engine import Chunk, Engine, GenerateRequest, ScoreRequest, ScoreResult
from llmkit_vllm.bridge import bridge
from llmkit_vllm.environment import ENVIRONMENT, find_python, why_unavailable
from llmkit_vllm.model import STORED, check_model, context_length, dtype_name
from llmkit_vllm.process import VLLMError, VLLMProcess

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.checkpoint import Checkpoint

IN_FLIGHT = 512  # requests given to vLLM, which batches at most 256 of them: the others keep its batch full
POLL_SECONDS = 0.5

R = TypeVar("R", ScoreRequest, GenerateRequest)


class VLLMEngine(Engine):
    """vLLM: any model that it runs, on GPUs and CPUs."""

    name: ClassVar[str] = "vllm"
    environment = ENVIRONMENT
    gives_prompt_logprobs: ClassVar[bool] = True

    def __init__(self, worker: Worker, *, vocab_size: int, context_length: int, eos_ids: frozenset[int], dtype: str):
        """Wrap a worker that is ready; `open` makes one."""
        self.worker = worker
        self.vocab_size, self.context_length, self.eos_ids, self.dtype = vocab_size, context_length, eos_ids, dtype
        self._running: dict[int, int] = {}  # request id of a generation -> the worker's number for it
        self._cancelled: set[int] = set()  # of those numbers

    @classmethod
    def unavailable(cls) -> str | None:
        return why_unavailable()

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        device: str | None = None,
        enforce_eager: bool = False,
    ) -> Self:
        """Start vLLM with a checkpoint, which takes most of a minute. `device` cpu or cuda: what its build is for.

        `enforce_eager` leaves out compilation: sooner ready, slower after. Raises MissingRequirement where there is no
        vLLM, UnsupportedModel and CheckpointError for what it cannot run, VLLMError where it ends.
        """
        python = find_python()
        check_model(checkpoint, text=False)
        text_config = checkpoint.config.get("text_config", checkpoint.config)
        length = context_length(text_config)
        if length is None:
            raise ValueError(f"engine 'vllm' needs the context length, and {checkpoint.path}/config.json has none")
        kind = dtype_name(checkpoint, dtype)
        arguments = {
            "model": str(checkpoint.path.resolve()),
            "dtype": kind,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # no defaults from the checkpoint: requests say all
            "max_logprobs": -1,
            "max_model_len": length + 1,  # the last token is only predicted; vLLM counts it
            "enforce_eager": enforce_eager,
            "disable_log_stats": True,
        }
        worker = Worker(python, checkpoint.config, arguments)
        try:
            found = worker.wait_until_ready()["device"]
            if device is not None and device.split(":")[0] != found:
                raise ValueError(f"device: this vLLM is built for {found}, not for {device}")
        except BaseException:
            worker.close()
            raise
        vocab = int(text_config["vocab_size"])
        eos_ids = frozenset(i for i in checkpoint.eos_ids if i < vocab)
        return cls(worker, vocab_size=vocab, context_length=length, eos_ids=eos_ids, dtype=STORED.get(kind, kind))

    def close(self) -> None:
        self.worker.close()

    # --- score

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for request, result in self._run(requests, _score_message):
            logprobs, greedy = [], []
            if "prompt" in result:
                values, likeliest = result["prompt"]
                logprobs += values
                greedy += [top[0][1] <= value for value, top in zip(values, likeliest)]
            logprobs += result["logprobs"]
            greedy.append(result["top"][0][0][1] <= result["logprobs"][0])
            yield ScoreResult(request.id, tuple(logprobs), tuple(greedy))

    # --- generate

    def generate(self, requests: Iterable[GenerateRequest]) -> Iterator[Chunk]:
        for request, result in self._run(requests, self._generate_message):
            yield self._chunk(request, result)

    def cancel(self, request_id: int) -> None:
        if (number := self._running.get(request_id)) is not None:
            self._cancelled.add(number)
            self.worker.send({"cancel": number})

    def _generate_message(self, request: GenerateRequest) -> dict[str, Any]:
        s = request.sampling
        most = min(s.max_tokens, self.context_length - len(request.prompt))
        params = {
            "max_tokens": most,
            "min_tokens": min(s.min_tokens, most),
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "repetition_penalty": s.repetition_penalty,
            "presence_penalty": s.presence_penalty,
            "frequency_penalty": s.frequency_penalty,
            "seed": s.seed,
            "logprobs": s.logprobs,
            "prompt_logprobs": s.prompt_logprobs,
            "logit_bias": dict(s.logit_bias) or None,
            "stop_token_ids": sorted(self._end_ids(request)),
            "ignore_eos": True,  # they are among the stop ids where they count
        }
        return {"prompt": request.prompt, "params": params, "since": 1}

    def _end_ids(self, request: GenerateRequest) -> frozenset[int]:
        own = frozenset(request.sampling.stop_token_ids)
        return own if request.sampling.ignore_eos else own | self.eos_ids

    def _chunk(self, request: GenerateRequest, result: dict[str, Any]) -> Chunk:
        tokens, finish = result["tokens"], result["finish"]
        count = len(tokens) - (finish == "stop" and bool(tokens) and tokens[-1] in self._end_ids(request))
        values, likeliest = result.get("prompt", ((), ()))
        most = request.sampling.prompt_logprobs
        return Chunk(
            request.id,
            tuple(tokens[:count]),
            tuple(result.get("logprobs", ())[:count]),
            tuple(dict(top) for top in result.get("top", ())[:count]),
            finish,
            tuple(values),
            tuple(dict(top[:most]) for top in likeliest),
        )

    # --- both

    def _run(self, requests: Iterable[R], message: Any) -> Iterator[tuple[R, dict[str, Any]]]:
        """Keep IN_FLIGHT requests going; yields each of their results. What is left when it is closed is cancelled."""
        results: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        mine: dict[int, R] = {}
        source = iter(requests)
        more = True
        try:
            while mine or more:
                while more and len(mine) < IN_FLIGHT:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    self._add(request, message, results, mine)
                if not mine:
                    continue
                result = results.get()
                if "failed" in result:
                    raise result["failed"]
                number = result["id"]
                if number not in mine:  # what vLLM, which runs ahead of us, did before it knew of a cancellation
                    continue
                if number in self._cancelled:
                    result = {"tokens": [], "finish": "cancelled"}
                if "error" in result:
                    raise ValueError(f"request {mine[number].id}: {result['error']}")
                request = mine[number] if result["finish"] is None else self._forget(number, mine)
                yield request, result
        finally:
            for number in list(mine):
                self._forget(number, mine)
                self.worker.send({"cancel": number})

    def _add(self, request: R, message: Any, results: queue.SimpleQueue[dict[str, Any]], mine: dict[int, R]) -> None:
        self.check(request)
        if isinstance(request, GenerateRequest) and request.id in self._running:
            raise ValueError(f"request {request.id}: another one with this id is running")
        number = self.worker.add(message(request), results)
        mine[number] = request
        if isinstance(request, GenerateRequest):
            self._running[request.id] = number

    def _forget(self, number: int, mine: dict[int, R]) -> R:
        request = mine.pop(number)
        self.worker.forget(number)
        self._cancelled.discard(number)
        if isinstance(request, GenerateRequest):
            del self._running[request.id]
        return request


def _score_message(request: ScoreRequest) -> dict[str, Any]:
    prompt = request.context + request.continuation[:-1]
    params = {
        "max_tokens": 1,
        "temperature": 0,
        "ignore_eos": True,
        "allowed_token_ids": [request.continuation[-1]],
        "logprobs": 1,
        "prompt_logprobs": 1 if len(request.continuation) > 1 else None,
    }
    return {"prompt": prompt, "params": params, "since": len(request.context)}


class Worker:
    """The process with vLLM's engine: sends requests, and sorts its results to those who wait for them."""

    def __init__(self, python: Path, config: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Start it. Raises ValueError where the model's architecture cannot be brought to vLLM."""
        self._stack = contextlib.ExitStack()
        folder = self._stack.enter_context(bridge(config))
        self._numbers = itertools.count()
        self._sinks: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._ready: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._failure: VLLMError | None = None
        self.process = VLLMProcess(
            python,
            folder,
            ["llmkit_inside.worker", json.dumps(arguments)],
            settings={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"},
            stdout=subprocess.PIPE,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> dict[str, Any]:
        """What it says of itself. Raises VLLMError where it ends before it is ready."""
        from llmkit.cli.ui import progress

        with progress("starting vLLM", None) as update:
            while True:
                with contextlib.suppress(queue.Empty):
                    message = self._ready.get(timeout=POLL_SECONDS)
                    if "failed" in message:
                        raise message["failed"]
                    return dict(message["ready"])
                update(status=self.process.last_line[:120])

    def add(self, message: dict[str, Any], results: queue.SimpleQueue[dict[str, Any]]) -> int:
        """Send a request whose results go to `results`; the number that they carry."""
        number = next(self._numbers)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._sinks[number] = results
        self.send({"add": number, **message})
        return number

    def forget(self, number: int) -> None:
        """Drop what still comes for a request."""
        with self._lock:
            self._sinks.pop(number, None)

    def send(self, message: dict[str, Any]) -> None:
        """Where vLLM has died, nothing: those who wait for results learn of it."""
        line = json.dumps(message).encode() + b"\n"
        stdin = self.process.process.stdin
        assert stdin is not None
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: it has been closed
            stdin.write(line)
            stdin.flush()

    def _read(self) -> None:
        stdout = self.process.process.stdout
        assert stdout is not None
        was_ready = False
        for line in stdout:
            message = json.loads(line)
            if "ready" in message:
                was_ready = True
                self._ready.put(message)
            elif "died" in message:
                break
            else:
                with self._lock:
                    sink = self._sinks.get(message["id"])
                if sink is not None:
                    sink.put(message)
        if self._closing:
            return
        failure = self.process.failure("vLLM has died" if was_ready else "vLLM could not be started")
        with self._lock:
            self._failure = failure
            sinks = {id(sink): sink for sink in self._sinks.values()}
        for sink in (self._ready, *sinks.values()):
            sink.put({"failed": failure})

    def close(self) -> None:
        """End vLLM's processes at once: nothing of theirs is worth waiting for."""
        self._closing = True
        self.process.close()
        self._stack.close()
