"""Images, and image-caption pairs, from wherever users keep them; prepared in the loader's worker processes."""

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
from vlv.files import IMAGE_SUFFIXES, find_images

logger = logging.get_logger(__name__)

SIDECAR_SUFFIXES = (".txt", ".caption")


class ListDataset(Dataset):
    """A list of `{"image": path}` or `{"image": path, "caption": text}`; images are opened in the worker."""

    def __init__(self, items: Sequence[dict[str, Any]]):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class ColumnDataset(Dataset):
    """A `datasets.Dataset` with its columns under the names that the collators know; images stay encoded."""

    def __init__(self, table: Any, image_column: str, caption_column: str | None):
        wanted = {"image": image_column} | ({"caption": caption_column} if caption_column else {})
        for column in wanted.values():
            if column not in table.column_names:
                raise ValueError(f"the data has columns {table.column_names}, but no {column!r}")
        from datasets import Image

        table = table.select_columns(list(dict.fromkeys(wanted.values())))
        if isinstance(table.features[image_column], Image):
            table = table.cast_column(image_column, Image(decode=False))
        self.table, self.wanted = table, wanted
        self.array_dtype = getattr(table.features[image_column], "dtype", "uint8")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.table[index]
        item = {name: row[column] for name, column in self.wanted.items()}
        if isinstance(item["image"], dict):  # how datasets hands over an encoded image
            item["image"] = item["image"].get("bytes") or item["image"]["path"]
        elif isinstance(item["image"], list):  # an Array3D feature
            item["image"] = np.asarray(item["image"], dtype=self.array_dtype)
        return item


def load_images(
    source: str, *, split: str = "train", image_column: str = "image", revision: str | None = None
) -> Dataset:
    """Images alone, for stage 1.

    Args:
        source: A folder of images (searched recursively), a parquet file or a folder or glob of them, or a dataset
            that `datasets.load_dataset` finds.
        split, image_column, revision: Of a dataset.

    Raises:
        ValueError: If nothing is found, with what was looked for.
    """
    if os.path.isdir(source) and not _parquet_files(source):
        paths = find_images(source)
        if not paths:
            raise ValueError(f"no images in {source}; looked for {', '.join(IMAGE_SUFFIXES)} in all its folders")
        return ListDataset([{"image": str(path)} for path in paths])
    return ColumnDataset(_load_table(source, split, revision), image_column, None)


def load_pairs(
    source: str,
    *,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "caption",
    revision: str | None = None,
) -> Dataset:
    """Image-caption pairs, for stage 2.

    Args:
        source: A folder of images with captions, a parquet file or a folder or glob of them, or a dataset that
            `datasets.load_dataset` finds. A folder has either one `.txt` or `.caption` file beside each image, or
            a `.jsonl` file of `{"file_name": path within the folder, "caption": text}`.

    Raises:
        ValueError: If nothing is found, or an image has no caption or a caption no image; the message names it.
    """
    if os.path.isdir(source) and not _parquet_files(source):
        return ListDataset(list(_folder_pairs(Path(source), image_column, caption_column)))
    return ColumnDataset(_load_table(source, split, revision), image_column, caption_column)


def _folder_pairs(folder: Path, image_column: str, caption_column: str) -> Iterator[dict[str, str]]:
    lists = sorted(folder.glob("*.jsonl"))
    if lists:
        found = [pair for path in lists for pair in _jsonl_pairs(path, image_column, caption_column)]
        if not found:
            raise ValueError(f"no pairs in {', '.join(map(str, lists))}: empty; without it, sidecars are read")
        yield from found
        return
    images = find_images(folder)
    if not images:
        raise ValueError(f"no images in {folder}; looked for {', '.join(IMAGE_SUFFIXES)} in all its folders")
    for image in images:
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
                raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
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


def _load_table(source: str, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading data sets and parquet needs the extra vlv[train] (pip install '.[train]' in its source folder)"
        ) from error
    files = _parquet_files(source)
    if files:
        missing = [name for name in files if not os.path.exists(name)]
        if missing:
            raise ValueError(f"{missing[0]} does not exist")
        return datasets.load_dataset("parquet", data_files=files, split="train")
    return datasets.load_dataset(source, split=split, revision=revision)


MOST_UNREADABLE_BATCHES = 100
"""So many batches in a row without a readable item are no accident."""


class _SkippingCollator:
    """Leaves out what cannot be read, says which, and counts it in the batch as `num_skipped`.

    Where nothing of a batch can be read, the last item that could be is used again, since a step needs a batch.
    """

    def __init__(self, on_bad_image: str = "skip"):
        if on_bad_image not in ("skip", "error"):
            raise ValueError(f"on_bad_image is {on_bad_image!r}; expected 'skip' or 'error'")
        self.on_bad_image = on_bad_image
        self.last: tuple[dict, Any] | None = None
        self.unreadable_batches = 0

    def readable(self, items: list[dict], load: Callable[[Any], Any]) -> tuple[list[dict], list[Any], int]:
        kept, pictures = [], []
        for item in items:
            try:
                picture = load(item["image"])
                if not isinstance(item.get("caption", ""), str):
                    raise ValueError(
                        f"the caption is a {type(item['caption']).__name__}, not text: {item['image']!r:.80}"
                    )
            except ValueError as error:
                if self.on_bad_image == "error":
                    raise
                logger.warning(f"left out an image: {error}")
                continue
            kept.append(item)
            pictures.append(picture)
        skipped = len(items) - len(kept)
        self.unreadable_batches = 0 if kept else self.unreadable_batches + 1
        if kept:
            self.last = (kept[-1], pictures[-1])
        elif self.last is None or self.unreadable_batches > MOST_UNREADABLE_BATCHES:
            raise ValueError(f"none of the {len(items)} images of a batch can be read; is this the right data?")
        else:
            kept, pictures = [self.last[0]], [self.last[1]]
        return kept, pictures, skipped


class Stage1Collator(_SkippingCollator):
    """Images to `pixel_values` for the encoder and `diffusion_pixels` (B, 3, S, S) uint8 for the frozen decoder."""

    def __init__(self, image_processor: VLVImageProcessor, diffusion_image_size: int, on_bad_image: str = "skip"):
        super().__init__(on_bad_image)
        self.image_processor, self.diffusion_image_size = image_processor, diffusion_image_size

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        _, pictures, skipped = self.readable(items, self.image_processor.load)
        side = (self.diffusion_image_size, self.diffusion_image_size)
        targets = [np.asarray(p if p.size == side else p.resize(side)) for p in pictures]  # (S, S, 3)
        pixel_values = self.image_processor(pictures, return_tensors="pt", pre_crop_size=None).pixel_values
        return {
            "pixel_values": pixel_values,
            "diffusion_pixels": torch.from_numpy(np.stack(targets)).permute(0, 3, 1, 2),
            "num_skipped": skipped,  # a number: a tensor would have to be fetched from the device
        }


class Stage2Collator(_SkippingCollator):
    """Pairs to `pixel_values` and `labels`, captions padded to the longest of the batch, EOS a target.

    Args:
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
        items, pictures, skipped = self.readable(items, self.processor.image_processor.load)
        captions = [item["caption"] for item in items]
        batch = self.processor(
            images=pictures,
            suffix=captions,
            max_length=self.max_caption_tokens,
            append_eos=self.append_eos,
            pad_to_max_length=self.pad_to_max_length,
            pre_crop_size=None,
        )
        return {**batch, "num_skipped": skipped}
