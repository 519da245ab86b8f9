"""What the results in an output are of: `--resume` goes on with them, and never takes over those of other images.

Beside `captions.json` lies `captions.resume.jsonl`, and beside `captions.csv` `captions.csv.resume.jsonl`. It has a
line for each run, `{"run": 0, "model": ..., "fingerprint": ..., "settings": ...}`, and a line for each result,
`{"run": 0, "name": ..., "source": ..., "size": ..., "mtime_ns": ..., "blake2b": ...}`.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import errors_naming, to_json, write_atomically

from .formats import METADATA, growing_file, read_lines, results_path
from .inputs import Input
from .output import GrowingFile, refuse_existing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


LIMITS = ("max_new_tokens",)
"""Settings that leave most results as they are: another value of one gives a note, and is not refused."""


class ResumableResults:
    """Results in a file, by name, with a record of the image, the model and the settings of each.

    Nothing is written before the first result. While a run writes, no other may write into the same file.

    Args:
        output: The file, in a format of `formats.SUFFIXES`.
        model: `--model` and its `vlv.hub.fingerprint`.
        settings: Settings that change results.
        shared: Names of the settings in which all runs must agree.
        mixes: Whether results that were made with other settings are kept, as far as they are not `shared`.

    Raises:
        UserError: If another run writes into the file, or the record cannot be written.
    """

    def __init__(
        self,
        output: Path,
        model: tuple[str, str],
        settings: Mapping[str, Any],
        shared: Sequence[str] = (),
        mixes: bool = False,
    ):
        self._shared, self._mixes = tuple(shared), mixes
        self.output, self.record_path = output, record_path(output)
        self._runs: list[dict[str, Any]] = []
        self._run: dict[str, Any] = {"run": 0, "model": model[0], "fingerprint": model[1], "settings": dict(settings)}
        self._entries: dict[str, Any] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self.unconfirmed: dict[str, Any] = {}
        """Results of inputs, by name, that an earlier run did not confirm before it ended."""
        self._json: GrowingFile | None = None
        self._record_file: Any = self._open_record() if self.record_path.exists() else None

    def resume(self, inputs: Sequence[Input]) -> list[Input]:
        """Takes over the results of earlier runs, and returns the inputs without one.

        A result is kept if its image has the same path, size and time as then, or the same content. An image that has
        changed loses its result. Results of images that are not among the inputs are kept.

        Raises:
            UserError: If the file cannot be read, was made by another model or with other settings (unless it mixes
                them), or has results of other images under the names of inputs.
        """
        entries = read_results(self.output, "--resume")
        self._runs, records = self._read_records() if entries else ([], {})
        for run in self._runs:
            self._require_same_model(run)
            self._require_shared_settings(run)
        records = {name: record for name, record in records.items() if name in entries}
        if not self._mixes:
            self._require_same_settings(record["run"] for record in records.values())
        by_source = {record["source"]: record for record in records.values()}
        sources, names = {item.source for item in inputs}, {item.name for item in inputs}
        kept: dict[str, dict[str, Any]] = {}  # records by their former name
        for item in inputs:
            record, namesake = by_source.get(item.source), records.get(item.name)
            if namesake is not None and namesake["source"] not in sources:
                if record is not None or not _is_unchanged(namesake, item):
                    raise UserError(
                        f"--resume: {self.output} has the result of another image under the name {item.name}: "
                        f"{namesake['source']}; pass another --output, or --overwrite to replace it"
                    )
                record = namesake
            if record is not None and _is_unchanged(record, item):
                kept[record["name"]] = record | {"name": item.name} | _place(item)
        for name, entry in entries.items():
            record = kept.get(name) or records.get(name)
            if name in kept:
                self._entries[kept[name]["name"]] = entry
            elif name not in names if record is None else record["source"] not in sources:
                self._entries[name] = entry
            else:  # the image has changed, or is not known
                continue
            if record is not None:
                self._records[record["name"]] = record
        done = {record["name"] for record in kept.values()}
        self._run["run"] = len(self._runs)
        self.unconfirmed = {name: entry for name, entry in entries.items() if name in names and name not in records}
        return [item for item in inputs if item.name not in done]

    def _require_same_model(self, run: Mapping[str, Any]) -> None:
        if run["fingerprint"] == self._run["fingerprint"]:
            return
        model, version = run["model"], run["fingerprint"][:12]
        if model == self._run["model"]:
            raise UserError(
                f"--resume: {self.output} was made by other weights or settings of {model} ({version}), which has "
                "changed; pass their --revision, another --output, or --overwrite to replace it"
            )
        raise UserError(
            f"--resume: {self.output} was made by another model, {model}; pass that --model, another --output, or "
            "--overwrite to replace it"
        )

    def _require_shared_settings(self, run: Mapping[str, Any]) -> None:
        for name in self._shared:
            then, here = run["settings"].get(name), self._run["settings"][name]
            if then is not None and then != here:
                raise UserError(
                    f"--resume: {self.output} has scores with {name} {then!s:.12}, here {here!s:.12}, which cannot be "
                    "compared; give those of then, pass another --output, or --overwrite to replace it"
                )

    def _require_same_settings(self, numbers: Iterable[int]) -> None:
        """Raises `UserError` if one of the runs with these numbers had other settings than limits."""
        used = set(numbers)
        for run in self._runs:
            if run["run"] in used and (differences := self._differences(run, without=LIMITS)):
                raise UserError(
                    f"--resume: {self.output} was made with other settings ({'; '.join(differences)}); give those of "
                    "then, pass another --output, --overwrite to replace it, or --resume-mixed to keep its captions "
                    "beside those of other settings"
                )

    def _differences(self, run: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
        """The settings of a run that are not those of this one."""
        then, here = run["settings"], self._run["settings"]
        return [
            f"{name} {then.get(name)}, here {here.get(name)}"
            for name in {**here, **then}
            if name not in without and then.get(name) != here.get(name)
        ]

    def revise(self, change: Callable[[Any], Any]) -> None:
        """Replaces each kept result by `change(result)`."""
        self._entries = {name: change(entry) for name, entry in self._entries.items()}

    def notes(self) -> list[str]:
        """A sentence for each run with other settings whose results are kept."""
        sentences = []
        for run in self._runs:
            count = sum(record["run"] == run["run"] for record in self._records.values())
            if count and (differences := self._differences(run)):
                what = "; ".join(differences)
                sentences.append(f"{count} of the kept results were made with other settings ({what})")
        return sentences

    def adopt(self, item: Input, result: Any) -> None:
        """Keeps an unconfirmed result. Raises `OSError` or `ValueError` if the input cannot be read."""
        run = self._runs[-1]["run"] if self._runs else self._run["run"]
        self._records[item.name] = {"run": run, "name": item.name, **item.identify()}
        self._entries[item.name] = result

    def add(self, inputs: list[Input], results: list[Any]) -> None:
        """Adds the results of inputs, which have their `identity`, and confirms them.

        Raises:
            OSError: If they cannot be written. Results that were added before are in the file.
        """
        self.put(inputs, results)
        self.confirm(inputs)

    def put(self, inputs: list[Input], results: list[Any]) -> None:
        """Adds results that the next run makes again unless they are confirmed. Raises as `add`."""
        self._open().add({item.name: result for item, result in zip(inputs, results, strict=True)})

    def confirm(self, inputs: list[Input]) -> None:
        """Records what the results of inputs are of. Raises as `add`."""
        rows = [{"run": self._run["run"], "name": item.name, **(item.identity or {})} for item in inputs]
        with errors_naming(self.record_path):
            self._record_file.write(_to_lines(rows))  # after the results: a result without a record is made again

    def _open(self) -> GrowingFile:
        if self._json is None:
            if self._record_file is None and self.record_path.exists():  # of a run that began after this one
                self._record_file = self._open_record()
            lines = _to_lines([*self._runs, self._run, *self._records.values()])
            write_atomically(self.record_path, lambda temporary: temporary.write_bytes(lines))
            self._record_file = self._open_record()
            self._json = growing_file(self.output, self._entries)
        return self._json

    def _open_record(self) -> Any:
        """The record, open for additions and locked against other runs."""
        try:
            file = open(self.record_path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        except OSError as error:
            raise UserError(f"{self.record_path} cannot be written: {error.strerror}") from error
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another run writes into {self.output}; wait for its end, or pass another --output"
                ) from error
            except OSError:  # a file system without locks
                pass
        return file

    def _read_records(self) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """The runs, and the records of results by name. Lines that were cut off are left out."""
        runs: list[dict[str, Any]] = []
        records: dict[str, dict[str, Any]] = {}
        try:
            lines = self.record_path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--resume: the images of {self.output} are not known, since {self.record_path} cannot be read "
                f"({error}); pass another --output, or --overwrite to replace it"
            ) from error
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "name" not in row:
                runs.append(row)
            elif any(run["run"] == row["run"] for run in runs):
                records[row["name"]] = row
        return runs, records

    def release(self) -> None:
        """Lets other runs write into the file, which this one has not begun to write."""
        if self._record_file is not None:
            self._record_file.close()

    def __enter__(self) -> "ResumableResults":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._open().close()
        elif self._json is not None:
            self._json.__exit__(kind, *error)
        if self._record_file is not None:
            self._record_file.close()


def record_path(output: Path) -> Path:
    """The file beside an output that records what its results are of; hidden in a folder of images."""
    if output.name == METADATA:
        return output.with_name(f".{output.stem}.resume.jsonl")
    return output.with_suffix(".resume.jsonl") if output.suffix.lower() == ".json" else Path(f"{output}.resume.jsonl")


def refuse_results(output: Path) -> None:
    """Raises `UserError` if an output exists, unless an earlier run left it without results."""
    path = results_path(output)
    if record_path(output).is_file():
        try:
            if not read_results(output, "--output"):
                return
        except UserError:  # it is not known to be without results
            pass
    refuse_existing(path, "--output", resumable=True)


def _to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(to_json(row, None) + b"\n" for row in rows)


def _place(item: Input) -> dict[str, Any]:
    """Where an input is, and its size and time; empty if it cannot be read."""
    try:
        size, mtime_ns = item.status()
    except OSError:
        return {}
    version = {"version": item.version} if item.version else {}
    return {"source": item.source, "size": size, "mtime_ns": mtime_ns} | version


def _is_unchanged(record: Mapping[str, Any], item: Input) -> bool:
    """Whether an input is the one of a record. An input that cannot be read is judged by its path alone."""
    try:
        known = (item.source, *item.status()) == (record["source"], record["size"], record["mtime_ns"])
        if known and (item.version is None or (item.version and item.version == record.get("version"))):
            return True
        return record["blake2b"] != "" and item.digest() == record["blake2b"]
    except (OSError, ValueError):
        return item.source == record["source"]


def read_results(path: str | Path, option: str) -> dict[str, Any]:
    """`{name: result}` of a file of results. Of one whose last write was cut off, the results before it.

    Args:
        option: The option that gave the path, for the message.

    Raises:
        UserError: If the file cannot be read or does not hold results.
    """
    if Path(path).suffix.lower() in (".jsonl", ".csv", ".parquet"):
        return read_lines(Path(path), option)
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    try:
        results: Any = json.loads(text)
    except ValueError as error:
        results = {}
        for line in text.removeprefix("{").split("\n"):
            try:
                results |= json.loads("{" + line.strip().removesuffix(",") + "}")
            except ValueError:
                continue
        if not text.startswith("{\n") or not results:
            raise UserError(f"{option}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(results, dict):
        raise UserError(f"{option}: {path} does not hold {{name: caption}}, as `vlv caption` writes it")
    return results
