"""Image files on disk: folders with sidecars, and list files (.jsonl, .json, .csv, .tsv) that name images."""

import csv
import hashlib
import json
import os
import pickle
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from vlv.image_files import is_url, walk_images

from .captions import (
    CAPTION_COLUMNS,
    IMAGE_COLUMN,
    IMAGE_COLUMNS,
    alternatives,
    check_prompt,
    count_alternatives,
    find_column,
    find_prompt_column,
    sidecar_captions,
)
from .source import Source

logger = logging.get_logger(__name__)

SIDECAR_SUFFIXES = (".txt", ".caption")
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
NO_LISTS = (".resume.jsonl", ".rejected.jsonl")  # beside the outputs of `vlv caption` and `vlv data recaption`

PROBLEM = "problem"
"""In an item of a list: why its image cannot be read."""

SURROGATES = "surrogateescape"
"""How lines are read, so that bytes that are not UTF-8 spoil their line alone."""

Rows = Iterator[tuple[str, dict[str, Any] | ValueError]]


class ListDataset(Source):
    """A list of `{"image": path}` or `{"image": path, "caption": text or list of texts, "prompt": instruction}`.

    Items are kept in one block of bytes: an object for each would take several times the memory, and a copy in each
    process of a data loader.

    Args:
        root: The folder that the paths lie in.
    """

    def __init__(self, items: Iterable[dict[str, Any]], root: str | os.PathLike = "."):
        self._data, ends = bytearray(), array("q")
        for item in items:
            self._data += pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
            ends.append(len(self._data))
            self.has_prompts = self.has_prompts or bool(item.get("prompt"))
        self._ends, self.root = np.array(ends, dtype=np.int64), root
        self.has_captions = len(self) > 0 and "caption" in self[0]

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        end = int(self._ends[number])
        start = int(self._ends[number - 1]) if number % len(self) else 0
        return pickle.loads(memoryview(self._data)[start:end])

    def name(self, number: int) -> str:
        return self[number]["image"]

    def count_captions(self) -> np.ndarray:
        return np.fromiter((count_alternatives(item.get("caption")) for item in self), np.int32, len(self))

    def fingerprint(self) -> str:
        """A hash of names, sizes and captions, which does not depend on where the folder lies."""
        digest = hashlib.sha256()
        for item in self:
            if "caption" in item and not alternatives(item["caption"]):
                continue  # left out
            image = item["image"]
            name = image if is_url(image) else os.path.relpath(image, self.root)
            prompt = [item["prompt"]] if item.get("prompt") else []
            known = (name, file_size(image), item.get("caption"), *prompt)
            digest.update(repr(known).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def file_size(path: str) -> int | None:
    """In bytes; None if there is no such file, as of a name that no file can have."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None


def image_files(folder: Path) -> Iterator[Path]:
    """The images of a folder. Says what is left out.

    Raises:
        ValueError: If there is none.
    """
    found = False
    for path, problem in walk_images(folder):
        if problem is None:
            found = True
            yield path
        else:
            logger.warning(f"{path} is left out: {problem}")
    if not found:
        raise ValueError(f"no images in {folder}; looked in all its folders for files that Pillow can read")


def lists_of_a_folder(folder: Path) -> list[Path]:
    """The list files of a folder of images: its `.jsonl` files, or else `metadata.csv`."""
    found = sorted(path for path in folder.glob("*.jsonl") if not path.name.endswith(NO_LISTS))
    return found or [path for path in (folder / "metadata.csv", folder / "metadata.tsv") if path.is_file()]


def read_folder(folder: Path, caption_lines: str) -> Iterator[dict[str, Any]]:
    """The images of a folder, each with the captions in the `.txt` or `.caption` file beside it; "" without one.

    Raises:
        ValueError: If no image is found, or none has such a file.
    """
    found, image = False, folder
    for image in image_files(folder):
        sidecar = next((image.with_suffix(s) for s in SIDECAR_SUFFIXES if image.with_suffix(s).is_file()), None)
        if sidecar is None:
            yield {"image": str(image), "caption": ""}
            continue
        found = True
        try:
            captions = sidecar_captions(sidecar.read_text(encoding="utf-8-sig"), caption_lines)
        except UnicodeDecodeError as error:
            logger.warning(f"{sidecar} is not UTF-8: {error}")
            yield {"image": str(image), "caption": None}
            continue
        yield {"image": str(image), "caption": captions if len(captions) > 1 else "".join(captions)}
    if not found:
        raise ValueError(
            f"no image in {folder} has a caption: expected files such as {image.stem}.txt or {image.stem}.caption "
            f"beside {image}"
        )


def read_list(
    path: Path,
    image_column: str,
    caption_column: str | None,
    root: str | os.PathLike | None = None,
    prompt_column: str | None = None,
    keeps_unreadable: bool = False,
) -> Iterator[dict[str, Any]]:
    """The images, and captions and instructions if `caption_column` is given, that a list file names.

    Args:
        root: The folder that relative paths start from; by default that of the list.
        keeps_unreadable: Whether a line that cannot be read or names no image is an item, too, whose `problem` says
            why, and a URL and an image that does not exist are items as others.

    Raises:
        ValueError: If a line cannot be read, or an image is none or does not exist (all unless `keeps_unreadable`), a
            column is missing, or an instruction is not text; names file and line.
    """
    folder = Path(root) if root is not None else path.parent
    columns: tuple[str, str | None] | None = None
    prompt_column, has_prompts = prompt_column if caption_column is not None else None, False
    without_columns: ValueError | None = None
    for where, row in _rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            if columns is None or not row.keys() >= {name for name in columns if name is not None}:
                try:
                    columns = _columns(row, image_column, caption_column, where)
                except ValueError as error:
                    without_columns = without_columns or error
                    raise
            item = {"image": _image(row[columns[0]], folder, where, root is not None, keeps_unreadable)}
            prompt = ""
            if prompt_column in row and prompt_column != columns[1]:
                prompt = check_prompt(row[prompt_column], where)
        except ValueError as error:
            if not keeps_unreadable:
                raise
            yield _unreadable(where, path, folder, str(error), caption_column)
            continue
        if prompt_column in row and find_prompt_column(row, prompt_column, columns[1], str(path)):
            has_prompts = True
        yield item | ({"caption": row[columns[1]]} if columns[1] else {}) | ({"prompt": prompt} if prompt else {})
    if columns is None and without_columns is not None:
        raise without_columns
    if not has_prompts and columns is not None:
        find_prompt_column((), prompt_column, columns[1], str(path))


def _image(value: Any, folder: Path, where: str, has_root: bool, keeps_unreadable: bool) -> str:
    """The path or URL of an image in a line. Raises `ValueError` as `read_list`."""
    name = value.get("path") if isinstance(value, dict) else value  # an image of `datasets`, written as JSON
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: the image is {name!r:.80}, expected a path")
    if is_url(name):
        if not keeps_unreadable:
            raise ValueError(f"{where}: {name:.80} is a URL; download the images first (for example with img2dataset)")
        return name
    image = folder / name
    if not keeps_unreadable and not os.path.isfile(image):
        hint = "" if has_root else "; name the folder that paths start from by --image_root"
        raise ValueError(f"{where}: {image} does not exist{hint}")
    return str(image)


def _unreadable(where: str, path: Path, folder: Path, problem: str, caption_column: str | None) -> dict[str, Any]:
    """The item of a line that names no image. It is called by the name of the list and the line."""
    name = f"{path.name}{where.removeprefix(str(path))}".replace(os.sep, " ")
    return {"image": str(folder / name), PROBLEM: problem} | ({} if caption_column is None else {"caption": None})


def _columns(row: dict[str, Any], image_column: str, caption_column: str | None, where: str) -> tuple[str, str | None]:
    names = [name for name in row if isinstance(name, str)]
    try:
        if image_column in (IMAGE_COLUMN, "file_name") and "file_name" in names:
            image = "file_name"  # as `datasets` names it
        else:
            image = find_column(names, image_column, IMAGE_COLUMNS, where.rpartition(", ")[0])
        if caption_column is None:
            return image, None
        return image, find_column(names, caption_column, CAPTION_COLUMNS, where.rpartition(", ")[0])
    except ValueError as error:
        expected = {"file_name": "...", **({caption_column: "..."} if caption_column else {})}
        raise ValueError(f"{where}: expected columns such as {json.dumps(expected)}; {error}") from error


def _rows(path: Path) -> Rows:
    """`("FILE, line N", columns)` of each row of a list file, or an error in place of the columns.

    Raises:
        ValueError: If the file cannot be read as a whole.
    """
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _jsonl_rows(path)
        elif path.suffix.lower() == ".json":
            yield from _json_rows(path)
        else:
            yield from _csv_rows(path, "\t" if path.suffix.lower() == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _jsonl_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", errors=SURROGATES) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                _require_utf8(line)
                row = json.loads(line)
            except UnicodeEncodeError:
                row = ValueError(f"{where} is not UTF-8")
            except (ValueError, RecursionError) as error:  # also of numbers that are too long
                row = ValueError(f"{where} is not valid JSON: {error}")
            yield where, _object(row, where)


def _require_utf8(text: str) -> None:
    """Raises `UnicodeEncodeError` if a text that was read with `SURROGATES` holds bytes that are not UTF-8."""
    text.encode("utf-8")


def _object(row: Any, where: str) -> dict[str, Any] | ValueError:
    if isinstance(row, dict | ValueError):
        return row
    return ValueError(f"{where}: expected an object, got a {type(row).__name__}")


def _json_rows(path: Path) -> Rows:
    """Rows of `{name: caption}`, as `vlv caption` writes it, of a list of objects, or of COCO's captions."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(content, list):
        for number, row in enumerate(content):
            where = f"{path}, entry {number}"
            yield where, _object(row, where)
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        captions: dict[str, list[Any]] = {}
        annotations = content.get("annotations") or []
        if not isinstance(annotations, list):
            raise ValueError(f"{path}: expected a list in 'annotations', got a {type(annotations).__name__}")
        for annotation in annotations:
            if not isinstance(annotation, dict):
                raise ValueError(f"{path}: expected objects in 'annotations', got a {type(annotation).__name__}")
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
        for number, image in enumerate(content["images"]):
            where, row = f"{path}, image {number}", image
            if isinstance(image, dict):
                row = {"file_name": image.get("file_name"), "caption": captions.get(str(image.get("id")), [])}
            yield where, _object(row, where)
    elif isinstance(content, dict):
        for name, caption in content.items():
            row = caption if isinstance(caption, dict) else {"caption": caption}  # with a score, or without
            yield f"{path}, {name!r}", row | {"file_name": name}
    else:
        raise ValueError(f"{path}: expected {{name: caption}} or a list of objects, got a {type(content).__name__}")


def _csv_rows(path: Path, delimiter: str) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors=SURROGATES, newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, restval=None)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    expected = f"{len(reader.fieldnames or ())} columns as in the first line"
                    yield where, ValueError(f"{where}: expected {expected}; quote fields that hold commas")
                    continue
                try:
                    _require_utf8("".join(row.values()))
                except UnicodeEncodeError:
                    yield where, ValueError(f"{where} is not UTF-8")
                else:
                    yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} cannot be read: {error}") from error
