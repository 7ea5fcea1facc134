"""Costs and speed-ups of large targets without their weights: real shapes, random weights, drafts of a chosen quality.

The time of an iteration depends on shapes alone, so it is real though the text is not. The LM head is the
embedding moved by one row: the answer counts upwards (token t is followed by t + 1), so that a drafter can be right
with a given probability. It runs a draft head of the target's shape in full, for the time, then proposes its own tree:
a path that is right with that probability at each level, and wrong candidates up to the tree's size.

python benchmarks/gpu_shapes.py --shape 1b --shape 8b --json results/shapes_h200.json     # CUDA
python benchmarks/gpu_shapes.py --shape tiny --tokens 32 --size 1 --size 8               # anywhere
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.sampling import Sampler
from beagle.decoding.sequence import Sequence as Job
from beagle.decoding.stats import Stats
from beagle.drafters import captured
from beagle.drafters.base import Draft, DraftContext, Drafter, TreePlan
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import run_script
from beagle.evaluation import roofline
from beagle.meta import describe
from beagle.targets import aot_cache
from beagle.targets.loading import capture_target, pick_device, pick_dtype
from beagle.targets.target import Target

# hidden, MLP, layers, heads, KV heads, head width, vocabulary
SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64, 128_256),  # Llama 3.2 1B
    "8b": (4096, 14336, 32, 32, 8, 128, 128_256),  # Llama 3 8B
    "7b": (4096, 11008, 32, 32, 32, 128, 32_000),  # Llama 2 and Vicuna 7B, the paper's
    "tiny": (64, 96, 2, 4, 2, 16, 256),
}
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
DRAFT_ROWS = 8192  # tokens that the draft head can propose
PROMPT = 256


class Right(Drafter[DraftContext]):
    """Costs what ``inner`` costs, and is right with probability ``chance`` at each level."""

    name = "right"

    def __init__(self, inner: Drafter, vocabulary: int, chance: float, seed: int = 0) -> None:
        self.inner, self.vocabulary, self.chance = inner, vocabulary, chance
        self.random = random.Random(seed)

    def context(self) -> DraftContext:
        return self.inner.context()

    def draft(
        self, contexts: Sequence[DraftContext], roots: list[int], plan: TreePlan, min_expected_tokens: float = 0.0
    ) -> list[Draft]:
        self.inner.draft(contexts, roots, plan, min_expected_tokens)
        return [self.candidates(root, plan) for root in roots]

    def candidates(self, root: int, plan: TreePlan) -> Draft:
        nodes = plan.nodes or 1
        tokens, parents = [], []
        for level in range(min(plan.depth, nodes)):
            right = self.random.random() < self.chance
            tokens.append((root + level + (1 if right else 2)) % self.vocabulary)
            parents.append(level - 1)
        for n in range(nodes - len(tokens)):  # wrong: no token is followed by one so far ahead
            tokens.append((root + 100 + n) % self.vocabulary)
            parents.append(n % plan.depth - 1)
        return Draft(tokens, parents, [0.0] * nodes)


def counting_target(shape: str, dtype: torch.dtype, device: torch.device, graphs: bool) -> Target:
    """A Llama of this shape, with random weights, that counts; its passes captured as ``graphs`` or eager."""
    hidden, mlp, layers, heads, kv_heads, width, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=width, vocab_size=vocabulary, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(vocabulary, hidden, device=device), dim=-1)
        model.get_input_embeddings().weight.copy_(100 * hidden**0.5 * rows)  # far above what the layers add
        model.get_output_embeddings().weight.copy_(rows.roll(1, 0))
    target = Target(model, None, f"llama-{shape}")
    if graphs:
        capture_target(target)
    return target


def answer(target: Target, drafter: Drafter | None, plan: TreePlan, tokens: int) -> tuple[list[int], Stats]:
    stats = Stats()
    prompt = [i % target.vocab_size for i in range(PROMPT)]
    answer = Job(prompt, tokens, Sampler(eos_ids=target.eos_ids), stats=stats)
    steps = decode(Decoder(target, drafter=drafter, plan=plan), answer)
    return [token for step in steps for token in step.tokens], stats


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Plain decoding and every size and chance, on one target; ``floor_ms`` is of a pass in the answer's middle."""
    device = pick_device(arguments.device)
    graphs = device.type == "cuda" and not arguments.eager and not aot_cache.compiled_disabled()
    target = counting_target(shape, pick_dtype(arguments.dtype, device), device, graphs)
    config = HeadConfig.for_target(target, draft_vocab_size=min(DRAFT_ROWS, target.vocab_size))
    head = BeagleHead(config).to(device, target.dtype).eval().requires_grad_(False)
    drafter = HeadDrafter(target, head)
    machine, _ = roofline.measure(target)
    rows: list[dict[str, Any]] = []
    for chance in [None, *arguments.chance]:
        for size in arguments.size if chance is not None else [0]:  # candidates; the root comes on top
            own = copy.copy(drafter)
            if graphs:
                captured.capture_drafts(own)  # anew: a graph drafts as many levels as it was recorded for
            inner = None if chance is None else Right(own, target.vocab_size, chance)
            plan = TreePlan(depth=min(arguments.depth, size or 1), top_k=arguments.tree_top_k, nodes=size or None)
            answer(target, inner, plan, arguments.tokens)  # warm-up, with graphs for all its contexts
            ids, stats = answer(target, inner, plan, arguments.tokens)
            if ids != [(PROMPT + i) % target.vocab_size for i in range(arguments.tokens)]:
                raise SystemExit(f"{shape}: the target does not count, so its drafts' quality is not what was asked")
            passes = stats.passes
            row = {"candidates": size, "chance": chance, "tau": stats.tau, "tokens_per_second": stats.tokens_per_second}
            for part in ("draft", "verify", "accept", "other"):
                row[f"{part}_ms"] = 1000 * getattr(stats, f"{part}_seconds") / passes
            row["floor_ms"] = (
                1000 * roofline.roofline(target, machine, size + 1, PROMPT + arguments.tokens // 2).seconds
            )
            row["speed_up"] = stats.tokens_per_second / (
                rows[0]["tokens_per_second"] if rows else row["tokens_per_second"]
            )
            rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
            print(shape, rows[-1], flush=True)
    return {
        "graphs": target.compiled is not None,
        "weights": target.pass_weights,
        "dtype": str(target.dtype),
        "rates": vars(machine),
        "rows": rows,
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=SHAPES, required=True)
    parser.add_argument("--size", action="append", type=int, help=f"candidates of the tree, by default {SIZES}")
    parser.add_argument("--chance", action="append", type=float, help="that a level is right, by default 0.6, 0.8, 0.9")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--tree-top-k", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eager", action="store_true", help="no captured graphs on a GPU, a kernel at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    arguments.size, arguments.chance = arguments.size or list(SIZES), arguments.chance or [0.6, 0.8, 0.9]
    shapes = {shape: measure(shape, arguments) for shape in arguments.shape}
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(
            json.dumps({"shapes": shapes, "settings": settings, "meta": describe()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_script(main)
