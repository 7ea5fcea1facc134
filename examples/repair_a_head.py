"""Tune a model on a narrow domain with LoRA (peft), and repair the draft head of its base model for it.

    python examples/repair_a_head.py --out runs/repair --tune-seconds 600 --head-seconds 300

The domain is made up here: orders in plain words, answered with a receipt in a fixed form. The tuned model writes that
form, which the base model's head has never seen, so its drafts fit less. `beagle train --init head --adapter FOLDER`
starts from that head, and shows τ on held-out prompts before, after each minute, and at the end.

`--anew-times 6` then trains a head of the same shape from random weights, on six times as many tokens of the same
answers. `OUT/repair.json` holds the figures of all of them.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

import beagle

THINGS = {
    "tea": 3,
    "coffee": 4,
    "bread": 2,
    "soup": 6,
    "salad": 7,
    "rice": 5,
    "fish": 12,
    "cake": 8,
    "juice": 4,
    "fruit": 5,
}
NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon"]
ASKS = [
    "{name} would like {order}.",
    "An order for {name}: {order}.",
    "Please bring {order} to {name}.",
    "{name} takes {order}.",
]
RECIPE = {
    "answers": {"max_prompt_tokens": 160, "max_new_tokens": 160, "max_turns": 1, "sampled_share": 0.25, "rows": 32},
    "train": {
        "early_epochs": 0.4,  # one pass in all, so that the learning rate has fallen when the minutes are over
        "late_epochs": 0.6,
        "window": 3,
        "early_window": 1,
        "steps": 3,
        "batch_tokens": 512,
        "learning_rate": 0.002,
        "warmup_steps": 20,
        "schedule": "cosine",
        "autocast": True,
        "validate_every": 200,
        "checkpoint_every": 200,
    },
}
FROM_RANDOM = {"batch_tokens": 1024, "dropout": 0.1}  # of more passes, which overfit
EARLY_SHARE = 0.6  # of the epochs of a head that is trained anew


def dialogue(chance: random.Random) -> tuple[str, str]:
    """An order and its receipt."""
    name, things = chance.choice(NAMES), chance.sample(sorted(THINGS), chance.randint(2, 4))
    counts = {thing: chance.randint(1, 9) for thing in things}
    order = ", ".join(f"{count} {thing}" for thing, count in counts.items())
    lines = [f"- {thing}: {n} x {THINGS[thing]} = {n * THINGS[thing]} coins" for thing, n in sorted(counts.items())]
    total = sum(n * THINGS[thing] for thing, n in counts.items())
    receipt = "\n".join([f"RECEIPT for {name}", *lines, f"TOTAL: {total} coins", "Paid on delivery. Thank you!"])
    return chance.choice(ASKS).format(name=name, order=order), receipt


def tune(model, tokenizer, pairs: list[tuple[str, str]], seconds: float, folder: Path) -> None:
    """Train a LoRA adapter on the answers for some time, and save it."""
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)
    chance, ends, step = random.Random(0), time.perf_counter() + seconds, 0
    tuned.train()
    while step == 0 or time.perf_counter() < ends:
        rows = []
        for asked, receipt in chance.sample(pairs, 8):
            messages = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            answer = tokenizer(receipt, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            rows.append((prompt + answer, [-100] * len(prompt) + answer))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows], device=model.device)
        labels = torch.tensor([row + [-100] * (longest - len(row)) for _, row in rows], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = tuned(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    tuned.save_pretrained(folder)


def train(given: argparse.Namespace, out: Path, recipe: dict, *options: object) -> dict:
    """Run `beagle train` with a recipe, and read what it says of the head."""
    path = given.out / f"{out.name}.json"
    path.write_text(json.dumps(recipe, indent=1) + "\n")  # JSON is YAML, too
    command = [sys.executable, "-m", "beagle", "train", "--target", given.target, "--adapter", given.out / "adapter"]
    command = [*map(str, [*command, "--config", path, "--out", out, *options])]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return json.loads((out / "result.json").read_text())


def figures(result: dict) -> dict:
    """What is compared of a head's training."""
    return {name: result[name] for name in ("init", "steps", "trained_tokens", "train_seconds", "served")}


def anew(given: argparse.Namespace, repaired: dict) -> dict:
    """Train a head of the same shape from random weights, on the same answers."""
    epochs = (
        given.anew_times * repaired["trained_tokens"] / (repaired["stored_tokens"] * 39 / 40)
    )  # 1 in 40 is held out
    early = round(EARLY_SHARE * epochs, 2)
    settings = {**RECIPE["train"], **FROM_RANDOM, "early_epochs": early, "late_epochs": round(epochs - early, 2)}
    recipe = {**RECIPE, "train": settings, "head": repaired["recipe"]["head"]}
    return train(given, given.out / "anew", recipe, "--data", given.out / "run" / "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--head", default="head", help="to start from, as of --draft")
    parser.add_argument("--dialogues", type=int, default=2000)
    parser.add_argument("--tune-seconds", type=float, default=600.0)
    parser.add_argument("--head-seconds", type=float, default=300.0)
    parser.add_argument(
        "--anew-times", type=float, default=0.0, help="tokens of a head trained anew, over the repair's; 0: none is"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(1)
    pairs = [dialogue(chance) for _ in range(given.dialogues)]
    adapter, prompts = given.out / "adapter", given.out / "prompts.jsonl"
    if not adapter.exists():
        model, tokenizer = beagle.load_model(given.target, dtype="float32")
        tune(model, tokenizer, pairs, given.tune_seconds, adapter)
        del model
    prompts.write_text("".join(json.dumps({"prompt": asked}) + "\n" for asked, _ in pairs))
    options = ["--prompts", prompts, "--init", given.head, "--seconds", given.head_seconds]
    result = train(given, given.out / "run", RECIPE, *options)
    before, after = result["init"]["tau"], result["served"] and result["served"]["tau"]
    print(
        f"τ on held-out prompts of the tuned model: {before} with its base model's head, {after} with the repaired one"
    )
    about = {name: result[name] for name in ("date", "machine", "versions", "revision", "target", "stored_tokens")}
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    about["command"] = shlex.join(["python", "examples/repair_a_head.py", *words])
    about |= {"dialogues": given.dialogues, "before": before, "repaired": figures(result)}
    if given.anew_times:
        other = anew(given, result)
        about["anew"] = figures(other)
        print(
            f"{other['served'] and other['served']['tau']} with one trained anew, on {given.anew_times:g} times the tokens"
        )
    (given.out / "repair.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
