"""Runs the server's application with uvicorn until SIGTERM or Ctrl-C."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

GRACE = 30  # seconds that requests have to end after SIGTERM


def serve(app: Any, host: str, port: int, max_connections: int, announce: Callable[[str], None]) -> None:
    """Serves until a signal ends it: no new connections are taken, and the requests that are there are answered.

    Args:
        port: 0 takes a free one.
        max_connections: Further ones are answered with 503.
        announce: Called with `http://host:port` when the server listens.

    Raises:
        OSError: If it cannot listen there.
    """
    config = uvicorn.Config(
        app,
        host=host.strip("[]"),
        port=port,
        log_level="warning",
        access_log=False,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=GRACE,
        lifespan="on",
    )
    server = _AnnouncingServer(config, announce)
    with suppress(KeyboardInterrupt, SystemExit):  # uvicorn raises the signal again after it has stopped
        server.run()
    if not server.started:
        raise OSError(f"the server could not listen on {host} port {port}")


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[str], None]):
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
