"""From text or messages to token ids, through the target's own chat template."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from beagle.errors import BeagleError, first_line
from beagle.targets.target import Target

Message = Mapping[str, Any]
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # around what a chat template takes for generated
ROLES = ("system", "developer", "user", "assistant", "tool")  # besides those that the template names


def encode(
    target: Target,
    prompt: str | Sequence[Message] | Sequence[int],
    *,
    raw: bool = False,
    continue_final_message: bool = False,
) -> list[int]:
    """Token ids of a prompt, ready for the model to answer.

    Args:
        prompt: a question, a dialogue, or token ids (a sequence, 1-D array or tensor; kept as they are). The messages
            of a dialogue are ``{"role", "content"}``; a content is a text or a list of ``{"type": "text", "text"}``
            parts, which are joined. An assistant's ``tool_calls`` go to a chat template that knows them.
        raw: take the text as it is, without the chat template.
        continue_final_message: end inside the dialogue's last message, an assistant's, instead of after it.
    Raises:
        BeagleError: nothing to answer, or nothing that the tokenizer or its template takes.
    """
    tokenizer: Any = target.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(prompt, str):
        _refuse_half_characters(prompt)
        if not prompt.strip():
            raise BeagleError("the prompt is empty; give some text to answer")
        if continue_final_message:
            raise BeagleError("continue_final_message needs a dialogue; give messages, the assistant's last")
        if raw or not template:
            return _checked(target, tokenizer(prompt)["input_ids"])
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping):
        raise BeagleError("the prompt is a dict; put a message into a list, or pass the input_ids of encoded text")
    items = _items(prompt)
    if not items:
        raise BeagleError("the prompt is empty; give at least one message or token id")
    if not isinstance(items[0], Mapping):
        return _token_ids(target, items)
    if raw:
        raise BeagleError("raw takes a text or token ids; leave raw out for a dialogue")
    messages = _messages(target, items)
    if continue_final_message:
        last = messages[-1]
        if last["role"] != "assistant" or not (last["content"] or "").strip():
            raise BeagleError("continue_final_message needs a last message of the assistant with some text")
    options = {"add_generation_prompt": not continue_final_message, "continue_final_message": continue_final_message}
    return _checked(target, _rendered(target, messages, **options)["input_ids"])


def encode_ended(target: Target, dialogue: Sequence[Message]) -> tuple[list[int], list[bool] | None]:
    """Token ids of a dialogue that asks for nothing more.

    Returns:
        The ids, and which of them the template marks as generated; None: it marks none.

    Raises:
        BeagleError: the tokenizer or its template doesn't take it.
    """
    tokenizer: Any = target.tokenizer
    messages = _messages(target, list(dialogue))
    marks = bool(_MARKS.search(str(tokenizer.chat_template))) and tokenizer.is_fast
    encoded = _rendered(target, messages, return_assistant_tokens_mask=marks)
    mask = [bool(token) for token in encoded["assistant_masks"]] if marks else None
    return _checked(target, encoded["input_ids"]), mask


def _messages(target: Target, items: list[Any]) -> list[dict[str, Any]]:
    """A dialogue's messages as its chat template takes them."""
    template = getattr(target.tokenizer, "chat_template", None)
    if not template:
        raise BeagleError(f"{target.name}: the tokenizer has no chat template; pass the prompt as plain text")
    return [_message(f"message {n} of {len(items)}", m, str(template)) for n, m in enumerate(items, 1)]


def _rendered(target: Target, messages: list[dict[str, Any]], **options: Any) -> Any:
    """What the chat template makes of messages, encoded; refuses what it refuses."""
    tokenizer: Any = target.tokenizer
    try:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # roles in an unknown order, say
        raise BeagleError(f"{target.name}: its chat template refuses this dialogue ({first_line(error)})") from error


def _items(prompt: Any) -> list[Any]:
    """The messages or token ids of what isn't a text."""
    dimensions = getattr(prompt, "ndim", 1)
    if dimensions != 1:
        raise BeagleError(f"the prompt has {dimensions} dimensions; pass one prompt's token ids, such as input_ids[0]")
    if hasattr(prompt, "tolist"):  # of torch or numpy
        return list(prompt.tolist())
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise BeagleError(f"the prompt is a {type(prompt).__name__}; give a text, messages or token ids")
    return list(prompt)


def _token_ids(target: Target, items: list[Any]) -> list[int]:
    """Token ids as ints, of whatever integer type they are."""
    ids = []
    for item in items:
        try:
            token = None if isinstance(item, bool) else operator.index(item)
        except (TypeError, ValueError):
            token = None
        if token is None:
            raise BeagleError(
                f"the prompt is a list with {item!r} in it; give a text, a list of messages or a list of token ids"
            )
        if not 0 <= token < target.vocab_size:
            raise BeagleError(
                f"the prompt holds token id {token}; {target.name} has ids from 0 to {target.vocab_size - 1}"
            )
        ids.append(token)
    return ids


def _message(name: str, message: Any, template: str) -> dict[str, Any]:
    """A message as chat templates take it, its content one text."""
    if not isinstance(message, Mapping):
        raise BeagleError(f"{name} is {message!r}; give a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or (role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template):
        raise BeagleError(f"{name} has the role {role!r}; use system, user or assistant")
    if message.get("tool_calls"):
        if "tool_calls" not in template:
            raise BeagleError(f"{name} has tool_calls, which the target's chat template doesn't know; leave them out")
    elif content is None:
        raise BeagleError(f"{name} has no content; give a text")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = "".join(_part(name, part) for part in content)
    if content is not None and not isinstance(content, str):
        raise BeagleError(f"{name} has a {type(content).__name__} as its content; give a text or a list of text parts")
    _refuse_half_characters(content or "")
    return {**message, "role": role, "content": content}


def _part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else part
    if kind != "text":
        raise BeagleError(f"{name} has a content part of type {kind!r}; only text parts can be answered")
    if not isinstance(part.get("text"), str):
        raise BeagleError(f"{name} has a text part without a text")
    return str(part["text"])


def _refuse_half_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BeagleError("the prompt holds half a surrogate pair, which is no character; leave it out") from error


def _checked(target: Target, ids: Sequence[int]) -> list[int]:
    """The ids; refuses none at all, and those that the model has no embedding of."""
    if not ids:
        raise BeagleError(f"{target.name}: its tokenizer finds no token in the prompt; give other text")
    if (largest := max(ids)) >= target.vocab_size:
        raise BeagleError(
            f"{target.name}: its tokenizer makes token {largest} of the prompt, but the model has embeddings of "
            f"{target.vocab_size} tokens only; use the tokenizer that belongs to the model, or another prompt"
        )
    return list(ids)
