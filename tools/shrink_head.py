"""A draft head made smaller: fewer tokens that it can draft, its matrices as int8 on disk, or in parts.

python tools/shrink_head.py runs/mine/head --target smollm2-135m --out heads/mine --int8 \
    --vocabulary 8192 --answers answers/smollm2-135m-instruct

Neither needs training: the weights say what the next hidden state is, and the target's own LM head what tokens it means.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from beagle.drafters.block import Block
from beagle.drafters.checkpoint import kv_layers, load_head, save_head, weight_files
from beagle.errors import run_script
from beagle.meta import command_line, redact_paths
from beagle.targets.loading import load_target
from beagle.training.answer_files import AnswerFolder


def with_fewer_tokens(head: Block, answers: Path, size: int, always: list[int]) -> Block:
    """The same weights, drafting among the ``size`` tokens of its draft vocabulary that these answers use most.

    Args:
        always: tokens that are kept in any case: those that end an answer.
    """
    counts = torch.zeros(head.config.target_vocab_size, dtype=torch.long)
    for answer in AnswerFolder.open(answers).read():
        counts += torch.bincount(answer.tokens, minlength=len(counts))
    counts[always] = counts.max() + 1
    own = head.draft_vocab
    kept = own[counts[own].topk(min(size, len(own))).indices].sort().values
    smaller = type(head)(replace(head.config, draft_vocab_size=len(kept)))
    smaller.load_state_dict({**head.state_dict(), "draft_vocab": kept})
    return smaller


def split(folder: Path, most_mb: float) -> None:
    """Keep the weights in as many files as it takes for none to be larger."""
    whole = folder / "model.safetensors"
    count = math.ceil(whole.stat().st_size / (most_mb * 1e6))
    if count == 1:
        return
    tensors = load_file(whole)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name in sorted(tensors, key=lambda name: -tensors[name].nbytes):  # each to the part that is smallest so far
        min(parts, key=lambda part: sum(t.nbytes for t in part.values()))[name] = tensors[name]
    for number, part in enumerate(parts, 1):
        save_file(part, folder / f"model-{number:05d}-of-{count:05d}.safetensors")
    whole.unlink()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("head", type=Path, help="folder of a draft head")
    parser.add_argument("--target", required=True, help="that it drafts for")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, help="tokens that it can draft, by default as many as before")
    parser.add_argument("--answers", type=Path, help="the target's answers, whose tokens are counted")
    parser.add_argument("--most-mb", type=float, default=20.0, help="of one file of weights; more are kept in parts")
    parser.add_argument("--int8", action="store_true", help="matrices as int8, the rest in bfloat16")
    args = parser.parse_args(words)
    if args.vocabulary and not args.answers:
        parser.error("--vocabulary needs --answers, which say what tokens are frequent")
    target = load_target(args.target, dtype="float32", device="cpu", state_layers=kv_layers(args.head))
    head = load_head(args.head, target)
    if args.vocabulary:
        head = with_fewer_tokens(head, args.answers, args.vocabulary, sorted(target.eos_ids))
    meta = json.loads((args.head / "config.json").read_text(encoding="utf-8")).get("meta", {})
    meta["shrunk"] = command_line("python tools/shrink_head.py", words)
    dtype = torch.int8 if args.int8 else torch.bfloat16
    save_head(head, args.out, target=redact_paths(target.name), dtype=dtype, meta=meta)
    split(args.out, args.most_mb)
    print(
        f"{args.out}: {len(head.draft_vocab)} tokens, {sum(path.stat().st_size for path in weight_files(args.out)) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run_script(main)
