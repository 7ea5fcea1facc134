"""Tokens per second by number of rows: one prompt at a time against batches, plain and drafted.

python benchmarks/batch_speed.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 16 --rows 1,8 --json results/batch_speed.json
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import median

import beagle
from beagle.decoding.stats import Stats
from beagle.errors import run_script
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.model import Answer, Model
from beagle.training.prompts import read_prompts


def answers(model: Model, prompts: list[str], rows: int, draft: bool, options: dict) -> tuple[list[Answer], float]:
    """All answers, and the seconds that they took; one row is the engine of a single prompt."""
    began = time.perf_counter()
    if rows == 1:
        found = [model.generate(prompt, draft=draft, **options) for prompt in prompts]
    else:
        found = model.generate_batch(prompts, rows=rows, draft=draft, **options)
    return found, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int, default=16, help="questions of each file")
    parser.add_argument("--rows", default="1,8", help="comma-separated; the first is what the others are compared with")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="auto", help="as of beagle eval; none measures plain decoding alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("-n", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    model = beagle.load(given.target, draft=given.draft, dtype=given.dtype, device=given.device)
    prompts = [p.turns[0] for path in given.questions for p in read_prompts(path, limit=given.limit)]
    options = {"max_new_tokens": given.max_new_tokens, "temperature": given.temperature}
    sizes = [int(n) for n in given.rows.split(",")]
    modes = [False, True] if model.drafter is not None else [False]
    runs: dict[tuple[bool, int], list[tuple[Stats, float]]] = {key: [] for key in product(modes, sizes)}
    texts: dict[tuple[bool, int], list[list[int]]] = {}
    for draft, rows in runs:
        answers(model, prompts[:rows], rows, draft, {**options, "max_new_tokens": 8})  # warm up, measure costs
    for repeat in range(given.repeats):
        order = list(runs)
        for draft, rows in order[repeat % len(order) :] + order[: repeat % len(order)]:
            found, seconds = answers(model, prompts, rows, draft, options)
            pooled = Stats()
            for answer in found:
                pooled.add(answer.stats)
            runs[draft, rows].append((pooled, seconds))
            texts[draft, rows] = [answer.token_ids for answer in found]
    table = []
    for (draft, rows), made in runs.items():
        speeds = sorted(stats.tokens_per_second for stats, _ in made)
        base = median(stats.tokens_per_second for stats, _ in runs[draft, sizes[0]])
        same = [a == b for a, b in zip(texts[draft, rows], texts[False, sizes[0]], strict=True)]
        table.append(
            {
                "mode": "beagle" if draft else "plain",
                "rows": rows,
                "tokens_per_second": round(median(speeds), 2),
                "tokens_per_second_lowest_highest": [round(speeds[0], 2), round(speeds[-1], 2)],
                "tokens_per_second_with_prefill": round(median(s.tokens / seconds for s, seconds in made), 2),
                f"over_{sizes[0]}_rows": round(median(speeds) / base, 3),
                "identical_to_plain": round(sum(same) / len(same), 4),
                **{
                    k: v
                    for k, v in made[-1][0].as_dict().items()
                    if k not in ("tokens_per_second", "accepted_at_depth")
                },
            }
        )
    command = command_line("python benchmarks/batch_speed.py")
    write_json(given.json, {"table": table, "meta": {**describe(model.target), "command": command}})
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    run_script(main)
