"""Many clients on one server of this machine: no lost or crossed answer, no errors, bounded memory.

python benchmarks/load_test.py --seconds 120 --clients 16 --json results/load_test.json

Starts `beagle serve` on a loopback port, asks with mixed lengths, streamed and whole, with and without
drafts, among them clients that go away and requests that are no requests; compares every greedy answer with
the library's; then stops the server (SIGTERM), kills one (SIGKILL) under load, and starts another.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx
from processes import Server, free_port

import beagle
from beagle.errors import run_script
from beagle.meta import describe

QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "A shop sells 7 red and 5 blue pens a day. How many pens does it sell in 6 days?",
    "Name three rivers in Europe and one fact about each.",
    "Translate 'good morning' into French, Spanish and German.",
    "What is the difference between a list and a tuple?",
    "Give me a recipe for pancakes.",
    "Explain how a bicycle stays upright.",
)
LENGTHS = (1, 8, 24, 64)
BAD = (
    b"{",
    b"[]",
    b'{"model": 5}',
    b'{"model": "load", "messages": [{"role": "user", "content": "' + b"x" * 2_000_000 + b'"}]}',
)
PLAN = beagle.TreePlan("dynamic", 4, 6, 8)  # a fixed size: the same passes in both processes


class Served(Server):
    """A server process of our own."""

    def __init__(self, options: list[str], live: int, queue: int) -> None:
        port = free_port()
        tree = ["--depth", str(PLAN.depth), "--tree-top-k", str(PLAN.top_k), "--nodes", str(PLAN.nodes)]
        limits = ["--live", str(live), "--queue", str(queue), "--name", "load", "--grace", "20"]
        command = [sys.executable, "-m", "beagle", "serve", "--port", str(port)]
        super().__init__([*command, *tree, *limits, *options], port)

    def memory(self) -> float:
        """Resident megabytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * 4096 / 1e6


class Load:
    """What the clients do, and what came of it."""

    def __init__(self, url: str, expected: dict[tuple[str, int], str]) -> None:
        self.url, self.expected = url, expected
        self.outcomes: Counter[str] = Counter()
        self.examples: list[str] = []
        self.over = threading.Event()

    def count(self, outcome: str, example: str = "") -> None:
        self.outcomes[outcome] += 1
        if example and len(self.examples) < 10:
            self.examples.append(f"{outcome}: {example[:300]}")

    def client(self, seed: int) -> None:
        choose = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self.over.is_set():
                try:
                    self.one(http, choose)
                except httpx.HTTPError as error:
                    self.count("connection error", repr(error))

    def one(self, http: httpx.Client, choose: random.Random) -> None:
        path = "/v1/chat/completions"
        if choose.random() < 0.05:
            headers = {"content-type": "application/json"}
            status = http.post(path, content=choose.choice(BAD), headers=headers).status_code
            if status in (400, 413):
                self.count("refused")
            else:
                self.count("wrong refusal", str(status))
            return
        question, tokens = choose.choice(QUESTIONS), choose.choice(LENGTHS)
        body = {
            "model": "load", "messages": [{"role": "user", "content": question}], "max_tokens": tokens,
            "temperature": 0, "beagle": {"draft": choose.random() < 0.75},
        }  # fmt: skip
        kind = choose.choices(("whole", "stream", "leave", "leave at once"), (4, 4, 2, 1))[0]
        if kind == "whole":
            answer = http.post(path, json=body)
            if answer.status_code == 200:
                self.compare(question, tokens, answer.json()["choices"][0]["message"]["content"])
            else:
                self.refused(answer)
        elif kind == "leave at once":
            try:
                status = http.post(path, json=body, timeout=choose.uniform(0.05, 1.0)).status_code
                self.count({200: "answered before leaving", 429: "429"}.get(status, f"status {status}"))
            except httpx.TimeoutException:
                self.count("left")
        else:
            with http.stream("POST", path, json={**body, "stream": True}) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self.refused(answer)
                    return
                text, leave_after = "", choose.randrange(1, 8)
                for number, line in enumerate(line for line in answer.iter_lines() if line):
                    if kind == "leave" and number == leave_after:
                        self.count("left")
                        return
                    if line == "data: [DONE]":
                        break
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.count("error in stream", line)
                        return
                    text += event["choices"][0]["delta"].get("content") or ""
                else:
                    self.count("unfinished stream", text)
                    return
                self.compare(question, tokens, text)

    def refused(self, answer: httpx.Response) -> None:
        if answer.status_code == 429:
            self.count("429")
            self.over.wait(min(float(answer.headers["retry-after"]), 2.0))
        else:
            self.count(f"status {answer.status_code}", answer.text)

    def compare(self, question: str, tokens: int, text: str) -> None:
        if text == self.expected[question, tokens]:
            self.count("equal")
        else:
            self.count("different", f"{question!r} {tokens}: {text!r}")


def offline(target: str, draft: str, dtype: str) -> dict[tuple[str, int], str]:
    """The library's own greedy answers."""
    model = beagle.load(target, draft=draft, dtype=dtype, plan=PLAN)
    return {(q, n): model.generate(q, max_new_tokens=n).text for q in QUESTIONS for n in LENGTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--live", type=int, default=8)
    parser.add_argument("--queue", type=int, default=4, help="small, so that 429 is met too")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--dtype", default="float32", help="in half precision near-ties may flip")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    expected = offline(arguments.target, arguments.draft, arguments.dtype)
    options = ["--target", arguments.target, "--draft", arguments.draft, "--dtype", arguments.dtype]
    served = Served(options, arguments.live, arguments.queue)
    memory: list[float] = []
    try:
        served.wait(300)
        load = Load(served.url, expected)
        threads = [threading.Thread(target=load.client, args=(i,), daemon=True) for i in range(arguments.clients)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end and served.process.poll() is None:
            memory.append(served.memory())
            time.sleep(min(1.0, arguments.seconds / 60))
        load.over.set()
        for thread in threads:
            thread.join(120)
        lost = sum(thread.is_alive() for thread in threads)
        time.sleep(1)
        state = httpx.get(served.url + "/health", timeout=30).json()
        metrics = httpx.get(served.url + "/metrics", timeout=30).text
    finally:
        code, seconds = served.stop()
    # killed under load, then another one in its place
    with Served(options, arguments.live, arguments.queue) as victim:
        victim.wait(300)
        harassed = Load(victim.url, expected)
        thread = threading.Thread(target=harassed.client, args=(99,), daemon=True)
        thread.start()
        time.sleep(2)
        victim.stop(signal.SIGKILL)
    harassed.over.set()
    thread.join(120)
    with Served(options, arguments.live, arguments.queue) as heir:
        heir.wait(300)
        again = Load(heir.url, expected)
        with httpx.Client(base_url=heir.url, timeout=120) as http:
            for seed in range(6):
                again.one(http, random.Random(seed))

    settled, last = memory[len(memory) // 3 : len(memory) // 2], memory[-max(1, len(memory) // 6) :]
    result = {
        "outcomes": dict(sorted(load.outcomes.items())),
        "problems": load.examples,
        "clients_without_an_end": lost,
        "left_behind": {"live": state["live"], "waiting": state["waiting"]},
        "statuses": [line for line in metrics.splitlines() if line.startswith("beagle_requests_total")],
        "memory_mb": {
            "after_warm_up": round(median(settled), 1),
            "at_the_end": round(median(last), 1),
            "growth": round(median(last) - median(settled), 1),
            "most": round(max(memory), 1),
        },
        "sigterm": {"exit_code": code, "seconds": seconds},
        "after_kill_9": {"outcomes": dict(again.outcomes), "crossed_before": harassed.outcomes["different"]},
        "arguments": {**vars(arguments), "json": arguments.json.name},
        "meta": describe(),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    fine = {"equal", "429", "left", "refused", "answered before leaving"}
    if set(load.outcomes) - fine or lost or code or state["live"] or again.outcomes["different"]:
        raise SystemExit("the load test has failed: see the outcomes above")


if __name__ == "__main__":
    run_script(main)
