"""Asks a model behind an OpenAI-compatible endpoint many questions: at once, within a price, resumably."""

import base64
import hashlib
import io
import ipaddress
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from PIL import ExifTags, Image

from vlv.processing_vlv import to_rgb

from .answer_log import EMPTY, REFUSED, Answer, AnswerLog, JsonLines

KEY_VARIABLE = "OPENAI_API_KEY"
OPENAI_HOST = "api.openai.com"
ENDPOINT_FORMATS = ("png", "jpeg", "gif", "webp")
UPRIGHT = 1  # the EXIF orientation of an image that needs no turning
JPEG_SETTINGS: dict[str, Any] = {"quality": 95, "subsampling": 0}  # of an image that is turned and encoded again
FATAL_STATUS = (401, 402, 403, 404)  # wrong key, no credit, no right, no such model: no other request can succeed
FATAL_CODES = ("insufficient_quota", "billing_hard_limit_reached")
INSTALL = "pip install '.[eval]', or '.[data]' for vlv data"
GRACE = 5.0  # seconds that a run which ends early waits for requests under way
NO_USAGE = (
    "so what is spent is not known and max_price cannot be kept; leave max_price out, or use an endpoint that reports "
    "usage, with another output_dir"
)


class EndpointError(Exception):
    """The endpoint cannot be used, so no question is worth asking."""


class PriceReached(Exception):
    """The next answer could cost more than may be spent. What was answered is on disk."""


@dataclass(frozen=True)
class EndpointSettings:
    """A model behind an endpoint, and how it is asked.

    Attributes:
        model: Its name there.
        base_url: Address, such as `http://127.0.0.1:8000/v1`; by default the `openai` client's.
        key_variable: The environment variable that holds the key; by default `OPENAI_API_KEY` for OpenAI's host, and
            no key for another.
        concurrency: Requests at once.
        timeout: Longest time of a request, in seconds.
        max_retries: Times that a request is repeated after 408, 409, 429, 500 and above, and lost connections, with
            the client's growing pauses.
        max_tokens: Most tokens of an answer.
        temperature: Of sampling.
        price_in, price_out: Price of a million tokens of requests and of answers.
        max_price: What may be spent in all, the answers in the log included; above 0, needs the prices. The next
            answers are taken to cost as much as the most expensive one so far, and the first is asked alone.
        max_failures: After so many failures without a reply of the model between them the endpoint counts as out of
            order; None for no limit.

    Raises:
        ValueError: For `max_price` without prices, or not above 0, and for an address with a user name.
    """

    model: str
    base_url: str | None = None
    key_variable: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5
    max_tokens: int = 512
    temperature: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_price: float | None = None
    max_failures: int | None = None

    def __post_init__(self):
        if self.max_price is not None and not (self.price_in or self.price_out):
            raise ValueError("max_price needs price_in and price_out, the prices of a million tokens")
        if self.max_price is not None and self.max_price <= 0:
            raise ValueError(f"max_price is {self.max_price:g}; it must be above 0")
        if self.base_url is not None and (address := urlsplit(self.base_url)).username is not None:
            raise ValueError(
                f"the address of the endpoint at {address.hostname} has a user name or password; leave them out, and "
                "put its key into the environment variable that key_variable names"
            )

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass
class EndpointOptions:
    """How a configuration sets the client of an endpoint, whatever the model behind it."""

    key_variable: str | None = field(
        default=None,
        metadata={"help": f"environment variable with the key (default: {KEY_VARIABLE} at OpenAI, elsewhere no key)"},
    )
    concurrency: int = field(default=8, metadata={"help": "requests at once"})
    timeout: float = field(default=120.0, metadata={"help": "longest request, in seconds"})
    max_retries: int = field(default=5, metadata={"help": "repeats after 429, 500 and lost connections"})
    temperature: float = field(default=0.0, metadata={"help": "of sampling, at an endpoint"})
    price_in: float = field(default=0.0, metadata={"help": "price of a million tokens of requests"})
    price_out: float = field(default=0.0, metadata={"help": "price of a million tokens of answers"})
    max_price: float | None = field(
        default=None, metadata={"help": "what all runs of output_dir may spend; a run stops before it"}
    )

    def options(self) -> dict[str, Any]:
        """These settings, as `EndpointSettings` takes them."""
        return {own.name: getattr(self, own.name) for own in fields(EndpointOptions)}


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        name: Unique among the questions of a run.
        messages: As in OpenAI's API. Images stand in them as data URIs or URLs.
        can_be_empty: Whether an empty text is an answer, as an empty caption is. Otherwise it is an error.
        key: Says which questions are the same to the log, besides model and sampling. By default those of one name,
            one address of the endpoint and the same messages.
    """

    name: str
    messages: list[dict[str, Any]]
    can_be_empty: bool = False
    key: str | None = None


@dataclass
class Totals:
    """Numbers of a run and of its log.

    Attributes:
        answered, failed: Questions that this run has asked, by how they ended.
        kept: Questions of this run whose answers the log held.
        prompt_tokens, completion_tokens, price: Of every answer in the log, failed ones and those of earlier runs
            included, at the prices of this run. Repeats within a request (`max_retries`) are not counted.
        problems: The errors of `failed`.
    """

    answered: int = 0
    kept: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float = 0.0
    problems: list[str] = field(default_factory=list)


def find_key(settings: EndpointSettings) -> str | None:
    """The key that an endpoint is sent; None for none.

    A key goes to the endpoint that it is meant for: `OPENAI_API_KEY` to OpenAI's host, and to the address in
    `OPENAI_BASE_URL`; to other hosts the key in `key_variable`, if that is given.

    Raises:
        EndpointError: If the variable is not set and the endpoint is on another computer, or the key would go there
            unencrypted.
    """
    base_url = settings.base_url or os.environ.get("OPENAI_BASE_URL") or f"https://{OPENAI_HOST}/v1"
    address = urlsplit(base_url)
    host = address.hostname or ""
    variable = settings.key_variable or (KEY_VARIABLE if is_openai(settings.base_url) else None)
    if variable is None:
        return None
    key = os.environ.get(variable)
    if key is None and settings.key_variable is not None and _is_loopback(host):
        return None
    if key is None:
        raise EndpointError(
            f"the environment variable {variable} is not set; set it to the key of the endpoint, or "
            + (
                "give the base_url of one that needs none"
                if settings.key_variable is None
                else "leave key_variable out"
            )
        )
    if address.scheme != "https" and not _is_loopback(host):
        raise EndpointError(
            f"the key in {variable} would go to {host} unencrypted; give an https address, or leave key_variable out"
        )
    return key


def is_openai(base_url: str | None) -> bool:
    """Whether an address is OpenAI's; None is the `openai` client's own."""
    host = None if base_url is None else urlsplit(base_url).hostname or ""
    return host is None or host == OPENAI_HOST or host.endswith(f".{OPENAI_HOST}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class Endpoint:
    """A client of one endpoint with a log of its answers.

    A question that the log holds, with the same messages and settings, is not asked again, so that an interrupted run
    goes on where it stopped. Failed questions are asked again.

    Args:
        log: A file of JSON lines, or another log.

    Raises:
        ImportError: Without the package `openai`.
        EndpointError: As `find_key`, or if `max_price` is set and the log has answers without tokens.
    """

    def __init__(self, settings: EndpointSettings, log: Path | AnswerLog):
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"a model behind an endpoint needs the package openai: {INSTALL}") from error
        self._openai = openai
        self.settings = settings
        self.log: AnswerLog = JsonLines(log) if isinstance(log, Path) else log
        self.totals = Totals()
        key = find_key(settings)
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )
        self._lock = threading.Lock()
        self._highest = 0.0  # the price of the most expensive answer so far; 0 if none is known
        self._failures = 0  # since the last reply of the model
        for answer in self.log.read():
            self._count(answer)
            if self._lacks_price(answer):
                raise EndpointError(f"{self.log.path} has answers without their tokens, {NO_USAGE}")

    def ask(self, questions: Iterable[Question], advance: Callable[[int], None] = lambda done: None) -> list[Answer]:
        """Answers in the order of the questions; those that failed have an `error`.

        Args:
            advance: Called with 1 after each.

        Raises:
            EndpointError: If the endpoint refuses the key, does not have the model, has failed `max_failures` times in
                a row, or `max_price` is set and it does not report usage. Nothing more is asked then.
            PriceReached: If the next answer could exceed `max_price`.
        """
        answers: dict[str, Answer | None] = {}  # None: asked, or to be asked
        running: dict[Future, Question] = {}
        try:
            for question in self._unknown(questions, answers, advance):
                self._require_price(running, answers, advance)
                running[self._start(question)] = question
                if len(running) >= self.settings.concurrency:
                    self._collect(running, answers, advance)
            while running:
                self._collect(running, answers, advance)
        except BaseException:
            wait(running, GRACE)  # they are paid for; each writes its answer into the log
            raise
        return [answer for answer in answers.values() if answer is not None]

    def find(self, question: Question) -> Answer | None:
        """The answer in the log, or None."""
        with self._lock:
            answer = self.log.find(self._hash(question))
        return None if answer is None else replace(answer, name=question.name)

    def _unknown(
        self,
        questions: Iterable[Question],
        answers: dict[str, Answer | None],
        advance: Callable[[int], None],
    ) -> Iterator[Question]:
        """The questions that the log has no answer to; the others are answered."""
        for question in questions:
            if question.name in answers:
                raise ValueError(f"two questions are named {question.name!r}")
            answers[question.name] = None
            known = self.find(question)
            if known is None:
                yield question
                continue
            self.totals.kept += 1
            answers[question.name] = known
            advance(1)

    def _collect(
        self, running: dict[Future, Question], answers: dict[str, Answer | None], advance: Callable[[int], None]
    ) -> None:
        """Takes the answers that have come; waits for one."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            question = running.pop(future)
            answer = answers[question.name] = future.result()
            advance(1)
            self._failures = 0 if answer.is_reply else self._failures + 1
            if self._failures == self.settings.max_failures:
                raise EndpointError(f"the last {self._failures} requests failed, the last one with: {answer.error}")

    def _start(self, question: Question) -> Future:
        """Asks in a thread of its own, which does not keep an interrupted program from ending."""
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(self._ask_one(question))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _ask_one(self, question: Question) -> Answer:
        openai, settings = self._openai, self.settings
        began = perf_counter()

        def record(answer: Answer) -> Answer:
            return self._record(question, replace(answer, seconds=round(perf_counter() - began, 3)))

        try:
            response = self._client.chat.completions.create(
                model=settings.model,
                messages=question.messages,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
            )
        except openai.APIStatusError as error:
            if error.status_code in FATAL_STATUS or error.code in FATAL_CODES:
                raise EndpointError(f"the endpoint answers {error.status_code}: {error.message}") from error
            return record(Answer(question.name, None, f"status {error.status_code}: {error.message}"))
        except openai.APIConnectionError as error:  # also after a time-out
            reason = error.__cause__ or error
            return record(Answer(question.name, None, f"{error} ({type(reason).__name__})"))
        except (openai.OpenAIError, ValueError) as error:  # an answer that is not JSON
            return record(Answer(question.name, None, f"the answer cannot be read: {error}"))
        answer = record(_read_response(question, response))
        if self._lacks_price(answer):
            raise EndpointError(f"the endpoint does not report usage, the tokens of an answer, {NO_USAGE}")
        return answer

    def _record(self, question: Question, answer: Answer) -> Answer:
        """Counts an answer and writes it into the log."""
        with self._lock:
            totals = self.totals
            if answer.error is None:
                totals.answered += 1
            else:
                totals.failed += 1
                totals.problems.append(f"{answer.name}: {answer.error}")
            self._count(answer)
            self.log.add(self._hash(question), answer)
        return answer

    def _count(self, answer: Answer) -> None:
        """Adds the tokens and the price of an answer."""
        price = self.settings.price(answer.prompt_tokens, answer.completion_tokens)
        self._highest = max(self._highest, price)
        self.totals.prompt_tokens += answer.prompt_tokens
        self.totals.completion_tokens += answer.completion_tokens
        self.totals.price += price

    def _lacks_price(self, answer: Answer) -> bool:
        """Whether an answer has no price although `max_price` needs it."""
        price = self.settings.price(answer.prompt_tokens, answer.completion_tokens)
        return self.settings.max_price is not None and answer.error is None and price == 0

    def _require_price(
        self, running: dict[Future, Question], answers: dict[str, Answer | None], advance: Callable[[int], None]
    ) -> None:
        """Waits for running requests until one more cannot exceed the limit.

        Raises:
            PriceReached: If it could, and no request runs.
        """
        while not self._allows(len(running) + 1):
            if not running:
                raise PriceReached(
                    f"the answers in {self.log.path} cost {self.totals.price:.4f}, and the next could exceed "
                    f"max_price {self.settings.max_price:g}; raise it to go on"
                )
            self._collect(running, answers, advance)

    def _allows(self, pending: int) -> bool:
        """Whether `pending` requests at the highest price so far keep the limit; one alone while no price is known."""
        limit = self.settings.max_price
        if limit is None:
            return True
        with self._lock:
            if self._highest == 0:
                return pending == 1
            return self.totals.price + pending * self._highest <= limit

    def _hash(self, question: Question) -> str:
        """Of what the answer depends on."""
        settings = self.settings
        asked: dict[str, Any] = {
            "model": settings.model,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        if question.key is not None:
            asked["key"] = question.key
        else:
            address = settings.base_url and settings.base_url.rstrip("/")
            asked |= {"base_url": address, "name": question.name, "messages": question.messages}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_response(question: Question, response: Any) -> Answer:
    """The text of a response. Endpoints differ in what they leave out, and the client does not check types."""
    name = question.name
    usage = getattr(response, "usage", None)
    counts: dict[str, Any] = {
        key: number if isinstance(number := getattr(usage, key, None), int) and number > 0 else 0
        for key in ("prompt_tokens", "completion_tokens")
    }
    choices = getattr(response, "choices", None)
    if not choices:
        return Answer(name, None, "the answer has no choices", **counts)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) else None
    if message is None:
        return Answer(name, None, f"the answer's choices cannot be read: {choices!r:.200}", **counts)
    text, reason = getattr(message, "content", None), getattr(choices[0], "finish_reason", None)
    if not isinstance(text, str) or not text.strip():
        refusal = getattr(message, "refusal", None)
        if refusal or not question.can_be_empty:
            return Answer(name, None, f"{REFUSED}{refusal}" if refusal else EMPTY, **counts)
        text = ""
    return Answer(name, text, finish_reason=reason if isinstance(reason, str) else None, **counts)


def image_part(data: bytes) -> dict[str, Any]:
    """The bytes of an image file as a part of a message: upright, in a format that endpoints take.

    Not every endpoint applies an EXIF orientation, so an image that has one is turned and encoded again, as JPEG if it
    was one. Formats that endpoints do not take become PNG.
    """
    kind, orientation = "png", UPRIGHT
    with suppress(OSError), Image.open(io.BytesIO(data)) as image:
        kind = (image.format or kind).lower()
        with suppress(Exception):  # EXIF that cannot be parsed counts for nothing, as in `to_rgb`
            orientation = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    if kind == "mpo":  # a JPEG file with more pictures, such as phones write; its first is an ordinary JPEG
        kind = "jpeg"
    if kind not in ENDPOINT_FORMATS or orientation != UPRIGHT:
        with suppress(ValueError):  # of a damaged image, which the endpoint refuses
            picture, file = to_rgb(data), io.BytesIO()
            kind = "jpeg" if kind == "jpeg" else "png"
            picture.save(file, kind, **(JPEG_SETTINGS if kind == "jpeg" else {}))
            data = file.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}
