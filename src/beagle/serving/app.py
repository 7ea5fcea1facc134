"""The routes: OpenAI's three, health, metrics, and the page."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from beagle.serving.answers import ChatAnswer, CompletionAnswer, ServedAnswer, error_body
from beagle.serving.engine import Engine
from beagle.serving.guard import Guard
from beagle.serving.schema import ChatRequest, CompletionRequest
from beagle.serving.work import Done, Event, Failed, Job, ServeError, Work

PAGE_HEADERS = {
    # the page is one file and asks nobody but this server
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", "/v1/chat/completions", "/v1/completions")


def create_app(engine: Engine, *, name: str, api_key: str | None = None) -> FastAPI:
    """The application over a started engine; ``name`` is the one model it serves."""
    from beagle import __version__

    # no interactive docs: their pages load scripts from elsewhere
    app = FastAPI(title="Beagle", version=__version__, docs_url=None, redoc_url=None)

    def count(path: str, status: int) -> None:
        engine.metrics.requests.labels(path if path in PATHS else "other", status).inc()

    app.add_middleware(Guard, body_limit=engine.limits.body, api_key=api_key, count=count)
    page = (files("beagle.serving") / "page" / "index.html").read_text(encoding="utf-8")
    card = {
        "id": name, "object": "model", "created": 0, "owned_by": "beagle",
        "max_model_len": engine.context, "beagle": {"drafting": engine.model.drafter is not None},
    }  # fmt: skip

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"status": "ok" if engine.healthy else "closing", "live": engine.live, "waiting": engine.waiting}
        return JSONResponse(state, 200 if engine.healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        work = to_work(body, [[message.plain() for message in body.messages]], raw=False)
        return await respond(body, work, ChatAnswer, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        return await respond(body, to_work(body, body.prompts, raw=True), CompletionAnswer, request)

    def check_model(asked: str) -> None:
        if asked != name:
            raise ServeError(
                Failed(404, f"no model of this name; this server has '{name}'", "model_not_found"), "model"
            )

    async def respond(
        body: ChatRequest | CompletionRequest, work: Work, kind: type[ServedAnswer], request: Request
    ) -> Response:
        check_model(body.model)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        drafting = work.draft and engine.model.drafter is not None
        answer = kind(work, name, drafting=drafting, include_usage=include_usage)
        running = Running(engine, work, request.receive)
        headers = {"x-request-id": answer.id}
        try:
            await running.begun()  # errors before the first token have a status of their own
            if body.stream:
                return EventStream(running, answer, headers, engine.limits.seconds)
            return JSONResponse(await answer.whole(running.events()), headers=headers)
        except BaseException:
            running.end()
            raise
        finally:
            if not body.stream:
                running.end()

    install_errors(app)
    return app


def to_work(body: ChatRequest | CompletionRequest, prompts: list[Any], *, raw: bool) -> Work:
    return Work(
        prompts=prompts,
        seed=body.seed if body.seed is not None else secrets.randbits(31),
        raw=raw,
        n=body.choices,
        max_new_tokens=body.token_limit,
        sampling=body.sampling(),
        continues=body.continues,
        draft=body.beagle.draft,
        top=body.top,
        watch=body.beagle.watch and bool(body.stream),
        return_token_ids=bool(body.return_token_ids),
    )


class Running:
    """A request under way: its events as they come, and an eye on the client, who may go away."""

    def __init__(self, engine: Engine, work: Work, receive: Receive) -> None:
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._first: Event | None = None
        loop = asyncio.get_running_loop()

        def send(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        self.job: Job = engine.submit(work, send)
        self._watch = asyncio.create_task(self._until_gone(receive))

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.job.cancel()

    async def begun(self) -> None:
        """Wait for the first event.

        Raises:
            ServeError: it was a failure.
        """
        self._first = await self._queue.get()
        if isinstance(self._first, Failed):
            raise ServeError(self._first)

    async def events(self) -> AsyncIterator[Event]:
        assert self._first is not None
        event = self._first
        yield event
        while not isinstance(event, Done | Failed):
            event = await self._queue.get()
            yield event

    def end(self) -> None:
        """Nobody listens any more, or there is nothing more to hear."""
        self.job.cancel()
        self._watch.cancel()


class EventStream(Response):
    """Server-sent events. A reader too slow to take the answer in its time is dropped."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, answer: ServedAnswer, headers: dict[str, str], seconds: float) -> None:
        self._running, self._answer, self._seconds = running, answer, seconds
        self.status_code, self.background = 200, None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds + 30):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async with aclosing(self._answer.stream(self._running.events())) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return  # the server closes an unfinished answer's connection
        finally:
            self._running.end()


def install_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    def respond(failure: Failed, param: str | None = None, headers: dict[str, str] | None = None) -> Response:
        headers = dict(headers or {})
        if failure.retry_after is not None:
            headers["retry-after"] = str(failure.retry_after)
        # ASCII: a message may quote what is no valid Unicode
        content = json.dumps(error_body(failure, param))
        return Response(content, failure.status, headers=headers, media_type="application/json")

    @app.exception_handler(ServeError)
    async def refused(request: Request, error: ServeError) -> Response:
        return respond(error.failure, error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        what = first["msg"].removeprefix("Value error, ")
        sent = request.headers.get("content-type")
        media = (sent or "").partition(";")[0].strip().lower()
        if media != "application/json" and not media.endswith("+json"):
            field, what = "", f"the body's Content-Type is {sent!r}; send 'Content-Type: application/json'"
        elif first["type"] == "json_invalid":
            field, what = "", f"the body is no valid JSON ({first.get('ctx', {}).get('error', what)})"
        elif not field and first["type"] in ("missing", "model_attributes_type", "dict_type", "model_type"):
            what = 'the body is no JSON object; send one as in {"model": ...}'
        named = re.match(r"'(\w+)'", what)
        param = field or (named[1] if named else None)
        return respond(Failed(400, f"{field}: {what}" if field else what), param)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return respond(Failed(error.status_code, message), headers=dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return respond(Failed(500, "the server failed; its log says why"))
