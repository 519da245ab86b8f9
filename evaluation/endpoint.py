"""Asks a model behind an OpenAI-compatible endpoint many questions: at once, within a price, resumably."""

import base64
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

KEY_VARIABLE = "OPENAI_API_KEY"
FATAL_STATUS = (401, 403, 404)  # wrong key, no right, no such model: no other request can succeed
INSTALL = "pip install '.[eval]'"


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
        key_variable: The environment variable that holds the key.
        concurrency: Requests at once.
        timeout: Longest time of a request, in seconds.
        max_retries: Times that a request is repeated after 408, 409, 429, 500 and above, and lost connections, with
            the client's growing pauses.
        max_tokens: Most tokens of an answer.
        temperature: Of sampling.
        price_in, price_out: Price of a million tokens of requests and of answers.
        max_price: What may be spent in all; needs the prices.
    """

    model: str
    base_url: str | None = None
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 5
    max_tokens: int = 512
    temperature: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    max_price: float | None = None

    def __post_init__(self):
        if self.max_price is not None and not (self.price_in or self.price_out):
            raise ValueError("max_price needs price_in and price_out, the prices of a million tokens")

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        name: Unique among the questions of a run.
        messages: As in OpenAI's API. Images stand in them as data URIs or URLs.
    """

    name: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What came back. Either `text` or `error` is None.

    Attributes:
        name: The question's.
        finish_reason: Why the text ends, as the endpoint says; `"length"` if it was cut.
    """

    name: str
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Totals:
    """Numbers of a run."""

    answered: int = 0
    kept: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float = 0.0
    problems: list[str] = field(default_factory=list)


class Endpoint:
    """A client of one endpoint with a log of its answers.

    The log is a file of JSON lines. A question that it holds, with the same messages and settings, is not asked again,
    so that an interrupted run goes on where it stopped. Failed questions are asked again.

    Raises:
        ImportError: Without the package `openai`.
        EndpointError: If the key's variable is not set and the endpoint is OpenAI's own.
    """

    def __init__(self, settings: EndpointSettings, log: Path):
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"a model behind an endpoint needs the package openai: {INSTALL}") from error
        self._openai = openai
        self.settings, self.log = settings, log
        self.totals = Totals()
        key = os.environ.get(settings.key_variable)
        if key is None and settings.base_url is None:
            raise EndpointError(
                f"the environment variable {settings.key_variable} is not set; set it to the key of the endpoint, or "
                "give the base_url of one that needs none"
            )
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            timeout=settings.timeout,
            max_retries=settings.max_retries,
        )
        self._lock = threading.Lock()
        _end_last_line(log)
        self._known = {entry["hash"]: entry for entry in _read_log(log) if entry["error"] is None}
        self._largest = 0.0  # price of the dearest answer so far

    def ask(self, questions: Iterable[Question], advance: Callable[[int], None] = lambda done: None) -> list[Answer]:
        """Answers in the order of the questions; those that failed have an `error`.

        Args:
            advance: Called with 1 after each.

        Raises:
            EndpointError: If the endpoint refuses the key or does not have the model. Nothing more is asked then.
            PriceReached: If the next answers could exceed `max_price`.
        """
        answers: dict[str, Answer] = {}
        order: list[str] = []
        running: dict[Future, Question] = {}
        waiting = iter(questions)
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            try:
                for question in self._unknown(waiting, order, answers, advance):
                    self._require_price(len(running) + 1)
                    running[pool.submit(self._ask_one, question)] = question
                    if len(running) >= self.settings.concurrency:
                        self._collect(running, answers, advance)
                while running:
                    self._collect(running, answers, advance)
            except BaseException:
                for future in running:
                    future.cancel()
                with suppress(EndpointError):  # those under way are paid for
                    while running := {future: own for future, own in running.items() if not future.cancelled()}:
                        self._collect(running, answers, advance)
                raise
        return [answers[name] for name in order]

    def _unknown(
        self,
        questions: Iterator[Question],
        order: list[str],
        answers: dict[str, Answer],
        advance: Callable[[int], None],
    ) -> Iterator[Question]:
        """The questions that the log has no answer to; the others are answered."""
        for question in questions:
            if question.name in answers or question.name in order:
                raise ValueError(f"two questions are named {question.name!r}")
            order.append(question.name)
            entry = self._known.get(self._hash(question))
            if entry is None:
                yield question
                continue
            self.totals.kept += 1
            answers[question.name] = Answer(
                **{name: entry[name] for name in Answer.__dataclass_fields__} | {"name": question.name}
            )
            advance(1)

    def _collect(
        self, running: dict[Future, Question], answers: dict[str, Answer], advance: Callable[[int], None]
    ) -> None:
        """Takes the answers that have come; waits for one."""
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            question = running.pop(future)
            answers[question.name] = future.result()
            advance(1)

    def _ask_one(self, question: Question) -> Answer:
        openai, settings = self._openai, self.settings
        try:
            response = self._client.chat.completions.create(
                model=settings.model,
                messages=question.messages,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
            )
        except openai.APIStatusError as error:
            if error.status_code in FATAL_STATUS:
                raise EndpointError(f"the endpoint answers {error.status_code}: {error.message}") from error
            return self._record(question, Answer(question.name, None, f"status {error.status_code}: {error.message}"))
        except openai.APIConnectionError as error:  # also after a time-out
            reason = error.__cause__ or error
            return self._record(question, Answer(question.name, None, f"{error} ({type(reason).__name__})"))
        except (openai.OpenAIError, ValueError) as error:  # an answer that is not JSON
            return self._record(question, Answer(question.name, None, f"the answer cannot be read: {error}"))
        return self._record(question, _read_response(question.name, response))

    def _record(self, question: Question, answer: Answer) -> Answer:
        """Counts an answer and writes it into the log."""
        with self._lock:
            totals = self.totals
            if answer.error is None:
                totals.answered += 1
            else:
                totals.failed += 1
                totals.problems.append(f"{answer.name}: {answer.error}")
            price = self.settings.price(answer.prompt_tokens, answer.completion_tokens)
            self._largest = max(self._largest, price)
            totals.prompt_tokens += answer.prompt_tokens
            totals.completion_tokens += answer.completion_tokens
            totals.price += price
            entry = {"hash": self._hash(question), **asdict(answer)}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return answer

    def _require_price(self, pending: int) -> None:
        """Raises `PriceReached` if `pending` answers at the price of the dearest could exceed the limit."""
        limit = self.settings.max_price
        if limit is None:
            return
        with self._lock:
            expected = self.totals.price + pending * self._largest
        if expected > limit:
            raise PriceReached(
                f"{self.totals.answered} answers cost {self.totals.price:.4f}, and the next could exceed max_price "
                f"{limit:g}; raise it to go on"
            )

    def _hash(self, question: Question) -> str:
        """Of what the answer depends on."""
        asked = {
            "model": self.settings.model,
            "max_tokens": self.settings.max_tokens,
            "temperature": self.settings.temperature,
            "name": question.name,
            "messages": question.messages,
        }
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _read_response(name: str, response: Any) -> Answer:
    """The text of a response. Endpoints differ in what they leave out."""
    usage = getattr(response, "usage", None)
    counts: dict[str, Any] = {key: getattr(usage, key, None) or 0 for key in ("prompt_tokens", "completion_tokens")}
    choices = getattr(response, "choices", None)
    if not choices:
        return Answer(name, None, "the answer has no choices", **counts)
    message = choices[0].message
    text = getattr(message, "content", None)
    if not isinstance(text, str) or not text.strip():
        refusal = getattr(message, "refusal", None)
        return Answer(name, None, f"refused: {refusal}" if refusal else "the answer is empty", **counts)
    return Answer(name, text, finish_reason=choices[0].finish_reason, **counts)


def _read_log(log: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log. A last line that a killed run left unfinished is passed over."""
    if not log.exists():
        return
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.keys() >= {"hash", *Answer.__dataclass_fields__}:
                    yield entry


def _end_last_line(log: Path) -> None:
    """Ends a line that a killed run left unfinished, so that the next entry has a line of its own."""
    if log.exists() and (data := log.read_bytes()) and not data.endswith(b"\n"):
        with log.open("ab") as file:
            file.write(b"\n")


def image_part(data: bytes) -> dict[str, Any]:
    """The bytes of an image file as a part of a message."""
    kind = "png"
    with suppress(OSError), Image.open(io.BytesIO(data)) as image:
        kind = (image.format or kind).lower()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}
