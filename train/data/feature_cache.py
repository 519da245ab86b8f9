"""A cache of tensors that a frozen model computes of images: safetensors files, looked up by what is in the image."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from vlv.files import read_header, read_json, require_space, set_default_permissions, write_atomically, write_json

from .collators import load_item
from .mixture import TrainingDataset

logger = logging.get_logger(__name__)

MANIFEST = "cache.json"
VERSION = 1
KEY = 2  # unsigned 64-bit numbers
ROWS_PER_FILE = 1024
BYTES_PER_FILE = 10**9
"""The rows of a file are held in memory until it is written."""
MAX_OPEN_FILES = 64


def image_key(image: Image.Image) -> np.ndarray:
    """`(2,)` uint64: a hash of the size and the pixels of an image."""
    digest = hashlib.blake2b(repr((image.size, image.mode)).encode(), digest_size=8 * KEY)
    digest.update(image.tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint64)


class FeatureCache:
    """A folder of safetensors files with one tensor for each image, all of one shape and precision.

    An image is found by its pixels as the image processor loads them, so that names, order and weights of the data do
    not matter, and an image that has changed is not found. Files are memory-mapped and read when they are needed.
    `cache.json` says what the tensors depend on besides the pixels.

    Args:
        folder: The folder; it need not exist.
        made_of: What the tensors depend on, as JSON values: the model's fingerprint, sizes, precision.
        shape, dtype: Of the tensor of an image.
        report_damage: Called with what is wrong with a file that is damaged, which is then removed, or that cannot be
            read. The cache then lacks its images. Without it, that is an error.

    Raises:
        ValueError: If the folder holds a cache that is made of something else, with what differs, or is damaged.
    """

    key = staticmethod(image_key)

    def __init__(
        self,
        folder: str | Path,
        made_of: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        report_damage: Callable[[str], None] | None = None,
    ):
        self.folder, self.shape, self.dtype, self._report_damage = Path(folder), shape, dtype, report_damage
        self.made_of = {
            "version": VERSION,
            **made_of,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
        }
        self._handles: dict[int, Any] = {}
        if (self.folder / MANIFEST).is_file():
            self._refuse_stale(read_json(self.folder / MANIFEST, "made_of")["made_of"])
        elif self.folder.is_dir() and any(map(_is_visible, self.folder.iterdir())):
            raise ValueError(f"{self.folder} is not empty and holds no {MANIFEST}; name a new folder for the cache")
        self._open()

    def _refuse_stale(self, stored: Mapping[str, Any]) -> None:
        names = [name for name in {**stored, **self.made_of} if stored.get(name) != self.made_of.get(name)]
        if names:
            rows = "\n".join(f"  {name}: {stored.get(name)} -> {self.made_of.get(name)}" for name in names)
            raise ValueError(
                f"the cache {self.folder} was made with other settings or another model than this run's:\n{rows}\n"
                "name another folder, or remove this one to make it anew"
            )

    def _open(self) -> None:
        """Reads the keys of all files.

        Raises:
            ValueError: If a file is damaged.
        """
        self._handles = {}
        self._added: dict[bytes, tuple[int, int]] = {}
        """File and row of what `add` has added, by key."""
        self._lost: set[int] = set()
        """Numbers of files that cannot be read any more."""
        self.files: list[Path] = []
        keys = []
        for path in sorted(filter(_is_visible, self.folder.glob("*.safetensors"))):
            try:
                names = set(read_header(path))
                if names == {"keys", "features"}:
                    with safe_open(path, "np") as file:
                        keys.append(file.get_tensor("keys").view(np.uint64).reshape(-1, KEY))
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, ValueError) as error:
                if self._report_damage is None:
                    raise
                is_damaged = isinstance(error, ValueError)
                self._report_damage(f"{error}; it is removed" if is_damaged else f"{path} cannot be read: {error}")
                if is_damaged:
                    path.unlink(missing_ok=True)
                continue
            if names != {"keys", "features"}:
                raise ValueError(f"{path} is no part of a cache; remove it, or name another folder")
            self.files.append(path)
        places = [np.stack([np.full(len(own), n), np.arange(len(own))], 1) for n, own in enumerate(keys)]
        all_keys = np.concatenate([np.zeros((0, KEY), np.uint64), *keys])
        order = np.argsort(all_keys[:, 0], kind="stable")
        self._keys = all_keys[order]
        self._places = np.concatenate([np.zeros((0, 2), np.int64), *places])[order]  # file and row of each key

    def __getstate__(self):
        return self.__dict__ | {"_handles": {}}

    def __len__(self) -> int:
        return len(self._keys) + len(self._added)

    def bytes_of(self, count: int) -> int:
        """The size on disk of the tensors of so many images."""
        return count * (int(np.prod(self.shape)) * self.dtype.itemsize + 8 * KEY)

    def _find(self, key: np.ndarray) -> tuple[int, int] | None:
        """The number of a file and the row in it."""
        if (added := self._added.get(key.tobytes())) is not None:
            return added
        place = int(np.searchsorted(self._keys[:, 0], key[0]))
        while place < len(self._keys) and self._keys[place, 0] == key[0]:
            if self._keys[place, 1] == key[1]:
                return int(self._places[place, 0]), int(self._places[place, 1])
            place += 1
        return None

    def __contains__(self, key: np.ndarray) -> bool:
        return self._find(key) is not None

    def get(self, image: Image.Image, name: Any) -> torch.Tensor:
        """The tensor of an image.

        Args:
            image: As the image processor loads it.
            name: What messages call it.

        Raises:
            ValueError: If it is not in the cache.
        """
        features = self.find(image_key(image))
        if features is None:
            raise ValueError(
                f"{name!s:.200} is not in the cache {self.folder}, as its pixels are now; has the image changed since "
                "the cache was made? Remove the folder to make it anew"
            )
        return features

    def find(self, key: np.ndarray) -> torch.Tensor | None:
        """The tensor of the image with a key; None if it is not in the cache.

        With `report_damage`, an image whose file has gone or cannot be read is not in the cache, either.

        Raises:
            OSError, SafetensorError: If the file has gone or cannot be read, and there is no `report_damage`.
        """
        found = self._find(key)
        if found is None or found[0] in self._lost:
            return None
        number, row = found
        try:
            if number not in self._handles:
                if len(self._handles) >= MAX_OPEN_FILES:
                    self._handles.pop(next(iter(self._handles)))
                self._handles[number] = safe_open(self.files[number], "pt").__enter__().get_slice("features")
            return self._handles[number][row : row + 1][0]
        except (OSError, SafetensorError) as error:
            if self._report_damage is None:
                raise
            self._lost.add(number)
            self._report_damage(f"{self.files[number]} has gone or cannot be read: {error}")
            return None

    def add(self, keys: Sequence[np.ndarray], features: torch.Tensor) -> None:
        """Adds the tensors of images in a file of their own, which other processes find when they open the cache.

        Args:
            keys: Of each image.
            features: `(B, *shape)`.

        Raises:
            OSError: If the folder cannot be written.
        """
        if not (self.folder / MANIFEST).is_file():
            write_json(self.folder / MANIFEST, {"made_of": self.made_of})
        own = np.stack(list(keys))
        path = self.folder / f"{hashlib.blake2b(own.tobytes(), digest_size=8).hexdigest()}.safetensors"
        self._write(path, own, features.to("cpu", self.dtype))
        self.files.append(path)
        self._added |= {key.tobytes(): (len(self.files) - 1, row) for row, key in enumerate(own)}

    def build(
        self,
        dataset: TrainingDataset,
        image_processor: Any,
        collate: Callable[[list[Image.Image]], torch.Tensor],
        compute: Callable[[torch.Tensor], torch.Tensor],
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        wait_for_everyone: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Adds the images of a data set that are missing. Interrupted, it goes on with the next file.

        Args:
            collate: Images, as the processor loads them, to the input of `compute`; runs in the loader's workers.
            compute: A batch of inputs to `(B, *shape)`.
            rank, num_ranks: This process, and the number of processes, which share the work.
            wait_for_everyone: Returns when all processes have called it.

        Raises:
            OSError: If the disk is too small, or the folder cannot be written.
        """
        rows = _Rows(dataset, image_processor, collate, self)
        fingerprint = dataset.fingerprint()
        length = max(min(ROWS_PER_FILE, BYTES_PER_FILE // self.bytes_of(1)), 1)
        chunks = [range(a, min(a + length, len(rows))) for a in range(0, len(rows), length)]
        names = [self.folder / f"{fingerprint[:16]}-{number:06}.safetensors" for number in range(len(chunks))]
        missing = [number for number, path in enumerate(names) if not path.is_file()]
        if missing:
            images = sum(len(chunks[number]) for number in missing)
            size = self.bytes_of(images)
            say(
                f"cache {self.folder}: looking at {images} images of {len(rows)}; those that are missing are added, "
                f"{_format_bytes(self.bytes_of(1))} an image, up to {_format_bytes(size)} in all"
            )
            require_space(self.folder, size)
            self.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                write_json(self.folder / MANIFEST, {"made_of": self.made_of})
            wait_for_everyone()
            batches = [
                (number, chunks[number][a : a + batch_size])
                for number in missing
                if number % num_ranks == rank
                for a in range(0, len(chunks[number]), batch_size)
            ]
            loader = DataLoader(
                rows,
                batch_sampler=[list(batch) for _, batch in batches],
                num_workers=num_workers,
                collate_fn=rows.collate_missing,
                generator=torch.Generator(),  # the state of the training's random numbers stays as it is
            )
            results = zip((number for number, _ in batches), loader, strict=True)
            for number, keys, features in self._by_chunk(results, compute):
                self._write(names[number], keys, features)
        wait_for_everyone()
        self._open()

    def _by_chunk(
        self, results: Iterable[tuple[int, Any]], compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
        """The number, keys and tensors of each file."""
        current: int | None = None
        keys, features = self._empty()
        for number, (batch_keys, inputs) in results:
            if current is not None and number != current:
                yield current, np.concatenate(keys), torch.cat(features)
                keys, features = self._empty()
            current = number
            if inputs is not None:
                keys.append(batch_keys)
                features.append(compute(inputs).to("cpu", self.dtype))
        if current is not None:
            yield current, np.concatenate(keys), torch.cat(features)

    def _empty(self) -> tuple[list[np.ndarray], list[torch.Tensor]]:
        return [np.zeros((0, KEY), np.uint64)], [torch.zeros((0, *self.shape), dtype=self.dtype)]

    def _write(self, path: Path, keys: np.ndarray, features: torch.Tensor) -> None:
        tensors = {"keys": torch.from_numpy(keys.view(np.int64)), "features": features.contiguous()}

        def write(temporary: Path) -> None:
            save_file(tensors, temporary)
            set_default_permissions(temporary)

        write_atomically(path, write)


def _is_visible(path: Path) -> bool:
    """Whether a file has its own name; a process that is killed while it writes leaves a hidden one."""
    return not path.name.startswith(".")


def _format_bytes(count: int) -> str:
    """Such as `1.18 MB`."""
    power = next(power for power in (12, 9, 6, 3, 0) if count >= 10**power or not power)
    return f"{count / 10**power:.3g} {({12: 'TB', 9: 'GB', 6: 'MB', 3: 'kB', 0: 'bytes'})[power]}"


class _Rows(Dataset):
    """Each image of the sources of a data set once, in the order in which it is stored."""

    def __init__(
        self,
        dataset: TrainingDataset,
        image_processor: Any,
        collate: Callable[[list[Image.Image]], torch.Tensor],
        cache: FeatureCache,
    ):
        self.sources = [part.source for part in dataset.parts]
        self.ends = np.cumsum([len(source) for source in self.sources])
        self.image_processor, self.collate, self.cache = image_processor, collate, cache

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> Image.Image | None:
        which = int(np.searchsorted(self.ends, number, side="right"))
        source = self.sources[which]
        row = number - int(self.ends[which] - len(source))
        try:
            return load_item({"image": source[row]["image"]}, self.image_processor)
        except (OSError, ValueError) as error:
            logger.warning(f"skipped an image: {source.name(row)}: {error}")
            return None

    def collate_missing(self, images: list[Image.Image | None]) -> tuple[np.ndarray, torch.Tensor | None]:
        """Keys and inputs of the images that can be read and are not in the cache, each once."""
        found = {image_key(image).tobytes(): image for image in images if image is not None}
        new = {key: image for key, image in found.items() if np.frombuffer(key, np.uint64) not in self.cache}
        keys = np.frombuffer(b"".join(new), np.uint64).reshape(-1, KEY)
        return keys, self.collate(list(new.values())) if new else None
