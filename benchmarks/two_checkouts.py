"""Single answers of two checkouts of this project in turns: is the newer one slower?

python benchmarks/two_checkouts.py --source before=../before/src --source now=src --json results/two_checkouts.json

Each source has a process of its own that stays loaded; a question goes to one after the other, so that what
disturbs the machine meets both. Ratios are of the medians over all questions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from beagle.evaluation.suites import load_suite
from beagle.meta import command_line, describe

WORKER = """
import json, sys
import beagle
options = json.loads(sys.argv[1])
model = beagle.load(options["target"], draft=options["draft"], dtype=options["dtype"], quantize=options["quantize"])
model.generate("Hello", max_new_tokens=8)
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = model.generate(asked["question"], max_new_tokens=asked["tokens"], draft=asked["draft"],
        temperature=options["temperature"])
    s = answer.stats
    print(json.dumps({"tokens": s.tokens, "tau": s.tau, "tokens_per_second": s.tokens_per_second,
        "prefill": s.prefill_seconds, "other": s.other_seconds + s.accept_seconds, "decode": s.decode_seconds,
        "draft": s.draft_seconds, "verify": s.verify_seconds, "passes": s.passes, "ids": answer.token_ids}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", required=True, help="NAME=FOLDER that holds the package beagle")
    parser.add_argument("--cache", action="append", default=[], help="NAME=FOLDER, the source's BEAGLE_CACHE")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    caches = dict(item.split("=", 1) for item in arguments.cache)
    options = json.dumps(
        {name: getattr(arguments, name) for name in ("target", "draft", "dtype", "quantize", "temperature")}
    )
    workers: dict[str, subprocess.Popen[str]] = {}
    for item in arguments.source:
        name, folder = item.split("=", 1)
        environment = {**os.environ, "PYTHONPATH": str(Path(folder).resolve())}
        if name in caches:
            environment["BEAGLE_CACHE"] = caches[name]
        workers[name] = subprocess.Popen(
            [sys.executable, "-c", WORKER, options],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert "ready" in _answer(workers[name])
    questions = [prompt.turns[0] for prompts in load_suite(arguments.suite).values() for prompt in prompts]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {mode: {name: [] for name in workers} for mode in MODES}
    for number, question in enumerate(questions[: arguments.questions]):
        for mode, draft in MODES.items():
            order = list(workers) if number % 2 else list(workers)[::-1]
            for name in order:
                asked = {"question": question, "tokens": arguments.tokens, "draft": draft}
                stdin = workers[name].stdin
                assert stdin is not None
                stdin.write(json.dumps(asked) + "\n")
                stdin.flush()
                found[mode][name].append(json.loads(_answer(workers[name])))
    for worker in workers.values():
        worker.terminate()
    first, *others = workers
    table: dict[str, Any] = {}
    for mode, by_name in found.items():
        table[mode] = {name: _figures(answers) for name, answers in by_name.items()}
        for name in others:
            ratios = [
                new["tokens_per_second"] / old["tokens_per_second"]
                for old, new in zip(by_name[first], by_name[name], strict=True)
                if old["tokens_per_second"] and new["tokens_per_second"]
            ]
            same = sum(o["ids"] == n["ids"] for o, n in zip(by_name[first], by_name[name], strict=True))
            table[mode][f"{name} over {first}"] = {"speed": round(median(ratios), 4), "equal_answers": same}
    result = {"command": command_line("benchmarks/two_checkouts.py"), "answers": table, "meta": describe()}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(table, indent=1))


MODES = {"plain": False, "drafted": True}


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a worker has ended; see its error above")
    return line


def _figures(answers: list[dict[str, Any]]) -> dict[str, Any]:
    decode = sum(a["decode"] for a in answers)
    return {
        "tokens_per_second": round(median(a["tokens_per_second"] for a in answers), 2),
        "tau": round(sum(a["tokens"] for a in answers) / sum(a["tokens"] / a["tau"] for a in answers), 3),
        "draft_ms": round(1e3 * sum(a["draft"] for a in answers) / sum(a["passes"] for a in answers), 3),
        "verify_ms": round(1e3 * sum(a["verify"] for a in answers) / sum(a["passes"] for a in answers), 3),
        "outside_share": round(sum(a["other"] for a in answers) / decode, 4),
        "questions": len(answers),
    }


if __name__ == "__main__":
    main()
