"""Writes small files of training data."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, numbers: range, captions: dict[int, tuple[str, bytes]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            suffix, text = (captions or {}).get(number, (".txt", f"caption {number}".encode()))
            for name, data in ((f"{number:04}.png", encoded(number)), (f"{number:04}{suffix}", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers: range, rows_in_a_group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = [{"image": {"bytes": encoded(n), "path": None}, "text": f"caption {n}"} for n in numbers]
    parquet.write_table(pa.Table.from_pylist(table), path, row_group_size=rows_in_a_group)
