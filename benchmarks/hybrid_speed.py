"""Drafted against plain decoding of a hybrid of SmolLM2-135M's size: layers with a recurrent state beside attention.

The model has random weights and counts, and a drafter is right with a given probability, as in ``gpu_shapes.py``: the time of
an iteration depends on shapes alone. The drafter costs what a draft head of the target's shape costs. Plain and
drafted answers take turns.

python benchmarks/hybrid_speed.py --json results/hybrid_speed.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_shapes import DRAFT_ROWS, PROMPT, Right, answer
from transformers import AutoConfig, AutoModelForCausalLM

from beagle.drafters.base import TreePlan
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import run_script
from beagle.meta import command_line, describe
from beagle.targets.loading import pick_device, pick_dtype
from beagle.targets.target import Target

HIDDEN, VOCABULARY = 576, 49_152  # SmolLM2-135M's, as the MLP, the heads and the number of layers are
SMOLLM2: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LINEAR, FULL = "linear_attention", "full_attention"
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {  # three gated delta nets and one attention in turn
        "layer_types": ([LINEAR] * 3 + [FULL]) * 7 + [LINEAR, FULL], "linear_num_key_heads": 9, "linear_num_value_heads": 9,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "falcon_h1": {  # Mamba 2 and attention side by side in each layer
        "mamba_d_ssm": 768, "mamba_n_heads": 12, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
    },
}  # fmt: skip


def counting_target(family: str, dtype: torch.dtype, device: torch.device) -> Target:
    """A hybrid with random weights whose answer counts upwards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SMOLLM2, **FAMILIES[family]}), dtype=dtype
    )
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(VOCABULARY, HIDDEN), dim=-1)
        model.get_input_embeddings().weight.copy_(100 * HIDDEN**0.5 * rows)  # far above what the layers add
        model.get_output_embeddings().weight.copy_(rows.roll(1, 0))
    return Target(model.to(device), None, family)


def measure(family: str, given: argparse.Namespace) -> dict[str, Any]:
    """Plain and drafted answers in turns; the speed-up is that of the median speeds.

    Args:
        family: a key of ``FAMILIES``.
        given: the command's options.
    """
    device = pick_device(given.device)
    target = counting_target(family, pick_dtype(given.dtype, device), device)
    config = HeadConfig.for_target(target, draft_vocab_size=min(DRAFT_ROWS, VOCABULARY))
    head = BeagleHead(config).to(device, target.dtype).eval().requires_grad_(False)
    plan = TreePlan("chain", depth=given.depth, nodes=given.depth)
    right = Right(HeadDrafter(target, head), VOCABULARY, given.chance)
    modes = {"plain": None, "drafted": right}
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    taus: list[float] = []
    for repeat in range(given.repeats + 1):  # the first is a warm-up
        for mode in sorted(modes, reverse=repeat % 2 == 1):
            ids, stats = answer(target, modes[mode], plan, given.tokens)
            if ids != [(PROMPT + i) % VOCABULARY for i in range(given.tokens)]:
                raise SystemExit(f"{family}: the answer of {mode} decoding is not the target's own, which counts")
            if repeat:
                speeds[mode].append(round(stats.tokens_per_second, 3))
                taus += [round(stats.tau, 3)] if mode == "drafted" else []
    ratio = median(speeds["drafted"]) / median(speeds["plain"])
    found = {
        "dtype": str(target.dtype).removeprefix("torch."), "weights": target.pass_weights, "tokens_per_second": speeds,
        "tau": taus, "speed_up": round(ratio, 3),
    }  # fmt: skip
    print(f"{family}: drafted {ratio:.2f} times as fast as plain, tau {median(taus):.2f}", speeds, flush=True)
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="by default each")
    parser.add_argument("--chance", type=float, default=0.65, help="that a drafted token is right")
    parser.add_argument("--depth", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(words)
    found = {family: measure(family, given) for family in given.family or FAMILIES}
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name != "json"}
        about = describe() | {"command": command_line("python benchmarks/hybrid_speed.py")}
        given.json.write_text(
            json.dumps({"families": found, "settings": settings, "meta": about}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    run_script(main)
