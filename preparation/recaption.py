"""Captions images by a vision model behind an OpenAI-compatible endpoint, within a price, as pairs for stage 2."""

import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv.evaluation.answer_log import AnswerDatabase
from vlv.evaluation.endpoint import Endpoint, EndpointError, EndpointSettings, PriceReached, Question, image_part
from vlv.files import to_json
from vlv.processing_vlv import to_rgb

from .answers import CAPTIONED, FAILED, STATUSES, UNREADABLE, Checked, check_answer
from .records import Records, file_of, list_entry, reason_of
from .run import Run

BLOCK = 256
"""Images whose results are written at a time. It bounds memory, whatever the number of images."""
TOKENS = ("prompt_tokens", "completion_tokens")
DEFAULT_PROMPT = (
    "You are a perceptive visual assistant. Describe the image exhaustively: the scene, all objects and where they "
    "are relative to each other, people and animals with their looks, clothes, expressions and poses, colours, "
    "textures, lighting, shadows, actions and mood. Say only what is visible and infer nothing beyond it. Write the "
    "description alone, in one paragraph without line breaks."
)
"""Asks for what the prompt in appendix A of the paper asks for."""


@dataclass(frozen=True)
class RecaptionConfig:
    """How a teacher is asked.

    Attributes:
        settings: The endpoint; `max_price` holds for all answers in the database of an output.
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
    how: RecaptionConfig,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes a list of `{"file_name": path from the output's folder, "caption": text}`, which stage 2 reads.

    Beside it, `NAME.rejected.jsonl` has the other images, each with `status` (`refused`, `malformed`, `failed`,
    `unreadable`), `reason` and `text`. While images are `failed`, the manifest is not complete, and the same command
    asks for them again.

    Every answer is written when it comes into a database, `NAME.jsonl.answers.sqlite`, by the content of the image,
    the prompt, the model and the options of sampling. No run deletes it, so that no answer is paid for twice: neither
    by a run that goes on, nor by one of other images or another `min_words`.

    Args:
        output: The `.jsonl` file.
        overwrite: Replaces the output of another run, but for the answers.
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
    beside = [rejected_path(output)]
    with Run("recaption", output, records.identity(), how.options(), overwrite=overwrite, beside=beside) as run:
        if run.finished:
            return None
        with closing(AnswerDatabase(answers_path(output))) as log:
            asking = _Asking(run, records, how, log)
            try:
                for first in range(0, len(records), BLOCK):
                    asking.ask_block(first, advance)
            except (EndpointError, PriceReached) as error:
                asking.write()
                raise Stopped(f"{error}. {asking.counts[CAPTIONED]} captions are in {output}") from error
            except (KeyboardInterrupt, SystemExit):
                asking.write()
                raise
        outputs = asking.write()
        counts = asking.as_dict()
        if not counts[FAILED]:
            run.finish(outputs, counts)
    return counts


def estimate(records: Records, output: str | os.PathLike, how: RecaptionConfig, images: int = 4) -> dict[str, Any]:
    """Asks for the first images and says what all would cost. The answers count for `recaption` of the same output.

    Returns:
        `asked`, `images`, mean `prompt_tokens` and `completion_tokens` of an image, and the `price` of all.

    Raises:
        Stopped: If no answer comes. Other errors are those of `recaption`.
    """
    log = answers_path(Path(output))
    log.parent.mkdir(parents=True, exist_ok=True)
    with closing(AnswerDatabase(log)) as database:
        try:
            endpoint = Endpoint(how.settings, database)
            answers = endpoint.ask(
                _questions(records, range(min(images, len(records))), how, {}, _Pace(how, endpoint))
            )
        except (EndpointError, PriceReached) as error:
            raise Stopped(str(error)) from error
    answered = [answer for answer in answers if answer.error is None]
    if not answered:
        raise Stopped("no answer to estimate by: " + "; ".join(str(answer.error) for answer in answers))
    tokens = [sum(getattr(answer, name) for answer in answered) / len(answered) for name in TOKENS]
    price = len(records) * how.settings.price(*tokens)  # type: ignore[arg-type]
    return {"asked": len(answered), "images": len(records), **dict(zip(TOKENS, tokens, strict=True)), "price": price}


def answers_path(output: Path) -> Path:
    """The database of the answers for an output."""
    return output.with_name(f"{output.name}.answers.sqlite")


class _Asking:
    """Asks block by block."""

    def __init__(self, run: Run, records: Records, how: RecaptionConfig, log: AnswerDatabase):
        self.run, self.records, self.how = run, records, how
        self.counts: Counter[str] = Counter(dict.fromkeys(STATUSES, 0))
        self.endpoint = Endpoint(how.settings, log)
        self._pace = _Pace(how, self.endpoint)

    def ask_block(self, first: int, advance: Callable[[int], None]) -> None:
        """Asks for the images of a block that have no answer yet, and records the block.

        Raises:
            EndpointError, PriceReached: As `Endpoint.ask`. What was answered until an error is recorded.
        """
        path = self.run.progress / f"block-{first:09d}.json"
        numbers = range(first, min(first + BLOCK, len(self.records)))
        known = json.loads(path.read_bytes()) if path.exists() else [None] * len(numbers)
        entries: dict[int, Any] = dict(zip(numbers, known, strict=True))
        pending = [number for number, entry in entries.items() if entry is None or entry.get("status") == FAILED]
        advance(len(numbers) - len(pending))
        try:
            for number in range(self.how.passes if pending else 0):
                checked = self._ask(pending, advance if number == 0 else lambda done: None)
                entries |= {number: self._entry(number, own) for number, own in checked.items()}
                pending = [number for number in pending if entries[number].get("status") == FAILED]
                if not pending:
                    break
        except (EndpointError, PriceReached, KeyboardInterrupt, SystemExit):
            checked = self._find(pending)
            entries |= {number: self._entry(number, own) for number, own in checked.items()}
            raise
        finally:
            if None not in entries.values():
                self.run.write(path, to_json(list(entries.values()), None))
                self.counts.update(entry.get("status", CAPTIONED) for entry in entries.values())

    def _ask(self, numbers: Sequence[int], advance: Callable[[int], None]) -> dict[int, Checked]:
        unreadable: dict[int, str] = {}
        answers = self.endpoint.ask(_questions(self.records, numbers, self.how, unreadable, self._pace), advance)
        advance(len(unreadable))
        checked = {int(answer.name): check_answer(answer, self.how.min_words) for answer in answers}
        return checked | {number: Checked(UNREADABLE, "", reason) for number, reason in unreadable.items()}

    def _find(self, numbers: Sequence[int]) -> dict[int, Checked]:
        """What the answers in the database say of images, of a run that was stopped."""
        unreadable: dict[int, str] = {}
        checked = dict.fromkeys(numbers, Checked(FAILED, "", "the run was stopped before an answer came"))
        for question in _questions(self.records, numbers, self.how, unreadable):
            answer = self.endpoint.find(question)
            if answer is not None:
                checked[int(question.name)] = check_answer(answer, self.how.min_words)
        return checked | {number: Checked(UNREADABLE, "", reason) for number, reason in unreadable.items()}

    def _entry(self, number: int, own: Checked) -> dict[str, Any]:
        """The line of an image in one of the two lists."""
        record = self.records.read_or_reason(number)
        place = {"file_name": list_entry(self.records, record, number, self.run.folder)["file_name"]}
        if own.status == CAPTIONED:
            return place | {"caption": own.text}
        return place | {"status": own.status, "reason": own.reason, "text": own.text}

    def write(self) -> list[Path]:
        """Writes the two lists from the blocks; returns their paths."""
        paths = [self.run.output, rejected_path(self.run.output)]
        with (
            self.run.writing(paths[0]) as kept,
            self.run.writing(paths[1]) as rejected,
            open(kept, "wb") as captions,
            open(rejected, "wb") as others,
        ):
            for path in sorted(self.run.progress.glob("block-*.json")):
                for entry in json.loads(path.read_bytes()):
                    (captions if "caption" in entry else others).write(to_json(entry, None) + b"\n")
        return paths

    def as_dict(self) -> dict[str, Any]:
        """The counts of the manifest. Tokens and price are those of all answers in the database."""
        totals = self.endpoint.totals
        spent = {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens}
        return {"images": len(self.records), **self.counts, **spent, "price": round(totals.price, 6)}


def rejected_path(output: Path) -> Path:
    """The list of the images without a caption, of an output."""
    return output.with_name(f"{output.stem}.rejected{output.suffix}")


class _Pace:
    """Keeps the rate of requests."""

    def __init__(self, how: RecaptionConfig, endpoint: Endpoint):
        self._rate, self._next, self._endpoint = how.requests_per_minute, time.monotonic(), endpoint

    def wait(self, question: Question) -> None:
        """Waits until a question may be asked; one that has an answer is not asked."""
        if self._rate is not None and self._endpoint.find(question) is None:
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = max(self._next, time.monotonic()) + 60 / self._rate


def _questions(
    records: Records,
    numbers: Iterable[int],
    how: RecaptionConfig,
    unreadable: dict[int, str],
    pace: _Pace | None = None,
) -> Iterator[Question]:
    """A question for each image that can be read; `unreadable` is told why others cannot."""
    for number in numbers:
        record = records.read_or_reason(number)
        try:
            data = file_of(record.image)
            image = _shrink(data, how.max_side)
        except (OSError, ValueError) as error:
            unreadable[number] = reason_of(error)
            continue
        content = [image_part(image), {"type": "text", "text": how.prompt}]
        key = f"{hashlib.blake2b(data, digest_size=16).hexdigest()}, {how.max_side} pixels: {how.prompt}"
        question = Question(str(number), [{"role": "user", "content": content}], key=key)
        if pace is not None:
            pace.wait(question)
        yield question


def _shrink(data: bytes, max_side: int | None) -> bytes:
    """An image file whose longer side is at most so long; a smaller one as it is. Raises as `to_rgb` does."""
    image = to_rgb(data)
    if max_side is None or max(image.size) <= max_side:
        return data
    image.thumbnail((max_side, max_side))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return content.getvalue()
