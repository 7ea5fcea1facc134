"""Tokens per second and time to the first token by number of clients, of one server or of several checkouts'.

python benchmarks/serve_clients.py --clients 1 8 --json results/serve_clients.json
python benchmarks/serve_clients.py --source before=../before/src --source now=src --json results/serve_clients.json

Each client asks its own questions one after another, streamed, greedily. With several sources their servers run side by
side and are asked in turns, round by round, so that what disturbs the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from processes import Server

from beagle.errors import run_script
from beagle.evaluation.suites import load_suite
from beagle.meta import command_line, describe


class Served(Server):
    """A server process of one source."""

    def __init__(self, source: Path, port: int, options: list[str], cache: str | None) -> None:
        environment = {**os.environ, "PYTHONPATH": str(source.resolve())}
        if cache:
            environment["BEAGLE_CACHE"] = cache
        command = [sys.executable, "-m", "beagle", "serve", "--port", str(port), "--name", "served", *options]
        super().__init__(command, port, environment, Path(os.devnull))


def ask(url: str, question: str, tokens: int) -> tuple[int, float]:
    """Tokens of an answer, and seconds to its first."""
    body: dict[str, Any] = {
        "model": "served", "messages": [{"role": "user", "content": question}], "max_tokens": tokens,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    began, first, made = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and event["choices"][0]["delta"].get("content") and not first:
                first = time.perf_counter() - began
            if event.get("usage"):
                made = event["usage"]["completion_tokens"]
    return made, first


def measure(url: str, clients: int, questions: list[str], tokens: int) -> dict[str, Any]:
    """All questions by so many clients at once."""
    results: list[tuple[int, float]] = []

    def client(number: int) -> None:
        for question in questions[number::clients]:
            results.append(ask(url, question, tokens))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    firsts = sorted(first for _, first in results)
    made = sum(n for n, _ in results)
    return {"tokens": made, "seconds": seconds, "tokens_per_second": made / seconds, "first_token_seconds": firsts}


def p95(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", default=[], help="NAME=FOLDER that holds the package beagle")
    parser.add_argument("--cache", action="append", default=[], help="NAME=FOLDER, the source's BEAGLE_CACHE")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--questions", type=int, default=16, help="of a round")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8310)
    parser.add_argument("--options", default="", help="further options of `beagle serve`, as one text")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    sources = dict(item.split("=", 1) for item in arguments.source or ["now=src"])
    caches = dict(item.split("=", 1) for item in arguments.cache)
    questions = [prompt.turns[0] for prompts in load_suite(arguments.suite).values() for prompt in prompts]
    needed = arguments.questions * arguments.rounds
    questions = (questions * (needed // len(questions) + 1))[:needed]
    rounds: dict[str, list[dict[str, Any]]] = {}
    servers: dict[str, Served] = {}
    try:
        for i, (name, folder) in enumerate(sources.items()):
            servers[name] = Served(Path(folder), arguments.port + i, arguments.options.split(), caches.get(name))
            servers[name].wait(600)
            measure(servers[name].url, max(arguments.clients), ["Name a colour."] * max(arguments.clients), 8)
        for number in range(arguments.rounds):
            asked = questions[number * arguments.questions :][: arguments.questions]
            for clients in arguments.clients:
                for name, served in servers.items():
                    # texts of their own, so that no prompt is known from an earlier round
                    own = [f"({number}.{clients}.{i}) {question}" for i, question in enumerate(asked)]
                    found = measure(served.url, clients, own, arguments.tokens)
                    rounds.setdefault(f"{name}, {clients} clients", []).append(found)
                    print(f"{name}, {clients} clients: {found['tokens_per_second']:.1f} tokens/s", flush=True)
    finally:
        for served in servers.values():
            served.stop()
    table = {
        name: {
            "tokens_per_second": round(median(r["tokens_per_second"] for r in own), 2),
            "tokens_per_second_of_rounds": [round(r["tokens_per_second"], 2) for r in own],
            "first_token_seconds_p50": round(median(f for r in own for f in r["first_token_seconds"]), 4),
            "first_token_seconds_p95": round(p95([f for r in own for f in r["first_token_seconds"]]), 4),
        }
        for name, own in rounds.items()
    }
    result = {"command": command_line("benchmarks/serve_clients.py"), "served": table, "meta": describe()}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    run_script(main)
