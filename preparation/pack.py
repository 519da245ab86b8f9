"""Packs images, with captions or without, into shards of one size: WebDataset tar files or parquet."""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from vlv.files import to_json
from vlv.processing_vlv import to_rgb

from .records import Record, Records, file_of, reason_of
from .run import FAILED, Run
from .tables import require_pyarrow

WEBDATASET, PARQUET = "webdataset", "parquet"
FORMATS = {WEBDATASET: ".tar", PARQUET: ".parquet"}
ROW_GROUP = 256
"""Images of a row group, which the trainers read as a whole."""
READ_AHEAD = 64
"""Images in memory at a time, besides a row group."""
_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2"}
"""Of formats for which Pillow has a more usual one than the first that it lists."""


class ShardWriter(Protocol):
    """Writes one shard."""

    def add(self, number: int, record: Record, data: bytes, facts: Mapping[str, Any]) -> None:
        """Adds an image: its number in the source, its file, its format and size."""

    def close(self) -> None:
        """Completes the shard."""


class TarWriter:
    """A WebDataset shard: `KEY.jpg` (or another image), `KEY.txt`, `KEY.json`, where KEY is the number in the source.

    The `.json` has the name, the size, and the captions and instruction if there are some. The `.txt` stands where
    there is one caption of one line, since the lines of a `.txt` are different captions.
    """

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed by `close`)

    def add(self, number: int, record: Record, data: bytes, facts: Mapping[str, Any]) -> None:
        key, values = f"{number:09d}", {"name": record.name, "width": facts["width"], "height": facts["height"]}
        self._member(key + _suffix(facts["format"]), data)
        if record.captions:
            one = record.captions[0] if len(record.captions) == 1 else None
            values["caption"] = one or record.captions
            if one is not None and len(one.splitlines()) == 1:
                self._member(f"{key}.txt", one.encode("utf-8", "replace"))
        if record.prompt:
            values["prompt"] = record.prompt
        self._member(f"{key}.json", to_json(values, None))

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # without time and owner: the same images give the same bytes
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()


def _suffix(format: str) -> str:
    """The suffix of image files of a format, by which readers of shards know an image."""
    listed = (suffix for suffix, own in Image.registered_extensions().items() if own == format)
    return _SUFFIXES.get(format) or next(listed, f".{format.lower()}")


class ParquetWriter:
    """A parquet shard with the columns `image` (as `datasets` stores images), `name`, `caption` and `prompt`.

    Args:
        pairs: Whether there are captions.
        several: Whether captions are lists.
        prompts: Whether there are instructions.
    """

    def __init__(self, path: Path, *, pairs: bool, several: bool, prompts: bool):
        import pyarrow as pa
        from pyarrow import parquet

        fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("name", pa.string())]
        features: dict[str, Any] = {"image": {"_type": "Image"}, "name": {"dtype": "string", "_type": "Value"}}
        if pairs:
            fields.append(("caption", pa.list_(pa.string()) if several else pa.string()))
            text = {"dtype": "string", "_type": "Value"}
            features["caption"] = {"feature": text, "_type": "List"} if several else text
        if prompts:
            fields.append(("prompt", pa.string()))
            features["prompt"] = {"dtype": "string", "_type": "Value"}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self._schema, self._several = pa.schema(fields, metadata=metadata), several
        self._writer, self._rows = parquet.ParquetWriter(path, self._schema), list[dict[str, Any]]()

    def add(self, number: int, record: Record, data: bytes, facts: Mapping[str, Any]) -> None:
        name = record.name.encode("utf-8", "replace").decode()
        row: dict[str, Any] = {"image": {"bytes": data, "path": os.path.basename(name)}, "name": name}
        if record.captions is not None:
            first = record.captions[0] if record.captions else None
            row["caption"] = record.captions if self._several else first
        self._rows.append(row | {"prompt": record.prompt})
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
            self._rows.clear()

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()


def pack(
    records: Records,
    output: str | os.PathLike,
    *,
    format: str = WEBDATASET,
    shard_images: int | None = 1000,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> dict[str, Any] | None:
    """Writes shards `shard-00000.tar`, ... into a folder, in the order of the source; the files stay as they are.

    A shard appears when it is complete, and a killed run goes on with the next. An image that cannot be decoded is
    left out and named in `failed.json`, with the reason.

    Args:
        output: The folder.
        format: Of `FORMATS`.
        shard_images: Records of a shard, those that are left out included.
        shard_bytes: A shard ends before the images would have more bytes; a larger image has a shard of its own.
        overwrite: Replaces the output of another run.
        advance: Called with numbers of images.

    Returns:
        The counts of the manifest: `images`, `failed`, `shards`, `bytes`; None if an earlier run has done the same.

    Raises:
        ValueError: If the output is of another run, or no image can be read.
        OSError: If a shard cannot be written.
    """
    output = Path(output)
    if format == PARQUET:
        require_pyarrow()
    if inside := records.place_in(output):
        raise ValueError(
            f"{output} is in {inside}, which is the source: its shards would be read as the source from then on; name "
            "a folder outside"
        )
    options = {"format": format, "shard_images": shard_images, "shard_bytes": shard_bytes}
    writes = [r"shard-\d{5,}\.(tar|parquet)", re.escape(FAILED)]
    with Run("pack", output, records.identity(), options, is_folder=True, overwrite=overwrite, writes=writes) as run:
        if run.finished:
            return None
        several = records.has_several_captions()

        def create(path: Path) -> ShardWriter:
            if format == WEBDATASET:
                return TarWriter(path)
            return ParquetWriter(path, pairs=records.pairs, several=several, prompts=records.has_prompts)

        shards: list[dict[str, Any]] = []
        number = 0
        while number < len(records):
            state = run.progress / f"shard-{len(shards):05d}.json"
            if not state.exists():
                path = output / f"shard-{len(shards):05d}{FORMATS[format]}"
                shard = _write_shard(run, records, number, path, create, shard_images, shard_bytes)
                run.write(state, to_json(shard, None))
            shards.append(json.loads(state.read_bytes()))
            advance(shards[-1]["end"] - number)
            number = shards[-1]["end"]
        failed = {name: reason for shard in shards for name, reason in shard["failed"].items()}
        written = [shard for shard in shards if shard["images"]]
        if not written:
            raise ValueError(
                f"none of the {len(records)} images of {records.description} can be read: {_some(failed)}"
            )
        run.write(output / FAILED, to_json(failed) + b"\n")
        counts = {"images": sum(shard["images"] for shard in shards), "failed": len(failed), "shards": len(written)}
        counts["bytes"] = sum(shard["bytes"] for shard in shards)
        hashes = {shard["file"]: shard["sha256"] for shard in written}
        run.finish([*(output / name for name in hashes), output / FAILED], counts | {"sha256": hashes})
    return counts


def _write_shard(
    run: Run,
    records: Records,
    first: int,
    path: Path,
    create: Callable[[Path], ShardWriter],
    shard_images: int | None,
    shard_bytes: int | None,
) -> dict[str, Any]:
    """Writes the shard that begins with a record. Returns its numbers; `end` is the first of the next one."""
    images, size, end, failed = 0, 0, first, dict[str, str]()
    last = len(records) if shard_images is None else min(first + shard_images, len(records))
    with run.writing(path) as temporary:
        with closing(create(temporary)) as shard:
            for number, (record, loaded) in enumerate(_load_all(records, first, last), first):
                if isinstance(loaded, str):
                    failed[record.name] = loaded
                elif shard_bytes is not None and images and size + len(loaded[0]) > shard_bytes:
                    break
                else:
                    shard.add(number, record, *loaded)
                    images, size = images + 1, size + len(loaded[0])
                end = number + 1
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not images:
        path.unlink()
    return {"file": path.name, "images": images, "bytes": size, "end": end, "failed": failed, "sha256": digest}


Loaded = tuple[bytes, Mapping[str, Any]] | str
"""An image file with its format and size, or the reason why it cannot be read."""


def _load_all(records: Records, first: int, last: int) -> Iterator[tuple[Record, Loaded]]:
    """Records with their image files, decoded on all cores to see that they can be."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(first, last, READ_AHEAD):
            read = [records.read_or_reason(number) for number in range(start, min(start + READ_AHEAD, last))]
            yield from zip(read, pool.map(_load, read), strict=True)


def _load(record: Record) -> Loaded:
    try:
        data = file_of(record.image)
        width, height = to_rgb(data).size
        with Image.open(io.BytesIO(data)) as image:
            return data, {"format": str(image.format), "width": width, "height": height}
    except (OSError, ValueError) as error:
        return reason_of(error)


def _some(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(failed.items())[:3])
