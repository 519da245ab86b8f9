"""Downloads images of URL lists by img2dataset, which is kept within time and asked again for what failed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlv.files import to_json

from .rules import COLUMNS
from .run import Run, describe_files
from .tables import TableWriter, batches, require_columns, require_pyarrow, unified_schema

INSTALL = (
    "img2dataset is not installed. Its dependencies are older than those of vlv, so give it an environment of its own "
    "(`uv tool install img2dataset`, `pipx install img2dataset`), and name the program by --img2dataset if it is not "
    "on PATH"
)
FAILED_URLS = "failed.parquet"
SHARD = r"\d+-\d{5,}\.(tar|parquet)"
"""Names of the output's shards: the number of the attempt, that of img2dataset's shard."""
SUCCESS, KILLED, COMPLETE = "success", "killed", "complete"
PERMANENT = re.compile(r"HTTP Error (404|410|451)|X-Robots-Tag|UnidentifiedImage|cannot identify|[Ii]mage decoding")
"""Reasons for which a URL is not asked again."""
NO_RESULT = "img2dataset was ended before it had a result"
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class DownloadConfig:
    """How images are downloaded.

    Attributes:
        image_size: Longer images are made smaller to this shorter side; see `resize_mode`.
        resize_mode: Of img2dataset: `keep_ratio`, `center_crop`, `border`, or `no` for the files as they are.
        shard_images: URLs of a shard.
        processes, threads: Of img2dataset.
        timeout: Longest download of an image, in whole seconds.
        time_limit: Longest run of img2dataset, in seconds; it is ended then, and the next pass goes on.
        stall_limit: It is also ended if it writes nothing for so many seconds, since it may hang at its end.
        passes: Runs over the URLs that have no image yet, the first included.
    """

    image_size: int = 512
    resize_mode: str = "keep_ratio"
    shard_images: int = 10_000
    processes: int = 1
    threads: int = 32
    timeout: int = 10
    time_limit: float = 24 * 3600.0
    stall_limit: float = 600.0
    passes: int = 3


def find_program(named: str | None = None) -> str:
    """The path of img2dataset.

    Raises:
        ImportError: If it is not installed.
    """
    beside = Path(sys.executable).with_name("img2dataset")
    found = shutil.which(named or "img2dataset") or (str(beside) if named is None and beside.exists() else None)
    if found is None:
        raise ImportError(INSTALL if named is None else f"{named} is not a program that can be run. {INSTALL}")
    return found


def download(
    files: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    how: DownloadConfig,
    *,
    program: str | None = None,
    url_column: str | None = None,
    caption_column: str | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda urls: None,
    expect: Callable[[int], None] = lambda urls: None,
) -> dict[str, Any] | None:
    """Downloads the images of metadata into WebDataset shards `1-00000.tar`, ..., with img2dataset's metadata beside.

    img2dataset works in the hidden `progress` of the run. A shard is moved to the output when it is complete, so that
    an end at any moment leaves no broken one. Each pass asks for the URLs that have no image yet, but for those that
    will never have one (404, no image). What has none after the last is in `failed.parquet`, with the reason: a table
    that a later `vlv data download` takes.

    Args:
        files: Parquet files with a column of URLs.
        output: The folder, which the trainers read.
        program: img2dataset's; by default it is looked for.
        url_column, caption_column: By default LAION's usual names; a column of captions may be absent then.
        overwrite: Replaces the output of another run.
        advance: Called with numbers of URLs: of those that have an image as soon as a shard is complete, of those that
            failed at the end.
        expect: Called with the number of all URLs.

    Returns:
        The counts of the manifest: `urls`, `images`, `failed`, `reasons`, `passes`; None if an earlier run has done
        the same.

    Raises:
        ImportError: Without img2dataset or pyarrow.
        ValueError: If a file has no column of URLs, or img2dataset fails at once; the message has its last words.
        OSError: If a file cannot be written.
    """
    require_pyarrow()
    executable = find_program(program)
    output, files = Path(output), sorted({os.path.abspath(file) for file in files})
    described = describe_files(files)
    schema = unified_schema(files)
    columns = {"url": str(_column(schema.names, files[0], "url", url_column))}
    if caption := _column(schema.names, files[0], "caption", caption_column):
        columns["caption"] = caption
    require_columns(files, columns, ("url",))
    options = {"image_size": how.image_size, "resize_mode": how.resize_mode, "passes": how.passes, "columns": columns}
    options |= {"shard_images": how.shard_images}
    inputs, writes = {"files": described}, [SHARD, re.escape(FAILED_URLS)]
    with Run("download", output, inputs, options, is_folder=True, overwrite=overwrite, writes=writes) as run:
        if run.finished:
            return None
        total = _write_urls(run, files, schema, columns)
        expect(total)
        passes: list[dict[str, Any]] = []
        attempt = 0
        while not passes or (passes[-1]["again"] and sum(each["ended"] != KILLED for each in passes) < how.passes):
            attempt += 1
            state, seen = run.progress / f"attempt-{attempt}.json", _Seen(advance)
            if not state.exists():
                ended = _run_attempt(run, executable, attempt, how, "caption" in columns, seen)
                run.write(state, to_json(_collect(run, attempt, total) | {"ended": ended}, None))
            passes.append(json.loads(state.read_bytes()))
            seen.images(passes[-1]["images"])
        failed = _write_failed(run, attempt)
        reasons = sum((Counter(each["gone"]) for each in passes), Counter(passes[-1]["again"]))
        shards = sorted(path for path in output.iterdir() if re.fullmatch(SHARD, path.name))
        counts = {"urls": total, "images": sum(each["images"] for each in passes), "failed": reasons.total()}
        advance(counts["failed"])
        counts |= {"reasons": dict(reasons.most_common()), "passes": [each["ended"] for each in passes]}
        run.finish([*shards, failed], counts)
    return counts


def _column(present: Sequence[str], file: str, kind: str, wanted: str | None) -> str | None:
    """The column of URLs or captions; None if there is none of captions.

    Raises:
        ValueError: If one that is named, or that of the URLs, is not there.
    """
    candidates = (wanted,) if wanted is not None else COLUMNS[kind]
    found = next((name for name in candidates if name in present), None)
    if found is None and (wanted is not None or kind == "url"):
        raise ValueError(
            f"{file} has no column {' or '.join(map(repr, candidates))} for the {kind}; it has {', '.join(present)}. "
            f"Name one by --{kind}-column"
        )
    return found


def _urls(run: Run, attempt: int) -> Path:
    return run.progress / f"urls-{attempt}.parquet"


def _write_urls(run: Run, files: Sequence[str], schema: Any, columns: Mapping[str, str | None]) -> int:
    """Writes the table of the first attempt, `row`, `url` and `caption`; returns its number of rows."""
    import pyarrow as pa
    from pyarrow import parquet

    path = _urls(run, 1)
    if not path.exists():
        text = pa.large_string()
        target = pa.schema([("row", pa.int64()), *((kind, text) for kind in columns), ("reason", text)])
        with run.writing(path) as temporary, TableWriter(temporary, target) as writer:
            for table in batches(files, schema, columns=list(columns.values())):  # type: ignore[arg-type]
                rows = pa.array(np.arange(writer.rows, writer.rows + table.num_rows))
                values = [table.column(name).cast(text) for name in columns.values()]
                writer.write(pa.table([rows, *values, pa.nulls(table.num_rows, text)], target))
    return parquet.read_metadata(path).num_rows


class _Seen:
    """Advances by the images of an attempt that have not been seen yet."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance, self._count = advance, 0
        self._of_shard: dict[str, int] = {}

    def images(self, count: int) -> None:
        """All images of the attempt so far."""
        self._advance(count - self._count)
        self._count = count

    def shards(self, folder: Path) -> None:
        """Those of the complete shards in the folder of the attempt."""
        for path in folder.glob("*_stats.json"):
            if path.name not in self._of_shard:
                try:
                    self._of_shard[path.name] = json.loads(path.read_bytes())["successes"]
                except ValueError:  # is being written
                    continue
        self.images(sum(self._of_shard.values()))


def _run_attempt(run: Run, executable: str, attempt: int, how: DownloadConfig, captions: bool, seen: _Seen) -> str:
    """Runs img2dataset on the URLs of an attempt, in a folder of its own. Returns how it ended.

    If the folder exists, this process has taken the place of one that was killed, and the run has ended img2dataset at
    its start. It is not run on the folder again: what is there is collected, and the next attempt asks for the rest.
    """
    folder = run.progress / f"attempt-{attempt}"
    if folder.exists():
        return KILLED
    folder.mkdir()
    options = {
        "url_list": _urls(run, attempt),
        "output_folder": folder,
        "input_format": "parquet",
        "output_format": "webdataset",
        "url_col": "url",
        "save_additional_columns": "['row']",
        "image_size": how.image_size,
        "resize_mode": how.resize_mode,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "number_sample_per_shard": how.shard_images,
        "processes_count": how.processes,
        "thread_count": how.threads,
        "timeout": how.timeout,
        "enable_wandb": False,
    }
    command = [executable, *(f"--{name}={value}" for name, value in options.items())]
    log = run.progress / "img2dataset.log"
    with log.open("ab") as words:
        process = subprocess.Popen(
            [*command, *(["--caption_col=caption"] if captions else [])],
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"},
            start_new_session=True,
        )
    try:
        run.record_process(process.pid)
        ended = _wait(process, folder, how, seen)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also its workers
        process.wait()
    if ended == COMPLETE and process.returncode != 0 and not list(folder.glob("*_stats.json")):
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-1000:]
        shutil.rmtree(folder)
        raise ValueError(f"{executable} ended with exit code {process.returncode}: {said}")
    return ended


def _wait(process: subprocess.Popen, folder: Path, how: DownloadConfig, seen: _Seen) -> str:
    """Waits for the end, or for a limit."""
    began = progressed = time.monotonic()
    size = -1
    while process.poll() is None:
        time.sleep(_POLL)
        now, before = time.monotonic(), size
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        if size != before:
            progressed = now
            seen.shards(folder)
        if now - began > how.time_limit:
            return f"ended after {how.time_limit:g} s"
        if now - progressed > how.stall_limit:
            return f"ended after {how.stall_limit:g} s without progress"
    return COMPLETE


def _collect(run: Run, attempt: int, total: int) -> dict[str, Any]:
    """Moves the complete shards of an attempt to the output, and writes the URLs of the next one.

    Returns:
        `images`, and the numbers of URLs that are asked `again` and that are `gone`, by reason.
    """
    import pyarrow as pa

    folder = run.progress / f"attempt-{attempt}"
    reasons: list[str] = [SUCCESS, NO_RESULT]
    found = np.full(total, 1, np.int32)  # of each row of the first table: a place in `reasons`
    for stats in sorted(folder.glob("*_stats.json")):
        shard = stats.name.removesuffix("_stats.json")
        for suffix in (".tar", ".parquet"):
            if (path := folder / f"{shard}{suffix}").exists():
                path.replace(run.output / f"{attempt}-{path.name}")
        _read_results(run.output / f"{attempt}-{shard}.parquet", reasons, found)
    is_gone = np.array([bool(PERMANENT.search(reason)) for reason in reasons])
    counts: dict[str, Any] = {"images": 0, "again": Counter(), "gone": Counter()}
    todo = _urls(run, attempt)
    schema = unified_schema([str(todo)])
    with (
        run.writing(_urls(run, attempt + 1)) as again,
        run.writing(run.progress / f"gone-{attempt}.parquet") as gone,
        TableWriter(again, schema) as rest,
        TableWriter(gone, schema) as never,
    ):
        for table in _read_urls(todo):
            codes = found[table.column("row").to_numpy()]
            counts["images"] += int((codes == 0).sum())
            why = pa.array([reasons[code] for code in codes], pa.large_string())
            table = table.set_column(schema.get_field_index("reason"), "reason", why)
            parts = {"again": (rest, ~is_gone[codes] & (codes > 0)), "gone": (never, is_gone[codes])}
            for name, (writer, chosen) in parts.items():
                counts[name].update(reasons[code] for code in codes[chosen])
                writer.write(table.filter(chosen))
    return counts


def _read_results(path: Path, reasons: list[str], found: np.ndarray) -> None:
    """Reads what became of the URLs of a shard. A reason that is new is added."""
    from pyarrow import parquet

    places = {reason: place for place, reason in enumerate(reasons)}
    table = parquet.read_table(path, columns=["row", "status", "error_message"])
    for row, status, message in zip(*(column.to_pylist() for column in table.columns), strict=True):
        reason = SUCCESS if status == SUCCESS else f"{status}: {message}"[:120]
        if reason not in places:
            places[reason] = len(reasons)
            reasons.append(reason)
        found[row] = places[reason]


def _read_urls(path: Path) -> Iterator[Any]:
    return batches([str(path)], unified_schema([str(path)]))


def _write_failed(run: Run, attempts: int) -> Path:
    """Writes the URLs that have no image: those that are gone, and those of an attempt that would follow."""
    path = run.output / FAILED_URLS
    parts = [*(run.progress / f"gone-{number}.parquet" for number in range(1, attempts + 1)), _urls(run, attempts + 1)]
    schema = unified_schema([str(part) for part in parts])
    with run.writing(path) as temporary, TableWriter(temporary, schema) as writer:
        for part in parts:
            for table in _read_urls(part):
                writer.write(table)
    return path
