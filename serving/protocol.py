"""Requests and answers of the parts of OpenAI's API that fit a captioner (https://platform.openai.com/docs/api-reference).

Fields that change nothing here, such as `user`, are ignored. Fields that would change the answer and are not supported
are errors.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

MAX_IMAGES = 16
MAX_MESSAGES = 64
MAX_STOP_STRINGS = 16


class RequestError(Exception):
    """An answer in OpenAI's form for errors.

    Args:
        message: What is wrong, what is expected and what to do.
        param: The field of the request.
        status: HTTP status.
        code: A short name that programs read.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow")


class ImageURL(_Request):
    url: str


class TextPart(_Request):
    type: Literal["text"]
    text: str


class ImagePart(_Request):
    type: Literal["image_url"]
    image_url: ImageURL

    @field_validator("image_url", mode="before")
    @classmethod
    def _accept_plain_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None

    def parts(self) -> list[TextPart | ImagePart]:
        """The content as parts."""
        if isinstance(self.content, str):
            return [TextPart(type="text", text=self.content)]
        return self.content or []


class StreamOptions(_Request):
    include_usage: bool = False


StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ChatRequest(_Request):
    """A request to `/v1/chat/completions`. Without `temperature` the answer is the most probable one."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[StopString] | None = Field(None, max_length=MAX_STOP_STRINGS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _accept_one_string(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class EmbeddingRequest(_Request):
    """A request to `/v1/embeddings`: images as data URIs or URLs."""

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def sources(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


# Fields whose meaning this server does not have, and the values that ask for nothing.
UNSUPPORTED_CHAT_FIELDS: dict[str, tuple] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}


def refuse_unsupported(request: _Request, fields: dict[str, tuple]) -> None:
    """Raises a `RequestError` (400) for a field that asks for something that this server does not have."""
    for name, neutral in fields.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise RequestError(f"{name} is not supported by this server; leave it out", name, code="unsupported_value")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Numbers of tokens; those of images are the caption embeddings."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def completion_head(model: str, kind: str) -> dict[str, Any]:
    """What all parts of an answer have in common. `kind` is `chat.completion` or `chat.completion.chunk`."""
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def chunk_choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    """One choice of a part of a streamed answer."""
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def choice(index: int, text: str, finish_reason: str) -> dict[str, Any]:
    """One choice of a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}
