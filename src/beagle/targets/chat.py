"""From text or messages to token ids, through the target's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from beagle.errors import BeagleError
from beagle.targets.target import Target

Message = dict[str, str]


def encode(target: Target, prompt: str | Sequence[Message], *, raw: bool = False) -> list[int]:
    """Token ids of a prompt, ready for the model to answer.

    Args:
        prompt: a question, or a dialogue of ``{"role", "content"}`` messages.
        raw: take the text as it is, without the chat template.
    Raises:
        BeagleError: nothing to answer.
    """
    tokenizer: Any = target.tokenizer
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BeagleError("the prompt is empty; give some text to answer")
        if raw or not getattr(tokenizer, "chat_template", None):
            return list(tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise BeagleError("the dialogue is empty; give at least one message")
    if not getattr(tokenizer, "chat_template", None):
        raise BeagleError(f"{target.name}: the tokenizer has no chat template; pass the prompt as plain text")
    return list(tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"])
