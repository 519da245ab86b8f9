"""A user's machine: fresh processes with an empty folder and cache, with or without this package."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from ..interpreter import run_python

_links = tempfile.TemporaryDirectory(prefix="vlv-hf-home-")

# Makes `import vlv` fail, as where this package is not installed.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vlv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


class Machine:
    """Runs Python in a working folder and with a Hub cache of its own, `hf`.

    `HF_HOME` is a link to it, the same one for each machine: processes with equal variables share imported libraries.
    """

    def __init__(self, folder: Path, endpoint: str):
        self.folder = folder
        (folder / "hf").mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(Path(_links.name, "hf")),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("HF_TOKEN", "PYTHONPATH"):
            self.environment.pop(name, None)

    def python(self, script: str, *arguments, **environment) -> subprocess.CompletedProcess:
        """Runs a script in a fresh process."""
        link = Path(self.environment["HF_HOME"])
        link.unlink(missing_ok=True)
        link.symlink_to(self.folder.absolute() / "hf")
        return run_python(script, [*map(str, arguments)], cwd=self.folder, env=self.environment | environment)

    def without_package(self, script: str, *arguments, **environment):
        """Runs a script where `import vlv` fails. Returns the JSON of its last line of output."""
        done = self.python(WITHOUT_PACKAGE + script, *arguments, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def vlv(self, *arguments, **environment) -> subprocess.CompletedProcess:
        return self.python("import sys; from vlv.cli.main import main; sys.exit(main())", *arguments, **environment)
