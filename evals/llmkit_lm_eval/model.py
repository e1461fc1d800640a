"""LlmkitLM: a checkpoint in one of llmkit's engines as a model of lm-eval, `--model llmkit`.

lm-eval finds models in a registry that only code fills, so its own command does not know this one; `run_lm_eval` puts
it there and hands over to lm-eval's command line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import lm_eval.models
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from llmkit.checkpoint import Checkpoint
from llmkit.engines import open_engine
from llmkit.eval_chat import Chat, Conversation
from llmkit.eval_requests import Encoder, OpenDocument, Wave
from llmkit.evaluation import WAVE_TOKENS
from llmkit.evaluator import Answer, Likelihood, LogLikelihood, Request, RollingLogLikelihood
from llmkit_lm_eval.tasks import generation

assert lm_eval.models  # imported for the built-in models, which it registers: they must stay known beside this one


@register_model("llmkit")
class LlmkitLM(LM):  # type: ignore[misc]
    """`--model_args checkpoint=PATH,engine=NAME,dtype=bf16,quantize=int8`; all but the checkpoint have defaults."""

    def __init__(
        self,
        checkpoint: str | None = None,
        engine: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        device: str | None = None,
        seed: int = 1234,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """Load a checkpoint (None: the newest of the latest run).

        `seed` is of sampled answers. The batch sizes that lm-eval passes on are not needed: engines batch by tokens.
        """
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval says cuda:0 where the user says nothing, and takes the CPU then too
        self._checkpoint = Checkpoint.open(checkpoint)
        self._engine = open_engine(self._checkpoint, engine, dtype=dtype, device=device, quantize=quantize)
        self._encoder = Encoder(self._checkpoint.tokenizer, self._engine.context_length)
        self._seed = int(seed)
        self._in_chat = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        asked = (LogLikelihood(self._text(context), continuation) for context, continuation in _arguments(requests))
        return self._answers("loglikelihood", requests, asked, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        asked = (RollingLogLikelihood(text) for (text,) in _arguments(requests))
        return self._answers("loglikelihood_rolling", requests, asked, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        asked = (generation(self._text(prompt), settings) for prompt, settings in _arguments(requests))
        return self._answers("generate_until", requests, asked, disable_tqdm)

    def _answers(self, kind: str, requests: Sequence[Any], asked: Iterable[Request], quiet: bool) -> list[Any]:
        """What lm-eval wants for each of the requests, in their order; progress moves as answers come."""
        found: dict[int, Any] = {}
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=quiet) as progress:
            for wave in self._waves(asked):
                for document in wave.run(self._engine):
                    (answer,) = document.answers()
                    found[document.index] = result = _result(kind, answer)
                    self.cache_hook.add_partial(kind, requests[document.index].args, result)
                    progress.update()
        return [found[index] for index in range(len(requests))]

    def _waves(self, asked: Iterable[Request]) -> Iterator[Wave]:
        wave = Wave(self._encoder, self._seed)
        for index, request in enumerate(asked):
            wave.add(OpenDocument("lm-eval", index, {}, [request]))
            if wave.tokens >= WAVE_TOKENS:
                yield wave
                wave = Wave(self._encoder, self._seed)
        if wave.documents:
            yield wave

    def _text(self, text: str) -> str:
        return Conversation(text) if self._in_chat and text else text

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self._checkpoint)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self._in_chat = True
        return self._chat.render_messages(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._chat.checkpoint.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._checkpoint.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval puts into its results about the model."""
        return {
            "checkpoint": str(self._checkpoint.path),
            "engine": self._engine.name,
            "dtype": self._engine.dtype,
            "context_length": self._engine.context_length,
        }


def _result(kind: str, answer: Answer) -> Any:
    """An answer as lm-eval's methods return it."""
    if not isinstance(answer, Likelihood):
        return answer
    return answer.logprob if kind == "loglikelihood_rolling" else (answer.logprob, answer.is_greedy)


def _arguments(requests: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    return (request.args for request in requests)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's command line with these arguments; it ends the process itself where they are wrong."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
