"""The notebook runs, and its stored output is that of its code."""

import json
import os
from pathlib import Path

import pytest

from .interpreter import run_python

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = json.loads((EXAMPLES / "one_image.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_cells_print_what_is_stored():
    script = "\n".join("".join(cell["source"]) for cell in CELLS).replace(
        "num_inference_steps=25", "num_inference_steps=2"
    )
    done = run_python(script, [], cwd=EXAMPLES, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = [out["text"] for cell in CELLS for out in cell["outputs"] if out["output_type"] == "stream"]
    assert done.stdout == "".join(line for lines in stored for line in lines)


def test_every_cell_was_run_and_five_show_images():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [out for cell in CELLS for out in cell["outputs"]]
    assert len([out for out in outputs if "image/png" in out.get("data", {})]) == 5
    assert not [out for out in outputs if out["output_type"] == "error"]
