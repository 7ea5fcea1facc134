"""Single figures of the pages in docs/: what each is called, its file, and how it is read from the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Result = dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """A figure with its name.

    Attributes:
        label: what the figure says.
        files: names below ``results/``.
        text: makes the figure from the contents of those files.
    """

    label: str
    files: tuple[str, ...]
    text: Callable[..., str]


def fact(label: str, *files: str) -> Callable[[Callable[..., str]], Fact]:
    return lambda text: Fact(label, files, text)


def share(result: Result, *parts: str) -> str:
    """Of a drafted iteration's time."""
    m = result["modes"]["beagle"]
    whole = sum(m[f"{part}_seconds"] for part in ("draft", "verify", "accept", "other"))
    return f"{sum(m[f'{part}_seconds'] for part in parts) / whole:.1%}"


def speed(result: Result, mode: str, rows: int) -> float:
    (found,) = (e for e in result["table"] if (e["mode"], e["rows"]) == (mode, rows))
    return float(found["tokens_per_second"])


def largest_gap(result: Result, mode: str) -> str:
    gaps = [abs(d["gap"]) for part in result["first_differences"][mode].values() for d in part]
    count = result["modes"][mode]["questions"]
    return f"{len(gaps)} of {count}; largest gap {max(gaps):.3f}"


def differing(result: Result, mode: str) -> str:
    m = result["modes"][mode]
    return f"{round((1 - m['identical']) * m['questions'])} of {m['questions']}"


def stage_ratio(result: Result, over: tuple[str, str], under: tuple[str, str]) -> str:
    """Seconds per token of one variant's stage over another's, by seed."""
    seconds = {
        (run["variant"], stage, run["seed"]): figures["seconds_per_million_tokens"]
        for run in result["runs"]
        for stage, figures in run["stages"].items()
    }
    seeds = sorted({seed for *_, seed in seconds})
    return ", ".join(f"{seconds[*over, seed] / seconds[*under, seed]:.2f}×" for seed in seeds)


def eagle3_ratio(result: Result, figure: Callable[[Result, int], float]) -> str:
    """A figure of Beagle's run over EAGLE-3's, by seed."""
    by = {(run["variant"], run["seed"]): run for run in result["runs"]}
    seeds = sorted({seed for _, seed in by})
    found = [figure(by["beagle", seed], seed) / figure(by["eagle3-u7-m20", seed], seed) for seed in seeds]
    return " and ".join(f"{ratio:.2f}×" for ratio in found)


def eagle3_decoded(result: Result, figure: str) -> str:
    """The same of decoding with the heads, all questions together."""
    heads = result["decoding"]["dynamic"]
    return eagle3_ratio(result, lambda run, seed: float(heads[f"{run['variant']}/seed{seed}"][figure]))


def time_to_eagle3(result: Result) -> str:
    """Seconds until Beagle's expected length is EAGLE-3's last, between two points of its curve, over all of EAGLE-3's."""
    found = []
    by = {(run["variant"], run["seed"]): run for run in result["runs"]}
    for seed in sorted({seed for _, seed in by}):
        other = by["eagle3-u7-m20", seed]
        points = [(0.0, 1.0)] + [(p["seconds"], p["expected_length"]) for p in by["beagle", seed]["curve"]]
        (a, low), (b, high) = next(pair for pair in pairwise(points) if pair[1][1] >= other["expected_length"])
        found.append((a + (b - a) * (other["expected_length"] - low) / (high - low)) / other["seconds"])
    return " and ".join(f"{share:.2f}×" for share in found)


def peak(run: Result, seed: int) -> float:
    """The most memory of a stage."""
    return float(max(stage["memory_mb"] for stage in run["stages"].values()))


def gain(result: Result, mode: str) -> float:
    """Speed of a mode over plain decoding's, all questions together."""
    modes = result["modes"]
    return float(modes[mode]["tokens_per_second"] / modes["plain"]["tokens_per_second"])


def overhead(part: Result) -> str:
    return f"{part['of_all_seconds']:+.1%} ({part['lowest']:+.0%} to {part['highest']:+.0%} by question)"


def first_alpha(result: Result, millions: float, loss: str) -> float:
    """step-α of the first draft, of the head that so many million tokens trained."""
    (found,) = (r for r in result["runs"] if (round(r["answer_tokens"] / 1e6, 1), r["loss"]) == (millions, loss))
    return float(found["step_alpha"][0])


def ahead(result: Result, loss: str) -> str:
    """How far the recipe's loss is ahead of another, by size."""
    sizes = sorted({round(run["answer_tokens"] / 1e6, 1) for run in result["runs"] if run["loss"] == loss})
    gaps = [first_alpha(result, size, "paper") - first_alpha(result, size, loss) for size in sizes]
    return ", ".join(f"{gap:+.3f} with {size:g} million" for size, gap in zip(sizes, gaps, strict=True))


def expected(result: Result, part: str, times: float) -> str:
    """What a trend says of the first draft with a multiple of the whole store's tokens."""
    line = result["trends"]["step-α of the first draft"][part]
    return f"{line['at_one'] + line['per_decade'] * math.log10(times * result['whole']['answer_tokens']):.2f}"


def clients_ratio(result: Result, figure: str, one: tuple[str, int], other: tuple[str, int]) -> str:
    """A figure of a server with so many clients over another's."""
    found = [result["served"][f"{name}, {count} clients"][figure] for name, count in (one, other)]
    return f"{found[0] / found[1]:.2f}×"


def plain_shape(result: Result, shape: str) -> Result:
    """A shape's plain decoding."""
    (found,) = (row for row in result["shapes"][shape]["rows"] if not row["candidates"])
    return dict(found)


def drafted_shape(result: Result, shape: str, chance: float) -> Result:
    """A shape with 8 candidates that are right with a probability."""
    (found,) = (row for row in result["shapes"][shape]["rows"] if (row["candidates"], row["chance"]) == (8, chance))
    return dict(found)


EAGLE3 = "eagle3/compare.json"
SHAPES, SHAPE_NAMES = "gpu_shapes.json", {"1b": "Llama 1B's shape", "8b": "Llama 8B's shape"}
TARGETS = {
    "SmolLM2-135M, the five sets": "bench_five_sets.json",
    "Qwen2.5-Coder-0.5B": "bench_qwen2.5-coder-0.5b.json",
    "Qwen2.5-Coder-1.5B": "bench_qwen2.5-coder-1.5b.json",
}
PROFILE, START, LOAD, CLIENTS = "profile_bf16.json", "start.json", "load_test.json", "serve_clients.json"
REPAIR, LONG_STEP, STREAM, RANKS = "repair.json", "long_step.json", "states_stream.json", "ranks.json"
FACTS: dict[str, list[Fact]] = {
    "profile": [
        fact("share of an iteration: verification", PROFILE)(lambda r: share(r, "verify")),
        fact("share of an iteration: drafting", PROFILE)(lambda r: share(r, "draft")),
        fact("share of an iteration: everything else", PROFILE)(lambda r: share(r, "accept", "other")),
        fact("speed-up from drafts", PROFILE)(lambda r: f"{r['model']['achieved_speed_up']:.2f}×"),
        fact("speed-up that the cost model expects", PROFILE)(lambda r: f"{r['model']['expected_speed_up']:.2f}×"),
        fact("time of a one-token pass over its roofline", PROFILE)(
            lambda r: f"{r['passes'][0]['ms'] / r['passes'][0]['floor_ms']:.1f}×"
        ),
        fact("Qwen2.5-Coder-1.5B: passes of 1 and 16 tokens over theirs", "profile_qwen2.5-coder-1.5b.json")(
            lambda r: ", ".join(f"{p['ms'] / p['floor_ms']:.2f}×" for p in r["passes"] if p["rows"] in (1, 16))
        ),
    ],
    "start": [
        fact("from `beagle generate` to the first byte of its answer", START)(
            lambda r: f"{r['seconds_to_first_byte']['beagle generate']['median']:.1f} s"
        ),
        fact("of which importing PyTorch and transformers takes", START)(
            lambda r: f"{r['seconds_to_first_byte']['import torch, transformers']['median']:.1f} s"
        ),
    ],
    "batches": [
        fact("plain decoding: 8 answers at once over one", "batch_speed.json")(
            lambda r: f"{speed(r, 'plain', 8) / speed(r, 'plain', 1):.1f}× the tokens per second"
        ),
        fact("drafted decoding: 8 answers at once over one", "batch_speed.json")(
            lambda r: f"{speed(r, 'beagle', 8) / speed(r, 'beagle', 1):.1f}× the tokens per second"
        ),
        fact("8 answers at once: drafted over plain", "batch_speed.json")(
            lambda r: f"{speed(r, 'beagle', 8) / speed(r, 'plain', 8):.2f}×"
        ),
        fact("plain, 64 at once: compiled over eager", "batch_speed_plain.json", "batch_speed_eager.json")(
            lambda a, b: f"{speed(a, 'plain', 64) / speed(b, 'plain', 64):.2f}×"
        ),
        fact("plain, 8 at once: compiled over eager", "batch_speed_plain.json", "batch_speed_eager.json")(
            lambda a, b: f"{speed(a, 'plain', 8) / speed(b, 'plain', 8):.2f}×"
        ),
    ],
    "near_ties": [
        fact("Beagle's answers that differ from plain decoding's", "bench_bf16.json")(
            lambda r: largest_gap(r, "beagle")
        ),
        fact("transformers' answers that differ from our plain decoding's", "bench_bf16.json")(
            lambda r: largest_gap(r, "transformers")
        ),
        fact("the same in exact mode, Beagle", "bench_bf16_exact.json")(lambda r: differing(r, "beagle")),
        fact("native passes: Beagle with the head alone, with both drafters", "bench_five_sets.json")(
            lambda r: f"{differing(r, 'head')}, {differing(r, 'beagle')}"
        ),
    ],
    "load": [
        fact("greedy answers equal to the library's", LOAD)(
            lambda r: f"{r['outcomes']['equal']}, with {len(r['problems'])} that differ or fail"
        ),
        fact("requests refused because the queue is full (429)", LOAD)(lambda r: str(r["outcomes"]["429"])),
        fact("clients that leave early, and malformed requests", LOAD)(
            lambda r: f"{r['outcomes']['left']} and {r['outcomes']['refused']}"
        ),
        fact("memory growth after warm-up", LOAD)(lambda r: f"{r['memory_mb']['growth']:.0f} MB"),
        fact("time from SIGTERM to the end", LOAD)(lambda r: f"{r['sigterm']['seconds']:.1f} s"),
    ],
    "clients": [
        fact("tokens per second, 8 clients over one", CLIENTS)(
            lambda r: clients_ratio(r, "tokens_per_second", ("now", 8), ("now", 1))
        ),
        fact("the same for a server whose requests take turns", CLIENTS)(
            lambda r: clients_ratio(r, "tokens_per_second", ("before", 8), ("before", 1))
        ),
        fact("time to the first token at 8 clients, 95th percentile, over that server's", CLIENTS)(
            lambda r: clients_ratio(r, "first_token_seconds_p95", ("now", 8), ("before", 8))
        ),
    ],
    "overhead": [
        fact("whole answers over HTTP against the library", "serve_overhead.json")(
            lambda r: overhead(r["overhead"]["whole"])
        ),
        fact("streamed answers over HTTP against the library", "serve_overhead.json")(
            lambda r: overhead(r["overhead"]["streamed"])
        ),
    ],
    "stages": [
        fact("Beagle's late stage over its early stage", "stages/compare.json")(
            lambda r: stage_ratio(r, ("beagle-late", "late"), ("beagle-early", "early"))
        ),
        fact("EAGLE's unrolled stage over its single step", "stages/compare.json")(
            lambda r: stage_ratio(r, ("eagle-late", "late"), ("eagle", "early"))
        ),
        fact("Beagle's early stage over EAGLE's single step", "stages/compare.json")(
            lambda r: stage_ratio(r, ("beagle-early", "early"), ("eagle", "early"))
        ),
    ],
    "eagle3": [
        fact("τ, Beagle over EAGLE-3", EAGLE3)(lambda r: eagle3_decoded(r, "tau")),
        fact("speed", EAGLE3)(lambda r: eagle3_decoded(r, "tokens_per_second")),
        fact("expected length of a chain", EAGLE3)(lambda r: eagle3_ratio(r, lambda run, _: run["expected_length"])),
        fact("seconds of training", EAGLE3)(lambda r: eagle3_ratio(r, lambda run, _: run["seconds"])),
        fact("seconds to EAGLE-3's last expected length", EAGLE3)(time_to_eagle3),
        fact("peak memory of training", EAGLE3)(lambda r: eagle3_ratio(r, peak)),
    ],
    "scaling": [
        fact("step-α of the first draft with ten times the tokens, all sizes", "scaling.json")(
            lambda r: f"{r['trends']['step-α of the first draft']['all']['per_decade']:+.2f}"
        ),
        fact("the same from 2 million tokens on", "scaling.json")(
            lambda r: f"{r['trends']['step-α of the first draft']['large']['per_decade']:+.2f}"
        ),
        fact("the trends at the whole store's tokens, all sizes and from 2 million on", "scaling.json")(
            lambda r: f"{expected(r, 'all', 1)} and {expected(r, 'large', 1)}; its head has {r['whole']['step_alpha'][0]:.2f}"
        ),
        fact("the trend from 2 million on at ten times the whole store's tokens", "scaling.json")(
            lambda r: expected(r, "large", 10)
        ),
        fact("step-α of the first draft, the recipe's loss over LK", "scaling.json")(lambda r: ahead(r, "lk")),
        fact("the same over 0.9 total variation, 0.1 cross-entropy", "scaling.json")(lambda r: ahead(r, "tvce")),
    ],
    "gpu": [
        fact(f"{name}, a pass of one token over its roofline", SHAPES)(
            lambda r, shape=shape: f"{plain_shape(r, shape)['verify_ms'] / plain_shape(r, shape)['floor_ms']:.1f}×"
        )
        for shape, name in SHAPE_NAMES.items()
    ]
    + [
        fact(f"{name}, a draft of five levels over that pass", SHAPES)(
            lambda r, shape=shape: f"{drafted_shape(r, shape, 0.8)['draft_ms'] / plain_shape(r, shape)['verify_ms']:.2f}×"
        )
        for shape, name in SHAPE_NAMES.items()
    ]
    + [
        fact(f"{name}, drafts of which a level is right in {chance:.0%}: speed-up", SHAPES)(
            lambda r, shape=shape, chance=chance: "{speed_up:.2f}×, τ {tau:.2f}".format(**drafted_shape(r, shape, chance))
        )
        for shape, name in SHAPE_NAMES.items()
        for chance in (0.6, 0.8)
    ]
    + [
        fact("SmolLM2 in bfloat16, captured: answers with drafts that equal plain decoding's", "gpu_check_bf16.json")(
            lambda r: f"{r['bfloat16, captured']['drafted']} of {r['prompts']}"
        ),
    ],
    "targets": [
        fact(f"{name}, {what} over plain decoding", file)(
            lambda r, mode=mode: f"{gain(r, mode):.2f}×, τ {r['modes'][mode]['tau']:.2f}"
        )
        for name, file in TARGETS.items()
        for mode, what in {"head": "head", "lookup": "lookup", "beagle": "both"}.items()
    ],
    "repair": [
        fact("τ on held-out prompts of the tuned model, its base model's head", REPAIR)(
            lambda r: f"{r['before']:.2f}"
        ),
        fact("the repaired head", REPAIR)(lambda r: f"{r['repaired']['served']['tau']:.2f}"),
        fact("a head trained anew", REPAIR)(lambda r: f"{r['anew']['served']['tau']:.2f}"),
        fact("τ of the repaired head over one trained anew", REPAIR)(
            lambda r: f"{r['repaired']['served']['tau'] / r['anew']['served']['tau']:.1%}"
        ),
        fact("tokens that it was trained on, likewise", REPAIR)(
            lambda r: f"{r['repaired']['trained_tokens'] / r['anew']['trained_tokens']:.1%}"
        ),
        fact("seconds of its training, likewise", REPAIR)(
            lambda r: f"{r['repaired']['train_seconds'] / r['anew']['train_seconds']:.1%}"
        ),
        fact("seconds to repair the head, on one core", REPAIR)(lambda r: f"{r['repaired']['train_seconds']:.0f}"),
    ],
    "long_step": [
        fact(f"{stage} stage, one sample, the whole process at its highest", LONG_STEP)(
            lambda r, stage=stage: f"{r['tokens']:,} tokens, {r['stages'][stage]['peak_mb'] / 1000:.2f} GB"
        )
        for stage in ("early", "late")
    ],
    "ranks": [
        *(
            fact(f"tokens a second in training, {way} on two cores", RANKS)(
                lambda r, way=way: f"{r['tokens_per_second'][way]:.0f}"
            )
            for way in ("one process", "two ranks")
        ),
        fact("two ranks over one process", RANKS)(lambda r: f"{r['two_ranks_over_one']:.2f}×"),
    ],
    "stream": [
        fact("states that went through the folder", STREAM)(lambda r: f"{r['streamed_bytes'] / 1e9:.2f} GB"),
        fact("limit of the folder", STREAM)(lambda r: f"{r['limit_bytes'] / 1e6:.0f} MB"),
        fact("the most that it held", STREAM)(
            lambda r: f"{r['most_bytes'] / 1e6:.1f} MB, looked at {r['looks']:,} times"
        ),
        fact("files left at the end", STREAM)(lambda r: str(r["left_files"])),
    ],
    "repeat": [
        fact(f"τ of the quick suite, {mode}", "eval_quick_smollm2-135m.json", "quick_second_run.json")(
            lambda a, b, mode=mode: f"{a['modes'][mode]['tau']:.2f} and {b['modes'][mode]['tau']:.2f}"
        )
        for mode in ("beagle", "head", "lookup")
    ],
}  # fmt: skip
