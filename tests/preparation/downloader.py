"""What `vlv data download` needs of img2dataset: its options and the files that it writes, without a network.

A URL with `gone` in it answers 404. One that begins with `hang:` names a file: where that does not exist, it is made,
and the program hangs; afterwards the URL has an image. One that begins with `slow` takes 10 ms. Until it hangs or
ends, the file `log` grows.
"""

import io
import json
import sys
import tarfile
import threading
import time
from pathlib import Path

HANGS = threading.Event()


def grow(log: Path) -> None:
    while not HANGS.wait(0.2):
        with log.open("a") as file:
            file.write("works\n")


def write_shard(folder: Path, number: int, rows: list[dict]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
        for place, row in enumerate(rows):
            if row["url"].startswith("hang:") and not (marker := Path(row["url"].removeprefix("hang:"))).exists():
                HANGS.set()
                marker.touch()
                time.sleep(30)
                sys.exit(1)
            time.sleep(0.01 * row["url"].startswith("slow"))
            is_gone = "gone" in row["url"]
            row |= {"status": "failed_to_download" if is_gone else "success"}
            row |= {"error_message": "HTTP Error 404: Not Found" if is_gone else None}
            members = {} if is_gone else {"jpg": b"GIF89a" + bytes(64), "txt": row["caption"].encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{number:05d}{place:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    successes = sum(row["status"] == "success" for row in rows)
    parquet.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(rows), "successes": successes}))


def main(arguments: list[str]) -> None:
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    threading.Thread(target=grow, args=[Path(options["output_folder"], "log")], daemon=True).start()
    from pyarrow import parquet  # slowly

    columns = [options["url_col"], options["caption_col"], "row"]
    rows = parquet.read_table(options["url_list"], columns=columns).to_pylist()
    size = int(options["number_sample_per_shard"])
    for first in range(0, len(rows), size):
        write_shard(Path(options["output_folder"]), first // size, rows[first : first + size])


if __name__ == "__main__":
    main(sys.argv[1:])
