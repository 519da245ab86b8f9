"""Kills `jobs/caption-dataset.py` between two shards, starts it again, and compares what it has pushed.

    python -m tests.hub.kill_job

It is started by `uv run`, with a wheel of this source, against a local Hub that has the embedded miniature and a data
set of its example images. uv has to be installed; it downloads what the script needs. Prints a summary; the exit code
is 1 if a caption is not the one of `vlv caption --dataset`, or is lost or doubled.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from vlv.checkpoints import MINIATURE

from ..builders import NOT_PACKAGED
from .server import Hub, serve

ROOT = Path(__file__).parents[2]
ROWS, SHARD_SIZE, KILLED_AFTER = 120, 20, 2
LOAD = """
import json, datasets
rows = datasets.load_dataset("org/captioned", split="train")
print(json.dumps(rows.select_columns(["number", "caption"]).to_dict()))
"""


def write_dataset(folder: Path) -> None:
    """The example images again and again, numbered."""
    contents = [path.read_bytes() for path in sorted((ROOT / "examples" / "images").glob("*.png"))]
    images = [{"bytes": contents[row % len(contents)], "path": f"{row}.png"} for row in range(ROWS)]
    features = Features({"image": ImageFeature(), "number": Value("int32")})
    (folder / "data").mkdir(parents=True)
    table = Dataset.from_dict({"image": images, "number": list(range(ROWS))}, features=features)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")


def count_shards(hub: Hub) -> int:
    repo = hub.repos.get("datasets/org/captioned")
    return 0 if repo is None else sum(name.endswith(".parquet") for name in repo.at("main").files)


def main() -> int:
    hub = Hub()
    with tempfile.TemporaryDirectory() as name, serve(hub) as endpoint:
        folder = Path(name)
        write_dataset(folder / "pictures")
        hub.add_folder("datasets/org/pictures", folder / "pictures")
        hub.add_folder("org/vlv", MINIATURE)
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_org"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        source = shutil.copytree(ROOT, folder / "source", ignore=NOT_PACKAGED)
        subprocess.run(["uv", "build", "--quiet", "--wheel", str(source)], check=True)
        (wheel,) = (source / "dist").glob("*.whl")
        script = ROOT / "jobs" / "caption-dataset.py"
        command = ["uv", "run", "--with", str(wheel), str(script), "org/pictures", "org/captioned"]
        command += ["--model", "org/vlv", "--shard-size", str(SHARD_SIZE)]
        since = time.monotonic()
        with open(folder / "log", "wb") as log:
            job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            while count_shards(hub) < KILLED_AFTER and job.poll() is None:
                time.sleep(0.05)
            os.killpg(job.pid, signal.SIGKILL)
        killed, code = count_shards(hub), job.wait()
        if code != -signal.SIGKILL:
            print((folder / "log").read_text(), file=sys.stderr)
            return 1
        code = subprocess.run(command, env=environment).returncode
        seconds = time.monotonic() - since
        options = ["--model", "org/vlv", "--dataset", "org/pictures", "--output", str(folder / "captions.json")]
        subprocess.run([sys.executable, "-m", "vlv.cli", "caption", *options], env=environment, check=True)
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, check=True, cwd=folder / "home"
        )
        pushed, expected = json.loads(loaded.stdout), json.loads((folder / "captions.json").read_text())
    equal = pushed == {"number": list(range(ROWS)), "caption": [expected[f"train/{row}"] for row in range(ROWS)]}
    titles = [commit.title for commit in hub.repos["datasets/org/captioned"].commits.values()]
    shards = sum(title.startswith("Add the captions") for title in titles)
    print(
        f"killed after {killed} of {ROWS // SHARD_SIZE} shards; exit code of the second run {code}; "
        f"{shards} shards are pushed; {seconds:.0f} s\n"
        f"{ROWS} captions {'equal to those of vlv caption, nothing lost or doubled' if equal else 'DIFFER'}"
    )
    return int(not equal or code or shards != ROWS // SHARD_SIZE)


if __name__ == "__main__":
    sys.exit(main())
