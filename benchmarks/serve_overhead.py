"""What the server costs one client: the same greedy answers from the library, over HTTP whole, and over HTTP streamed.

python benchmarks/serve_overhead.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 10 --json results/serve_overhead.json

Library and server are two processes of this machine, one idle while the other answers; they take turns at every
question. Seconds are the caller's, from the question to the whole answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from load_test import PLAN, Served

import beagle
from beagle.errors import run_script
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.training.prompts import read_prompts

WAYS = ("library", "whole", "streamed")


class Client:
    """One client of one server."""

    def __init__(self, url: str, tokens: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self.tokens = tokens

    def body(self, question: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"model": "load", "messages": messages, "max_tokens": self.tokens, "temperature": 0}

    def whole(self, question: str) -> str:
        reply = self.http.post("/v1/chat/completions", json=self.body(question)).raise_for_status().json()
        return str(reply["choices"][0]["message"]["content"])

    def streamed(self, question: str) -> str:
        text = ""
        body = self.body(question) | {"stream": True}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            for line in reply.raise_for_status().iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
        return text


def timed(answer: Callable[[str], str], question: str) -> tuple[str, float]:
    began = time.perf_counter()
    text = answer(question)
    return text, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--dtype", default="float32", help="in half precision near-ties may flip")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    questions = [p.turns[0] for p in read_prompts(options.questions, limit=options.limit)]
    model = beagle.load(options.target, draft=options.draft, dtype=options.dtype, plan=PLAN)
    served = Served(["--target", options.target, "--draft", options.draft, "--dtype", options.dtype], live=8, queue=4)
    runs: list[dict[str, Any]] = []
    try:
        served.wait(300)
        client = Client(served.url, options.max_new_tokens)
        ways: dict[str, Callable[[str], str]] = {
            "library": lambda question: model.generate(question, max_new_tokens=options.max_new_tokens).text,
            "whole": client.whole,
            "streamed": client.streamed,
        }
        for answer in ways.values():
            answer(questions[0])
        for repeat in range(options.repeats):
            for i, question in enumerate(questions):
                found = {way: timed(ways[way], question) for way in WAYS[i % 3 :] + WAYS[: i % 3]}
                run = {f"{way}_seconds": round(found[way][1], 4) for way in WAYS}
                equal = {f"{way}_equal": found[way][0] == found["library"][0] for way in WAYS[1:]}
                runs.append({"repeat": repeat, "question": i, **run, **equal})
                print(f"{i + 1}/{len(questions)}: {run}")
    finally:
        code, _ = served.stop()
    overheads = {}
    for way in WAYS[1:]:
        ratios = sorted(run[f"{way}_seconds"] / run["library_seconds"] - 1 for run in runs)
        overheads[way] = {
            "median": round(median(ratios), 4),
            "lowest": round(ratios[0], 4),
            "highest": round(ratios[-1], 4),
            "of_all_seconds": round(
                sum(run[f"{way}_seconds"] for run in runs) / sum(run["library_seconds"] for run in runs) - 1, 4
            ),
            "equal": sum(run[f"{way}_equal"] for run in runs) / len(runs),
        }
    result = {
        "overhead": overheads,
        "runs": runs,
        "questions": len(questions),
        "command": command_line("python benchmarks/serve_overhead.py"),
        "meta": describe(),
    }
    write_json(options.json, result)
    print(json.dumps(overheads, indent=1))
    if code or any(overhead["equal"] < 1 for overhead in overheads.values()):
        raise SystemExit("an answer over HTTP is another one, or the server did not stop: see above")


if __name__ == "__main__":
    run_script(main)
