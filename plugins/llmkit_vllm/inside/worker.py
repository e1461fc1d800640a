"""vLLM's engine behind a pair of pipes: a JSON object a line, requests on stdin, results on stdout.

In:  {"add": id, "prompt": [token ids], "params": {of SamplingParams}, "since": first prompt token of interest}, or
     {"cancel": id}
Out: {"ready": {…}} once; {"id", "tokens", "logprobs", "top", "prompt", "finish"} as tokens come; {"id", "error"};
     {"died": reason} before it exits. `logprobs` has a number for each token, `top` for each the likeliest as
     [id, log-probability]; `prompt` has both for the prompt's tokens from `since` on, with the first result only.

The argument is a JSON object of engine arguments. The end of stdin is the end of llmkit: the process group is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from typing import Any


def main() -> None:
    """Keep the pipe of results apart from what anybody prints, and run until stdin ends."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    asyncio.run(_Worker(results).run(json.loads(sys.argv[1])))


class _Worker:
    def __init__(self, results: Any) -> None:
        self._results = results
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def _tell(self, message: dict[str, Any]) -> None:
        self._results.write(json.dumps(message) + "\n")

    async def run(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        loop = asyncio.get_running_loop()
        requests: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        threading.Thread(target=_read, args=(loop, requests), daemon=True).start()
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._tell({"ready": {"device": current_platform.device_type}})
        while True:
            message = await requests.get()
            if "add" in message:
                self._tasks[message["add"]] = asyncio.create_task(self._generate(message))
            elif task := self._tasks.get(message["cancel"]):
                task.cancel()

    async def _generate(self, message: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        number, prompt, given, since = message["add"], message["prompt"], message["params"], message.get("since")
        try:
            if given.get("logit_bias"):
                given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
            params = SamplingParams(**given, detokenize=False, output_kind=RequestOutputKind.DELTA)
            async for output in self.engine.generate({"prompt_token_ids": prompt}, params, str(number)):
                self._tell(_result(number, output, given.get("logprobs"), since))
                since = None
        except asyncio.CancelledError:
            self._tell({"id": number, "tokens": [], "finish": "cancelled"})
        except EngineDeadError as error:
            self._tell({"died": str(error)})
            os._exit(1)  # what is left of the group is killed by llmkit
        except (ValueError, TypeError) as error:  # of parameters that vLLM refuses
            self._tell({"id": number, "error": str(error)})
        finally:
            del self._tasks[number]


def _result(number: int, output: Any, wanted: int | None, since: int | None) -> dict[str, Any]:
    """One result; `wanted` alternatives to each token, and the prompt's from the token `since` on."""
    new = output.outputs[0]
    result: dict[str, Any] = {"id": number, "tokens": list(new.token_ids), "finish": new.finish_reason}
    if new.logprobs is not None:
        result["logprobs"] = [entry[token].logprob for token, entry in zip(new.token_ids, new.logprobs)]
        result["top"] = [_likeliest(entry, wanted or 0) for entry in new.logprobs]
    if since is not None and output.prompt_logprobs is not None:
        tokens, entries = output.prompt_token_ids[since:], output.prompt_logprobs[since:]
        result["prompt"] = [
            [entry[token].logprob for token, entry in zip(tokens, entries)],
            [_likeliest(entry, len(entry)) for entry in entries],
        ]
    return result


def _likeliest(entry: dict[int, Any], count: int) -> list[tuple[int, float]]:
    """The likeliest tokens of a position; vLLM's entry has the chosen one beside them."""
    ranked = sorted(((token, found.logprob) for token, found in entry.items()), key=lambda pair: -pair[1])
    return ranked[:count]


def _read(loop: asyncio.AbstractEventLoop, requests: asyncio.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin.buffer:
        loop.call_soon_threadsafe(requests.put_nowait, json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
