"""Other people's computers: fresh folders, fresh caches, with or without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Stands in for an environment in which this package was never installed.
WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vlv":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


class Machine:
    """A computer with a Hub client of its own: a fresh working folder and a fresh cache."""

    def __init__(self, folder: Path, endpoint: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("HF_TOKEN", "PYTHONPATH"):
            self.environment.pop(name, None)

    def python(self, script: str, *arguments, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def stranger(self, script: str, *arguments, **environment) -> dict:
        done = self.python(WITHOUT_THE_PACKAGE + script, *arguments, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def vlv(self, *arguments, **environment) -> subprocess.CompletedProcess:
        return self.python("import sys; from vlv.cli.main import main; sys.exit(main())", *arguments, **environment)
