"""From the engine's events to OpenAI's answers, whole or as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from beagle.serving.work import Alternative, ChoiceEnd, Delta, Done, Event, Failed, ServeError, TokenLogprob, Work

DONE = b"data: [DONE]\n\n"


def error_body(failure: Failed, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    error_type = {401: "authentication_error", 429: "rate_limit_error", 404: "not_found_error"}.get(
        failure.status, "server_error" if failure.status >= 500 else "invalid_request_error"
    )
    return {"error": {"message": failure.message, "type": error_type, "param": param, "code": failure.code}}


def sse(content: dict[str, Any]) -> bytes:
    """One event. ASCII only: some clients split lines at Unicode's separators too."""
    return b"data: " + json.dumps(content, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


class ServedAnswer(ABC):
    """One request's answer; the two endpoints differ in how they put a choice."""

    object: str
    chunk_object: str
    prefix: str

    def __init__(self, work: Work, model: str, *, drafting: bool, include_usage: bool = False) -> None:
        self.work, self.drafting, self.include_usage = work, drafting, include_usage
        self.id = self.prefix + uuid.uuid4().hex
        self._head = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": None}

    @abstractmethod
    def _choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        """A choice of the whole answer, but for its index and finish reason."""

    def _opening(self) -> dict[str, Any] | None:
        """What a streamed choice begins with."""
        return None

    @abstractmethod
    def _piece(self, delta: Delta) -> dict[str, Any]:
        """What a streamed chunk adds to its choice."""

    @abstractmethod
    def _closing(self) -> dict[str, Any]:
        """What a streamed choice ends with."""

    @staticmethod
    def usage(done: Done) -> dict[str, Any]:
        new = done.stats.tokens
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": done.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        }

    def figures(self, done: Done) -> dict[str, Any]:
        """The extension field: how the drafts were received, over all choices of the request."""
        return {
            "drafting": self.drafting,
            **done.stats.as_dict(),
            "queue_seconds": round(done.queue_seconds, 4),
            "seed": self.work.seed,
            "cut": done.cut,
        }

    async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """All of it at once.

        Raises:
            ServeError: it came to nothing.
        """
        count = self.work.choices
        texts = [""] * count
        logprobs: list[list[TokenLogprob]] = [[] for _ in texts]
        ids: list[list[int]] = [[] for _ in texts]
        reasons = ["stop"] * count
        async for event in events:
            if isinstance(event, Delta):
                texts[event.choice] += event.text
                ids[event.choice] += event.token_ids
                logprobs[event.choice] += event.logprobs or []
            elif isinstance(event, ChoiceEnd):
                reasons[event.choice] = event.reason
            elif isinstance(event, Failed):
                raise ServeError(event)
            else:
                wanted = self.work.top is not None
                choices = [
                    {
                        "index": i,
                        **self._choice(texts[i], logprobs[i] if wanted else None),
                        **self._ids(ids[i]),
                        "finish_reason": reasons[i],
                    }
                    for i in range(count)
                ]
                return {
                    **self._head,
                    "object": self.object,
                    "choices": choices,
                    "usage": self.usage(event),
                    "beagle": self.figures(event),
                }
        raise AssertionError("the events ended without Done or Failed")

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Piece by piece; the last choice's last chunk has the figures of all."""
        opened: set[int] = set()
        closing: bytes | dict[str, Any] | None = None
        async for event in events:
            if isinstance(event, Failed):
                yield sse(error_body(event))
                return
            if closing is not None:
                figures = self.figures(event) if isinstance(event, Done) else None
                yield self._chunk(closing, figures)  # type: ignore[arg-type]
                closing = None
            if isinstance(event, Done):
                if self.include_usage:
                    head = {**self._head, "object": self.chunk_object}
                    yield sse({**head, "choices": [], "usage": self.usage(event)})
                break
            opening = self._opening()
            if opening is not None and event.choice not in opened:
                yield self._chunk({"index": event.choice, **opening, "finish_reason": None})
            opened.add(event.choice)
            if isinstance(event, Delta):
                extension = {"tokens": len(event.token_ids), "drafted": event.drafted, **(event.watched or {})}
                piece = {**self._piece(event), **self._ids(event.token_ids)}
                yield self._chunk({"index": event.choice, **piece, "finish_reason": None}, extension)
            else:
                closing = {"index": event.choice, **self._closing(), "finish_reason": event.reason}
        yield DONE

    def _ids(self, token_ids: list[int]) -> dict[str, Any]:
        """A choice's token ids, the one that ends it among them, where they were asked for (as in vLLM)."""
        return {"token_ids": token_ids} if self.work.return_token_ids else {}

    def _chunk(self, choice: dict[str, Any], extension: dict[str, Any] | None = None) -> bytes:
        content = {**self._head, "object": self.chunk_object, "choices": [choice]}
        if self.include_usage:
            content["usage"] = None
        if extension is not None:
            content["beagle"] = extension
        return sse(content)


class ChatAnswer(ServedAnswer):
    """``chat.completion``, and its chunks."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def _choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def _opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _piece(self, delta: Delta) -> dict[str, Any]:
        return {"delta": {"content": delta.text}, "logprobs": self._logprobs(delta.logprobs)}

    def _closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _logprobs(self, tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if tokens is None:
            return None
        content = [
            {**self._one(t), "top_logprobs": [self._one(other) for other in t.top[: self.work.top]]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    @staticmethod
    def _one(token: TokenLogprob | Alternative) -> dict[str, Any]:
        return {"token": token.token, "logprob": token.logprob, "bytes": list(token.content)}


class CompletionAnswer(ServedAnswer):
    """``text_completion``, whole and in chunks."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"

    def _choice(self, text: str, logprobs: list[TokenLogprob] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(logprobs)}

    def _piece(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text, "logprobs": self._logprobs(delta.logprobs)}

    def _closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
        """OpenAI's four parallel lists."""
        if tokens is None:
            return None
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{o.token: o.logprob for o in t.top} for t in tokens] if self.work.top else None,
            "text_offset": [t.start for t in tokens],
        }
