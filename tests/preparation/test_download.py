"""`vlv data download`, with the real img2dataset where it is installed, from a server on this machine.

img2dataset has dependencies that are older than those of this project: install it into an environment of its own, and
name its program in `VLV_IMG2DATASET`. Hanging and kills are tested with a program that behaves as it does.
"""

import io
import json
import os
import shutil
import signal
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from vlv.cli.main import main
from vlv.preparation.download import DownloadConfig, download, find_program
from vlv.train import load_pairs

from ..interpreter import PythonProcess
from .inputs import write_downloader, write_metadata, write_urls

PROGRAM = os.environ.get("VLV_IMG2DATASET") or shutil.which("img2dataset")
needs_program = pytest.mark.skipif(PROGRAM is None, reason="img2dataset is not installed")
URLS = 12


@pytest.fixture
def server():
    """Serves pictures by number. Of 1 there is none, 2 is no picture, 3 fails once."""
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2].removesuffix(".jpg")
            asked[name] += 1
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
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
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
    assert main(command) == 1 and server[1].total() == asked
    assert not list((tmp_path / "out").glob(".*"))


@pytest.fixture
def program(tmp_path):
    """A program with img2dataset's options, which hangs once at the fifth of eight URLs; the second is gone."""
    names = [f"url-{number}" for number in range(8)]
    names[1], names[4] = "gone", f"hang:{tmp_path}/hung"
    write_urls(tmp_path / "urls.parquet", names)
    return str(write_downloader(tmp_path / "downloader"))


def tar_captions(folder) -> list[str]:
    """The captions in all shards, with those that are there twice."""
    return sorted(
        shard.extractfile(member).read().decode()
        for path in folder.glob("*.tar")
        for shard in [tarfile.open(path)]
        for member in shard
        if member.name.endswith(".txt")
    )


EVERY_CAPTION = [f"picture {number}" for number in range(8) if number != 1]


@pytest.mark.slow
def test_a_download_that_hangs_is_ended_and_the_next_pass_gets_the_rest(tmp_path, program):
    how = DownloadConfig(shard_images=3, stall_limit=4.0, passes=2)
    counts = download([tmp_path / "urls.parquet"], tmp_path / "out", how, program=program)
    assert counts["passes"] == ["ended after 4 s without progress", "complete"]
    assert (counts["images"], counts["failed"]) == (7, 1)
    assert tar_captions(tmp_path / "out") == EVERY_CAPTION


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.slow
def test_a_killed_download_goes_on_when_what_it_has_started_is_ended(tmp_path, program):
    code = """
import sys
from vlv.preparation.download import DownloadConfig, download
download([sys.argv[1]], sys.argv[2], DownloadConfig(shard_images=3, passes=1), program=sys.argv[3])
"""
    arguments = [str(tmp_path / "urls.parquet"), str(tmp_path / "out"), program]
    files = {"stdout": tmp_path / "stdout", "stderr": tmp_path / "stderr"}
    process = PythonProcess(code, arguments, cwd=Path.cwd(), env=os.environ, with_libraries=False, **files)
    while not (tmp_path / "hung").exists():
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out").glob("*.tar"))
    started = json.loads((tmp_path / "out" / ".progress" / "process.json").read_text())["pid"]
    assert is_alive(started)
    how = DownloadConfig(shard_images=3, passes=1)
    counts = download([tmp_path / "urls.parquet"], tmp_path / "out", how, program=program)
    assert not is_alive(started)
    assert tar_captions(tmp_path / "out") == EVERY_CAPTION
    assert (counts["passes"], counts["images"], counts["failed"]) == (["killed", "complete"], 7, 1)


def test_a_program_that_fails_is_named_with_its_words(tmp_path, urls):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match="ended with exit code 3: no such module"):
        download([urls], tmp_path / "out", DownloadConfig(), program=str(broken))


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
