"""`vlv data download`, with the real img2dataset where it is installed, from a server on this machine.

img2dataset has dependencies that are older than those of this project: install it into an environment of its own, and
name its program in `VLV_IMG2DATASET`.
"""

import io
import os
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vlv.cli.main import main
from vlv.preparation.download import Downloading, download, find_program
from vlv.train import load_pairs

from .inputs import write_metadata

PROGRAM = os.environ.get("VLV_IMG2DATASET") or shutil.which("img2dataset")
needs_program = pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not installed")
URLS = 12


@pytest.fixture
def server():
    """Serves pictures by number. Of 1 there is none, 2 is no picture, 3 fails once, 4 hangs if `hangs` is set."""
    asked: Counter[str] = Counter()
    hangs = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2].removesuffix(".jpg")
            asked[name] += 1
            if name == "4" and hangs.is_set():
                time.sleep(8)
            content = io.BytesIO()
            Image.new("RGB", (40 + int(name), 50), (int(name) * 20, 90, 90)).save(content, "JPEG")
            body = b"words" if name == "2" else content.getvalue()
            status = 404 if name == "1" else 500 if name == "3" and asked[name] == 1 else 200
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked, hangs
    server.shutdown()
    server.server_close()


@pytest.fixture
def urls(tmp_path, server):
    table = {"URL": [f"{server[0]}/{number}.jpg" for number in range(URLS)]}
    table["TEXT"] = [f"picture {number}" for number in range(URLS)]
    parquet.write_table(pa.table(table), tmp_path / "urls.parquet")
    return tmp_path / "urls.parquet"


def captions_in(folder) -> list[str]:
    return sorted(item["caption"] for item in load_pairs(str(folder)))


@needs_program
@pytest.mark.slow
def test_what_failed_is_asked_again_and_what_is_gone_is_not(tmp_path, server, urls, capsys):
    command = ["data", "download", str(urls), "--output", str(tmp_path / "out"), "--shard-images", "5"]
    command += ["--img2dataset", PROGRAM, "--threads", "2"]
    assert main(command) == 1
    assert "12 URLs: 10 images, 2 failed" in capsys.readouterr().err
    assert captions_in(tmp_path / "out") == sorted(f"picture {n}" for n in range(URLS) if n not in (1, 2))
    failed = parquet.read_table(tmp_path / "out" / "failed.parquet")
    assert failed.column("url").to_pylist() == [f"{server[0]}/{number}.jpg" for number in (1, 2)]
    assert "404" in failed.column("reason")[0].as_py()
    assert server[1]["1"] == 1 and server[1]["3"] == 2 and server[1]["5"] == 1
    asked = server[1].total()
    assert main(command) == 0 and server[1].total() == asked
    assert not list((tmp_path / "out").glob(".*"))


@needs_program
@pytest.mark.slow
def test_a_download_that_hangs_is_ended_and_the_next_pass_gets_the_rest(tmp_path, server, urls):
    server[2].set()
    how = Downloading(shard_images=3, threads=2, timeout=60, stall_limit=4.0, passes=2)
    counts = download([urls], tmp_path / "out", how, program=PROGRAM)
    assert counts["passes"][0] == "ended after 4 s without progress"
    assert counts["images"] + counts["failed"] == URLS and counts["images"] >= 6
    assert len(captions_in(tmp_path / "out")) == counts["images"] == len(set(captions_in(tmp_path / "out")))


def test_a_program_that_fails_is_named_with_its_words(tmp_path, urls):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="ended with exit code 3: no such module"):
        download([urls], tmp_path / "out", Downloading(), program=str(broken))


def test_without_img2dataset_the_error_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    metadata = write_metadata(tmp_path / "metadata.parquet", 3)
    command = [
        "data",
        "download",
        str(metadata),
        "--output",
        str(tmp_path / "out"),
        "--img2dataset",
        "no/such/program",
    ]
    assert main(command) == 2
    assert "no/such/program is not a program" in (said := capsys.readouterr().err) and "uv tool install" in said
    monkeypatch.setenv("PATH", str(tmp_path))
    if PROGRAM is None:
        with pytest.raises(ImportError, match="environment of its own"):
            find_program()


def test_metadata_without_urls_are_refused(tmp_path, capsys):
    parquet.write_table(pa.table({"link": ["http://x"]}), tmp_path / "metadata.parquet")
    command = ["data", "download", str(tmp_path / "metadata.parquet"), "--output", str(tmp_path / "out")]
    assert main([*command, "--img2dataset", "/bin/true"]) == 2
    assert "has no column 'url' or 'URL' or 'image_url' for the url; it has link" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metadata.parquet"]
