"""`vlv serve` of the embedded miniature, in a process of its own, and clients of it."""

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..interpreter import PythonProcess

KEY = "the key of the tests"
MODEL = "vlv-miniature"


@dataclass
class RunningServer:
    """A process of `vlv serve`."""

    process: Any
    url: str
    log: Path

    def client(self, **arguments) -> Any:
        import openai

        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0} | arguments)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def start_server(log: Path, *arguments: str) -> RunningServer:
    """Starts `vlv serve` with the embedded miniature on a free port and waits until it listens."""
    log.touch()
    code = "import sys; from vlv.cli.main import main; sys.exit(main())"
    options = ["serve", "--port", "0", "--api-key", KEY, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = PythonProcess(code, options, stdout=log, stderr=log, env=environment)
    while not (found := re.search(r"at (http://\S+)/v1", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    return RunningServer(process, found.group(1), log)
