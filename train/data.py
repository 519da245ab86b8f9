"""Data sets of images and of image-caption pairs, and the collators that make batches of them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from vlv import VLVImageProcessor, VLVProcessor
from vlv.image_files import walk_images

logger = logging.get_logger(__name__)

SIDECAR_SUFFIXES = (".txt", ".caption")


class ListDataset(Dataset):
    """A list of `{"image": path}` or `{"image": path, "caption": text}`. The collator opens the images.

    Args:
        root: The folder that the paths lie in.
    """

    def __init__(self, items: Sequence[dict[str, Any]], root: str | os.PathLike = "."):
        self.items, self.root = items, root

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def fingerprint(self) -> str:
        """A hash of names, sizes and captions, which does not depend on where the folder lies."""
        digest = hashlib.sha256()
        for item in self.items:
            name, size = os.path.relpath(item["image"], self.root), os.stat(item["image"]).st_size
            digest.update(repr((name, size, item.get("caption"))).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class ColumnDataset(Dataset):
    """A `datasets.Dataset` with its columns renamed to `image` and `caption`. Images stay encoded.

    Args:
        folders: The folder that relative image paths start from, and the number of rows that it counts for: one pair
            for each file of the table, in the order of the rows. By default they start from the working directory.

    Raises:
        ValueError: If the table has no column of a given name, or no caption has words.
    """

    def __init__(
        self,
        table: Any,
        image_column: str,
        caption_column: str | None,
        folders: Sequence[tuple[str, int]] = (),
    ):
        columns = {"image": image_column} | ({"caption": caption_column} if caption_column else {})
        for column in columns.values():
            if column not in table.column_names:
                raise ValueError(f"the data has the columns {table.column_names}, but no {column!r}")
        from datasets import Image

        table = table.select_columns(list(dict.fromkeys(columns.values())))
        if isinstance(table.features[image_column], Image):
            table = table.cast_column(image_column, Image(decode=False))
        self.table, self.columns = table, columns
        self.array_dtype = getattr(table.features[image_column], "dtype", "uint8")
        self._folders = [folder for folder, _ in folders]
        self._ends = np.cumsum([count for _, count in folders])
        self._rows: np.ndarray | None = None  # those with a caption, if some have none
        if caption_column and getattr(table.features[caption_column], "dtype", None) in ("string", "large_string"):
            captions = table.select_columns([caption_column]).with_format("numpy")
            has_words = np.array([bool(text.strip()) if text else text is None for text in captions[caption_column]])
            if not has_words.all():
                self._rows = np.flatnonzero(has_words)
                _report_empty([f"row {row}" for row in np.flatnonzero(~has_words)], len(has_words))

    def __len__(self) -> int:
        return len(self.table) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index if self._rows is None else int(self._rows[index])
        row = self.table[number]
        item = {name: row[column] for name, column in self.columns.items()}
        if isinstance(item["image"], dict):  # an encoded image
            item["image"] = item["image"].get("bytes") or self._resolve(item["image"]["path"], number)
        elif isinstance(item["image"], str):
            item["image"] = self._resolve(item["image"], number)
        elif isinstance(item["image"], list):  # an Array3D feature
            item["image"] = np.asarray(item["image"], dtype=self.array_dtype)
        return item

    def _resolve(self, path: str | None, number: int) -> str | None:
        """A path of row `number`, from the folder of the row's file. Others (URLs, base64) stay as they are."""
        if self._folders and path:
            beside = os.path.join(self._folders[int(np.searchsorted(self._ends, number, side="right"))], path)
            if os.path.exists(beside):
                return beside
        return path

    def fingerprint(self) -> str:
        """A hash of the number of rows, the columns and up to 64 rows. It does not depend on the files' folder."""
        digest = hashlib.sha256(repr((len(self), str(self.table.features))).encode())
        for number in np.unique(np.linspace(0, max(len(self.table) - 1, 0), 64).astype(int)):
            row = self.table[int(number)]
            if isinstance(row[self.columns["image"]], dict):
                image = row[self.columns["image"]]
                row |= {self.columns["image"]: image["bytes"] or os.path.basename(image["path"] or "")}
            digest.update(repr(row).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def _report_empty(names: list[str], total: int) -> None:
    """Says which captions are empty and left out.

    Raises:
        ValueError: If all are.
    """
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if len(names) == total:
        raise ValueError(f"all {total} captions are empty ({shown}); is this the right data?")
    logger.warning(f"{len(names)} of {total} captions are empty and left out: {shown}")


def load_images(source: str, *, split: str = "train", image_column: str = "image") -> ListDataset | ColumnDataset:
    """Images without captions, for stage 1. Items are `{"image": ...}`.

    Args:
        source: A folder of images (searched recursively), a parquet file, a folder or glob of parquet files, or a
            data set that `datasets.load_dataset` finds.
        split: Split of a data set.
        image_column: Column of a data set or parquet file.

    Raises:
        ImportError: If reading `source` needs the library `datasets` and it is not installed.
        ValueError: If nothing is found; the message says what was looked for.
    """
    if os.path.isdir(source) and not _parquet_files(source):
        return ListDataset([{"image": str(path)} for path in _find_images(Path(source))], source)
    return ColumnDataset(_load_table(source, split, [image_column]), image_column, None, _folders(source))


def load_pairs(
    source: str, *, split: str = "train", image_column: str = "image", caption_column: str = "caption"
) -> ListDataset | ColumnDataset:
    """Image-caption pairs, for stage 2. Items are `{"image": ..., "caption": str}`.

    Args:
        source: A folder of images with captions, a parquet file, a folder or glob of parquet files, or a data set that
            `datasets.load_dataset` finds. A folder has either a `.txt` or `.caption` file beside each image, or
            `.jsonl` files with lines `{"file_name": path within the folder, "caption": text}`.
        split: Split of a data set.
        image_column, caption_column: Columns of a data set or parquet file, and keys in a `.jsonl` file.

    Raises:
        ImportError: If reading `source` needs the library `datasets` and it is not installed.
        ValueError: If nothing is found, an image has no caption, or a listed image does not exist; the message names
            the file.
    """
    if os.path.isdir(source) and not _parquet_files(source):
        return ListDataset(_with_words(list(_folder_pairs(Path(source), image_column, caption_column))), source)
    table = _load_table(source, split, [image_column, caption_column])
    return ColumnDataset(table, image_column, caption_column, _folders(source))


def _with_words(items: list[dict[str, str]]) -> list[dict[str, str]]:
    """The pairs whose captions are not empty. Says which ones are, and how many captions have several lines."""
    kept = [item for item in items if item["caption"].strip()]
    if len(kept) < len(items):
        _report_empty([item["image"] for item in items if not item["caption"].strip()], len(items))
    if lines := [count for item in kept if (count := len(item["caption"].splitlines())) > 1]:
        logger.warning(
            f"{len(lines)} of {len(kept)} captions have several lines (at most {max(lines)}), which are learnt as one "
            "caption; leave one line where they are alternatives or translations"
        )
    return kept


def _find_images(folder: Path) -> list[Path]:
    images = []
    for path, problem in walk_images(folder):
        if problem is None:
            images.append(path)
        else:
            logger.warning(f"{path} is left out: {problem}")
    if not images:
        raise ValueError(f"no images in {folder}; looked in all its folders for files that Pillow can read")
    return images


def _folder_pairs(folder: Path, image_column: str, caption_column: str) -> Iterator[dict[str, str]]:
    lists = sorted(folder.glob("*.jsonl"))
    if lists:
        found = [pair for path in lists for pair in _jsonl_pairs(path, image_column, caption_column)]
        if not found:
            raise ValueError(
                f"no pairs in {', '.join(map(str, lists))}; fill it, or remove it to read .txt files beside the images"
            )
        yield from found
        return
    for image in _find_images(folder):
        sidecar = next((image.with_suffix(s) for s in SIDECAR_SUFFIXES if image.with_suffix(s).is_file()), None)
        if sidecar is None:
            raise ValueError(f"{image} has no caption: expected {image.stem}.txt or {image.stem}.caption beside it")
        try:
            caption = sidecar.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{sidecar} is not UTF-8: {error}") from error
        yield {"image": str(image), "caption": caption.strip()}


def _jsonl_pairs(path: Path, image_column: str, caption_column: str) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
            name = row.get("file_name", row.get(image_column)) if isinstance(row, dict) else None
            if not isinstance(name, str) or not isinstance(row.get(caption_column), str):
                raise ValueError(f'{path}, line {number}: expected {{"file_name": ..., "{caption_column}": ...}}')
            image = path.parent / name
            if not image.is_file():
                raise ValueError(f"{path}, line {number}: {image} does not exist")
            yield {"image": str(image), "caption": row[caption_column]}


def _parquet_files(source: str) -> list[str]:
    if os.path.isdir(source):
        return sorted(str(path) for path in Path(source).rglob("*.parquet"))
    if source.endswith(".parquet"):
        from glob import glob

        return sorted(glob(source)) or [source]
    return []


def _folders(source: str) -> list[tuple[str, int]]:
    """The folder and the number of rows of each parquet file of a source; none for other sources."""
    files = _parquet_files(source)
    if not files:
        return []
    from pyarrow import parquet

    return [(os.path.dirname(os.path.abspath(file)), parquet.read_metadata(file).num_rows) for file in files]


def _load_table(source: str, split: str, columns: list[str]) -> Any:
    try:
        import datasets
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            "reading data sets and parquet needs the extra vlv[train] (pip install '.[train]' in its source folder)"
        ) from error
    files = _parquet_files(source)
    for file in files:
        if not os.path.exists(file):
            raise ValueError(f"{file} does not exist")
        try:
            names = parquet.read_schema(file).names
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        for column in columns:
            if column not in names:
                raise ValueError(f"{file} has the columns {names}, but no {column!r}")
    try:
        if files:
            return datasets.load_dataset(
                "parquet", data_files=files, split="train", columns=list(dict.fromkeys(columns))
            )
        if _is_path(source):
            raise ValueError(f"{source} does not exist; give a folder, parquet files, or a data set such as org/name")
        return datasets.load_dataset(source, split=split)
    except (datasets.exceptions.DatasetsError, ArrowException) as error:
        raise ValueError(f"{source} cannot be read: {error.__cause__ or error}") from error


def _is_path(source: str) -> bool:
    """Whether a name cannot be that of a data set on the Hub, which is `org/name`."""
    return not os.path.exists(source) and (source.startswith((".", "/", "~")) or source.count("/") != 1)


def readable_items(dataset: Any, count: int, load: Callable[[Any], Any]) -> list[dict]:
    """The first `count` items whose image `load` can read, with the images that it returns.

    Tries at most 1000 items. Says so if none can be read.
    """
    items: list[dict] = []
    for index in range(min(1000, len(dataset))):
        if len(items) == count:
            break
        item = dataset[index]
        try:
            items.append(item | {"image": load(item["image"])})
        except ValueError:
            continue
    if not items:
        logger.warning("there are no validation samples: none of the first images can be read")
    return items


MAX_UNREADABLE_BATCHES = 100
"""After this many batches in a row without a readable image, training ends with an error."""


class _SkippingCollator:
    """Leaves out unreadable items, logs each, and adds their number to the batch as `num_skipped`.

    If no item of a batch is readable, the last readable item of an earlier batch takes their place, because a training
    step needs a batch.

    Raises:
        ValueError: If `on_bad_image` is neither `"skip"` nor `"error"`.
    """

    def __init__(self, on_bad_image: str = "skip"):
        if on_bad_image not in ("skip", "error"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; expected 'skip' or 'error'")
        self.on_bad_image = on_bad_image
        self.last_readable: tuple[dict, Any] | None = None
        self.num_unreadable_batches = 0

    def load_readable(self, items: list[dict], load: Callable[[Any], Any]) -> tuple[list[dict], list[Any], int]:
        """Readable items, their images, and the number of unreadable items.

        Raises:
            ValueError: If an item is unreadable and `on_bad_image` is `"error"`, or no item can be returned.
        """
        readable, images = [], []
        for item in items:
            try:
                image = load(item["image"])
                if not isinstance(item.get("caption", ""), str):
                    raise ValueError(
                        f"the caption is a {type(item['caption']).__name__}, not text: {item['image']!r:.80}"
                    )
            except ValueError as error:
                if self.on_bad_image == "error":
                    raise
                logger.warning(f"skipped an image: {error}")
                continue
            readable.append(item)
            images.append(image)
        num_skipped = len(items) - len(readable)
        self.num_unreadable_batches = 0 if readable else self.num_unreadable_batches + 1
        if readable:
            self.last_readable = (readable[-1], images[-1])
        elif self.last_readable is None or self.num_unreadable_batches > MAX_UNREADABLE_BATCHES:
            raise ValueError(f"none of the {len(items)} images of a batch can be read; is this the right data?")
        else:
            readable, images = [self.last_readable[0]], [self.last_readable[1]]
        return readable, images, num_skipped


class Stage1Collator(_SkippingCollator):
    """Batches of images: `pixel_values` for the encoder and `diffusion_pixels` for the diffusion model.

    Args:
        image_processor: Loads and crops the images, and gives `pixel_values` `(B, 3, height, width)`.
        diffusion_image_size: Side S in pixels of `diffusion_pixels` `(B, 3, S, S)`, uint8 in 0..255.
        on_bad_image: `"skip"` or `"error"`.
    """

    def __init__(self, image_processor: VLVImageProcessor, diffusion_image_size: int, on_bad_image: str = "skip"):
        super().__init__(on_bad_image)
        self.image_processor, self.diffusion_image_size = image_processor, diffusion_image_size

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        _, images, num_skipped = self.load_readable(items, self.image_processor.load)
        size = (self.diffusion_image_size, self.diffusion_image_size)
        targets = [np.asarray(image if image.size == size else image.resize(size)) for image in images]  # (S, S, 3)
        pixel_values = self.image_processor(images, return_tensors="pt", pre_crop_size=None).pixel_values
        return {
            "pixel_values": pixel_values,
            "diffusion_pixels": torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2),
            "num_skipped": num_skipped,  # an int: reading a tensor would wait for the device
        }


class Stage2Collator(_SkippingCollator):
    """Batches of pairs: `pixel_values` `(B, 3, height, width)` and `labels` `(B, L)`, where -100 marks padding.

    Args:
        processor: Prepares images and captions.
        max_caption_tokens: Longer captions are cut to this length.
        on_bad_image: `"skip"` or `"error"`.
        append_eos, pad_to_max_length: As in [`VLVProcessor`]'s call; the authors' code has False and True.
    """

    def __init__(
        self,
        processor: VLVProcessor,
        max_caption_tokens: int,
        on_bad_image: str = "skip",
        append_eos: bool = True,
        pad_to_max_length: bool = False,
    ):
        super().__init__(on_bad_image)
        self.processor, self.max_caption_tokens = processor, max_caption_tokens
        self.append_eos, self.pad_to_max_length = append_eos, pad_to_max_length

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        items, images, num_skipped = self.load_readable(items, self.processor.image_processor.load)
        batch = self.processor(
            images=images,
            suffix=[item["caption"] for item in items],
            max_length=self.max_caption_tokens,
            append_eos=self.append_eos,
            pad_to_max_length=self.pad_to_max_length,
            pre_crop_size=None,
        )
        return {**batch, "num_skipped": num_skipped}
