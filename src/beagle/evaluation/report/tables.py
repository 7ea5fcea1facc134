"""The tables of a side-by-side run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from beagle.evaluation.figures import resolved, speed_up_text
from beagle.evaluation.report.table import Table

PARTS = ("draft", "verify", "accept", "other")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def heading(result: Mapping[str, Any]) -> str:
    """What was run, in a line."""
    meta = result["meta"]
    about, arguments = meta["target"], meta["arguments"]
    sampling = f"temperature {arguments['temperature']:g}" if arguments["temperature"] else "greedy"
    words = [
        about["name"].rstrip("/").rsplit("/", 1)[-1],
        DTYPES.get(about["dtype"], about["dtype"]),
        *(["exact mode"] if arguments["exact"] else []),
        *([f"{arguments['tree']} tree"] if arguments["tree"] != "dynamic" else []),
        sampling,
        f"{arguments['max_new_tokens']} new tokens",
        f"{questions(result)} questions",
    ]
    return ", ".join(words)


def machine(result: Mapping[str, Any]) -> str:
    """Where and when it was run, with what."""
    meta = result["meta"]
    m = meta["machine"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items() if version)
    return f"{where}; {versions}; revision {meta['revision'] or 'unknown'}; {meta['date'][:10]}"


def questions(part: Mapping[str, Any]) -> int:
    return max(int(m["questions"]) for m in part["modes"].values())


def over_plain(part: Mapping[str, Any], mode: str) -> Mapping[str, Any]:
    """The ratio of a mode over plain decoding."""
    ratios = part["ratios"]
    if f"{mode}/plain" in ratios:
        return dict(ratios[f"{mode}/plain"])
    turned = ratios.get(f"plain/{mode}")
    if not turned:
        return {}
    values = {"median": 1 / turned["median"], "low": 1 / turned["high"], "high": 1 / turned["low"]}
    return values | {"pooled": 1 / turned["pooled"], "count": turned.get("count", 2)}


def parts_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Every set, then all of them."""
    return dict(result["sets"]) if len(result["sets"]) == 1 else {**result["sets"], "all": result}


def per_pass(m: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of an iteration by part; empty where a mode doesn't tell (transformers' own)."""
    passes = sum(m["accepted_at_depth"].values())
    if not m["verify_seconds"] or not passes:
        return {}
    seconds = {part: m.get(f"{part}_seconds", 0.0) for part in PARTS[:3]}
    seconds["other"] = max(0.0, m["seconds"] - sum(seconds.values()))
    return {part: 1000 * value / passes for part, value in seconds.items()}


def parts_table(parts: Sequence[Mapping[str, float]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a native pass by its tokens, in milliseconds."""
    names = ("ms", "products_ms", "attention_ms", "others_ms", "waiting_ms", "lm_head_ms", "python_ms")
    header = ["tokens", "pass", "products", "attention", "norms and others", "waiting", "LM head", "Python"]
    return header, [[str(p["rows"]), *(f"{p[name]:.2f}" for name in names)] for p in parts]


def overview(result: Mapping[str, Any]) -> Table:
    """Like the paper's Table 1: a row a mode, the sets beside each other."""
    parts = parts_of(result)
    rows = []
    for mode in result["modes"]:
        each = [(part["modes"][mode], over_plain(part, mode)) for part in parts.values() if mode in part["modes"]]
        ups = ["1" if mode == "plain" else f"{r['pooled']:.2f}" if resolved(r) else "n. r." for _, r in each]
        memory = result["modes"][mode].get("memory_above_target_mb")
        rows.append(
            [
                mode,
                " / ".join(f"{m['tokens_per_second']:.1f}" for m, _ in each),
                " / ".join(ups) if "plain" in result["modes"] else "-",
                " / ".join(f"{m['tau']:.2f}" for m, _ in each),
                "-" if memory is None else f"{memory:.0f}",
            ]
        )
    return Table(
        f"Overview: {' / '.join(parts)}",
        ["mode", "token/s", "speed-up", "τ", "memory above target, MB"],
        rows,
        "Speed-ups over plain decoding in the same engine; n. r.: not resolved, the spread is wider than the effect "
        "(spreads below).",
    )


def details(result: Mapping[str, Any]) -> Table:
    rows = []
    for name, part in parts_of(result).items():
        rows += [[name, *_row(part, mode)] for mode in part["modes"]]
    return Table("By set", ["set", *_HEADER], rows, "Spread: 10th to 90th percentile of single questions.")


def by_category(result: Mapping[str, Any]) -> Table | None:
    rows = []
    for name, part in result["sets"].items():
        for category, found in part.get("categories", {}).items():
            if questions(found) < 2:  # one measurement says nothing
                continue
            rows += [[f"{name}: {category or '-'}", *_row(found, mode)] for mode in found["modes"]]
    return Table("By category", ["category", *_HEADER], rows) if rows else None


_FIGURES = ["τ", "step-α 1…5", "identical", "near-ties"]
_HEADER = ["mode", "questions", "token/s", "speed-up (spread)", *_FIGURES]


def one_set(name: str, part: Mapping[str, Any]) -> Table:
    """Every mode on one set."""
    rows = [[mode, f"{m['tokens_per_second']:.1f}", *_figures(m, 1)] for mode, m in part["modes"].items()]
    return Table(f"{name} ({questions(part)} questions)", ["mode", "token/s", *_FIGURES], rows)


def _row(part: Mapping[str, Any], mode: str) -> list[str]:
    m = part["modes"][mode]
    over = "1" if mode == "plain" else speed_up_text(over_plain(part, mode))
    return [mode, str(m["questions"]), f"{m['tokens_per_second']:.1f}", over, *_figures(m)]


def _figures(m: Mapping[str, Any], digits: int = 0) -> list[str]:
    shares = ["-" if m.get(name) is None else f"{m[name]:.{digits}%}" for name in ("identical", "near_ties")]
    return [f"{m['tau']:.2f}", " ".join(f"{a:.2f}" for a in m["step_alpha"][:5]) or "-", *shares]


def costs(result: Mapping[str, Any]) -> Table:
    rows = []
    for mode, m in result["modes"].items():
        parts = per_pass(m)
        expected, above = m.get("expected_speed_up"), m.get("memory_above_target_mb")
        rows.append(
            [
                mode,
                *(f"{parts[part]:.1f}" if parts else "-" for part in PARTS),
                f"{m['candidates_per_pass']:.1f}" if parts else "-",
                f"{m['prefill_seconds'] / m['questions']:.2f}",
                "-" if expected is None else f"{expected:.2f}×",
                f"{m['peak_memory_mb']:.0f}",
                "-" if above is None else f"{above:.0f}",
            ]
        )
    header = ["mode", *PARTS, "candidates", "prefill", "expected", "peak MB", "+MB"]
    note = (
        "Draft to other: milliseconds a pass; candidates: a pass; prefill: seconds a question; expected: the speed-up by "
        "τ and the measured costs of a pass and a draft; +MB: memory above the target."
    )
    return Table("Where time and memory go", header, rows, note)


def tables(result: Mapping[str, Any]) -> list[Table]:
    """All tables of a side-by-side run."""
    return [table for table in (overview(result), details(result), by_category(result), costs(result)) if table]
