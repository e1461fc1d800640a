"""Load with faults: many clients at once, some of which break off, send nonsense or too much, or read slowly.

    python tests/http/load_support.py URL --seconds 120 --clients 200 [--pid PID]

prints what happened as one JSON object. Used by a test for some seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

PROMPTS = ("Once upon a time", "Lily and Tom went", "The big dog", "One day, a bird", "In the park")


@dataclass
class Outcome:
    """Requests by kind and status, and the different answers that each greedy request got."""

    statuses: Counter[str] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=dict)
    incomplete: int = 0  # streams of well-behaved clients that did not end with [DONE]


async def request(
    address: tuple[str, int], path: str, body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """Send a POST; the connection behind the head of the answer, and its status."""
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    status = int((await reader.readline()).split()[1])
    while await reader.readline() not in (b"\r\n", b""):
        pass
    return reader, writer, status


async def well_behaved(address: tuple[str, int], outcome: Outcome, rng: random.Random) -> None:
    """Ask a greedy question and note the answer."""
    prompt, stream = rng.choice(PROMPTS), rng.random() < 0.5
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}
    reader, writer, status = await request(address, "/v1/completions", json.dumps(body).encode())
    try:
        content = (await reader.read()).decode()
    finally:
        writer.close()
    outcome.statuses[f"well-behaved {status}"] += 1
    if status != 200:
        await asyncio.sleep(0.2)
        return
    if stream:
        events = [line[6:] for line in content.splitlines() if line.startswith("data: ")]
        if not events or events[-1] != "[DONE]":
            outcome.incomplete += 1
            return
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    else:
        text = json.loads(content)["choices"][0]["text"]
    outcome.answers.setdefault(prompt, set()).add(text)


async def breaks_off(address: tuple[str, int], outcome: Outcome, rng: random.Random) -> None:
    """Ask for much, and go after a moment; sometimes in the middle of the request."""
    body = json.dumps({"prompt": "Once", "max_tokens": 400, "n": 2, "stream": rng.random() < 0.5}).encode()
    if rng.random() < 0.2:
        _, writer = await asyncio.open_connection(*address)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
        await asyncio.sleep(rng.random() * 0.1)
        writer.close()
        return
    asking = asyncio.ensure_future(request(address, "/v1/completions", body))
    done, _ = await asyncio.wait({asking}, timeout=rng.random() * 0.5)
    if done:
        _, writer, status = asking.result()
        outcome.statuses[f"broken off {status}"] += 1
        writer.close()
    asking.cancel()


async def malformed(address: tuple[str, int], outcome: Outcome, rng: random.Random) -> None:
    """Send what is no request."""
    body = rng.choice([b"{", b"null", b'{"prompt": 1}', b'{"prompt": "a", "n": -1}', rng.randbytes(200), b"[" * 5000])
    path = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
    _, writer, status = await request(address, path, body)
    outcome.statuses[f"malformed {status}"] += 1
    writer.close()


async def oversized(address: tuple[str, int], outcome: Outcome, rng: random.Random) -> None:
    """Send a prompt that is too long."""
    text = "word " * rng.choice([2_000, 100_000])
    body = {"messages": [{"role": "user", "content": text}]} if rng.random() < 0.5 else {"prompt": text}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    _, writer, status = await request(address, path, json.dumps(body).encode())
    outcome.statuses[f"oversized {status}"] += 1
    writer.close()


async def reads_slowly(address: tuple[str, int], outcome: Outcome, rng: random.Random) -> None:
    """Stream an answer with log-probabilities, a little at a time, and go before its end."""
    body = {"prompt": "The", "max_tokens": 200, "stream": True, "logprobs": 5}
    reader, writer, status = await request(address, "/v1/completions", json.dumps(body).encode())
    outcome.statuses[f"slow {status}"] += 1
    for _ in range(rng.randrange(20)):
        if not await reader.read(200):
            break
        await asyncio.sleep(0.05)
    writer.close()


KINDS = [(well_behaved, 40), (breaks_off, 25), (malformed, 15), (oversized, 10), (reads_slowly, 10)]


async def load(url: str, *, clients: int, seconds: float, seed: int = 0) -> Outcome:
    """Keep `clients` clients busy for `seconds`. Raises what a client raises, but for connections that are cut."""
    parts = urlsplit(url)
    address = (parts.hostname or "", parts.port or 80)
    outcome = Outcome()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(seed * 100_000 + number)
        kinds, weights = zip(*KINDS)
        while time.monotonic() < end:
            kind = rng.choices(kinds, weights)[0]
            try:
                await kind(address, outcome, rng)
            except (ConnectionError, IndexError) as error:  # IndexError: no status line
                outcome.statuses[f"{kind.__name__} {type(error).__name__}"] += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    args = parser.parse_args()
    memory: list[float] = []

    async def watch() -> None:
        import psutil

        while args.pid:
            memory.append(round(psutil.Process(args.pid).memory_info().rss / 2**20, 1))
            await asyncio.sleep(args.seconds / 12)

    async def run() -> Outcome:
        watching = asyncio.ensure_future(watch())
        outcome = await load(args.url, clients=args.clients, seconds=args.seconds)
        watching.cancel()
        return outcome

    outcome = asyncio.run(run())
    result: dict[str, Any] = {
        "statuses": dict(sorted(outcome.statuses.items())),
        "different_answers": {prompt: len(texts) for prompt, texts in outcome.answers.items()},
        "incomplete_streams": outcome.incomplete,
        "memory_mib": memory,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
