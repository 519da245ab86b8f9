"""Captions images by a vision model behind an OpenAI-compatible endpoint, within a price, as pairs for stage 2."""

import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlv.evaluation.endpoint import (
    Answer,
    Endpoint,
    EndpointError,
    EndpointSettings,
    PriceReached,
    Question,
    image_part,
)
from vlv.files import to_json
from vlv.processing_vlv import to_rgb

from .answers import CAPTIONED, FAILED, STATUSES, UNREADABLE, Checked, check_answer
from .records import Records, file_of, list_entry, reason_of
from .run import Run

BLOCK = 256
"""Images whose answers share a log. It bounds memory, whatever the number of images."""
TOKENS = ("prompt_tokens", "completion_tokens")
DEFAULT_PROMPT = (
    "You are a perceptive visual assistant. Describe the image exhaustively: the scene, all objects and where they "
    "are relative to each other, people and animals with their looks, clothes, expressions and poses, colours, "
    "textures, lighting, shadows, actions and mood. Say only what is visible and infer nothing beyond it. Write the "
    "description alone, in one paragraph without line breaks."
)
"""Asks for what the prompt in appendix A of the paper asks for."""


@dataclass(frozen=True)
class Recaptioning:
    """How a teacher is asked.

    Attributes:
        settings: The endpoint; `max_price` holds for all runs of an output together.
        prompt: What is asked of each image.
        max_side: Longer images are made smaller to this longer side, in pixels; None sends every file as it is.
        min_words: Shorter answers are malformed.
        requests_per_minute: New requests are started at this rate at most; repeats within the client are not counted.
        passes: Times that failed questions are asked in a run, each with the client's repeats.
    """

    settings: EndpointSettings
    prompt: str = DEFAULT_PROMPT
    max_side: int | None = 1024
    min_words: int = 3
    requests_per_minute: float | None = None
    passes: int = 2

    def options(self) -> dict[str, Any]:
        """What captions depend on."""
        settings = self.settings
        asked: dict[str, Any] = {
            "base_url": settings.base_url,
            "model": settings.model,
            "max_tokens": settings.max_tokens,
        }
        asked |= {"temperature": settings.temperature, "prompt": self.prompt, "max_side": self.max_side}
        return asked | {"min_words": self.min_words}


class Stopped(Exception):
    """The run cannot go on. The captions so far are in the output, and the same command goes on with the others."""


def recaption(
    records: Records,
    output: str | os.PathLike,
    how: Recaptioning,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes a list of `{"file_name": path from the output's folder, "caption": text}`, which stage 2 reads.

    Beside it, `NAME.rejected.jsonl` has the other images, each with `status` (`refused`, `malformed`, `failed`,
    `unreadable`), `reason` and `text`. Every answer is written when it comes, so that none is paid for twice. While
    images are `failed`, the manifest is not complete, and the same command asks for them again.

    Args:
        output: The `.jsonl` file.
        overwrite: Replaces the output of another run.
        advance: Called with numbers of images.

    Returns:
        The counts of the manifest: images by status, tokens and price; None if an earlier run has done the same.

    Raises:
        ImportError: Without the package `openai`.
        Stopped: If the endpoint cannot be used, or the next answer could exceed `max_price`.
        ValueError: If the output is of another run.
        OSError: If it cannot be written.
    """
    output = Path(output)
    with Run("recaption", output, records.identity(), how.options(), overwrite=overwrite) as run:
        if run.finished:
            return None
        asking = _Asking(run, records, how)
        try:
            for first in range(0, len(records), BLOCK):
                asking.ask_block(first, advance)
        except (KeyboardInterrupt, SystemExit):
            asking.write()
            raise
        except (EndpointError, PriceReached) as error:
            asking.write()
            raise Stopped(f"{error}. {asking.counts[CAPTIONED]} captions are in {output}") from error
        outputs = asking.write()
        counts = asking.as_dict()
        if not counts[FAILED]:
            run.finish(outputs, counts)
    return counts


def estimate(records: Records, output: str | os.PathLike, how: Recaptioning, images: int = 4) -> dict[str, Any]:
    """Asks for the first images and says what all would cost. The answers count for `recaption` of the same output.

    Returns:
        `asked`, `images`, mean `prompt_tokens` and `completion_tokens` of an image, and the `price` of all.

    Raises:
        Stopped: If no answer comes. Other errors are those of `recaption`.
    """
    with Run("recaption", output, records.identity(), how.options()) as run:
        if run.finished:
            raise Stopped(f"{output} is complete; its manifest has what was spent")
        asking = _Asking(run, records, how)
        try:
            endpoint = asking.open(0)
            answers = asking.ask_some(endpoint, range(min(images, BLOCK, len(records))))
        except (EndpointError, PriceReached) as error:
            raise Stopped(str(error)) from error
    answered = [answer for answer in answers if answer.error is None]
    if not answered:
        raise Stopped("no answer to estimate by: " + "; ".join(str(answer.error) for answer in answers))
    tokens = [sum(getattr(answer, name) for answer in answered) / len(answered) for name in TOKENS]
    price = len(records) * how.settings.price(*tokens)  # type: ignore[arg-type]
    return {"asked": len(answered), "images": len(records), **dict(zip(TOKENS, tokens, strict=True)), "price": price}


class _Asking:
    """Asks block by block, and knows what was spent."""

    def __init__(self, run: Run, records: Records, how: Recaptioning):
        self.run, self.records, self.how = run, records, how
        self.counts: Counter[str] = Counter(dict.fromkeys(STATUSES, 0))
        self._spent = Counter(dict.fromkeys(TOKENS, 0))
        self._price, self._highest, self._next = 0.0, 0.0, time.monotonic()

    def ask_block(self, first: int, advance: Callable[[int], None]) -> None:
        """Asks for the images of a block that have no answer yet, and records the block.

        Raises:
            EndpointError, PriceReached: As `Endpoint.ask`; what was answered is recorded.
        """
        path = self.run.progress / f"block-{first:09d}.json"
        numbers = range(first, min(first + BLOCK, len(self.records)))
        known = json.loads(path.read_bytes()) if path.exists() else {"entries": [None] * len(numbers)}
        entries: dict[int, Any] = dict(zip(numbers, known["entries"], strict=True))
        pending = [number for number, entry in entries.items() if entry is None or entry.get("status") == FAILED]
        advance(len(numbers) - len(pending))
        if not pending:
            self._add(known)
            return
        stop: Exception | None = None
        try:
            for number in range(self.how.passes):
                endpoint = self.open(first)
                checked = self._ask(endpoint, pending, advance if number == 0 else lambda done: None)
                entries |= {number: self._entry(number, own) for number, own in checked.items()}
                pending = [number for number in pending if entries[number].get("status") == FAILED]
                if not pending:
                    break
        except (EndpointError, PriceReached) as error:
            stop = error
            endpoint = self.open(first, to_read=True)
            found = dict(self._found(endpoint, pending))
            checked = {number: self._check(found.get(number)) for number in pending}
            entries |= {number: self._entry(number, own) for number, own in checked.items()}
        totals = endpoint.totals
        block: dict[str, Any] = {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens}
        block |= {"price": totals.price, "highest": endpoint.highest_price, "entries": list(entries.values())}
        self.run.write(path, to_json(block, None))
        self._add(block)
        if stop is not None:
            raise stop

    def open(self, first: int, to_read: bool = False) -> Endpoint:
        """The endpoint with the log of a block, and what of the price is left for it.

        Raises:
            PriceReached: If nothing is left.
        """
        settings, log = self.how.settings, self.run.progress / f"answers-{first:09d}.jsonl"
        if to_read:
            return Endpoint(replace(settings, max_price=None), log)
        if settings.max_price is not None:
            if self._price >= settings.max_price:
                raise PriceReached(
                    f"the answers so far cost {self._price:.4f}, and max_price is {settings.max_price:g}"
                )
            settings = replace(settings, max_price=settings.max_price - self._price)
        return Endpoint(settings, log, self._highest)

    def ask_some(self, endpoint: Endpoint, numbers: Sequence[int]) -> list[Answer]:
        """The answers for some images of a block, which its log keeps."""
        return endpoint.ask(self._questions(numbers, {}, endpoint))

    def _ask(self, endpoint: Endpoint, numbers: Sequence[int], advance: Callable[[int], None]) -> dict[int, Checked]:
        unreadable: dict[int, str] = {}
        answers = endpoint.ask(self._questions(numbers, unreadable, endpoint), advance)
        advance(len(unreadable))
        checked = {int(answer.name): self._check(answer) for answer in answers}
        return checked | {number: Checked(UNREADABLE, "", reason) for number, reason in unreadable.items()}

    def _found(self, endpoint: Endpoint, numbers: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """The answers that the log holds."""
        for question in self._questions(numbers, {}):
            answer = endpoint.find(question)
            if answer is not None:
                yield int(question.name), answer

    def _check(self, answer: Answer | None) -> Checked:
        return Checked(FAILED, "", "not asked") if answer is None else check_answer(answer, self.how.min_words)

    def _entry(self, number: int, own: Checked) -> dict[str, Any]:
        """The line of an image in one of the two lists."""
        record = self.records.read_or_reason(number)
        place = {"file_name": list_entry(self.records, record, number, self.run.folder)["file_name"]}
        if own.status == CAPTIONED:
            return place | {"caption": own.text}
        return place | {"status": own.status, "reason": own.reason, "text": own.text}

    def _add(self, block: Mapping[str, Any]) -> None:
        self.counts.update(entry.get("status", CAPTIONED) for entry in block["entries"])
        self._spent.update({name: block[name] for name in self._spent})
        self._price += block["price"]
        self._highest = max(self._highest, block["highest"])

    def _questions(
        self, numbers: Iterable[int], unreadable: dict[int, str], paced_for: Endpoint | None = None
    ) -> Iterator[Question]:
        """A question for each image that can be read; `unreadable` is told why others cannot."""
        for number in numbers:
            record = self.records.read_or_reason(number)
            try:
                image = _shrink(file_of(record.image), self.how.max_side)
            except (OSError, ValueError) as error:
                unreadable[number] = reason_of(error)
                continue
            content = [image_part(image), {"type": "text", "text": self.how.prompt}]
            question = Question(str(number), [{"role": "user", "content": content}])
            if paced_for is not None and paced_for.find(question) is None:
                self._wait()
            yield question

    def _wait(self) -> None:
        """Keeps the rate of requests."""
        if self.how.requests_per_minute is None:
            return
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = max(self._next, time.monotonic()) + 60 / self.how.requests_per_minute

    def write(self) -> list[Path]:
        """Writes the two lists from the blocks; returns their paths."""
        output = self.run.output
        paths = [output, output.with_name(f"{output.stem}.rejected{output.suffix}")]
        with (
            self.run.writing(paths[0]) as kept,
            self.run.writing(paths[1]) as rejected,
            open(kept, "wb") as captions,
            open(rejected, "wb") as others,
        ):
            for path in sorted(self.run.progress.glob("block-*.json")):
                for entry in json.loads(path.read_bytes())["entries"]:
                    (captions if "caption" in entry else others).write(to_json(entry, None) + b"\n")
        return paths

    def as_dict(self) -> dict[str, Any]:
        """The counts of the manifest."""
        return {"images": len(self.records), **self.counts, **self._spent, "price": round(self._price, 6)}


def _shrink(data: bytes, max_side: int | None) -> bytes:
    """An image file whose longer side is at most so long; a smaller one as it is. Raises as `to_rgb` does."""
    image = to_rgb(data)
    if max_side is None or max(image.size) <= max_side:
        return data
    image.thumbnail((max_side, max_side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return content.getvalue()
