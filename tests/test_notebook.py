"""The notebook runs, and shows what it shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "one_image.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_every_cell_runs():
    script = "\n".join(CODE).replace("num_inference_steps=25", "num_inference_steps=2")
    done = subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout
    assert "(1, 24, 128)" in said and "a small frog in the top left" in said and "nats" in said


def test_it_was_run_before_it_was_committed():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    pictures = [out for cell in cells for out in cell["outputs"] if "image/png" in out.get("data", {})]
    assert len(pictures) == 5
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
