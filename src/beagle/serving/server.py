"""Binding, running and stopping the server."""

from __future__ import annotations

import logging
import math
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from beagle.errors import BeagleError
from beagle.serving.engine import Engine

log = logging.getLogger("beagle.serving")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        BeagleError: the address can't be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BeagleError(f"cannot listen on {host} port {port}: {reason}; choose another host or port") from error


class Server(uvicorn.Server):
    """Stops in bounded time: live requests get the engine's grace, waiting and new ones are refused."""

    should_exit: bool
    force_exit: bool

    def __init__(self, app: FastAPI, engine: Engine, **options: Any) -> None:
        self.engine = engine
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=math.ceil(engine.limits.grace) + 2,
                **options,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops cleanly, the second at once; neither is raised again afterwards."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close()
        await super().shutdown(sockets)


def run(app: FastAPI, engine: Engine, listener: socket.socket) -> None:
    """Serve until a signal; returns when everything has ended."""
    Server(app, engine).run(sockets=[listener])
    if not engine.join(timeout=5):
        log.warning("a pass of the model is still running; leaving it behind")
