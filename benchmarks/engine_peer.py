"""A peer of benchmarks/engine.py in its own process and Python: `engine_peer.py KIND MODEL`, KIND vllm or transformers.

Reads one JSON object a line on stdin, {"prompts": [[ids]], "new_tokens": N} or {"matrix": N}, and answers each with a
line that begins with ANSWER: {"seconds": S}, or {"gflops": {type: rate}} of N x N products. Imports nothing of llmkit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

ANSWER = "ANSWER "
Generate = Callable[[list[list[int]], int], None]


def vllm(model: str) -> Generate:
    """vLLM's own batch interface, without HTTP; the best case for it."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    engine = LLM(model=model, dtype="bfloat16", max_model_len=1024, max_num_seqs=64, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)

    return generate


def transformers(model: str) -> Generate:
    """transformers' generate, all prompts in one batch."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts)  # of one length
        with torch.inference_mode():
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            out = loaded.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert out.shape[1] == ids.shape[1] + new_tokens

    return generate


def matrix_rate(size: int) -> dict[str, float]:
    """GFLOP/s of PyTorch's matrix product of size x size, the best of 5."""
    import torch

    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - started)
        rates[name] = 2 * size**3 / best / 1e9
    return rates


def main() -> None:
    kind, model = sys.argv[1:]
    generate = {"vllm": vllm, "transformers": transformers}[kind](model)
    print(ANSWER + "{}", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "matrix" in task:
            answer: dict[str, Any] = {"gflops": matrix_rate(task["matrix"])}
        else:
            started = time.perf_counter()
            generate(task["prompts"], task["new_tokens"])
            answer = {"seconds": time.perf_counter() - started}
        print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
