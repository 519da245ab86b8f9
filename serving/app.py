"""The server's routes: OpenAI's chat completions, embeddings and image variations, of one VLV."""

import asyncio
import base64
import io
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from vlv.version import __version__

from .batching import Batcher, Closed, Delta, Failed, Finished, Full, Job, Result
from .images import ImageLimits, decode_image, read_image
from .limits import DEADLINE, Limits
from .protocol import (
    MAX_IMAGES,
    UNSUPPORTED_CHAT_FIELDS,
    ChatRequest,
    EmbeddingRequest,
    RequestError,
    choice,
    chunk_choice,
    completion_head,
    refuse_unsupported,
    usage,
)
from .served import Chat, ServedModel, Variation

log = logging.getLogger("vlv.serving")
RETRY_AFTER = "1"  # seconds, in answers 429
MAX_VARIATIONS = 10
IMAGES_AT_ONCE = 8  # of all requests, that are fetched and decoded


@dataclass(frozen=True)
class ServerLimits:
    """How much the server takes on.

    Attributes:
        max_batch: Most captions of a batch, and choices of a request.
        max_waiting: Most requests that wait for a batch; others are answered with 429.
        timeout: Longest time in seconds between the arrival of a request and its answer's end.
        max_body_bytes: Largest body of a request.
        images: What images may be.
        api_keys: Keys of which a request needs one; none lets everybody in.
        max_steps: Most denoising steps of a reconstruction.
    """

    max_batch: int = 16
    max_waiting: int = 512
    timeout: float = 300.0
    max_body_bytes: int = 64 * 2**20
    images: ImageLimits = field(default_factory=ImageLimits)
    api_keys: tuple[str, ...] = ()
    max_steps: int = 100


def build_app(model: ServedModel, limits: ServerLimits) -> Any:
    """The ASGI application. Its thread of computation starts and ends with it."""
    server = Server(model, limits)
    app = FastAPI(title="VLV", version=__version__, lifespan=server.lifespan)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", server.one_model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/embeddings", server.embeddings, methods=["POST"])
    app.add_api_route("/v1/images/variations", server.variations, methods=["POST"])
    app.add_exception_handler(RequestError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    return Limits(app, limits.api_keys, limits.max_body_bytes, limits.timeout)


def _answering(route: Callable[..., Any]) -> Callable[..., Any]:
    """A route whose errors are all of the kind that has an answer."""

    @wraps(route)
    async def answering(server: "Server", *args: Any, **kwargs: Any) -> Any:
        try:
            return await route(server, *args, **kwargs)
        except Exception as error:
            raise _as_request_error(error, server.limits.timeout) from error

    return answering


class Server:
    """The functions of the routes."""

    def __init__(self, model: ServedModel, limits: ServerLimits):
        self.model, self.limits = model, limits
        self.batcher: Batcher
        self.reading = asyncio.Semaphore(IMAGES_AT_ONCE)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batcher = Batcher(self.model.compute, self.limits.max_batch, self.limits.max_waiting)
        yield
        await asyncio.to_thread(self.batcher.close)

    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "waiting": self.batcher.waiting}

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._describe()]}

    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._describe()

    def _describe(self) -> dict[str, Any]:
        return {"id": self.model.name, "object": "model", "created": self.model.created, "owned_by": "vlv"}

    def _check_model(self, name: str) -> None:
        if name != self.model.name:
            raise RequestError(
                f"the model {name!r} is not served here; this server has {self.model.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    @_answering
    async def chat(self, request: ChatRequest, http: Request) -> Any:
        self._check_model(request.model)
        refuse_unsupported(request, UNSUPPORTED_CHAT_FIELDS)
        if (count := request.n or 1) > self.limits.max_batch:
            raise RequestError(f"n is {count}, and this server writes at most {self.limits.max_batch}", "n")
        self._refuse_if_full()
        deadline = http.scope[DEADLINE]
        async with asyncio.timeout_at(deadline):
            pixel_values = [await self._read(url, param) for url, param in _images_of(request)]
            chat = await asyncio.to_thread(self.model.prepare_chat, request, pixel_values)
            job = self._submit("chat", count, chat)
            if request.stream:
                options = request.stream_options
                stream = self._stream(job, chat, deadline, bool(options and options.include_usage))
                return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            choices: dict[int, Finished] = {}
            async with _while_connected(http, job):
                async for event in _events(job):
                    if isinstance(event, Finished):
                        choices[event.index] = event
                    if len(choices) == count:
                        break
        tokens = sum(own.tokens for own in choices.values())
        return completion_head(self.model.name, "chat.completion") | {
            "choices": [choice(index, own.text, own.reason) for index, own in sorted(choices.items())],
            "usage": usage(len(chat.input_ids), tokens),
        }

    async def _stream(self, job: Job, chat: Chat, until: float | None, with_usage: bool) -> AsyncIterator[str]:
        head = completion_head(self.model.name, "chat.completion.chunk")
        unfinished = set(range(job.rows))
        tokens = 0

        def line(*choices: dict[str, Any], **more: Any) -> str:
            more |= {"usage": None} if with_usage and "usage" not in more else {}
            return f"data: {json.dumps(head | {'choices': choices} | more, ensure_ascii=False)}\n\n"

        try:
            for index in range(job.rows):
                yield line(chunk_choice(index, {"role": "assistant", "content": ""}))
            async for event in _events(job, until):
                if isinstance(event, Delta):
                    yield line(chunk_choice(event.index, {"content": event.text}))
                elif isinstance(event, Finished):
                    yield line(chunk_choice(event.index, {}, event.reason))
                    unfinished.discard(event.index)
                    tokens += event.tokens
                if not unfinished:
                    break
            if with_usage:
                yield line(usage=usage(len(chat.input_ids), tokens))
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has been sent already
            yield f"data: {json.dumps(_as_request_error(error, self.limits.timeout).body())}\n\n"
        finally:
            job.cancel()

    @_answering
    async def embeddings(self, request: EmbeddingRequest, http: Request) -> dict[str, Any]:
        self._check_model(request.model)
        self._refuse_if_full()
        if request.dimensions is not None:
            raise RequestError("caption embeddings have a fixed size; leave dimensions out", "dimensions")
        sources = request.sources()
        if len(sources) > MAX_IMAGES:
            raise RequestError(f"input has {len(sources)} images; this server takes {MAX_IMAGES} at once", "input")
        async with asyncio.timeout_at(http.scope[DEADLINE]):
            rows = [await self._read(own, f"input[{index}]") for index, own in enumerate(sources)]
            embeds = await self._result("embeddings", len(rows), torch.cat(rows), http)
        data = await asyncio.to_thread(
            lambda: [_embedding(index, own, request.encoding_format) for index, own in enumerate(embeds)]
        )
        return {
            "object": "list",
            "model": self.model.name,
            "data": data,
            "usage": {"prompt_tokens": embeds.shape[0] * embeds.shape[1], "total_tokens": embeds[..., 0].numel()},
        }

    @_answering
    async def variations(self, http: Request) -> dict[str, Any]:
        if self.model.pipeline is None:
            raise RequestError(
                f"{self.model.name} is served without a text-to-image model, which variations need",
                status=404,
                code="model_not_found",
            )
        self._refuse_if_full()
        try:
            form = await http.form(max_files=1, max_fields=20)
        except (HTTPException, MultiPartException) as error:
            raise RequestError(f"the form cannot be read: {getattr(error, 'detail', error)}") from error
        upload = form.get("image")
        if upload is None or isinstance(upload, str):
            raise RequestError("an image is missing: give a file as the form's field 'image'", "image")
        if isinstance(name := form.get("model"), str):
            self._check_model(name)
        count = int(_number(form, "n", 1, 1, min(MAX_VARIATIONS, self.limits.max_batch), whole=True))
        steps = int(_number(form, "num_inference_steps", 50, 1, self.limits.max_steps, whole=True))
        guidance = _number(form, "guidance_scale", 2.0, 1, 20)
        seed = int(_number(form, "seed", secrets.randbits(62), 0, 2**62, whole=True))
        response_format = form.get("response_format") or "url"
        if response_format not in ("url", "b64_json"):
            raise RequestError(f"response_format is {response_format!r}; expected url or b64_json", "response_format")
        async with asyncio.timeout_at(http.scope[DEADLINE]):
            async with self.reading:
                image = await asyncio.to_thread(decode_image, await upload.read(), self.limits.images, "image")
                pixel_values = await asyncio.to_thread(self.model.preprocess, image)
            seeds = [seed + index for index in range(count)]
            variation = Variation(pixel_values, seeds, guidance, steps)
            images = await self._result(("variation", guidance, steps), count, variation, http)
        encoded = await asyncio.to_thread(lambda: [_png(own) for own in images])
        data = [
            {"b64_json": own} if response_format == "b64_json" else {"url": f"data:image/png;base64,{own}"}
            for own in encoded
        ]
        return {"created": completion_head("", "")["created"], "data": data}

    async def _read(self, url: str, param: str) -> torch.Tensor:
        """Pixel values `(1, 3, height, width)` of the image at a URL. Few images are at full size at once."""
        async with self.reading:
            image = await read_image(url, self.limits.images, param)
            return await asyncio.to_thread(self.model.preprocess, image)

    def _refuse_if_full(self) -> None:
        if self.batcher.waiting >= self.limits.max_waiting:
            raise self._full()

    def _full(self) -> RequestError:
        return RequestError(
            f"{self.limits.max_waiting} requests wait already; try again later", status=429, code="overloaded"
        )

    def _submit(self, key: Any, rows: int, payload: Any) -> Job:
        job = Job(key, rows, payload)
        try:
            self.batcher.submit(job)
        except Full as error:
            raise self._full() from error
        except Closed as error:
            raise RequestError("the server stops", status=503, code="stopping") from error
        return job

    async def _result(self, key: Any, rows: int, payload: Any, http: Request) -> Any:
        job = self._submit(key, rows, payload)
        async with _while_connected(http, job):
            async for event in _events(job):
                if isinstance(event, Result):
                    return event.value
        raise AssertionError("a job without result")


class Disconnected(Exception):
    """The client has gone, so nobody reads an answer."""


@asynccontextmanager
async def _while_connected(http: Request, job: Job) -> AsyncIterator[None]:
    """Cancels the job when the block ends, and ends the block when the client goes."""

    async def watch() -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.1)
        job.cancel()
        job.send(Failed(Disconnected()))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        job.cancel()
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher


async def _events(job: Job, until: float | None = None) -> AsyncIterator[Any]:
    """The events of a job, of which each comes before the time `until` of the loop's clock.

    Raises:
        TimeoutError: If one does not.
        Exception: The error of a job that fails.
    """
    while True:
        async with asyncio.timeout_at(until):
            event = await job.events.get()
        if isinstance(event, Failed):
            raise event.error
        yield event


def _images_of(request: ChatRequest) -> list[tuple[str, str]]:
    """The URLs of the images of a request, and the field that each stands in."""
    found = [
        (part.image_url.url, f"messages[{index}].content[{position}].image_url")
        for index, message in enumerate(request.messages)
        for position, part in enumerate(message.parts())
        if part.type == "image_url"
    ]
    if len(found) > MAX_IMAGES:
        raise RequestError(
            f"the messages have {len(found)} images; this server reads {MAX_IMAGES} at once", "messages"
        )
    return found


def _embedding(index: int, embeds: torch.Tensor, encoding_format: str) -> dict[str, Any]:
    """Caption embeddings `(Q, d_text)` as one list, row by row; `shape` says how to cut it."""
    values = embeds.flatten().numpy().astype("<f4")
    encoded = base64.b64encode(values.tobytes()).decode() if encoding_format == "base64" else values.tolist()
    return {"object": "embedding", "index": index, "embedding": encoded, "shape": list(embeds.shape)}


def _png(image: torch.Tensor) -> str:
    """An image `(3, height, width)` in 0..1 as a PNG file in base64."""
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _number(form: Any, name: str, default: float, low: float, high: float, whole: bool = False) -> float:
    """A number of a form. Raises `RequestError` (400) if it is not one within the bounds."""
    text = form.get(name)
    if text in (None, ""):
        return default
    with suppress(ValueError, TypeError):
        value = int(text) if whole else float(text)
        if low <= value <= high:
            return value
    kind = "whole number" if whole else "number"
    raise RequestError(f"{name} is {str(text)[:40]!r}; expected a {kind} from {low:g} to {high:g}", name)


def _as_request_error(error: Exception, timeout: float) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, TimeoutError):
        return RequestError(
            f"the answer took longer than {timeout:g} s, the most that this server allows", status=504, code="timeout"
        )
    if isinstance(error, Disconnected):
        return RequestError("the client has gone", status=499, code="disconnected")
    log.error("a request failed", exc_info=error)
    return RequestError("the server failed; its log has the reason", status=500, code="internal_error")


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": RETRY_AFTER} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers=headers)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda own: len(own["loc"]))  # the most specific of a union's
    names = [str(part) for part in first["loc"] if part not in ("body", "str") and "[" not in str(part)]
    path = [name for index, name in enumerate(names) if index == 0 or name != names[index - 1]]
    param = ".".join(path) or None
    message = f"{param}: {first['msg']}" if param else f"the body is not valid: {first['msg']}"
    if first["type"] == "json_invalid":
        message, param = f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}", None
    return await _answer_error(request, RequestError(message, param))


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: f"{request.url.path} is not an address of this server; it has /v1/chat/completions, /v1/models, "
        "/v1/embeddings and /v1/images/variations",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return await _answer_error(request, RequestError(message, status=error.status_code))
