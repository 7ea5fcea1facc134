"""Does a GPU give the model's own answers? Plain, drafted, exact, sampled and several at once; eager and captured.

python tools/check_gpu.py --target smollm2-135m --json results/gpu_check.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from beagle.errors import run_script
from beagle.files import write_json
from beagle.meta import describe
from beagle.model import Model, load
from beagle.targets.loading import load_model

DTYPES = ("float32", "bfloat16")
PROMPTS = [
    "Write a Python function that adds two numbers.",
    "What is the capital of France?",
    "Explain gravity to a child.",
    "List five fruits and say something about each of them.",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Write a short poem about rain.",
]


def equal(one: list[Any], other: list[Any]) -> int:
    """How many answers have the same tokens."""
    return sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True))


def check(model: Model, tokens: int) -> dict[str, Any]:
    """How many answers of each way equal those of plain decoding, of ``len(PROMPTS)``."""

    def answers(**options: Any) -> list[Any]:
        return [model.generate(prompt, max_new_tokens=tokens, **options) for prompt in PROMPTS]

    plain = answers(draft=False)
    return {
        "captured": model.target.compiled is not None,
        "drafted": equal(plain, answers()),
        "batch": equal(plain, list(model.generate_batch(PROMPTS, max_new_tokens=tokens))),
        "exact": equal(answers(draft=False, exact=True), answers(exact=True)),
        "sampled": equal(answers(draft=False, temperature=1.0, seed=3), answers(temperature=1.0, seed=3)),
        "plain": [answer.token_ids for answer in plain],
    }


def transformers_own(target: str, dtype: str, device: str, tokens: int) -> list[list[int]]:
    """Greedy answers of transformers' ``generate``."""
    model, tokenizer = load_model(target, dtype=dtype, device=device)
    found = []
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        given = torch.tensor([ids], device=model.device)
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--draft", default="head")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help=f"by default each of {', '.join(DTYPES)}")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"prompts": len(PROMPTS), "tokens": args.tokens}
    for dtype in args.dtype or DTYPES:
        own = transformers_own(args.target, dtype, args.device, args.tokens)
        for compiled in ("1", "0"):
            os.environ["BEAGLE_COMPILED"] = compiled
            model = load(args.target, draft=args.draft, dtype=dtype, device=args.device)
            row = check(model, args.tokens)
            row["transformers"] = sum(a == b for a, b in zip(row.pop("plain"), own, strict=True))
            found[f"{dtype}, {'captured' if row.pop('captured') else 'eager'}"] = row
            print(dtype, row, flush=True)
            if args.json:  # at once: what is measured outlives an interruption
                write_json(args.json, found | {"meta": describe(model.target)})


if __name__ == "__main__":
    run_script(main)
