"""Sampling beside speculation on vLLM's CPU backend: found out, told, refused.

There, vLLM 0.32 spreads each request's temperature over its draft tokens with a kernel that does
nothing on a CPU (vllm-project/vllm#55005), so that sampled answers follow a wrong distribution, with
any drafter. Greedy answers are right.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import torch

WARNING = (
    "On this backend vLLM asks_to_sample from a wrong distribution while it speculates (vllm-project/vllm#55005): "
    "use temperature 0 only. The middleware beagle.vllm.greedy.GreedyOnly refuses other requests."
)
REFUSAL = (
    "temperature must be 0: on this backend vLLM asks_to_sample from a wrong distribution while it speculates "
    "(vllm-project/vllm#55005)"
)

ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


def sampling_is_broken() -> bool:
    """Whether vLLM loses temperatures on the way to the draft tokens here: tried out, not looked up."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    if not current_platform.is_cpu():
        return False
    given, ends = torch.tensor([0.3712, 1.6253]), torch.tensor([2, 5], dtype=torch.int32)
    try:
        got = expand_batch_to_tokens(given, ends, 5)
    except TypeError:  # vLLM gives its kernels for CPUs to the processes that run a model; its server is none
        current_platform.register_triton_kernel_overrides()
        got = expand_batch_to_tokens(given, ends, 5)
    return not torch.equal(got, given.repeat_interleave(torch.tensor([2, 3])))


class GreedyOnly:
    """ASGI middleware (vLLM's ``--middleware``): refuses requests that ask to sample, where that is broken.

    The server's default temperature must be 0 (``--override-generation-config '{"temperature": 0}'``).
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.active = sampling_is_broken()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if not self.active or scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages: list[ASGIMessage] = []
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        if asks_to_sample(b"".join(message.get("body", b"") for message in messages)):
            await refuse_sampling(send)
            return
        waiting = iter(messages)

        async def replay() -> ASGIMessage:
            return next(waiting, None) or await receive()

        await self.app(scope, replay, send)


def asks_to_sample(body: bytes) -> bool:
    """Whether a request's body names a temperature other than 0; what is no JSON is vLLM's to refuse_sampling."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    for place in (content, content.get("sampling_params")):
        given = place.get("temperature") if isinstance(place, dict) else None
        if given is None:
            continue
        try:
            if not float(given) <= 0:  # text is a number to vLLM, too
                return True
        except (TypeError, ValueError):
            continue  # vLLM's to refuse_sampling
    return False


async def refuse_sampling(send: Send) -> None:
    """400, in OpenAI's form."""
    error = {"message": REFUSAL, "type": "invalid_request_error", "param": "temperature", "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
