"""One run of a step: its manifest, its lock, and files that appear only when they are complete."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from vlv.files import errors_naming, read_json, to_json

MANIFEST, FAILED = "manifest.json", "failed.json"
SOURCE_HASHES = ("fingerprint", "times")
"""Inputs of a manifest that say nothing to a reader."""
FORMAT = 1
PROCESS = "process.json"
_TIME_TO_END = 10.0  # seconds
PACKAGES = ("vlv", "pyarrow", "pillow", "numpy", "openai")


class Run:
    """A run of a step, as a context. The same run again goes on where the last one was ended, or does nothing.

    The manifest is `manifest.json` in an output folder, or `NAME.manifest.json` beside an output file. It is written
    at the start, and once more with `"complete": true` when all outputs are in place. In between, unfinished files and
    the record of finished parts lie in `progress`, a hidden folder that the end of the run removes, so that SIGKILL
    leaves neither a broken output nor stray files.

    Args:
        step: Name of the command, such as `"filter"`.
        output: The output file, or the output folder if `is_folder`.
        inputs: What identifies the inputs; see `describe_files`.
        options: What the outputs depend on besides. Both are JSON values.
        overwrite: Replaces the outputs of another run.
        beside: Outputs beside an output file.
        writes: Patterns (of `re`) that the names of all outputs in an output folder match. If the run is killed, these
            are the files that `overwrite` removes.

    Attributes:
        finished: Whether an earlier run has done all of it.
        progress: The hidden folder.

    Raises:
        ValueError: If the output exists and is not of this step, inputs and options, or if another process runs it.
    """

    def __init__(
        self,
        step: str,
        output: str | os.PathLike,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        is_folder: bool = False,
        overwrite: bool = False,
        beside: Sequence[Path] = (),
        writes: Sequence[str] = (),
    ):
        self.step, self.output, self.is_folder, self.overwrite = step, Path(output), is_folder, overwrite
        self.inputs, self.options = dict(inputs), dict(options)
        self.folder = self.output if is_folder else self.output.parent
        self.manifest = manifest_of(self.output, is_folder)
        self.beside, self.writes = beside, list(writes)
        self.progress = self.folder / (".progress" if is_folder else f".{self.output.name}.progress")
        self.finished = False
        self._runs, self._lock = 1, -1
        self._began = perf_counter()

    def __enter__(self) -> "Run":
        with errors_naming(self.progress):
            self.progress.mkdir(parents=True, exist_ok=True)
        self._acquire()
        try:
            self._end_process()
            self._compare()
        except BaseException:
            self._release(remove=[path.name for path in self.progress.iterdir()] == ["lock"])
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._release(remove=self.finished)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A temporary file that becomes `path` at the end; of an error, a full disk for example, nothing is left.

        Raises:
            OSError: If it cannot be written; its `filename` is `path`.
        """
        temporary = self.progress / f"{path.name}.partial"  # no file that is kept has such a name
        with errors_naming(path):
            try:
                yield temporary
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def write(self, path: Path, data: bytes) -> None:
        """Writes a file at once."""
        with self.writing(path) as temporary:
            temporary.write_bytes(data)

    def record_process(self, pid: int) -> None:
        """Records a process that leads a group of its own. If this run is killed, the next one ends the group."""
        self.write(self.progress / PROCESS, to_json({"pid": pid, "started": _start_of(pid)}, None))

    def finish(self, outputs: Iterable[Path], counts: Mapping[str, Any]) -> None:
        """Records that the outputs are complete.

        Args:
            outputs: Files, in the folder of the manifest or below it.
            counts: What was read, kept and left out.
        """
        sizes = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in outputs}
        result = {"outputs": sizes, "counts": dict(counts), "versions": package_versions()}
        self._write_manifest(result | {"seconds": round(perf_counter() - self._began, 3)}, complete=True)
        self.finished = True

    @staticmethod
    def read_counts(output: Path) -> dict[str, Any]:
        """The counts in the manifest of a finished run."""
        return read_json(manifest_of(output, output.is_dir()), "counts")["counts"]

    def _end_process(self) -> None:
        """Ends the group of the recorded process, if that is alive; one that has its id by now is not touched.

        Without `/proc` (on macOS) the two cannot be told apart, and nothing is ended.

        Raises:
            ValueError: If the group does not end.
        """
        path = self.progress / PROCESS
        if not path.exists():
            return
        known = read_json(path, "pid")
        group, until = known["pid"], perf_counter() + _TIME_TO_END
        if known["started"] is not None and _start_of(group) == known["started"]:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            while alive := _members_of(group):
                if perf_counter() > until:
                    raise ValueError(
                        f"process {alive[0]} of an earlier run writes into {self.output} and does not end; end it, "
                        "and run the same command again"
                    )
                sleep(0.05)
        path.unlink()

    def _compare(self) -> None:
        """Compares with the manifest that there is, and writes one if this run has work to do."""
        known = self._read_manifest()
        if known is None and self._existing() and (self.is_folder or not self.overwrite):
            remedy = "name a new folder" if self.is_folder else "pass --overwrite to replace it, or name another file"
            raise ValueError(f"{self._existing()} exists and no manifest says what made it; {remedy}")
        different = [] if known is None else self._differences(known)
        if different:
            if not self.overwrite and known is not None and (known.get("complete") or self._has_work(known)):
                raise ValueError(
                    f"{self.output} is of another run of `vlv data`: {'; '.join(different)}. Pass --overwrite to "
                    "replace it, or name another output"
                )
        elif known is not None:
            self.finished = bool(known.get("complete")) and self._is_intact(known)
            if known.get("complete") and not self.overwrite and (changed := self._changed(known)):
                raise ValueError(
                    f"{changed} has been changed since `vlv data {self.step}` wrote it; pass --overwrite to replace "
                    "it, or name another output"
                )
            self._runs = known.get("runs", 0) + 1
        if self.finished:
            return
        if known is not None and (different or known.get("complete")):  # of another run, or with outputs missing
            self._remove(known)
        self._write_manifest({"writes": self.writes} if self.is_folder else {}, complete=False)

    def _existing(self) -> Path | None:
        """An output that exists; of a folder, the folder if it has files."""
        if not self.is_folder:
            return next(filter(os.path.lexists, (self.output, *self.beside)), None)
        return self.output if any(path != self.progress for path in self.output.iterdir()) else None

    def _read_manifest(self) -> dict[str, Any] | None:
        if not self.manifest.exists():
            return None
        known = read_json(self.manifest)
        if known.get("format") != FORMAT or not isinstance(known.get("step"), str):
            raise ValueError(f"{self.manifest} is not a manifest of this version of `vlv data`; name another output")
        return known

    def _differences(self, known: Mapping[str, Any]) -> list[str]:
        """What the manifest has otherwise, in words."""
        if known["step"] != self.step:
            return [f"the step was {known['step']}"]
        found = []
        for key in ("inputs", "options"):
            before, now = known.get(key, {}), _as_read(getattr(self, key))
            found += [_difference(name, before.get(name), now.get(name)) for name in before.keys() | now.keys()]
        return sorted(set(filter(None, found)))

    def _is_intact(self, known: Mapping[str, Any]) -> bool:
        sizes = known.get("outputs", {})
        return all((p := self.folder / name).is_file() and p.stat().st_size == size for name, size in sizes.items())

    def _has_work(self, known: Mapping[str, Any]) -> bool:
        """Whether a run that was ended has left an output, or finished parts of one."""
        parts = (path for path in self.progress.iterdir() if path.name != "lock")
        return any(path.exists() for path in (*parts, *self._left_by(known)))

    def _changed(self, known: Mapping[str, Any]) -> Path | None:
        """An output that has another size than when it was written."""
        sizes = known.get("outputs", {}).items()
        return next(
            (p for name, size in sizes if (p := self.folder / name).exists() and p.stat().st_size != size), None
        )

    def _remove(self, known: Mapping[str, Any]) -> None:
        """Removes what another run has left: its progress before its outputs, the manifest last."""
        for path in self.progress.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in self._left_by(known):
            path.unlink(missing_ok=True)
        self.manifest.unlink()

    def _left_by(self, known: Mapping[str, Any]) -> Sequence[Path]:
        """The outputs of a run; of one that was ended, the files that it can have written."""
        if "outputs" in known:
            return [self.folder / name for name in known["outputs"]]
        if not self.is_folder:
            return [self.output]
        names = re.compile("|".join(known.get("writes", ())))
        return [path for path in self.output.iterdir() if path.is_file() and names.fullmatch(path.name)]

    def _write_manifest(self, result: Mapping[str, Any], *, complete: bool) -> None:
        content = {"format": FORMAT, "step": self.step, "complete": complete, "runs": self._runs}
        content |= {"inputs": self.inputs, "options": self.options, **result}
        self.write(self.manifest, to_json(content) + b"\n")

    def _acquire(self) -> None:
        """Takes the lock. A finished run removes its file, so that a lock on a file without a name is taken again."""
        path = self.progress / "lock"
        while True:
            self.progress.mkdir(exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise ValueError(f"another process is writing {self.output}; wait for it") from error
            except OSError as error:  # a file system without locks
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
            try:
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    self._lock = handle
                    return
            except FileNotFoundError:
                pass
            os.close(handle)

    def _release(self, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.progress, ignore_errors=True)
        os.close(self._lock)


def _status_of(pid: int | str) -> list[str]:
    """What `/proc/PID/stat` has after the name: state, parent, group, ...; empty if there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _start_of(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None if it is not there, or no `/proc`."""
    status = _status_of(pid)
    return int(status[19]) if status else None


def _members_of(group: int) -> list[str]:
    """The processes of a group that have not ended."""
    found = ((path.name, _status_of(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid, status in found if status and int(status[2]) == group and status[0] not in "ZX"]


def manifest_of(output: Path, is_folder: bool) -> Path:
    """The manifest in an output folder, or beside an output file."""
    return output / MANIFEST if is_folder else output.with_name(f"{output.name}.{MANIFEST}")


def _difference(name: str, before: Any, now: Any) -> str:
    """How two values of a manifest differ, in words; empty if they do not."""
    if before == now:
        return ""
    if isinstance(before, dict) and isinstance(now, dict):
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{name}: {changed[0]}{more} differ{'' if more else 's'}"
    if name in SOURCE_HASHES:
        return "the images or captions of the source have changed, or are read from another place"
    was, is_now = f"{before!r:.60}", f"{now!r:.60}"
    return f"{name} was {was}, not {is_now}" if was != is_now else f"{name} has changed"


def _as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    """A value as it comes back from JSON: lists for tuples."""
    return json.loads(to_json(dict(value)))


def describe_files(files: Iterable[str | os.PathLike]) -> dict[str, list[Any]]:
    """Size and time (ns) of each file, by its absolute path.

    Raises:
        ValueError: If one does not exist or is a folder.
    """
    found = {}
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file} " + ("is a folder, not a file" if os.path.isdir(file) else "does not exist"))
        status = os.stat(file)
        found[os.path.abspath(file)] = [status.st_size, status.st_mtime_ns]
    return found


def package_versions() -> dict[str, str]:
    """Python and the installed packages that make the outputs."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
