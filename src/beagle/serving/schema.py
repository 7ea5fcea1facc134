"""Requests of OpenAI's API: what is taken, and what is refused because it would change the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 16  # answers of one request: prompts times n

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """Numbers must be numbers: "5" and true are no 5. Unknown fields are ignored, as new clients send new ones."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


class Extension(Strict):
    """Our own field of a request, ``beagle``.

    Attributes:
        draft: False decodes plainly. top_k: sample among the k likeliest tokens; 0 is off.
        watch: streamed pieces tell each token's draft depth and each pass's draft tree.
    """

    draft: bool = True
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    watch: bool = False


class StreamOptions(Strict):
    include_usage: bool = False


class Common(Strict):
    """What both endpoints take."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    beagle: Extension = Extension()
    # these would change the answer: only their neutral values are taken
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @model_validator(mode="after")
    def _only_what_is_supported(self) -> Common:
        refused = [
            name
            for name in ("presence_penalty", "frequency_penalty", "logit_bias", *self._unsupported())
            if getattr(self, name)
        ]
        if refused:
            raise ValueError(f"'{refused[0]}' is not supported by this server; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed with 'stream': true")
        return self

    def _unsupported(self) -> tuple[str, ...]:
        return ()


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of text; images, audio and tool calls are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """As a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def _unsupported(self) -> tuple[str, ...]:
        return ("tools", "functions")

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise ValueError("only {'type': 'text'} is supported by this server")
        return value

    @field_validator("modalities")
    @classmethod
    def _no_audio(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and value != ["text"]:
            raise ValueError("only ['text'] is supported by this server")
        return value

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self


class CompletionRequest(Common):
    """``POST /v1/completions``: texts or token ids, continued without a chat template."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts: Any = [self.prompt] if single else self.prompt
        return list(prompts)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens or 16  # as the API has it

    @property
    def top(self) -> int | None:
        return self.logprobs

    def _unsupported(self) -> tuple[str, ...]:
        return ("suffix", "echo")

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionRequest:
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise ValueError(f"prompts times n is at most {MAX_CHOICES}; send several requests")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("'best_of' is not supported by this server; leave it out")
        return self
