"""What stands before the routes: size and time of a body, the API key, the count of answers."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beagle.serving.answers import error_body
from beagle.serving.replay import replay
from beagle.serving.work import Failed

OPEN = ("/", "/health")  # no key: the page holds no data, and a health check no secret
BODY_SECONDS = 30.0  # a body that trickles in slower than this is refused
DRAINED = 2**26  # bytes of too large a body that are read and dropped, so that its sender gets to read the refusal


class Guard:
    """ASGI middleware, outermost."""

    def __init__(
        self, app: ASGIApp, *, body_limit: int, api_key: str | None, count: Callable[[str, int], None]
    ) -> None:
        self.app, self.body_limit, self.count = app, body_limit, count
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # until an answer begins

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self._body(receive)  # read in any case: its sender reads no answer before
            if not self._allowed(scope):
                message = "the API key is missing or wrong; send 'Authorization: Bearer KEY'"
                await refusal(Failed(401, message, "invalid_api_key"))(scope, receive, counted)
            elif isinstance(body, Failed):
                await refusal(body)(scope, receive, counted)
            elif body is not None:
                await self.app(scope, replay(body, receive), counted)
        except Exception:
            status = 500  # the answer is made further out
            raise
        finally:
            self.count(scope["path"], status)

    def _allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)

    async def _body(self, receive: Receive) -> bytes | Failed | None:
        """The whole body, never more of it in memory than the limit; None if the client went away."""
        too_large = Failed(413, f"the request's body is over {self.body_limit} bytes; send less", "request_too_large")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.body_limit:
                        body += part
                    if size > DRAINED or not message.get("more_body", False):
                        return bytes(body) if size <= self.body_limit else too_large
        except TimeoutError:
            return Failed(408, "the request's body came too slowly", "request_timeout")


def refusal(failure: Failed) -> JSONResponse:
    """An error, before any route is reached."""
    headers = {"www-authenticate": "Bearer"} if failure.status == 401 else {}
    if failure.status in (408, 413):
        headers["connection"] = "close"  # of the body there may be a rest
    return JSONResponse(error_body(failure), failure.status, headers)
