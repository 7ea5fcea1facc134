"""From text or messages to token ids, through the target's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from beagle.errors import BeagleError
from beagle.targets.target import Target

Message = dict[str, str]


def encode(target: Target, prompt: str | Sequence[Message] | Sequence[int], *, raw: bool = False) -> list[int]:
    """Token ids of a prompt, ready for the model to answer.

    Args:
        prompt: a question, a dialogue of ``{"role", "content"}`` messages, or token ids (kept as they are).
        raw: take the text as it is, without the chat template.
    Raises:
        BeagleError: nothing to answer, or nothing that the tokenizer or its template takes.
    """
    tokenizer: Any = target.tokenizer
    texts = [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt if isinstance(m, dict)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BeagleError("the prompt holds half a surrogate pair, which is no character; leave it out") from error
    if isinstance(prompt, str):
        if not prompt.strip():
            raise BeagleError("the prompt is empty; give some text to answer")
        if raw or not getattr(tokenizer, "chat_template", None):
            return _checked(target, tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if not prompt:
        raise BeagleError("the dialogue is empty; give at least one message")
    if isinstance(prompt[0], int):
        ids = [token for token in prompt if isinstance(token, int) and 0 <= token < target.vocab_size]
        if len(ids) < len(prompt):
            raise BeagleError(f"the prompt holds token ids outside 0 … {target.vocab_size - 1}; encode it again")
        return ids
    if not getattr(tokenizer, "chat_template", None):
        raise BeagleError(f"{target.name}: the tokenizer has no chat template; pass the prompt as plain text")
    try:
        encoded = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # roles in an unknown order, say
        raise BeagleError(f"{target.name}: its chat template refuses this dialogue ({error})") from error
    return _checked(target, encoded["input_ids"])


def _checked(target: Target, ids: Sequence[int]) -> list[int]:
    """
    Raises:
        BeagleError: the tokenizer found nothing in the text, or a token that the model has no embedding of.
    """
    if not ids:
        raise BeagleError(f"{target.name}: its tokenizer finds no token in the prompt; give other text")
    if (largest := max(ids)) >= target.vocab_size:
        raise BeagleError(
            f"{target.name}: its tokenizer makes token {largest} of the prompt, but the model has embeddings of "
            f"{target.vocab_size} tokens only; use the tokenizer that belongs to the model, or another prompt"
        )
    return list(ids)
