"""Which checkpoint a run goes on from, and whether it may: damaged ones, other settings, a run that has ended."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import sort_checkpoints

from vlv.files import read_header, read_json
from vlv.hub.layout import ADAPTER_FOLDER, PIPELINE_PARTS
from vlv.image_files import image_suffixes

RECORD_FILE = "run.json"
"""Settings of the run, in each checkpoint and in `output_dir`."""
MODEL_FOLDERS = {"encoder", "image_processor", ADAPTER_FOLDER, *PIPELINE_PARTS}
"""Folders of a model in the Hub layout."""
LOCK_FILE = ".run.lock"
LEFT_BY_RUNS = (RECORD_FILE, "census.json", "trainer_state.json", ".unfinished", "rounds", "rewards-*.sqlite")
"""Names in `output_dir` that mark it as that of a run, beside checkpoints."""
FREE_SETTINGS = ("max_steps", "num_train_epochs", "rounds")
"""Settings of the record that a run may change when it goes on."""
START_MODELS = ("model", "image_encoder", "language_model", "gguf_file", "load_in_4bit", "replace_language_model")
"""Settings that say which weights a run starts from. The text encoder may come from `diffusion_model`."""


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest undamaged `checkpoint-N` in a folder, or None. Prints which one it is, and which ones are damaged.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    damages: list[str] = []
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        damage = find_damage(path)
        if damage is None:
            for message in damages:
                say(message)
            say(f"resuming from {path}")
            return str(path)
        damages.append(f"{path} is left out: {damage}")
    for message in damages:
        say(message)
    if damages and any((path / "trainer_state.json").exists() for path in found):
        raise ValueError(f"no checkpoint in {folder} is undamaged; pass --overwrite_output_dir to start anew")
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    `Trainer` writes `trainer_state.json` last. A power failure can leave any file cut off.
    """
    try:
        if "global_step" not in read_json(checkpoint / "trainer_state.json"):
            return "trainer_state.json has no global_step"
        if (checkpoint / RECORD_FILE).is_file():
            present = list_files(checkpoint)
            for name, size in read_json(checkpoint / RECORD_FILE).get("files", {}).items():
                if present.get(name) != size:
                    return f"{name} is missing" if name not in present else f"{name} is cut off"
        weights = sorted(checkpoint.rglob("*.safetensors"))
        for path in sorted(checkpoint.rglob("*.json")):
            read_json(path)
        for index in checkpoint.glob("*.safetensors.index.json"):
            weights += [checkpoint / name for name in set(read_json(index, "weight_map")["weight_map"].values())]
        for path in weights:
            if not path.is_file():
                return f"{path.name} is missing"
            read_header(path)
    except (ValueError, OSError) as error:
        return str(error)
    folders = {path.name for path in checkpoint.iterdir() if path.is_dir()}
    if folders - MODEL_FOLDERS:  # of FSDP or DeepSpeed, which check their own files
        return None
    if not any(checkpoint.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    needed = {"optimizer.pt", "scheduler.pt"}
    for name in sorted(needed | {path.name for path in checkpoint.glob("*.pt*")}):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{name} is damaged"
        except (zipfile.BadZipFile, OSError) as error:
            return f"{name} is damaged: {error}"
    complete = any(checkpoint.glob("model*.safetensors*"))  # one file, or an index of several
    return None if complete else "there are no weights"


def remove_old_checkpoints(folder: str | Path, limit: int | None, best: str | None, waste: Path) -> None:
    """Moves all checkpoints but the newest to the folder `waste`, so that none is half-deleted under its name.

    Args:
        limit: How many to keep; None or 0 keeps all.
        best: A checkpoint to keep in any case.
    """
    if limit:
        for path in sort_checkpoints(str(folder), use_mtime=True)[:-limit]:
            if best is None or Path(path) != Path(best):
                Path(path).rename(waste / Path(path).name)


def list_files(folder: Path) -> dict[str, int]:
    """Path within the folder and bytes of each of its files."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def check_settings(
    checkpoint: str | Path, settings: Mapping[str, Any], accept_changes: bool, other_settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Compares the settings of a run with those of the checkpoint that it goes on from. Prints what differs.

    Args:
        checkpoint: A folder with a `run.json`; without one nothing is compared.
        settings: `{name: value}`. Of a value `{"source": ..., "fingerprint": ...}` the fingerprint counts.
        accept_changes: Prints the differences instead of raising.
        other_settings: Those that do not change the result.

    Returns:
        The changes of the run up to now, for its record: `[{"step": N, "changes": {name: [old, new]}}]`.

    Raises:
        ValueError: If settings differ, with a table of old and new values. Of a checkpoint that is no complete model,
            those that say which models it starts from have to be the same in any case.
    """
    record = Path(checkpoint) / RECORD_FILE
    if not record.is_file():
        return []
    earlier = read_json(record, "settings")
    stages = [_stage(values) for values in (earlier["settings"], settings)]
    if earlier["settings"] and settings and stages[0] != stages[1]:
        raise ValueError(
            f"{checkpoint} is of {stages[0]}, and this is {stages[1]}; name another --output_dir (a stage "
            "starts from the folder of the finished stage before by --model)"
        )
    changed = _changes(earlier["settings"], settings)
    free = {name: change for name, change in changed.items() if name in FREE_SETTINGS}
    fixed = {name: change for name, change in changed.items() if name not in FREE_SETTINGS}
    start = {*START_MODELS, *(("diffusion_model",) if settings.get("image_encoder") else ())}
    if not (Path(checkpoint) / "config.json").is_file() and start & set(fixed):
        raise ValueError(
            f"{checkpoint} holds only what is trained, so it needs the models that the run started from, but these "
            "settings differ:\n"
            + "\n".join(_rows(fixed))
            + "\npass the former values, another --output_dir, or --overwrite_output_dir to start anew"
        )
    if fixed and not accept_changes:
        raise ValueError(
            f"these settings differ from those of {checkpoint}, and the result would depend on both:\n"
            + "\n".join(_rows(fixed))
            + "\npass the former values, --accept_changes to go on with the new ones, another --output_dir, or "
            "--overwrite_output_dir to start anew"
        )
    if changed:
        say("\n".join([f"settings that differ from those of {checkpoint}:", *_rows(fixed), *_rows(free)]))
    if free:
        say("  from here on the learning rate follows the schedule of the new length")
    if without_effect := _changes(earlier.get("other_settings", {}), other_settings):
        say("\n".join(["settings that differ, without effect on the result:", *_rows(without_effect)]))
    changes = earlier.get("changes", [])
    return [*changes, {"step": earlier.get("steps"), "changes": changed}] if changed else changes


def _stage(settings: Mapping[str, Any]) -> str:
    return "stage3" if "rounds" in settings else "stage2" if "pairs" in settings else "stage1"


def _changes(earlier: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, list[Any]]:
    """`{name: [old, new]}` of the values that differ."""
    return {
        name: [value, present.get(name)]
        for name, value in earlier.items()
        if _value(value) != _value(present.get(name))
    }


def _rows(changes: Mapping[str, list[Any]]) -> list[str]:
    return [f"  {name}: {_text(old)} -> {_text(new)}" for name, (old, new) in changes.items()]


def _value(value: Any) -> Any:
    return value["fingerprint"] if isinstance(value, Mapping) and "fingerprint" in value else value


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "fingerprint" in value:
        return f"{value['source']} ({value['fingerprint'][:12]})"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def move_aside(folder: str | Path) -> None:
    """Renames a folder that is not empty to `FOLDER-old-N`, and prints its new name."""
    path = Path(folder)
    if not path.is_dir() or {entry.name for entry in path.iterdir()} <= {LOCK_FILE}:
        return
    number = 1
    while (target := path.with_name(f"{path.name}-old-{number}")).exists():
        number += 1
    path.rename(target)
    (target / LOCK_FILE).unlink(missing_ok=True)
    say(f"the earlier run is in {target}")


def check_output_dir(config: Any) -> None:
    """Refuses an `output_dir` that is a folder of images, such as those to train on.

    Raises:
        ValueError: If it has image files, and nothing that a run has left.
    """
    folder = Path(config.output_dir)
    if not folder.is_dir() or any(entry for name in (*LEFT_BY_RUNS, "checkpoint-*") for entry in folder.glob(name)):
        return
    images = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in image_suffixes())
    if images:
        more = f" and {len(images) - 1} more" if len(images) > 1 else ""
        raise ValueError(
            f"output_dir {config.output_dir} is a folder of images ({images[0]}{more}); name another for the model "
            "and its checkpoints (--output_dir)"
        )


@contextmanager
def only_run_in(folder: str | Path) -> Iterator[None]:
    """Locks a folder, so that no other run writes into it. A folder that is new and still empty is removed again.

    Raises:
        ValueError: If another run has locked it, or it cannot be written.
    """
    if not is_main_process():
        yield
        return
    path = Path(folder) / LOCK_FILE
    created = [parent for parent in path.parents if not parent.exists()]
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another run writes into {folder}; wait for its end, or pass another --output_dir"
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"output_dir {folder} cannot be written: {reason}; name another --output_dir") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release, so that nobody locks a file that is about to vanish
        lock.release()
        with suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


def is_main_process() -> bool:
    """Whether this is the first process of a run. The launcher says so before the trainer is set up."""
    return os.environ.get("RANK", "0") == "0"


def say(message: str) -> None:
    """Prints a message, in the first process of a run alone."""
    if is_main_process():
        print(message, flush=True)
