"""What is refused before a request is read: wrong keys, bodies that are too large or too slow."""

import asyncio
import hmac
import json
from typing import Any

from .protocol import RequestError

OPEN_PATHS = ("/health",)
DEADLINE = "vlv.deadline"


class Limits:
    """ASGI middleware that reads the whole body of a request, within limits, before the application sees it.

    Args:
        app: The application.
        api_keys: Keys of which a request needs one, as `Authorization: Bearer KEY`; none lets everybody in.
        max_body_bytes: Largest body.
        timeout: Longest time in seconds from the arrival of a request to the end of its answer. `scope[DEADLINE]` is
            its end, in the time of the event loop.
        max_buffered_bytes: Most bytes of all bodies that have arrived in part.
    """

    def __init__(
        self,
        app: Any,
        api_keys: tuple[str, ...],
        max_body_bytes: int,
        timeout: float,
        max_buffered_bytes: int = 2**30,
    ):
        self.app, self.api_keys, self.timeout = app, api_keys, timeout
        self.max_body_bytes, self.max_buffered_bytes = max_body_bytes, max_buffered_bytes
        self._buffered = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
            body = await self._read(headers, receive, deadline)
        except RequestError as error:
            await _answer(send, error)
            return
        if body is None:  # the client has gone
            return
        scope = {**scope, DEADLINE: deadline}
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        if not self.api_keys:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else b""
        matches = [hmac.compare_digest(given, own.encode()) for own in self.api_keys]  # all, in equal time
        if not any(matches):
            raise RequestError(
                "this server needs its API key, as the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )

    async def _read(self, headers: dict[bytes, bytes], receive: Any, deadline: float) -> bytes | None:
        """The body, or None if the client has gone. Raises `RequestError` for one beyond a limit."""
        too_large = RequestError(
            f"the request has more than {self.max_body_bytes / 2**20:g} MiB, the most that this server takes; make "
            "its images smaller",
            status=413,
            code="request_too_large",
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    body += part
                    self._buffered += len(part)
                    if len(body) > self.max_body_bytes:
                        raise too_large
                    if self._buffered > self.max_buffered_bytes:
                        raise RequestError(
                            "the requests that arrive now are too large together; try again later",
                            status=429,
                            code="overloaded",
                        )
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise RequestError(
                f"the request did not arrive within {self.timeout:g} s", status=408, code="timeout"
            ) from error
        finally:
            self._buffered -= len(body)


async def _answer(send: Any, error: RequestError) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
