"""Requests of OpenAI's API: what is taken, and what is refused because it would change the answer."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from beagle.decoding.sampling_params import SamplingParams

MAX_CHOICES = 16  # answers of one request: prompts times n

Token = Annotated[int, Field(ge=0, le=2**31 - 1)]
Stop = Annotated[str, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]


# fields of other servers' and newer clients' requests that change no answer
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction", "priority",
            "request_id", "parallel_tool_calls"}  # fmt: skip
# values of fields that are not served at which they ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),
    "echo": (False,),
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
}


def explained(value: Any, check: ValidatorFunctionWrapHandler, remedy: str) -> Any:
    """The checked value; where several forms are taken, one message stands for what each of them lacks."""
    try:
        return check(value)
    except ValidationError as error:
        shown = json.dumps(value)
        shown = shown if len(shown) < 60 else f"{shown[:57]}..."
        raise ValueError(f"{shown} is not taken; {remedy}") from error


class Strict(BaseModel):
    """Numbers must be numbers: "5" and true are no 5. A field that is not served is refused unless it asks for nothing."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)
    harmless: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_ignored(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in values.keys() - cls.model_fields.keys() - cls.harmless:
                value, neutral = values[name], NEUTRAL.get(name, ())
                if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
                    raise ValueError(f"'{name}' is not supported by this server; leave it out")
        return values


class Extension(Strict):
    """Our own field of a request, ``beagle``.

    Attributes:
        draft: False decodes plainly.
        top_k: sample among the k likeliest tokens; 0 is off (as the field of this name beside ``temperature``).
        watch: streamed pieces tell each token's draft depth and each pass's draft tree.
    """

    draft: bool = True
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    watch: bool = False


class StreamOptions(Strict):
    harmless = {"include_obfuscation"}
    include_usage: bool = False


class Common(Strict):
    """What both endpoints take."""

    harmless = HARMLESS

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)  # -1 is off too, as in vLLM
    min_p: float | None = Field(None, ge=0, le=1)
    stop_token_ids: Annotated[list[Token], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=1e6)
    logit_bias: Annotated[dict[str, Bias], Field(max_length=4096)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    beagle: Extension = Extension()

    def sampling(self) -> SamplingParams:
        """As the library has it; seed and length are added later."""
        fields: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,  # as the API has it
            "top_k": max(0, (self.beagle.top_k if self.top_k is None else self.top_k) or 0),
            "min_new_tokens": self.min_tokens,
            "max_new_tokens": 2**62,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()},
        }
        for name in (
            "top_p", "min_p", "stop", "stop_token_ids", "ignore_eos",
            "presence_penalty", "frequency_penalty", "repetition_penalty",
        ):  # fmt: skip
            fields[name] = getattr(self, name)
        return SamplingParams(**{name: value for name, value in fields.items() if value is not None})

    @property
    def continues(self) -> bool:
        return False

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @field_validator("stop", mode="wrap")
    @classmethod
    def _stops_have_text(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("a stop string is empty; leave it out")
        return explained(value, check, "give a text, or a list of at most 16")

    @field_validator("logit_bias")
    @classmethod
    def _biases_of_tokens(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or ():
            if not token.isascii() or not token.isdigit() or len(token) > 10 or str(int(token)) != token:
                raise ValueError(f"{token!r} is no token id; give them as in {{'42': -1.5}}")
        return value

    @model_validator(mode="after")
    def _options_of_streams(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed with 'stream': true")
        if self.top_k is not None and self.beagle.top_k is not None:
            raise ValueError("'top_k' is there twice; leave that of 'beagle' out")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message of text; images, audio and tool calls are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @field_validator("content", mode="wrap")
    @classmethod
    def _text_alone(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        if value is None:
            raise ValueError("it is null; send text (tool calls are not supported by this server)")
        if isinstance(value, list):
            for part in value:
                of = part.get("type") if isinstance(part, dict) else type(part).__name__
                if of != "text":
                    raise ValueError(f"parts of type '{of}' are not supported by this server; send text alone")
        return explained(value, check, "send a text, or parts as in [{'type': 'text', 'text': 'hi'}]")

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
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        """Alternatives to report for each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def continues(self) -> bool:
        return bool(self.continue_final_message)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ; send one of them")
        if self.continues and self.add_generation_prompt:
            raise ValueError("'continue_final_message' begins no new message; leave 'add_generation_prompt' out")
        if self.add_generation_prompt is False and not self.continues:
            raise ValueError(
                "'add_generation_prompt' may be false with 'continue_final_message': true alone; leave it out"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs': true")
        return self

    @field_validator("response_format", "modalities")
    @classmethod
    def _text_only(cls, value: Any, info: ValidationInfo) -> Any:
        only = {"type": "text"} if info.field_name == "response_format" else ["text"]
        if value is not None and value != only:
            raise ValueError(f"only {only} is supported by this server")
        return value


class CompletionRequest(Common):
    """``POST /v1/completions``: texts or token ids, continued without a chat template."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _texts_or_tokens(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        return explained(value, check, f"send a text, a list of token ids, or a list of at most {MAX_CHOICES} of these")

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

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionRequest:
        if len(self.prompts) * self.choices > MAX_CHOICES:
            raise ValueError(f"prompts times n is at most {MAX_CHOICES}; send several requests")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("'best_of' is not supported by this server; leave it out")
        return self
