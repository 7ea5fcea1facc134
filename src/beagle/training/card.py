"""A model card for a head, made from the result of its run."""

from __future__ import annotations

from typing import Any

import yaml

from beagle.meta import redact_paths

ON_HUB = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # what our own names are there


def model_card(result: dict[str, Any], repository: str, licence: str | None) -> str:
    """The README.md of a head on the hub.

    Args:
        repository: ``ORG/NAME``.
        licence: as the hub names them, such as ``apache-2.0``; None: not stated.
    """
    from huggingface_hub import ModelCardData

    target = str(result["target"]["name"])
    base = ON_HUB.get(target, target)
    on_hub = base.count("/") == 1 and not base.startswith(("/", "."))
    data = ModelCardData(
        license=licence,
        base_model=base if on_hub else None,
        library_name="beagle-decoding",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "draft-head", "beagle"],
    )
    shown = redact_paths(target)
    command = f"\nThe command:\n\n```sh\n{result['command']}\n```\n" if result.get("command") else ""
    recipe = yaml.safe_dump(
        {"answers": result.get("answers", {}), **result.get("recipe", {})}, sort_keys=False, allow_unicode=True
    )
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(result, shown, licence))
    return f"""---
{data.to_yaml()}
---

# {repository.partition("/")[2]}

A draft head for {shown}. It makes decoding faster and changes no answer: Beagle verifies every drafted token.

```sh
pip install beagle-decoding
beagle generate "Why is the sky blue?" --target {shown} --draft {repository}
```

## How it was made

| what | |
| --- | --- |
{facts}
{command}
The recipe:

```yaml
{recipe}```
"""


def _facts(result: dict[str, Any], target: str, licence: str | None) -> list[tuple[str, str]]:
    recipe, machine = result.get("recipe", {}), result.get("machine", {})
    architecture = recipe.get("head", {}).get("architecture", "beagle")
    own = result["target"]
    return [
        ("target", f"{target}, {own.get('dtype')}{', ' + own['quantize'] if own.get('quantize') else ''}"),
        ("architecture", str(architecture)),
        ("licence", licence or "not stated"),
        ("data", _data(result)),
        (
            "seed",
            f"{recipe.get('train', {}).get('seed')} of the training, {result.get('answers', {}).get('seed')} of the answers",
        ),
        ("started from", str((result.get("init") or {}).get("head", "random weights"))),
        ("training", f"{result.get('steps')} steps, {result.get('train_seconds')} seconds"),
        ("step-α of validation", " ".join(f"{alpha:.3f}" for alpha in result.get("validation_step_alpha", []))),
        ("τ of held-out prompts", _served(result.get("served"))),
        ("machine", str(machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} threads")),
        ("versions", ", ".join(f"{name} {number}" for name, number in result.get("versions", {}).items())),
        ("date", str(result.get("date"))),
    ]


def _served(served: dict[str, Any] | None) -> str:
    if not served:
        return "not measured"
    return f"{served['tau']:.2f} with chains of {served['depth']} ({served['prompts']} prompts)"


def _data(result: dict[str, Any]) -> str:
    sources = {"given": "answers that the dialogues bring", "target": "the target's answers"}
    source = sources.get(result.get("answers", {}).get("source"), "answers")
    prompts = f" to {result['prompts']:,} prompts" if result.get("prompts") else ""
    return f"{source}{prompts}: {result.get('stored_tokens', 0):,} tokens, prompts included"
