"""A folder of shards: one file of captions for each, which is complete or absent, whatever happens to the processes.

`run.json` says what the shards are of, and `inputs/` lists the images of each. `shard-00003-of-00016.jsonl` has a line
for each image, and `shard-00003-of-00016.json` says how it was made. A shard is written under a temporary name, then
brought to the disk and renamed. Several processes and machines may write into one folder: a lock keeps two from one
shard, and where a file system has no locks, the second replaces the file by an equal one.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlv.errors import UserError
from vlv.files import errors_naming, read_json, set_default_permissions, to_json, write_json

from .choices import TIME_LIMIT
from .dataset_rows import DatasetArguments, open_dataset
from .division import (
    dataset_rows,
    divide,
    divide_dataset,
    list_path,
    owner,
    read_dataset_rows,
    read_division,
    require_same_dataset,
    shard_name,
    sync_file,
)
from .inputs import Input

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
INPUTS = "inputs"
UNFINISHED = ".unfinished"


class ShardFolder:
    """The shards of a run.

    Args:
        folder: Holds a run: see `begin` and `open_existing`.
        run: The content of `run.json`: `shards`, `model`, `fingerprint`, `settings`, `inputs` (paths), `image_column`,
            `image_root`, `dataset` (None, or `name`, `split` and `revision`) and `counts`.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]):
        self.folder, self.run, self.count = folder, run, int(run["shards"])

    @cached_property
    def _dataset(self) -> tuple[DatasetArguments, Any] | None:
        """The data set that the shards are of, and its source, of the commit on the Hub that the run was begun with.

        Raises:
            UserError: If it cannot be opened.
        """
        if self.run.get("dataset") is None:
            return None
        arguments = DatasetArguments(**self.run["dataset"], column=self.run.get("image_column", "image"))
        if commit := self.run.get("counts", {}).get("commit"):
            arguments = replace(arguments, revision=commit)
        return arguments, open_dataset(arguments)

    @cached_property
    def _divided_dataset(self) -> tuple[DatasetArguments, Any] | None:
        """`_dataset`, which is compared with the one that was divided, once. Raises `UserError` if it has changed."""
        if self._dataset is not None:
            require_same_dataset(*self._dataset, self.run["counts"])
        return self._dataset

    @classmethod
    def open_existing(cls, folder: Path) -> "ShardFolder":
        """Opens a folder that holds a run. Raises `UserError` if it does not."""
        try:
            run = read_json(folder / RUN_FILE, "shards", "model", "fingerprint", "settings", "inputs", "counts")
        except FileNotFoundError as error:
            raise UserError(f"{folder} holds no shards of `vlv caption --shards`: {error}") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(folder, run)

    @staticmethod
    def is_begun(folder: Path) -> bool:
        """Whether a folder holds a run."""
        return (folder / RUN_FILE).exists()

    @classmethod
    def begin(cls, folder: Path, paths: Sequence[str], run: Mapping[str, Any]) -> "ShardFolder":
        """Opens a folder, and divides the inputs if no process has done so.

        Args:
            paths: The inputs: images, folders, globs, URLs, and tar, parquet and list files; none with a data set.
            run: As of the class, without `counts`.

        Raises:
            UserError: If the folder holds another run, or there are no inputs.
        """
        with errors_naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", wait=True):
            if (folder / RUN_FILE).exists():
                found = cls.open_existing(folder)
                found._require_same(run)
                return found
            if any(folder.glob("shard-*.jsonl")):
                raise UserError(f"{folder} has shards without {RUN_FILE}; pass another --output-dir")
            inputs = folder / f"{UNFINISHED}-{INPUTS}-{_process()}"
            _remove_unfinished(folder, f"{UNFINISHED}-{INPUTS}-")
            try:
                inputs.mkdir()
                if (dataset := cls(folder, run)._dataset) is not None:
                    counts = divide_dataset(dataset[1], run["shards"])
                else:
                    counts = divide(paths, run["shards"], inputs, run.get("image_column", "image"))
                if (folder / RUN_FILE).exists():  # written by another process, on a file system without locks
                    shutil.rmtree(inputs)
                    found = cls.open_existing(folder)
                    found._require_same(run)
                    return found
                shutil.rmtree(folder / INPUTS, ignore_errors=True)  # of a process that ended before it wrote run.json
                inputs.rename(folder / INPUTS)
            except BaseException:
                shutil.rmtree(inputs, ignore_errors=True)
                raise
            _sync_folder(folder / INPUTS)
            write_json(folder / RUN_FILE, {**run, "counts": counts})
            sync_file(folder / RUN_FILE)
            _sync_folder(folder)
        return cls.open_existing(folder)

    def _require_same(self, run: Mapping[str, Any]) -> None:
        wanted = json.loads(to_json(run))
        if wanted["fingerprint"] != self.run["fingerprint"]:
            raise UserError(
                f"{self.folder} has shards of another model, {self.run['model']} ({self.run['fingerprint']:.12}); "
                "pass that --model and --revision, or another --output-dir"
            )
        for name in ("shards", "inputs", "image_column", "image_root", "dataset"):
            if wanted.get(name) != self.run.get(name):
                raise UserError(
                    f"{self.folder} was begun with {name} {self.run.get(name)}, here {wanted.get(name)}; give those "
                    "of then, or another --output-dir"
                )
        then, here = self.run["settings"], wanted["settings"]
        differ = [
            f"{name} {then.get(name)}, here {here.get(name)}"
            for name in {**then, **here}
            if then.get(name) != here.get(name)
        ]
        if differ:
            raise UserError(
                f"{self.folder} has shards with other settings ({'; '.join(differ)}); give those of then, or another "
                "--output-dir"
            )

    def make_folder(self, name: str, write: Callable[[Path], object]) -> Path:
        """A folder beside the shards that all processes read; complete or absent.

        Args:
            write: Writes it under the name that it gets, if no process has done so.
        """
        path, start = self.folder / name, f"{UNFINISHED}-{name}-"
        with _locked(self.folder / f".{name}.lock", wait=True, remove=True):
            if path.exists():
                return path
            _remove_unfinished(self.folder, start)
            temporary = self.folder / f"{start}{_process()}"
            try:
                write(temporary)
                temporary.rename(path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        return path

    def path(self, index: int) -> Path:
        """The file with the captions of a shard."""
        return self.folder / f"{shard_name(index, self.count)}.jsonl"

    def manifest_path(self, index: int) -> Path:
        """The file that says how a shard was made. It is written before the shard."""
        return self.path(index).with_suffix(".json")

    def inputs(self, index: int, url_timeout: float = TIME_LIMIT) -> list[Input]:
        """The inputs of a shard.

        Args:
            url_timeout: Seconds that a download may take.

        Raises:
            UserError: If their list is damaged, or the data set has changed.
        """
        if self._divided_dataset is not None:
            return read_dataset_rows(*self._divided_dataset, self.run["counts"], index, url_timeout)
        settings = self.run.get("image_column", "image"), url_timeout, self.run.get("image_root")
        return read_division(self.folder / INPUTS, index, self.count, self.listed(index), *settings)

    def owner(self, index: int) -> Callable[[str], bool]:
        """A function that says of a name whether its image belongs to a shard. Raises as `inputs`."""
        if self.run.get("dataset") is not None:
            rows = dataset_rows(self.run["counts"], index)
            return lambda name: int(name.rpartition("/")[2]) in rows
        return owner(self.folder / INPUTS, index, self.count, self.listed(index))

    def listed(self, index: int) -> list[int]:
        """The numbers of images and of files with many in the list of a shard."""
        return self.run["counts"]["of_shards"][index]

    def metadata(self, index: int) -> dict[str, Any]:
        """What a manifest says of the run."""
        run = {name: self.run[name] for name in ("model", "fingerprint", "settings")}
        if self.run.get("dataset") is not None:
            rows = dataset_rows(self.run["counts"], index)
            inputs: Any = {**self.run["dataset"], "rows": [rows.start, rows.stop]}
        else:
            inputs = list_path(Path(INPUTS), index, self.count).as_posix()
        return {"shard": index, "shards": self.count, **run, "inputs": inputs}

    def is_done(self, index: int) -> bool:
        return self.path(index).exists()

    def counts(self, index: int) -> dict[str, int]:
        """The numbers of images of a shard that are `captioned` and `failed`, as its manifest says.

        Raises:
            UserError: If the manifest is damaged or missing.
        """
        try:
            return read_json(self.manifest_path(index), "counts")["counts"]
        except (OSError, ValueError) as error:
            path = self.path(index)
            raise UserError(f"{path} lacks its manifest ({error}); remove it, and run again") from error

    def missing(self) -> list[int]:
        """The shards that are not done."""
        return [index for index in range(self.count) if not self.is_done(index)]

    @contextmanager
    def claim(self, index: int) -> Iterator["ShardWriter | None"]:
        """A writer for a shard; None if it is done, or another process writes it."""
        with _locked(self.folder / f".{shard_name(index, self.count)}.lock", remove=True) as mine:
            if not mine or self.is_done(index):
                yield None
                return
            start = f"{UNFINISHED}-{shard_name(index, self.count)}-"
            _remove_unfinished(self.folder, start)
            writer = ShardWriter(self, index, self.folder / f"{start}{_process()}")
            try:
                yield writer
            finally:
                writer.abandon()


class ShardWriter:
    """Writes the lines of a shard under a temporary name.

    Args:
        temporary: The temporary name.
    """

    def __init__(self, shards: ShardFolder, index: int, temporary: Path):
        self._shards, self._index, self._temporary = shards, index, temporary
        self.path = shards.path(index)
        with errors_naming(self.path):
            self._file: Any = open(temporary, "wb")  # noqa: SIM115 (open while the shard is written)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds a line for each row. Raises `OSError` that names the shard."""
        with errors_naming(self.path):
            self._file.write(b"".join(to_json(row, None) + b"\n" for row in rows))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Gives the shard its name when it is on the disk, with a manifest beside it."""
        with errors_naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            set_default_permissions(self._temporary)
            write_json(self._shards.manifest_path(self._index), manifest)
            self._temporary.replace(self.path)
            _sync_folder(self.path.parent)

    def abandon(self) -> None:
        """Removes the temporary file, if the shard is not finished."""
        try:
            self._file.close()
        except OSError:  # a full disk: what is buffered cannot be written
            pass
        self._temporary.unlink(missing_ok=True)


def _process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_unfinished(folder: Path, start: str) -> None:
    """Removes what ended processes of this machine left. Another machine's files may be in use."""
    start += f"{socket.gethostname()}-"
    for path in folder.glob(f"{start}*"):
        if _is_running(path.name.removeprefix(start)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # another user's
        return True
    return True


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    except OSError:  # a file system that cannot
        pass
    finally:
        os.close(handle)


@contextmanager
def _locked(path: Path, *, wait: bool = False, remove: bool = False) -> Iterator[bool]:
    """Holds a lock, which ends with the process; False if another holds it. True where there are no locks.

    The lock is not passed on to child processes: those that read images end later than a process that is killed.

    Args:
        wait: Whether to wait until it is free.
        remove: Whether the file is removed at the end.
    """
    with errors_naming(path):
        file = open(path, "ab")  # noqa: SIM115 (closed below)
    with file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            pass
        try:
            yield True
        finally:
            if remove:
                path.unlink(missing_ok=True)
