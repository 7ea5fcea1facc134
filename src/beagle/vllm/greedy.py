"""Sampling beside speculation on vLLM's CPU backend: found out, told, refused.

There, vLLM 0.32 spreads each request's temperature over its draft tokens with a kernel that does
nothing on a CPU (vllm-project/vllm#55005), so that sampled answers follow a wrong distribution, with
any drafter. Greedy answers are right.
"""

from __future__ import annotations

import json

import torch
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from beagle.serving.replay import replay

WARNING = (
    "On this backend vLLM samples from a wrong distribution while it speculates (vllm-project/vllm#55005): "
    "use temperature 0 only. The middleware beagle.vllm.greedy.GreedyOnly refuses other requests."
)
REFUSAL = (
    "temperature must be 0: on this backend vLLM samples from a wrong distribution while it speculates "
    "(vllm-project/vllm#55005)"
)


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

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.active = sampling_is_broken()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.active or scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        if asks_to_sample(body):
            error = {"message": REFUSAL, "type": "invalid_request_error", "param": "temperature", "code": None}
            await JSONResponse({"error": error}, 400)(scope, receive, send)
            return
        await self.app(scope, replay(body, receive), send)


def asks_to_sample(body: bytes) -> bool:
    """Whether a request's body names a temperature other than 0; what is no JSON is vLLM's to refuse."""
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
            continue  # vLLM's to refuse
    return False
