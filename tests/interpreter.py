"""Fresh Python processes without the seconds that importing torch takes: children of a process that has imported it.

A child has its own environment, folder, arguments and output, as a new process has. Only torch and what belongs to it
are imported already. Libraries that read the environment when they are imported, such as huggingface_hub, are not.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = """
import json, os, signal, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor  # all that transformers imports of torch

def run(request):
    os.setsid()
    signal.alarm(request["timeout"])  # ends a child that hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = ["-c", *request["arguments"]]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)
        code = 0
    except SystemExit as ending:
        if not isinstance(ending.code, int | None):
            print(ending.code, file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    import atexit
    import threading
    threading._shutdown()  # waits for threads, as the end of a process does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    request = json.loads(line)
    if "code" in request:
        answer = os.fork()
        if not answer:
            run(request)
    else:
        answer = os.waitid(os.P_PID, request["pid"], os.WEXITED | request["options"])
        answer = answer and (answer.si_status if answer.si_code == os.CLD_EXITED else -answer.si_status)
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""
MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
"""Code for `run_python` that runs the module in its first argument, as `python -m` does."""
TIMEOUT = 300  # seconds
_server: subprocess.Popen | None = None


class PythonProcess:
    """A running `python -c code arguments...` in a session of its own.

    Args:
        code, arguments: As on the command line. `MODULE` as code runs a module.
        cwd, env: Working folder and environment.
        stdout, stderr: Files, or a terminal's device, that its output is appended to.
    """

    def __init__(
        self,
        code: str,
        arguments: Sequence[str],
        *,
        stdout: str | Path,
        stderr: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.code, self.stderr = code, stderr
        self.returncode: int | None = None
        request = {"code": code, "arguments": list(arguments), "stdout": str(stdout), "stderr": str(stderr)}
        request |= {"cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        self.pid = _ask(request | {"timeout": TIMEOUT})

    def poll(self) -> int | None:
        """The exit code, negative after a signal, or None while it runs."""
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": os.WNOHANG})
        return self.returncode

    def wait(self) -> int:
        """Waits for the exit code.

        Raises:
            TimeoutError: If the process has not ended `TIMEOUT` seconds after its start.
        """
        if self.returncode is None:
            self.returncode = _ask({"pid": self.pid, "options": 0})
        if self.returncode == -signal.SIGALRM:
            raise TimeoutError(f"python -c {self.code[:80]!r} did not end within {TIMEOUT} s; see {self.stderr}")
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kills it and the processes that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def run_python(
    code: str, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess:
    """Runs `python -c code arguments...` and returns its exit code and output, as `subprocess.run` does.

    Raises:
        TimeoutError: If it has not ended after `TIMEOUT` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = PythonProcess(code, arguments, cwd=cwd, env=env, stdout=outputs[0], stderr=outputs[1])
        returncode = process.wait()
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in outputs]
    return subprocess.CompletedProcess([sys.executable, "-c", code, *arguments], returncode, *texts)


def _ask(request: dict) -> int | None:
    """Sends a request to the process that starts the others. It is started with the first request."""
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    return json.loads(_server.stdout.readline())
