"""Logs of answers of an endpoint, in which a later run finds what was paid for: JSON lines, or SQLite for millions."""

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

EMPTY, REFUSED = "the answer is empty", "refused: "
"""An error that is an answer, and how another begins."""


@dataclass(frozen=True)
class Answer:
    """What came back. Either `text` or `error` is None.

    Attributes:
        name: The question's.
        finish_reason: Why the text ends, as the endpoint says; `"length"` if it was cut.
        seconds: From the request to the answer, repeats included.
    """

    name: str
    text: str | None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def is_reply(self) -> bool:
        """Whether the model has replied, if only with nothing or a refusal."""
        return self.error is None or self.error == EMPTY or self.error.startswith(REFUSED)


class AnswerLog(Protocol):
    """Keeps every answer, failed ones included. Its methods are not called at the same time.

    Attributes:
        path: The file.
    """

    path: Path

    def read(self) -> Iterator[Answer]:
        """All answers, for their tokens and errors; the texts may be left out."""

    def find(self, key: str) -> Answer | None:
        """The answer to a question that needs no other."""

    def add(self, key: str, answer: Answer) -> None:
        """Writes an answer to the disk."""


class JsonLines:
    """A log of JSON lines, whose answers are also in memory. Answers that come later are not found."""

    def __init__(self, path: Path):
        self.path = path
        end_last_line(path)
        self._known: dict[str, dict[str, Any]] = {}

    def read(self) -> Iterator[Answer]:
        for entry in _read_log(self.path):
            answer = _answer_of(entry)
            if answer.error is None:
                self._known[entry["hash"]] = entry
            yield answer

    def find(self, key: str) -> Answer | None:
        entry = self._known.get(key)
        return None if entry is None else _answer_of(entry)

    def add(self, key: str, answer: Answer) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"hash": key, **asdict(answer)}) + "\n")


class AnswerDatabase:
    """A log as an SQLite database, which needs little memory, whatever the number of answers.

    Every reply of the model is found, so that a question whose answer is empty or refused is not asked again.

    Raises:
        ValueError: If the file is something else.
        OSError: If it cannot be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._errors():
            # Answers come in threads, one at a time.
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT NOT NULL, is_reply INTEGER NOT NULL, error TEXT, "
                "prompt_tokens INTEGER NOT NULL, "
                "completion_tokens INTEGER NOT NULL, answer TEXT NOT NULL)"
            )
            self._database.execute("CREATE INDEX IF NOT EXISTS keys ON answers (key) WHERE is_reply")

    def read(self) -> Iterator[Answer]:
        with self._errors():
            for error, *tokens in self._database.execute(
                "SELECT error, prompt_tokens, completion_tokens FROM answers"
            ):
                yield Answer("", None, error, None, *tokens)

    def find(self, key: str) -> Answer | None:
        with self._errors():
            row = self._database.execute(
                "SELECT answer FROM answers WHERE key = ? AND is_reply LIMIT 1", (key,)
            ).fetchone()
        return None if row is None else _answer_of(json.loads(row[0]))

    def add(self, key: str, answer: Answer) -> None:
        row = (
            key,
            answer.is_reply,
            answer.error,
            answer.prompt_tokens,
            answer.completion_tokens,
            json.dumps(asdict(answer)),
        )
        with self._errors():
            self._database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as those of files."""
        try:
            yield
        except sqlite3.OperationalError as error:
            code = errno.ENOSPC if "full" in str(error) else errno.EIO
            raise OSError(code, os.strerror(code) if code == errno.ENOSPC else str(error), str(self.path)) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is damaged, or not a log of answers: {error}; name another output"
            ) from error


def _answer_of(entry: dict[str, Any]) -> Answer:
    """The answer in an entry of a log. Fields that an entry lacks have their defaults."""
    return Answer(**{own.name: entry[own.name] for own in fields(Answer) if own.name in entry})


def _read_log(log: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log. A last line that a killed run left unfinished is passed over."""
    if not log.exists():
        return
    needed = {"hash", *(own.name for own in fields(Answer) if own.default is MISSING)}
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.keys() >= needed:
                    yield entry


def end_last_line(log: Path) -> None:
    """Ends a line that a killed run left unfinished, so that the next entry has a line of its own."""
    if log.exists() and log.stat().st_size:
        with log.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
