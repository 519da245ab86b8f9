"""What the results in an output are of: `--resume` goes on with them, and never takes over those of other images.

Beside `captions.json` lies `captions.resume.jsonl`. It has a line for each run, `{"run": 0, "model": ...,
"fingerprint": ..., "settings": ...}`, and a line for each result, `{"run": 0, "name": ..., "source": ..., "size": ...,
"mtime_ns": ..., "blake2b": ...}`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlv.files import errors_naming, to_json, write_atomically

from .errors import UserError
from .inputs import Input
from .output import GrowingJson


class ResumableResults:
    """Results in a JSON file `{name: result}`, with a record of the image, the model and the settings of each.

    Nothing is written before the first result.

    Args:
        output: The JSON file.
        model: `--model` and its `vlv.hub.fingerprint`.
        settings: Settings that change results.
    """

    def __init__(self, output: Path, model: tuple[str, str], settings: Mapping[str, Any]):
        self.output, self.record_file = output, output.with_suffix(".resume.jsonl")
        self._runs: list[dict[str, Any]] = []
        self._run: dict[str, Any] = {"run": 0, "model": model[0], "fingerprint": model[1], "settings": dict(settings)}
        self._entries: dict[str, Any] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._json: GrowingJson | None = None

    def resume(self, inputs: Iterable[Input]) -> list[Input]:
        """Takes over the results of earlier runs, and returns the inputs without one.

        A result is kept if its image has the path, size and time of then, or the content of then. An image that has
        changed loses its result. Results of images that are not among the inputs are kept.

        Raises:
            UserError: If the file cannot be read, was made by another model, or has results of other images under the
                names of inputs.
        """
        entries = read_results(self.output, "--resume")
        self._runs, records = self._read_records() if entries else ([], {})
        records = {name: record for name, record in records.items() if name in entries}
        for run in self._runs:
            if run["fingerprint"] != self._run["fingerprint"]:
                raise UserError(
                    f"--resume: {self.output} was made by another model, {run['model']}; pass that --model, "
                    "another --output, or --overwrite to replace it"
                )
        by_source = {record["source"]: record for record in records.values()}
        items = {_source(item): item for item in inputs}
        kept: dict[str, str] = {}  # old name: new name
        for source, item in items.items():
            record = by_source.get(source)
            if record is None:
                record = records.get(item.name)
                if record is None or record["source"] in items:
                    continue
                if not _is_unchanged(record, item):
                    raise UserError(
                        f"--resume: {self.output} has the result of another image under the name {item.name}: "
                        f"{record['source']}; pass another --output, or --overwrite to replace it"
                    )
            if _is_unchanged(record, item):
                kept[record["name"]] = item.name
        names = {item.name for item in items.values()}
        lost = {record["name"] for record in records.values() if record["source"] in items} | names
        for name, entry in entries.items():
            if name in kept or name not in lost:
                self._entries[kept.get(name, name)] = entry
                if name in records:
                    self._records[kept.get(name, name)] = records[name] | {"name": kept.get(name, name)}
        self._run["run"] = len(self._runs)
        return [item for item in items.values() if item.name not in kept.values()]

    def notes(self) -> list[str]:
        """A sentence for each other setting with which results were made that the run has taken over."""
        sentences = []
        for run in self._runs:
            count = sum(record["run"] == run["run"] for record in self._records.values())
            settings = self._run["settings"]
            other = [
                f"{name} {value}, here {settings.get(name)}"
                for name, value in run["settings"].items()
                if value != settings.get(name)
            ]
            if count and other:
                sentences.append(f"{count} of the kept results were made with other settings ({'; '.join(other)})")
        return sentences

    def add(self, inputs: list[Input], results: list[Any]) -> None:
        """Adds the results of inputs.

        Raises:
            OSError: If they cannot be written. Results that were added before are in the file.
        """
        json_file = self._open()
        json_file.add({item.name: result for item, result in zip(inputs, results, strict=True)})
        lines = b"".join(to_json(self._describe(item), None) + b"\n" for item in inputs)
        with errors_naming(self.record_file), open(self.record_file, "ab", buffering=0) as file:
            file.write(lines)

    def _open(self) -> GrowingJson:
        if self._json is None:
            rows = [*self._runs, self._run, *self._records.values()]
            lines = b"".join(to_json(row, None) + b"\n" for row in rows)
            write_atomically(self.record_file, lambda temporary: temporary.write_bytes(lines))
            self._json = GrowingJson(self.output, self._entries)
        return self._json

    def _describe(self, item: Input) -> dict[str, Any]:
        status = item.path.stat()
        return {
            "run": self._run["run"],
            "name": item.name,
            "source": _source(item),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "blake2b": _digest(item),
        }

    def _read_records(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """The runs, and the records of results by name. A last line that was cut off is left out."""
        runs, records = [], {}
        try:
            lines = self.record_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume: the images of {self.output} are not known, since {self.record_file} cannot be read "
                f"({error}); pass another --output, or --overwrite to replace it"
            ) from error
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "name" in row:
                records[row["name"]] = row
            else:
                runs.append(row)
        return runs, records

    def __enter__(self) -> "ResumableResults":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._open().close()
        elif self._json is not None:
            self._json.__exit__(kind, *error)


def _source(item: Input) -> str:
    return os.path.abspath(item.path) + ("" if item.embeds is None else f"#{item.name}")


def _digest(item: Input) -> str:
    if item.embeds is not None:
        return hashlib.blake2b(item.embeds.numpy().tobytes(), digest_size=16).hexdigest()
    with open(item.path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_unchanged(record: Mapping[str, Any], item: Input) -> bool:
    """Whether an input is the one of a record. One that cannot be read is, if the path is the same."""
    try:
        status = item.path.stat()
        if (_source(item), status.st_size, status.st_mtime_ns) == (
            record["source"],
            record["size"],
            record["mtime_ns"],
        ):
            return True
        return _digest(item) == record["blake2b"]
    except OSError:
        return _source(item) == record["source"]


def read_results(path: str | Path, option: str) -> dict[str, Any]:
    """`{name: result}` of a JSON file. Of one whose last write was cut off, the results before it.

    Args:
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the file cannot be read or does not hold a JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    try:
        results: Any = json.loads(text)
    except ValueError as error:
        results = {}
        for line in text.removeprefix("{").splitlines():
            try:
                results |= json.loads("{" + line.strip().removesuffix(",") + "}")
            except ValueError:
                continue
        if not text.startswith("{\n") or not results:
            raise UserError(f"{option}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(results, dict):
        raise UserError(f"{option}: {path} does not hold {{name: caption}}, as `vlv caption` writes it")
    return results
