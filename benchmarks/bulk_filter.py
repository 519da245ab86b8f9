"""Measures `vlv data filter` on synthetic metadata: `python benchmarks/bulk_filter.py`, at the root of a checkout.

Makes parquet files with LAION's columns, filters them in a process of its own, and prints rows a second and the peak
of that process's memory, with all that it imports.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_A_FILE = 1_000_000


def make_metadata(path: Path, rows: int, seed: int) -> None:
    """Rows with URLs of some 60 characters, captions of 20 to 200, and a share of missing values."""
    import numpy as np  # here: the parent of the measured process stays small
    import pyarrow as pa
    from pyarrow import parquet

    random = np.random.default_rng(seed)
    text = random.integers(97, 123, rows * 200 // 10 + 400, dtype=np.uint8).tobytes().decode()
    starts, lengths = random.integers(0, len(text) - 200, rows), random.integers(20, 200, rows)
    urls = [f"https://images-{seed}.example.org/{number % 977}/{number:040d}.jpg" for number in range(rows)]
    captions = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    sizes = np.exp(random.normal(6.6, 0.6, (2, rows))).astype(np.int64)
    columns = {"URL": urls, "TEXT": captions, "WIDTH": sizes[0], "HEIGHT": sizes[1]}
    columns["pwatermark"] = pa.array(random.random(rows), mask=random.random(rows) < 0.02)
    columns["AESTHETIC_SCORE"] = random.normal(5.5, 0.7, rows)
    parquet.write_table(pa.table(columns), path, row_group_size=ROWS_A_FILE)


def measure(files: list[Path], output: Path, sample: int | None) -> tuple[float, float]:
    """Seconds and the peak of memory, in MiB, of one run."""
    command = [sys.executable, "-m", "vlv.cli.main", "data", "filter", *map(str, files), "--output", str(output)]
    command += ["--sample", str(sample)] if sample else []
    began = time.perf_counter()
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--sample", type=int, default=500_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, files = Path(temporary), []
        for first in range(0, options.rows, ROWS_A_FILE):
            files.append(folder / f"{first // ROWS_A_FILE}.parquet")
            arguments = [files[-1], min(ROWS_A_FILE, options.rows - first), first // ROWS_A_FILE]
            subprocess.run([sys.executable, __file__, "--make", *map(str, arguments)], check=True)
        size = sum(file.stat().st_size for file in files)
        print(f"{options.rows:,} rows in {len(files)} files of one row group each, {size / 2**20:.0f} MiB")
        print("| run | seconds | rows/s | peak memory, MiB |\n|---|---|---|---|")
        for name, sample in (("all that pass", None), (f"a sample of {options.sample:,}", options.sample)):
            seconds, peak = measure(files, folder / f"out-{sample}.parquet", sample)
            print(f"| {name} | {seconds:.0f} | {options.rows / seconds:,.0f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_metadata(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
